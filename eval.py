"""Score a checkpoint, look at it think, solve one puzzle.

    python eval.py --checkpoint runs/mini-...     a run folder or one file of it
    python eval.py --hf alphaXiv/trm-model-maze   published weights
    torchrun --nproc_per_node=8 eval.py ...       the same figures, faster
    python eval.py --checkpoint RUN --solve "53..7...."   a Sudoku; or a file
"""
import argparse
import ctypes
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from io import BytesIO
from itertools import repeat, zip_longest
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import DIHEDRAL_INVERSE, HelpFormatter, Split, UserError, cli, dihedral, prefetch, write_json
from model import IGNORE, TRM, Batch, Config, act_loss, build, compile_model, compiler_lacks, from_published, load_file, \
    metric_names, regression_rows, save_file, to_published, token_rows
from prepare import arc, maze, sudoku
from prepare.arc import ORIGINAL, TO_TOKEN, crop, parse_name


@contextmanager
def peers():
    """Around a collective: a rank that died or hangs becomes one line. Raises UserError."""
    try:
        yield
    except RuntimeError as e:
        raise UserError(f"another rank died or hangs ({str(e).splitlines()[0][:150]}); look for its own message above, "
                        f"and start again (train.py: with --resume)") from None


@dataclass
class World:
    """The processes of a run. Every collective is a no-op in a world of one."""
    rank: int
    size: int
    device: torch.device

    @peers()
    def sum(self, tensor):
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @peers()
    def agree(self, number):
        """The largest of all ranks' whole numbers. Goes over gloo, so that it does not wait for a GPU."""
        box = torch.tensor(number)
        if self.size > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    @peers()
    def gather(self, tensor):
        """(B, ...) of every rank, concatenated in rank order to (size * B, ...)."""
        if self.size == 1:
            return tensor
        out = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        dist.all_gather_into_tensor(out, tensor.contiguous())
        return out

    @peers()
    def gather_objects(self, value):
        """List of every rank's picklable value, in rank order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def choose_device(name, local_rank=0):
    """torch.device of "auto", "cuda", "mps" or "cpu". Raises UserError when it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(d for d, there in present.items() if there)
    if not present[name]:
        raise UserError(f"--device {name} is not available here; use {' or '.join(d for d, t in present.items() if t)}")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def keep_freed_memory():
    """Have glibc's malloc keep large blocks that are freed, and hand them out again. By default it returns them to the
    system, and every step of a CPU pays for the pages anew (REPORT.md). Without effect on other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-4, 0)      # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)     # M_TRIM_THRESHOLD: the heap never shrinks


def start_world(device, timeout_s):
    """Join the other processes when torchrun started this one (it sets RANK, WORLD_SIZE and LOCAL_RANK)."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if size > 1:
        timeout = timedelta(seconds=timeout_s)
        with peers():
            store = next(dist.rendezvous("env://", rank, size, timeout=timeout))[0]
            if os.environ.get("LOCAL_WORLD_SIZE") == str(size):   # several machines may count differently
                # torchrun hands a process that it starts again the store of the one that died, with its addresses in it
                store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                    world_size=size, timeout=timeout)
    return World(rank, size, device)


# ---------------------------------------------------------------------------------------------
# Scoring

class Effort(NamedTuple):
    """Compute at test time. Only one of halt, rollouts and augment at once."""
    steps: int | None = None        # supervision steps, halt_max_steps by default
    halt: float | None = None       # a row stops when its q_halt is above this
    rollouts: int = 1               # tries; all but the first with noise
    noise: float = 0.0              # standard deviation, of what is added to the states before every step
    augment: int = 0                # copies under symmetries beside the original

    def of(self, cfg):
        return self.steps or cfg.halt_max_steps


class Scores(NamedTuple):
    """Scored rows of a split in its order; rows without any label are left out."""
    examples: np.ndarray        # (N,) which example of the split
    loss: np.ndarray            # (N,) after the last step, as are the next three
    cell: np.ndarray            # (N,) share of right cells; regression: mean absolute error
    right: np.ndarray           # (N,) bool
    q: np.ndarray               # (N,) logit of halting
    steps: np.ndarray           # (N,) supervision steps taken
    history: np.ndarray         # (N, steps) bool, right after each step; (N, 0) with halting
    preds: np.ndarray           # (N, S) tokens or (N, S, target_dim); (N, 0) where not kept


def think(model, inputs, puzzle_ids, steps, noise=0.0, generator=None):
    """Yield (logits (B, S, V), q (B, 2)) after each of `steps` supervision steps; x is embedded once, y and z stay at
    the same addresses (CUDA graphs: what a compiled net returned is overwritten after the mark)."""
    def blur(h):
        return h + noise * torch.randn(h.shape, generator=generator, device=h.device, dtype=h.dtype)

    with torch.no_grad():  # not inference_mode: training's compiled graphs are used again
        x = model.embed(inputs, model.puzzle_emb[puzzle_ids])                             # (B, L, D)
        y, z = (start.to(model.dtype).expand_as(x).contiguous() for start in (model.y0, model.z0))
    for _ in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():  # left before every yield, for what runs meanwhile
            better = model.improve(x, *((blur(y), blur(z)) if noise else (y, z)))
            y.copy_(better[0])
            z.copy_(better[1])
            heads = model.heads(y)
        yield heads


def answer(cfg, logits):
    """Tokens (B, S) that the logits stand for; in regression the numbers (B, S, target_dim) as they are."""
    small = torch.uint8 if cfg.vocab_size < 256 else torch.int32
    return logits.float() if cfg.regression else logits.argmax(-1).to(small)


def thoughts(model, inputs, puzzle_ids, steps):
    """Boards (steps, B, ...) and q_halt (steps, B) after every supervision step, as numpy; inputs are arrays."""
    device = model.y0.device
    seen = [(answer(model.cfg, logits).cpu().numpy(), q[:, 0].cpu().numpy()) for logits, q in
            think(model, torch.as_tensor(inputs, device=device), torch.as_tensor(puzzle_ids, device=device), steps)]
    return tuple(map(np.stack, zip(*seen)))


def score_rows(cfg, logits, labels):
    """(B,) each: loss, share of right cells (regression: mean absolute error), all right, number of labelled cells."""
    return (regression_rows if cfg.regression else token_rows)(cfg, logits, labels)


def all_right(cfg, logits, labels):
    """(B,) bool: the third of score_rows, without the cost of the loss."""
    if cfg.regression:
        return score_rows(cfg, logits, labels)[2]
    return ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(-1)


def score(model, split, world, batch_size, examples=None, effort=Effort(), progress=True, keep_preds=False):
    """Scores of this rank's share of the examples (all by default). Every batch has batch_size rows, the last one
    padded; results are read from the device once a batch."""
    cfg, parts = model.cfg, []
    examples = np.arange(len(split)) if examples is None else examples
    starts = range(world.rank * batch_size, len(examples), world.size * batch_size)
    mine = [examples[i:i + batch_size] for i in starts] or [examples[:0]]   # a rank without rows runs padding
    n, quiet = sum(map(len, mine)), world.rank > 0 or not progress
    bar = tqdm(total=n, desc="evaluating", unit="row", leave=False, disable=quiet)
    run = run_full if effort.halt is None else run_halting
    for rows, columns, logits in run(model, split, mine, batch_size, effort):
        table = torch.stack([c.float() for c in columns], 1).cpu().numpy()[:len(rows)]
        preds = answer(cfg, logits).cpu().numpy()[:len(rows)] if keep_preds else np.zeros((len(rows), 0), np.uint8)
        asked = np.flatnonzero(table[:, 0])
        parts.append((rows[asked], table[asked, 1:6], table[asked, 6:] > 0, preds[asked]))
        bar.update(len(rows))
    bar.close()
    rows, table, history, preds = (np.concatenate(p) for p in zip(*parts))
    order = rows.argsort()
    loss, cell, right, q, steps = table[order].T.astype(np.float64)
    return Scores(rows[order], loss, cell, right > 0, q, steps, history[order], preds[order])


def run_full(model, split, batches, batch_size, effort):
    """Yield (examples, columns of their table, logits) of every batch after all steps."""
    cfg, device, steps = model.cfg, model.y0.device, effort.of(model.cfg)
    for rows, batch in prefetch((rows, split.gather(rows, size=batch_size)) for rows in batches):
        inputs, labels, ids = (torch.from_numpy(a).to(device) for a in batch)
        history = []
        for logits, q in think(model, inputs, ids, steps):
            history.append(all_right(cfg, logits, labels))
        logits, q = with_effort(model, inputs, ids, effort, int(rows[:1].sum()), logits, q)
        loss, cell, right, n = score_rows(cfg, logits, labels)
        yield rows, (n, loss, cell, right, q[:, 0], torch.full_like(q[:, 0], steps), *history), logits


def gather_scores(world, scores):
    """The Scores of all ranks as one, in the order of the split, on every rank."""
    columns = [np.concatenate(c) for c in zip(*world.gather_objects(scores))]
    order = columns[0].argsort()
    return Scores(*(c[order] for c in columns))


