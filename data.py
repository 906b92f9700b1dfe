"""Datasets on disk, and how they become batches.

A dataset is a folder. Examples belong to puzzles (each a row of the puzzle table), and puzzles to groups (an
original and its augmentations). An epoch draws one puzzle from every group.

    DIR/identifiers.json                names of the rows of the puzzle table; row 0 is blank
    DIR/recipe.json                     our builder (it tells the task) and its command line
    DIR/test_puzzles.json               ARC only: the tasks to solve; their answers may be unknown
    DIR/{train,test}/dataset.json       vocab_size, seq_len, pad_id, ignore_label_id (null: none), counts
    DIR/{train,test}/all__inputs.npy    (N, S) integers: tokens below vocab_size
    DIR/{train,test}/all__labels.npy    (N, S) integers; ignore_label_id is neither trained on nor scored
    DIR/{train,test}/all__puzzle_indices.npy      (P + 1,) puzzle p has examples [p] .. [p + 1]
    DIR/{train,test}/all__group_indices.npy       (G + 1,) group g has puzzles [g] .. [g + 1]
    DIR/{train,test}/all__puzzle_identifiers.npy  (P,) row of puzzle p in the puzzle table

Regression: numbers instead of tokens. The model's embedding and head become linear maps, the loss is the mean
squared error where the mask is true, and a row is exact when its loss is below --halt-tolerance.

    dataset.json            {"task_type": "regression", "seq_len": S, "input_dim": I, "target_dim": T}, and
                            optionally "input_pad_value" (0.0), which fills up short batches
    all__inputs.npy         (N, S, I) float32; every array may also be .npz
    all__targets.npy        (N, S, T) float32
    all__target_mask.npy    (N, S) bool, true where a target is trained on and scored
    Without the three index files every example is a group of its own with the blank identifier.

Latent episodes, also regression: latents 1 .. T - 1 are predicted from 0 .. T - 2. No dataset.json.

    DIR/{train,test}/latents/episode_000.npz    `latents` (T, dim) floats, T at least 2
    DIR/{train,test}/metadata/episode_000.json  optional: `group` and `set` (an epoch draws one episode from
                            every group of a set) and `puzzle_identifier` (default: the next unused number)
    --seq-len cuts episodes into windows, which are examples of one puzzle; by default the longest episode
    sets the length. Files are opened one at a time, when a batch needs them.
"""

import hashlib
import json
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from math import ceil, isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from prepare import INDEX_FILES, check_exists, singleton_index, task_of
from tools.common import IGNORE_LABEL, read_json, require, user_error

READ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
)
FIRST_COLOUR = 2  # ARC tokens: 0 padding, 1 end line, then the ten colours

# ---------------------------------------------------------------------------------------------
# Reading files


def read_npz(path, name, shape_only=False):
    """The array `name` of an .npz file, or its only array if that has no name; or just the shape."""
    with user_error(f"{path}: no readable array {name}", *READ_ERRORS), zipfile.ZipFile(path) as archive:
        is_unnamed = archive.namelist() == ["arr_0.npy"]
        with archive.open("arr_0.npy" if is_unnamed else f"{name}.npy") as f:
            if not shape_only:
                return np.lib.format.read_array(f)
            np.lib.format.read_magic(f)
            shape, _, _ = np.lib.format.read_array_header_1_0(f)
            return shape


def read_array(folder, name):
    """all__NAME.npy, memory-mapped, or else the content of all__NAME.npz."""
    path = folder / f"all__{name}.npy"
    compressed = path.with_suffix(".npz")
    if compressed.exists() and not path.exists():
        return read_npz(compressed, name)
    with user_error(path, *READ_ERRORS):
        return np.load(path, mmap_mode="r")


