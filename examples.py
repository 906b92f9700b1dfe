"""The three kinds of examples, as they lie on disk: tokens, numbers, latent episodes; see data.py.

Beside len(), each has fields (its arrays on disk), needs (of dataset.json), meta (as in dataset.json), pads
(inputs and labels of rows that fill up a batch), index (an Index), gather(examples) and check().
"""
import json
import zipfile
import zlib
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, read_json

AGAIN = "build the dataset again"       # what helps against most of what can be wrong with a file
IGNORED = -100      # a label of a batch that is not asked, whatever number stands on disk
NO_TOKENS = {"vocab_size": 0, "pad_id": None, "ignore_label_id": None}

# ---------------------------------------------------------------------------------------------
# Files

class Index(NamedTuple):
    """Which examples make a puzzle, and which puzzles a group: the files all__FIELD.npy."""
    puzzle_identifiers: np.ndarray      # (P,) rows of the puzzle table
    puzzle_indices: np.ndarray          # (P + 1,) examples of puzzle p: [p] .. [p + 1]
    group_indices: np.ndarray           # (G + 1,) puzzles of group g: [g] .. [g + 1]


def alone(n, group_size=1):
    """Index of n examples that are puzzles of their own, with the blank identifier."""
    every = np.arange(n + 1, dtype=np.int32)
    return Index(np.zeros(n, np.int32), every, every[::group_size])


def starts(sizes):
    """(n + 1,) int64: where each of n consecutive pieces begins, and the end."""
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def read_npz(path, field, shape_only=False):
    """The array named `field` in an .npz, or its only one when that has no name; or its shape alone."""
    try:
        with zipfile.ZipFile(path) as z:
            names = [name.removesuffix(".npy") for name in z.namelist()]
            if field not in names and names != ["arr_0"]:
                raise UserError(f"{path} holds {', '.join(names) or 'nothing'}; it needs an array named "
                                f"{field}, or a single unnamed one")
            with z.open(f"{field if field in names else 'arr_0'}.npy") as f:
                if not shape_only:
                    return np.lib.format.read_array(f)
                np.lib.format.read_magic(f)
                return np.lib.format.read_array_header_1_0(f)[0]
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as e:
        raise UserError(f"{path} is damaged or no .npz file ({e}); write it again") from None


def read_array(split_dir, name):
    """all__NAME.npy, memory-mapped, or else what all__NAME.npz holds."""
    path = split_dir / f"all__{name}.npy"
    if path.with_suffix(".npz").exists() and not path.exists():
        return read_npz(path.with_suffix(".npz"), name)
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path} not found; {AGAIN}") from None
    except (ValueError, EOFError, OSError) as e:
        raise UserError(f"{path} is truncated or no .npy file ({e}); {AGAIN}") from None


def extent(array, rows=1 << 20):
    """(lowest, highest) whole number of an array on disk, read in parts."""
    parts = [array[i:i + rows] for i in range(0, len(array), rows)]     # views
    extents = [(int(part.min()), int(part.max())) for part in parts]
    return min(low for low, _ in extents), max(high for _, high in extents)


def must_be(where, name, array, kind, shape):
    """Refuse an array that holds no "integers", "float32" or "bool", as `kind` says, or has another shape."""
    right_kind = array.dtype.kind in {"integers": "iu", "float32": "f", "bool": "b"}[kind]
    if not (right_kind and array.shape == shape and len(array)):
        wanted = "with rows" if array.shape[:1] == (0,) else shape
        raise UserError(f"{where}/all__{name} is {array.dtype} {array.shape}, not {kind} {wanted}; {AGAIN}")


def check_index(examples, rows):
    """Refuse an index that does not fit its examples, or the `rows` names of their folder's puzzle table."""
    where, (ids, puzzles, groups) = examples.where, examples.index
    for name, a in examples.index._asdict().items():
        must_be(where, name, a, "integers", (a.size,))
    for name, a, end in (("puzzle_indices", puzzles, len(examples)), ("group_indices", groups, len(ids))):
        if len(a) < 2 or a[0] != 0 or a[-1] != end or (np.diff(a) < 0).any():
            raise UserError(f"{where}/all__{name}.npy does not rise from 0 to {end}; {AGAIN}")
    if len(puzzles) != len(ids) + 1 or ids.min() < 0 or ids.max() >= rows:
        raise UserError(f"{where}/all__puzzle_identifiers.npy: {len(ids)} identifiers up to {ids.max()} for "
                        f"{len(puzzles) - 1} puzzles and {rows} names in identifiers.json; {AGAIN}")


# ---------------------------------------------------------------------------------------------
# The kinds. where: their folder, for messages

