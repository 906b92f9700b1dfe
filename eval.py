"""Score a checkpoint, look at it think, solve one puzzle.

    python eval.py --checkpoint runs/mini-...     a run folder or one file of it
    python eval.py --hf alphaXiv/trm-model-maze   published weights
    torchrun --nproc_per_node=8 eval.py ...       the same figures, faster
    python eval.py --checkpoint RUN --solve "53..7...."   a Sudoku; or a file
"""
import argparse
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from io import BytesIO
from itertools import chain, repeat
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import DIHEDRAL_INVERSE, HelpFormatter, Split, UserError, cli, dihedral, prefetch, write_json
from model import IGNORE, Batch, CheckpointError, Config, act_loss, build, compile_model, from_published, load_file, metric_names, \
    regression_rows, save_file, to_published, token_rows
from prepare import arc, maze, sudoku
from prepare.arc import ORIGINAL, TO_TOKEN, crop, parse_name


@contextmanager
def peers():
    """Around a collective: a rank that died or hangs becomes one line. Raises UserError."""
    try:
        yield
    except RuntimeError as e:
        raise UserError(f"another rank died or hangs ({str(e).splitlines()[0][:150]}); look for its own message above, and start "
                        f"again (train.py: with --resume)") from None


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


def start_world(device, timeout_s):
    """Join the other processes when torchrun started this one (it sets RANK, WORLD_SIZE and LOCAL_RANK)."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        with peers():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                    timeout=timedelta(seconds=timeout_s))
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
    """Yield (logits (B, S, V), q (B, 2)) after each of `steps` supervision steps; x is embedded once."""
    with torch.no_grad():  # not inference_mode: training's compiled graphs are used again
        x = model.embed(inputs, model.puzzle_emb[puzzle_ids])                             # (B, L, D)
        y, z = (start.to(model.dtype).expand_as(x).contiguous() for start in (model.y0, model.z0))
        for _ in range(steps):
            if noise:
                y, z = (h + noise * torch.randn(h.shape, generator=generator, device=h.device, dtype=h.dtype) for h in (y, z))
            y, z = model.improve(x, y, z)
            yield model.heads(y)


def answer(cfg, logits):
    """Tokens (B, S) that the logits stand for; in regression the numbers (B, S, target_dim) as they are."""
    return logits.float() if cfg.regression else logits.argmax(-1).to(torch.uint8 if cfg.vocab_size < 256 else torch.int32)


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
    bar = tqdm(total=sum(map(len, mine)), desc="evaluating", unit="row", leave=False, disable=not progress or world.rank > 0)
    for rows, columns, logits in (run_halting if effort.halt is not None else run_full)(model, split, mine, batch_size, effort):
        table = torch.stack([c.float() for c in columns], 1).cpu().numpy()[:len(rows)]
        preds = answer(cfg, logits).cpu().numpy()[:len(rows)] if keep_preds else np.zeros((len(rows), 0), np.uint8)
        asked = np.flatnonzero(table[:, 0])
        parts.append((rows[asked], table[asked], preds[asked]))
        bar.update(len(rows))
    bar.close()
    rows, table, preds = (np.concatenate(p) for p in zip(*parts))
    order = rows.argsort()
    _, loss, cell, right, q, steps = table[order, :6].T.astype(np.float64)
    return Scores(rows[order], loss, cell, right > 0, q, steps, table[order, 6:] > 0, preds[order])


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
    """(logits, q) of a plain pass to those of effort.rollouts tries or effort.augment copies; seed: of what is random."""
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
    boards, sure = torch.stack([t.argmax(-1) for t in tries]), torch.stack(halts)[..., 0].sigmoid()   # (K, B, S), (K, B)
    rank = []
    for board in boards:
        same = (boards == board).all(-1)
        votes = same.sum(0)
        rank.append(votes + (same * sure).sum(0) / votes * 0.5)
    best = torch.stack(rank).argmax(0).tolist()
    return (torch.stack([tries[k][i] for i, k in enumerate(best)]), torch.stack([halts[k][i] for i, k in enumerate(best)]))


# ---------------------------------------------------------------------------------------------
# ARC voting

PASS_K = (1, 2, 5, 10, 100, 1000)
CHUNK = 8192                                     # rows undone at once: more do not fit the cache


def test_puzzles(split):
    """test_puzzles.json of the split's folders, {id: {"train": ..., "test": [{input, output}]}}; None: not ARC."""
    files = [d / "test_puzzles.json" for d in split.dirs]
    return {k: v for f in files for k, v in json.loads(f.read_text()).items()} if all(f.exists() for f in files) else None


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
        self.identifiers, self.partial = identifiers, partial
        self.tasks, self.tests = {}, {}          # (id, input): number; id: [(number, right output)] per test input
        for name, puzzle in test_puzzles.items():
            for e in puzzle["test"]:             # equal inputs of a puzzle share their votes
                task = self.tasks.setdefault((name, grid_key(e["input"])), len(self.tasks))
                self.tests.setdefault(name, []).append((task, grid_key(e["output"])))
        self.waiting, self.row, self.q = [], [], []      # per batch
        self.task, self.grid, self.grids = [], [], {}    # per vote: test input, candidate; all candidates in order

    def add(self, inputs, preds, q_halt, identifiers, rows):
        """One batch of arrays: (B, 900) tokens twice, (B,) logits, (B,) rows of the puzzle table, 0 for padding.

        rows: (B,) their places in the test split (of equal candidates that of the first row wins).
        Raises UserError when a row belongs to no test input.
        """
        real = np.flatnonzero(identifiers)
        self.waiting.append((inputs[real].astype(np.uint8), preds[real].astype(np.uint8), identifiers[real]))
        self.row.append(rows[real])
        self.q.append(np.exp(-np.logaddexp(0, -q_halt[real].astype(np.float64))))
        if sum(len(batch[2]) for batch in self.waiting) >= CHUNK:
            self.count()

    def count(self):
        """Turn the rows that wait into votes."""
        inputs, preds, identifiers = map(np.concatenate, zip(*self.waiting))
        self.waiting = []
        if not len(identifiers):
            return
        names, t, colours = zip(*(parse_name(self.identifiers[i]) for i in identifiers.tolist()))
        t, tables = np.array(t), [bytes.maketrans(c.translate(TO_TOKEN), ORIGINAL) for c in colours]
        for name, given, answer in zip(names, undo_rows(inputs, t, tables), undo_rows(preds, t, tables)):
            if (name, given) not in self.tasks:
                raise UserError(f"a row of the test split is no test input of puzzle {name} in test_puzzles.json: "
                                f"they were not built together; build both again with prepare/arc.py")
            self.task.append(self.tasks[name, given])
            self.grid.append(self.grids.setdefault(answer, len(self.grids)))

    def payload(self):
        """What rank 0 needs: per vote its row, test input, candidate (a place in grids) and sigmoid(q_halt)."""
        if self.waiting:
            self.count()
        return {"row": np.concatenate([np.zeros(0, np.int64), *self.row]), "q": np.concatenate([np.zeros(0), *self.q]),
                "task": np.array(self.task, np.int32), "grid": np.array(self.grid, np.int32), "grids": list(self.grids)}

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
        """Write the payloads of this evaluation to votes-NAME.json, and merge those of all such files beside it; returns
        how many there are."""
        write_json(path, [{**{k: v.tolist() for k, v in p.items() if k != "grids"}, "grids": [g.hex() for g in p["grids"]]}
                          for p in payloads])
        files = sorted(path.parent.glob("votes-*.json"))
        self.merge([{**{k: np.array(v) for k, v in p.items()}, "grids": [bytes.fromhex(g) for g in p["grids"]]}
                    for f in files for p in json.loads(f.read_text())])
        return len(files)

    def places(self):
        """Per puzzle the places (from 0, inf: none) of the right outputs of its test inputs among the candidates."""
        def place(task, right):
            return self.ranked[task].index(right) if right in self.ranked[task] else np.inf
        return [np.array([place(*test) for test in tests]) for tests in self.tests.values()
                if not self.partial or any(self.ranked[task] for task, _ in tests)]

    def result(self):
        """-> {"pass@K": mean over puzzles of the mean over test inputs (the official figure), "hits@K": test inputs
        solved, ..., "puzzles", "inputs": how many there are}. Whatever has no votes is not solved; when self.partial,
        puzzles without any votes are left out."""
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
    "Sanjin2024/TinyRecursiveModels-ARC-AGI-1": (3, 4, "arc1"), "Sanjin2024/TinyRecursiveModels-ARC-AGI-2": (3, 4, "arc2"),
}
ARC2 = ["--subsets", "training2", "evaluation2", "concept", "--test-set-name", "evaluation2"]
DATASETS = {  # folder, builder and its flags
    "sudoku": ("data/sudoku-extreme-1k-aug-1000", sudoku, ["--subsample-size", "1000", "--num-aug", "1000"]),
    "maze": ("data/maze-30x30-hard-1k", maze, []),
    "arc1": ("data/arc1concept-aug-1000", arc, []), "arc2": ("data/arc2concept-aug-1000", arc, ARC2),
}
NO_WEIGHTS = re.compile(r"\.(json|ya?ml|md|txt|py|png|gif|jpe?g|pdf|npz?|csv|lock|log|sh|gitattributes|gitignore)$|^LICENSE", re.I)


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
            files = HfApi().list_repo_files(repo)
            wanted = pick_file(repo, files, wanted)
            for file in [f for f in files if Path(f).name in ("config.json", "all_config.yaml")] + [wanted]:
                hf_hub_download(repo, file, local_dir=folder)
        except UserError:
            raise
        except Exception as e:  # the client raises its own errors, httpx's or requests', by its version
            there = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and ".cache" not in f.parts]
            reason = (str(e).strip() or type(e).__name__).splitlines()[0][:120]
            if not wanted and not any(not NO_WEIGHTS.search(f) for f in there) or wanted and wanted not in there:
                raise UserError(f"cannot download from {repo} ({reason}); fetch {wanted or 'its checkpoint file'} from "
                                f"https://huggingface.co/{repo} and put it at {folder / (wanted or 'FILE')}") from None
            wanted = pick_file(repo, there, wanted)
            print(f"cannot reach {repo} ({reason}): using {folder / wanted}", file=sys.stderr)
    path = folder / world.gather_objects(wanted)[0]
    key = next((k for k in KNOWN if f"{repo}/{path.relative_to(folder)}/".startswith(k + "/")), None)
    T, n, data = KNOWN.get(key, (None, None, None))
    settings = {"H_cycles": T, "L_cycles": n} if key else {}
    for config in chain(folder.rglob("config.json"), folder.rglob("all_config.yaml")):
        if path.is_relative_to(config.parent):
            settings |= read_config(config.read_text())
    return path, settings, data