def read_dataset_json(path):
    """dataset.json with its defaults. Raises UserError for a missing key, a wrong type or a bad value."""
    meta = read_json(path)
    minimum = {
        "seq_len": 1,
        "vocab_size": 1,
        "pad_id": 0,
    }
    if meta.get("task_type") == "regression":
        minimum = {
            "seq_len": 1,
            "input_dim": 1,
            "target_dim": 1,
        }
        meta = regression_meta(**meta)
    for key, low in minimum.items():
        value = meta.get(key)
        valid = type(value) is int and value >= low
        require(valid, f"{path}: {key} is {value!r}, but must be a whole number of at least {low}")
    ignored = meta.get("ignore_label_id", "missing")
    valid = ignored is None or type(ignored) is int
    require(valid, f"{path}: ignore_label_id is {ignored!r}, but must be a whole number or null")
    return meta


def boundaries(sizes):
    """(n + 1,) int64: where each of n consecutive pieces begins, and the end of the last."""
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def piece_of(boundaries, positions):
    """The number of the piece that holds each position."""
    return np.searchsorted(boundaries, positions, side="right") - 1


def regression_meta(**given):
    """dataset.json of a regression task with its defaults."""
    return {
        "input_pad_value": 0.0,
        **given,
        "vocab_size": 0,
        "pad_id": None,
        "ignore_label_id": None,
    }


# ---------------------------------------------------------------------------------------------
# One split of one folder


class Examples:
    """Memory-mapped tokens, or numbers if vocab_size is 0.

    folder: that of the split. meta: as in dataset.json. arrays: inputs and labels (N, S), or inputs, targets
    and mask (N, S, ...). index: the arrays of INDEX_FILES."""

    def __init__(self, folder, meta, arrays, index):
        self.folder = folder
        self.meta = meta
        self.arrays = arrays
        self.index = index
        # shapes and kinds of the arrays; at least one row, so that an empty split is refused
        n = max(1, len(arrays[0]))
        S = meta["seq_len"]
        if meta["vocab_size"]:
            expected = [
                ("iu", (n, S)),
                ("iu", (n, S)),
            ]
        else:
            expected = [
                ("f", (n, S, meta["input_dim"])),
                ("f", (n, S, meta["target_dim"])),
                ("b", (n, S)),
            ]
        for array, (kinds, shape) in zip(arrays, expected):
            valid = array.dtype.kind in kinds and array.shape == shape
            require(
                valid,
                f"{folder}: an array is {array.dtype} {array.shape}, not {kinds} {shape}",
            )
        # the index rises from 0 to the number of pieces
        ids, puzzles, groups = index
        self.check_boundaries("puzzle_indices", puzzles, n)
        self.check_boundaries("group_indices", groups, len(ids))
        n_puzzles = len(puzzles) - 1
        require(len(ids) == n_puzzles, f"{folder}: {len(ids)} puzzle identifiers for {n_puzzles} puzzles")

    def check_boundaries(self, name, array, end):
        rises = array.ndim == 1 and array.size > 1 and (np.diff(array) >= 0).all()
        valid = rises and array[0] == 0 and array[-1] == end
        require(valid, f"{self.folder}/all__{name}.npy does not rise from 0 to {end}")

    def __len__(self):
        return len(self.arrays[0])

    def read(self, rows):
        """(inputs, labels) of the given rows: int32 with IGNORE_LABEL, or float32 with NaN where masked."""
        inputs, labels, *mask = (array[rows] for array in self.arrays)
        if mask:
            label_mask = mask[0][..., None]  # (B, S, 1)
            return inputs, np.where(label_mask, labels, np.nan)
        # int32 before comparing: ignore_label_id may not fit the dtype on disk
        labels = labels.astype(np.int32)
        ignored = labels == self.meta["ignore_label_id"]
        return inputs, np.where(ignored, IGNORE_LABEL, labels)

    def padding(self, n):
        """Inputs and labels of n rows without labels."""
        meta = self.meta
        S = meta["seq_len"]
        if meta["vocab_size"]:
            inputs = np.full((n, S), meta["pad_id"], np.int32)
            labels = np.full((n, S), IGNORE_LABEL, np.int32)
        else:
            inputs = np.full((n, S, meta["input_dim"]), meta["input_pad_value"], np.float32)
            labels = np.full((n, S, meta["target_dim"]), np.nan, np.float32)
        return inputs, labels

    def check(self, start, stop):
        """Read rows start .. stop and return the number of labels. Raises UserError for a token outside the
        vocabulary or a number that is not finite."""
        V = self.meta["vocab_size"]
        n_labels = 0
        # rows of a few MB at a time
        chunk = 1 + (1 << 20) // self.padding(1)[0].size
        for first in range(start, stop, chunk):
            inputs, labels = self.read(slice(first, min(first + chunk, stop)))
            label_mask = labels != IGNORE_LABEL if V else ~np.isnan(labels)
            labels = labels[label_mask]
            n_labels += labels.size
            where = f"{self.folder}, from row {first} on"
            for values in (inputs, labels):
                low = values.min(initial=0)
                high = values.max(initial=0)
                require(np.isfinite([low, high]).all(), f"{where}: NaN or infinity")
                require(
                    not V or 0 <= low and high < V, f"{where}: tokens {low} to {high}, but vocab_size is {V}"
                )
        return n_labels


