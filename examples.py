"""Examples as they lie on disk, one split of one folder: tokens, numbers or latent episodes; see data.py."""
import zipfile
import zlib
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, read_json

AGAIN = "build the dataset again"       # what helps against most of what can be wrong with a file
IGNORED = -100      # a label of a batch that is not asked, whatever number stands on disk
# The files all__NAME.npy: of the examples the type and, of a third axis, the name in dataset.json.
TOKENS = {"inputs": ("integers",), "labels": ("integers",)}
NUMBERS = {"inputs": ("float32", "input_dim"), "targets": ("float32", "target_dim"), "target_mask": ("bool",)}
TYPES = {"integers": "iu", "float32": "f", "bool": "b"}     # the dtype.kind of each
INDEX = "puzzle_identifiers", "puzzle_indices", "group_indices"
NO_TOKENS = {"vocab_size": 0, "pad_id": None, "ignore_label_id": None}      # of regression, whatever it says


def alone(n, group_size=1):
    """The arrays of INDEX for n examples that are puzzles of their own, with the blank identifier."""
    every = np.arange(n + 1, dtype=np.int32)
    return np.zeros(n, np.int32), every, every[::group_size]


def starts(sizes):
    """(n + 1,) int64: where each of n consecutive pieces begins, and the end."""
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def read_npz(path, field, shape_only=False):
    """The array named `field` in an .npz, or its only one when that has no name; or the shape alone."""
    try:
        with zipfile.ZipFile(path) as z:
            name = "arr_0.npy" if z.namelist() == ["arr_0.npy"] else f"{field}.npy"
            with z.open(name) as f:
                if not shape_only:
                    return np.lib.format.read_array(f)
                np.lib.format.read_magic(f)
                return np.lib.format.read_array_header_1_0(f)[0]
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as e:
        raise UserError(f"{path} holds no array named {field}, nor a single unnamed one, that can be read "
                        f"({e}); write it again") from None


def read_array(where, name):
    """all__NAME.npy, memory-mapped, or else what all__NAME.npz holds."""
    path = where / f"all__{name}.npy"
    if path.with_suffix(".npz").exists() and not path.exists():
        return read_npz(path.with_suffix(".npz"), name)
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path} not found; {AGAIN}") from None
    except (ValueError, EOFError, OSError) as e:
        raise UserError(f"{path} is truncated or no .npy file ({e}); {AGAIN}") from None


def check_index(where, n, index, rows):
    """Refuse an index that does not fit `n` examples, or the `rows` names of their folder's puzzle table."""
    ids, puzzles, groups = index
    for name, a, end in (("puzzle_indices", puzzles, n), ("group_indices", groups, ids.size)):
        if a.ndim != 1 or a.size < 2 or a[0] != 0 or a[-1] != end or (a[1:] < a[:-1]).any():
            raise UserError(f"{where}/all__{name}.npy does not rise from 0 to {end}; {AGAIN}")
    if ids.shape != (len(puzzles) - 1,) or ids.min() < 0 or ids.max() >= rows:
        raise UserError(f"{where}/all__puzzle_identifiers.npy: {ids.size} identifiers up to {ids.max()} for "
                        f"{len(puzzles) - 1} puzzles and {rows} names in identifiers.json; {AGAIN}")


class Examples:
    """Tokens, or numbers when vocab_size is 0: arrays (N, S, ...), memory-mapped.

    where: the folder, for messages. meta: as in dataset.json. index: the arrays of INDEX."""

    def __init__(self, where, meta, arrays):
        self.where, self.meta, self.arrays = where, meta, arrays
        self.fields = TOKENS if meta["vocab_size"] else NUMBERS
        n = max((1, *arrays[0].shape[:1]))      # so that an empty split is refused, too
        for array, (name, (kind, *width)) in zip(arrays, self.fields.items()):
            shape = (n, meta["seq_len"], *(meta[key] for key in width))
            if array.dtype.kind not in TYPES[kind] or array.shape != shape:
                raise UserError(f"{where}/all__{name} is {array.dtype} {array.shape}, not {kind} {shape}; "
                                f"{AGAIN}")

    def __len__(self):
        return len(self.arrays[0])

    def read(self, examples):
        """Inputs and answers of examples (B,), and which of the answers are asked."""
        inputs, answers, *mask = (a[examples] for a in self.arrays)
        return inputs, answers, mask[0][..., None] if mask else answers != self.meta["ignore_label_id"]

    def padding(self, n):
        """Inputs and labels of n rows that ask nothing: int32 (n, S), or float32 (n, S, width)."""
        meta, S = self.meta, self.meta["seq_len"]
        if meta["vocab_size"]:
            return np.full((n, S), meta["pad_id"], np.int32), np.full((n, S), IGNORED, np.int32)
        return (np.full((n, S, meta["input_dim"]), meta["input_pad_value"], np.float32),
                np.full((n, S, meta["target_dim"]), np.nan, np.float32))

    def check(self):
        """Tokens fit the vocabulary, numbers are finite, something is asked. Reads the whole split in parts
        of some MB; returns what was found. Raises UserError."""
        V, anything = self.meta["vocab_size"], False
        kind, rule, found = "numbers", "all must be finite", "numbers, all finite"
        if V:
            kind, rule, found = "tokens", f"vocab_size is {V}", f"tokens inside 0..{V - 1}"
        step = 1 + (1 << 20) // self.padding(1)[0].size
        for start in range(0, len(self), step):
            inputs, answers, asked = self.read(slice(start, start + step))
            anything = anything or asked.any()
            answers = answers if V else np.where(asked, answers, 0)
            for name, values in zip(self.fields, (inputs, answers)):
                flat = values.reshape(len(values), -1)
                fit = (flat.min(1) >= 0) & (flat.max(1) < V) if V else np.isfinite(flat).all(1)
                if not fit.all():
                    bad = fit.argmin()
                    raise UserError(f"{self.where} {name}: {kind} {flat[bad].min()}..{flat[bad].max()}, but "
                                    f"{rule}; mend example {start + bad} and those like it")
        # of Kaggle's hidden set the answers are unknown; ARC alone has this file
        hidden = self.where.name == "test" and self.where.with_name("test_puzzles.json").exists()
        if not anything and not hidden:
            last = list(self.fields)[-1]
            raise UserError(f"{self.where} {last}: all are ignored, nothing is asked; {AGAIN}")
        return f"{self.where}: {len(self):,} examples, {found}"


