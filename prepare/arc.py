"""Build an ARC dataset: colour and dihedral augmentations on a 30 x 30 canvas.

    python prepare/arc.py                            # ARC-1, with download
    python -m prepare arc2                           # ARC-2
    python prepare/arc.py --source DIR --num-aug 8 --output-dir data/mine
    python -m prepare mini-arc mini-arc-tune         # 46 tasks of at most 6 x 6

DIR contains Kaggle's files, arc-agi_SUBSET_challenges.json and, unless the
subset is a hidden test set, arc-agi_SUBSET_solutions.json; or one JSON file per
task, SUBSET/**/*.json or data/SUBSET/**/*.json, as in fchollet/ARC-AGI,
ConceptARC (--subsets corpus) and 1D-ARC (--subsets dataset).

The model is trained on the "train" examples of the test set and scored on its
"test" examples: TRM sees a puzzle only through its row of the puzzle table.
Equal seeds give the bytes of the published builder, so the order of the random
draws is part of the format.

--half selects the tasks to score by a hash of their names and changes nothing
else: tune a model on one half, then report the score on the other.
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
import prepare
from prepare import DIHEDRAL_INVERSE, building, dihedral, write_split
from tools.common import (
    Parser,
    bounded,
    cli,
    progress,
    read_json,
    require,
    user_error,
    write_file,
    write_json,
)

SIDE = 30  # of the canvas; a token is 0 (empty), 1 (end line) or colour + 2
CELLS = SIDE * SIDE
KEYS, PARTS = ("train", "test"), ("input", "output")  # of a puzzle, of an example
HALVES = ("tune", "report")
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
    """Convert a grid (rows, columns) of colours 0..9 to (900,) uint8 tokens.

    The grid is in the top-left corner of the canvas. A line of 1 ends it below and on the right, where the
    canvas has room."""
    h, w = grid.shape
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    canvas[h : h + 1, :w] = 1
    canvas[:h, w : w + 1] = 1
    canvas[:h, :w] = grid + 2
    return canvas.reshape(-1)


def crop(tokens):
    """(N, 900) tokens -> rows (N,), columns (N,) of the largest rectangle of colours in the top-left corner.

    Of equal areas, the one with the fewest rows; 0 and 0 if the corner cell is not a colour."""
    colours = tokens.astype(np.uint8).reshape(-1, SIDE, SIDE) - np.uint8(2)  # 0 and 1 become 254 and 255
    no_colour = np.ones((len(tokens), SIDE, SIDE + 1), bool)  # the last column ends every run of colours
    no_colour[:, :, :SIDE] = colours > 9
    width = no_colour.argmax(2)
    width = np.minimum.accumulate(width, axis=1)  # (N, 30): columns of a rectangle that ends at each row
    area = width * np.arange(1, SIDE + 1)
    last_row = area.argmax(1)
    columns = width[np.arange(len(width)), last_row]
    return np.where(columns > 0, last_row + 1, 0), columns


# An augmentation is a dihedral transform t and ten bytes, the new colours of the colours 0..9.
ORIGINAL, TOKENS = bytes(range(10)), bytes(range(2, 12))
TO_TOKEN = bytes.maketrans(ORIGINAL, TOKENS)
NAME = re.compile(r"(.*)\|\|\|t([0-7])\|\|\|([0-9]{10})")


def augment(grid, t, colours):
    """Replace colour c by colours[c], then apply dihedral transform t."""
    return dihedral(np.frombuffer(colours, np.uint8)[grid], t)


def invert_augmentation(grid, t, colours):
    """The grid that augment(..., t, colours) turns into `grid`."""
    inverse_colours = bytes.maketrans(colours, ORIGINAL)
    return np.frombuffer(inverse_colours, np.uint8)[dihedral(grid, DIHEDRAL_INVERSE[t])]


def make_name(puzzle_id, t, colours):
    """Identifier of an augmented puzzle: id|||tT|||dddddddddd, ten digits for the colours."""
    return f"{puzzle_id}|||t{t}|||{''.join(map(str, colours))}"


def parse_name(name):
    """The puzzle id, transform and colours in an identifier; a bare id is the original puzzle."""
    match = NAME.fullmatch(name)
    if not match:
        return name, 0, ORIGINAL
    return match[1], int(match[2]), bytes(map(int, match[3]))


# ---------------------------------------------------------------------------------------------
# Reading


def download(subsets, folder):
    """Download the published files of `subsets` that `folder` lacks, and verify all of them."""
    for name, sha256 in SHA256.items():
        if name.split("_")[1] in subsets:
            path = folder / name
            url = f"{URL}/{name}"
            is_new = not path.exists()
            hint = f"cannot download {url}; put it into {folder} and retry"
            with user_error(hint, OSError, HTTPException):
                content = urllib.request.urlopen(url, timeout=60).read() if is_new else path.read_bytes()
            is_published = hashlib.sha256(content).hexdigest() == sha256
            require(
                is_published, f"{path} differs from {url}; replace it, or pass your own files with --source"
            )
            if is_new:
                write_file(path, content)
                print(f"downloaded {path}")


def check_grid(grid, where):
    """Raise UserError unless `grid` is a list of 1..30 equally long lists of 1..30 colours."""
    try:
        colours = np.array(grid)
    except ValueError:  # rows of different lengths
        colours = np.array(None)
    good = colours.ndim == 2 and colours.dtype.kind == "i" and max(colours.shape) <= SIDE
    good = good and 0 <= colours.min() <= colours.max() <= 9
    need = f"1..{SIDE} equally long rows of 1..{SIDE} colours 0..9"
    require(good, f"{where} must be {need}, not {json.dumps(grid)[:60]}")


def read_files(source, subset):
    """Puzzles {id: puzzle} and test outputs {id: outputs}, from Kaggle's files or from one file per task."""
    challenges = source / f"arc-agi_{subset}_challenges.json"
    solutions = source / f"arc-agi_{subset}_solutions.json"
    if challenges.exists():
        return read_json(challenges), read_json(solutions) if solutions.exists() else {}
    puzzles = {}
    for folder in (source / subset, source / "data" / subset):
        for path in sorted(folder.glob("**/*.json")):
            puzzles[path.relative_to(folder).with_suffix("").as_posix()] = read_json(path)
    require(puzzles, f"{source} contains neither {challenges.name} nor {subset}/*.json; change --subsets")
    return puzzles, {}


