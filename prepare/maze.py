"""Build a dataset of mazes: 30x30 from the hub or a file, or generated.

    python prepare/maze.py          # Maze-Hard, as in the paper
    python -m prepare maze-gen      # 100,000 generated boards of its kind
    python prepare/maze.py --source generate --size 12 --output-dir data/maze-12

A CSV file has a header with the columns question and answer. A board is
size * size of '# SGo': wall, free, start, goal, path (in answers), tokens 1 to
5; 0 is padding. Equal seeds give equal bytes, those of the published builder
where it has the same option.

Every answer of Maze-Hard follows one rule, which generated boards and --relabel
use: breadth-first search from S, neighbours in the order down, left, right, up;
the parent of a cell is the cell that found it first; the path follows the
parents back from G. This breaks the tie between millions of shortest paths.
"""

import sys
import zlib
from functools import cache, partial
from itertools import product
from math import isqrt
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prepare
from prepare import boards, building, dihedral, write_boards
from tools.common import UserError, bounded, cli, progress

WALL, FREE, START, GOAL, PATH = range(1, 6)
SIZES = range(5, 101)

# ---------------------------------------------------------------------------------------------
# The rules


@cache
def neighbours(height, width):
    """For every cell, numbered row by row, the cells below, left, right and above."""
    result = []
    for r, c in product(range(height), range(width)):
        near = []
        for y, x in ((r + 1, c), (r, c - 1), (r, c + 1), (r - 1, c)):
            if 0 <= y < height and 0 <= x < width:
                near.append(y * width + x)
        result.append(near)
    return result


