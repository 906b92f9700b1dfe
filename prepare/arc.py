"""Build an ARC dataset: colour and dihedral augmentations on a 30 x 30 canvas.

    python prepare/arc.py                         # ARC-1, downloads its files
    python -m prepare arc2                        # ARC-2
    python prepare/arc.py --source DIR --num-aug 8   # your own files

DIR holds files of one of two layouts. Kaggle's: arc-agi_SUBSET_challenges.json,
{id: {"train": [{input, output}], "test": [{input}]}}, and
arc-agi_SUBSET_solutions.json, {id: [grid]}. That of fchollet/ARC-AGI:
SUBSET/*.json or data/SUBSET/*.json, one task a file, with its outputs.

The examples of the test set's "train" key are trained on (TRM sees a puzzle
only through its row of the puzzle table); its "test" key is what is scored.
Where no file says its outputs, it is a hidden test set: the labels of its test
rows are all ignored. Equal seeds give the bytes of the published builder: the
order of the random draws is part of the format.
"""
import hashlib
import json
import re
import sys
import urllib.request
from argparse import Namespace
from http.client import HTTPException
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, UserError, cli, progress, read_json, sha256, within, write, write_json
from data import DIHEDRAL_INVERSE, building, dihedral, write_split
from prepare import command, recipe_flags

SIDE = 30                       # of the canvas; a token is 0 (empty), 1 (end line) or colour + 2
CELLS = SIDE * SIDE
KEYS = "train", "test"          # of a puzzle
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
# One grid: tokens and back, augmentation and back (evaluation uses these)

def encode(grid, end_column=True):
    """Grid (rows, columns) of colours 0..9 -> (900,) uint8 tokens, in the upper left corner of the canvas,
    with a line of 1 below it and (unless end_column is false) right of it where the canvas has room."""
    h, w = grid.shape
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    canvas[h:h + 1, :w] = 1
    if end_column:
        canvas[:h, w:w + 1] = 1
    canvas[:h, :w] = grid + 2
    return canvas.reshape(-1)


def crop(tokens):
    """(N, 900) tokens -> rows (N,), columns (N,) of the largest rectangle of colours from the upper left
    corner; of equal areas the one with the fewest rows; 0, 0 when that corner is no colour."""
    foreign = np.ones((len(tokens), SIDE, SIDE + 1), bool)              # the last column ends every run
    colours = tokens.astype(np.uint8).reshape(-1, SIDE, SIDE) - np.uint8(2)     # 0 and 1 become 254 and 255
    foreign[:, :, :SIDE] = colours > 9
    width = np.minimum.accumulate(foreign.argmax(2), axis=1)            # (N, 30): columns if cut below a row
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
    if not match:
        return name, 0, ORIGINAL
    return match[1], int(match[2]), match[3].encode().translate(FROM_DIGIT)


# ---------------------------------------------------------------------------------------------
# Reading

class Subset(NamedTuple):
    """What the files say of a subset."""
    puzzles: dict       # {id: {"train": [{input, output}], "test": [{input, output}]}}, in their order
    files: dict         # {name: sha256}
    hidden: bool        # the outputs of "test" are unknown, and absent


def this_command(args, **changes):
    """The whole command of args (see flags) with some of them changed, for messages."""
    args = Namespace(**{**vars(args), **changes})
    flags = recipe_flags({"builder": "arc", **vars(args), "output_dir": None})
    return command(*flags, args.output_dir or default_folder(args))


