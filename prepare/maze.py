"""Build a dataset of mazes: 30x30 from the hub or CSV files, or generated here.

    python prepare/maze.py                              # Maze-Hard, the paper's
    python prepare/maze.py --source generate --size 12  # no network

A CSV names its columns in the first line: question, answer. A board is
size * size of '# SGo': wall, free, start, goal, path (answers only), tokens 1
to 5 (0 is padding). Equal seeds give the bytes of the published builder.
"""
import sys
import zlib
from functools import partial
from itertools import count
from math import isqrt
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, cli, within
from data import dihedral, write_dataset
from prepare import boards

WALL, FREE, START, GOAL, PATH = range(1, 6)
STEPS = (-1, 0), (0, 1), (1, 0), (0, -1)
SIZES = range(5, 101)


def distance(open_cells, start, goal):
    """Steps from start to goal through open cells, -1 where there is no way: (N, H, W) bool -> (N,) int."""
    reached, found = start & open_cells, np.full(len(start), -1)
    for steps in count():
        found[(found < 0) & (reached & goal).any((1, 2))] = steps
        near = np.pad(reached, ((0, 0), (1, 1), (1, 1)))
        near = near[:, 2:, 1:-1] | near[:, :-2, 1:-1] | near[:, 1:-1, 2:] | near[:, 1:-1, :-2]
        if not (near & open_cells & ~reached).any():
            return found
        reached |= near & open_cells


def check(question, answer, width, shortest=True):
    """Is `answer` the question with a path from S to G on free cells, and a shortest one (False: any that is
    unbroken)? (..., H * width) tokens each -> (...) bool."""
    q, a = (np.asarray(x).reshape(-1, x.shape[-1] // width, width) for x in (question, answer))
    start, goal, path = q == START, q == GOAL, a == PATH
    kept = np.where(path, FREE, a) == np.where(q == PATH, 0, q)  # a question has no path yet
    ends = (start.sum((1, 2)) == 1) & (goal.sum((1, 2)) == 1)
    steps = distance(path | start | goal, start, goal)
    right = kept.all((1, 2)) & ends & (steps >= 0)
    if shortest:
        right &= (steps == distance(q != WALL, start, goal)) & (steps == path.sum((1, 2)) + 1)
    return right.reshape(question.shape[:-1])


def kinship(questions, answers, size):
    """Integers (N,) that are equal for turned and mirrored copies of a maze."""
    mazes = questions.reshape(-1, size, size)
    return [sum(zlib.crc32(dihedral(maze, t).tobytes()) for t in range(8)) for maze in mazes]


# ---------------------------------------------------------------------------------------------
# Generating

def carve(rng, size, loops):
    """(size, size) bool, True for walls: rooms at odd coordinates, joined by a depth-first walk, then a share
    `loops` of the inner walls opened."""
    wall = np.ones((size, size), bool)
    wall[1, 1], walk = False, [(1, 1)]
    while walk:
        r, c = walk[-1]
        ways = [(dr, dc) for dr, dc in STEPS if 0 < r + 2 * dr < size - 1 and 0 < c + 2 * dc < size - 1
                and wall[r + 2 * dr, c + 2 * dc]]
        if ways:
            dr, dc = ways[rng.randint(len(ways))]
            wall[r + dr, c + dc] = wall[r + 2 * dr, c + 2 * dc] = False
            walk.append((r + 2 * dr, c + 2 * dc))
        else:
            walk.pop()
    wall[1:-1, 1:-1] &= rng.rand(size - 2, size - 2) >= loops
    return wall


def neighbours(cell):
    return [(cell[0] + dr, cell[1] + dc) for dr, dc in STEPS]


def explore(wall, start):
    """{cell: steps from start} and {cell: number of shortest paths from start}, nearest cells first."""
    steps, ways, queue = {start: 0}, {start: 1}, [start]
    for cell in queue:
        for near in neighbours(cell):
            if not wall[near] and steps.setdefault(near, steps[cell] + 1) > steps[cell]:
                if near not in ways:
                    queue.append(near)
                ways[near] = ways.get(near, 0) + ways[cell]
    return steps, ways


def make_maze(rng, size, min_path, loops=0.02):
    """A random maze with one shortest path from S to G, of min_path steps or more: question, answer and
    kinship. Raises UserError."""
    for _ in range(200):
        wall = carve(rng, size, loops)
        free = np.argwhere(~wall).tolist()
        start = tuple(free[rng.randint(len(free))])
        steps, ways = explore(wall, start)
        goals = [cell for cell in steps if ways[cell] == 1 and steps[cell] >= min_path]
        if goals:
            break
    else:
        raise UserError(f"--min-path {min_path} was not reached in 200 mazes of --size {size}; ask for less")
    goal = cell = goals[rng.randint(len(goals))]
    question = np.where(wall, WALL, FREE).astype(np.uint8)
    question[start], question[goal] = START, GOAL
    answer = question.copy()
    for _ in range(steps[goal] - 1):
        cell = next(near for near in neighbours(cell) if steps.get(near) == steps[cell] - 1)
        answer[cell] = PATH
    return question.ravel(), answer.ravel(), kinship(question, answer, size)[0]


# ---------------------------------------------------------------------------------------------
# The command

GAME = boards.Game(builder="maze", repo="sapientinc/maze-30x30-hard-1k", published="30x30-hard-1k",
                   alphabet={"#": WALL, " ": FREE, "S": START, "G": GOAL, "o": PATH}, sizes=SIZES,
                   right=partial(check, shortest=False), kinship=kinship)


def flags():
    parser = boards.flags(__doc__, GAME)
    add = parser.add_argument
    add("--size", type=within(int, SIZES[0], SIZES[-1]), default=30, metavar="N", help="of generated mazes")
    add("--min-path", type=within(int, 1, 10 ** 4), metavar="N",
        help="least steps of generated paths; without, size * size / 8, at most 4 * size")
    add("--loops", type=within(float, 0, 1), default=0.02, metavar="X",
        help="share of inner walls opened; 0: one way only, and no shorter one to be found")
    add("--aug", action="store_true", help="training mazes in all eight turned and mirrored forms")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    rng = np.random.RandomState(args.seed)
    args.output_dir = args.output_dir or f"data/maze-{boards.source_name(args, GAME)}"
    min_path = args.min_path or min(args.size ** 2 // 8, 4 * args.size)
    make = partial(make_maze, rng, args.size, min_path, args.loops)
    train, test, recipe = boards.load(args, GAME, make, rng)
    if args.aug:
        size = isqrt(test.shape[2])
        grids = train.reshape(2, -1, size, size)
        train = np.stack([dihedral(grids, t) for t in range(8)], axis=2).reshape(2, -1, size * size)
    write_dataset(args.output_dir, {"train": train, "test": test}, 6, recipe, group_size=8 if args.aug else 1)


if __name__ == "__main__":
    cli(main)
