"""Datasets on disk: writing them (all of prepare/ uses this) and turning them into batches.

    DIR/identifiers.json                     names of the rows of the puzzle table; row 0 is blank
    DIR/recipe.json                          how it was built (ours; evaluation compares it)
    DIR/{train,test}/dataset.json            vocabulary, sequence length, counts
    DIR/{train,test}/all__inputs.npy         (N, S) tokens, all__labels.npy likewise
    DIR/{train,test}/all__puzzle_indices.npy examples of puzzle p: [p] .. [p + 1]
    DIR/{train,test}/all__group_indices.npy  puzzles of group g: [g] .. [g + 1]
    DIR/{train,test}/all__puzzle_identifiers.npy  the row of puzzle p in the puzzle table

Numbers in place of tokens (dataset.json: "task_type": "regression", input_dim, target_dim, input_pad_value,
target_pad_value), each .npy or .npz; without the last three files above all examples are alone and blank:

    DIR/{train,test}/all__inputs.npy         (N, S, input_dim) float32, all__targets.npy (N, S, target_dim)
    DIR/{train,test}/all__target_mask.npy    (N, S) bool, true where a target is trained on and scored

Next-latent prediction has episodes and no dataset.json:

    DIR/{train,test}/latents/episode_XXX.npz    `latents` (T, dim)
    DIR/{train,test}/metadata/episode_XXX.json  set, group, puzzle_identifier; all optional

Nothing here reads command lines, the environment, the device or the rank: they are passed in.
"""
import argparse
import filecmp
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np


class UserError(Exception):
    """Something the user can mend: one line with the value, the limit and the cure."""


def cli(main):
    """Run main() as a script: a UserError or a failing disk is one line on stderr and exit code 2."""
    try:
        sys.exit(main())
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:
        print(f"error: {e.strerror or e}: {e.filename or ''}".rstrip(": "), file=sys.stderr)
    sys.exit(2)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """--help on one screen of 80 columns: every flag with its default, two to a line where they fit."""

    def add_usage(self, usage, actions, groups, prefix=None):
        self._add_item(lambda: f"usage: {self._prog} [flags, shown with their defaults]\n", [])

    def add_arguments(self, actions):
        entries = [self.entry(a) for a in actions if a.dest != "help"]
        short = [e for e in entries if len(e) <= 38]
        lines = [f"  {a:<39}{b}".rstrip() for a, b in zip(short[::2], [*short[1::2], ""])]
        lines += [f"  {e}" for e in entries if len(e) > 38]
        self._add_item(lambda: "\n".join(lines) + "\n", []) if lines else None

    def entry(self, action):
        name = action.option_strings[0] if action.option_strings else action.dest
        if isinstance(action, argparse.BooleanOptionalAction):
            name = name.replace("--", "--no-" if action.default else "--", 1)
            return f"{name}  {action.help}"
        if action.nargs == 0:
            return f"{name}  {action.help}"
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else None)
        if action.choices and action.default in action.choices:
            others = [str(c) for c in action.choices if c != action.default]
            value = "|".join([str(action.default), *others])
        elif action.default is not None:
            value = f"{action.default:g}" if isinstance(action.default, float) else action.default
        elif value is None:
            value = "N"
        return f"{name} {value}  {action.help}"


def sha256(path):
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# The eight symmetries of the square (ARC and maze boards)

DIHEDRAL_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)


def dihedral(array, t):
    """Transform t in 0..7 of the last two axes: identity, counter-clockwise turns by 90, 180 and 270 degrees,
    left-right flip, up-down flip, transpose, left-right flip of the first turn. Undone by DIHEDRAL_INVERSE[t]."""
    if t < 4:
        return np.rot90(array, t, axes=(-2, -1))
    if t == 6:
        return array.swapaxes(-2, -1)
    return np.flip(np.rot90(array, axes=(-2, -1)) if t == 7 else array, axis=-2 if t == 5 else -1)


# ---------------------------------------------------------------------------------------------
# Writing