def download(args, folder):
    """Fetch the files of args.subsets that `folder` lacks, at the pinned commit. All must have their SHA256;
    raises UserError."""
    known = sorted({name.split("_")[1] for name in SHA256})
    own = this_command(args, source="DIR")
    if not set(args.subsets) <= set(known):
        raise UserError(f"--subsets {' '.join(args.subsets)}: there are {' '.join(known)}; your own need "
                        f"--source: {own}")
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in SHA256 if name.split("_")[1] in args.subsets]
    for name in names:
        url, path = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/{FOLDER}/{name}", folder / name
        there = path.exists()
        try:
            raw = path.read_bytes() if there else urllib.request.urlopen(url, timeout=60).read()
        except (OSError, HTTPException) as e:
            raise UserError(f"cannot fetch {url} ({e}); put {' '.join(names)} of that folder into {folder} "
                            f"and start again, or into a folder DIR, then: {own}") from e
        digest = hashlib.sha256(raw).hexdigest()
        if digest != SHA256[name]:
            cure = f"delete it, or use it as it is with --source {folder}" if there else "fetch it elsewhere"
            raise UserError(f"{path if there else url}: sha256 {digest} is not {SHA256[name]}; {cure}")
        if not there:
            write(path, raw)
            print(f"fetched {path}")


def check_grid(grid, where):
    """Raise UserError, naming `where`, unless grid is a list of 1..30 equally long lists of 1..30 colours."""
    rows = grid if isinstance(grid, list) and all(isinstance(row, list) for row in grid) else []
    widths = {len(row) for row in rows}
    shaped = len(widths) == 1 and 1 <= min(widths) <= SIDE and len(rows) <= SIDE
    if not shaped or not all(type(c) is int and 0 <= c <= 9 for c in chain.from_iterable(rows)):
        raise UserError(f"{where} is {json.dumps(grid)[:60]}, not a grid; give 1..{SIDE} equally long rows "
                        f"of 1..{SIDE} colours, which are integers 0..9, or remove the puzzle")


def check_examples(puzzle, where):
    """Raise UserError, naming `where`, unless there are lists of {...} under "train" and "test"."""
    for key in KEYS:
        examples = puzzle.get(key) if isinstance(puzzle, dict) else None
        if not isinstance(examples, list) or not examples or not all(isinstance(e, dict) for e in examples):
            raise UserError(f"{where} has {json.dumps(examples)[:60]} as {key} examples; give a list of at "
                            f"least one {{input, output}}")


def check_grids(puzzle, where, hidden):
    """Raise UserError, naming `where`, unless all are grids. hidden: those of "test" have no outputs."""
    for key in KEYS:
        for i, example in enumerate(puzzle[key]):
            check_grid(example.get("input"), f"{where}: input of {key} example {i}")
            if hidden and key == "test":
                example.pop("output", None)     # a null in some files
            else:
                check_grid(example.get("output"), f"{where}: output of {key} example {i}")


def read_puzzles(path):
    """The {puzzle id: ...} of a file in Kaggle's layout. Raises UserError."""
    value = read_json(path, "fetch it again")
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: holds {json.dumps(value)[:60]}, not {{puzzle id: ...}}; give a file in "
                        f"Kaggle's layout")
    return value


def add_solutions(puzzles, path):
    """Put the outputs of a solutions file into the test examples. Raises UserError."""
    solutions = read_puzzles(path)
    for name, puzzle in puzzles.items():
        where, answers = f"{path}: puzzle {name}", solutions.get(name)
        if not isinstance(answers, list) or len(answers) != len(puzzle["test"]):
            n = len(answers) if isinstance(answers, list) else "no"
            raise UserError(f"{where} has {n} solutions for {len(puzzle['test'])} test inputs; add them or "
                            f"remove the puzzle")
        for i, example in enumerate(puzzle["test"]):
            check_grid(answers[i], f"{where}: output of test example {i}")
            example["output"] = answers[i]


def subsets_in(source):
    """The names of the subsets that a folder holds, in either layout."""
    start, end = f"{PREFIX}_", "_challenges.json"
    kaggle = {path.name[len(start):-len(end)] for path in source.glob(f"{start}*{end}")}
    return sorted(kaggle | {path.parent.name for folder in (source, source / "data")
                            for path in folder.glob("*/*.json")})