def summary(cfg, scores):
    """Flattened metrics of Scores, under the names of model.metric_names."""
    _, cell, right, q_acc, steps, loss, *_ = metric_names(cfg)
    return {right: float(scores.right.mean()), cell: float(scores.cell.mean()), loss: float(scores.loss.mean()),
            q_acc: float(((scores.q >= 0) == scores.right).mean()),
            "q_halt_loss": float((np.logaddexp(0, scores.q) - scores.q * scores.right).mean()),
            steps: float(scores.steps.mean()), "n": len(scores.right)}


def measure(model, split, world, batch_size, examples, effort=Effort(), progress=True, keep_preds=False, pool=None):
    """(metrics, Scores of all ranks, ArcVotes or None) of the given rows of a split, the same on every rank.

    pool: file for the votes, pooled with those beside it (rank 0)."""
    puzzles = test_puzzles(split)
    mine = score(model, split, world, batch_size, examples, effort, progress, keep_preds or puzzles is not None)
    scores = gather_scores(world, mine if keep_preds else mine._replace(preds=mine.preds[:, :0]))
    metrics, votes = summary(model.cfg, scores), None
    if puzzles is not None:
        votes = ArcVotes(puzzles, split.names, partial=len(examples) < len(split))
        for i in range(0, len(mine.examples), CHUNK):
            rows, part = mine.examples[i:i + CHUNK], slice(i, i + CHUNK)
            inputs, _, ids = split.gather(rows)
            votes.add(inputs, mine.preds[part], mine.q[part], ids, rows)
        payloads = world.gather_objects(votes.payload())
        if pool is not None and world.rank == 0:
            votes.pool(pool, payloads)
        else:
            votes.merge(payloads)
        metrics = {k: v for k, v in votes.result().items() if k.startswith("pass@")} | metrics
    return metrics, scores, votes


def evaluate(model, split, world, batch_size, limit=None, steps=None, progress=True):
    """Metrics of the model (in its present weights) on a split, the same on every rank and for every number of ranks.

    limit: only the first rows. steps: supervision steps, cfg.halt_max_steps by default.
    Returns {"exact_acc", "cell_acc", "lm_loss", "q_halt_acc", "q_halt_loss", "steps", "n"} (regression:
    within_tolerance, mae, regression_loss instead of the first three), on ARC also "pass@1" .. "pass@1000".
    """
    return measure(model, split, world, batch_size, np.arange(len(split))[:limit], Effort(steps=steps), progress)[0]


def result_line(preset, results, steps, train_s, device):
    """The last line of a run: `RESULT preset=mini exact_acc=0.9980 ...`."""
    names = ("pass@1", "pass@2", "exact_acc", "cell_acc", "regression_loss", "mae", "within_tolerance", "n")
    shown = {name: results[name] for name in names if name in results}
    shown |= {"steps": steps, "train_s": f"{train_s:.1f}", "device": device}
    return f"RESULT preset={preset} " + " ".join(
        f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())


# ---------------------------------------------------------------------------------------------
# Compute at test time

def run_halting(model, split, batches, batch_size, effort):
    """As run_full, but a row ends when its q_halt is above effort.halt, and the next one takes its slot: batches
    keep their shape and are full until no rows are left. Waits for the device once a step."""
    device, queue = model.y0.device, np.concatenate(batches)
    owner = np.full(batch_size, -1)                             # which example sits in a slot
    arrays = split.gather(queue[:0], size=batch_size)           # of padding
    carry, free = None, np.arange(batch_size)
    while carry is None or (owner >= 0).any() or len(queue):
        new, queue = queue[:len(free)], queue[len(free):]
        owner[free[:len(new)]] = new
        for array, rows in zip(arrays, split.gather(new)):
            array[free[:len(new)]] = rows
        batch = Batch(*(torch.from_numpy(a).to(device) for a in (*arrays, np.zeros(batch_size, np.int32))))
        with torch.no_grad():
            carry, logits, q = model.step(carry or model.empty_carry(batch), batch)
        carry = carry._replace(halted=(q[:, 0] > effort.halt) | (carry.steps >= effort.of(model.cfg)))
        free = np.flatnonzero(carry.halted.cpu().numpy())
        ended = free[owner[free] >= 0]
        done = torch.from_numpy(ended).to(device)
        loss, cell, right, n = score_rows(model.cfg, logits[done], carry.labels[done])
        yield owner[ended], (n, loss, cell, right, q[done, 0], carry.steps[done]), logits[done]
        owner[ended] = -1


def with_effort(model, inputs, ids, effort, seed, logits, q):
    """(logits, q) of a plain pass to those of effort.rollouts tries or effort.augment copies. seed: of the noise."""
    if effort.augment:
        return vote_over_symmetries(model, inputs, ids, effort, np.random.RandomState(seed), logits, q)
    generator = torch.Generator(q.device).manual_seed(seed)
    for _ in range(effort.rollouts - 1):    # the try with the highest q_halt wins; the first one was without noise
        for other, other_q in think(model, inputs, ids, effort.of(model.cfg), effort.noise, generator):
            pass
        better = other_q[:, 0] > q[:, 0]
        logits, q = torch.where(better[:, None, None], other, logits), torch.where(better[:, None], other_q, q)
    return logits, q


def symmetries(cfg, rng, n, k):
    """Symmetry number k > 0 for n boards: relabel (n, V) of tokens and cells (n, S), new = relabel[old[cells]]."""
    side = isqrt(cfg.seq_len)
    if board_kind(cfg) == "sudoku":
        return sudoku.draw_symmetries(rng, n, side)
    cells = dihedral(np.arange(cfg.seq_len).reshape(side, side), k).ravel()
    return np.tile(np.arange(cfg.vocab_size), (n, 1)), np.tile(cells, (n, 1))


def vote_over_symmetries(model, inputs, ids, effort, rng, logits, q):
    """Logits and q of the answer that most symmetric copies agree on (then: the most confident), copies undone."""
    tries, halts = [logits], [q]
    for k in range(1, effort.augment + 1):
        relabel, cells = (torch.as_tensor(a, dtype=torch.int64, device=q.device) for a in
                          symmetries(model.cfg, rng, len(inputs), k))
        copies = relabel.gather(1, inputs.long().gather(1, cells)).to(inputs.dtype)
        for other, other_q in think(model, copies, ids, effort.of(model.cfg)):
            pass
        back = cells.argsort(1)[..., None].expand_as(other)
        tries.append(other.gather(1, back).gather(2, relabel[:, None].expand_as(other)))
        halts.append(other_q)
    tries, halts = torch.stack(tries), torch.stack(halts)                                 # (K, B, S, V), (K, B, 2)
    boards, sure, rank = tries.argmax(-1), halts[..., 0].sigmoid(), []
    for board in boards:
        same = (boards == board).all(-1)                                                  # (K, B)
        votes = same.sum(0)
        rank.append(votes + 0.5 * (same * sure).sum(0) / votes)
    best = torch.stack(rank).argmax(0)                                                    # (B,), the first of equals
    each = torch.arange(len(best), device=best.device)
    return tries[best, each], halts[best, each]


# ---------------------------------------------------------------------------------------------
# ARC voting

PASS_K = (1, 2, 5, 10, 100, 1000)
CHUNK = 8192    # rows undone at once: more do not fit the cache


def test_puzzles(split):
    """test_puzzles.json of the split's folders, {id: {"train": ..., "test": [{input, output}]}}; None: not ARC."""
    files = [d / "test_puzzles.json" for d in split.dirs]
    if all(f.exists() for f in files):
        return {k: v for f in files for k, v in json.loads(f.read_text()).items()}


def grid_key(grid):
    """A grid as bytes: its number of columns, then its cells. The empty grid is b"\\0"."""
    grid = np.asarray(grid, np.uint8)
    return bytes([grid.shape[-1]]) + grid.tobytes()


def key_grid(key):
    return np.frombuffer(key, np.uint8, offset=1).reshape(-1, key[0]).tolist() if key[0] else []


def undo_rows(tokens, t, tables):
    """(N, 900) uint8 tokens, (N,) transforms, N tables from token to former colour -> N keys of the former grids."""
    height, width = crop(tokens)
    canvas, keys = tokens.reshape(-1, 30, 30), [None] * len(tokens)
    kind = (t * 31 + height) * 31 + width        # rows of one kind are turned back at once
    order = np.argsort(kind, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(kind[order])) + 1):
        h, w = height[rows[0]], width[rows[0]]
        grids = dihedral(canvas[rows, :h, :w], DIHEDRAL_INVERSE[t[rows[0]]])
        columns, cells = bytes([grids.shape[2]]), grids.tobytes()
        for row, i in zip(rows.tolist(), range(0, len(rows) * h * w, h * w) if w else repeat(0)):
            keys[row] = columns + cells[i:i + h * w].translate(tables[row])
    return keys