def search(is_open, start, width):
    """Breadth-first search by the rule: {cell: (steps from start, parent)}, in the order of discovery.

    is_open: list of S bools."""
    near_of = neighbours(len(is_open) // width, width)
    found = {start: (0, start)}
    queue = [start]
    for cell in queue:
        for near in near_of[cell]:
            if is_open[near] and near not in found:
                found[near] = found[cell][0] + 1, cell
                queue.append(near)
    return found


def label_path(question, size):
    """The answer (S,) to a question (S,) by the rule of Maze-Hard. G must be reachable."""
    answer = np.array(question)
    tokens = answer.tolist()
    start = tokens.index(START)
    goal = tokens.index(GOAL)
    found = search((answer != WALL).tolist(), start, size)
    cell = found[goal][1]
    while cell != start:
        answer[cell] = PATH
        cell = found[cell][1]
    return answer


def is_solution(question, answer, width, shortest):
    """check() for one board."""
    tokens = question.tolist()
    if tokens.count(START) != 1 or tokens.count(GOAL) != 1:
        return False
    start = tokens.index(START)
    goal = tokens.index(GOAL)
    path = answer == PATH
    if not np.array_equal(np.where(path, FREE, answer), question):
        return False
    along_path = search((answer > FREE).tolist(), start, width)
    if goal not in along_path or not shortest:
        return goal in along_path
    anywhere = search((question != WALL).tolist(), start, width)
    return along_path[goal][0] == anywhere[goal][0] == path.sum() + 1


def check(question, answer, width, shortest=True):
    """Whether `answer` is the question with an unbroken path of free cells from S to G.

    question, answer: (..., H * width) tokens -> (...) bool. shortest: the path must be a shortest one."""
    question = np.asarray(question)
    answer = np.asarray(answer)
    valid = []
    for index in np.ndindex(question.shape[:-1]):
        valid.append(is_solution(question[index], answer[index], width, shortest))
    return np.reshape(valid, question.shape[:-1])


def relabel(pairs, size):
    """Questions and answers (2, N, S) with all answers computed anew by the rule."""
    questions = progress(pairs[0], desc="relabeling", unit=" boards")
    return np.stack([pairs[0], [label_path(question, size) for question in questions]])


def symmetry_hash(questions, answers, size):
    """Integers (N,) that are equal for rotated and reflected copies of a maze; (N, S) tokens each."""
    hashes = []
    for maze in questions.reshape(-1, size, size):
        hashes.append(sum(zlib.crc32(dihedral(maze, t).tobytes()) for t in range(8)))
    return hashes


# ---------------------------------------------------------------------------------------------
# Generating boards of Maze-Hard's kind

WALL_SHARE = 0.28, 0.45
BATCH = 1024  # random boards that are searched at once; about one in 1,600 of size 30 has a long path
MAX_BATCHES = 200  # without a single board, before giving up


def default_min_path(size):
    """109 steps at size 30, as in Maze-Hard: in proportion to the cells of smaller boards, and to the side of
    larger ones, because that is how their longest paths grow."""
    return min(109 * size * size // 900, 109 * size // 30)


def has_long_path(free, start, row, min_path):
    """Whether some cell is min_path steps from the start, for many boards at once: (N,) bool.

    free: (cells, N) bool, the last row and column of every board False; start: (N,) cells. Eight boards share
    a byte, so that one bitwise operation takes a step of the breadth-first search on all of them."""
    frontier = np.zeros_like(free)
    frontier[start, np.arange(len(start))] = True
    frontier = np.packbits(frontier, axis=1)  # (cells, N / 8)
    unseen = np.packbits(free, axis=1) & ~frontier
    for _ in range(min_path):
        near = np.zeros_like(frontier)
        for offset in (1, row):  # left and right, then up and down
            near[offset:] |= frontier[:-offset]
            near[:-offset] |= frontier[offset:]
        frontier = near & unseen
        unseen ^= frontier
    reached = np.bitwise_or.reduce(frontier, axis=0)
    return np.unpackbits(reached).astype(bool)


def draw_batch(rng, size, min_path):
    """Free cells (n, S) bool and start cells (n,) of those boards in a random batch that have a long path.

    The wall share is uniform in WALL_SHARE, S uniform over the free cells."""
    row = size + 1
    each = np.arange(BATCH)
    threshold = rng.uniform(*WALL_SHARE, BATCH) * (1 << 16)
    noise = rng.randint(1 << 16, size=(size, size, BATCH), dtype=np.uint16)
    free = np.zeros((row, row, BATCH), bool)  # the last row and column remain walls
    free[:size, :size] = noise >= threshold.astype(np.uint16)
    y, x = rng.randint(size, size=(2, BATCH))
    free[y, x, each] = True
    start = y * row + x
    kept = np.flatnonzero(has_long_path(free.reshape(row * row, BATCH), start, row, min_path))
    boards = free[:size, :size, kept].reshape(size * size, -1).T
    wall_share = 1 - boards.mean(1)  # differs from the drawn share by chance
    in_range = (wall_share >= WALL_SHARE[0]) & (wall_share <= WALL_SHARE[1])
    return boards[in_range], (y * size + x)[kept][in_range]


def draw_mazes(rng, size, min_path):
    """Yield random boards: question (S,), answer (S,), symmetry hash. rng: numpy RandomState.

    G is uniform over the cells at least min_path steps from S. Raises UserError if there is no such board."""
    failures = 0
    while failures < MAX_BATCHES:
        failures += 1
        for free, start in zip(*draw_batch(rng, size, min_path)):
            found = search(free.tolist(), int(start), size)
            goals = [cell for cell, (steps, _) in found.items() if steps >= min_path]
            question = np.where(free, FREE, WALL).astype(np.uint8)
            question[start] = START
            question[goals[rng.randint(len(goals))]] = GOAL
            failures = 0
            yield question, label_path(question, size), symmetry_hash(question, None, size)[0]
    raise UserError(f"found no maze of --size {size} with --min-path {min_path}; lower it")


# ---------------------------------------------------------------------------------------------
# The command

TASK = boards.BoardTask(
    repo="sapientinc/maze-30x30-hard-1k",
    published_size=30,
    sizes=SIZES,
    alphabet={"#": WALL, " ": FREE, "S": START, "G": GOAL, "o": PATH},
    is_valid=partial(check, shortest=False),
    symmetry_hash=symmetry_hash,
)


def flags():
    parser = boards.common_flags(__doc__, TASK)
    add = parser.add_argument
    side = bounded(int, SIZES[0], SIZES[-1])
    steps = bounded(int, 1, 10**4)
    add("--size", type=side, default=30, metavar="N", help="side of generated mazes")
    add("--min-path", type=steps, metavar="N", help="least steps from S to G (default: 109 at size 30)")
    add("--aug", action="store_true", help="add the 7 rotated and reflected copies of every training maze")
    add("--relabel", action="store_true", help="compute all answers anew by the rule, after --aug")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    recipe = prepare.recipe_of("maze", argv)
    with building(prepare.output_dir(args, recipe), recipe, args.overwrite) as folder:
        rng = np.random.RandomState(args.seed)
        mazes = draw_mazes(rng, args.size, args.min_path or default_min_path(args.size))
        train, test = boards.load(args, TASK, partial(next, mazes), rng)
        size = isqrt(test.shape[2])
        if args.aug:
            grids = train.reshape(2, -1, size, size)
            copies = [dihedral(grids, t) for t in range(8)]
            train = np.stack(copies, axis=2).reshape(2, -1, size * size)
        if args.relabel:
            train = relabel(train, size)
            test = relabel(test, size)
        elif args.aug:
            print(
                "note: rotated answers contradict the tie-break of the others; --relabel computes them anew"
            )
        group_size = 8 if args.aug else 1
        write_boards(folder, {"train": train, "test": test}, 6, group_size)
    if args.source == "generate":
        questions, answers = np.concatenate([train, test], axis=1)
        wall_share = (questions == WALL).mean()
        steps = np.median((answers == PATH).sum(1) + 1)
        # Maze-Hard has 0.372 and 112
        print(f"mean wall share {wall_share:.3f}, median path length {steps:.0f} steps")


if __name__ == "__main__":
    cli(main)