def not_found(args, source, path):
    """The error for a subset that the folder `source` lacks, with the whole command for what it holds."""
    there = subsets_in(source)
    if not there:
        return UserError(f"{path} not found; {source} holds nothing in the layouts of --help; name another "
                         f"folder with --source")
    subsets = [subset for subset in args.subsets if subset in there] or there
    scored = args.test_set_name if args.test_set_name in subsets else subsets[-1]
    return UserError(f"{path} not found; add it, or choose --subsets from {' '.join(there)} there: "
                     f"{this_command(args, subsets=subsets, test_set_name=scored)}")


def load_subset(args, source, subset):
    """The Subset of that name in the folder `source`, in either layout. Raises UserError."""
    path, solutions = (source / f"{PREFIX}_{subset}_{kind}.json" for kind in ("challenges", "solutions"))
    files = [path] if path.exists() else sorted((source / subset).glob("*.json"))
    files = files or sorted((source / "data" / subset).glob("*.json"))
    if not files:
        raise not_found(args, source, path)
    if path.exists():
        puzzles, lacks = read_puzzles(path), f"{solutions} not found"
        where = {name: f"{path}: puzzle {name}" for name in puzzles}
    else:
        puzzles, lacks = {}, f"{files[0].parent} has no outputs of test examples"
        for file in files:
            puzzles[file.stem] = read_json(file, "fetch it again")
        where = {file.stem: f"{file}: puzzle {file.stem}" for file in files}
    for name, puzzle in puzzles.items():
        check_examples(puzzle, where[name])
    if path.exists() and solutions.exists():
        add_solutions(puzzles, solutions)
        files.append(solutions)
    hidden = all(e.get("output") is None for puzzle in puzzles.values() for e in puzzle["test"])
    if hidden and subset != args.test_set_name:
        there = " ".join(subsets_in(source))
        raise UserError(f"{lacks}; add it, leave {subset} out ({there} there), or make it the hidden test "
                        f"set: {this_command(args, test_set_name=subset)}")
    for name, puzzle in puzzles.items():
        check_grids(puzzle, where[name], hidden)
    return Subset(puzzles, {str(file.relative_to(source)): sha256(file) for file in files}, hidden)


# ---------------------------------------------------------------------------------------------
# Augmenting

class Group(NamedTuple):
    """A puzzle in all its augmentations, with the examples that one split has of it."""
    puzzle_id: str
    augs: list          # [(t, images of the colours)], the original first
    examples: list      # [(input, output)], arrays (rows, columns) of colours; an unknown output has no cells

    def names(self):
        return [self.puzzle_id] + [make_name(self.puzzle_id, t, colours) for t, colours in self.augs[1:]]


def augmentations(examples, num_aug, rng):
    """Draw up to num_aug augmentations that differ from the original and from one another as multisets.

    examples: list of (input, output) arrays; rng: numpy RandomState. Returns [(t, images of the colours 0..9
    as bytes)], the original first.
    """
    def blob(grid):     # its shape, past the ten colours, so that translate() leaves it alone, and its cells
        return bytes([grid.shape[0] + 10, grid.shape[1] + 10]) + grid.tobytes()

    turned = [[blob(dihedral(a, t)) + blob(dihedral(b, t)) for a, b in examples] for t in range(8)]
    occurring = {byte for byte in b"".join(turned[0]) if 0 < byte < 10}
    images = itemgetter(0, *occurring)          # what an augmentation does to the colours that occur
    kept, tried, seen = [(0, ORIGINAL)], {(0, images(ORIGINAL))}, {tuple(sorted(turned[0]))}
    for _ in range(5 * num_aug):
        if len(kept) > num_aug:
            break
        t, colours = rng.randint(8), list(range(1, 10))
        rng.shuffle(colours)
        colours = bytes([0, *colours])
        if (t, images(colours)) in tried:       # half of all: equal without a look at the grids
            continue
        tried.add((t, images(colours)))
        table = bytes.maketrans(ORIGINAL, colours)
        puzzle = tuple(sorted(pair.translate(table) for pair in turned[t]))
        if puzzle not in seen:
            seen.add(puzzle)
            kept.append((t, colours))
    return kept