class ArcVotes:
    """The votes of one evaluation. Every rank adds its own rows; the payloads of all ranks together give one result,
    the same for any number of ranks and any split.

        votes = ArcVotes(test_puzzles, identifiers)      # test_puzzles.json, identifiers.json
        votes.add(inputs, preds, q_halt, puzzle_identifiers, rows)               # per batch
        votes.merge([votes.payload()])                   # or the list that all_gather_object filled
        votes.result(), votes.submission()
    """

    def __init__(self, test_puzzles, identifiers, partial=False):
        self.identifiers, self.partial = identifiers, partial    # partial: puzzles without any votes do not count
        self.tasks, self.tests = {}, {}          # (id, input): number; id: [(number, right output)] per test input
        for name, puzzle in test_puzzles.items():
            for e in puzzle["test"]:             # equal inputs of a puzzle share their votes
                task = self.tasks.setdefault((name, grid_key(e["input"])), len(self.tasks))
                self.tests.setdefault(name, []).append((task, grid_key(e["output"])))
        self.row, self.q, self.task, self.grid = [], [], [], []     # per vote; grid: a place in grids
        self.grids = {}

    def add(self, inputs, preds, q_halt, identifiers, rows):
        """One batch of arrays: (B, 900) tokens twice, (B,) logits, (B,) rows of the puzzle table, 0 for padding, (B,)
        places in the test split (of equal candidates that of the first row wins).

        Raises UserError when a row belongs to no test input.
        """
        real = np.flatnonzero(identifiers)
        if not len(real):
            return
        names, t, colours = zip(*(parse_name(self.identifiers[i]) for i in identifiers[real].tolist()))
        t, tables = np.array(t), [bytes.maketrans(c.translate(TO_TOKEN), ORIGINAL) for c in colours]
        given, answers = (undo_rows(a[real].astype(np.uint8), t, tables) for a in (inputs, preds))
        for task, grid in zip(zip(names, given), answers):
            if task not in self.tasks:
                raise UserError(f"a row of the test split is no test input of puzzle {task[0]} in test_puzzles.json: "
                                f"they were not built together; build both again with prepare/arc.py")
            self.task.append(self.tasks[task])
            self.grid.append(self.grids.setdefault(grid, len(self.grids)))
        self.row += rows[real].tolist()
        self.q += np.exp(-np.logaddexp(0, -q_halt[real].astype(np.float64))).tolist()

    def payload(self):
        """What the other ranks need: per vote its row, test input, candidate (a place in grids) and sigmoid(q_halt)."""
        return {"row": np.array(self.row, np.int64), "q": np.array(self.q), "task": np.array(self.task, np.int32),
                "grid": np.array(self.grid, np.int32), "grids": list(self.grids)}

    def merge(self, payloads):
        """Rank the candidates of every test input by (votes, mean sigmoid(q_halt)), ties in order of the rows."""
        row, task, q = (np.concatenate([p[name] for p in payloads]) for name in ("row", "task", "q"))
        keys = [p["grids"][i] for p in payloads for i in p["grid"].tolist()]
        task, q, votes = task.tolist(), q.tolist(), [{} for _ in self.tasks]
        for i in np.argsort(row, kind="stable").tolist():
            tally = votes[task[i]].setdefault(keys[i], [0, 0.0])
            tally[0] += 1
            tally[1] += q[i]
        self.ranked = [sorted(c, key=lambda key: (c[key][0], c[key][1] / c[key][0]), reverse=True) for c in votes]

    def pool(self, path, payloads):
        """Write this evaluation's payloads to votes-NAME.json, and merge those of all such files beside it."""
        write_json(path, [{k: [g.hex() for g in v] if k == "grids" else v.tolist() for k, v in p.items()}
                          for p in payloads])
        kept = [p for f in sorted(path.parent.glob("votes-*.json")) for p in json.loads(f.read_text())]
        self.merge([{k: list(map(bytes.fromhex, v)) if k == "grids" else np.array(v) for k, v in p.items()}
                    for p in kept])

    def places(self):
        """Per puzzle the places (from 0, inf: none) of the right outputs of its test inputs among the candidates."""
        def place(task, right):
            return self.ranked[task].index(right) if right in self.ranked[task] else np.inf
        return [np.array([place(*test) for test in tests]) for tests in self.tests.values()
                if not self.partial or any(self.ranked[task] for task, _ in tests)]

    def result(self):
        """-> {"pass@K": mean over puzzles of the mean over test inputs (the official figure), "hits@K": test inputs
        solved, ..., "puzzles", "inputs": how many there are}. Whatever has no votes is not solved."""
        puzzles = self.places()
        pooled = np.concatenate(puzzles)
        result = {"puzzles": len(puzzles), "inputs": len(pooled)}
        for k in PASS_K:
            result[f"pass@{k}"] = float(np.mean([np.mean(places < k) for places in puzzles]))
            result[f"hits@{k}"] = int((pooled < k).sum())
        return result

    def submission(self):
        """-> {puzzle id: [{"attempt_1": grid, "attempt_2": grid}]} with every test input. The only candidate is both
        attempts; without any they are [[0]]."""
        best = {name: [[key_grid(key) for key in self.ranked[task][:2]] or [[[0]]] for task, _ in tests]
                for name, tests in self.tests.items()}
        return {name: [{"attempt_1": b[0], "attempt_2": b[-1]} for b in tests] for name, tests in best.items()}


# ---------------------------------------------------------------------------------------------
# Checkpoints, ours and published

# Where the published weights came from: T, n (all have 8 heads and 16 puzzle positions) and the dataset.
KNOWN = {
    "alphaXiv/trm-model-sudoku": (3, 6, "sudoku"), "alphaXiv/trm-model-maze": (3, 4, "maze"),
    "alphaXiv/trm-model-arc-agi-1": (3, 4, "arc1"),
    "arcprize/trm_arc_prize_verification/arc_v1_public": (3, 4, "arc1"),
    "arcprize/trm_arc_prize_verification/arc_v2_public": (3, 4, "arc2"),
    "Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-mlp": (3, 6, "sudoku"),
    "Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-att": (3, 6, "sudoku"),
    "Sanjin2024/TinyRecursiveModel-Maze-Hard": (3, 4, "maze"),
    "Sanjin2024/TinyRecursiveModels-ARC-AGI-1": (3, 4, "arc1"),
    "Sanjin2024/TinyRecursiveModels-ARC-AGI-2": (3, 4, "arc2"),
}
ARC2 = ["--subsets", "training2", "evaluation2", "concept", "--test-set-name", "evaluation2"]
DATASETS = {  # folder, builder and its flags
    "sudoku": ("data/sudoku-extreme-1k-aug-1000", sudoku, ["--subsample-size", "1000", "--num-aug", "1000"]),
    "maze": ("data/maze-30x30-hard-1k", maze, []),
    "arc1": ("data/arc1concept-aug-1000", arc, []), "arc2": ("data/arc2concept-aug-1000", arc, ARC2),
}
CONFIGS = ("all_config.yaml", "config.json")
NO_WEIGHTS = re.compile(r"\.(json|ya?ml|md|txt|py|png|gif|jpe?g|pdf|npz?|csv|log|sh)$|^\.|^LICENSE", re.I)


def fetch(name, world):
    """Download `owner/repo[/file]` from the hub: its file, and what the table and the repository's config say:
    (path, settings, dataset or None). Files lie under data/weights/owner/repo, where they can be put by hand, too."""
    parts = name.split("/")
    if len(parts) < 2 or not all(parts):
        raise UserError(f"--hf {name} is no owner/repo or owner/repo/file; for instance alphaXiv/trm-model-maze")
    repo, wanted = "/".join(parts[:2]), "/".join(parts[2:])
    folder = Path("data/weights") / repo
    if world.rank == 0:
        from huggingface_hub import HfApi, hf_hub_download
        try:
            files = [f.rfilename for f in HfApi().model_info(repo).siblings]    # list_repo_files retries for 23 s
            wanted = pick_file(repo, files, wanted)
            for file in [f for f in files if Path(f).name in CONFIGS] + [wanted]:
                hf_hub_download(repo, file, local_dir=folder)
        except UserError:
            raise
        except Exception as e:  # the client raises its own errors, httpx's or requests', by its version
            reason = f"cannot download from {repo} ({one_line(e)})"
            there = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
            if wanted not in there and (wanted or not weights_among(there)):
                raise UserError(f"{reason}; fetch {wanted or 'its checkpoint file'} from https://huggingface.co/{repo} "
                                f"and put it at {folder / (wanted or 'FILE')}") from None
            wanted = pick_file(repo, there, wanted)
            print(f"{reason}: using {folder / wanted}", file=sys.stderr)
    path = folder / world.gather_objects(wanted)[0]
    key = next((k for k in KNOWN if f"{path.relative_to('data/weights').as_posix()}/".startswith(k + "/")), None)
    T, n, data = KNOWN.get(key, (None, None, None))
    settings = {"H_cycles": T, "L_cycles": n} if key else {}
    for config in (d / name for d in reversed(path.parents) for name in CONFIGS):   # the one next to the file wins
        if config.is_relative_to(folder) and config.exists():
            settings |= read_config(config.read_text())
    return path, settings, data