def is_hidden(puzzles):
    """Whether the outputs of all test examples are unknown."""
    examples = chain.from_iterable(puzzle["test"] for puzzle in puzzles.values())
    return not any("output" in example for example in examples)


def read_subset(source, subset, test_set):
    """{id: puzzle} of a subset, with valid grids. Only the one named test_set may be hidden."""
    puzzles, answers = read_files(source, subset)
    for name, puzzle in puzzles.items():
        for key in KEYS:
            examples = puzzle.get(key) if isinstance(puzzle, dict) else None
            good = isinstance(examples, list) and len(examples) > 0
            good = good and all(isinstance(example, dict) for example in examples)
            require(good, f"puzzle {name} of {subset}: {key} must be a list of {{input, output}}")
        for example, output in zip(puzzle["test"], answers.get(name, [])):
            example["output"] = output
    hidden = is_hidden(puzzles)
    hint = f"add arc-agi_{subset}_solutions.json or make it --test-set-name"
    require(not hidden or subset == test_set, f"{subset} has no outputs for its test examples; {hint}")
    for (name, puzzle), key, part in product(puzzles.items(), KEYS, PARTS):
        if not (hidden and key == "test" and part == "output"):
            for i, example in enumerate(puzzle[key]):
                check_grid(example.get(part), f"puzzle {name} of {subset}: {part} of {key} example {i}")
    return puzzles


# ---------------------------------------------------------------------------------------------
# Selecting


def side_of(puzzle):
    """Side of the smallest square that contains every known grid of a puzzle."""
    sides = []
    for example, part in product(puzzle["train"] + puzzle["test"], PARTS):
        if part in example:
            sides += np.shape(example[part])
    return max(sides)


def half_of(name):
    """ "tune" or "report". It depends on the name alone, so a puzzle stays in its half in every dataset."""
    return HALVES[hashlib.sha256(f"0:{name}".encode()).digest()[0] & 1]


# ---------------------------------------------------------------------------------------------
# Augmenting


class Group(NamedTuple):
    """A puzzle with all its augmentations, and its examples in one split."""

    names: list  # identifiers; the first is the puzzle's id
    augs: list  # (t, colours) of each, the original first
    examples: list  # (input, output) arrays (rows, columns) of colours; an unknown output is empty


def grid_bytes(grid):
    """The shape and the cells. Shapes start at 11, which translate() with a table of colours leaves alone."""
    return bytes([grid.shape[0] + 10, grid.shape[1] + 10]) + grid.tobytes()