class Sheet:
    """A grid encoded once, to be moved about the canvas often."""

    def __init__(self, grid):
        self.height, self.width = grid.shape
        # a slice of 900 that begins s cells before the end of the zeros is the canvas moved on by s cells
        self.ended = bytes(CELLS) + encode(grid).tobytes()
        self.open = bytes(CELLS) + encode(grid, end_column=False).tobytes()

    def moved(self, down, right):
        """The canvas (900 bytes) with the grid in row `down`, column `right`."""
        start = CELLS - SIDE * down - right
        # at the right edge there is no room for the end column: it would stand in the next row
        return (self.open if right + self.width == SIDE else self.ended)[start:start + CELLS]


def render(examples, augs, pads, rng):
    """Input rows and label rows of one group, two lists of bytes, one for each puzzle (augmentation).

    With pads all examples of a puzzle but one are moved at random, input and output alike. rng: numpy
    RandomState.
    """
    sheets = [[(Sheet(dihedral(a, t)), Sheet(dihedral(b, t))) for a, b in examples] for t in range(8)]
    inputs, labels = [], []
    for t, colours in augs:
        fixed = rng.randint(len(examples))
        rows_in, rows_out = [], []
        for i, (a, b) in enumerate(sheets[t]):
            down = right = 0
            if pads and i != fixed:
                down = rng.randint(SIDE + 1 - max(a.height, b.height))
                right = rng.randint(SIDE + 1 - max(a.width, b.width))
            rows_in.append(a.moved(down, right))
            rows_out.append(b.moved(down, right))
        table = bytes.maketrans(TOKENS, colours.translate(TO_TOKEN))
        inputs.append(b"".join(rows_in).translate(table))
        labels.append(b"".join(rows_out).translate(table))
    return inputs, labels


# ---------------------------------------------------------------------------------------------
# Writing

def write_arc_split(folder, groups, ids, pads, rng):
    """ids: {name: row of the puzzle table}."""
    folder.mkdir()
    puzzles = [len(group.augs) for group in groups]
    examples = np.repeat([len(group.examples) for group in groups], puzzles)        # of every puzzle
    n = int(examples.sum())
    files = [open(folder / f"all__{part}.npy", "wb", 1 << 20) for part in ("inputs", "labels")]
    with files[0], files[1]:
        for f in files:         # plain writes: mapped pages would count as memory of this process
            header = {"descr": "|u1", "fortran_order": False, "shape": (n, CELLS)}
            np.lib.format.write_array_header_1_0(f, header)
        for group in progress(groups, desc=f"write {folder.name}", unit="puzzle"):
            for f, rows in zip(files, render(group.examples, group.augs, pads, rng)):
                f.writelines(rows)
    write_split(folder, {
        "inputs": None, "labels": None,
        "puzzle_identifiers": np.array([ids[name] for group in groups for name in group.names()], np.int32),
        "puzzle_indices": np.concatenate([[0], examples.cumsum()]).astype(np.int32),
        "group_indices": np.concatenate([[0], np.cumsum(puzzles)]).astype(np.int32),
    }, vocab_size=12, num_identifiers=len(ids) + 1)
    print(f"{folder.name}: {len(groups):,} groups, {len(examples):,} puzzles, {n:,} examples")


def warn_of_leaks(train, test):
    """Say how many test pairs, unaugmented, are also trained on. Both: lists of Groups."""
    def content(pair):
        return [(grid.shape, grid.tobytes()) for grid in pair]

    trained = {str(content(pair)) for group in train for pair in group.examples}
    scored = [(group.puzzle_id, str(content(pair))) for group in test for pair in group.examples]
    leaked = [name for name, pair in scored if pair in trained]
    if leaked:
        some = " ".join(sorted(set(leaked))[:8])
        print(f"warning: {len(leaked)} of {len(scored)} test pairs (of {some} ...) also stand in the training"
              f" split: their score is memory", file=sys.stderr)


