"""Datasets on disk: writing them (all of prepare/ uses this) and turning them into batches.

A dataset is a folder. Examples belong to puzzles (a row of the puzzle table each) and puzzles to groups (an
original and its augmentations); an epoch draws one puzzle of every group.

    DIR/identifiers.json                names of the rows of the puzzle table; row 0 is blank
    DIR/recipe.json                     ours: the builder (it says what the boards are) and its arguments
    DIR/test_puzzles.json               ARC only: the tasks to solve, whose answers may be unknown
    DIR/{train,test}/dataset.json       vocab_size, seq_len, pad_id, ignore_label_id (null: none), counts
    DIR/{train,test}/all__inputs.npy    (N, S) whole numbers: tokens below vocab_size
    DIR/{train,test}/all__labels.npy    (N, S) likewise; ignore_label_id is neither trained on nor scored
    DIR/{train,test}/all__puzzle_indices.npy      (P + 1,) examples of puzzle p: [p] .. [p + 1]
    DIR/{train,test}/all__group_indices.npy       (G + 1,) puzzles of group g: [g] .. [g + 1]
    DIR/{train,test}/all__puzzle_identifiers.npy  (P,) row of puzzle p in the puzzle table

Numbers in place of tokens (regression). Embedding and head of the model become linear maps, the loss is the
mean squared error where the mask is true, and a row is right when that is below --halt-tolerance.

    dataset.json            {"task_type": "regression", "seq_len": S, "input_dim": I, "target_dim": T}; also
                            "input_pad_value" (0.0): the inputs of rows that fill up a batch
    all__inputs.npy         (N, S, I) float32; each may be .npz, with the array under its name or alone
    all__targets.npy        (N, S, T) float32
    all__target_mask.npy    (N, S) bool: true where a target is trained on and scored; elsewhere it may be NaN
    Without the three index files examples are alone and blank; then identifiers.json may be left out, too.

Latent episodes (regression, too): latents 1 .. T - 1 are predicted from 0 .. T - 2. No dataset.json.

    DIR/{train,test}/latents/episode_000.npz    `latents` (T, dim) floats, T at least 2, the same dim in all
    DIR/{train,test}/metadata/episode_000.json  may say `group` and `set` (an epoch draws one episode of every
                            group of a set; without a group it is alone) and `puzzle_identifier` (0: blank;
                            without it, the next number that no episode has)
    --seq-len cuts episodes into windows, examples of one puzzle; without it, the longest episode decides.
    Positions see each other in both directions: of a window only the last target is not also an input.
    At the start only headers are read; files are opened one at a time, when a batch needs them.
"""
import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import isqrt, lcm
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from common import UserError, read_json, sha256, write_json
from examples import (AGAIN, INDEX, NUMBERS, TOKENS, Examples, alone, find_episodes, open_examples,
                      starts)
from prepare import board_kind, must_exist

# ---------------------------------------------------------------------------------------------
# Writing

DIHEDRAL_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)


def dihedral(array, t):
    """Transform t in 0..7 of the last two axes: identity, counter-clockwise turns by 90, 180 and 270 degrees,
    left-right flip, up-down flip, transpose, left-right flip of the first turn.
    DIHEDRAL_INVERSE[t] undoes it."""
    if t >= 4:      # the other four are turns of the left-right flip
        array, t = np.flip(array, -1), (0, 2, 1, 3)[t - 4]
    return np.rot90(array, t, axes=(-2, -1))


@contextmanager
def building(output_dir):
    """Yield a temporary folder beside `output_dir` that takes its name when the block ends well.

    A build that fails or is interrupted leaves nothing, and only a finished one replaces a dataset. Prints
    sha256 and bytes of every file but recipe.json. Raises UserError when `output_dir` holds something else or
    cannot be written."""
    output_dir = Path(output_dir)
    if output_dir.exists() and not (output_dir / "identifiers.json").exists() and any(output_dir.iterdir()):
        raise UserError(f"--output-dir {output_dir} is there and is no dataset, so it is not replaced; "
                        f"name another")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as parent:
            folder = Path(parent) / output_dir.name
            folder.mkdir()
            yield folder
            for path in sorted(folder.rglob("*")):
                if path.is_file() and path.name != "recipe.json":
                    name = output_dir / path.relative_to(folder)
                    print(f"{sha256(path)}  {path.stat().st_size:>13,} bytes  {name}")
            if output_dir.exists():
                shutil.rmtree(output_dir)
            os.replace(folder, output_dir)
    except OSError as e:
        raise UserError(f"{output_dir} could not be written ({e.strerror or e}); free some space there or "
                        f"choose another --output-dir; nothing is left of it") from e