@contextmanager
def building(output_dir):
    """Yield a temporary folder beside `output_dir` that takes its name when the block ends well.

    A build that is interrupted or fails leaves nothing; an existing dataset is replaced only by a
    finished one. Prints the bytes and the sha256 of every file, and writes them to recipe.json.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not (output_dir.is_dir() and ((output_dir / "identifiers.json").exists()
                                                             or not any(output_dir.iterdir()))):
        raise UserError(f"--output-dir {output_dir} is there and is no dataset, so it is not replaced; name another")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    tmp.chmod(0o755)
    try:
        yield tmp
        files = [p for p in sorted(tmp.rglob("*")) if p.is_file() and p.name != "recipe.json"]
        for p in files:
            print(f"{sha256(p)}  {p.stat().st_size:>13,} bytes  {output_dir / p.relative_to(tmp)}")
        if output_dir.exists():
            shutil.rmtree(output_dir)
        os.replace(tmp, output_dir)
    except BaseException as e:
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(e, OSError):
            raise UserError(f"{output_dir} could not be written ({e.strerror or e}); free some space there or "
                            f"choose another --output-dir; nothing is left of it") from e
        raise


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        json.dump(value, f)


def save_npy(path, array, dtype=None):
    """numpy.save, byte for byte, cast to `dtype` in pieces; a full disk raises its OSError (numpy's says only how
    many items are missing)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(dtype or array.dtype)
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": dtype.str, "fortran_order": False, "shape": array.shape})
        for i in range(0, len(array), 1 << 16):
            f.write(np.ascontiguousarray(array[i:i + (1 << 16)], dtype))


def write_split(split_dir, arrays, vocab_size, num_identifiers, total_puzzles=None, **extra):
    """Write one split: `arrays` maps inputs, labels, puzzle_identifiers, puzzle_indices and
    group_indices to arrays; None stands for one that is already written. extra: more for dataset.json."""
    split_dir = Path(split_dir)
    split_dir.mkdir(parents=True, exist_ok=True)
    for name, a in arrays.items():
        if a is not None:
            save_npy(split_dir / f"all__{name}.npy", a)
    shape = {name: np.load(split_dir / f"all__{name}.npy", mmap_mode="r").shape for name in arrays}
    n_puzzles = shape["puzzle_indices"][0] - 1
    total_puzzles = n_puzzles if total_puzzles is None else total_puzzles
    write_json(split_dir / "dataset.json", {
        "pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": vocab_size,
        "seq_len": shape["inputs"][1], "num_puzzle_identifiers": num_identifiers,
        "total_groups": shape["group_indices"][0] - 1,
        "mean_puzzle_examples": shape["inputs"][0] / n_puzzles if total_puzzles == n_puzzles else 1.0,
        "total_puzzles": total_puzzles, "sets": ["all"], **extra})


def write_dataset(output_dir, splits, vocab_size=0, recipe=None, group_size=1, train_dtype=None,
                  augment=None, num_aug=0, seed=0):
    """Write a dataset of independent boards (one puzzle each, all with the blank identifier).

    splits: {"train": (inputs, labels), "test": (inputs, labels)}, each (N, S) of tokens
        1 .. vocab_size - 1; 0 is padding, and a label of 0 is not trained on or scored.
        With vocab_size 0, numbers: (inputs (N, S, input_dim), targets (N, S, target_dim), mask (N, S) bool).
    recipe: a dict that says how it was made (builder, arguments, seed).
    group_size: how many consecutive training boards are augmentations of one original; an epoch
        draws one board of every group.
    train_dtype: of the training boards on disk, their own by default.
    augment: augment(rng, *training arrays) returns the arrays of changed copies; called num_aug times with a
        numpy Generator of `seed`, and original and copies of a board become one group.
    Raises UserError when a token lies outside the vocabulary, a number is not finite or a shape does not fit.
    """
    if num_aug:
        rng, train = np.random.default_rng(seed), splits["train"]
        versions = zip(train, *(augment(rng, *train) for _ in range(num_aug)))
        splits = {**splits, "train": [np.stack(v, axis=1).reshape(-1, *v[0].shape[1:]) for v in versions]}
        group_size = 1 + num_aug
    kind, (first, second, *_) = Tokens if vocab_size else Numbers, splits["train"]
    sizes = {} if vocab_size else dict(task_type="regression", input_dim=first.shape[-1], target_dim=second.shape[-1],
                                       input_pad_value=0.0, target_pad_value=0.0)
    for split, arrays in splits.items():
        meta = dict(seq_len=first.shape[1], vocab_size=vocab_size, pad_id=0, ignore_label_id=0, **sizes)
        kind(split, meta, *arrays).check()
    with building(output_dir) as tmp:
        for split, arrays in splits.items():
            n = len(arrays[0])
            group = group_size if split == "train" else 1
            for name, a in zip(kind.fields, arrays):
                dtype = np.float32 if a.dtype.kind == "f" else train_dtype if split == "train" else None
                save_npy(tmp / split / f"all__{name}.npy", a, dtype)
            write_split(tmp / split, {
                **dict.fromkeys(kind.fields),
                "group_indices": np.arange(0, n + 1, group, dtype=np.int32),
                "puzzle_indices": np.arange(n + 1, dtype=np.int32),
                "puzzle_identifiers": np.zeros(n, dtype=np.int32),
            }, vocab_size, num_identifiers=1, total_puzzles=n // group, **sizes)
            print(f"{split}: {n:,} boards in {n // group:,} groups")
        write_json(tmp / "identifiers.json", ["<blank>"])
        write_json(tmp / "recipe.json", recipe)


# ---------------------------------------------------------------------------------------------
# Reading

# What folders that are joined must have in common.
EQUAL = ("vocab_size", "seq_len", "pad_id", "ignore_label_id", "input_dim", "target_dim", "input_pad_value")
INDEX = ("puzzle_identifiers", "puzzle_indices", "group_indices")


def read_json(path, cure):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} not found; {cure}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); {cure}") from None