def pick_file(repo, files, wanted):
    """The checkpoint among the files of a repository. Raises UserError that lists them when there is not one."""
    found = [f for f in files if not NO_WEIGHTS.search(Path(f).name) and not Path(f).name.startswith(".")]
    if wanted in files or len(found) == 1 and not wanted:
        return wanted or found[0]
    raise UserError(f"{repo} has {f'no file {wanted}' if wanted else f'{len(found)} checkpoint files'}; choose one: "
                    + ", ".join(f"--hf {repo}/{f}" for f in found or files))


def read_config(text):
    """The settings of Config that a JSON or a simple YAML file gives, at any depth."""
    kinds = {"H_cycles": int, "L_cycles": int, "num_heads": int, "puzzle_emb_len": int, "halt_max_steps": int, "pos_encodings": str}
    found = re.findall(r"^[\s{,]*\"?(\w+)\"?\s*:\s*\"?([\w.]+)\"?\s*,?\s*}?\s*$", text.replace(",", ",\n").replace("{", "{\n"), re.M)
    return {k: kinds[k](v) for k, v in found if k in kinds}


def find_file(path):
    """The newest checkpoint of a run folder, or the file itself."""
    path = Path(path)
    if path.is_dir():
        newest = path / "latest.txt"
        if not newest.exists():
            raise UserError(f"{path} holds no latest.txt, so it is no run folder; name a run folder or a checkpoint file")
        return path / newest.read_text().strip()
    return path