def one_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


def weights_among(files):
    """Those that are no configuration, text or picture: checkpoints have names like step_32550, without a suffix."""
    return [f for f in files if not NO_WEIGHTS.search(Path(f).name) and not f.startswith(".cache/")]


def pick_file(repo, files, wanted):
    """The checkpoint among the files of a repository. Raises UserError that lists them when there is not one."""
    found = weights_among(files)
    if wanted in files or len(found) == 1 and not wanted:
        return wanted or found[0]
    raise UserError(f"{repo} has {f'no file {wanted}' if wanted else f'{len(found)} checkpoint files'}; choose one: "
                    + ", ".join(f"--hf {repo}/{f}" for f in found or files))


def read_config(text):
    """The settings of Config that a JSON or a simple YAML file gives, at any depth."""
    kinds = {"H_cycles": int, "L_cycles": int, "num_heads": int, "puzzle_emb_len": int, "halt_max_steps": int,
             "pos_encodings": str}
    return {k: kinds[k](v) for k, v in re.findall(r"""\b(\w+)["']?[ ]*:[ ]*["']?(\w+)""", text) if k in kinds}


def find_file(path):
    """The newest checkpoint of a run folder, or the file itself."""
    path, newest = Path(path), Path(path) / "latest.txt"
    if path.is_dir() and not newest.exists():
        raise UserError(f"{path} holds no latest.txt, so it is no run folder; name a run folder or a checkpoint file")
    return path / newest.read_text().strip() if path.is_dir() else path


def read_model(content, settings, seq_len, ema):
    """(Config, state dict) of a checkpoint file's content, ours or published. settings win over what it says."""
    if "config" in content:
        return Config(**{**content["config"], **settings}), {**content["model"], **((ema and content["ema"]) or {})}
    lacking = [f"--{k.replace('_', '-')}" for k in ("H_cycles", "L_cycles") if k not in settings]
    if lacking:
        raise UserError(f"this published checkpoint does not say {' and '.join(lacking)}; give them (3 and 6 for "
                        f"sudoku, 3 and 4 for maze and ARC)")
    if not any("mlp_t" in key for key in content):  # the shapes of attention do not tell the length
        vocab_size = next((len(v) for k, v in content.items() if k.endswith("embedding_weight")), 0)
        settings = {**settings, "seq_len": seq_len or {11: 81}.get(vocab_size, 900)}
    return from_published(content, settings)


def must_fit(content, cfg, split, reset):
    """Refuse a dataset that the checkpoint was not made for. Raises UserError."""
    dirs, rows = " ".join(map(str, split.dirs)), split.meta["num_puzzle_identifiers"]
    for name in ("seq_len", "vocab_size", "input_dim", "target_dim"):
        found, asked = split.meta.get(name, 0), getattr(cfg, name)
        if found != asked:
            raise UserError(f"{dirs} has {name} {found}, the checkpoint {asked}; give its own dataset with --data")
    if reset:
        return
    cure = "give its dataset with --data, or --reset-puzzle-emb to replace every row by the mean row"
    if content.get("identity", split.identity) != split.identity:
        sums = f"its identifiers.json has sha256 {split.identity[:12]}, not {content['identity'][:12]}"
        raise UserError(f"the puzzles of {dirs} are not those the checkpoint was trained on, "
                        f"{' '.join(content['data'])} ({sums}); {cure}")
    if cfg.num_puzzles != rows:
        raise UserError(f"the checkpoint's table has {cfg.num_puzzles:,} rows, {dirs} has {rows:,} identifiers; {cure}")


# ---------------------------------------------------------------------------------------------
# Pictures, 1200 pixels wide

ARC_COLOURS = ("#FFFFFF", "#D9D9D9", "#000000", "#0074D9", "#FF4136", "#2ECC40",     # outside, end line, colours 0 ..
               "#FFDC00", "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25")
MAZE_COLOURS = ("#FFFFFF", "#37474F", "#FFFFFF", "#2ECC40", "#FF851B", "#64B5F6")   # pad, wall, open, S, G, path
WRONG, PALE, GIVEN, ANSWER = "#D50000", "#FFCDD2", "#E6E6E6", "#0D47A1"


def board_kind(cfg):
    """"sudoku", "maze", "arc", "numbers" (regression) or "tokens", from the shapes of the data."""
    side = isqrt(cfg.seq_len)
    if cfg.regression:
        return "numbers"
    if side in sudoku.BOX and (cfg.seq_len, cfg.vocab_size) == (side * side, side + 2):
        return "sudoku"
    return {6: "maze", 12: "arc"}.get(cfg.vocab_size, "tokens") if side * side == cfg.seq_len else "tokens"


def wrong_cells(cfg, board, label):
    """(S,) bool of one predicted board against its label."""
    if cfg.regression:
        return (np.square(board - label).mean(-1) >= cfg.halt_tolerance) & ~np.isnan(label).any(-1)
    return (board != label) & (label != IGNORE)


def draw_digits(ax, grid, given, wrong):
    """A Sudoku; grid, given, wrong: (side, side) tokens, bool and bool."""
    from matplotlib.patches import Rectangle
    side, (rows, cols) = len(grid), sudoku.BOX[len(grid)]
    ax.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5), aspect="equal")
    for i in range(side + 1):
        ax.axhline(i - 0.5, color="black", lw=0.4 if i % rows else 1.6)
        ax.axvline(i - 0.5, color="black", lw=0.4 if i % cols else 1.6)
    size = 0.5 * ax.get_window_extent().width / side * 72 / 100
    for (r, c), token in np.ndenumerate(grid):
        if wrong[r, c] or given[r, c]:
            ax.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, color=PALE if wrong[r, c] else GIVEN, lw=0))
        if token > 1:
            ax.text(c, r, str(token - 1), ha="center", va="center_baseline", fontsize=size,
                    weight="bold" if given[r, c] else None,
                    color=WRONG if wrong[r, c] else "black" if given[r, c] else ANSWER)


def draw_board(ax, cfg, board, question, wrong, top):
    """One board (S,) of tokens, or (S, d) of numbers; the cells where `wrong` (S,) is true (None: unknown) are marked.
    top: the number, or token, of the last colour."""
    from matplotlib.colors import ListedColormap
    kind, side = board_kind(cfg), isqrt(cfg.seq_len)
    wrong = np.zeros(cfg.seq_len, bool) if wrong is None else wrong
    ax.set(xticks=[], yticks=[])
    if kind == "numbers":
        ax.imshow(np.asarray(board).T, aspect="auto", cmap="viridis", vmin=-top, vmax=top)
        for i in np.flatnonzero(wrong):
            ax.axvspan(i - 0.5, i + 0.5, color=WRONG, alpha=0.3)
        return
    shape = (side, side) if side * side == cfg.seq_len else (1, -1)
    grid, given, wrong = (np.reshape(a, shape) for a in (board, question > 1, wrong))
    if kind == "sudoku":
        return draw_digits(ax, grid, given, wrong)
    if kind == "arc":   # as much of the canvas as is used
        used = (grid > 0) | wrong
        h, w = (max(1, 1 + np.flatnonzero(used.any(axis)).max(initial=0)) for axis in (1, 0))
        grid, wrong = grid[:h, :w], wrong[:h, :w]
        ax.set_xticks(np.arange(0.5, w - 1), minor=True)
        ax.set_yticks(np.arange(0.5, h - 1), minor=True)
        ax.grid(which="minor", color="#888888", lw=0.3)
        ax.tick_params(which="minor", length=0)
    colours = {"arc": ARC_COLOURS, "maze": MAZE_COLOURS}.get(kind)
    ax.imshow(grid, cmap=ListedColormap(colours) if colours else "tab20", vmin=0, vmax=top,
              aspect="equal" if len(grid) > 1 else "auto")
    box = ax.get_window_extent()
    cell = 0.72 * min(box.width / grid.shape[1], box.height / grid.shape[0])            # points
    ax.scatter(*np.nonzero(wrong)[::-1], marker="x", color=WRONG, s=(0.6 * cell) ** 2, linewidths=max(0.8, 0.08 * cell))


