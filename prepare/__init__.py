"""The known datasets, and the writer that all builders share.

    python -m prepare sudoku maze              # download and build
    python -m prepare mini-arc --source DIR    # from files in a folder

The builders are prepare/sudoku.py, prepare/maze.py and prepare/arc.py. Sudoku
and maze share prepare/boards.py. data.py documents the format on disk.
"""

import argparse
import importlib
import os
import shlex
import signal
import sys
import tempfile
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.common import Parser, UserError, read_json, require, sha256_of_file, user_error, write_json

# ---------------------------------------------------------------------------------------------
# The known datasets


class Dataset(NamedTuple):
    """A dataset that a preset trains on or that published weights were trained on."""

    folder: str
    builder: str  # prepare/BUILDER.py
    flags: tuple  # the builder's flags, without --output-dir
    shape: dict  # the fields of train/dataset.json that estimates and benchmarks need before it is built

    @property
    def generated(self):
        """Whether the builder needs no network, so that train.py may build the dataset itself."""
        return "generate" in self.flags


def shape(vocab_size, seq_len, groups=1000, table_rows=1, mean_examples=1.0):
    """table_rows: of the puzzle table, with the blank row; mean_examples: training examples per puzzle."""
    return {
        "vocab_size": vocab_size,
        "seq_len": seq_len,
        "num_puzzle_identifiers": table_rows,
        "total_groups": groups,
        "mean_puzzle_examples": mean_examples,
    }


SUDOKU_FLAGS = ("--subsample-size", "1000", "--num-aug", "1000")
MINI_FLAGS = ("--source", "generate", "--size", "6", "--num-aug", "1000")
SUDOKU_9X9_FLAGS = ("--source", "generate", "--size", "9", "--num-aug", "300")
MINI_MAZE_FLAGS = ("--source", "generate", "--size", "9", "--min-path", "12", "--num-train", "80000")
MAZE_GEN_FLAGS = ("--source", "generate", "--size", "30", "--num-train", "100000")
ARC2_FLAGS = ("--subsets", "training2", "evaluation2", "concept", "--test-set-name", "evaluation2")
MINI_ARC_FLAGS = ("--test-set-name", "training", "--max-side", "6", "--num-aug", "24")  # 46 test tasks
REPORT_FLAGS = (*MINI_ARC_FLAGS, "--half", "report")
TUNE_FLAGS = (*MINI_ARC_FLAGS, "--half", "tune")

ARC1_SHAPE = shape(12, 900, 960, 876_406, 4.1458)
ARC2_SHAPE = shape(12, 900, 1280, 1_191_730, 4.354)
MINI_ARC_SHAPE = shape(12, 900, 65, 1_626, 4.2769)  # the two halves differ in their test split only

KNOWN = {
    "mini": Dataset("data/sudoku-6x6-mini", "sudoku", MINI_FLAGS, shape(8, 36)),
    "sudoku-9x9": Dataset("data/sudoku-9x9", "sudoku", SUDOKU_9X9_FLAGS, shape(11, 81)),
    "sudoku": Dataset("data/sudoku-extreme-1k-aug-1000", "sudoku", SUDOKU_FLAGS, shape(11, 81)),
    "maze": Dataset("data/maze-30x30-hard-1k", "maze", (), shape(6, 900)),
    "mini-maze": Dataset("data/maze-9x9-hard", "maze", MINI_MAZE_FLAGS, shape(6, 81, 80_000)),
    "maze-gen": Dataset("data/maze-30x30-generated", "maze", MAZE_GEN_FLAGS, shape(6, 900, 100_000)),
    "arc1": Dataset("data/arc1concept-aug-1000", "arc", (), ARC1_SHAPE),
    "arc2": Dataset("data/arc2concept-aug-1000", "arc", ARC2_FLAGS, ARC2_SHAPE),
    "mini-arc": Dataset("data/arc-6x6-mini", "arc", REPORT_FLAGS, MINI_ARC_SHAPE),
    "mini-arc-tune": Dataset("data/arc-6x6-mini-tune", "arc", TUNE_FLAGS, MINI_ARC_SHAPE),
}