def augmentations(examples, num_aug, rng):
    """Draw up to num_aug augmentations whose examples, in any order, differ from all others.

    examples: list of (input, output) arrays; rng: numpy RandomState. Returns a list of (t, colours), the
    original first."""
    transformed = []  # [t][example]: bytes of input and output
    for t in range(8):
        pairs = []
        for a, b in examples:
            pairs.append(grid_bytes(dihedral(a, t)) + grid_bytes(dihedral(b, t)))
        transformed.append(pairs)
    kept = [(0, ORIGINAL)]
    seen = {tuple(sorted(transformed[0]))}
    for _ in range(5 * num_aug):
        if len(kept) > num_aug:
            break
        t = rng.randint(8)
        colours = list(range(1, 10))
        rng.shuffle(colours)
        colours = bytes([0, *colours])
        table = bytes.maketrans(ORIGINAL, colours)
        puzzle = tuple(sorted(pair.translate(table) for pair in transformed[t]))
        if puzzle not in seen:
            seen.add(puzzle)
            kept.append((t, colours))
    return kept


def padded_views(grid):
    """(31, 31, 30, 30) view: [30 - down, 30 - right] is the canvas with the grid at row `down`, column
    `right`. End lines beyond the edge are cut off."""
    plane = np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
    plane[SIDE:, SIDE:] = encode(grid).reshape(SIDE, SIDE)
    return sliding_window_view(plane, (SIDE, SIDE))


def translated_pair(pair, t):
    """Rows and columns that both grids of a transformed pair fill, and their padded views."""
    a, b = (dihedral(grid, t) for grid in pair)
    rows, columns = np.maximum(a.shape, b.shape)
    return rows, columns, padded_views(a), padded_views(b)


def render(examples, augs, translate, rng):
    """Input rows and label rows of one group: two lists with the bytes of each puzzle (augmentation).

    translate: move all examples of a puzzle but one to a random place, input and output together."""
    pairs = []  # [t][example]
    for t in range(8):
        pairs.append([translated_pair(pair, t) for pair in examples])
    inputs = []
    labels = []
    for t, colours in augs:
        fixed = rng.randint(len(examples))
        input_rows = []
        label_rows = []
        for i, (rows, columns, input_views, label_views) in enumerate(pairs[t]):
            down = right = 0
            if translate and i != fixed:
                down = rng.randint(SIDE + 1 - rows)
                right = rng.randint(SIDE + 1 - columns)
            input_rows.append(input_views[SIDE - down, SIDE - right].tobytes())
            label_rows.append(label_views[SIDE - down, SIDE - right].tobytes())
        table = bytes.maketrans(TOKENS, colours.translate(TO_TOKEN))
        inputs.append(b"".join(input_rows).translate(table))
        labels.append(b"".join(label_rows).translate(table))
    return inputs, labels


# ---------------------------------------------------------------------------------------------
# The dataset


def example_arrays(examples):
    """(input, output) uint8 arrays of each example; an unknown output is empty."""
    pairs = []
    for example in examples:
        output = example.get("output", np.zeros((0, 0)))
        pairs.append((np.array(example["input"], np.uint8), np.array(output, np.uint8)))
    return pairs


def augment_subsets(subsets, test_set, num_aug, rng):
    """The Groups of the training split and of the test split.

    subsets: {name: {id: puzzle}}, in the order of the random draws."""
    train = []
    test = []
    for subset, puzzles in subsets.items():
        puzzles = list(puzzles.items())
        rng.shuffle(puzzles)
        for name, puzzle in progress(puzzles, desc=f"augment {subset}", unit="puzzle"):
            pairs = {key: example_arrays(puzzle[key]) for key in puzzle if key in KEYS}
            augs = augmentations(pairs["train"] + pairs["test"], num_aug, rng)
            names = [name]
            for t, colours in augs[1:]:
                names.append(make_name(name, t, colours))
            if subset == test_set:
                train.append(Group(names, augs, pairs["train"]))
                test.append(Group(names, augs, pairs["test"]))
            else:  # train on all examples, in the order of the puzzle's keys
                train.append(Group(names, augs, list(chain.from_iterable(pairs.values()))))
    return train, test