class Episode(NamedTuple):
    """A file of latents."""

    file: Path
    # shape of its latents
    length: int
    dim: int
    # number shared by all episodes of a group
    group: int
    # row of the puzzle table
    identifier: int


def find_episodes(folder):
    """The Episodes of a dataset folder, train before test. Reads headers only."""
    files = []
    for split in (folder / "train", folder / "test"):
        if not (split / "dataset.json").exists():
            found = (split / "latents").glob("episode_*.npz")
            files += sorted(found, key=lambda f: (len(f.name), f.name))  # 1000 comes after 999
    # optional metadata, one file per episode
    metadata = []
    for file in files:
        path = file.parent.parent / "metadata" / f"{file.stem}.json"
        metadata.append(read_json(path) if path.exists() else {})
    # numbers for the episodes that have none
    used = {about.get("puzzle_identifier") for about in metadata}
    unused = (i for i in count(1) if i not in used)
    episodes, groups = [], {}
    for file, about in zip(files, metadata):
        shape = read_npz(file, "latents", shape_only=True)
        dim = episodes[0].dim if episodes else shape[-1]
        valid = len(shape) == 2 and shape[0] > 1 and shape[1] == dim
        require(valid, f"{file}: latents have shape {shape}, but need at least 2 rows of {dim} numbers")
        # an episode without a group is a group of its own
        if "group" in about:
            key = f"{file.parent} {about.get('set')} {about['group']}"
        else:
            key = str(file)
        group = groups.setdefault(key, len(groups))
        row = about.get("puzzle_identifier")
        row = next(unused) if row is None else row
        episodes.append(Episode(file, *shape, group, row))
    return episodes


class Episodes(Examples):
    """Windows of seq_len latents, read from their files when they are needed."""

    def __init__(self, folder, seq_len, episodes):
        require(episodes, f"{folder}/latents has no episode_XXX.npz")
        self.folder = folder
        self.episodes = sorted(episodes, key=lambda e: e.group)
        # the last window of an episode may be shorter
        windows = [ceil((e.length - 1) / seq_len) for e in self.episodes]
        _, group_sizes = np.unique([e.group for e in self.episodes], return_counts=True)
        identifiers = np.array([e.identifier for e in self.episodes])
        self.index = (
            identifiers,
            boundaries(windows),
            boundaries(group_sizes),
        )
        dim = episodes[0].dim
        self.meta = regression_meta(seq_len=seq_len, input_dim=dim, target_dim=dim)

    def __len__(self):
        first_window = self.index[1]
        return int(first_window[-1])

    def read(self, rows):
        S = self.meta["seq_len"]
        first_window = self.index[1]
        rows = np.arange(len(self))[rows]
        inputs, targets = self.padding(len(rows))
        # which episode every row is from
        numbers = piece_of(first_window, rows)
        for number in np.unique(numbers):
            # read every file once
            latents = read_npz(self.episodes[number].file, "latents").astype(np.float32)
            for i in np.flatnonzero(numbers == number):
                start = (rows[i] - first_window[number]) * S
                # one more latent, for the last target
                window = latents[start : start + S + 1]
                n = len(window) - 1
                inputs[i, :n] = window[:-1]
                targets[i, :n] = window[1:]
        return inputs, targets