def read_model(content, settings, seq_len, ema):
    """(Config, state dict) of a checkpoint file's content, ours or published. settings win over what it says."""
    if "config" in content:
        state = {**content["model"], **((ema and content["ema"]) or {})}
        return Config(**{**content["config"], **settings}), state
    lacking = [f"--{k.replace('_', '-')}" for k in ("H_cycles", "L_cycles") if k not in settings]
    if lacking:
        raise UserError(f"this published checkpoint does not say {' and '.join(lacking)}; give them (3 and 6 for sudoku, "
                        f"3 and 4 for maze and ARC)")
    if not any("mlp_t" in key for key in content):  # the shapes of attention do not tell the length
        vocab_size = next((len(v) for k, v in content.items() if k.endswith("embedding_weight")), 0)
        settings = {**settings, "seq_len": seq_len or {11: 81}.get(vocab_size, 900)}
    return from_published(content, settings)


def must_fit(content, cfg, split, reset):
    """Refuse a dataset that the checkpoint was not made for. Raises UserError."""
    dirs, meta = " ".join(map(str, split.dirs)), split.meta
    for name, ours in (("seq_len", cfg.seq_len), ("vocab_size", cfg.vocab_size), ("input_dim", cfg.input_dim),
                       ("target_dim", cfg.target_dim)):
        if meta.get(name, 0) != ours:
            raise UserError(f"{dirs} has {name} {meta.get(name, 0)}, the checkpoint {ours}; give the dataset it was made for "
                            f"with --data")
    cure = "give its dataset with --data, or --reset-puzzle-emb to replace every row by the mean row"
    rows = meta["num_puzzle_identifiers"]
    if not reset and content.get("identity", split.identity) != split.identity:
        raise UserError(f"the puzzles of {dirs} are not those the checkpoint was trained on (its identifiers.json differs, "
                        f"sha256 {split.identity[:12]}, not {content['identity'][:12]}); trained on "
                        f"{' '.join(content.get('data', []))}: {cure}")
    if not reset and cfg.num_puzzles != rows:
        raise UserError(f"the checkpoint's puzzle table has {cfg.num_puzzles:,} rows, {dirs} has {rows:,} identifiers; {cure}")


# ---------------------------------------------------------------------------------------------
# Pictures

ARC_COLOURS = ("#FFFFFF", "#D9D9D9",    # outside of the grid, end line
               "#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00", "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25")
MAZE_COLOURS = ("#FFFFFF", "#37474F", "#FFFFFF", "#2ECC40", "#FF851B", "#64B5F6")   # pad, wall, open, S, G, path
WRONG = "#D50000"


def board_kind(cfg):
    """"sudoku", "maze", "arc", "numbers" (regression) or "tokens", from the shapes of the data."""
    side = isqrt(cfg.seq_len)
    if cfg.regression:
        return "numbers"
    if side in (4, 6, 9) and (cfg.seq_len, cfg.vocab_size) == (side * side, side + 2):
        return "sudoku"
    return {6: "maze", 12: "arc"}.get(cfg.vocab_size, "tokens") if side * side == cfg.seq_len else "tokens"


def draw_board(ax, cfg, board, question=None, wrong=None):
    """Draw one board (S,) of tokens, or (S, d) of numbers. `question` tells the givens of a Sudoku; the cells where
    `wrong` (S,) is true are marked."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle
    kind, side = board_kind(cfg), isqrt(cfg.seq_len)
    width = side if side * side == cfg.seq_len else cfg.seq_len
    ax.set_xticks([])
    ax.set_yticks([])
    marks = np.flatnonzero(wrong) if wrong is not None else []
    if kind == "numbers":
        ax.imshow(np.asarray(board, np.float32).T, aspect="auto", cmap="viridis")
        for i in marks:
            ax.axvspan(i - 0.5, i + 0.5, color=WRONG, alpha=0.3)
        return
    grid = np.asarray(board).reshape(-1, width)
    if kind == "sudoku":
        from prepare.sudoku import BOX
        ax.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5), aspect="equal")
        rows, cols = BOX[side]
        for i in range(side + 1):
            ax.axhline(i - 0.5, color="black", lw=1.6 if i % rows == 0 else 0.4)
            ax.axvline(i - 0.5, color="black", lw=1.6 if i % cols == 0 else 0.4)
        for (r, c), token in np.ndenumerate(grid):
            given = question is not None and question[r * side + c] > 1
            bad = wrong is not None and wrong[r * side + c]
            if bad or given:
                ax.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, color="#FFCDD2" if bad else "#E6E6E6", lw=0))
            if token > 1:
                ax.text(c, r + 0.03, str(token - 1), ha="center", va="center", fontsize=120 / (side + 2),
                        color=WRONG if bad else "black" if given else "#0D47A1", weight="bold" if given else "normal")
        return
    colours = {"arc": ARC_COLOURS, "maze": MAZE_COLOURS}.get(kind)
    ax.imshow(grid, cmap=ListedColormap(colours) if colours else "tab20", vmin=0, vmax=cfg.vocab_size - 1)
    if kind == "arc":
        ax.set_xticks(np.arange(0.5, width - 1), minor=True)
        ax.set_yticks(np.arange(0.5, len(grid) - 1), minor=True)
        ax.grid(which="minor", color="#888888", lw=0.2)
        ax.tick_params(which="minor", length=0)
    ax.scatter([i % width for i in marks], [i // width for i in marks], marker="x", color=WRONG, s=max(8, 900 / width))


def legend_handles(cfg):
    """Patches and marks that explain draw_board."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    cross = Line2D([], [], color=WRONG, marker="x", ls="", label="wrong cell")
    return {"sudoku": [Patch(color="#E6E6E6", label="given"), Patch(color="#0D47A1", label="answer"),
                       Patch(color="#FFCDD2", label="wrong cell")],
            "maze": [Patch(facecolor=c, edgecolor="grey", label=name) for c, name in
                     zip(MAZE_COLOURS[1:], ("wall", "open", "start", "goal", "path"))] + [cross],
            "numbers": [Patch(color=WRONG, alpha=0.3, label="outside the tolerance")]}.get(board_kind(cfg), [cross])