def array_of(grid):
    return np.zeros((0, 0), np.uint8) if grid is None else np.array(grid, np.uint8)


def augmented(args, subsets, rng):
    """The Groups of train and those of test. subsets: {name: Subset}, in the order of the draws."""
    train, test = [], []
    for subset, content in subsets.items():
        puzzles = list(content.puzzles.items())
        rng.shuffle(puzzles)
        for name, puzzle in progress(puzzles, desc=f"augment {subset}", unit="puzzle"):
            pairs = {key: [(array_of(e["input"]), array_of(e.get("output"))) for e in puzzle[key]]
                     for key in puzzle if key in KEYS}          # in the puzzle's own key order
            augs = augmentations(pairs["train"] + pairs["test"], args.num_aug, rng)
            if subset == args.test_set_name:
                train.append(Group(name, augs, pairs["train"]))
                test.append(Group(name, augs, pairs["test"]))
            else:
                train.append(Group(name, augs, list(chain.from_iterable(pairs.values()))))
    return train, test


def default_folder(args):
    arc = "arc2" if args.test_set_name == "evaluation2" else "arc1"
    return f"data/{arc}concept-aug-{args.num_aug}"


def build(args, source):
    """Write the dataset that args (see flags) describe, from the folder `source`. Raises UserError."""
    rng = np.random.RandomState(args.seed)
    subsets = {name: load_subset(args, source, name) for name in args.subsets}  # all before the first draw
    scored = subsets[args.test_set_name]
    train, test = augmented(args, subsets, rng)
    warn_of_leaks(train, test)
    ids = {}
    for group in train + test:
        for name in group.names():
            ids.setdefault(name, len(ids) + 1)
    digests = chain.from_iterable(subset.files.items() for subset in subsets.values())
    recipe = {"builder": "arc", **vars(args), "hidden_test_set": scored.hidden,
              "source_sha256": dict(digests)}
    del recipe["output_dir"]        # where it lies is not what it is
    with building(args.output_dir or default_folder(args)) as tmp:
        write_arc_split(tmp / "train", train, ids, True, rng)
        write_arc_split(tmp / "test", test, ids, False, rng)
        write_json(tmp / "identifiers.json", ["<blank>", *ids])
        write_json(tmp / "test_puzzles.json", {g.puzzle_id: scored.puzzles[g.puzzle_id] for g in test})
        write_json(tmp / "recipe.json", recipe)
    print(f"{len(ids) + 1:,} rows in the puzzle table (num_puzzle_identifiers)")
    if scored.hidden:
        print(f"{args.test_set_name} is a hidden test set, without outputs: it is answered, but not scored")


# ---------------------------------------------------------------------------------------------
# The command

def flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--source", default="download", help="folder of your own files, or download")
    add("--subsets", nargs="+", default=["training", "evaluation", "concept"], metavar="SUBSET",
        help="in this order")
    add("--test-set-name", default="evaluation", metavar="SUBSET", help="the one that is scored")
    add("--num-aug", type=within(int, 0), default=1000, metavar="N", help="augmentations per puzzle, at most")
    add("--seed", type=within(int, 0, 2 ** 32 - 1), default=42, metavar="N",
        help="of every draw; 42 gives the published datasets")
    add("--output-dir", metavar="DIR",
        help="without, data/arc1concept-aug-N, or arc2... if evaluation2 is the test set")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    if args.test_set_name not in args.subsets or len(set(args.subsets)) < len(args.subsets):
        raise UserError(f"--subsets {' '.join(args.subsets)}: must name each subset once, --test-set-name "
                        f"{args.test_set_name} among them")
    source = Path("data/arc-source" if args.source == "download" else args.source)
    if args.source == "download":
        download(args, source)
    build(args, source)


if __name__ == "__main__":
    cli(main)