def known_dataset(folder):
    """The known Dataset whose folder has the same name, wherever it is, or None."""
    for dataset in KNOWN.values():
        if Path(dataset.folder).name == Path(folder).name:
            return dataset
    return None


def recipe_of(builder, argv=None):
    """The content of recipe.json: the builder, and its command without --output-dir and --overwrite.

    argv: the flags, by default those of this process."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_output_flags(parser.add_argument)
    _, flags = parser.parse_known_args(argv)
    source = flags.index("--source") + 1 if "--source" in flags else 0
    if source and Path(flags[source]).exists():
        flags[source] = str(Path(flags[source]).resolve())  # the command works in every directory
    return {"builder": builder, "command": shlex.join(["python", f"prepare/{builder}.py", *flags])}


def check_exists(folders, recipes=()):
    """Raise UserError for a folder that does not exist, with the command that builds it.

    recipes: the content of recipe.json for the first folders, from a checkpoint."""
    for folder, recipe in zip_longest(folders, recipes):
        hint = "pass another folder, or build one with python prepare/{sudoku,maze,arc}.py"
        dataset = known_dataset(folder)
        if dataset and not recipe:
            recipe = recipe_of(dataset.builder, dataset.flags)
        if recipe and "command" in recipe:
            hint = f"build it: {recipe['command']} --output-dir {folder}"
        require(Path(folder).exists(), f"{folder} not found; {hint}")


def build_if_missing(folder, world=None, source=None):
    """Build a known dataset unless its folder contains one. Rank 0 builds, the other ranks wait.

    source: a folder that replaces the builder's own --source."""
    is_built = Path(folder, "identifiers.json").exists()
    if (world is None or world.rank == 0) and not is_built:
        dataset = known_dataset(folder)
        flags = [*dataset.flags]
        if source:
            flags += ["--source", source]  # the last --source wins
        print(f"+ {recipe_of(dataset.builder, flags)['command']} --output-dir {folder}", flush=True)
        builder = importlib.import_module(f"prepare.{dataset.builder}")
        builder.main([*flags, "--output-dir", str(folder)])
    if world is not None:
        world.all_gather_object(None)


def task_of(recipes):
    """ "sudoku", "maze" or "arc" if the recipe.json of every dataset names this builder, else None."""
    builders = {recipe.get("builder") if isinstance(recipe, dict) else None for recipe in recipes}
    task = builders.pop() if len(builders) == 1 else None
    return task if task in ("sudoku", "maze", "arc") else None


# ---------------------------------------------------------------------------------------------
# Writing a folder: all or nothing


def add_output_flags(add):
    """Add --output-dir and --overwrite. add: the parser's add_argument."""
    add("--output-dir", metavar="DIR", help="dataset folder to write (default: that of a known dataset)")
    add("--overwrite", action="store_true", help="replace a dataset that was built with other flags")


def output_dir(args, recipe):
    """--output-dir, or the folder of the known dataset with this recipe."""
    if args.output_dir:
        return args.output_dir
    for dataset in KNOWN.values():
        if recipe_of(dataset.builder, dataset.flags) == recipe:
            return dataset.folder
    raise UserError("--output-dir is required with these flags; pass the folder to write")


# all entries that a dataset folder may have
ENTRIES = ("identifiers.json", "recipe.json", "test_puzzles.json", "test", "train")