def wrong_cells(cfg, board, label):
    """(S,) bool of one predicted board against its label."""
    if cfg.regression:
        return (np.square(board - label).mean(-1) >= cfg.halt_tolerance) & ~np.isnan(label).any(-1)
    return (board != label) & (label != IGNORE)


def thoughts(model, inputs, puzzle_ids, steps):
    """Boards (steps, B, ...) and q_halt (steps, B) after every supervision step, as numpy; inputs are arrays."""
    device = model.y0.device
    seen = [(answer(model.cfg, logits).cpu().numpy(), q[:, 0].cpu().numpy()) for logits, q in
            think(model, torch.as_tensor(inputs, device=device), torch.as_tensor(puzzle_ids, device=device), steps)]
    return tuple(map(np.stack, zip(*seen)))


def canvas(n, columns):
    """A figure 1200 pixels wide with n axes in rows of `columns`, and room for a title and a legend."""
    from matplotlib.figure import Figure
    rows = -(-n // columns)
    height = rows * (12 / columns + 0.25) + 1.0
    figure = Figure(figsize=(12, height), dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.6 / height, top=1 - 0.8 / height, wspace=0.08, hspace=0.16)
    for ax in axes[n:]:
        ax.set_axis_off()
    return figure, axes


def save_picture(figure, cfg, path, title):
    figure.suptitle(title, fontsize=14)
    figure.legend(handles=legend_handles(cfg), loc="lower center", ncols=6, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def step_title(step, marks, q):
    count = "" if marks is None else f": {marks.sum()} wrong" if marks.any() else ": no cell wrong"
    return f"step {step}{count}, q_halt {q:+.1f}"


def draw_steps(cfg, path, title, question, boards, marks, q, label=None, steps=(1, 2, 4, 8, 16)):
    """PNG of one puzzle: the question, its answer after some supervision steps, the target if it is given."""
    steps = [s for s in steps if s < len(boards)] + [len(boards)]
    figure, axes = canvas(len(steps) + 1 + (label is not None), 4 if label is not None else 3)
    draw_board(axes[0], cfg, question, question)
    axes[0].set_title("question")
    for ax, step in zip(axes[1:], steps):
        draw_board(ax, cfg, boards[step - 1], question, marks[step - 1])
        ax.set_title(step_title(step, marks[step - 1], q[step - 1]), fontsize=10)
    if label is not None:
        draw_board(axes[len(steps) + 1], cfg, label, question)
        axes[len(steps) + 1].set_title("target")
    return save_picture(figure, cfg, path, title)


def animate(cfg, path, title, question, boards, marks, q, label=None):
    """GIF of the answer, supervision step by step, beside the question and the target if it is given."""
    from matplotlib.animation import PillowWriter
    n = 2 + (label is not None)
    figure, axes = canvas(n, n)
    for ax, board, name in ((axes[0], question, "question"), (axes[-1], label, "target")):
        if board is not None:
            draw_board(ax, cfg, board, question)
            ax.set_title(name)
    figure.suptitle(title, fontsize=14)
    figure.legend(handles=legend_handles(cfg), loc="lower center", ncols=6, frameon=False)
    writer = PillowWriter(fps=2)
    with writer.saving(figure, path, dpi=100):
        for i in [*range(len(boards)), *[len(boards) - 1] * 4]:     # the last one stays for a while
            axes[1].clear()
            draw_board(axes[1], cfg, boards[i], question, marks[i])
            axes[1].set_title(step_title(i + 1, marks[i], q[i]))
            writer.grab_frame()


def draw_curve(path, curve, n):
    """PNG of the share of right puzzles after every supervision step."""
    figure, (ax,) = canvas(1, 1)
    figure.set_size_inches(12, 5)
    figure.subplots_adjust(left=0.08, bottom=0.13, right=0.97, top=0.9)
    ax.plot(range(1, len(curve) + 1), curve, marker="o" if len(curve) < 40 else None)
    ax.set(xlabel="supervision steps", ylabel="right puzzles", title=f"{n:,} puzzles: {curve[-1]:.4f} right after {len(curve)} steps")
    ax.grid(alpha=0.3)
    figure.savefig(path)


def draw_examples(cfg, path, split, scores, n):
    """PNG of n test puzzles, half of them wrong ones where there are any: question, answer and target."""
    wrong, right = np.flatnonzero(~scores.right), np.flatnonzero(scores.right)
    take = max(min(len(wrong), n // 2), n - len(right))
    chosen = [*wrong[:take], *right[:n - take]]
    figure, axes = canvas(3 * len(chosen), 6)
    inputs, labels, _ = split.gather(scores.examples[chosen])
    for i, row in enumerate(chosen):
        board, label = scores.preds[row], labels[i]
        marks = wrong_cells(cfg, board, label)
        shown = label if cfg.regression else np.where(label == IGNORE, 0, label)
        for ax, b, m, name in zip(axes[3 * i:], (inputs[i], board, shown), (None, marks, None),
                                  (f"puzzle {scores.examples[row]}", f"{marks.sum()} wrong" if marks.any() else "right", "target")):
            draw_board(ax, cfg, b, inputs[i], m)
            ax.set_title(name, fontsize=10)
    save_picture(figure, cfg, path, f"Test puzzles: question, answer, target")


def puzzle_picture(model, split, path, batch_size):
    """PNG of one hard test puzzle at some supervision steps, wrong cells marked: of the batch_size puzzles with the
    most blanks (not Sudoku: the first ones) the one that was wrong the longest and right in the end."""
    cfg, pool = model.cfg, np.arange(min(len(split), 10_000))
    if board_kind(cfg) == "sudoku":
        pool = pool[np.argsort(-(split.gather(pool)[0] == 1).sum(-1), kind="stable")]
    pool = pool[:batch_size]
    inputs, labels, ids = split.gather(pool, size=batch_size)
    boards, q = thoughts(model, inputs, ids, cfg.halt_max_steps)
    marks = [[wrong_cells(cfg, b, l) for b, l in zip(step, labels)] for step in boards]
    wrong = np.array(marks).any(-1)                                                       # (steps, B)
    i = max(range(len(pool)), key=lambda i: (not wrong[-1, i], wrong[:, i].sum(), -i))
    return draw_steps(cfg, path, f"Test puzzle {pool[i]}: the answer after each supervision step", inputs[i], boards[:, i],
                      [step[i] for step in marks], q[:, i])


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
        cells, alphabet = [c for c in text if c not in " |+-\r\n\t"], ".123456789"[:side + 1]
        cells = ["." if c == "0" else c for c in cells]
    elif kind == "maze":
        cells, alphabet = [c for line in text.strip("\r\n").splitlines() for c in line.ljust(side)], "# SGo"
    else:
        raise UserError("--solve knows Sudoku, mazes and ARC; this checkpoint is of another task: use --show and --save-preds")
    odd = [c for c in cells if c not in alphabet]
    if odd or len(cells) != cfg.seq_len:
        raise UserError(f"--solve: {f'character {odd[0]!r}' if odd else f'{len(cells)} cells'} in the puzzle; this checkpoint "
                        f"solves {kind}s of {side} x {side} cells of '{alphabet}'")
    return np.array([alphabet.index(c) + 1 for c in cells], np.int32)


def rule_breakers(kind, question, board, side):
    """(S,) bool: cells of an answer that change the question, or clash with another cell of a Sudoku."""
    if kind == "maze":
        return (board != question) & ~((question == maze.FREE) & (board == maze.PATH))
    bad = (board != question) & (question > 1) | (board < 2)
    for unit in sudoku.units(side):
        _, cell, count = np.unique(unit * 16 + board, return_inverse=True, return_counts=True)
        bad |= count[cell] > 1
    return bad


def terminal(kind, grid, given=None, bad=None, colour=False):
    """Lines of text for a board (rows, columns) of tokens (ARC: of colours), with ANSI colours if asked for."""
    def cell(r, c):
        token = int(grid[r, c])
        if kind == "sudoku":
            style = "41;97" if bad is not None and bad[r, c] else "1" if given is not None and given[r, c] else "34"
            text = "." if token < 2 else str(token - 1)
            bar = "| " if c and c % box[1] == 0 else ""
            return f"{bar}\033[{style}m{text}\033[0m " if colour else f"{bar}{text} "
        if not colour:
            return str(token) if kind == "arc" else " # SGo"[token]
        shade = (16, 33, 203, 41, 220, 248, 201, 208, 117, 88)[token] if kind == "arc" else (16, 240, 255, 41, 208, 33)[token]
        return f"\033[48;5;{88 if kind == 'maze' and bad is not None and bad[r, c] else shade}m  \033[0m"
    box = sudoku.BOX[len(grid)] if kind == "sudoku" else None
    lines = ["".join(cell(r, c) for c in range(grid.shape[1])) for r in range(len(grid))]
    if box:
        rule = "+-".join(["--" * box[1]] * (len(grid) // box[1]))
        lines = [line for r, text in enumerate(lines) for line in ([rule] if r and r % box[0] == 0 else []) + [text]]
    return lines


def side_by_side(boards):
    """Print titled boards [(title, lines)] next to each other where 80 columns allow it, else one below the other."""
    plain = [[re.sub("\033.*?m", "", line) for line in lines] for _, lines in boards]
    widths = [max(map(len, (title, *lines))) for (title, _), lines in zip(boards, plain)]
    if sum(widths) + 4 * (len(boards) - 1) > 80:
        for title, lines in boards:
            print(title, *lines, "", sep="\n")
        return
    print("    ".join(f"{title:<{w}}" for (title, _), w in zip(boards, widths)).rstrip())
    for r in range(max(len(lines) for _, lines in boards)):
        print("    ".join(lines[r] + " " * (w - len(bare[r])) if r < len(lines) else " " * w
                          for (_, lines), bare, w in zip(boards, plain, widths)).rstrip())
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
        boards.append(answer(cfg, logits)[0].cpu().numpy())
        halts.append(q[0, 0].item())
        if effort.halt is not None and halts[-1] > effort.halt:
            break
    logits, q = with_effort(model, inputs, ids, effort, 0, logits, q)
    board = answer(cfg, logits)[0].cpu().numpy().astype(np.int32)
    bad = rule_breakers(kind, question, board, side)
    right = bool(sudoku.check(question, board, side) if kind == "sudoku" else maze.check(question, board, side))
    given, square = (question > 1).reshape(side, side), (side, side)
    side_by_side([("question", terminal(kind, question.reshape(square), given, None, sys.stdout.isatty())),
                  ("answer", terminal(kind, board.reshape(square), given, bad.reshape(square), sys.stdout.isatty()))])
    rule = {"sudoku": "a legal Sudoku that keeps the givens", "maze": "a shortest path from S to G"}[kind]
    print(f"{'RIGHT' if right else 'WRONG'}: the answer is {'' if right else 'not '}{rule}"
          + (f"; {bad.sum()} cells break the rules" if bad.any() else ""))
    print(f"steps {len(boards)}, q_halt {q[0, 0].item():+.2f}; the answer did not change after step "
          f"{1 + max([i for i, b in enumerate(boards[:-1], 1) if (b != boards[-1]).any()], default=0)}")
    pictures(args, cfg, question, boards, [rule_breakers(kind, question, b, side) for b in boards], halts)
    return right


def adapt(model, task, augs, n_steps, whole, batch_size=32):
    """Train `model` on the demonstrations of an ARC task in the augmentations `augs` [(t, colours)]: one new puzzle row
    each, from the mean row, and with `whole` all weights. As in training: carry, loss, optimizers, learning rates."""
    from train import AdamATan2, Flat, sign_sgd
    examples = [tuple(np.array(e[part], np.uint8) for part in ("input", "output")) for e in task["train"]]
    inputs, labels = BytesIO(), BytesIO()
    arc.write_examples(inputs, labels, examples, augs, True, arc.words(0).__next__)
    inputs, labels = (torch.from_numpy(np.frombuffer(b.getvalue(), np.uint8).reshape(-1, arc.SIDE ** 2).astype(np.int32))
                      for b in (inputs, labels))
    labels[labels == 0] = IGNORE
    ids = torch.arange(len(augs), dtype=torch.int32).repeat_interleave(len(examples))
    device, generator = model.y0.device, torch.Generator().manual_seed(0)
    delta = torch.zeros(batch_size, model.cfg.puzzle_emb_ndim, device=device, requires_grad=True)
    model.train().requires_grad_(whole)
    flat = Flat(model) if whole else None
    adam = AdamATan2(len(flat.data), device, 0.9, 0.95, 0.1) if whole else None
    carry, zeros = None, torch.zeros(batch_size, dtype=torch.int32)
    for t in tqdm(range(1, n_steps + 1), desc="adapting", unit="step", leave=False):
        rows = torch.randint(len(ids), (batch_size,), generator=generator)
        batch = Batch(*(a.to(device) for a in (inputs[rows], labels[rows], ids[rows], zeros)))
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
    the outputs are known, else None."""
    examples = [tuple(np.array(e[part], np.uint8) for part in ("input", "output")) for e in task["train"]]
    task_id = Path(args.solve).stem
    rows = [(i, *arc.parse_name(name)[1:]) for i, name in enumerate(names) if name.split("|||")[0] == task_id]
    if args.adapt or not rows:
        augs = arc.augmentations(examples, effort.augment, arc.words(0).__next__)
        model.puzzle_emb = model.puzzle_emb.mean(0).repeat(len(augs), 1)
        rows = [(i, t, colours) for i, (t, colours) in enumerate(augs)]
        if args.adapt:
            adapt(model, task, augs, args.adapt, args.adapt_all)
        else:
            print(f"{task_id} is not in the checkpoint's puzzle table: answering from the mean row; --adapt N trains a row")
    rows = rows[:1 + effort.augment]
    verdicts, colour = [], sys.stdout.isatty()
    for number, example in enumerate(task["test"]):
        given = np.array(example["input"], np.uint8)
        inputs = np.stack([arc.encode(arc.augment(given, t, colours)) for _, t, colours in rows]).astype(np.int32)
        boards, q = thoughts(model, inputs, [i for i, *_ in rows], effort.of(model.cfg))
        answers = [arc.undo(arc.decode(b), t, colours) for b, (_, t, colours) in zip(boards[-1], rows)]
        votes = Counter(map(grid_key, answers))
        best = max(range(len(rows)), key=lambda i: (votes[grid_key(answers[i])], q[-1, i]))
        shown = [("input", terminal("arc", given, colour=colour)), ("answer", terminal("arc", answers[best], colour=colour))]
        label = None
        if "output" in example:
            target = np.array(example["output"], np.uint8)
            label = arc.encode(target).astype(np.int32)
            shown.append(("target", terminal("arc", target, colour=colour)))
            verdicts.append(grid_key(target) == grid_key(answers[best]))
        print(f"test input {number}:")
        side_by_side(shown)
        verdict = "RIGHT, " if verdicts and verdicts[-1] else "WRONG, " if verdicts else ""
        print(f"{verdict}steps {len(boards)}, q_halt {q[-1, best]:+.2f}, {votes[grid_key(answers[best])]} of {len(rows)} votes")
        if number == 0:
            marks = [None if label is None else (b != label) & (label > 0) for b in boards[:, 0]]
            pictures(args, model.cfg, inputs[0], boards[:, 0], marks, q[:, 0], label)
    return all(verdicts) if verdicts else None


def solve(model, args, effort, names):
    """Exit code 0, or 1 when the answer is known to be wrong."""
    puzzle = read_puzzle(args.solve, model.cfg)
    right = solve_task(model, puzzle, args, effort, names) if isinstance(puzzle, dict) else solve_board(model, puzzle, args, effort)
    return int(right is False)


# ---------------------------------------------------------------------------------------------
# Results

def wilson(p, n, z=1.96):
    """95% Wilson interval of a share p of n."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def print_table(rows):
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def table(results):
    """The rows (name, text) that are printed of results.json."""
    part = f"   (a part: {results['part']})" if results["part"] else ""
    rows = []
    for name, value in results["metrics"].items():
        note = ""
        if name in results["intervals"]:
            low, high, n, unit = results["intervals"][name]
            note = f"   95% interval {low:.4f} .. {high:.4f} of {n:,} {unit}"
        text = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        rows.append((name, text + (note + part if note or name == "n" else "")))
    curve = results["exact_acc_by_step"]
    shown = [s for s in (1 << i for i in range(20)) if s < len(curve)] + [len(curve)] * bool(curve)
    rows += [("right by step", "  ".join(f"{s}: {curve[s - 1]:.4f}" for s in shown))] if curve else []
    return rows + [(k.replace("_", " "), f"{v:,.1f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v)
                   for k, v in results["about"].items()]


def compare(a, b):
    """Print whether B is better than A (two results.json): one-sided z-test, and McNemar over rows that both kept."""
    found = []
    for path in map(Path, (a, b)):
        try:
            results = json.loads(path.read_text())
            name = next(iter(results["intervals"]))
            found.append((path, results["metrics"][name], results["intervals"][name][2], name))
        except (OSError, ValueError, KeyError, StopIteration) as e:
            raise UserError(f"--compare {path}: no results.json of eval.py ({type(e).__name__}: {e})") from None
    (path_a, p, n, name), (path_b, p2, n2, name2) = found
    if name != name2:
        raise UserError(f"--compare: {a} measures {name}, {b} {name2}; compare evaluations of the same task")
    pooled = (p * n + p2 * n2) / (n + n2)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / n2))
    z = (p2 - p) / error if error else 0.0
    print(f"{name}: A {p:.4f} of {n:,}, B {p2:.4f} of {n2:,}: B - A = {p2 - p:+.4f}\n"
          f"two proportions: z = {z:.3f}, one-sided p = {0.5 * math.erfc(z / math.sqrt(2)):.4g} that B is no better")
    files = [path.with_name("right.npz") for path in (path_a, path_b)]
    kept = [np.load(f) for f in files if f.exists()]
    if len(kept) == 2 and np.array_equal(kept[0]["row"], kept[1]["row"]) and kept[0]["data"] == kept[1]["data"]:
        right_a, right_b = (k["right"] for k in kept)
        only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
        print(f"McNemar: only A right {only_a}, only B right {only_b}; exact one-sided p = {binomial_tail(only_b, only_a + only_b):.4g}")
    else:
        print("McNemar: needs right.npz of the same rows of the same data beside both")
    return 0


def binomial_tail(k, n):
    """P(X >= k) for X binomial(n, 1/2)."""
    log = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k, n + 1)]
    return min(1.0, math.fsum(map(math.exp, log)))


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
    g.add_argument("--compare", nargs=2, metavar="JSON", help="is the second results.json better?")
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
    g.add_argument("--batch-size", type=int, metavar="N", help="of one rank (default: by device)")
    g.add_argument("--compile", action=onoff, help="torch.compile (default: on a GPU)")
    return p


def check(args):
    """What flags must satisfy together. Raises UserError."""
    def flag(name):
        return "--" + name.replace("_", "-")
    if bool(args.checkpoint) == bool(args.hf):
        raise UserError("give one of --checkpoint and --hf")
    for name, low in (("limit", 1), ("max_aug", 0), ("show", 1), ("steps", 1), ("rollouts", 1), ("noise", 0), ("augment", 0),
                      ("adapt", 0), ("batch_size", 1), ("H_cycles", 1), ("L_cycles", 1), ("num_heads", 1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(f"{flag(name)} {getattr(args, name)} is below {low}; raise it")
    if args.halt + (args.rollouts > 1) + (args.augment > 0) > 1:
        raise UserError("--halt, --rollouts and --augment: only one of them at once; leave the others out")
    for name, needed in (("gif", "solve"), ("png", "solve"), ("adapt", "solve"), ("adapt_all", "adapt"), ("halt_threshold", "halt")):
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
        return run(args, world)
    except CheckpointError as e:
        raise UserError(str(e)) from None
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


def choose_examples(split, limit, max_aug):
    """The rows to score (n,), and what to call them when they are not all (else None)."""
    examples, part = np.arange(len(split)), []
    if max_aug is not None:
        puzzle = split.puzzle_of(examples)
        group = np.searchsorted(split.group_indices, puzzle, side="right") - 1
        examples = examples[puzzle - split.group_indices[group] <= max_aug]
        part = [f"{max_aug} augmentations a puzzle"]
    if limit is not None and limit < len(examples):
        examples, part = examples[:limit], part + [f"the first {limit:,} of {len(examples):,} rows"]
    return examples, ", ".join(part) or None


def check_task(args, cfg, split):
    """Flags that do something for some tasks only. Raises UserError."""
    for name, there in (("pool_votes", test_puzzles(split) is not None), ("max_aug", test_puzzles(split) is not None),
                        ("augment", args.solve or board_kind(cfg) in ("sudoku", "maze"))):
        if getattr(args, name) and not there:
            raise UserError(f"--{name.replace('_', '-')} does nothing for {' '.join(map(str, split.dirs))}; leave it out")
    if args.augment > 7 and board_kind(cfg) == "maze":
        raise UserError(f"--augment {args.augment}: a maze has 7 symmetric copies; lower it")


def run(args, world):
    path, settings, known = fetch(args.hf, world) if args.hf else (find_file(args.checkpoint), {}, None)
    settings |= {k: getattr(args, k) for k in ("H_cycles", "L_cycles", "num_heads", "dtype") if getattr(args, k) is not None}
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
    if args.export:
        save_file(args.export, to_published(cfg, state))
        print(f"wrote {args.export}: T (--H-cycles) {cfg.H_cycles}, n (--L-cycles) {cfg.L_cycles}, {cfg.num_heads} heads")
        return 0
    if args.compile if args.compile is not None else world.device.type == "cuda":
        compile_model(model)
    effort = Effort(args.steps, args.halt_threshold if args.halt else None, args.rollouts, args.noise, args.augment)
    if args.solve:
        return solve(model, args, effort, split.names if split else [])
    output = Path(args.output or (f"runs/eval-{args.hf.split('/')[1]}" if args.hf else path.parent))
    results = full_evaluation(args, world, model, split, effort, path, output)
    if world.rank == 0:
        print_table([("checkpoint", f"{path} ({'average' if args.ema and content.get('ema') else 'last'} weights)")] + table(results))
        write_json(output / "results.json", results)
        if args.push:
            push(args.push, path, cfg, state, results)
        exact = next(v for k, v in results["metrics"].items() if k in ("exact_acc", "within_tolerance"))
        if args.min_exact is not None and exact < args.min_exact:
            print(f"{exact:.4f} is below --min-exact {args.min_exact}", file=sys.stderr)
            return 1
    return 0


def full_evaluation(args, world, model, split, effort, path, output):
    """All that is measured on a split, as results.json holds it; rank 0 writes the other files of the output folder."""
    cfg, (examples, part) = model.cfg, choose_examples(split, args.limit, args.max_aug)
    size = args.batch_size or (768 if world.device.type == "cuda" else max(1, 2 ** 13 // cfg.length))
    about = {"device": f"{world.size} x {world.device.type}", "precision": cfg.dtype, "batch of a rank": size,
             "parameters": sum(p.numel() for p in model.parameters()), "supervision steps": effort.of(cfg)}
    about["with puzzle table"] = about["parameters"] + model.puzzle_emb.numel()
    score(model, split, world, size, examples[:1], Effort(steps=1), progress=False)     # compiles, allocates
    start = time.perf_counter()
    if args.halt:
        sample = examples[:10 * size * world.size]
        full = measure(model, split, world, size, sample, effort._replace(halt=None))[0]
        about["without halting"] = (f"exact_acc {full[metric_names(cfg)[2]]:.4f}, {len(sample) / (time.perf_counter() - start):,.1f} "
                                    f"rows/s, on the first {len(sample):,} rows")
        start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    pool = output / f"votes-{path.stem}.json" if args.pool_votes else None
    metrics, scores, votes = measure(model, split, world, size, examples, effort, True, args.save_preds or bool(args.show), pool)
    about["seconds"] = time.perf_counter() - start
    about["rows/s"] = len(examples) / about["seconds"]
    name, rows, right = metric_names(cfg)[2], scores.examples, scores.right
    intervals = {name: [*wilson(metrics[name], len(right)), len(right), "puzzles"]}
    if votes:   # augmented rows are no sample of anything: tasks and test inputs are
        n_tasks, right = len(votes.places()), np.concatenate(votes.places()) < 2
        rows = np.arange(len(right))
        metrics["pass@2 of test inputs"] = float(right.mean())
        intervals = {"pass@2": [*wilson(metrics["pass@2"], n_tasks), n_tasks, "tasks"],
                     "pass@2 of test inputs": [*wilson(right.mean(), len(right)), len(right), "test inputs"]}
    if world.rank:
        return None
    digest = hashlib.sha256(split.gather(examples[:1000])[0].tobytes()).hexdigest()
    np.savez(output / "right.npz", row=rows, right=right, data=digest)
    if votes:
        write_json(output / "submission.json", votes.submission())
    if args.save_preds:
        inputs, labels, ids = split.gather(scores.examples)
        np.savez(output / "predictions.npz", inputs=inputs, labels=labels, puzzle_identifiers=ids, preds=scores.preds, q_halt_logits=scores.q)
    curve = scores.history.mean(0).tolist() if effort.rollouts == 1 and not effort.augment else []
    if args.steps and curve:
        draw_curve(output / "steps.png", curve, len(scores.right))
    if args.show:
        draw_examples(cfg, output / "show.png", split, scores, args.show)
    return {"metrics": metrics, "intervals": intervals, "part": part, "exact_acc_by_step": curve, "about": about,
            "effort": effort._asdict(), "data": [str(d) for d in split.dirs], "identity": split.identity}


def push(name, path, cfg, state, results):
    """Upload weights in the published format, their config and a card with the measured result."""
    from huggingface_hub import HfApi
    card = "\n".join(["---", "library_name: pytorch", "tags: [tiny-recursive-model]", "---", f"# {name.split('/')[-1]}", "",
                      "Weights of a Tiny Recursive Model (arXiv 2510.04871). Measured:", "", "| | |", "|---|---|",
                      *(f"| {k} | {v} |" for k, v in table(results)), "", f"Score it: `python eval.py --hf {name}`", ""])
    with tempfile.TemporaryDirectory() as tmp:
        save_file(Path(tmp) / path.stem, to_published(cfg, state))
        write_json(Path(tmp) / "config.json", asdict(cfg))
        write_json(Path(tmp) / "results.json", results)
        (Path(tmp) / "README.md").write_text(card)
        try:
            HfApi().create_repo(name, exist_ok=True)
            HfApi().upload_folder(repo_id=name, folder_path=tmp, commit_message="Weights and measured result")
        except Exception as e:
            raise UserError(f"--push {name}: {(str(e).strip() or type(e).__name__).splitlines()[0][:200]}; log in with `hf auth "
                            f"login`; the result is kept in results.json") from None
    print(f"pushed to {name}")


if __name__ == "__main__":
    cli(main)
