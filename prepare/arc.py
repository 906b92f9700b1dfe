"""Build an ARC dataset: colour and dihedral augmentations on a 30 x 30 canvas.

    python prepare/arc.py                                                   # ARC-1, downloads 3 of the 5 subsets
    python prepare/arc.py --subsets training2 evaluation2 concept --test-set-name evaluation2             # ARC-2
    python prepare/arc.py --source DIR --num-aug 8                          # your own Kaggle-layout files

Every subset is PREFIX_{subset}_challenges.json, {id: {"train": [{input, output}], "test": [{input}]}}, and
PREFIX_{subset}_solutions.json, {id: [grid]}, with PREFIX arc-agi. The examples of the test set's "train" key are
trained on (TRM sees a puzzle only through its row of the puzzle table); its "test" key is what is scored.
The same seed gives the bytes of the published builder: the order of the random draws is part of the format.
"""
import argparse
import hashlib
import json
import os
import re
import sys
import urllib.request
from http.client import HTTPException
from itertools import chain, product
from operator import itemgetter
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DIHEDRAL_INVERSE, UserError, building, cli, dihedral, write_json, write_split  # noqa: E402

SIDE = 30                                    # of the canvas; a token is 0 (empty), 1 (end line) or colour + 2
PREFIX = "arc-agi"
REPOSITORY, FOLDER = "SamsungSAILMontreal/TinyRecursiveModels", "kaggle/combined"
COMMIT = "e7b68717f0a6c4cbb4ce6fbef787b14f42083bd9"
SHA256 = {
    "arc-agi_concept_challenges.json": "4e60bd1de956c2519c3236ba9f2c352c971d5971bfc568ceafa716dd9b1a91fd",
    "arc-agi_concept_solutions.json": "3ec5e95e416e49c85dac28475fc5b73f6998d13b7e91ff0219eee48881c327ee",
    "arc-agi_evaluation2_challenges.json": "e7c62a4bd211867c6b538f66b8013b81f299663c82ca062f49a52bf439d6e4e8",
    "arc-agi_evaluation2_solutions.json": "84be4f4f39b79e82c36d565fc878830988b094917f052ee7069aef30b33ca8f1",
    "arc-agi_evaluation_challenges.json": "2b05f8f7d33b73fdbefd69914c399e9409d1949c7f16aabc78e677443a64b208",
    "arc-agi_evaluation_solutions.json": "629622b0eecf42c6cb4da628955ef76ec43214f0d00081f8cf63082ade496c52",
    "arc-agi_training2_challenges.json": "779eaba89790ebad9af02514a7efc0aefaf2cf8236f046a31bbf8b9ec48f20f5",
    "arc-agi_training2_solutions.json": "9f07a38bd25af5e83aa5bf85c5cb1a1fefdb30f6a755256fa65429e697ca97f9",
    "arc-agi_training_challenges.json": "5b02a4753e9088134744d952b048a03f6f23abf4eb6c04e3f27822cf3d439634",
    "arc-agi_training_solutions.json": "47212ad04ef4211221ac6141cba8c8d425e20e90da90ace575ef286c5f992534",
}


# ---------------------------------------------------------------------------------------------
# One grid: tokens and back, augmentation and back (eval.py uses these)

def encode(grid, end_column=True):
    """Grid (rows, columns) of colours 0..9 -> (900,) uint8 tokens, in the upper left corner of the canvas, with a line
    of 1 below it and (unless end_column is false) right of it where the canvas has room."""
    h, w = grid.shape
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    canvas[h:h + 1, :w] = 1
    if end_column:
        canvas[:h, w:w + 1] = 1
    canvas[:h, :w] = grid + 2
    return canvas.reshape(-1)


def crop(tokens):
    """(N, 900) tokens -> rows (N,), columns (N,) of the largest rectangle of colours from the upper left corner; of
    equal areas the one with the fewest rows; 0, 0 when that corner is no colour."""
    foreign = np.ones((len(tokens), SIDE, SIDE + 1), bool)              # the last column ends every run
    foreign[:, :, :SIDE] = tokens.astype(np.uint8).reshape(-1, SIDE, SIDE) - np.uint8(2) > 9     # 0, 1 become 254, 255
    width = np.minimum.accumulate(foreign.argmax(2), axis=1)            # (N, 30): columns if cut below each row
    best = (width * np.arange(1, SIDE + 1)).argmax(1)
    columns = width[np.arange(len(width)), best]
    return np.where(columns > 0, best + 1, 0), columns