def draw_panels(cfg, title, panels, columns):
    """A figure of boards, with a legend; panels: [(name, board, question, wrong cells or None)]."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    rows = -(-len(panels) // columns)
    height = rows * (12 / columns + 0.25) + 1.0
    figure = Figure(figsize=(12, height), dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.6 / height, top=1 - 0.8 / height, wspace=0.08, hspace=0.16)
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    top = max(np.nanmax(np.abs(board)) for _, board, *_ in panels) if cfg.regression else cfg.vocab_size - 1
    for ax, (name, board, question, wrong) in zip(axes, panels):
        draw_board(ax, cfg, board, question, wrong, top)
        ax.set_title(name, fontsize=10)
    patches = {"sudoku": ((GIVEN, "given"), (ANSWER, "answer"), (PALE, "wrong cell")),
               "maze": zip(MAZE_COLOURS[1:], ("wall", "open", "start", "goal", "path")),
               "arc": ((ARC_COLOURS[1], "end of the grid"),),
               "numbers": ((PALE, f"outside the tolerance   (colours from {-top:.3g} to {top:.3g})"),)}
    handles = [Patch(facecolor=c, edgecolor="grey", label=text) for c, text in patches.get(board_kind(cfg), ())]
    if board_kind(cfg) not in ("sudoku", "numbers"):
        handles.append(Line2D([], [], color=WRONG, marker="x", ls="", label="wrong cell"))
    figure.suptitle(title, fontsize=14)
    figure.legend(handles=handles, loc="lower center", ncols=6, frameon=False)
    return figure


def step_panel(step, question, boards, marks, q):
    """The panel of a supervision step, counted from 1."""
    wrong = marks[step - 1]
    count = "" if wrong is None else f": {wrong.sum()} wrong" if wrong.any() else ": no cell wrong"
    return f"step {step}{count}, q_halt {q[step - 1]:+.1f}", boards[step - 1], question, wrong


def draw_steps(cfg, path, title, question, boards, marks, q, label=None):
    """PNG of one puzzle: the question, its answer after some supervision steps, the target if it is given."""
    steps = [s for s in (1, 2, 4, 8, 16) if s < len(boards)] + [len(boards)]
    target = [] if label is None else [("target", label, question, None)]
    shown = [step_panel(s, question, boards, marks, q) for s in steps]
    panels = [("question", question, question, None), *shown, *target]
    draw_panels(cfg, title, panels, 3 + len(target)).savefig(path)
    return path


def animate(cfg, path, title, question, boards, marks, q, label=None):
    """GIF of the answer, half a second a supervision step, beside the question and the target if it is given."""
    from PIL import Image
    frames, target = [], [] if label is None else [("target", label, question, None)]
    for step in range(1, 1 + len(boards)):
        panels = [("question", question, question, None), step_panel(step, question, boards, marks, q), *target]
        drawn = BytesIO()
        draw_panels(cfg, title, panels, len(panels)).savefig(drawn)
        frames.append(Image.open(drawn).convert("P", palette=Image.Palette.ADAPTIVE))
    times = [500] * (len(frames) - 1) + [3000]      # ms
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


def draw_curve(path, curve, n):
    """PNG of the share of right puzzles after every supervision step."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    ax = figure.subplots()
    ax.plot(range(1, len(curve) + 1), curve, marker="o" if len(curve) < 40 else None)
    ax.set(xlabel="supervision steps", ylabel="right puzzles",
           title=f"{n:,} puzzles: {curve[-1]:.4f} right after {len(curve)} steps")
    ax.grid(alpha=0.3)
    figure.savefig(path)


