"""Build a dataset of Sudokus: 9x9 from the hub or a file, or generated.

    python prepare/sudoku.py --subsample-size 1000 --num-aug 1000  # the paper's
    python -m prepare mini                                         # 6x6
    python prepare/sudoku.py --source FILE --num-test 100 --output-dir data/mine

A CSV file has a header with the columns question and answer. A board is
S = size * size tokens: blank 1, digit d is d + 1; 0 is padding. Equal seeds
give equal bytes, those of the published builder.
"""

import sys
from functools import cache
from math import isqrt
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prepare
from prepare import boards, building, write_boards
from tools.common import bounded, cli, progress

BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size: rows and columns of a box


def check(question, answer, size):
    """Whether `answer` is a legal solution that keeps the givens: (..., S) tokens each -> (...) bool."""
    h, w = BOX[size]
    legal = ((question == 1) | (question == answer)).all(-1)
    bits = np.left_shift(
        1, np.minimum(answer, size + 2), dtype=np.int32
    )  # a non-digit: a bit outside all_digits
    all_digits = (1 << size + 2) - 4
    grid = bits.reshape(*bits.shape[:-1], size // h, h, size // w, w)
    for axes in ((-2, -1), (-4, -3), (-3, -1)):  # rows, columns, boxes
        found = np.bitwise_or.reduce(grid, axis=axes)
        legal &= (found == all_digits).all((-2, -1))
    return legal


# ---------------------------------------------------------------------------------------------
# Symmetries: new = relabel[old[cells]]


def draw_order(rng, size, band):
    """A permutation of `size` rows or columns that permutes bands, and the lines of each band."""
    order = []
    for i in rng.permutation(size // band).tolist():
        order += (i * band + rng.permutation(band)).tolist()
    return order


def draw_symmetries(rng, n, size):
    """Draw n symmetries: relabel (n, size + 2) maps tokens, cells (n, S) is the old index of each new cell.

    rng: numpy RandomState. The order of the draws is the published builder's, for equal bytes."""
    h, w = BOX[size]
    relabel = np.zeros((n, size + 2), np.uint8)
    relabel[:, 1] = 1
    cells = np.zeros((n, size, size), np.int64)
    board = np.arange(size * size).reshape(size, size)
    for i in range(n):
        relabel[i, 2:] = rng.permutation(size) + 2
        transpose = h == w and rng.rand() < 0.5  # boxes of 2 x 3 cannot be transposed
        rows = draw_order(rng, size, h)
        columns = draw_order(rng, size, w)
        old = board.T if transpose else board
        cells[i] = old[rows][:, columns]
    return relabel, cells.reshape(n, size * size)


def augment(rng, pairs, size, num_aug):
    """Add num_aug symmetric copies after each question and answer: (2, N, S) -> (2, N * (1 + num_aug), S)."""
    if not num_aug:
        return pairs
    out = np.repeat(pairs[:, :, None], 1 + num_aug, axis=2)
    for p in progress(range(pairs.shape[1]), desc="augmenting", unit=" puzzles"):
        relabel, cells = draw_symmetries(rng, num_aug, size)
        for copies in out[:, p, 1:]:  # of the question, then of the answer: (num_aug, S)
            moved = np.take_along_axis(copies, cells, axis=1)
            copies[:] = np.take_along_axis(relabel, moved, axis=1)
    return out.reshape(2, -1, size * size)


@cache
def units(size):
    """(S, 3): row, column and box of every cell, numbered consecutively from 0 to 3 * size - 1."""
    h, w = BOX[size]
    rows, columns = np.divmod(np.arange(size * size), size)
    boxes = rows // h * h + columns // w
    return np.stack([rows, size + columns, 2 * size + boxes], axis=1)


def mix(x):
    """Scramble uint64 values."""
    x = (x ^ (x >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return x ^ (x >> np.uint64(29))


def symmetry_hash(question, answer, size):
    """Integers that are equal for symmetric puzzles: (..., S) tokens each -> (...) uint64.

    They depend only on which cells are givens and which cells share a row, column, box or digit of the
    answer, through sums over such cells. A symmetry reorders the sums, or swaps rows with columns, whose sums
    are added."""
    questions = question.reshape(-1, size * size)
    answers = answer.reshape(-1, size * size)
    each = np.arange(len(answers))[:, None]
    h = mix(questions.clip(1, 2).astype(np.uint64))  # (N, S)
    unit_of = [*units(size).T % size, answers - 2]  # by row, by column, by box, by digit
    for _ in range(3):
        totals = []  # for every cell the mixed sum over the cells of its unit
        for unit in unit_of:
            sums = np.zeros((len(h), size), np.uint64)
            np.add.at(sums, (each, unit), h)
            totals.append(mix(sums)[each, unit])
        row, column, box, digit = totals
        h = mix(h + row + column + mix(box) + mix(mix(digit)))
    return h.sum(1).reshape(question.shape[:-1])[()]


# ---------------------------------------------------------------------------------------------
# Generating


def solve(board, size, order):
    """The first solution of a board without contradictions, or None.

    board: S bits, 1 << (digit - 1), 0 for a blank. order: the bits to try in each cell, in turn. The blank
    with the fewest candidates is filled first."""
    board = list(board)
    units_of = units(size).tolist()
    taken = [0] * (3 * size)  # digits of every unit
    for cell, bit in enumerate(board):
        for unit in units_of[cell]:
            taken[unit] |= bit
    blanks = [cell for cell, bit in enumerate(board) if not bit]

    def search():
        fewest = size + 1
        free = 0
        for i, cell in enumerate(blanks):
            row, column, box = units_of[cell]
            candidates = ~(taken[row] | taken[column] | taken[box]) & (1 << size) - 1
            if candidates.bit_count() < fewest:
                fewest = candidates.bit_count()
                index = i
                free = candidates
                if fewest < 2:
                    break
        if fewest > size:  # no blank is left
            return True
        cell = blanks.pop(index)
        row, column, box = units_of[cell]
        for bit in order[cell]:
            if bit & free:
                board[cell] = bit
                for unit in (row, column, box):
                    taken[unit] ^= bit
                if search():
                    return True
                for unit in (row, column, box):
                    taken[unit] ^= bit
        blanks.insert(index, cell)
        return False

    return board if search() else None


def make_puzzle(rng, size):
    """A random puzzle with one solution and no redundant clue: question, answer, symmetry hash.

    Clues of a random full board are removed in random order, unless there is a solution with another digit in
    that cell. So the solution remains unique, and every clue that is left is necessary."""
    order = (1 << rng.rand(size * size, size).argsort(1)).tolist()
    answer = solve([0] * (size * size), size, order)
    question = list(answer)
    for cell in rng.permutation(size * size).tolist():
        question[cell] = 0
        others = [bit for bit in order[cell] if bit != answer[cell]]
        if solve(question, size, [*order[:cell], others, *order[cell + 1 :]]):
            question[cell] = answer[cell]
    tokens = [np.array([bit.bit_length() + 1 for bit in board], np.uint8) for board in (question, answer)]
    return *tokens, int(symmetry_hash(*tokens, size))


# ---------------------------------------------------------------------------------------------
# The command

TASK = boards.BoardTask(
    repo="sapientinc/sudoku-extreme",
    published_size=9,
    sizes=tuple(BOX),
    alphabet={".": 1, **{str(digit): digit + 1 for digit in range(10)}},
    is_valid=check,
    symmetry_hash=symmetry_hash,
)


def flags():
    parser = boards.common_flags(__doc__, TASK)
    add = parser.add_argument
    copies = bounded(int, 0, 10**6)
    add("--size", type=int, choices=BOX, default=6, help="side of generated boards")
    add("--num-aug", type=copies, default=0, metavar="N", help="symmetric copies of each training board")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    recipe = prepare.recipe_of("sudoku", argv)
    with building(prepare.output_dir(args, recipe), recipe, args.overwrite) as folder:
        rng = np.random.RandomState(args.seed)
        train, test = boards.load(args, TASK, lambda: make_puzzle(rng, args.size), rng)
        size = isqrt(test.shape[2])
        train = augment(rng, train, size, args.num_aug)
        if size == 9 and args.num_aug:
            train = train.astype(np.int64)  # as published
        write_boards(folder, {"train": train, "test": test}, size + 2, 1 + args.num_aug)


if __name__ == "__main__":
    cli(main)