def decode(tokens):
    """(900,) predicted tokens -> uint8 grid of colours (rows, columns), cut out as in crop."""
    (h,), (w,) = crop(tokens[None])
    return tokens.reshape(SIDE, SIDE)[:h, :w].astype(np.uint8) - np.uint8(2)


# An augmentation is a dihedral transform t and the images of the colours 0..9 as ten bytes.
ORIGINAL, TOKENS, DIGITS = bytes(range(10)), bytes(range(2, 12)), b"0123456789"
TO_TOKEN, TO_DIGIT = bytes.maketrans(ORIGINAL, TOKENS), bytes.maketrans(ORIGINAL, DIGITS)
FROM_DIGIT = bytes.maketrans(DIGITS, ORIGINAL)
NAME = re.compile(r"(.*)\|\|\|t([0-7])\|\|\|([0-9]{10})")


def augment(grid, t, colours):
    """Colour c becomes colours[c], then dihedral transform t."""
    return dihedral(np.frombuffer(colours, np.uint8)[grid], t)


def undo(grid, t, colours):
    """The grid that augment(..., t, colours) made `grid` from."""
    return np.frombuffer(bytes.maketrans(colours, ORIGINAL), np.uint8)[dihedral(grid, DIHEDRAL_INVERSE[t])]


def make_name(puzzle_id, t, colours):
    return f"{puzzle_id}|||t{t}|||{colours.translate(TO_DIGIT).decode()}"


def parse_name(name):
    """`id|||tT|||dddddddddd` -> id, T, images of the colours; a bare id is the original."""
    match = NAME.fullmatch(name)
    return (match[1], int(match[2]), match[3].encode().translate(FROM_DIGIT)) if match else (name, 0, ORIGINAL)


# ---------------------------------------------------------------------------------------------
# Reading

def download(subsets, folder):
    """Fetch the files of `subsets` that `folder` lacks, at the pinned commit; all are checked against SHA256."""
    names = [n for n in SHA256 if n.split("_")[1] in subsets]
    known = sorted({n.split("_")[1] for n in SHA256})
    if not set(subsets) <= set(known):
        raise UserError(f"--subsets {' '.join(subsets)}: there are {' '.join(known)}; your own need --source DIR")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        url = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/{FOLDER}/{name}"
        path, tmp = folder / name, folder / f".{name}.{os.getpid()}"
        there = path.exists()
        try:
            raw = path.read_bytes() if there else urllib.request.urlopen(url, timeout=60).read()
        except (OSError, HTTPException) as e:
            raise UserError(f"cannot fetch {url} ({e}); put {' '.join(names)} of that folder into {folder}, "
                            f"or name another with --source DIR") from e
        if (digest := hashlib.sha256(raw).hexdigest()) != SHA256[name]:
            raise UserError(f"{path if there else url}: sha256 {digest} is not {SHA256[name]}; "
                            + ("delete it, or use it as it is with --source" if there else "fetch it another way"))
        if not there:
            tmp.write_bytes(raw)
            os.replace(tmp, path)
            print(f"fetched {path}")


def check_grid(grid, where):
    """Raise UserError, naming `where`, unless grid is a list of 1..30 equally long lists of 1..30 colours 0..9."""
    def bad(what, cure):
        return UserError(f"{where} {what}; {cure}")

    if not isinstance(grid, list) or not all(isinstance(row, list) for row in grid):
        raise bad(f"is {json.dumps(grid)[:60]}, not a grid", "give a list of rows, each a list of colours 0..9")
    widths = sorted({len(row) for row in grid})
    if not grid or 0 in widths:
        raise bad(f"is {json.dumps(grid)[:60]}, an empty grid", "give at least one row of at least one colour")
    if len(widths) > 1:
        raise bad(f"is ragged, with rows of {widths[0]} and {widths[-1]} cells", "make all rows equally long")
    if max(len(grid), widths[0]) > SIDE:
        raise bad(f"is {len(grid)} x {widths[0]}, over {SIDE} x {SIDE}", "crop it or remove the puzzle")
    for colour in chain.from_iterable(grid):
        if type(colour) is not int or not 0 <= colour <= 9:
            raise bad(f"has the colour {json.dumps(colour)[:60]}, outside 0..9", "colours are integers 0..9")


