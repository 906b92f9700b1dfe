"""Build an ARC dataset: colour and dihedral augmentations on a 30 x 30 canvas.

    python prepare/arc.py                         # ARC-1, downloads its files
    python -m prepare arc2                        # ARC-2
    python prepare/arc.py --source DIR --num-aug 8   # your own files
    python -m prepare mini-arc mini-arc-tune      # 46 tasks of at most 6 x 6

DIR holds either Kaggle's files, arc-agi_SUBSET_challenges.json and, unless the
subset is a hidden test set, arc-agi_SUBSET_solutions.json, or folders of tasks
as fchollet/ARC-AGI has them, SUBSET/*.json or data/SUBSET/*.json.

The examples of the test set's "train" key are trained on (TRM sees a puzzle
only through its row of the puzzle table); its "test" key is what is scored.
Equal seeds give the bytes of the published builder: the order of the random
draws is part of the format.

--half scores half of the test set's tasks, by a hash of their names, and leaves
all else as it is: a model is tuned on one half and scored on the other.
"""
import hashlib
import json
import re
import sys
import urllib.request
from http.client import HTTPException
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, UserError, cli, progress, read_json, sha256, within, write, write_json
from data import DIHEDRAL_INVERSE, building, dihedral, write_split

SIDE = 30                       # of the canvas; a token is 0 (empty), 1 (end line) or colour + 2
CELLS = SIDE * SIDE
KEYS, PARTS = ("train", "test"), ("input", "output")        # of a puzzle, of an example
HALVES, HALF_SEED = ("tune", "report"), 0       # of a test set; see half_of
AGAIN = "fetch it again"
COMMIT = "e7b68717f0a6c4cbb4ce6fbef787b14f42083bd9"
URL = f"https://raw.githubusercontent.com/SamsungSAILMontreal/TinyRecursiveModels/{COMMIT}/kaggle/combined"
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

def encode(grid):
    """Grid (rows, columns) of colours 0..9 -> (900,) uint8 tokens, in the upper left corner of the canvas,
    with a line of 1 below it and right of it where the canvas has room."""
    h, w = grid.shape
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    canvas[h:h + 1, :w] = 1
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
ORIGINAL, TOKENS = bytes(range(10)), bytes(range(2, 12))
TO_TOKEN = bytes.maketrans(ORIGINAL, TOKENS)
NAME = re.compile(r"(.*)\|\|\|t([0-7])\|\|\|([0-9]{10})")


def augment(grid, t, colours):
    """Colour c becomes colours[c], then dihedral transform t."""
    return dihedral(np.frombuffer(colours, np.uint8)[grid], t)


def undo(grid, t, colours):
    """The grid that augment(..., t, colours) made `grid` from."""
    return np.frombuffer(bytes.maketrans(colours, ORIGINAL), np.uint8)[dihedral(grid, DIHEDRAL_INVERSE[t])]


def make_name(puzzle_id, t, colours):
    return f"{puzzle_id}|||t{t}|||{''.join(map(str, colours))}"


def parse_name(name):
    """`id|||tT|||dddddddddd` -> id, T, images of the colours; a bare id is the original."""
    match = NAME.fullmatch(name)
    return (match[1], int(match[2]), bytes(map(int, match[3]))) if match else (name, 0, ORIGINAL)


# ---------------------------------------------------------------------------------------------
# Reading

def download(subsets, folder):
    """Fetch the published files of `subsets` that `folder` lacks. Raises UserError when one is another."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in SHA256 if name.split("_")[1] in subsets]
    for name in names:
        path, there = folder / name, (folder / name).exists()
        try:
            raw = path.read_bytes() if there else urllib.request.urlopen(f"{URL}/{name}", timeout=60).read()
        except (OSError, HTTPException) as e:
            raise UserError(f"cannot fetch {URL}/{name} ({e}); put {' '.join(names)} of that folder into "
                            f"{folder} and start again")
        digest = hashlib.sha256(raw).hexdigest()
        if digest != SHA256[name]:
            raise UserError(f"{path}: sha256 {digest} is not {SHA256[name]}; put {URL}/{name} there, or name "
                            f"a folder of your own files with --source")
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


def subset_files(source, subset):
    """The files of a subset: Kaggle's one or two, or one of each task. Raises UserError."""
    kaggle = [source / f"arc-agi_{subset}_{kind}.json" for kind in ("challenges", "solutions")]
    if kaggle[0].exists():
        return [path for path in kaggle if path.exists()]
    tasks = sorted(source.glob(f"{subset}/*.json")) or sorted(source.glob(f"data/{subset}/*.json"))
    if not tasks:
        there = {path.name.split("_")[1] for path in source.glob("arc-agi_*_challenges.json")}
        there |= {path.parent.name for path in source.glob("**/*.json") if path.parent != source}
        raise UserError(f"{source} has neither {kaggle[0].name} nor {subset}/*.json; choose --subsets from "
                        f"{' '.join(sorted(there)) or 'nothing'} there, or name another --source")
    return tasks