def open_examples(folder, episodes, seq_len):
    """The Examples of a split folder. episodes: all of the dataset. seq_len: length of their windows."""
    path = folder / "dataset.json"
    if (folder / "latents").is_dir() and not path.exists():
        own = [e for e in episodes if e.file.is_relative_to(folder)]
        return Episodes(folder, seq_len, own)
    meta = read_dataset_json(path)
    names = ["inputs", "labels"] if meta["vocab_size"] else ["inputs", "targets", "target_mask"]
    arrays = [read_array(folder, name) for name in names]
    # the index files are optional for regression
    if meta["vocab_size"] or any(folder.glob("all__puzzle_indices.np?")):
        index = [read_array(folder, name) for name in INDEX_FILES]
    else:
        index = singleton_index(len(arrays[0]))
    return Examples(folder, meta, arrays, index)


# ---------------------------------------------------------------------------------------------
# A split of one or several folders

# Joined folders must agree in these keys of dataset.json.
SHARED_KEYS = (
    "vocab_size",
    "seq_len",
    "pad_id",
    "ignore_label_id",
    "input_dim",
    "target_dim",
    "input_pad_value",
)


def as_paths(folders):
    """One folder or several, as a list of Paths."""
    folders = [folders] if isinstance(folders, (str, Path)) else folders
    return [Path(folder) for folder in folders]


def table_names(folder, episodes):
    """Names of the rows of a folder's puzzle table; numbers for regression without identifiers.json."""
    path = folder / "identifiers.json"
    metas = [read_json(file) for file in folder.glob("*/dataset.json")]
    has_tokens = any(meta.get("task_type") != "regression" for meta in metas)
    if path.exists() or has_tokens:
        return read_json(path, list)
    # without names, the highest number decides
    n_rows = 1
    for episode in episodes:
        n_rows = max(n_rows, episode.identifier + 1)
    for meta in metas:
        n_rows = max(n_rows, meta.get("num_puzzle_identifiers", 1))
    return ["<blank>", *map(str, range(1, n_rows))]