class Tokens:
    """Inputs and labels that are tokens."""
    fields, needs = ("inputs", "labels"), {"seq_len", "vocab_size", "pad_id", "ignore_label_id"}
    hidden = False      # True of a test set whose answers may be unknown: all labels may be ignored

    def __init__(self, where, meta, inputs, labels):
        shape = (*inputs.shape[:1], meta["seq_len"])
        must_be(where, "inputs", inputs, "integers", shape)
        must_be(where, "labels", labels, "integers", shape)
        self.where, self.meta, self.inputs, self.labels = where, meta, inputs, labels
        self.vocab_size, self.ignore = meta["vocab_size"], meta["ignore_label_id"]
        self.pads = meta["pad_id"], IGNORED

    def __len__(self):
        return len(self.inputs)

    def gather(self, examples):
        """Examples (B,) to inputs and labels, (B, S) int32 each; an ignored label is -100."""
        labels = self.labels[examples].astype(np.int32)
        if self.ignore is not None:
            labels[labels == self.ignore] = IGNORED
        return self.inputs[examples].astype(np.int32), labels

    def check(self):
        """Tokens fit the vocabulary, something is asked. Reads the whole split; returns what was found."""
        extents = {"inputs": extent(self.inputs), "labels": extent(self.labels)}
        for name, (low, high) in extents.items():
            if low < 0 or high >= self.vocab_size:
                raise UserError(f"{self.where} {name}: tokens {low}..{high}, but vocab_size is "
                                f"{self.vocab_size}; raise vocab_size or map them")
        if extents["labels"] == (self.ignore, self.ignore) and not self.hidden:
            raise UserError(f"{self.where} labels: all are ignored (ignore_label_id {self.ignore}); {AGAIN}")
        return f"{self.where}: {len(self):,} examples, tokens inside 0..{self.vocab_size - 1}"