def is_hidden(puzzles):
    """Whether no file says an output of a test example."""
    return not any("output" in example for puzzle in puzzles.values() for example in puzzle["test"])


def read_subset(files, subset, test_set):
    """{id: puzzle} of the files of a subset. Only the one named test_set may be hidden. Raises UserError."""
    kaggle = files[0].name.endswith("_challenges.json")
    puzzles = read_json(files[0], AGAIN, dict) if kaggle else {f.stem: read_json(f, AGAIN) for f in files}
    answers = read_json(files[1], AGAIN, dict) if kaggle and len(files) > 1 else {}
    for name, puzzle in puzzles.items():
        check_examples(puzzle, f"puzzle {name} of {subset}")
        for example, output in zip(puzzle["test"], answers.get(name, [])):
            example["output"] = output
    hidden = is_hidden(puzzles)
    if hidden and subset != test_set or not puzzles:
        raise UserError(f"{files[0].parent} has no outputs of the test examples of {subset}; add "
                        f"arc-agi_{subset}_solutions.json, leave {subset} out, or make it --test-set-name")
    for name, puzzle in puzzles.items():
        for key, part in product(KEYS, PARTS):
            known = [] if hidden and (key, part) == ("test", "output") else puzzle[key]
            for i, example in enumerate(known):
                check_grid(example.get(part), f"puzzle {name} of {subset}: {part} of {key} example {i}")
    return puzzles


# ---------------------------------------------------------------------------------------------
# Choosing

def side_of(puzzle):
    """Side of the smallest square that holds each grid of a puzzle, but for unknown outputs."""
    examples = chain.from_iterable(puzzle[key] for key in KEYS)
    grids = [example[part] for example in examples for part in PARTS if part in example]
    return max(max(len(grid), len(grid[0])) for grid in grids)


def half_of(name):
    """"tune" or "report": the half of a puzzle. It follows from the name alone, so that a puzzle stays on its
    side whatever other puzzles, flags and seeds a dataset is built of."""
    return HALVES[hashlib.sha256(f"{HALF_SEED}:{name}".encode()).digest()[0] & 1]


def small_enough(subsets, side, test_set, half):
    """Of {name: {id: puzzle}} the puzzles that fit side x side. Raises UserError when none of `half` (None:
    of both) is left to be scored."""
    small = {subset: {name: puzzle for name, puzzle in puzzles.items() if side_of(puzzle) <= side}
             for subset, puzzles in subsets.items()}
    left = small[test_set]
    if not left:
        least = min(map(side_of, subsets[test_set].values()))
        raise UserError(f"--max-side {side}: no puzzle of {test_set} is that small; give {least} or more")
    if half and half not in map(half_of, left):
        other = HALVES[half == HALVES[0]]
        raise UserError(f"--half {half}: none of the {len(left)} puzzles of {test_set} is in it; give "
                        f"{other}, or leave --half out")
    return small


# ---------------------------------------------------------------------------------------------
# Augmenting

class Group(NamedTuple):
    """A puzzle in all its augmentations, with the examples that one split has of it."""
    names: list         # in the puzzle table; the first is the puzzle's id
    augs: list          # [(t, images of the colours)], the original first
    examples: list      # [(input, output)], arrays (rows, columns) of colours; an unknown output has no cells