class Split:
    """One split (train or test) of one or several dataset folders, joined.

    data: the folders to train on. data_test: the folders of the test split, if others. Both splits of a run
        get the same two arguments and so agree on the puzzle table: the identifiers of a folder are shifted
        past those of the folders before, and blank stays 0. A folder that is only tested on gets rows at the
        end, which no training reaches, or shares those of a folder with the same identifiers.json.
    seq_len: window length of latent episodes; by default the longest episode decides.

    meta: dataset.json of the join. names: the identifiers in table order. recipe: recipe.json of every folder
    or None. task: "sudoku", "maze" or "arc" (from the recipes), "regression", or "tokens" for other grids.
    canvases: (G,) side of each group's canvas, see assign_canvases; 0: the whole grid.
    Raises UserError for missing, damaged or contradictory files."""

    def __init__(
        self,
        data,
        split,
        data_test=None,
        seq_len=None,
    ):
        train_dirs = as_paths(data)
        test_dirs = as_paths(data_test or data)
        check_exists(train_dirs + test_dirs)
        self.name = split
        self.dirs = train_dirs if split == "train" else test_dirs
        # latent episodes, whose longest one sets the window length
        episodes = {folder: find_episodes(folder) for folder in dict.fromkeys(train_dirs + test_dirs)}
        for found in episodes.values() if not seq_len else ():
            longest = max((e.length - 1 for e in found), default=0)
            seq_len = max(longest, seq_len or 0) or None

        names = {folder: table_names(folder, found) for folder, found in episodes.items()}
        shifts = self.join_tables(names, train_dirs)

        # join the examples and their index arrays
        self.sources = []
        for folder in self.dirs:
            self.sources.append(open_examples(folder / split, episodes[folder], seq_len))
        self.offsets = boundaries([len(source) for source in self.sources])
        identifiers, puzzle_sizes, group_sizes = [], [], []
        for source, folder in zip(self.sources, self.dirs):
            ids, puzzles, groups = source.index
            n_names = len(names[folder])
            require(
                ids.min() >= 0 and ids.max() < n_names,
                f"{source.folder}: puzzle identifier {ids.max()}, but identifiers.json has {n_names} names",
            )
            # 0, the blank puzzle, is the same for all folders
            shifted = ids.astype(np.int32) + shifts[folder]
            identifiers.append(np.where(ids == 0, 0, shifted))
            puzzle_sizes.append(np.diff(puzzles))
            group_sizes.append(np.diff(groups))
        self.puzzle_identifiers = np.concatenate(identifiers)
        self.puzzle_indices = boundaries(np.concatenate(puzzle_sizes))
        self.group_indices = boundaries(np.concatenate(group_sizes))
        n_groups = len(self.group_indices) - 1
        self.canvases = np.zeros(n_groups, int)
        self.meta = {
            **self.sources[0].meta,
            "num_puzzle_identifiers": len(self.names),
            "total_groups": n_groups,
            "mean_puzzle_examples": len(self) / (len(self.puzzle_indices) - 1),
        }
        for source in self.sources:
            self.check_compatible(source.meta, source.folder)

        # the task
        recipes = [d / "recipe.json" for d in self.dirs]
        self.recipe = []
        for path in recipes:
            self.recipe.append(read_json(path, object) if path.exists() else None)
        by_recipe = task_of(self.recipe) or "tokens"
        self.task = by_recipe if self.meta["vocab_size"] else "regression"

    def join_tables(self, names, train_dirs):
        """Set self.names and return how far each folder's identifiers are shifted in the joined table.

        names: {folder: names of the rows of its own puzzle table}."""
        self.names, shifts = ["<blank>"], {}
        for folder in names:
            twins = [other for other in shifts if names[other] == names[folder]]
            only_tested = folder not in train_dirs
            if only_tested and twins and (folder / "identifiers.json").exists():
                # the same puzzles as those of another folder: share its rows
                shifts[folder] = shifts[twins[0]]
            else:
                shifts[folder] = len(self.names) - 1
                self.names += names[folder][1:]
        return shifts

    def check_compatible(self, meta, folder):
        """Refuse a dataset that cannot be joined with this one."""
        for key in SHARED_KEYS:
            ours = self.meta.get(key)
            theirs = meta.get(key)
            require(theirs == ours, f"{folder} has {key} {theirs}, but {self.dirs[0]} has {ours}")

    def __len__(self):
        return int(self.offsets[-1])

    @property
    def puzzle_ids_sha256(self):
        """SHA-256 of all names: equal when every row of the puzzle table means the same puzzle."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    def data_sha256(self):
        """SHA-256 of the sizes and of a hundred examples: identifies the data without reading all of them."""
        examples = np.linspace(0, len(self) - 1, 100).astype(np.int64)
        arrays = self.gather(examples)
        sizes = json.dumps([len(self), sorted(self.meta.items())], default=str)
        digest = hashlib.sha256(sizes.encode())
        for array in arrays:
            digest.update(array.tobytes())
        return digest.hexdigest()

    def puzzle_of(self, examples):
        """(B,) puzzle number (not identifier) of every example."""
        return piece_of(self.puzzle_indices, examples)

    def group_of(self, examples):
        """(B,) group number of every example."""
        return piece_of(self.group_indices, self.puzzle_of(examples))

    def canvas_of(self, examples):
        """(B,) side of the canvas of every example; 0: the whole grid."""
        return self.canvases[self.group_of(examples)]

    def gather(
        self,
        examples,
        puzzles=None,
        size=None,
        canvas=0,
        crop_offsets=None,
    ):
        """Arrays (inputs, labels, puzzle_ids) of the given examples (B,).

        size: pad to this many rows, with pad_id, IGNORE_LABEL (regression: input_pad_value, NaN) and the
            blank identifier.
        canvas: crop every grid to canvas x canvas cells; see crop_to_canvas for crop_offsets."""
        n = len(examples)
        size = max(size or 0, n)
        # start from padding, and fill in the examples of every folder
        inputs, labels = self.sources[0].padding(size)
        source_of = piece_of(self.offsets, examples)
        for i in np.unique(source_of):
            rows = np.flatnonzero(source_of == i)
            own_examples = examples[rows] - self.offsets[i]
            inputs[rows], labels[rows] = self.sources[i].read(own_examples)
        # rows of the puzzle table
        puzzles = self.puzzle_of(examples) if puzzles is None else puzzles
        ids = np.zeros(size, np.int32)
        ids[:n] = self.puzzle_identifiers[puzzles]
        if canvas and canvas**2 < self.meta["seq_len"]:
            inputs, labels = crop_to_canvas(inputs, labels, canvas, crop_offsets)
        return inputs, labels, ids

    def examples_per_canvas(self):
        """{canvas: number of examples per epoch}, for the canvases in use."""
        first_puzzles = self.group_indices[:-1]
        # all puzzles of a group have as many examples as its first one
        sizes = np.diff(self.puzzle_indices)[first_puzzles]
        totals = {}
        for canvas in np.unique(self.canvases).tolist():
            totals[canvas] = int(sizes[self.canvases == canvas].sum())
        return totals

    def check(self, rank=0, n_ranks=1):
        """Read one rank's share of the split and return its number of labels. Raises UserError."""
        n_labels = 0
        for source in self.sources:
            start = len(source) * rank // n_ranks
            stop = len(source) * (rank + 1) // n_ranks
            n_labels += source.check(start, stop)
        return n_labels


