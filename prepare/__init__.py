"""The known datasets, one row each; those that are absent are built.

    python -m prepare sudoku maze              # each from its place on the net
    python -m prepare mini-arc --source DIR    # from a folder that you have

The builders are prepare/sudoku.py, maze.py and arc.py, each a script of its
own; boards.py is what the first two share.
"""
import importlib
import os
import shlex
from pathlib import Path
from typing import NamedTuple

from common import Parser, UserError

ARC2 = ("--subsets", "training2", "evaluation2", "concept", "--test-set-name", "evaluation2")
MINI_ARC = ("--test-set-name", "training", "--max-side", "6", "--num-aug", "24")    # 46 tasks to solve


class Dataset(NamedTuple):
    """A dataset that a preset trains on, or that published weights are for."""
    folder: str
    builder: str            # prepare/BUILDER.py
    flags: tuple            # of the builder, but for --output-dir
    shape: dict             # what dataset.json will say, for estimates and benchmarks without the data

    @property
    def generated(self):
        """Needs no network, so that whoever lacks it may build it unasked."""
        return "generate" in self.flags


def shape(vocab_size, seq_len, rows=1, groups=1000, examples=1.0):
    """rows: of the puzzle table, with the blank one. examples: mean number of a puzzle, in training."""
    return dict(vocab_size=vocab_size, seq_len=seq_len, num_puzzle_identifiers=rows, total_groups=groups,
                mean_puzzle_examples=examples)


MINI_ARC_SHAPE = shape(12, 900, 1_626, 65, 4.2769)      # of both halves, which differ in the test split alone

KNOWN = {
    "mini": Dataset("data/sudoku-6x6-mini", "sudoku",
                    ("--source", "generate", "--size", "6", "--num-aug", "1000"), shape(8, 36)),
    "sudoku": Dataset("data/sudoku-extreme-1k-aug-1000", "sudoku",
                      ("--subsample-size", "1000", "--num-aug", "1000"), shape(11, 81)),
    "maze": Dataset("data/maze-30x30-hard-1k", "maze", (), shape(6, 900)),
    "arc1": Dataset("data/arc1concept-aug-1000", "arc", (), shape(12, 900, 876_406, 960, 4.1458)),
    "arc2": Dataset("data/arc2concept-aug-1000", "arc", ARC2, shape(12, 900, 1_191_730, 1280, 4.354)),
    "mini-maze": Dataset("data/maze-9x9-mini", "maze",
                         ("--source", "generate", "--size", "9", "--loops", "0", "--num-train", "20000"),
                         shape(6, 81, groups=20_000)),
    "mini-arc": Dataset("data/arc-6x6-mini", "arc", (*MINI_ARC, "--half", "report"), MINI_ARC_SHAPE),
    "mini-arc-tune": Dataset("data/arc-6x6-mini-tune", "arc", (*MINI_ARC, "--half", "tune"), MINI_ARC_SHAPE),
}


def known(folder):
    """The Dataset that lies in a folder of this name, wherever it is, or None."""
    return next((d for d in KNOWN.values() if Path(d.folder).name == Path(folder).name), None)


def command(builder, flags, folder):
    """The whole command that builds `folder`, to paste in the present working directory."""
    script = Path(__file__).resolve().with_name(f"{builder}.py")
    script = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return shlex.join(["python", str(script), *flags, "--output-dir", str(folder)])


def recipe_flags(recipe):
    """(builder, flags) that recipe.json of a dataset of ours stands for, or None."""
    builder = board_kind([recipe])
    if builder is None or builder != "arc" and "name" not in recipe:
        return None     # of others, or of November 2025 and before: its source is not what was typed
    parser, flags = importlib.import_module(f"prepare.{builder}").flags(), []
    for name, default in vars(parser.parse_args([])).items():
        value = recipe.get(name, default)
        if value != default:
            words = value if isinstance(value, list) else [] if value is True else [value]
            flags += [f"--{name.replace('_', '-')}", *map(str, words)]
    return builder, flags


def must_exist(folders, recipes=None):
    """Refuse a dataset that is not there, with the command that builds it.

    recipes: {folder: recipe.json} of datasets that a checkpoint remembers. Raises UserError."""
    for folder in map(str, folders):
        if Path(folder).exists():
            continue
        dataset, recipe = known(folder), (recipes or {}).get(folder)
        # what the checkpoint remembers is surer than a name
        how = recipe_flags(recipe) or dataset and (dataset.builder, dataset.flags)
        raise UserError(f"{folder} not found; " + (
            f"build it: {command(*how, folder)}" if how else
            "name another folder with --data, or build it: prepare/{sudoku,maze,arc}.py --help say how"))


def ensure(folder, world=None, source=None):
    """Build a known dataset that is absent; of several processes rank 0 does it. source: where its builder
    reads, in place of its own. Raises UserError."""
    dataset = known(folder)
    if (world is None or world.rank == 0) and not os.path.exists(folder):
        flags = [*dataset.flags, *(["--source", source] if source else [])]     # the last one wins
        print(f"+ {command(dataset.builder, flags, folder)}", flush=True)
        builder = importlib.import_module(f"prepare.{dataset.builder}")
        builder.main([*flags, "--output-dir", str(folder)])
    if world is not None:
        world.gather_objects(None)      # the others wait here


def board_kind(recipes):
    """"sudoku", "maze", "arc" or None: what the boards of datasets are, by the builder in their recipes."""
    builders = {recipe.get("builder") if isinstance(recipe, dict) else None for recipe in recipes}
    builder = builders.pop() if len(builders) == 1 else None
    return builder if builder in ("sudoku", "maze", "arc") else None


def flags():
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"any of {', '.join(KNOWN)}")
    parser.add_argument("--source", help="given to the builders, each of which says what that may be")
    return parser


def main(argv=None):
    """Build what is absent of the named datasets."""
    args = flags().parse_args(argv)
    for name in args.names:
        if name not in KNOWN:
            raise UserError(f"unknown dataset {name!r}; one of: {' '.join(KNOWN)}")
    for name in args.names:
        folder = KNOWN[name].folder
        print(f"{folder} is there") if os.path.exists(folder) else ensure(folder, source=args.source)