def check_replaceable(folder, recipe, overwrite):
    """Raise UserError if a build would replace anything but an older build with the same recipe."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if "identifiers.json" not in names:
        found = [name for name in names if name != "lost+found" and not name.startswith(".")]
        require(not found, f"{folder} contains other files, but no dataset; choose another --output-dir")
    elif not overwrite:
        old_recipe = read_json(folder / "recipe.json", object) if "recipe.json" in names else None
        same = recipe is not None and old_recipe == recipe
        hint = "pass --overwrite to replace it, or choose another --output-dir"
        require(same, f"{folder} contains a dataset with another recipe; {hint}")


def exchange(new, folder, old):
    """Move the dataset in `folder` to `old`, the content of `new` to `folder`; undo all if a move fails."""
    moves = [(folder / name, old / name) for name in ENTRIES if os.path.lexists(folder / name)]
    for path in new.iterdir():
        moves.append((path, folder / path.name))
    try:
        for source, destination in moves:
            os.replace(source, destination)
    except BaseException:
        for source, destination in reversed(moves):
            if not os.path.lexists(source):
                os.replace(destination, source)
        raise


@contextmanager
def building(output_dir, recipe=None, overwrite=False):
    """Yield an empty folder; when the block ends, its content becomes the dataset in output_dir.

    Until then the old dataset stays. A block that fails or is interrupted leaves everything as it was.
    Symbolic links are followed. In an existing folder, which may be a mount point, only the entries of the
    dataset are exchanged. Raises UserError, before the block runs, if output_dir contains other files, or a
    dataset with another recipe unless `overwrite` is true.
    """
    target = Path(os.path.realpath(output_dir))
    with user_error(f"cannot write {output_dir}", OSError):
        check_replaceable(target, recipe, overwrite)
        parent = target if target.is_dir() else target.parent
        missing = [path for path in (parent, *parent.parents) if not path.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        # a terminated build cleans up, too
        handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            with tempfile.TemporaryDirectory(prefix=".building-", dir=parent) as tmp:
                new = Path(tmp, "new")
                old = Path(tmp, "old")
                new.mkdir()
                old.mkdir()
                yield new
                if recipe is not None:
                    write_json(new / "recipe.json", recipe)
                print_digests(new, output_dir)
                if target.is_dir():
                    exchange(new, target, old)
                else:
                    os.replace(new, target)
        finally:
            signal.signal(signal.SIGTERM, handler)
            with suppress(OSError):  # after a success they are not empty
                for path in missing:
                    path.rmdir()


def print_digests(folder, output_dir):
    """Print sha256 and size of every file but recipe.json, under its final name."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "recipe.json":
            name = Path(output_dir, path.relative_to(folder))
            print(f"{sha256_of_file(path)}  {path.stat().st_size:>13,} bytes  {name}")


# ---------------------------------------------------------------------------------------------
# Writing splits

INDEX_FILES = ("puzzle_identifiers", "puzzle_indices", "group_indices")
DIHEDRAL_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)


def dihedral(array, t):
    """Transform t in 0..7 of the last two axes: identity, counter-clockwise rotations by 90, 180 and 270
    degrees, left-right flip, up-down flip, transpose, left-right flip of the 90 degree rotation.
    DIHEDRAL_INVERSE[t] is the inverse transform."""
    if t >= 4:  # the other four are rotations of the left-right flip
        array = np.flip(array, -1)
        t = (0, 2, 1, 3)[t - 4]
    return np.rot90(array, t, axes=(-2, -1))


def singleton_index(n, group_size=1):
    """The arrays of INDEX_FILES for n examples, each a puzzle of its own with the blank identifier.

    group_size: number of consecutive puzzles in a group."""
    every = np.arange(n + 1, dtype=np.int32)
    return np.zeros(n, np.int32), every, every[::group_size]