def save_npy(path, array, dtype=None):
    """numpy.save, byte for byte, cast to `dtype` in pieces; floats become float32. A full disk raises its own
    OSError, where numpy says only how many items are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.float32 if array.dtype.kind == "f" else dtype or array.dtype)
    header = {"descr": dtype.str, "fortran_order": False, "shape": array.shape}
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(f, header)
        for i in range(0, len(array), 1 << 16):
            f.write(np.ascontiguousarray(array[i:i + (1 << 16)], dtype))


def write_split(split_dir, arrays, vocab_size, num_identifiers, total_puzzles=None, dtype=None, **extra):
    """Write one split: `arrays` maps NAME of every all__NAME.npy to its array; None stands for one that is
    already written. dtype: of tokens on disk, their own by default. extra: more for dataset.json. Raises
    OSError."""
    split_dir = Path(split_dir)
    for name, array in arrays.items():
        if array is not None:
            save_npy(split_dir / f"all__{name}.npy", array, None if name in INDEX else dtype)
    n_examples, seq_len = np.load(split_dir / "all__inputs.npy", mmap_mode="r").shape[:2]
    n_puzzles = len(arrays["puzzle_identifiers"])
    write_json(split_dir / "dataset.json", {
        "pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": vocab_size,
        "seq_len": seq_len, "num_puzzle_identifiers": num_identifiers,
        "total_groups": len(arrays["group_indices"]) - 1, "mean_puzzle_examples": n_examples / n_puzzles,
        "total_puzzles": total_puzzles or n_puzzles, "sets": ["all"], **extra})


def write_dataset(output_dir, splits, vocab_size=0, recipe=None, group_size=1, train_dtype=None,
                  augment=None, num_aug=0, seed=0):
    """Write a dataset of independent boards (one puzzle each, all with the blank identifier).

    splits: {"train": (inputs, labels), "test": (inputs, labels)}, each (N, S) of tokens
        1 .. vocab_size - 1; 0 is padding, and a label of 0 is not trained on or scored.
        With vocab_size 0, numbers: inputs (N, S, input_dim), targets (N, S, target_dim), mask (N, S) bool.
    recipe: a dict that says how it was made (builder, arguments, seed).
    group_size: how many consecutive training boards are augmentations of one original.
    train_dtype: of the training tokens on disk, their own by default.
    augment: augment(rng, *training arrays) returns the arrays of changed copies; called num_aug times with a
        numpy Generator of `seed`, and original and copies of a board become one group.
    Raises UserError when a token, a number or a shape does not fit."""
    if num_aug:
        rng, train = np.random.default_rng(seed), splits["train"]
        versions = [train] + [augment(rng, *train) for _ in range(num_aug)]
        together = [np.stack(same, axis=1) for same in zip(*versions)]      # (N, 1 + num_aug, S, ...)
        splits = {**splits, "train": [a.reshape(-1, *a.shape[2:]) for a in together]}
        group_size = 1 + num_aug
    inputs, answers = splits["train"][:2]
    if len(inputs) % group_size:
        raise UserError(f"{len(inputs)} training boards do not make groups of {group_size}; mend group_size")
    meta = {"vocab_size": vocab_size, "pad_id": 0, "ignore_label_id": 0, "seq_len": inputs.shape[1]}
    extra = {} if vocab_size else {
        "task_type": "regression", "input_dim": inputs.shape[-1], "target_dim": answers.shape[-1],
        "input_pad_value": 0.0, "target_pad_value": 0.0}
    for split, arrays in splits.items():
        Examples(Path(split), {**meta, **extra}, arrays).check()
    with building(output_dir) as folder:
        for split, arrays in splits.items():
            dtype, group = (train_dtype, group_size) if split == "train" else (None, 1)
            n, names = len(arrays[0]), [*(TOKENS if vocab_size else NUMBERS), *INDEX]
            named = dict(zip(names, [*arrays, *alone(n, group)]))
            write_split(folder / split, named, vocab_size, 1, n // group, dtype, **extra)
            print(f"{split}: {n:,} boards in {n // group:,} groups")
        write_json(folder / "identifiers.json", ["<blank>"])
        write_json(folder / "recipe.json", recipe)


# ---------------------------------------------------------------------------------------------
# A split of one or several folders

# What folders that are joined must have in common.
EQUAL = ("vocab_size", "seq_len", "pad_id", "ignore_label_id", "input_dim", "target_dim", "input_pad_value")


def as_paths(folders):
    """One folder or several, as a list of Paths."""
    return [Path(f) for f in ([folders] if isinstance(folders, (str, Path)) else folders)]


def table_names(folder, episodes):
    """Names of the rows of a folder's puzzle table: identifiers.json; numbers where regression has none."""
    path = folder / "identifiers.json"
    metas = [read_json(f, AGAIN, dict) for f in folder.glob("*/dataset.json")]
    if path.exists() or any(meta.get("task_type") != "regression" for meta in metas):
        return read_json(path, AGAIN, list)
    rows = [e.identifier + 1 for e in episodes] + [meta.get("num_puzzle_identifiers", 1) for meta in metas]
    return ["<blank>", *map(str, range(1, max(rows, default=1)))]