def read_json(path):
    """-> the {puzzle id: ...} of a file, its sha256."""
    raw = path.read_bytes()
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({e}); fetch it again") from e
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: holds {json.dumps(value)[:60]}, not {{puzzle id: ...}}; give a Kaggle-layout file")
    return value, hashlib.sha256(raw).hexdigest()


def load_subset(source, subset):
    """-> {id: puzzle} in file order, every test example with its output, and {file name: sha256}."""
    paths = [source / f"{PREFIX}_{subset}_{kind}.json" for kind in ("challenges", "solutions")]
    for path in paths:
        if not path.exists():
            there = sorted(p.name[len(PREFIX) + 1:-16] for p in source.glob(f"{PREFIX}_*_challenges.json"))
            raise UserError(f"{path} not found; add it, or choose --subsets from {' '.join(there) or 'none'} there")
    (puzzles, digest), (solutions, solutions_digest) = map(read_json, paths)
    for name, puzzle in puzzles.items():
        for key in ("train", "test"):
            examples = puzzle.get(key) if isinstance(puzzle, dict) else None
            if not isinstance(examples, list) or not examples or not all(isinstance(e, dict) for e in examples):
                raise UserError(f"{paths[0]}: puzzle {name} has {json.dumps(examples)[:60]} as {key} examples; "
                                f"give a list of at least one {{input, output}}")
        answers = solutions.get(name)
        if not isinstance(answers, list) or len(answers) != len(puzzle["test"]):
            n = len(answers) if isinstance(answers, list) else "no"
            raise UserError(f"{paths[1]}: puzzle {name} has {n} solutions for {len(puzzle['test'])} test inputs; "
                            f"add them or remove the puzzle")
        for example, answer in zip(puzzle["test"], answers):
            example["output"] = answer
        for key, part in product(("train", "test"), ("input", "output")):
            path = paths[(key, part) == ("test", "output")]
            for i, example in enumerate(puzzle[key]):
                check_grid(example.get(part), f"{path}: puzzle {name}: {part} of {key} example {i}")
    return puzzles, {paths[0].name: digest, paths[1].name: solutions_digest}


# ---------------------------------------------------------------------------------------------
# Random draws: numpy's legacy RandomState, draw for draw, from its raw words. A scalar randint takes numpy 3 us and a
# permutation 10, and there are eleven million; this takes 0.2 and 2.

def words(seed):
    """The 32-bit words of RandomState(seed), one after the other."""
    rng = np.random.RandomState(seed)
    while True:
        yield from rng.randint(0, 2**32, 1 << 16, dtype=np.uint32).tolist()


def below(n, word):
    """RandomState.randint(0, n): the lowest bits of the next word that is small enough; nothing is drawn for n = 1."""
    if n == 1:
        return 0
    mask = (1 << (n - 1).bit_length()) - 1
    while (value := word() & mask) >= n:
        pass
    return value


def shuffle(items, word):
    """RandomState.shuffle, in place."""
    for i in range(len(items) - 1, 0, -1):
        mask = (1 << i.bit_length()) - 1        # below(i + 1) written out: two thirds of the time
        while (j := word() & mask) > i:
            pass
        items[i], items[j] = items[j], items[i]


