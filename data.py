"""Datasets on disk: writing them (all of prepare/ uses this) and turning them into batches.

    DIR/identifiers.json                     names of the rows of the puzzle table; row 0 is blank
    DIR/recipe.json                          how it was built (ours; evaluation compares it)
    DIR/{train,test}/dataset.json            vocabulary, sequence length, counts
    DIR/{train,test}/all__inputs.npy         (N, S) tokens, all__labels.npy likewise
    DIR/{train,test}/all__puzzle_indices.npy examples of puzzle p: [p] .. [p + 1]
    DIR/{train,test}/all__group_indices.npy  puzzles of group g: [g] .. [g + 1]
    DIR/{train,test}/all__puzzle_identifiers.npy  the row of puzzle p in the puzzle table

Nothing here reads command lines, the environment, the device or the rank: they are passed in.
"""
import argparse
import hashlib
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
from contextlib import contextmanager
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
    group_indices to arrays; None stands for one that is already written."""
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


def write_dataset(output_dir, splits, vocab_size, recipe, group_size=1, train_dtype=None):
    """Write a dataset of independent boards (one puzzle each, all with the blank identifier).

    splits: {"train": (inputs, labels), "test": (inputs, labels)}, each (N, S) of tokens
        1 .. vocab_size - 1; 0 is padding, and a label of 0 is not trained on or scored.
    group_size: how many consecutive training boards are augmentations of one original; an epoch
        draws one board of every group.
    train_dtype: of the training boards on disk, their own by default.
    recipe: a dict that says how it was made (builder, arguments, seed).
    Raises UserError when a token lies outside the vocabulary or a shape does not fit.
    """
    for split, (inputs, labels) in splits.items():
        if inputs.shape != labels.shape or inputs.ndim != 2 or not len(inputs):
            raise UserError(f"{split}: inputs {inputs.shape} and labels {labels.shape} must be equal, (N > 0, S)")
        for name, a in (("inputs", inputs), ("labels", labels)):
            if a.min() < 0 or a.max() >= vocab_size:
                raise UserError(f"{split} {name}: tokens {a.min()}..{a.max()} are outside 0..{vocab_size - 1}; "
                                f"raise vocab_size or map them")
    with building(output_dir) as tmp:
        for split, (inputs, labels) in splits.items():
            n = len(inputs)
            group = group_size if split == "train" else 1
            for name, a in (("inputs", inputs), ("labels", labels)):
                save_npy(tmp / split / f"all__{name}.npy", a, train_dtype if split == "train" else None)
            write_split(tmp / split, {
                "inputs": None, "labels": None,
                "group_indices": np.arange(0, n + 1, group, dtype=np.int32),
                "puzzle_indices": np.arange(n + 1, dtype=np.int32),
                "puzzle_identifiers": np.zeros(n, dtype=np.int32),
            }, vocab_size, num_identifiers=1, total_puzzles=n // group)
            print(f"{split}: {n:,} boards in {n // group:,} groups")
        write_json(tmp / "identifiers.json", ["<blank>"])
        write_json(tmp / "recipe.json", recipe)


# ---------------------------------------------------------------------------------------------
# Reading

META = {"pad_id", "ignore_label_id", "blank_identifier_id", "vocab_size", "seq_len", "num_puzzle_identifiers",
        "total_groups", "mean_puzzle_examples", "total_puzzles", "sets"}


def read_json(path, cure):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} not found; {cure}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); {cure}") from None


def read_array(split_dir, name):
    """Memory-mapped all__NAME.npy."""
    path = Path(split_dir) / f"all__{name}.npy"
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path} not found; build the dataset again") from None
    except (ValueError, EOFError, OSError) as e:
        raise UserError(f"{path} is truncated or no .npy file ({e}); build the dataset again") from None


class Tokens:
    """The examples of one split folder with token inputs and labels, as they lie on disk."""

    def __init__(self, split_dir, meta):
        self.inputs, self.labels = read_array(split_dir, "inputs"), read_array(split_dir, "labels")
        expected = (len(self.inputs), meta["seq_len"])
        for name, a in (("inputs", self.inputs), ("labels", self.labels)):
            if a.shape != expected:
                raise UserError(f"{split_dir}/all__{name}.npy has shape {a.shape}, dataset.json and inputs say {expected}; "
                                f"build the dataset again")
        self.pad, self.ignore = meta["pad_id"], meta["ignore_label_id"]
        self.vocab_size = meta["vocab_size"]

    def __len__(self):
        return len(self.inputs)

    def gather(self, examples):
        """Examples (B,) to inputs and labels, (B, S) int32 each; an ignored label is -100."""
        labels = self.labels[examples].astype(np.int32)
        if self.ignore is not None:
            labels[labels == self.ignore] = -100
        return self.inputs[examples].astype(np.int32), labels

    def padding(self, n):
        return np.full((n, self.inputs.shape[1]), self.pad, np.int32), np.full((n, self.inputs.shape[1]), -100, np.int32)

    def check(self, name, chunk=1 << 20):
        """Every token lies in the vocabulary, and something is asked. Reads the whole split."""
        for kind, a in (("inputs", self.inputs), ("labels", self.labels)):
            low = min(int(a[i:i + chunk].min()) for i in range(0, len(a), chunk))
            high = max(int(a[i:i + chunk].max()) for i in range(0, len(a), chunk))
            if low < 0 or high >= self.vocab_size:
                raise UserError(f"{name} {kind}: tokens {low}..{high}, but vocab_size is {self.vocab_size}; "
                                f"correct dataset.json or build the dataset again")
        if high == 0 and self.ignore == 0:
            raise UserError(f"{name} labels: all are ignored (ignore_label_id 0); build the dataset again")
        return f"{len(self):,} examples, tokens inside 0..{self.vocab_size - 1}"


class Split:
    """One split (train or test) of one or several dataset folders, joined.

    Identifiers of the second and later folders are shifted so that none collide; blank stays 0.
    meta: as in dataset.json, of the join. names: the identifiers, in table order. Raises UserError for a
    missing, truncated or contradictory file, and for folders that differ in what must be equal.
    """

    def __init__(self, dirs, split):
        self.dirs, self.name = [Path(d) for d in ([dirs] if isinstance(dirs, (str, Path)) else dirs)], split
        self.sources, identifiers, sizes, groups = [], [], [], []
        self.names = ["<blank>"]
        for d in self.dirs:
            meta = self.read_meta(d / split)
            if self.sources:
                self.must_agree(meta, d)
            else:
                self.meta = dict(meta)
            self.sources.append(Tokens(d / split, meta))
            ids, puzzles, grouping = (read_array(d / split, f"{a}") for a in
                                      ("puzzle_identifiers", "puzzle_indices", "group_indices"))
            self.check_indices(d / split, meta, ids, puzzles, grouping)
            identifiers.append(np.where(ids == 0, 0, ids + len(self.names) - 1))
            sizes.append(np.diff(puzzles))
            groups.append(np.diff(grouping))
            self.names += read_json(d / "identifiers.json", "build the dataset again")[1:]
        self.puzzle_identifiers = np.concatenate(identifiers).astype(np.int32)
        self.puzzle_indices = np.concatenate(([0], np.cumsum(np.concatenate(sizes), dtype=np.int64)))
        self.group_indices = np.concatenate(([0], np.cumsum(np.concatenate(groups), dtype=np.int64)))
        self.offsets = np.cumsum([0] + [len(s) for s in self.sources])
        n_groups = len(self.group_indices) - 1
        self.meta.update(num_puzzle_identifiers=len(self.names), total_groups=n_groups,
                         mean_puzzle_examples=len(self) / (len(self.puzzle_indices) - 1))

    def read_meta(self, split_dir):
        if not split_dir.parent.exists():
            builder = next((b for b in ("sudoku", "maze", "arc") if b in split_dir.parent.name), "sudoku|maze|arc")
            raise UserError(f"{split_dir.parent} not found; build it: python prepare/{builder}.py")
        meta = read_json(split_dir / "dataset.json", "build the dataset again")
        missing = sorted(META - meta.keys())
        if missing:
            raise UserError(f"{split_dir}/dataset.json lacks {', '.join(missing)}; build the dataset again")
        return meta

    def must_agree(self, meta, d):
        for key in ("seq_len", "vocab_size", "pad_id", "ignore_label_id"):
            if meta[key] != self.meta[key]:
                raise UserError(f"{d} has {key} {meta[key]}, {self.dirs[0]} has {self.meta[key]}; "
                                f"datasets can be joined only where these are equal")

    def check_indices(self, split_dir, meta, ids, puzzles, groups):
        n, n_ids = len(self.sources[-1]), meta["num_puzzle_identifiers"]
        for name, a, end in (("puzzle_indices", puzzles, n), ("group_indices", groups, len(ids))):
            if len(a) < 2 or a[0] != 0 or a[-1] != end or (np.diff(a) < 0).any():
                raise UserError(f"{split_dir}/all__{name}.npy does not rise from 0 to {end}; build the dataset again")
        if len(puzzles) != len(ids) + 1 or ids.min() < 0 or ids.max() >= n_ids:
            raise UserError(f"{split_dir}/all__puzzle_identifiers.npy: {len(ids)} identifiers up to {ids.max()} for "
                            f"{len(puzzles) - 1} puzzles and {n_ids} rows; build the dataset again")

    def __len__(self):
        return int(self.offsets[-1]) if hasattr(self, "offsets") else sum(len(s) for s in self.sources)

    @property
    def identity(self):
        """sha256 of identifiers.json as it would stand for the joined folders: equal when every row of the puzzle
        table means the same puzzle."""
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    @property
    def recipe(self):
        return [json.loads((d / "recipe.json").read_text()) if (d / "recipe.json").exists() else None for d in self.dirs]

    def puzzle_of(self, examples):
        """Puzzle number (not identifier) of every example, (B,)."""
        return np.searchsorted(self.puzzle_indices, examples, side="right") - 1

    def gather(self, examples, puzzles=None, size=None):
        """Arrays (inputs, labels, puzzle_ids) of the given examples (B,), padded to `size` rows when fewer."""
        puzzles = self.puzzle_of(examples) if puzzles is None else puzzles
        if len(self.sources) == 1:
            inputs, labels = self.sources[0].gather(examples)
        else:
            source = np.searchsorted(self.offsets, examples, side="right") - 1
            parts = [s.gather(examples[source == i] - self.offsets[i]) for i, s in enumerate(self.sources)]
            back = np.argsort(np.argsort(source, kind="stable"), kind="stable")
            inputs, labels = (np.concatenate(p)[back] for p in zip(*parts))
        ids = self.puzzle_identifiers[puzzles]
        if size is not None and size > len(ids):
            extra = self.sources[0].padding(size - len(ids))
            inputs, labels = np.concatenate((inputs, extra[0])), np.concatenate((labels, extra[1]))
            ids = np.concatenate((ids, np.full(size - len(ids), self.meta["blank_identifier_id"], np.int32)))
        return inputs, labels, ids

    def check(self):
        """Sanity check of the whole split: returns a line per folder saying what was checked."""
        return [f"{d / self.name}: {s.check(d / self.name)}" for d, s in zip(self.dirs, self.sources)]


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
    ready = None   # one batch is held back, for the last one to point at the next iteration
    while True:
        examples, puzzles, room = [], [], batch_size
        while room and position < len(order):
            group = order[position]
            puzzle = rng.integers(first_puzzle[group], first_puzzle[group + 1])
            start, size = first_example[puzzle], int(first_example[puzzle + 1] - first_example[puzzle])
            take = min(size, room)
            if size == 1:
                examples.append(start)
                puzzles.append(puzzle)
            else:
                examples.extend(start + rng.choice(size, take, replace=False))
                puzzles.extend([puzzle] * take)
            position, room = position + 1, room - take
        if ready is not None:
            yield *ready[:2], Cursor(cursor.iteration + 1) if room else ready[2]
        if room:
            return
        ready = np.array(examples), np.array(puzzles), Cursor(cursor.iteration, position, rng.bit_generator.state)


def exploration(seed, step, batch_size, probability, halt_max_steps):
    """Least numbers of supervision steps (G,) int32 that exploration demands at one training step; 0: none.

    A function of (seed, step) alone: the same for every number of ranks, and nothing to store for a resume."""
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    explores, steps = rng.random(batch_size) < probability, rng.integers(2, halt_max_steps + 1, batch_size)
    return np.where(explores, steps, 0).astype(np.int32)


def test_batches(split, batch_size, rank=0, world=1, limit=None):
    """Yield (examples, (inputs, labels, puzzle_ids)) of this rank's share of the split in order: batch number
    rank, rank + world, ...; the last one is padded with pad_id, -100 and the blank identifier."""
    n = min(len(split), limit or len(split))
    for start in range(rank * batch_size, n, world * batch_size):
        examples = np.arange(start, min(start + batch_size, n))
        yield examples, split.gather(examples, size=batch_size)


def prefetch(batches, depth=2):
    """Run an iterator in a thread, `depth` items ahead; an exception in it is raised here."""
    done, q, stop = object(), queue.Queue(depth), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return q.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        try:
            for item in batches:
                put((item, None))
                if stop.is_set():
                    return
            put((done, None))
        except BaseException as e:
            put((done, e))
    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item, error = q.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        stop.set()