def warn_of_leaks(train, test):
    """Print how many original test pairs are also trained on. train, test: lists of Groups."""
    trained = set()
    tested = []
    for groups, add in ((train, trained.add), (test, tested.append)):
        for group in groups:
            for a, b in group.examples:
                add(grid_bytes(a) + grid_bytes(b))
    leaked = sum(pair in trained for pair in tested)
    if leaked:
        message = f"warning: {leaked} of {len(tested)} test pairs are also in the training split"
        print(f"{message}; a model may have memorized their outputs", file=sys.stderr)


def write_arc_split(folder, groups, ids, translate, rng):
    """ids: {name: row of the puzzle table}."""
    folder.mkdir()
    names = []  # of every puzzle
    sizes = []
    for group in groups:
        names += group.names
        sizes += [len(group.examples)] * len(group.names)
    n = sum(sizes)
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, CELLS)}
    # written group by group, because the whole split does not fit into memory
    with open(folder / "all__inputs.npy", "wb") as f, open(folder / "all__labels.npy", "wb") as g:
        np.lib.format.write_array_header_1_0(f, header)
        np.lib.format.write_array_header_1_0(g, header)
        for group in progress(groups, desc=f"write {folder.name}", unit="puzzle"):
            inputs, labels = render(group.examples, group.augs, translate, rng)
            f.writelines(inputs)
            g.writelines(labels)
    group_sizes = [len(group.names) for group in groups]
    arrays = {
        "inputs": None,
        "labels": None,
        "puzzle_identifiers": np.array([ids[name] for name in names], np.int32),
        "puzzle_indices": np.cumsum([0, *sizes], dtype=np.int32),
        "group_indices": np.cumsum([0, *group_sizes], dtype=np.int32),
    }
    write_split(folder, arrays, vocab_size=12, table_rows=len(ids) + 1)
    print(f"{folder.name}: {len(groups):,} groups, {len(names):,} puzzles, {n:,} examples")


def flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    subsets = ["training", "evaluation", "concept"]
    add("--source", default="download", metavar="DIR", help="folder of task files, or download")
    add("--subsets", nargs="+", default=subsets, metavar="SUBSET", help="subsets to read, in this order")
    add("--test-set-name", default="evaluation", metavar="SUBSET", help="the subset to score")
    side = bounded(int, 1, SIDE)
    count = bounded(int, 0)
    add("--max-side", type=side, default=SIDE, metavar="N", help="keep puzzles whose grids all fit N x N")
    add("--half", choices=HALVES, help="score only this half of the test set")
    add("--num-aug", type=count, default=1000, metavar="N", help="largest number of augmentations per puzzle")
    add("--seed", type=bounded(int, 0, 2**32 - 1), default=42, metavar="N", help="seed of all random draws")
    prepare.add_output_flags(add)
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    test_set = args.test_set_name
    names = args.subsets
    consistent = test_set in names and len(set(names)) == len(names)
    require(consistent, f"--subsets must name every subset once, with --test-set-name {test_set} among them")
    recipe = prepare.recipe_of("arc", argv)
    with building(prepare.output_dir(args, recipe), recipe, args.overwrite) as folder:
        source = Path(args.source)
        if args.source == "download":
            source = Path("data/arc-source")
            download(names, source)
        subsets = {}
        for name in names:
            puzzles = read_subset(source, name, test_set).items()
            subsets[name] = {key: puzzle for key, puzzle in puzzles if side_of(puzzle) <= args.max_side}
        rng = np.random.RandomState(args.seed)
        train, test = augment_subsets(subsets, test_set, args.num_aug, rng)
        ids = {}  # the same for both halves
        for group in train + test:
            for name in group.names:
                ids.setdefault(name, len(ids) + 1)
        test = [group for group in test if args.half in (None, half_of(group.names[0]))]
        require(test, f"--max-side and --half leave no puzzle of {test_set}; change them")
        warn_of_leaks(train, test)
        write_arc_split(folder / "train", train, ids, True, rng)
        write_arc_split(folder / "test", test, ids, False, rng)
        write_json(folder / "identifiers.json", ["<blank>", *ids])
        test_puzzles = {group.names[0]: subsets[test_set][group.names[0]] for group in test}
        write_json(folder / "test_puzzles.json", test_puzzles)
        print(f"{len(ids) + 1:,} rows in the puzzle table (num_puzzle_identifiers)")
        if is_hidden(test_puzzles):
            print(f"{test_set} is a hidden test set: eval.py writes a submission, but no score")


if __name__ == "__main__":
    cli(main)