def read_shape(f):
    """What the header of an open .npy file says, without its data."""
    old = np.lib.format.read_magic(f) == (1, 0)
    return (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(f)[0]


def read_npz(path, field, read=np.lib.format.read_array):
    """What `read` makes of the array named `field` in an .npz, or of its only one when that has no name."""
    try:
        with zipfile.ZipFile(path) as z:
            names = [name.removesuffix(".npy") for name in z.namelist()]
            if field not in names and names != ["arr_0"]:
                raise UserError(f"{path} holds {', '.join(names) or 'nothing'}; it needs an array named {field}, or a "
                                f"single unnamed one")
            with z.open(f"{field if field in names else 'arr_0'}.npy") as f:
                return read(f)
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as e:
        raise UserError(f"{path} is damaged or no .npz file ({e}); write it again") from None


def read_array(split_dir, name):
    """all__NAME.npy, memory-mapped, or else what all__NAME.npz holds."""
    path = Path(split_dir) / f"all__{name}.npy"
    if path.with_suffix(".npz").exists() and not path.exists():
        return read_npz(path.with_suffix(".npz"), name)
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path} not found; build the dataset again") from None
    except (ValueError, EOFError, OSError) as e:
        raise UserError(f"{path} is truncated or no .npy file ({e}); build the dataset again") from None


def must_be(where, name, a, kinds, shape):
    """Refuse an array of another dtype.kind or shape."""
    if a.dtype.kind not in kinds or a.shape != shape or not len(a):
        kind = {"f": "float32", "b": "bool"}.get(kinds, "integers")
        raise UserError(f"{where}/all__{name} is {a.dtype} {a.shape}, not {kind} {shape if len(a) else 'with rows'}; "
                        f"build the dataset again")


class Tokens:
    """Examples whose inputs and labels are tokens, as they lie on disk. where: their name in messages."""
    fields, needs = ("inputs", "labels"), {"seq_len", "vocab_size", "pad_id", "ignore_label_id"}

    def __init__(self, where, meta, inputs, labels):
        for name, a in (("inputs", inputs), ("labels", labels)):
            must_be(where, name, a, "iu", (len(inputs), meta["seq_len"]))
        self.where, self.inputs, self.labels, self.meta = where, inputs, labels, meta
        self.vocab_size, self.ignore, self.pads = meta["vocab_size"], meta["ignore_label_id"], (meta["pad_id"], -100)

    def __len__(self):
        return len(self.inputs)

    def gather(self, examples):
        """Examples (B,) to inputs and labels, (B, S) int32 each; an ignored label is -100."""
        labels = self.labels[examples].astype(np.int32)
        if self.ignore is not None:
            labels[labels == self.ignore] = -100
        return self.inputs[examples].astype(np.int32), labels

    def check(self, chunk=1 << 20):
        """Every token lies in the vocabulary, and something is asked. Reads the whole split; returns what was found."""
        for kind, a in (("inputs", self.inputs), ("labels", self.labels)):
            low = min(int(a[i:i + chunk].min()) for i in range(0, len(a), chunk))
            high = max(int(a[i:i + chunk].max()) for i in range(0, len(a), chunk))
            if low < 0 or high >= self.vocab_size:
                raise UserError(f"{self.where} {kind}: tokens {low}..{high}, but vocab_size is {self.vocab_size}; "
                                f"raise vocab_size or map them")
        if high == 0 and self.ignore == 0:
            raise UserError(f"{self.where} labels: all are ignored (ignore_label_id 0); build the dataset again")
        return f"{self.where}: {len(self):,} examples, tokens inside 0..{self.vocab_size - 1}"