def draw_examples(cfg, path, split, scores, n):
    """PNG of n test puzzles, half of them wrong ones where there are any: question, answer and target."""
    wrong, right = np.flatnonzero(~scores.right), np.flatnonzero(scores.right)
    n_wrong = max(min(len(wrong), n // 2), n - len(right))
    chosen = [*wrong[:n_wrong], *right[:n - n_wrong]]
    panels, (inputs, labels, _) = [], split.gather(scores.examples[chosen])
    for row, question, label in zip(chosen, inputs, labels):
        bad = wrong_cells(cfg, scores.preds[row], label)
        panels += [(f"puzzle {scores.examples[row]}", question, question, None),
                   (f"{bad.sum()} wrong" if bad.any() else "right", scores.preds[row], question, bad),
                   ("target", label if cfg.regression else label.clip(0), question, None)]
    draw_panels(cfg, "Test puzzles: question, answer, target", panels, 6).savefig(path)


def puzzle_picture(model, split, path, batch_size):
    """PNG of one hard test puzzle at some supervision steps, wrong cells marked: of the 8 * batch_size puzzles with
    the most blanks (not Sudoku: the first ones) the one that was wrong the longest and right in the end."""
    cfg, pool = model.cfg, np.arange(min(len(split), 10_000))
    if board_kind(cfg) == "sudoku":
        pool = pool[np.argsort(-(split.gather(pool)[0] == 1).sum(-1), kind="stable")]
    best = None
    for pool in np.split(pool, range(batch_size, len(pool), batch_size))[:8]:
        inputs, labels, ids = split.gather(pool, size=batch_size)
        boards, q = thoughts(model, inputs, ids, max(16, cfg.halt_max_steps))
        marks = [[wrong_cells(cfg, b, l) for b, l in zip(step, labels)] for step in boards]
        wrong = np.array(marks).any(-1)                                                   # (steps, B)
        for i, puzzle in enumerate(pool):
            rank = not wrong[-1, i], wrong[:, i].sum()
            if best is None or rank > best[0]:
                best = rank, puzzle, inputs[i], boards[:, i], [step[i] for step in marks], q[:, i]
    return draw_steps(cfg, path, f"Test puzzle {best[1]}: the answer after each supervision step", *best[2:])


# ---------------------------------------------------------------------------------------------
# Solving one puzzle

def read_puzzle(source, cfg):
    """Tokens (S,) of a Sudoku or maze, or the dict of an ARC task, from a string, a file or stdin ("-")."""
    text = sys.stdin.read() if source == "-" else Path(source).read_text() if os.path.isfile(source) else source
    kind, side = board_kind(cfg), isqrt(cfg.seq_len)
    if kind == "arc":
        try:
            task = json.loads(text)
            grids = [(key, i, part, example[part]) for key in ("train", "test") for i, example in enumerate(task[key])
                     for part in ("input", "output") if part in example or (key, part) != ("test", "output")]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"--solve {source[:60]}: no ARC task ({type(e).__name__}: {e}); give a JSON file of "
                            f'{{"train": [{{"input", "output"}}], "test": [{{"input"}}]}}') from None
        for key, i, part, grid in grids:
            arc.check_grid(grid, f"--solve: {part} of {key} example {i}")
        return task
    if kind == "sudoku":
        cells, alphabet = re.sub(r"[\s|+-]", "", text).replace("0", "."), ".123456789"[:side + 1]
    elif kind == "maze":
        cells, alphabet = "".join(line.ljust(side) for line in text.strip("\r\n").splitlines()), "# SGo"
    else:
        raise UserError("--solve knows Sudoku, mazes and ARC; this checkpoint is of another task: use --show")
    odd = [c for c in cells if c not in alphabet]
    if odd or len(cells) != cfg.seq_len:
        raise UserError(f"--solve: {f'character {odd[0]!r}' if odd else f'{len(cells)} cells'} in the puzzle; this "
                        f"checkpoint solves {kind}s of {side} x {side} cells of '{alphabet}'")
    return np.array([alphabet.index(c) + 1 for c in cells], np.int32)


def rule_breakers(kind, question, board, side):
    """(S,) bool: cells of an answer that change the question, or clash with another cell of a Sudoku."""
    if kind == "maze":
        return (board != question) & ~((question == maze.FREE) & (board == maze.PATH))
    bad = (board != question) & (question > 1) | (board < 2)
    for unit in np.array(sudoku.units(side)).T:     # the row of every cell, its column, its box
        _, cell, count = np.unique(unit * 16 + board, return_inverse=True, return_counts=True)
        bad |= count[cell] > 1
    return bad


SHADES = {"arc": (16, 33, 203, 41, 220, 248, 201, 208, 117, 88), "maze": (16, 240, 255, 41, 208, 33)}


def terminal(kind, grid, bold, bad):
    """Lines of text for a board (rows, columns) of tokens (ARC: of colours), with ANSI colours on a terminal."""
    colour, box = sys.stdout.isatty(), sudoku.BOX[len(grid)] if kind == "sudoku" else None

    def cell(r, c):
        token = int(grid[r, c])
        if kind == "sudoku":
            text, bar = ".123456789"[max(0, token - 1)], "| " if c and c % box[1] == 0 else ""
            style = "41;97" if bad[r, c] else "1" if bold[r, c] else "34"
            return f"{bar}\033[{style}m{text}\033[0m " if colour else f"{bar}{text} "
        if not colour:
            return str(token) if kind == "arc" else " # SGo"[token]
        return f"\033[48;5;{196 if bad[r, c] else SHADES[kind][token]}m  \033[0m"
    lines = ["".join(cell(r, c) for c in range(grid.shape[1])) for r in range(len(grid))]
    if box:
        rule = "+-".join(["--" * box[1]] * (len(grid) // box[1]))
        lines = [line for r, text in enumerate(lines) for line in ([rule] if r and r % box[0] == 0 else []) + [text]]
    return lines


def side_by_side(boards):
    """Print titled boards [(title, lines)] next to each other where 80 columns allow it, else one below the other."""
    def width(line):
        return len(re.sub("\033.*?m", "", line))
    widths = [max(map(width, (title, *lines))) for title, lines in boards]
    if sum(widths) + 4 * (len(boards) - 1) > 80:
        return [print(title, *lines, "", sep="\n") for title, lines in boards]
    for row in zip_longest(*([title, *lines] for title, lines in boards), fillvalue=""):
        print("    ".join(line + " " * (w - width(line)) for line, w in zip(row, widths)).rstrip())
    print()


def pictures(args, cfg, question, boards, marks, q, label=None):
    """What --png and --gif ask for."""
    for draw, path in ((draw_steps, args.png), (animate, args.gif)):
        if path:
            draw(cfg, path, "The answer after each supervision step", question, boards, marks, q, label)
            print(f"wrote {path}")


def solve_board(model, question, args, effort):
    """Solve a Sudoku or a maze and print it; True when it is right by the rules."""
    cfg, kind, side = model.cfg, board_kind(model.cfg), isqrt(model.cfg.seq_len)
    inputs, ids = (torch.from_numpy(a).to(model.y0.device) for a in (question[None], np.zeros(1, np.int32)))
    boards, halts = [], []
    for logits, q in think(model, inputs, ids, effort.of(cfg)):
        boards.append(answer(cfg, logits)[0].cpu().numpy().astype(np.int32))
        halts.append(q[0, 0].item())
        if effort.halt is not None and halts[-1] > effort.halt:
            break
    logits, q = with_effort(model, inputs, ids, effort, 0, logits, q)
    board = answer(cfg, logits)[0].cpu().numpy().astype(np.int32)
    marks = [rule_breakers(kind, question, b, side) for b in (*boards, board)]
    right = bool(sudoku.check(question, board, side) if kind == "sudoku" else maze.check(question, board, side))
    shown = ("question", question, np.zeros(len(board), bool)), ("answer", board, marks[-1])
    side_by_side([(name, terminal(kind, *(a.reshape(side, side) for a in (b, question > 1, bad))))
                  for name, b, bad in shown])
    rule = {"sudoku": "a legal Sudoku that keeps the givens", "maze": "a shortest path from S to G"}[kind]
    print(f"{'RIGHT: the answer is' if right else 'WRONG: the answer is not'} {rule}"
          + (f"; {marks[-1].sum()} cells break the rules" if marks[-1].any() else ""))
    print(f"steps {len(boards)}, q_halt {q[0, 0].item():+.2f}; the answer last changed at step "
          f"{1 + max([i for i, b in enumerate(boards[:-1], 1) if (b != boards[-1]).any()], default=0)}")
    pictures(args, cfg, question, boards, marks, halts)
    return right


def adapt(model, examples, augs, n_steps, whole, batch_size):
    """Train `model` on the demonstrations of an ARC task in the augmentations `augs` [(t, colours)]: one new puzzle row
    each, from the mean row, and with `whole` all weights. As in training: carry, loss, optimizers, learning rates."""
    from train import AdamATan2, Flat, sign_sgd
    rows = [np.frombuffer(b"".join(b), np.uint8).reshape(-1, arc.SIDE ** 2).astype(np.int32)
            for b in arc.render(examples, augs, True, arc.words(0).__next__)]
    inputs, labels = rows[0], np.where(rows[1] == 0, IGNORE, rows[1])
    ids = np.repeat(np.arange(len(augs), dtype=np.int32), len(examples))
    device, rng = model.y0.device, np.random.RandomState(0)
    delta = torch.zeros(batch_size, model.cfg.puzzle_emb_ndim, device=device, requires_grad=True)
    model.train().requires_grad_(whole)
    if whole:
        flat = Flat(model)
        adam = AdamATan2(len(flat.data), device, 0.9, 0.95, 0.1)
    carry, zeros = None, np.zeros(batch_size, np.int32)
    for t in tqdm(range(1, n_steps + 1), desc="adapting", unit="step", leave=False):
        i = rng.randint(len(ids), size=batch_size)
        batch = Batch(*(torch.from_numpy(a).to(device) for a in (inputs[i], labels[i], ids[i], zeros)))
        carry, logits, q = model.step(carry or model.empty_carry(batch), batch, delta)
        (act_loss(model.cfg, carry, logits, q)[0] / batch_size).backward()
        sign_sgd(model.puzzle_emb, carry.puzzle_ids, delta.grad, 1e-2, 0.1)
        delta.grad.zero_()
        if whole:
            adam.step(flat.data, flat.grad, 1e-4, t)
            flat.grad.zero_()
    model.eval()


def solve_task(model, task, args, effort, names):
    """Answer every test input of an ARC task, by the vote of its augmented copies, and print it. True or False when
    outputs are known, else None."""
    examples = [tuple(np.array(e[part], np.uint8) for part in ("input", "output")) for e in task["train"]]
    task_id = Path(args.solve).stem
    rows = [(i, *parse_name(name)[1:]) for i, name in enumerate(names) if name.split("|||")[0] == task_id]
    if args.adapt or not rows:
        augs = arc.augmentations(examples, effort.augment, arc.words(0).__next__)
        model.puzzle_emb = model.puzzle_emb.mean(0).repeat(len(augs), 1)
        rows = [(i, *aug) for i, aug in enumerate(augs)]
        if args.adapt:
            adapt(model, examples, augs, args.adapt, args.adapt_all, args.batch_size or 32)
        else:
            print(f"{task_id} has no row in the checkpoint's table: answering from the mean row; --adapt N trains one")
    rows, verdicts = rows[:1 + effort.augment], []
    for number, example in enumerate(task["test"]):
        given, target = (np.array(example[k], np.uint8) if k in example else None for k in ("input", "output"))
        inputs = np.stack([arc.encode(arc.augment(given, t, colours)) for _, t, colours in rows]).astype(np.int32)
        boards, q = thoughts(model, inputs, [i for i, *_ in rows], effort.of(model.cfg))
        answers = [arc.undo(arc.decode(b), t, colours) for b, (_, t, colours) in zip(boards[-1], rows)]
        keys = [grid_key(a) for a in answers]
        best = max(range(len(rows)), key=lambda i: (keys.count(keys[i]), q[-1, i]))
        verdict = "" if target is None else "RIGHT, " if keys[best] == grid_key(target) else "WRONG, "
        verdicts += [verdict.startswith("RIGHT")] if verdict else []
        shown = {"input": given, "answer": answers[best]} | ({} if target is None else {"target": target})
        print(f"test input {number}:")
        side_by_side([(name, terminal("arc", g, None, np.zeros(g.shape, bool))) for name, g in shown.items()])
        votes = f"{keys.count(keys[best])} of {len(rows)} votes"
        print(f"{verdict}steps {len(boards)}, q_halt {q[-1, best]:+.2f}, {votes}\n")
        if number == 0:
            label = None if target is None else arc.encode(target).astype(np.int32)
            marks = [None if label is None else (b != label) & (label > 0) for b in boards[:, 0]]
            pictures(args, model.cfg, inputs[0], boards[:, 0], marks, q[:, 0], label)
    return all(verdicts) if verdicts else None


def solve(model, args, effort, names):
    """Exit code 0, or 1 when the answer is known to be wrong."""
    puzzle = read_puzzle(args.solve, model.cfg)
    right = (solve_task(model, puzzle, args, effort, names) if isinstance(puzzle, dict) else
             solve_board(model, puzzle, args, effort))
    return int(right is False)


# ---------------------------------------------------------------------------------------------
# Results

def wilson(p, n, z=1.96):
    """95% Wilson interval of a share p of n."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def table(results):
    """The rows (name, text) of what is printed of results.json."""
    rows, part = [], f"   (a part: {results['part']})" if results["part"] else ""
    for name, value in results["metrics"].items():
        note = part if name == "n" else ""
        if name in results["intervals"]:
            low, high, n, unit = results["intervals"][name]
            note = f"   95% interval {low:.4f} .. {high:.4f} of {n:,} {unit}{part}"
        rows.append((name, (f"{value:.4f}" if isinstance(value, float) else f"{value:,}") + note))
    curve = results["exact_acc_by_step"]
    steps = [s for s in (1 << i for i in range(20)) if s < len(curve)] + [len(curve)]
    rows += [("right by step", "  ".join(f"{s}: {curve[s - 1]:.4f}" for s in steps))] if curve else []
    return rows + [(k, f"{v:,.1f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v)
                   for k, v in results["about"].items()]


def compare(*paths):
    """Print whether the second results.json is better: one-sided z-test, and McNemar over the rows that both kept."""
    found = []
    for path in map(Path, paths):
        try:
            results = json.loads(path.read_text())
            name, (_, _, n, _) = next(iter(results["intervals"].items()))
            found.append((name, results["metrics"][name], n))
        except (OSError, ValueError, KeyError, StopIteration) as e:
            raise UserError(f"--compare {path}: no results.json of eval.py ({type(e).__name__}: {e})") from None
    (name, p, n), (other_name, p2, n2) = found
    if name != other_name:
        raise UserError(f"--compare: {paths[0]} measures {name}, {paths[1]} {other_name}; compare the same task")
    pooled = (p * n + p2 * n2) / (n + n2)
    z = (p2 - p) / max(1e-12, math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / n2)))
    print(f"{name}: A {p:.4f} of {n:,}, B {p2:.4f} of {n2:,}: B - A = {p2 - p:+.4f}\n"
          f"two proportions: z = {z:.3f}, one-sided p = {0.5 * math.erfc(z / math.sqrt(2)):.4g} that B is no better")
    files = [Path(path).with_name("right.npz") for path in paths]
    a, b = (np.load(f) if f.exists() else {"row": None, "data": None} for f in files)
    if a["data"] is None or a["data"] != b["data"] or not np.array_equal(a["row"], b["row"]):
        print("McNemar: needs right.npz of the same rows of the same data beside both")
        return
    only_a, only_b = int((a["right"] & ~b["right"]).sum()), int((b["right"] & ~a["right"]).sum())
    n, log_choose = only_a + only_b, lambda n, k: math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    tail = math.fsum(math.exp(log_choose(n, k) - n * math.log(2)) for k in range(only_b, n + 1))   # of a fair coin
    print(f"McNemar: only A right {only_a}, only B right {only_b}; exact one-sided p = {min(1.0, tail):.4g}")


def choose_examples(split, limit, max_aug):
    """The rows to score (n,), and what to call them when they are not all (else None)."""
    examples, part = np.arange(len(split)), []
    if max_aug is not None:
        puzzle = split.puzzle_of(examples)
        group = np.searchsorted(split.group_indices, puzzle, side="right") - 1
        examples, part = examples[puzzle - split.group_indices[group] <= max_aug], [f"{max_aug} augmentations a puzzle"]
    if limit is not None and limit < len(examples):
        examples, part = examples[:limit], [*part, f"the first {limit:,} of {len(examples):,} rows"]
    return examples, ", ".join(part) or None


def default_rows(cfg, device):
    """Rows of a batch of evaluation on one rank."""
    return 768 if device.type == "cuda" else max(1, 2 ** 12 // cfg.length)


LONG = 3e13     # FLOPs that take a CPU minutes: then compiling pays


def full_evaluation(args, world, model, split, effort, path, output):
    """All that is measured on a split, as results.json holds it (rank 0, which also writes the other files)."""
    cfg, (examples, part) = model.cfg, choose_examples(split, args.limit, args.max_aug)
    size = args.batch_size or default_rows(cfg, world.device)
    n_params = sum(p.numel() for p in model.parameters())
    flops = 2 * n_params * cfg.length * cfg.H_cycles * (cfg.L_cycles + 1) * effort.of(cfg) * len(examples) / world.size
    long_work = (world.device.type == "cuda" or flops > LONG) and not compiler_lacks(world.device)
    if args.compile or args.compile is None and long_work:
        compile_model(model)
    about = {"supervision steps": effort.of(cfg), "parameters": n_params,
             "with puzzle table": n_params + model.puzzle_emb.numel(), "device": f"{world.size} x {world.device.type}",
             "precision": cfg.dtype, "batch of a rank": size}
    score(model, split, world, size, examples[:1], Effort(steps=1), progress=False)     # compiles, allocates
    start = time.perf_counter()
    if args.halt:
        sample = examples[:10 * size * world.size]
        full = measure(model, split, world, size, sample, Effort(args.steps))[0]
        speed = len(sample) / (time.perf_counter() - start)
        about["without halting"] = (f"exact_acc {full[metric_names(cfg)[2]]:.4f}, {speed:,.1f} rows/s, on the first "
                                    f"{len(sample):,} rows")
        start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    pool = output / f"votes-{path.stem}.json" if args.pool_votes else None
    keep = args.save_preds or bool(args.show)
    metrics, scores, votes = measure(model, split, world, size, examples, effort, True, keep, pool)
    about["seconds"] = time.perf_counter() - start
    about["rows/s"] = len(examples) / about["seconds"]
    if world.rank:
        return None
    name, rows, right = metric_names(cfg)[2], scores.examples, scores.right
    intervals = {name: [*wilson(metrics[name], len(right)), len(right), "puzzles"]}
    if votes:   # augmented rows are no sample of anything: tasks and test inputs are
        right = np.concatenate(votes.places()) < 2
        n_tasks, rows, pooled = len(votes.places()), np.arange(len(right)), "pass@2 of test inputs"
        metrics = {"pass@1": metrics["pass@1"], "pass@2": metrics["pass@2"], pooled: float(right.mean())} | metrics
        intervals = {"pass@2": [*wilson(metrics["pass@2"], n_tasks), n_tasks, "tasks"],
                     pooled: [*wilson(right.mean(), len(right)), len(right), "test inputs"]}
        write_json(output / "submission.json", votes.submission())
    digest = hashlib.sha256(split.gather(examples[:1000])[0].tobytes()).hexdigest()     # tells --compare the same data
    np.savez(output / "right.npz", row=rows, right=right, data=digest)
    if args.save_preds:
        inputs, labels, ids = split.gather(scores.examples)
        np.savez(output / "predictions.npz", inputs=inputs, labels=labels, puzzle_identifiers=ids, preds=scores.preds,
                 q_halt_logits=scores.q)
    curve = scores.history.mean(0).tolist() if effort.rollouts == 1 and not effort.augment else []
    if args.steps and curve:
        draw_curve(output / "steps.png", curve, len(scores.right))
    if args.show:
        draw_examples(cfg, output / "show.png", split, scores, args.show)
    return {"metrics": metrics, "intervals": intervals, "part": part, "exact_acc_by_step": curve, "about": about,
            "effort": effort._asdict(), "data": [str(d) for d in split.dirs], "identity": split.identity}


def bench(args, world, n):
    """As train.py --bench: time n passes of all supervision steps over one batch, random puzzles and weights."""
    import train
    from torch.utils.flop_counter import FlopCounterMode
    began, device = time.perf_counter(), world.device
    preset = args.preset or "mini"
    settings = train.settings(["--preset", preset])[0]
    cfg = train.config_of(settings, dict(zip(train.SHAPE_KEYS, train.SHAPES[preset])))
    changed = {k: getattr(args, k) for k in ("H_cycles", "L_cycles", "num_heads", "dtype") if getattr(args, k) is not None}
    if cfg.dtype == "auto":
        changed.setdefault("dtype", train.fastest_dtype(device))
    cfg, effort = replace(cfg, num_puzzles=1, **changed), Effort(args.steps)
    rows = args.batch_size or default_rows(cfg, device)
    model = TRM(cfg, torch.Generator().manual_seed(0)).to(device).eval()
    batch = [t.to(device) for t in train.synthetic_batch(cfg, rows)[:3]]

    def evaluate_batch(net, inputs, labels, ids):
        for logits, q in think(net, inputs, ids, effort.of(cfg)):
            all_right(cfg, logits, labels)
        return score_rows(cfg, logits, labels)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        evaluate_batch(TRM(cfg, None).eval(), *(t[:1].to("meta") for t in batch))
    compiled = args.compile is not False and not compiler_lacks(device)
    if compiled:
        compile_model(model)
    evaluate_batch(model, *batch)
    train.wait(device)
    first_s = time.perf_counter() - began
    calls = {"pass": lambda: evaluate_batch(model, *batch)}
    if all(Path(d).exists() for d in settings.data):
        split = Split(settings.data, "test")
        calls["data"] = lambda: split.gather(np.arange(min(rows, len(split))), size=rows)
    times = train.median_ms(calls, n, device, model.dtype)
    forward = train.step_flops(cfg)[0]
    embed = 2 * cfg.seq_len * cfg.hidden_size * (cfg.input_dim or cfg.vocab_size)        # once a pass, not once a step
    flops, counted = rows * (effort.of(cfg) * (forward - embed) + embed), rows * counter.get_total_flops()
    figures = train.speed(cfg, world, rows, flops, counted, times["pass"], times["peak_tflops"])
    train.report({"preset": preset, "what": f"evaluation, {effort.of(cfg)} steps", "compile": compiled, **figures,
                  "first_pass_s": first_s, "data_ms": times.get("data"), "n": n}, world)
    return 0


# ---------------------------------------------------------------------------------------------
# The command line

def parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    onoff = argparse.BooleanOptionalAction
    g = p.add_argument_group("what")
    g.add_argument("--checkpoint", metavar="PATH", help="run folder (its newest) or checkpoint file")
    g.add_argument("--hf", metavar="OWNER/REPO[/FILE]", help="published weights from the hub")
    g.add_argument("--data", nargs="+", metavar="DIR", help="dataset folders (default: the checkpoint's)")
    g.add_argument("--output", metavar="DIR", help="default: beside the checkpoint, or runs/eval-REPO")
    g.add_argument("--H-cycles", type=int, metavar="T", help="overrides the checkpoint")
    g.add_argument("--L-cycles", type=int, metavar="n", help="likewise")
    g.add_argument("--num-heads", type=int, metavar="N", help="likewise")
    g.add_argument("--dtype", choices=["bfloat16", "float32"], help="likewise")
    g.add_argument("--ema", action=onoff, default=True, help="the last weights, not their average")
    g.add_argument("--reset-puzzle-emb", action="store_true", help="every puzzle row = the mean row")
    g.add_argument("--export", metavar="FILE", help="write the published format, and stop")
    g.add_argument("--push", metavar="OWNER/NAME", help="upload weights and the measured result")
    g = p.add_argument_group("score")
    g.add_argument("--limit", type=int, metavar="N", help="the first N rows only")
    g.add_argument("--max-aug", type=int, metavar="N", help="ARC: N augmentations a puzzle")
    g.add_argument("--min-exact", type=float, metavar="X", help="exit 1 when exact_acc is below")
    g.add_argument("--pool-votes", action="store_true", help="ARC: vote with earlier evaluations in --output")
    g.add_argument("--save-preds", action="store_true", help="write predictions.npz")
    g.add_argument("--show", type=int, metavar="N", help="draw N test puzzles: show.png")
    g.add_argument("--compare", nargs=2, metavar="A B", help="two results.json: is B better?")
    g = p.add_argument_group("compute at test time (one of --halt, --rollouts, --augment)")
    g.add_argument("--steps", type=int, metavar="N", help="supervision steps; exact_acc after each: steps.png")
    g.add_argument("--halt", action="store_true", help="stop a row when it is sure, fill its slot")
    g.add_argument("--halt-threshold", type=float, default=0.0, help="q_halt above it is sure")
    g.add_argument("--rollouts", type=int, default=1, metavar="K", help="tries; the surest wins")
    g.add_argument("--noise", type=float, default=0.0, help="on the states of tries 2 .. K")
    g.add_argument("--augment", type=int, default=0, metavar="K", help="vote with K symmetric copies (not ARC data)")
    g = p.add_argument_group("solve one")
    g.add_argument("--solve", metavar="PUZZLE", help="Sudoku, maze or ARC task: text, file or -")
    g.add_argument("--adapt", type=int, default=0, metavar="N", help="ARC: first train a puzzle row for it, N steps")
    g.add_argument("--adapt-all", action="store_true", help="and all weights")
    g.add_argument("--gif", metavar="FILE", help="how it is solved, moving")
    g.add_argument("--png", metavar="FILE", help="the same, side by side")
    g = p.add_argument_group("run")
    g.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="to run on")
    g.add_argument("--bench", nargs="?", const=5, type=int, metavar="N", help="time N passes of a batch, and stop")
    g.add_argument("--preset", metavar="P", help="of --bench: one of train.py's (default mini)")
    g.add_argument("--batch-size", type=int, metavar="N", help="of one rank (default: by device)")
    g.add_argument("--compile", action=onoff, help="torch.compile (default: on a GPU; on a CPU for long work)")
    return p


def check(args):
    """What flags must satisfy together. Raises UserError."""
    def flag(name):
        return "--" + name.replace("_", "-")
    if (bool(args.checkpoint) + bool(args.hf) + bool(args.bench)) != 1:
        raise UserError("give one of --checkpoint, --hf and --bench")
    for name in ("limit", "show", "steps", "rollouts", "batch_size", "H_cycles", "L_cycles", "num_heads", "max_aug",
                 "noise", "augment", "adapt", "bench"):
        value, low = getattr(args, name), int(name not in ("max_aug", "noise", "augment", "adapt"))
        if value is not None and value < low:
            raise UserError(f"{flag(name)} {value} is below {low}; raise it")
    if args.halt + (args.rollouts > 1) + (args.augment > 0) > 1:
        raise UserError("--halt, --rollouts and --augment: only one of them at once; leave the others out")
    for name, needed in (("gif", "solve"), ("png", "solve"), ("adapt", "solve"), ("adapt_all", "adapt"),
                         ("halt_threshold", "halt"), ("preset", "bench")):
        if getattr(args, name) and not getattr(args, needed):
            raise UserError(f"{flag(name)} does nothing without {flag(needed)}; add it")
    if (args.rollouts > 1) != (args.noise > 0):
        raise UserError(f"--rollouts {args.rollouts} --noise {args.noise}: tries differ by noise only; give both, for "
                        f"instance --rollouts 10 --noise 0.3")


def main(argv=None):
    args = parser().parse_args(argv)
    if args.compare:
        return compare(*args.compare)
    check(args)
    world = start_world(args.device, 7200)  # seconds: rank 0 downloads and builds while the others wait
    try:
        return bench(args, world, args.bench) if args.bench else run(args, world)
    finally:
        world.close()


def open_split(dirs, known, world, content):
    """The test split, built first when it is a known one and absent."""
    folder, builder, flags = DATASETS.get(known, (None, None, None))
    if dirs == [folder] and not Path(folder).exists() and world.rank == 0:
        print(f"building {folder}")
        builder.main([*flags, "--output-dir", folder])
    world.gather_objects(None)
    if not dirs:
        raise UserError("--data is missing: this checkpoint does not say which dataset it is for")
    trained = content.get("data", []) if all(Path(d).exists() for d in content.get("data", [])) else []
    return Split(trained or dirs, "test", dirs, content.get("config", {}).get("seq_len"))


def check_task(args, cfg, split):
    """Flags that do something for some tasks only. Raises UserError."""
    for name, there in (("pool_votes", test_puzzles(split) is not None), ("max_aug", test_puzzles(split) is not None),
                        ("augment", args.solve or board_kind(cfg) in ("sudoku", "maze"))):
        if getattr(args, name) and not there:
            raise UserError(f"--{name.replace('_', '-')} does nothing for {split.dirs[0]}; leave it out")
    if args.augment > 7 and board_kind(cfg) == "maze":
        raise UserError(f"--augment {args.augment}: a maze has 7 symmetric copies; lower it")


def run(args, world):
    path, settings, known = fetch(args.hf, world) if args.hf else (find_file(args.checkpoint), {}, None)
    given = {k: getattr(args, k) for k in ("H_cycles", "L_cycles", "num_heads", "dtype")}
    settings |= {k: v for k, v in given.items() if v is not None}
    content = load_file(path)
    dirs, split = args.data or content.get("data_test") or ([DATASETS[known][0]] if known else []), None
    if not args.export and (not args.solve or dirs and all(Path(d).exists() for d in dirs)):
        split = open_split(dirs, known, world, content)
    cfg, state = read_model(content, settings, split.meta["seq_len"] if split else None, args.ema)
    if split:
        check_task(args, cfg, split)
        if args.reset_puzzle_emb:
            cfg = replace(cfg, num_puzzles=split.meta["num_puzzle_identifiers"])
            state["puzzle_emb"] = state["puzzle_emb"].mean(0).repeat(cfg.num_puzzles, 1)
        must_fit(content, cfg, split, args.reset_puzzle_emb)
    model = build(cfg, state).to(world.device).eval()
    if (args.export or args.solve) and world.rank:
        return 0        # rank 0 does it
    if args.export:
        save_file(args.export, to_published(cfg, state))
        print(f"wrote {args.export}; it does not hold: --H-cycles {cfg.H_cycles} --L-cycles {cfg.L_cycles} "
              f"--num-heads {cfg.num_heads}")
        return 0
    effort = Effort(args.steps, args.halt_threshold if args.halt else None, args.rollouts, args.noise, args.augment)
    if args.solve:
        return solve(model, args, effort, split.names if split else [])
    output = Path(args.output or (f"runs/eval-{args.hf.split('/')[1]}" if args.hf else path.parent))
    results = full_evaluation(args, world, model, split, effort, path, output)
    if world.rank == 0:
        weights = "averaged" if args.ema and content.get("ema") else "last"
        print(f"{path}, {weights} weights, on {' '.join(map(str, split.dirs))}")
        print(*(f"{name:<22} {text}" for name, text in table(results)), sep="\n")
        write_json(output / "results.json", results)
        if args.push:
            push(args.push, path, cfg, state, results)
        exact = next(v for k, v in results["metrics"].items() if k in ("exact_acc", "within_tolerance"))
        if args.min_exact is not None and exact < args.min_exact:
            print(f"{exact:.4f} is below --min-exact {args.min_exact}", file=sys.stderr)
            return 1
    return 0


def push(name, path, cfg, state, results):
    """Upload weights in the published format, their config and a card with the measured result."""
    from huggingface_hub import HfApi
    rows = "\n".join(f"| {name} | {text} |" for name, text in table(results))
    card = (f"---\nlibrary_name: pytorch\ntags: [tiny-recursive-model]\n---\n# {name.split('/')[-1]}\n\n"
            f"Weights of a Tiny Recursive Model (arXiv 2510.04871).\n\n| measured | |\n|---|---|\n{rows}\n\n"
            f"Score it: `python eval.py --hf {name}`\n")
    with tempfile.TemporaryDirectory() as tmp:
        save_file(Path(tmp) / path.stem, to_published(cfg, state))
        write_json(Path(tmp) / "config.json", asdict(cfg))
        write_json(Path(tmp) / "results.json", results)
        (Path(tmp) / "README.md").write_text(card)
        try:
            HfApi().create_repo(name, exist_ok=True)
            HfApi().upload_folder(repo_id=name, folder_path=tmp, commit_message="Weights and measured result")
        except Exception as e:
            raise UserError(f"--push {name}: {one_line(e)}; log in with `hf auth login`; the result is kept in "
                            f"results.json") from None
    print(f"pushed to {name}")


if __name__ == "__main__":
    cli(main)