class Split:
    """One split (train or test) of one or several dataset folders, joined.

    data: folders that are trained on; data_test: those of the test split, when they are others. Both splits
        of a run take the same, and so agree on the puzzle table: the identifiers of a folder are shifted past
        those of the ones before, and blank stays 0. A folder that is only tested on has rows of its own at
        the end, which no training reaches, or shares those of a folder with the same identifiers.json.
    seq_len: windows of this length of latent episodes; by default the longest of all decides.
    meta: as in dataset.json, of the join. names: the identifiers, in table order. recipe: recipe.json of
        every folder, None where there is none. kind: "sudoku", "maze" or "arc" by the recipes, "numbers" of
        regression, "tokens" of all other boards. sides: (groups,) of canvases, see put_on_canvases; 0: the
        whole board.
    Raises UserError for a missing, damaged or contradictory file, and for folders that do not go together."""

    def __init__(self, data, split, data_test=None, seq_len=None):
        trained, tested = as_paths(data), as_paths(data_test or data)
        must_exist(trained + tested)
        self.name, self.dirs = split, trained if split == "train" else tested
        episodes = {folder: find_episodes(folder) for folder in dict.fromkeys(trained + tested)}
        if not seq_len:
            seq_len = max((e.length - 1 for found in episodes.values() for e in found), default=None)
        names = {folder: table_names(folder, found) for folder, found in episodes.items()}

        self.names, shifts = ["<blank>"], {}
        for folder in names:
            alike = [other for other in shifts if names[other] == names[folder]]
            if folder not in trained and alike and (folder / "identifiers.json").exists():
                shifts[folder] = shifts[alike[0]]
            else:
                shifts[folder] = len(self.names) - 1
                self.names += names[folder][1:]

        self.sources = [open_examples(d / split, episodes[d], len(names[d]), seq_len) for d in self.dirs]
        self.offsets = starts([len(source) for source in self.sources])
        ids, puzzles, groups = zip(*(source.index for source in self.sources))
        shifted = [np.where(own == 0, 0, own.astype(np.int32) + shifts[d]) for own, d in zip(ids, self.dirs)]
        self.puzzle_identifiers = np.concatenate(shifted)
        self.puzzle_indices = starts(np.concatenate([np.diff(own) for own in puzzles]))
        self.group_indices = starts(np.concatenate([np.diff(own) for own in groups]))
        self.meta = {**self.sources[0].meta, "num_puzzle_identifiers": len(self.names),
                     "total_groups": len(self.group_indices) - 1,
                     "mean_puzzle_examples": len(self) / (len(self.puzzle_indices) - 1)}
        self.sides = np.zeros(self.meta["total_groups"], int)
        for source in self.sources:
            self.must_agree(source.meta, source.where)
        recipes = [d / "recipe.json" for d in self.dirs]
        self.recipe = [read_json(path, AGAIN) if path.exists() else None for path in recipes]
        self.kind = "numbers" if not self.meta["vocab_size"] else board_kind(self.recipe) or "tokens"

    def must_agree(self, meta, where):
        """Refuse a dataset that cannot go together with this one. meta: of the folder `where`."""
        for key in EQUAL:
            if meta.get(key) != self.meta.get(key):
                raise UserError(f"{where} has {key} {meta.get(key)}, {self.sources[0].where} has "
                                f"{self.meta.get(key)}; datasets go together only where these are equal")

    def __len__(self):
        return int(self.offsets[-1])

    @property
    def identity(self):
        """sha256 of all names: equal when every row of the puzzle table means the same puzzle."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    def fingerprint(self):
        """sha256 of the sizes and a hundred examples: equal where the data are the same, at the cost of
        neither."""
        arrays = self.gather(np.linspace(0, len(self) - 1, 100).astype(np.int64))
        sizes = json.dumps([len(self), sorted(self.meta.items())], default=str).encode()
        return hashlib.sha256(sizes + b"".join(array.tobytes() for array in arrays)).hexdigest()

    def puzzle_of(self, examples):
        """Puzzle number (not identifier) of every example, (B,)."""
        return np.searchsorted(self.puzzle_indices, examples, side="right") - 1

    def side_of(self, examples):
        """Sides (B,) of the canvases on which examples (B,) lie; 0: the whole board."""
        return self.sides[self.group_of(examples)]

    def group_of(self, examples):
        return np.searchsorted(self.group_indices, self.puzzle_of(examples), side="right") - 1

    def gather(self, examples, puzzles=None, size=None, side=0, place=None):
        """Arrays (inputs, labels, puzzle_ids) of the given examples (B,). Padded to `size` rows when fewer,
        with pad_id, -100 (in regression input_pad_value, NaN) and the blank identifier. With `side`, windows
        of side x side cells: see windows."""
        size = max(size or 0, len(examples))
        inputs, labels = self.sources[0].padding(size)      # what follows fills it
        of = np.searchsorted(self.offsets, examples, side="right") - 1     # (B,) number of the source
        for i, source in enumerate(self.sources):
            mine = np.flatnonzero(of == i)
            inputs[mine], answers, asked = source.read(examples[mine] - self.offsets[i])
            labels[mine] = np.where(asked, answers.astype(labels.dtype), labels[mine])
        ids = np.zeros(size, np.int32)
        puzzles = self.puzzle_of(examples) if puzzles is None else puzzles
        ids[:len(examples)] = self.puzzle_identifiers[puzzles]
        if side and side * side < self.meta["seq_len"]:
            inputs, labels = windows(inputs, labels, side, place)
        return inputs, labels, ids

    def check(self):
        """Sanity check of the whole split: returns a line per folder saying what was checked."""
        return [source.check() for source in self.sources]


# ---------------------------------------------------------------------------------------------
# Canvases: every ARC task on the smallest square that holds it, as most of a 30 x 30 board is padding

def extent(boards, least=2):
    """Top row, left column, height and width, (N,) each, of the tokens from `least` on, on square boards
    (N, S): 2 for the colours, 1 for these and their end lines."""
    side = isqrt(boards.shape[1])
    there, found = boards.reshape(len(boards), side, side) >= least, []
    for lines in (there.any(2), there.any(1)):      # rows, columns
        first, last = lines.argmax(1), side - lines[:, ::-1].argmax(1)
        found.append((first, np.where(lines.any(1), last - first, 0)))
    (top, height), (left, width) = found
    return top, left, height, width


def windows(inputs, labels, side, place=None):
    """Windows (N, side * side) of boards (N, S) that lie on the board and hold the colours of both.

    place: (N, 2) in 0 .. 1, where between the first and the last row and column that a window may begin at;
        None: the first, by the inputs alone: the answers are not to be known."""
    board, cut = isqrt(inputs.shape[1]), []
    top, left, height, width = extent(inputs if place is None else np.maximum(inputs, labels))
    begin = []
    for axis, (start, length) in enumerate(((top, height), (left, width))):
        first, last = np.maximum(0, start + length - side), np.minimum(start, board - side)
        begin.append(first if place is None else first + (place[:, axis] * (last - first + 1)).astype(int))
    for boards in (inputs, labels):
        views = sliding_window_view(boards.reshape(len(boards), board, board), (side, side), axis=(1, 2))
        cut.append(views[(np.arange(len(boards)), *begin)].reshape(len(boards), side * side))
    return cut


def on_the_board(tokens, board):
    """Windows (N, side * side) in the upper left corners of empty boards (N, board * board)."""
    n, side = len(tokens), isqrt(tokens.shape[1])
    whole = np.zeros((n, board, board), tokens.dtype)
    whole[:, :side, :side] = tokens.reshape(n, side, side)
    return whole.reshape(n, board * board)


def put_on_canvases(train, test, canvases):
    """Give every task of both Splits the smallest of the canvases (their sides) that holds all grids it is
    trained on and its test inputs, with their end lines; the largest canvas need not hold those. All
    augmentations of a task share its side. A test output is never looked at: one that does not fit counts
    as wrong. Raises UserError."""
    canvases = np.unique(canvases)
    needed = np.zeros((2, len(train.names)), int)   # with end lines and without; by row of the puzzle table
    if {train.kind, test.kind} != {"arc"}:
        raise UserError(f"--canvases {' '.join(map(str, canvases))}: only ARC tasks have sizes of their own; "
                        f"leave it out")
    for split in (train, test):
        originals = split.group_indices[:-1]
        rows = [np.arange(*split.puzzle_indices[p:p + 2]) for p in originals]
        for examples in np.array_split(np.concatenate(rows), 1 + len(rows) // 1024):
            inputs, labels, ids = split.gather(examples)
            boards = inputs if split is test else np.maximum(inputs, labels)
            for sizes, least in zip(needed, (1, 2)):
                _, _, height, width = extent(boards, least)
                np.maximum.at(sizes, ids, np.maximum(height, width))
    with_lines, grids = needed
    if grids.max() > canvases[-1]:
        raise UserError(f"--canvases {' '.join(map(str, canvases))}: {(grids > canvases[-1]).sum()} tasks "
                        f"are larger; add {grids.max()}")
    for split in (train, test):
        of_group = with_lines[split.puzzle_identifiers[split.group_indices[:-1]]]
        split.sides = canvases[np.searchsorted(canvases[:-1], of_group)]


class Part(NamedTuple):
    """The rows of every batch that lie on one canvas; without canvases it is the whole batch."""
    side: int               # 0: the whole board
    groups: np.ndarray      # that are drawn from
    rows: int               # of the global batch


def parts_of(split, batch_size, ranks):
    """The Parts of batches of `batch_size` rows: every canvas gets its share of the rows of an epoch, in
    multiples of 8 and of the ranks where that is possible, else of the ranks. Raises UserError."""
    sides, unit = np.unique(split.sides), lcm(8, ranks)
    if len(sides) == 1:
        return [Part(int(sides[0]), np.arange(len(split.sides)), batch_size)]
    if batch_size % unit or batch_size < unit * len(sides):
        unit = ranks
    n = batch_size // unit
    if n < len(sides):
        raise UserError(f"--global-batch-size {batch_size} is too small for {len(sides)} canvases on {ranks} "
                        f"ranks; use {unit * len(sides)} or more, or fewer --canvases")
    size = np.diff(split.puzzle_indices)[split.group_indices[:-1]]     # an epoch takes a puzzle of each group
    share = n * np.array([size[split.sides == side].sum() for side in sides]) / size.sum()
    units = np.maximum(1, share.round()).astype(int)
    while units.sum() != n:
        step = np.sign(n - units.sum())
        units[np.where(units + step > 0, step * (share - units), -np.inf).argmax()] += step
    return [Part(int(side), np.flatnonzero(split.sides == side), int(rows))
            for side, rows in zip(sides, units * unit)]


# ---------------------------------------------------------------------------------------------
# The order of training

class Cursor(NamedTuple):
    """Where a run stands in the order of its training examples: plain numbers, for JSON and checkpoints."""
    iteration: int = 1      # counts the rounds of eval_interval epochs, from 1
    position: int = 0       # groups of this round that were used
    rng: dict | None = None     # state of Philox; None at the start of a round


def draw_batch(split, rng, order, cursor, batch_size, single):
    """(examples (G,), puzzles (G,), cursor after them), or None when the groups left do not fill a batch.

    Draws a puzzle of every group and, without replacement, as many of its examples as there is room for.
    single: every puzzle has one example, so that the same draws can be made at once."""
    first_puzzle, first_example = split.group_indices, split.puzzle_indices
    position = cursor.position
    if single:
        groups = order[position:position + batch_size]
        puzzles = rng.integers(first_puzzle[groups], first_puzzle[groups + 1])
        examples, position = first_example[puzzles], position + len(groups)
    else:
        examples, puzzles = [], []
        while len(puzzles) < batch_size and position < len(order):
            group, position = order[position], position + 1
            puzzle = rng.integers(first_puzzle[group], first_puzzle[group + 1])
            size = first_example[puzzle + 1] - first_example[puzzle]
            take = min(size, batch_size - len(puzzles))
            puzzles.extend([puzzle] * take)
            examples.extend(first_example[puzzle] + rng.choice(size, take, replace=False))
    if len(puzzles) < batch_size:
        return None
    state = json.loads(json.dumps(rng.bit_generator.state, default=np.ndarray.tolist))
    return np.array(examples), np.array(puzzles), Cursor(cursor.iteration, position, state)


def training_order(split, seed, epochs_per_iteration, batch_size, cursor=None, groups=None):
    """Yield (examples (G,), puzzles (G,), cursor after them) of one iteration, from `cursor` on; the last
    cursor is the beginning of the next iteration. groups: that are drawn from, all by default.

    Philox seeded with seed + iteration draws a permutation of the groups per epoch, then all of draw_batch.
    An incomplete last batch is dropped. The same on every rank; a rank takes its slice."""
    cursor = cursor or Cursor()
    rng = np.random.Generator(np.random.Philox(seed + cursor.iteration))
    groups = np.arange(len(split.group_indices) - 1) if groups is None else groups
    order = np.concatenate([groups[rng.permutation(len(groups))] for _ in range(epochs_per_iteration)])
    if cursor.rng is not None:
        rng.bit_generator.state = cursor.rng
    single = (np.diff(split.puzzle_indices) == 1).all()
    following = draw_batch(split, rng, order, cursor, batch_size, single)
    while following:
        examples, puzzles, cursor = following
        following = draw_batch(split, rng, order, cursor, batch_size, single)   # None: this batch is the last
        yield examples, puzzles, cursor if following else Cursor(cursor.iteration + 1)


def orders(split, parts, seed, epochs, interval, cursors):
    """Yield [(examples, puzzles, cursor after them) of every part], one batch, from `cursors` on, in
    iterations of `interval` epochs. One part ends after all epochs; several, whose shares are rounded, never.
    """
    def order(number, part, cursor):
        while len(parts) > 1 or cursor.iteration <= -(-epochs // interval):
            iteration, left = cursor.iteration, epochs - (cursor.iteration - 1) * interval
            ahead = min(interval, left) if left > 0 else interval
            stream = training_order(split, seed + (number << 40), ahead, part.rows, cursor, part.groups)
            for examples, puzzles, cursor in stream:
                yield examples, puzzles, cursor
            if cursor.iteration == iteration and len(parts) > 1:
                raise UserError(f"--eval-interval {interval}: so few epochs of the {len(part.groups)} tasks "
                                f"of canvas {part.side} do not fill {part.rows} rows; raise it")
            if cursor.iteration == iteration:       # the epochs that are left do not fill a batch
                cursor = Cursor(iteration + 1)
    return zip(*(order(i, *each) for i, each in enumerate(zip(parts, cursors))))


def places(seed, step, batch_size):
    """Where the windows of a training step lie, (G, 2) in 0 .. 1; like exploration a function of (seed, step)
    alone."""
    return np.random.Generator(np.random.Philox(key=[seed + 2 ** 32, step])).random((batch_size, 2))


def exploration(seed, step, batch_size, probability, halt_max_steps):
    """Least numbers of supervision steps (G,) int32 that exploration demands at one training step; 0: none.

    A function of (seed, step) alone: the same for any number of ranks, and nothing to store for a resume."""
    if halt_max_steps == 1:     # there is nothing to explore
        return np.zeros(batch_size, np.int32)
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    explores = rng.random(batch_size) < probability
    steps = rng.integers(2, halt_max_steps + 1, batch_size)
    return np.where(explores, steps, 0).astype(np.int32)


def prefetch(batches, depth=2):
    """Run an iterator in a thread, `depth` items ahead; an exception in it is raised here."""
    batches, done = iter(batches), object()
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, batches, done) for _ in range(depth))
        while (item := ahead.popleft().result()) is not done:
            ahead.append(pool.submit(next, batches, done))
            yield item