class Episode(NamedTuple):
    """A file of latents."""
    file: Path
    length: int         # of its latents (length, dim)
    dim: int
    group: int          # the same for all of a group
    identifier: int     # row of the puzzle table


def read_metadata(file):
    """What the metadata of a file of latents say, {} when there are none. Raises UserError."""
    path = file.parent.parent / "metadata" / f"{file.stem}.json"
    about = read_json(path, "write it again or delete it", dict) if path.exists() else {}
    row = about.get("puzzle_identifier")
    if row is not None and (type(row) is not int or row < 0):
        raise UserError(f"{path} has puzzle_identifier {row!r}; give 0, 1, 2 ... or none")
    return about


def find_episodes(folder):
    """The Episodes of a dataset folder, train then test, by number. Reads headers only. Raises UserError."""
    files, episodes, groups = [], [], {}
    for where in (folder / "train", folder / "test"):
        if not (where / "dataset.json").exists():
            found = (where / "latents").glob("episode_*.npz")
            files += sorted(found, key=lambda f: (len(f.name), f.name))     # 1000 comes after 999
    metadata = [read_metadata(file) for file in files]
    given = {about.get("puzzle_identifier") for about in metadata}
    unused = (i for i in count(1) if i not in given)
    for file, about in zip(files, metadata):
        shape = read_npz(file, "latents", shape_only=True)
        dim = episodes[0].dim if episodes else (0, *shape)[-1]
        if len(shape) != 2 or shape[0] < 2 or shape[1] != dim:
            raise UserError(f"{file} has latents of shape {shape}, not (2 or more, {dim}) as the first; "
                            f"leave it out or write it again")
        mates = str([file.parent, about.get("set"), about["group"]]) if "group" in about else file
        group = groups.setdefault(mates, len(groups))
        row = about.get("puzzle_identifier")
        episodes.append(Episode(file, *shape, group, next(unused) if row is None else row))
    return episodes


class Episodes(Examples):
    """Windows of seq_len latents, from files that are opened when they are asked for."""
    fields = NUMBERS

    def __init__(self, where, seq_len, episodes):
        if not episodes:
            raise UserError(f"{where}/latents has no episode_XXX.npz; put some there, or name another folder")
        self.where, self.episodes = where, sorted(episodes, key=lambda e: e.group)
        windows = [-(-(e.length - 1) // seq_len) for e in self.episodes]    # the last one may be shorter
        group_sizes = np.unique([e.group for e in self.episodes], return_counts=True)[1]
        self.index = np.array([e.identifier for e in self.episodes]), starts(windows), starts(group_sizes)
        self.meta = {"seq_len": seq_len, "input_dim": episodes[0].dim, "target_dim": episodes[0].dim,
                     "input_pad_value": 0.0, **NO_TOKENS}

    def __len__(self):
        return int(self.index[1][-1])

    def read(self, examples):
        """As Examples.read, of windows. Raises UserError for a damaged file."""
        S, first_window, examples = self.meta["seq_len"], self.index[1], np.arange(len(self))[examples]
        inputs, targets = self.padding(len(examples))
        numbers = np.searchsorted(first_window, examples, side="right") - 1
        for number in np.unique(numbers):       # every file is read once
            file = self.episodes[number].file
            latents = read_npz(file, "latents").astype(np.float32)
            if not np.isfinite(latents).all():
                raise UserError(f"{file} has NaN or infinite latents; leave it out or write it again")
            for row in np.flatnonzero(numbers == number):
                start = (examples[row] - first_window[number]) * S
                window = latents[start:start + S + 1]       # one more, for the last target
                inputs[row, :len(window) - 1], targets[row, :len(window) - 1] = window[:-1], window[1:]
        return inputs, targets, np.isfinite(targets)


def open_examples(where, episodes, rows, seq_len):
    """The Examples in the folder `where`, with their index. Raises UserError.

    episodes: all of the dataset, and seq_len: of their windows. rows: how many names its puzzle table has."""
    path = where / "dataset.json"
    if (where / "latents").is_dir() and not path.exists():
        return Episodes(where, seq_len, [e for e in episodes if e.file.is_relative_to(where)])
    meta = read_json(path, AGAIN, dict)
    needs = {"seq_len", "vocab_size", "pad_id", "ignore_label_id"}
    if meta.get("task_type") == "regression":
        meta = {"input_pad_value": 0.0, **meta, **NO_TOKENS}
        needs = {"seq_len", "input_dim", "target_dim"}
    missing = needs - meta.keys()
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; {AGAIN}")
    fields = TOKENS if meta["vocab_size"] else NUMBERS
    examples = Examples(where, meta, [read_array(where, name) for name in fields])
    examples.index = alone(len(examples))
    if fields is TOKENS or any(list(where.glob(f"all__{name}.np?")) for name in INDEX):
        examples.index = [read_array(where, name) for name in INDEX]
        check_index(where, len(examples), examples.index, rows)
    return examples