def augmentations(examples, num_aug, rng):
    """Draw up to num_aug augmentations that differ from the original and from one another as multisets.

    examples: list of (input, output) arrays; rng: numpy RandomState. Returns [(t, images of the colours 0..9
    as bytes)], the original first.
    """
    def blob(grid):     # its shape, past the ten colours, so that translate() leaves it alone, and its cells
        return bytes([grid.shape[0] + 10, grid.shape[1] + 10]) + grid.tobytes()

    turned = [[blob(dihedral(a, t)) + blob(dihedral(b, t)) for a, b in examples] for t in range(8)]
    kept, seen = [(0, ORIGINAL)], {tuple(sorted(turned[0]))}
    for _ in range(5 * num_aug):
        if len(kept) > num_aug:
            break
        t, colours = rng.randint(8), list(range(1, 10))
        rng.shuffle(colours)
        colours = bytes([0, *colours])
        table = bytes.maketrans(ORIGINAL, colours)
        puzzle = tuple(sorted(pair.translate(table) for pair in turned[t]))
        if puzzle not in seen:
            seen.add(puzzle)
            kept.append((t, colours))
    return kept


def places(grid):
    """(31, 31, 30, 30) tokens, a view: [30 - down, 30 - right] is the canvas with the grid in row `down`,
    column `right`. What stands over the edge is cut off, as end lines do where there is no room."""
    plane = np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
    plane[SIDE:, SIDE:] = encode(grid).reshape(SIDE, SIDE)
    return sliding_window_view(plane, (SIDE, SIDE))


def sheet(pair, t):
    """Rows and columns that both grids of a pair fill when turned by t, and the places of either."""
    a, b = (dihedral(grid, t) for grid in pair)
    rows, columns = map(max, a.shape, b.shape)
    return rows, columns, places(a), places(b)


def render(examples, augs, pads, rng):
    """Input rows and label rows of one group, two lists of bytes, one for each puzzle (augmentation).

    With pads all examples of a puzzle but one are moved at random, input and output alike. rng: numpy
    RandomState.
    """
    sheets = [[sheet(pair, t) for pair in examples] for t in range(8)]
    inputs, labels = [], []
    for t, colours in augs:
        fixed = rng.randint(len(examples))
        rows_in, rows_out = [], []
        for i, (rows, columns, places_in, places_out) in enumerate(sheets[t]):
            down = right = 0
            if pads and i != fixed:
                down, right = rng.randint(SIDE + 1 - rows), rng.randint(SIDE + 1 - columns)
            place = SIDE - down, SIDE - right
            rows_in.append(places_in[place].tobytes())
            rows_out.append(places_out[place].tobytes())
        table = bytes.maketrans(TOKENS, colours.translate(TO_TOKEN))
        inputs.append(b"".join(rows_in).translate(table))
        labels.append(b"".join(rows_out).translate(table))
    return inputs, labels


# ---------------------------------------------------------------------------------------------
# The dataset

def augmented(args, subsets, rng):
    """The Groups of train and those of test. subsets: {name: {id: puzzle}}, in the order of the draws."""
    train, test = [], []
    for subset, puzzles in subsets.items():
        puzzles = list(puzzles.items())
        rng.shuffle(puzzles)
        for name, puzzle in progress(puzzles, desc=f"augment {subset}", unit="puzzle"):
            pairs = {key: [arrays(example) for example in puzzle[key]] for key in puzzle if key in KEYS}
            augs = augmentations(pairs["train"] + pairs["test"], args.num_aug, rng)
            names = [name] + [make_name(name, *aug) for aug in augs[1:]]
            if subset == args.test_set_name:
                train.append(Group(names, augs, pairs["train"]))
                test.append(Group(names, augs, pairs["test"]))
            else:       # all are trained on, in the puzzle's own key order
                train.append(Group(names, augs, list(chain.from_iterable(pairs.values()))))
    return train, test


def arrays(example):
    """Its input and output; an unknown output has no cells."""
    unknown = np.zeros((0, 0), np.uint8)
    return tuple(np.array(example[part], np.uint8) if part in example else unknown for part in PARTS)