class Numbers:
    """Inputs and targets of regression, and the mask that says which targets are asked."""
    fields, needs = ("inputs", "targets", "target_mask"), {"seq_len", "input_dim", "target_dim"}

    def __init__(self, where, meta, inputs, targets, mask):
        shape = (*inputs.shape[:1], meta["seq_len"])
        must_be(where, "inputs", inputs, "float32", (*shape, meta["input_dim"]))
        must_be(where, "targets", targets, "float32", (*shape, meta["target_dim"]))
        must_be(where, "target_mask", mask, "bool", shape)
        self.where, self.arrays = where, (inputs, targets, mask)
        self.meta = {"input_pad_value": 0.0, **meta, **NO_TOKENS}
        self.pads = self.meta["input_pad_value"], np.nan

    def __len__(self):
        return len(self.arrays[0])

    def read(self, examples):
        """Inputs, targets and mask of examples (B,)."""
        return [a[examples] for a in self.arrays]

    def gather(self, examples):
        """Examples (B,) to inputs (B, S, input_dim) and labels (B, S, target_dim), NaN outside the mask."""
        inputs, targets, mask = self.read(examples)
        labels = np.where(mask[..., None], targets, np.nan)
        return inputs.astype(np.float32, copy=False), labels.astype(np.float32, copy=False)

    def check(self):
        """All is finite, and something is asked. Reads the whole split by parts; returns what was found."""
        S, width, target_width = (self.meta[name] for name in ("seq_len", "input_dim", "target_dim"))
        step, asked = max(1, (1 << 20) // (S * width)), 0       # parts of some MB
        for start in range(0, len(self), step):
            inputs, targets, mask = self.read(np.arange(start, min(start + step, len(self))))
            for name, numbers in (("inputs", inputs), ("targets", np.where(mask[..., None], targets, 0))):
                fine = np.isfinite(numbers).all((1, 2))
                if not fine.all():
                    raise UserError(f"{self.where} {name}: NaN or infinity in example "
                                    f"{start + fine.argmin()}; {AGAIN}")
            asked += int(mask.sum())
        if not asked:
            raise UserError(f"{self.where} target_mask: all are false, nothing is asked; {AGAIN}")
        return (f"{self.where}: {len(self):,} examples, {S} x {width} finite float32 to {S} x "
                f"{target_width}, {asked:,} of {len(self) * S:,} cells asked")


class Episode(NamedTuple):
    """A file of latents (length, dim)."""
    file: Path
    split: str
    length: int
    dim: int
    group: str          # the same for all of a group
    identifier: int     # row of the puzzle table


def read_metadata(file, split_dir):
    """The metadata of a file of latents, {} when there are none. Raises UserError."""
    path = split_dir / "metadata" / f"{file.stem}.json"
    about = read_json(path, "write it again or delete it", dict) if path.exists() else {}
    row = about.get("puzzle_identifier")
    if row is not None and (type(row) is not int or row < 0):
        raise UserError(f"the metadata of {file} have puzzle_identifier {row!r}; give 0, 1, 2 ... or none")
    return about


def find_episodes(folder):
    """The Episodes of a dataset folder, train then test, by number. Reads headers only."""
    found, episodes = [], []
    for split in ("train", "test"):
        if not (folder / split / "dataset.json").exists():
            files = (folder / split / "latents").glob("episode_*.npz")
            for file in sorted(files, key=lambda f: (len(f.name), f.name)):     # 1000 comes after 999
                found.append((file, split, read_metadata(file, folder / split)))
    given = {about.get("puzzle_identifier") for _, _, about in found}
    unused = (i for i in count(1) if i not in given)
    for file, split, about in found:
        shape = read_npz(file, "latents", shape_only=True)
        dim = episodes[0].dim if episodes else (shape or (0,))[-1]
        if len(shape) != 2 or shape[0] < 2 or shape[1] != dim:
            raise UserError(f"{file} has latents of shape {shape}, not (2 or more, {dim}) as the first; "
                            f"leave it out or write it again")
        row = about.get("puzzle_identifier")
        group = json.dumps([about.get("set"), about["group"]]) if "group" in about else str(file)
        episodes.append(Episode(file, split, *shape, group, next(unused) if row is None else row))
    return episodes


class Episodes(Numbers):
    """Windows of seq_len latents, from files that are opened when they are asked for."""

    def __init__(self, where, seq_len, episodes):
        if not episodes:
            raise UserError(f"{where}/latents has no episode_XXX.npz; put some there, or name another folder")
        groups = {}
        for episode in episodes:
            groups.setdefault(episode.group, []).append(episode)
        self.episodes = [episode for group in groups.values() for episode in group]
        windows = [-(-(e.length - 1) // seq_len) for e in self.episodes]    # the last one may be shorter
        self.index = Index(np.array([e.identifier for e in self.episodes]), starts(windows),
                           starts([len(group) for group in groups.values()]))
        sizes = {"seq_len": seq_len, "input_dim": episodes[0].dim, "target_dim": episodes[0].dim}
        self.meta = {**sizes, "input_pad_value": 0.0, **NO_TOKENS}
        self.where, self.pads, self.held = where, (0.0, np.nan), (None, None)

    def __len__(self):
        return int(self.index.puzzle_indices[-1])

    def latents(self, number):
        """(T, dim) of one episode. The last one is held: windows of an episode mostly come together."""
        if self.held[0] != number:
            file = self.episodes[number].file
            latents = read_npz(file, "latents").astype(np.float32)
            if not np.isfinite(latents).all():
                raise UserError(f"{file} has NaN or infinite latents; leave it out or write it again")
            self.held = number, latents
        return self.held[1]

    def read(self, examples):
        S, first_window = self.meta["seq_len"], self.index.puzzle_indices
        inputs = np.zeros((len(examples), S, self.meta["input_dim"]), np.float32)
        targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape[:2], bool)
        for row, example in enumerate(examples):
            number = np.searchsorted(first_window, example, side="right") - 1
            start = (example - first_window[number]) * S
            window = self.latents(number)[start:start + S + 1]      # one more, for the last target
            n = len(window) - 1
            inputs[row, :n], targets[row, :n], mask[row, :n] = window[:-1], window[1:], True
        return inputs, targets, mask


def open_examples(folder, split, episodes, rows, seq_len):
    """The examples of one split of a folder, with their index.

    episodes: all of the folder, and seq_len: of their windows. rows: how many names its puzzle table has."""
    where, path = folder / split, folder / split / "dataset.json"
    if (where / "latents").is_dir() and not path.exists():
        return Episodes(where, seq_len, [e for e in episodes if e.split == split])
    meta = read_json(path, AGAIN, dict)
    kind = Numbers if meta.get("task_type") == "regression" else Tokens
    missing = kind.needs - meta.keys()
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}; {AGAIN}")
    examples = kind(where, meta, *(read_array(where, name) for name in kind.fields))
    # ARC alone has this file; of Kaggle's hidden set the answers are unknown
    examples.hidden = split == "test" and (folder / "test_puzzles.json").exists()
    indexed = any(list(where.glob(f"all__{name}.np?")) for name in Index._fields)
    if kind is Numbers and not indexed:
        examples.index = alone(len(examples))
    else:
        examples.index = Index(*(read_array(where, name) for name in Index._fields))
        check_index(examples, rows)
    return examples
