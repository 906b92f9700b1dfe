"""Build a Sudoku dataset: 9x9 from the hub or CSV files, or generated here.

    python prepare/sudoku.py --subsample-size 1000 --num-aug 1000  # the paper's
    python prepare/sudoku.py --source generate --num-aug 1000      # no network

A CSV names its columns in the first line: question (or puzzle, quizzes), answer
(or solution), if there is one rating (or difficulty); blanks are '.' or 0.
Everywhere, a board is S = size * size tokens: blank 1, digit d is d + 1 (0 is
padding). Equal seeds give the bytes of the published builder.
"""
import sys
from functools import cache
from itertools import chain, islice
from math import isqrt
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import cli, progress, within
from data import write_dataset
from prepare import boards

BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size: rows and columns of a box


def check(question, answer, size):
    """Is `answer` a legal solution that keeps the givens? (..., S) tokens each -> (...) bool."""
    h, w = BOX[size]
    bits = np.left_shift(1, np.minimum(answer, size + 2), dtype=np.int32)  # no digit: a bit not in `full`
    grid = bits.reshape(*bits.shape[:-1], size // h, h, size // w, w)
    full = (1 << size + 2) - 4
    legal = ((question == 1) | (question == answer)).all(-1)
    for axes in ((-2, -1), (-4, -3), (-3, -1)):             # rows, columns, boxes
        legal &= (np.bitwise_or.reduce(grid, axis=axes) == full).all((-2, -1))
    return legal


# ---------------------------------------------------------------------------------------------
# Symmetries: new = relabel[old[cells]]

def draw_symmetries(rng, n, size):
    """Draw n symmetries: relabel (n, size + 2) maps tokens, cells (n, S) says where each cell comes from.

    rng: numpy RandomState. The order of the draws is the published builder's, so that its bytes come out.
    """
    h, w = BOX[size]
    digits, rows, cols = (np.empty((n, size), np.int64) for _ in range(3))
    flip = np.zeros((n, 1, 1), bool)

    def lines(m):   # which old row, or column, each new one is; m of them make a band
        bands = rng.permutation(size // m).tolist()
        return [band * m + line for band in bands for line in rng.permutation(m).tolist()]

    for i in range(n):
        digits[i] = rng.permutation(size)
        flip[i] = h == w and rng.rand() < 0.5       # 6x6 is not transposed: its boxes would not fit
        rows[i], cols[i] = lines(h), lines(w)
    relabel = np.concatenate([np.tile([0, 1], (n, 1)), digits + 2], axis=1).astype(np.uint8)
    rows, cols = rows[:, :, None], cols[:, None, :]
    return relabel, np.where(flip, cols * size + rows, rows * size + cols).reshape(n, size * size)


def augment(rng, pairs, size, num_aug):
    """Each question and answer, then num_aug symmetries of it: (2, N, S) -> (2, N * (1 + num_aug), S)."""
    out = np.repeat(pairs[:, :, None], 1 + num_aug, axis=2)
    for p in progress(range(pairs.shape[1] if num_aug else 0), desc="augmenting", unit=" puzzles"):
        relabel, cells = draw_symmetries(rng, num_aug, size)
        for copies in out[:, p, 1:]:        # of the question, then of the answer: (num_aug, S)
            moved = np.take_along_axis(copies, cells, axis=1)
            copies[:] = np.take_along_axis(relabel, moved, axis=1)
    return out.reshape(2, -1, size * size)


# ---------------------------------------------------------------------------------------------
# Generating

@cache
def units(size):
    """The row, column and box of every cell, numbered through: S tuples of three, each 0 .. 3 * size - 1."""
    h, w = BOX[size]
    return [(r, size + c, 2 * size + r // h * h + c // w) for r in range(size) for c in range(size)]


def solve(board, size, order):
    """The first solution of `board` (without contradictions), or None.

    Boards are S bits, 1 << (digit - 1), 0 for a blank. The blank with the fewest candidates is filled first,
    cell c only with the bits order[c], in turn."""
    units_of, board, taken = units(size), list(board), [0] * 3 * size
    blanks = [c for c, bit in enumerate(board) if not bit]
    for c, bit in enumerate(board):
        for u in units_of[c]:
            taken[u] |= bit

    def search():
        fewest, free = size + 1, 0
        for i, c in enumerate(blanks):
            r, k, b = units_of[c]
            options = ~(taken[r] | taken[k] | taken[b]) & (1 << size) - 1
            if options.bit_count() < fewest:
                fewest, at, free = options.bit_count(), i, options
                if fewest < 2:
                    break
        if fewest > size:
            return True
        c = blanks.pop(at)
        for bit in order[c]:
            if bit & free:
                board[c] = bit
                for u in units_of[c]:
                    taken[u] ^= bit
                if search():
                    return True
                for u in units_of[c]:
                    taken[u] ^= bit
        blanks.insert(at, c)
        return False

    return board if search() else None


def make_puzzle(rng, size):
    """A random puzzle with one solution and no clue to spare: question, answer, kinship.

    From a random full board clues are taken away in random order, each unless there is a solution with
    another digit in its place: so the solution remains the only one, and every clue that is left is needed.
    """
    order = (1 << rng.rand(size * size, size).argsort(1)).tolist()
    answer = solve([0] * size * size, size, order)
    question = list(answer)
    for c in rng.permutation(size * size).tolist():
        question[c] = 0
        others = [bit for bit in order[c] if bit != answer[c]]
        if solve(question, size, [*order[:c], others, *order[c + 1:]]):
            question[c] = answer[c]
    tokens = [np.array([bit.bit_length() + 1 for bit in board], np.uint8) for board in (question, answer)]
    return *tokens, int(kinship(*tokens, size))


def kinship(question, answer, size):
    """Integers that are equal for puzzles which a symmetry maps onto each other: (..., S) tokens -> (...).

    They depend only on which cells are givens and which cells share a row, column, box or digit of the
    answer, through sums modulo 2**64 over such cells. A symmetry reorders these sums, or swaps rows with
    columns, whose sums are added.
    """
    questions, answers = question.reshape(-1, size * size), answer.reshape(-1, size * size)
    each = np.arange(len(answers))[:, None]

    def mix(x):
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        return x ^ (x >> np.uint64(29))

    def total(h, unit):     # for every cell the mixed sum over the cells of its unit, which is 0 .. size - 1
        sums = np.zeros((len(h), size), np.uint64)
        np.add.at(sums, (each, unit), h)
        return mix(sums)[each, unit]

    h, kinds = mix(questions.clip(1, 2).astype(np.uint64)), (*np.array(units(size)).T % size, answers - 2)
    for _ in range(3):
        row, col, box, digit = (total(h, unit) for unit in kinds)
        h = mix(h + row + col + mix(box) + mix(mix(digit)))
    return h.sum(1).reshape(question.shape[:-1])[()]


def warn_of_several_solutions(puzzles, size):
    """Say how many of the puzzles, a list of (question, answer), have more solutions than the answer."""
    several, digits = 0, [1 << digit for digit in range(size)]
    for puzzle in puzzles:
        clues, only = ([1 << token >> 2 for token in board.tolist()] for board in puzzle)
        # a search that tries the answer's digits last ends at another solution if there is one
        order = [[bit for bit in digits if bit != last] + [last] for last in only]
        several += solve(clues, size, order) != only
    if several:
        print(f"warning: {several} of the {len(puzzles)} puzzles that were looked at have several solutions; "
              f"only the answer that is given counts as right", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# The command

GAME = boards.Game(builder="sudoku", repo="sapientinc/sudoku-extreme", published="extreme", sizes=BOX,
                   alphabet={".": 1, **{str(digit): digit + 1 for digit in range(10)}},
                   right=check, kinship=kinship)


def flags():
    parser = boards.flags(__doc__, GAME)
    parser.add_argument("--size", type=int, choices=BOX, default=6, help="of generated boards")
    parser.add_argument("--num-aug", type=within(int, 0, 10 ** 6), default=0, metavar="N",
                        help="random symmetries of each training board")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    rng, n, num_aug = np.random.RandomState(args.seed), args.subsample_size, args.num_aug
    how_many = "full" if n is None else f"{n // 1000}k" if n % 1000 == 0 else n
    name = f"{boards.source_name(args, GAME)}-{how_many}-aug-{num_aug}"
    args.output_dir = args.output_dir or f"data/sudoku-{name}"
    train, test, recipe = boards.load(args, GAME, lambda: make_puzzle(rng, args.size), rng)
    size = isqrt(test.shape[2])
    if args.source != "generate":
        puzzles = islice(chain(zip(*test), zip(*train)), 100)   # not more: a hard one takes 0.1 s
        warn_of_several_solutions(list(puzzles), size)
    splits = {"train": augment(rng, train, size, num_aug), "test": test}
    write_dataset(args.output_dir, splits, size + 2, recipe, group_size=1 + num_aug,
                  train_dtype=np.int64 if size == 9 and num_aug else None)     # as published


if __name__ == "__main__":
    cli(main)