# ---------------------------------------------------------------------------------------------
# Canvases: most of an ARC grid of 30 x 30 is padding, so each task is put on the smallest square


def extent(grids, lowest_token):
    """Top row, left column, height and width, (N,) each, of the tokens >= lowest_token in grids (N, S)."""
    side = isqrt(grids.shape[1])
    used = grids.reshape(-1, side, side) >= lowest_token
    found = []
    # rows, then columns
    for lines in (used.any(2), used.any(1)):
        first = lines.argmax(1)
        end = side - lines[:, ::-1].argmax(1)
        length = np.where(lines.any(1), end - first, 0)
        found.append((first, length))
    (top, height), (left, width) = found
    return top, left, height, width


def crop_to_canvas(inputs, labels, canvas, offsets=None):
    """Crop grids (N, S) to (N, canvas * canvas), inside the grid and around the colours of both arrays.

    offsets: (N, 2) in 0 .. 1, the position between the first and the last possible row and column. None: the
        first, judged by the inputs alone, because an evaluation must not look at the answers."""
    side = isqrt(inputs.shape[1])
    visible = inputs if offsets is None else np.maximum(inputs, labels)
    top, left, height, width = extent(visible, FIRST_COLOUR)
    corners = []
    for axis, (start, length) in enumerate([(top, height), (left, width)]):
        # rows or columns at which the canvas may begin
        first = np.maximum(0, start + length - canvas)
        last = np.minimum(start, side - canvas)
        if offsets is None:
            corners.append(first)
            continue
        shift = offsets[:, axis] * (last - first + 1)
        corners.append(first + shift.astype(int))
    # cut the same window out of both arrays
    cropped = []
    for grids in (inputs, labels):
        grids = grids.reshape(-1, side, side)
        windows = sliding_window_view(grids, (canvas, canvas), axis=(1, 2))
        chosen = windows[np.arange(len(grids)), corners[0], corners[1]]  # (N, canvas, canvas)
        cropped.append(chosen.reshape(-1, canvas**2))
    return cropped