def augmentations(examples, num_aug, word):
    """Draw up to num_aug augmentations that differ from the original and from one another as multisets of pairs.

    examples: list of (input, output) arrays. Returns [(t, images of the colours 0..9 as bytes)], the original first.
    """
    def blob(grid):                             # the table leaves rows + 10 and columns + 10 as they are
        return bytes([grid.shape[0] + 10, grid.shape[1] + 10]) + grid.tobytes()

    blobs = [[blob(dihedral(a, t)) + blob(dihedral(b, t)) for a, b in examples] for t in range(8)]
    images = itemgetter(0, *{c for c in b"".join(blobs[0]) if 0 < c < 10})              # of the colours that occur
    kept, tried, seen = [(0, ORIGINAL)], {(0, images(ORIGINAL))}, {tuple(sorted(blobs[0]))}
    for _ in range(5 * num_aug):
        if len(kept) > num_aug:
            break
        t, colours = below(8, word), list(range(1, 10))
        shuffle(colours, word)
        colours = bytes([0, *colours])
        if (key := (t, images(colours))) in tried:                      # half of all: equal without a look at the grids
            continue
        tried.add(key)
        table = bytes.maketrans(ORIGINAL, colours)
        puzzle = tuple(sorted([b.translate(table) for b in blobs[t]]))
        if puzzle not in seen:
            seen.add(puzzle)
            kept.append((t, colours))
    return kept


# ---------------------------------------------------------------------------------------------
# Writing

def canvases(grid):
    """-> 900 zeros and the canvas as bytes, with and without end column, and the column pad that leaves no room for it.

    The slice [900 - s:1800 - s] is the canvas moved by s cells: 30 times the row pad plus the column pad.
    """
    return *(bytes(SIDE**2) + encode(grid, end_column).tobytes() for end_column in (True, False)), SIDE - grid.shape[1]


def render(examples, augs, pads, word):
    """-> input rows, label rows of one group, as bytes per puzzle: the examples in every augmentation, if pads all but
    one of each puzzle moved at random."""
    prepared = []                               # per transform, per example: number of row and column pads, canvases
    for t in range(8):
        pairs = [(dihedral(a, t), dihedral(b, t)) for a, b in examples]
        prepared.append([(*(SIDE + 1 - np.maximum(a.shape, b.shape)).tolist(), *canvases(a), *canvases(b))
                         for a, b in pairs])
    inputs, labels = [], []
    for t, colours in augs:
        fixed = below(len(examples), word)
        rows_in, rows_out = [], []
        for i, (n_down, n_right, a, a_no_end, a_full, b, b_no_end, b_full) in enumerate(prepared[t]):
            right, end = 0, 2 * SIDE**2
            if pads and i != fixed:
                end -= SIDE * below(n_down, word)
                right = below(n_right, word)
                end -= right
            rows_in.append((a_no_end if right == a_full else a)[end - SIDE**2:end])
            rows_out.append((b_no_end if right == b_full else b)[end - SIDE**2:end])
        table = bytes.maketrans(TOKENS, colours.translate(TO_TOKEN))
        inputs.append(b"".join(rows_in).translate(table))
        labels.append(b"".join(rows_out).translate(table))
    return inputs, labels


def names(group):
    puzzle_id, augs, _ = group
    return [puzzle_id] + [make_name(puzzle_id, t, colours) for t, colours in augs[1:]]


def write_arc_split(folder, groups, ids, num_identifiers, pads, word):
    """groups: [(puzzle id, augmentations, examples of this split)]; ids: {name: row of the puzzle table}."""
    folder.mkdir()
    counts = [(len(augs), len(examples)) for _, augs, examples in groups]
    n = sum(a * e for a, e in counts)
    files = [open(folder / f"all__{part}.npy", "wb", 1 << 20) for part in ("inputs", "labels")]
    with files[0], files[1]:
        for f in files:                         # plain writes: mapped pages would count as memory of this process
            np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (n, SIDE**2)})
        for _, augs, examples in tqdm(groups, desc=f"write {folder.name}", unit="puzzle"):
            for f, rows in zip(files, render(examples, augs, pads, word)):
                f.writelines(rows)
    sizes = np.repeat([e for _, e in counts], [a for a, _ in counts])
    write_split(folder, {
        "inputs": None, "labels": None,
        "puzzle_identifiers": np.array([ids[name] for group in groups for name in names(group)], np.int32),
        "puzzle_indices": np.concatenate([[0], sizes.cumsum()]).astype(np.int32),
        "group_indices": np.concatenate([[0], np.cumsum([a for a, _ in counts])]).astype(np.int32),
    }, vocab_size=12, num_identifiers=num_identifiers)
    print(f"{folder.name}: {len(groups):,} groups, {len(sizes):,} puzzles, {n:,} examples")