def write_split(folder, arrays, vocab_size, table_rows, total_puzzles=None, **more_fields):
    """Write dataset.json and the arrays of one split.

    arrays: {NAME: array} for every all__NAME.npy; None for a file that exists already.
    table_rows: of the puzzle table. more_fields: of dataset.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if array is not None:
            is_float = array.dtype.kind == "f"
            np.save(folder / f"all__{name}.npy", array.astype(np.float32) if is_float else array)
    n_examples, seq_len = np.load(folder / "all__inputs.npy", mmap_mode="r").shape[:2]
    n_puzzles = len(arrays["puzzle_identifiers"])
    content = {
        "pad_id": 0,
        "ignore_label_id": 0,
        "blank_identifier_id": 0,
        "vocab_size": vocab_size,
        "seq_len": seq_len,
        "num_puzzle_identifiers": table_rows,
        "total_groups": len(arrays["group_indices"]) - 1,
        "mean_puzzle_examples": n_examples / n_puzzles,
        "total_puzzles": total_puzzles or n_puzzles,
        "sets": ["all"],
    }
    write_json(folder / "dataset.json", content | more_fields)


def write_boards(folder, splits, vocab_size, group_size=1):
    """Write both splits, whose examples are puzzles of their own; see write_dataset for the arguments."""
    names = ["inputs", "labels"]
    more_fields = {}
    if not vocab_size:
        names = ["inputs", "targets", "target_mask"]
        inputs, targets, _ = splits["train"]
        more_fields = {
            "task_type": "regression",
            "input_dim": inputs.shape[-1],
            "target_dim": targets.shape[-1],
            "input_pad_value": 0.0,
            "target_pad_value": 0.0,
        }
    for split, arrays in splits.items():
        n = len(arrays[0])
        size = group_size if split == "train" else 1
        require(n % size == 0, f"{n} {split} examples do not make groups of {size}; change group_size")
        named = dict(zip(names, arrays)) | dict(zip(INDEX_FILES, singleton_index(n, size)))
        write_split(folder / split, named, vocab_size, 1, n // size, **more_fields)
        print(f"{split}: {n:,} boards in {n // size:,} groups")
    write_json(folder / "identifiers.json", ["<blank>"])


def write_dataset(
    output_dir,
    splits,
    vocab_size=0,
    recipe=None,
    group_size=1,
    augment=None,
    num_aug=0,
    seed=0,
    overwrite=False,
):
    """Write a dataset whose examples are puzzles of their own, with the blank identifier.

    splits: {"train": (inputs, labels), "test": (inputs, labels)}, each (N, S), tokens 1 .. vocab_size - 1.
        Token 0 is padding; a label of 0 is neither trained on nor scored.
        For regression, vocab_size is 0: inputs (N, S, input_dim), targets (N, S, target_dim), mask (N, S).
    recipe: dict for recipe.json. A dataset with an equal recipe is replaced, any other only with `overwrite`.
    group_size: number of consecutive training examples that are augmentations of one original.
    augment: augment(rng, *training arrays) returns augmented arrays. It is called num_aug times with a numpy
        Generator; an original and its copies become one group. seed: of this Generator.
    Raises UserError if the arrays do not fit together or output_dir cannot be written.
    """
    with building(output_dir, recipe, overwrite) as folder:
        if num_aug:
            rng = np.random.default_rng(seed)
            group_size = 1 + num_aug
            versions = [splits["train"]]
            for _ in range(num_aug):
                versions.append(augment(rng, *splits["train"]))
            stacked = [np.stack(same, axis=1) for same in zip(*versions)]  # (N, 1 + num_aug, S, ...)
            train = [array.reshape(-1, *array.shape[2:]) for array in stacked]
            splits = {**splits, "train": train}
        write_boards(folder, splits, vocab_size, group_size)


# ---------------------------------------------------------------------------------------------
# python -m prepare


def flags():
    parser = Parser(__doc__, usage="python -m prepare NAME ... [--source DIR]")
    parser.add_argument("names", nargs="+", choices=KNOWN, metavar="NAME", help=", ".join(KNOWN))
    parser.add_argument("--source", metavar="DIR", help="folder that replaces the --source of the builders")
    return parser


def main(argv=None):
    """Build the named datasets that do not exist yet."""
    args = flags().parse_args(argv)
    for name in args.names:
        folder = KNOWN[name].folder
        build_if_missing(folder, source=args.source)
        print(f"dataset {name} is in {folder}")