def paste_top_left(tokens, side):
    """Paste canvases (N, canvas * canvas) into the top-left corner of empty grids (N, side * side)."""
    n = len(tokens)
    canvas = isqrt(tokens.shape[1])
    grids = np.zeros((n, side, side), tokens.dtype)
    grids[:, :canvas, :canvas] = tokens.reshape(n, canvas, canvas)
    return grids.reshape(n, side * side)


def assign_canvases(train, test, canvases):
    """Give every ARC task of both Splits the smallest of the canvases (their sides) that holds all grids it
    is trained on and its test inputs, including end lines; the largest canvas need not hold those.

    All augmentations of a task share a canvas. Test outputs are never used: an answer that does not fit
    counts as wrong. Raises UserError for other tasks and for grids larger than every canvas."""
    canvases = np.unique(canvases)
    require({train.task, test.task} == {"arc"}, "--canvases works for ARC only; leave it out")
    # largest side of every task's grids, by row of the puzzle table
    with_end_lines = np.zeros(len(train.names), int)
    colours_only = np.zeros(len(train.names), int)
    for split in (train, test):
        # the first puzzle of a group is the original, which tells the size of all
        originals = split.group_indices[:-1]
        rows = [np.arange(*split.puzzle_indices[p : p + 2]) for p in originals]
        for examples in np.array_split(np.concatenate(rows), 1 + len(rows) // 1024):
            inputs, labels, ids = split.gather(examples)
            grids = inputs if split is test else np.maximum(inputs, labels)
            for sides, lowest_token in (with_end_lines, 1), (colours_only, FIRST_COLOUR):
                _, _, height, width = extent(grids, lowest_token)
                np.maximum.at(sides, ids, np.maximum(height, width))
    # the smallest canvas that holds the task
    largest = colours_only.max()
    require(largest <= canvases[-1], f"--canvases {canvases[-1]}: a grid has side {largest}; add {largest}")
    for split in (train, test):
        originals = split.group_indices[:-1]
        needed = with_end_lines[split.puzzle_identifiers[originals]]
        split.canvases = canvases[np.searchsorted(canvases[:-1], needed)]


def canvas_order(n_examples):
    """Yield the canvas of every training step, in proportion to {canvas: number of its examples}: the one
    with the largest deficit `share * step - steps so far`; the smaller one on a tie."""
    total = sum(n_examples.values())
    steps = dict.fromkeys(sorted(n_examples), 0)
    for t in count(1):
        # times `total`, so that all numbers are whole
        deficits = {}
        for canvas, n_steps in steps.items():
            deficits[canvas] = n_examples[canvas] * t - total * n_steps
        canvas = max(deficits, key=deficits.get)
        steps[canvas] += 1
        yield canvas


# ---------------------------------------------------------------------------------------------
# Sampling order


class SamplerState(NamedTuple):
    """Position in the order of training examples, in plain numbers for JSON and checkpoints."""

    # an iteration is eval_interval epochs; counted from 1
    iteration: int = 1
    # groups of this iteration that were used
    position: int = 0
    # state of the Philox generator; None at the start of an iteration
    rng: dict | None = None


def philox(**key_or_seed):
    """A numpy Generator whose stream depends on its key or seed only, on every platform."""
    return np.random.Generator(np.random.Philox(**key_or_seed))


def draw_batch(split, rng, order, state, batch_size, singletons):
    """(examples (G,), puzzles (G,), state after them), or None if the remaining groups do not fill a batch.

    Draws one puzzle from every group and, without replacement, as many of its examples as there is room for.
    singletons: every puzzle has one example, so all draws can be made at once."""
    first_puzzle = split.group_indices
    first_example = split.puzzle_indices
    position = state.position
    if singletons:
        # every group gives one row
        groups = order[position : position + batch_size]
        puzzles = rng.integers(first_puzzle[groups], first_puzzle[groups + 1])
        examples = first_example[puzzles]
        position += len(groups)
    else:
        examples, puzzles = [], []
        while len(puzzles) < batch_size and position < len(order):
            group = order[position]
            position += 1
            puzzle = rng.integers(first_puzzle[group], first_puzzle[group + 1])
            # as many of its examples as there is room for
            size = first_example[puzzle + 1] - first_example[puzzle]
            n = min(size, batch_size - len(puzzles))
            puzzles.extend([puzzle] * n)
            examples.extend(first_example[puzzle] + rng.choice(size, n, replace=False))
    if len(puzzles) < batch_size:
        return None
    # plain numbers instead of numpy's
    rng_state = json.loads(json.dumps(rng.bit_generator.state, default=np.ndarray.tolist))
    new_state = SamplerState(state.iteration, position, rng_state)
    return np.array(examples), np.array(puzzles), new_state


def batch_order(
    split,
    seed,
    epochs,
    interval,
    batch_size,
    state,
    groups=None,
    endless=False,
):
    """Yield (examples (G,), puzzles (G,), state after them) from `state` to the end of all epochs, or without
    end, in iterations of `interval` epochs. groups: numbers of the groups to draw from; default: all.

    A Philox generator seeded with seed + iteration draws one permutation of the groups per epoch, then all
    of draw_batch. An incomplete last batch is dropped, and the last state of an iteration is the start of the
    next. The order is the same on every rank; a rank takes its slice."""
    singletons = (np.diff(split.puzzle_indices) == 1).all()
    groups = np.arange(len(split.canvases)) if groups is None else groups
    while endless or state.iteration <= ceil(epochs / interval):
        # the permutations of this iteration's epochs, one after the other
        epochs_left = epochs - (state.iteration - 1) * interval
        n_epochs = interval if endless else min(interval, epochs_left)
        rng = philox(seed=seed + state.iteration)
        epochs_of_groups = [groups[rng.permutation(len(groups))] for _ in range(n_epochs)]
        order = np.concatenate(epochs_of_groups)
        if state.rng is not None:
            rng.bit_generator.state = state.rng
        next_iteration = SamplerState(state.iteration + 1)
        # one batch ahead, to know which one is the last
        drawn = draw_batch(
            split,
            rng,
            order,
            state,
            batch_size,
            singletons,
        )
        require(drawn or not endless, f"--eval-interval {interval}: so few epochs do not fill a batch")
        while drawn:
            examples, puzzles, state = drawn
            drawn = draw_batch(
                split,
                rng,
                order,
                state,
                batch_size,
                singletons,
            )
            yield examples, puzzles, state if drawn else next_iteration
        state = next_iteration


def min_halt_steps(seed, step, batch_size, probability, halt_max_steps):
    """(G,) int32: for the rows that explore at this training step, the fewest supervision steps before they
    may halt; 0 for the others. A function of (seed, step) only: equal for any number of ranks, and a resumed
    run needs no stored state."""
    if halt_max_steps == 1:
        return np.zeros(batch_size, np.int32)
    rng = philox(key=[seed, step])
    # the minimum is uniform in 2 .. halt_max_steps
    explores = rng.random(batch_size) < probability
    steps = rng.integers(2, halt_max_steps + 1, batch_size)
    return np.where(explores, steps, 0).astype(np.int32)


def random_crop_offsets(seed, step, batch_size):
    """(G, 2) in 0 .. 1: where each grid is cropped at this training step. A function of (seed, step)."""
    rng = philox(key=[seed + 2**32, step])
    return rng.random((batch_size, 2))


def prefetch(iterable, depth=2):
    """Run an iterator in a thread, `depth` items ahead. An exception in it is raised here."""
    iterator = iter(iterable)
    end = object()
    # one thread, so that the items keep their order
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, iterator, end))
            yield item