def warn_of_leaks(train, test):
    """Say how many test pairs, unaugmented, are also trained on. Both: [(puzzle id, augmentations, examples)]."""
    def pairs(groups):
        return [(name, [(a.shape, a.tobytes()) for a in pair]) for name, _, examples in groups for pair in examples]

    trained, scored = {str(pair) for _, pair in pairs(train)}, pairs(test)
    leaked = [name for name, pair in scored if str(pair) in trained]
    if leaked:
        print(f"warning: {len(leaked)} of {len(scored)} test pairs (of {' '.join(sorted(set(leaked))[:8])} ...) "
              f"also stand in the training split: their score is memory", file=sys.stderr)


def build(source, output_dir, subsets, test_set_name, num_aug, seed):
    """Write a dataset in the published layout from Kaggle-layout files into output_dir. Raises UserError."""
    word = words(seed).__next__
    loaded = [load_subset(source, subset) for subset in subsets]        # all before drawing: bad input shows at once
    train, test, test_puzzles = [], [], {}
    for subset, (puzzles, _) in zip(subsets, loaded):
        puzzles = list(puzzles.items())
        shuffle(puzzles, word)
        for name, puzzle in tqdm(puzzles, desc=f"augment {subset}", unit="puzzle"):
            examples = {key: [tuple(np.array(e[part], np.uint8) for part in ("input", "output")) for e in puzzle[key]]
                        for key in puzzle if key in ("train", "test")}                  # the puzzle's own key order
            augs = augmentations(examples["train"] + examples["test"], num_aug, word)
            if subset == test_set_name:
                train.append((name, augs, examples["train"]))
                test.append((name, augs, examples["test"]))
                test_puzzles[name] = puzzle
            else:
                train.append((name, augs, list(chain.from_iterable(examples.values()))))
    warn_of_leaks(train, test)
    ids = {}
    for group in train + test:
        for name in names(group):
            ids.setdefault(name, len(ids) + 1)
    with building(output_dir) as tmp:
        write_arc_split(tmp / "train", train, ids, len(ids) + 1, True, word)
        write_arc_split(tmp / "test", test, ids, len(ids) + 1, False, word)
        write_json(tmp / "identifiers.json", ["<blank>", *ids])
        write_json(tmp / "test_puzzles.json", test_puzzles)
        write_json(tmp / "recipe.json", {
            "builder": "arc", "subsets": subsets, "test_set_name": test_set_name, "num_aug": num_aug, "seed": seed,
            "source_sha256": {name: digest for _, digests in loaded for name, digest in digests.items()}})
    print(f"{len(ids) + 1:,} rows in the puzzle table (num_puzzle_identifiers)")


def flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--source", default="download", help="folder of Kaggle-layout files, or %(default)s")
    parser.add_argument("--subsets", nargs="+", default=["training", "evaluation", "concept"], metavar="SUBSET",
                        help="in this order (training evaluation concept)")
    parser.add_argument("--test-set-name", default="evaluation", help="the subset that is scored (%(default)s)")
    parser.add_argument("--num-aug", type=int, default=1000, help="augmentations per puzzle, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="%(default)s gives the published datasets")
    parser.add_argument("--output-dir", help="data/arc1concept-aug-N, arc2... if the test set is evaluation2")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    if args.test_set_name not in args.subsets or len(set(args.subsets)) < len(args.subsets):
        raise UserError(f"--subsets {' '.join(args.subsets)}: must name each subset once, "
                        f"--test-set-name {args.test_set_name} among them")
    if args.num_aug < 0 or not 0 <= args.seed < 2**32:
        raise UserError(f"--num-aug {args.num_aug} --seed {args.seed}: both are 0 or more, the seed below 2**32")
    source = Path(args.source)
    if args.source == "download":
        source = Path("data/arc-source")
        download(args.subsets, source)
    arc = "arc2" if args.test_set_name == "evaluation2" else "arc1"
    output_dir = args.output_dir or f"data/{arc}concept-aug-{args.num_aug}"
    build(source, output_dir, args.subsets, args.test_set_name, args.num_aug, args.seed)


if __name__ == "__main__":
    cli(main)