def warn_of_leaks(train, test):
    """Say how many test pairs, unaugmented, are also trained on. Both: lists of Groups."""
    def pairs(groups):
        return [str([grid.tolist() for grid in pair]) for group in groups for pair in group.examples]

    trained, tested = set(pairs(train)), pairs(test)
    leaked = sum(pair in trained for pair in tested)
    if leaked:
        print(f"warning: {leaked} of {len(tested)} test pairs also stand in the training split: their score "
              f"is memory", file=sys.stderr)


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
        "puzzle_identifiers": np.array([ids[name] for group in groups for name in group.names], np.int32),
        "puzzle_indices": np.concatenate([[0], examples.cumsum()]).astype(np.int32),
        "group_indices": np.concatenate([[0], np.cumsum(puzzles)]).astype(np.int32),
    }, vocab_size=12, num_identifiers=len(ids) + 1)
    print(f"{folder.name}: {len(groups):,} groups, {len(examples):,} puzzles, {n:,} examples")


def flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--source", default="download", help="folder of your own files, or download")
    add("--subsets", nargs="+", default=["training", "evaluation", "concept"], metavar="SUBSET",
        help="in this order")
    add("--test-set-name", default="evaluation", metavar="SUBSET", help="the one that is scored")
    add("--max-side", type=within(int, 1, SIDE), default=SIDE, metavar="N",
        help="only puzzles whose grids all fit N x N")
    add("--half", choices=HALVES, help="score only this half of the test set")
    add("--num-aug", type=within(int, 0), default=1000, metavar="N", help="augmentations per puzzle, at most")
    add("--seed", type=within(int, 0, 2 ** 32 - 1), default=42, metavar="N",
        help="of every draw; 42 gives the published datasets")
    add("--output-dir", metavar="DIR",
        help="without, data/arc1concept-aug-N, or arc2... if evaluation2 is the test set; "
             "-side-N and -HALF are added")
    return parser


def default_folder(args):
    """A name of its own for every choice of tasks, so that none replaces the published dataset."""
    arc = "arc2" if args.test_set_name == "evaluation2" else "arc1"
    side = f"-side-{args.max_side}" if args.max_side < SIDE else ""
    return f"data/{arc}concept-aug-{args.num_aug}{side}" + (f"-{args.half}" if args.half else "")


def main(argv=None):
    args = flags().parse_args(argv)
    scored = args.test_set_name
    if scored not in args.subsets or len(set(args.subsets)) < len(args.subsets):
        raise UserError(f"--subsets {' '.join(args.subsets)}: must name each subset once, --test-set-name "
                        f"{scored} among them")
    source = Path("data/arc-source" if args.source == "download" else args.source)
    if args.source == "download":
        download(args.subsets, source)
    files = {subset: subset_files(source, subset) for subset in args.subsets}
    subsets = {subset: read_subset(paths, subset, scored) for subset, paths in files.items()}
    subsets = small_enough(subsets, args.max_side, scored, args.half)
    rng = np.random.RandomState(args.seed)
    train, test = augmented(args, subsets, rng)     # of both halves: the puzzle table is the same for either
    ids = {}
    for name in chain.from_iterable(group.names for group in train + test):
        ids.setdefault(name, len(ids) + 1)
    test = [group for group in test if args.half in (None, half_of(group.names[0]))]
    warn_of_leaks(train, test)
    puzzles, hidden = subsets[scored], is_hidden(subsets[scored])
    digests = {str(path.relative_to(source)): sha256(path) for path in chain(*files.values())}
    recipe = {"builder": "arc", **vars(args), "hidden_test_set": hidden, "source_sha256": digests}
    del recipe["output_dir"]        # where it lies is not what it is
    if args.source != "download":
        recipe["source"] = str(source.resolve())    # to build it again from any directory
    with building(args.output_dir or default_folder(args)) as tmp:
        write_arc_split(tmp / "train", train, ids, True, rng)
        write_arc_split(tmp / "test", test, ids, False, rng)
        write_json(tmp / "identifiers.json", ["<blank>", *ids])
        write_json(tmp / "test_puzzles.json", {group.names[0]: puzzles[group.names[0]] for group in test})
        write_json(tmp / "recipe.json", recipe)
    print(f"{len(ids) + 1:,} rows in the puzzle table (num_puzzle_identifiers)")
    if hidden:
        print(f"{scored} is a hidden test set, without outputs: it is answered, but not scored")


if __name__ == "__main__":
    cli(main)