NO_TOKENS = {"vocab_size": 0, "pad_id": None, "ignore_label_id": None}


class Numbers:
    """Examples of regression, as they lie on disk."""
    fields, needs = ("inputs", "targets", "target_mask"), {"seq_len", "input_dim", "target_dim"}

    def __init__(self, where, meta, *arrays):
        for name, a, kind, width in zip(self.fields, arrays, "ffb", ([meta["input_dim"]], [meta["target_dim"]], [])):
            must_be(where, name, a, kind, (len(arrays[0]), meta["seq_len"], *width))
        self.where, self.arrays, self.meta = where, arrays, {"input_pad_value": 0.0, **meta, **NO_TOKENS}
        self.pads = self.meta["input_pad_value"], np.nan

    def __len__(self):
        return len(self.arrays[0])

    def read(self, examples):
        return [a[examples] for a in self.arrays]

    def gather(self, examples):
        """Examples (B,) to float32 inputs (B, S, input_dim) and labels (B, S, target_dim), NaN outside of the mask."""
        inputs, targets, mask = self.read(examples)
        labels = np.where(mask[..., None], targets, np.nan)
        return inputs.astype(np.float32, copy=False), labels.astype(np.float32, copy=False)

    def check(self):
        """All is finite, and something is asked. Reads the whole split in parts of some MB; returns what was found."""
        cells, asked = 0, 0
        step = max(1, (1 << 20) // self.read(np.arange(1))[0].size)
        for i in range(0, len(self), step):
            inputs, targets, mask = self.read(np.arange(i, min(i + step, len(self))))
            for name, fine in (("inputs", np.isfinite(inputs)), ("targets", np.isfinite(targets) | ~mask[..., None])):
                if not fine.all():
                    raise UserError(f"{self.where} {name}: NaN or infinity in example {i + fine.all((1, 2)).argmin()}; "
                                    f"build the dataset again")
            cells, asked = cells + mask.size, asked + int(mask.sum())
        if not asked:
            raise UserError(f"{self.where} target_mask: all are false, nothing is asked; build the dataset again")
        return (f"{self.where}: {len(self):,} examples, {inputs.shape[1]} x {inputs.shape[2]} finite float32 to "
                f"{targets.shape[1]} x {targets.shape[2]}, {asked:,} of {cells:,} cells asked")


Episode = namedtuple("Episode", "file split length dim group identifier")  # a file of latents; group: hashable


def find_episodes(folder):
    """The Episodes of a dataset folder, train then test, by number. Opens one file at a time, reads headers only."""
    files = [(f, split) for split in ("train", "test") if not (folder / split / "dataset.json").exists()
             for f in sorted((folder / split / "latents").glob("episode_*.npz"), key=lambda f: (len(f.name), f.name))]
    found, about = [], [folder / split / "metadata" / f"{f.stem}.json" for f, split in files]
    about = [read_json(m, "") if m.exists() else {} for m in about]
    given = {m.get("puzzle_identifier") for m in about}
    unused = (i for i in count(1) if i not in given)
    for (f, split), m in zip(files, about):
        identifier = m["puzzle_identifier"] if m.get("puzzle_identifier") is not None else next(unused)
        if type(identifier) is not int or identifier < 0:
            raise UserError(f"the metadata of {f} have puzzle_identifier {identifier!r}; give 0, 1, 2 ... or none")
        shape = read_npz(f, "latents", read_shape)
        dim = found[0].dim if found else shape[-1]
        if len(shape) != 2 or shape[0] < 2 or shape[1] != dim:
            raise UserError(f"{f} has latents of shape {shape}, not (2 or more, {dim}) as the first; leave it out or "
                            f"write it again")
        found.append(Episode(f, split, shape[0], dim, (m.get("set"), m["group"]) if "group" in m else (f,), identifier))
    return found


def starts(*sizes):
    """(n + 1,) int64: where each of n consecutive pieces begins, and the end. sizes: arrays that are joined."""
    return np.concatenate(([0], np.cumsum(np.concatenate(sizes), dtype=np.int64)))


class Episodes(Numbers):
    """Next-latent prediction on windows of seq_len latents, from files that are opened when they are asked for."""

    def __init__(self, where, seq_len, episodes):
        if not episodes:
            raise UserError(f"{where}/latents has no episode_XXX.npz; put some there, or name another folder")
        groups = {}
        for e in episodes:
            groups.setdefault(e.group, []).append(e)
        self.episodes = [e for group in groups.values() for e in group]
        dim = episodes[0].dim
        self.where, self.pads, self.shape, self.held = where, (0.0, np.nan), (seq_len, dim), (None, None)
        self.meta = dict(seq_len=seq_len, input_dim=dim, target_dim=dim, input_pad_value=0.0, **NO_TOKENS)
        self.starts = starts([-(-(e.length - 1) // seq_len) for e in self.episodes])
        ids, sizes = np.array([e.identifier for e in self.episodes]), [len(group) for group in groups.values()]
        self.index = ids, self.starts, starts(sizes)

    def __len__(self):
        return int(self.starts[-1])

    def latents(self, number):
        """(T, dim) of one episode; the last one is held, as the windows of an episode mostly come together."""
        if self.held[0] != number:
            file = self.episodes[number].file
            latents = read_npz(file, "latents").astype(np.float32)
            if not np.isfinite(latents).all():
                raise UserError(f"{file} has NaN or infinite latents; leave it out or write it again")
            self.held = number, latents
        return self.held[1]

    def read(self, examples):
        inputs = np.zeros((len(examples), *self.shape), np.float32)
        targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape[:2], bool)
        for row, example in enumerate(examples):
            number = np.searchsorted(self.starts, example, side="right") - 1
            start = (example - self.starts[number]) * self.shape[0]
            window = self.latents(number)[start:start + self.shape[0] + 1]
            n = len(window) - 1
            inputs[row, :n], targets[row, :n], mask[row, :n] = window[:-1], window[1:], True
        return inputs, targets, mask


def table_names(folder, episodes):
    """identifiers.json of a folder: names of its rows of the puzzle table. Numbers where regression has none."""
    if not folder.exists():
        builder = next((b for b in ("sudoku", "maze", "arc") if b in folder.name), "sudoku|maze|arc")
        raise UserError(f"{folder} not found; build it: python prepare/{builder}.py")
    path, metas = folder / "identifiers.json", [read_json(f, "") for f in folder.glob("*/dataset.json")]
    if path.exists() or not all(m.get("task_type") == "regression" for m in metas):
        return read_json(path, "build the dataset again")
    rows = max([1] + [e.identifier + 1 for e in episodes] + [m.get("num_puzzle_identifiers", 1) for m in metas])
    return ["<blank>", *map(str, range(1, rows))]


def place(folders, folder):
    """Where among `folders` this one or one with the very same identifiers.json stands; else it is put at the end."""
    for other in sorted(folders, key=lambda f: f != folder):
        files = [d / "identifiers.json" for d in (other, folder)]
        if other == folder or all(f.exists() for f in files) and filecmp.cmp(*files, shallow=False):
            return folders.index(other)
    folders.append(folder)
    return len(folders) - 1


class Split:
    """One split (train or test) of one or several dataset folders, joined.

    data: folders that are trained on; data_test: those of the test split, when they are others. Both splits of a run
        take the same, and so agree on the puzzle table: the identifiers of every folder are shifted past those before
        it, and blank stays 0. A folder that is only tested on has rows of its own at the end, which no training
        reaches, or shares those of a folder with the same identifiers.json.
    seq_len: windows of this length of latent episodes; by default the longest of all decides.
    meta: as in dataset.json, of the join. names: the identifiers, in table order. Raises UserError for a
    missing, truncated or contradictory file, and for folders that differ in what must be equal.
    """

    def __init__(self, data, split, data_test=None, seq_len=None):
        data, tested = ([Path(d) for d in ([x] if isinstance(x, (str, Path)) else x)]
                        for x in (data, data_test or data))
        folders, places = list(data), range(len(data))
        tested_places = places if tested == data else [place(folders, d) for d in tested]
        self.name, self.dirs, places = (split, data, places) if split == "train" else (split, tested, tested_places)
        episodes = {d: find_episodes(d) for d in {*folders, *tested}}
        seq_len = seq_len or max((e.length - 1 for found in episodes.values() for e in found), default=None)
        names = {d: table_names(d, episodes[d]) for d in episodes}
        self.names = ["<blank>"] + [name for d in folders for name in names[d][1:]]
        shift = starts([len(names[d]) - 1 for d in folders])
        self.sources = [self.open(d / split, episodes[d], len(names[d]), seq_len) for d in self.dirs]
        self.meta = dict(self.sources[0].meta)
        for source in self.sources:
            self.must_agree(source.meta, source.where)
        ids, puzzles, groups = zip(*(s.index for s in self.sources))
        shifted = [np.where(own == 0, 0, own + shift[i]) for own, i in zip(ids, places)]
        self.puzzle_identifiers = np.concatenate(shifted).astype(np.int32)
        self.puzzle_indices, self.group_indices = (starts(*map(np.diff, a)) for a in (puzzles, groups))
        self.offsets = starts([len(s) for s in self.sources])
        self.meta |= {"num_puzzle_identifiers": len(self.names), "total_groups": len(self.group_indices) - 1,
                      "mean_puzzle_examples": len(self) / (len(self.puzzle_indices) - 1)}

    def open(self, split_dir, episodes, rows, seq_len):
        """The source of examples of one split folder, with its meta and index. rows: identifiers of the folder."""
        path = split_dir / "dataset.json"
        if (split_dir / "latents").is_dir() and not path.exists():
            return Episodes(split_dir, seq_len, [e for e in episodes if e.split == self.name])
        meta = read_json(path, "build the dataset again")
        kind = Numbers if meta.get("task_type") == "regression" else Tokens
        if kind.needs - meta.keys():
            raise UserError(f"{path} lacks {', '.join(sorted(kind.needs - meta.keys()))}; build the dataset again")
        source = kind(split_dir, meta, *(read_array(split_dir, name) for name in kind.fields))
        n, there = len(source), any(f for name in INDEX for f in split_dir.glob(f"all__{name}.np?"))
        if kind is Numbers and not there:
            source.index = np.zeros(n, np.int32), np.arange(n + 1), np.arange(n + 1)
        else:
            source.index = [read_array(split_dir, name) for name in INDEX]
            self.check_index(split_dir, n, rows, *source.index)
        return source

    def must_agree(self, meta, where):
        for key in EQUAL:
            if meta.get(key) != self.meta.get(key):
                raise UserError(f"{where} has {key} {meta.get(key)}, {self.sources[0].where} has {self.meta.get(key)}; "
                                f"datasets go together only where these are equal")

    def check_index(self, split_dir, n, rows, ids, puzzles, groups):
        for name, a, end in (("puzzle_indices", puzzles, n), ("group_indices", groups, len(ids))):
            if len(a) < 2 or a[0] != 0 or a[-1] != end or (np.diff(a) < 0).any():
                raise UserError(f"{split_dir}/all__{name}.npy does not rise from 0 to {end}; build the dataset again")
        if len(puzzles) != len(ids) + 1 or ids.min() < 0 or ids.max() >= rows:
            raise UserError(f"{split_dir}/all__puzzle_identifiers.npy: {len(ids)} identifiers up to {ids.max()} for "
                            f"{len(puzzles) - 1} puzzles and {rows} names in identifiers.json; build the dataset again")

    def __len__(self):
        return int(self.offsets[-1])

    @property
    def identity(self):
        """sha256 of identifiers.json as it would stand for the joined folders: equal when every row of the puzzle
        table means the same puzzle."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    @property
    def recipe(self):
        files = [d / "recipe.json" for d in self.dirs]
        return [json.loads(f.read_text()) if f.exists() else None for f in files]

    def puzzle_of(self, examples):
        """Puzzle number (not identifier) of every example, (B,)."""
        return np.searchsorted(self.puzzle_indices, examples, side="right") - 1

    def gather(self, examples, puzzles=None, size=None):
        """Arrays (inputs, labels, puzzle_ids) of the given examples (B,). Padded to `size` rows when fewer, with
        pad_id, -100 (in regression input_pad_value, NaN) and the blank identifier."""
        puzzles = self.puzzle_of(examples) if puzzles is None else puzzles
        if len(self.sources) == 1:
            inputs, labels = self.sources[0].gather(examples)
        else:
            source = np.searchsorted(self.offsets, examples, side="right") - 1
            parts = [s.gather(examples[source == i] - self.offsets[i]) for i, s in enumerate(self.sources)]
            back = np.argsort(np.argsort(source, kind="stable"), kind="stable")
            inputs, labels = (np.concatenate(p)[back] for p in zip(*parts))
        arrays = inputs, labels, self.puzzle_identifiers[puzzles]
        if size is None or size <= len(examples):
            return arrays
        pads = *self.sources[0].pads, 0
        return tuple(np.concatenate((a, np.full((size - len(a), *a.shape[1:]), pad, a.dtype)))
                     for a, pad in zip(arrays, pads))

    def check(self):
        """Sanity check of the whole split: returns a line per folder saying what was checked."""
        return [s.check() for s in self.sources]


class Cursor(NamedTuple):
    """Where a run stands in the order of its training examples. rng is the Philox state, None at a start."""
    iteration: int = 1      # counts the rounds of eval_interval epochs, from 1
    position: int = 0       # groups of this round that were used
    rng: dict | None = None


def training_order(split, seed, epochs_per_iteration, batch_size, cursor=Cursor()):
    """Yield (examples (G,), puzzles (G,), cursor after them) of one iteration, from `cursor` on; the last cursor is
    the beginning of the next iteration.

    Philox seeded with seed + iteration draws a permutation of the groups per epoch; going through them, a puzzle
    of the group and then, without replacement, as many of its examples as there is room for. An incomplete last
    batch is dropped. The same on every rank; a rank takes its slice.
    """
    rng = np.random.Generator(np.random.Philox(seed + cursor.iteration))
    n_groups = len(split.group_indices) - 1
    order = np.concatenate([rng.permutation(n_groups) for _ in range(epochs_per_iteration)])
    if cursor.rng is not None:
        rng.bit_generator.state = cursor.rng
    first_puzzle, first_example, position = split.group_indices, split.puzzle_indices, cursor.position
    alone = (np.diff(first_example) == 1).all()
    ready = None   # one batch is held back, for the last one to point at the next iteration
    while True:
        examples, puzzles, room = [], [], batch_size
        if alone:   # one example to every puzzle: the same draws at once
            groups = order[position:position + batch_size]
            puzzles = rng.integers(first_puzzle[groups], first_puzzle[groups + 1])
            examples, position, room = [first_example[puzzles]], position + len(groups), batch_size - len(groups)
        while room and position < len(order):
            group = order[position]
            puzzle = rng.integers(first_puzzle[group], first_puzzle[group + 1])
            start, size = first_example[puzzle], int(first_example[puzzle + 1] - first_example[puzzle])
            take = min(size, room)
            examples.append([start] if size == 1 else start + rng.choice(size, take, replace=False))
            puzzles.extend([puzzle] * take)
            position, room = position + 1, room - take
        if ready is not None:
            yield *ready[:2], Cursor(cursor.iteration + 1) if room else ready[2]
        if room:
            return
        ready = np.concatenate(examples), np.array(puzzles), Cursor(cursor.iteration, position, rng.bit_generator.state)


def exploration(seed, step, batch_size, probability, halt_max_steps):
    """Least numbers of supervision steps (G,) int32 that exploration demands at one training step; 0: none.

    A function of (seed, step) alone: the same for every number of ranks, and nothing to store for a resume."""
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    explores, steps = rng.random(batch_size) < probability, rng.integers(2, halt_max_steps + 1, batch_size)
    return np.where(explores, steps, 0).astype(np.int32)


def prefetch(batches, depth=2):
    """Run an iterator in a thread, `depth` items ahead; an exception in it is raised here."""
    batches, done = iter(batches), object()
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, batches, done) for _ in range(depth))
        while (item := ahead.popleft().result()) is not done:
            ahead.append(pool.submit(next, batches, done))
            yield item
