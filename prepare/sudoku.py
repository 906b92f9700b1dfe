"""Build a Sudoku dataset: 9x9 from the hub or CSV files, or generated here.

    python prepare/sudoku.py --subsample-size 1000 --num-aug 1000  # the paper's
    python prepare/sudoku.py --source generate --num-aug 1000      # no network

A CSV holds source,question,answer,rating; blanks are '.' or 0. Everywhere, a
board is S = size * size tokens: blank 1, digit d is d + 1 (0 is padding).
Equal seeds give the bytes of the published builder.
"""
import argparse
import csv
import sys
from functools import cache
from itertools import islice
from math import isqrt
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import UserError, cli, sha256, write_dataset

REPO = "sapientinc/sudoku-extreme"
BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size: rows and columns of a box


def check(question, answer, size):
    """Is `answer` a legal solution that keeps the givens? (..., S) tokens each -> (...) bool."""
    h, w = BOX[size]
    bits = np.left_shift(1, np.minimum(answer, size + 2), dtype=np.int32)  # what is no digit sets a bit not in `full`
    grid = bits.reshape(*bits.shape[:-1], size // h, h, size // w, w)
    full = (1 << size + 2) - 4
    legal = [(np.bitwise_or.reduce(grid, axis=axes) == full).all((-2, -1)) for axes in ((-2, -1), (-4, -3), (-3, -1))]
    return np.logical_and.reduce(legal) & ((question == 1) | (question == answer)).all(-1)


# ---------------------------------------------------------------------------------------------
# Symmetries: new = relabel[old[cells]]

def draw_symmetries(rng, n, size):
    """Draw n symmetries: relabel (n, size + 2) maps tokens, cells (n, S) says where each cell comes from.

    rng: numpy RandomState. The draws are the published builder's, and rng ends where they would leave it. One
    symmetry: permutation(digits), rand() < 0.5 transposes (not 6x6: its boxes would not fit), permutation(bands), per
    band in the new order permutation(its rows), then the same for columns. Called one by one, these take 25 us.
    Here the 32-bit words under them are drawn at once: a shuffle swaps items i = m - 1 .. 1 with item j <= i, and j
    is the next word, masked to the bits of i, that fits. So where a symmetry ends follows from where it begins; that
    is computed for every word as a beginning, then the n true ones are picked by following the ends.
    """
    h, w = BOX[size]
    shuffles = [size // h] + [h] * (size // h) + [size // w] + [w] * (size // w)
    coin = [2 ** 32 - 1] * 2 if h == w else []  # rand() takes two words; the top bit of the first decides
    bounds = [*range(size - 1, 0, -1), *coin, *(i for m in shuffles for i in range(m - 1, 0, -1))]
    N = 128 + int(1.1 * n * sum((1 << i.bit_length()) / (i + 1) for i in bounds))  # 10 sigma above the expected
    start = rng.get_state()
    words = np.frombuffer(rng.bytes(4 * N) + bytes(4 * len(bounds)), "<u4")  # zeros fit: no end runs out of range
    index = np.arange(len(words))
    masked = {i: words & (1 << i.bit_length()) - 1 for i in bounds}
    fit = {i: np.minimum.accumulate(np.where(masked[i] <= i, index, N)[::-1])[::-1]
           for i in set(bounds) if i & (i + 1)}  # the next word that fits; any does for i = 1, 3, 7 ..

    def follow(at):  # the draws of symmetries that begin at words `at`, and where they end
        for i in bounds:
            at = fit[i][at] if i in fit else at
            yield masked[i][at]
            at = at + 1
        yield at

    *_, ends = follow(index[:N])
    begin, ends = [0], memoryview(ends)
    for _ in range(n):
        begin.append(ends[begin[-1]])
    assert begin[-1] <= N
    rng.set_state(start)
    rng.bytes(4 * begin.pop())
    draws, each = follow(np.array(begin)), np.arange(n)

    def shuffled(m):  # (n, m)
        p = np.tile(np.arange(m), (n, 1))
        for i, j in zip(range(m - 1, 0, -1), draws):
            p[each, j], p[:, i] = p[:, i], p[each, j]
        return p

    def lines(m):  # (n, size): which old row, or column, each new one is; m of them make a band
        bands = shuffled(size // m)
        return np.concatenate([bands[:, b, None] * m + shuffled(m) for b in range(size // m)], axis=1)

    relabel = np.concatenate([np.tile([0, 1], (n, 1)), shuffled(size) + 2], axis=1).astype(np.uint8)
    flip = np.array([next(draws) < 2 ** 31 for _ in coin] or [np.zeros(n, bool)])[0]
    rows, cols = lines(h)[:, :, None], lines(w)[:, None, :]
    cells = np.where(flip[:, None, None], cols * size + rows, rows * size + cols)
    return relabel, cells.reshape(n, size * size)


def transform(boards, relabel, cells):
    """Apply n symmetries to one board (S,), or to n boards (n, S), one each -> (n, S)."""
    moved = boards[cells] if boards.ndim == 1 else np.take_along_axis(boards, cells, axis=1)
    return np.take_along_axis(relabel, moved, axis=1)


def inverse(relabel, cells):
    """The symmetries that undo these: transform(transform(boards, *s), *inverse(*s)) == boards."""
    return relabel.argsort(axis=1).astype(np.uint8), cells.argsort(axis=1)


def augment(rng, boards, size, num_aug):
    """Every question and answer, each before num_aug symmetries of it: (2, N, S) -> (2, N * (1 + num_aug), S)."""
    out = np.repeat(boards[:, :, None], 1 + num_aug, axis=2)
    for p in tqdm(range(boards.shape[1] if num_aug else 0), "augmenting", unit=" puzzles", delay=1, mininterval=1):
        symmetries = draw_symmetries(rng, num_aug, size)
        for i in (0, 1):
            out[i, p, 1:] = transform(boards[i, p], *symmetries)
    return out.reshape(2, -1, size * size)


# ---------------------------------------------------------------------------------------------
# Generating

@cache
def units(size):
    """The row, column and box of every cell, numbered through: S tuples of three, each 0 .. 3 * size - 1."""
    h, w = BOX[size]
    return [(r, size + c, 2 * size + r // h * h + c // w) for r in range(size) for c in range(size)]


def solve(board, size, order):
    """The first solution of `board` (without contradictions), or None. Boards are S bits, 1 << (digit - 1), 0 for a
    blank; the blank with the fewest candidates is filled first, cell c only with the bits order[c], in turn."""
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

    From a random full board clues are taken away in random order, each unless there is a solution with another digit
    in its place: so the solution remains the only one, and every clue that is left is needed.
    """
    order = (1 << rng.rand(size * size, size).argsort(1)).tolist()
    answer = solve([0] * size * size, size, order)
    question = list(answer)
    for c in rng.permutation(size * size).tolist():
        question[c] = 0
        others = [bit for bit in order[c] if bit != answer[c]]
        if solve(question, size, [*order[:c], others, *order[c + 1:]]):
            question[c] = answer[c]
    boards = [np.array([bit.bit_length() + 1 for bit in board], np.uint8) for board in (question, answer)]
    return *boards, kinship(*boards, size)


def kinship(question, answer, size):
    """An integer that is equal for puzzles that a symmetry maps onto each other.

    It depends only on which cells are givens and which cells share a row, column, box or digit of the answer, through
    sums modulo 2**64 over such cells; a symmetry reorders these sums, or swaps rows with columns, whose sums add up.
    """
    def mix(x):
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        return x ^ (x >> np.uint64(29))
    same = [(u[:, None] == u).astype(np.uint64) for u in (*np.array(units(size)).T, answer)]
    h = mix(question.clip(1, 2).astype(np.uint64))
    for _ in range(3):
        row, col, box, digit = (mix(s @ h) for s in same)
        h = mix(h + row + col + mix(box) + mix(mix(digit)))
    return int(h.sum())


def generate(make, num_train, num_test):
    """Call make() -> question, answer, kinship for different boards: {"train": (2, num_train, S), "test": ...}.

    Kinship alone decides which split a board belongs to, so no symmetry maps a test board onto a training board.
    """
    want, splits, seen = {"train": num_train, "test": num_test}, {"train": [], "test": []}, set()
    total = num_train + num_test
    with tqdm(total=total, desc="generating", unit=" boards", delay=1, mininterval=1) as bar:
        for tries in range(1, 20 * total + 1000):
            question, answer, kin = make()
            split = "train" if kin % total < num_train else "test"
            if len(splits[split]) < want[split] and question.tobytes() not in seen:
                seen.add(question.tobytes())
                splits[split].append((question, answer))
                bar.update()
            if len(seen) == total:
                return {split: np.array(pairs).swapaxes(0, 1) for split, pairs in splits.items()}
    raise UserError(f"--num-train {num_train} and --num-test {num_test}: only {len(seen)} different boards found in "
                    f"{tries} tries; ask for fewer or for a larger --size")


# ---------------------------------------------------------------------------------------------
# Reading: the rest serves maze.py too

def read_csv(path, alphabet, lengths, verdict, min_difficulty=None):
    """Questions and answers of a CSV as tokens (2, N, S) uint8; S is one of `lengths`, the same in all rows.

    alphabet: {character: token}. verdict(questions, answers) -> (N,) bool: False refuses a board.
    Raises UserError that names file and line.
    """
    table, S, parts, first = np.zeros(256, np.uint8), None, [], 2  # line 1 is the header
    for character, token in alphabet.items():
        table[ord(character)] = token
    with open(path, newline="", encoding="latin-1") as f, tqdm(desc="reading", unit=" rows", delay=1) as bar:
        reader = csv.reader(f)
        next(reader, None)
        while rows := list(islice(reader, 20_000)):
            for line, row in enumerate(rows, first):
                S = S or (len(row[1]) if len(row) == 4 and len(row[1]) in lengths else None)
                if len(row) != 4 or not S == len(row[1]) == len(row[2]):
                    want = S or ", ".join(map(str, lengths[:3])) + " .." * (len(lengths) > 3)
                    raise UserError(f"{path} line {line}: columns of {[len(x) for x in row]} characters; need source, "
                                    f"question, answer, rating, with {want} in question and answer; correct the row")
                if min_difficulty is not None and not row[3].isdecimal():
                    raise UserError(f"{path} line {line}: rating {row[3]!r} is no whole number, which --min-difficulty "
                                    f"needs; correct the row")
            kept = [i for i, row in enumerate(rows) if min_difficulty is None or int(row[3]) >= min_difficulty]
            text = "".join(rows[i][k] for k in (1, 2) for i in kept).encode("latin-1")
            boards = table[np.frombuffer(text, np.uint8)].reshape(2, len(kept), S)
            for i in np.flatnonzero((boards == 0).any((0, 2)) | ~verdict(*boards))[:1]:
                odd = [x for x in "".join(rows[kept[i]][1:3]) if x not in alphabet]
                raise UserError(f"{path} line {first + kept[i]}: " + (
                    f"character {odd[0]!r} is none of {''.join(alphabet)!r}; correct the row" if odd else
                    "the answer contradicts the question or breaks the rules; correct or remove the row"))
            parts.append(boards)
            first += len(rows)
            bar.update(len(rows))
    if not sum(p.shape[1] for p in parts):
        raise UserError(f"{path} has no rows" + (f" with a rating of {min_difficulty} or more; lower --min-difficulty"
                                                 if parts else " below its header; fetch it again"))
    return np.concatenate(parts, axis=1)


def read_splits(source, repo, rng, num_test, read):
    """{"train": (2, N, S), "test": ...} by read(path), and {file: sha256}."""
    names = {"train": "train.csv", "test": "test.csv"}
    if source == "hf":
        import huggingface_hub
        try:
            paths = {split: Path(huggingface_hub.hf_hub_download(repo, name, repo_type="dataset"))
                     for split, name in names.items()}
        except (OSError, ValueError) as e:
            raise UserError(f"dataset {repo} cannot be fetched ({type(e).__name__}); put train.csv and test.csv of "
                            f"https://huggingface.co/datasets/{repo} into a folder DIR and pass --source DIR") from e
    else:
        path = Path(source)
        paths = {"all": path} if path.suffix == ".csv" else {split: path / name for split, name in names.items()}
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"{path} not found; --source is hf, generate, FILE.csv or a folder of train.csv, test.csv")
    try:
        splits = {split: read(path) for split, path in paths.items()}
    except csv.Error as e:
        raise UserError(f"{source} is no CSV file ({e}); see --help for what it must hold") from e
    if "all" in splits:
        boards = splits.pop("all")
        if boards.shape[1] <= num_test:
            raise UserError(f"{source} has {boards.shape[1]} boards, all of them for --num-test {num_test}; lower it")
        order = rng.permutation(boards.shape[1])
        splits = {"train": boards[:, np.sort(order[num_test:])], "test": boards[:, np.sort(order[:num_test])]}
    S = [boards.shape[2] for boards in splits.values()]
    if S[0] != S[1]:
        raise UserError(f"{source}: boards of {S[0]} cells in train.csv and {S[1]} in test.csv; make them equal")
    return splits, {path.name: sha256(path) for path in paths.values()}


def subsample(rng, boards, n):
    """n of the boards (2, N, S), drawn without replacement; all of them, in order, when n is None or N."""
    total = boards.shape[1]
    if n is not None and n > total:
        raise UserError(f"--subsample-size {n} is more than the {total} training boards; ask for at most {total}")
    return boards if n in (None, total) else boards[:, rng.choice(total, n, replace=False)]


def add_flags(parser, repo):
    """The flags that sudoku.py and maze.py share."""
    parser.add_argument("--source", default="hf", help=f"hf ({repo}), generate, a folder of train.csv "
                        "and test.csv, or FILE.csv (default %(default)s)")
    parser.add_argument("--num-train", type=int, default=1000, metavar="N", help="generate N (default %(default)s)")
    parser.add_argument("--num-test", type=int, default=1000, metavar="N",
                        help="generate N, or hold out N of FILE.csv (default %(default)s)")
    parser.add_argument("--subsample-size", type=int, metavar="N", help="N random training boards (default all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every draw (default %(default)s)")


def parse(parser, argv, **ranges):
    """Parse a command line; UserError when a number lies outside its range."""
    args = parser.parse_args(argv)
    for name, r in {**ranges, "num_train": range(1, 10 ** 7), "num_test": range(1, 10 ** 7),
                    "subsample_size": range(1, 10 ** 9), "seed": range(2 ** 32)}.items():
        if getattr(args, name) is not None and getattr(args, name) not in r:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is outside {r[0]}..{r[-1]}; change it")
    return args


def recipe(builder, args, **facts):
    """What identifies the data: the arguments but where they lie, and the sha256 of the files read."""
    return {"builder": builder, **{k: v for k, v in vars(args).items() if k != "output_dir"}, **facts}


def flags():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, REPO)
    parser.add_argument("--size", type=int, choices=BOX, default=6, help="of generated boards (default %(default)s)")
    parser.add_argument("--num-aug", type=int, default=0, metavar="N",
                        help="random symmetries of each training board (default %(default)s)")
    parser.add_argument("--min-difficulty", type=int, metavar="R", help="only rows of rating R or more (default all)")
    parser.add_argument("--output-dir", metavar="DIR", help="default data/sudoku-extreme-1k-aug-1000 or the like")
    return parser


def build(argv=None):
    """Build what the command line (a list of strings) describes; returns the dataset's folder."""
    args = parse(flags(), argv, num_aug=range(10 ** 6))
    rng = np.random.RandomState(args.seed)
    if args.source == "generate":
        if args.min_difficulty is not None:
            raise UserError(f"--min-difficulty {args.min_difficulty} needs the ratings of a CSV; generate has none")
        splits, files = generate(lambda: make_puzzle(rng, args.size), args.num_train, args.num_test), {}
    else:
        def read(path):
            return read_csv(path, {".": 1, **{str(digit): digit + 1 for digit in range(10)}}, [k * k for k in BOX],
                            lambda *boards: check(*boards, isqrt(boards[0].shape[1])), args.min_difficulty)
        splits, files = read_splits(args.source, REPO, rng, args.num_test, read)
    size, n = isqrt(splits["test"].shape[2]), args.subsample_size
    train = augment(rng, subsample(rng, splits["train"], n), size, args.num_aug)
    name = {"hf": "extreme", "generate": f"{size}x{size}"}.get(args.source, Path(args.source).stem)
    how_many = "full" if n is None else f"{n // 1000}k" if n % 1000 == 0 else n
    folder = Path(args.output_dir or f"data/sudoku-{name}-{how_many}-aug-{args.num_aug}")
    write_dataset(folder, {"train": train, "test": splits["test"]}, size + 2,
                  recipe("sudoku", args, source=name, size=size, files=files), group_size=1 + args.num_aug,
                  train_dtype=np.int64 if size == 9 and args.num_aug else None)  # as published
    return folder


def main(argv=None):
    build(argv)


if __name__ == "__main__":
    cli(main)
