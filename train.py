"""Train a TRM.

    python train.py                                   mini: 6x6 Sudoku, on a CPU
    torchrun --nproc_per_node=8 train.py --preset arc1
    python train.py --preset sudoku --global-batch-size 768 --lr 1e-4
    python train.py --resume runs/arc1-20260102-030405
    python train.py --plot runs/A runs/B              the curves of runs
"""
import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from io import BytesIO
from pathlib import Path

STARTED = time.perf_counter()   # for --bench: importing torch takes a while

import numpy as np
import torch
from tqdm import tqdm

import eval as scoring
from data import Cursor, HelpFormatter, Split, UserError, cli, exploration, prefetch, training_order
from model import IGNORE, LOG_PROBS, SCORE_MODS, TRM, Batch, Carry, CheckpointError, Config, act_loss, build, \
    compile_model, compiler_lacks, load_file, metric_names, save_file, swiglu_width

# What each task changes (the 8-GPU reproduction's settings). A flag on the command line wins.
SUDOKU = dict(data=["data/sudoku-extreme-1k-aug-1000"], epochs=50_000, eval_interval=5_000, weight_decay=1.0,
              puzzle_emb_weight_decay=1.0, puzzle_emb_lr=1e-4)
ARC = dict(epochs=100_000, eval_interval=5_000)
PRESETS = {
    "mini": dict(data=["data/sudoku-6x6-mini"], mixer="mlp", pos_encodings="none", hidden_size=64, num_heads=1,
                 H_cycles=1, L_cycles=1, puzzle_emb_len=1, puzzle_emb_ndim=64, global_batch_size=64, dtype="auto",
                 lr=8e-3, puzzle_emb_lr=4e-3, weight_decay=0.5, puzzle_emb_weight_decay=0.5, lr_warmup_steps=100,
                 lr_min_ratio=0.0, ema=0.99, ema_warmup=True, train_max_steps=[2, 6], epochs=64, eval_interval=16),
    "sudoku": dict(SUDOKU, mixer="mlp", pos_encodings="none"),
    "sudoku-att": SUDOKU,
    "maze": dict(SUDOKU, data=["data/maze-30x30-hard-1k"], L_cycles=4),
    "arc1": dict(ARC, data=["data/arc1concept-aug-1000"]),
    "arc2": dict(ARC, data=["data/arc2concept-aug-1000"]),
}
# Shapes of the presets' data, for --bench and for estimates on a machine that does not have it.
SHAPES = {"mini": (8, 36, 1, 1000, 1.0), "sudoku": (11, 81, 1, 1000, 1.0), "sudoku-att": (11, 81, 1, 1000, 1.0),
          "maze": (6, 900, 1, 1000, 1.0), "arc1": (12, 900, 876_406, 960, 4.1458),
          "arc2": (12, 900, 1_191_730, 1280, 4.354)}
SHAPE_KEYS = ("vocab_size", "seq_len", "num_puzzle_identifiers", "total_groups", "mean_puzzle_examples")
LIMIT_REACHED = 1   # why a run stops: this, or the number of a signal
MATTERS = ("preset", "global_batch_size", "seed", "eval_interval")  # with the Config: cannot change on resume
OF_THIS_START = ("resume", "plot", "bench", "max_steps", "max_minutes", "device", "dist_timeout")   # are not saved
COUNTERS = ("step", "logged_step", "best", "train_s", "logged_s", "eval_due")  # of a Run, as they are in a checkpoint


# ---------------------------------------------------------------------------------------------
# Settings

def refuse(message):
    raise UserError(f"{message}; see --help")


# Flags by group: name, default, help and, beyond a type that the default shows, the keywords of argparse.
ONOFF = dict(action=argparse.BooleanOptionalAction)
FLAGS = {
    "what": [
        ("--preset", "mini", "a task with its settings", dict(choices=list(PRESETS))),
        ("--data", None, "dataset folders, joined", dict(nargs="+", metavar="DIR")),
        ("--data-test", None, "folders for the test split (default: as --data)", dict(nargs="+", metavar="DIR")),
        ("--seq-len", None, "windows of latent episodes (default: the longest)", dict(type=int)),
        ("--seed", 0, "of weights, data order and exploration", {}),
        ("--init", None, "start from its weights; for other puzzles, its mean row", dict(metavar="CKPT")),
    ],
    "model": [
        ("--mixer", "attn", "mixes positions", dict(choices=["attn", "mlp"])),
        ("--pos-encodings", "rope", "for attn", dict(choices=["rope", "learned", "none"])),
        ("--score-mod", "none", "of attention scores", dict(choices=list(SCORE_MODS))),
        ("--hidden-size", 512, "D", {}),
        ("--num-heads", 8, "of attention", {}),
        ("--num-layers", 2, "blocks in the net", {}),
        ("--expansion", 4.0, "of the SwiGLU", {}),
        ("--puzzle-emb-len", 16, "prefix positions", {}),
        ("--puzzle-emb-ndim", 512, "width of the puzzle table", {}),
        ("--H-cycles", 3, "T, rounds per supervision step", {}),
        ("--L-cycles", 6, "n, latent updates per round", {}),
        ("--halt-max-steps", 16, "N_sup, supervision steps", {}),
        ("--train-max-steps", None, "N_sup in training: from A up to B", dict(nargs=2, type=int, metavar="A B")),
        ("--halt-exploration-prob", 0.1, "draws a least number of steps", {}),
        ("--halt-tolerance", 0.01, "regression: a row is right below it", {}),
        ("--q-continue", False, "Q-learning halting (HRM)", ONOFF),
        ("--loss", "stablemax", "of the tokens", dict(choices=list(LOG_PROBS))),
        ("--dtype", "bfloat16", "of activations; auto: the faster", dict(choices=["bfloat16", "float32", "auto"])),
    ],
    "training": [
        ("--global-batch-size", 1536, "rows over all ranks", {}),
        ("--grad-accum", 1, "parts of a rank's batch, one after another", {}),
        ("--epochs", 1, "passes over the groups", {}),
        ("--eval-interval", 1, "epochs between evaluations", {}),
        ("--lr", 2e-4, "learning rate", {}),
        ("--puzzle-emb-lr", 1e-2, "of the puzzle table's SignSGD", {}),
        ("--weight-decay", 0.1, "per step: lr * this", {}),
        ("--puzzle-emb-weight-decay", 0.1, "likewise", {}),
        ("--beta1", 0.9, "of AdamATan2", {}),
        ("--beta2", 0.95, "of AdamATan2", {}),
        ("--grad-clip", 0.0, "norm of the gradient at most (0: off)", {}),
        ("--lr-warmup-steps", 4000, "linear", {}),
        ("--lr-min-ratio", 1.0, "where the cosine ends (1: constant)", {}),
        ("--ema", 0.999, "decay of the averaged weights (0: off)", {}),
        ("--ema-warmup", False, "shorter average at the start", ONOFF),
        ("--freeze-weights", False, "train the puzzle table only", ONOFF),
        ("--max-steps", None, "stop there", dict(type=int)),
        ("--max-minutes", None, "stop then", dict(type=float)),
    ],
    "run": [
        ("--run-dir", None, "default runs/PRESET-TIME", dict(metavar="DIR")),
        ("--checkpoint-path", None, "default the run folder", dict(metavar="DIR")),
        ("--checkpoint-interval", None, "steps; also saved at evaluations", dict(type=int)),
        ("--keep-last", None, "checkpoints to keep (default all)", dict(type=int)),
        ("--monitor", "val/exact_acc", "what best.ckpt is best in (none: off)", {}),
        ("--monitor-mode", "max", "or min", dict(choices=["max", "min"])),
        ("--on-save-error", "stop", "disk full: stop or go on", dict(choices=["stop", "continue"])),
        ("--resume", None, "a run or checkpoint (alone: the newest)", dict(nargs="?", const="newest", metavar="PATH")),
        ("--eval-limit", None, "score this many examples only", dict(type=int)),
        ("--log-interval", 10, "steps", {}),
        ("--skip-sanity-checks", False, "at the start", ONOFF),
        ("--wandb", None, "log there too", dict(metavar="PROJECT")),
        ("--device", "auto", "to run on", dict(choices=["auto", "cuda", "mps", "cpu"])),
        ("--compile", True, "torch.compile", ONOFF),
        ("--compile-unit", "net", "what is one graph", dict(choices=["net", "cycle", "step"])),
        ("--compile-mode", "default", "GPU", dict(choices=["default", "reduce-overhead", "max-autotune"])),
        ("--dist-timeout", 600.0, "seconds until a dead rank ends the run", {}),
        ("--allow-cpu", False, "train a big preset without a GPU", ONOFF),
        ("--plot", None, "draw the curves of runs, and stop", dict(nargs="+", metavar="RUN")),
        ("--bench", None, "time N steps, and stop", dict(nargs="?", const=10, type=int, metavar="N")),
    ],
}


def parser(suppress=False):
    """suppress: leave out what is not on the command line, to tell it from a default."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter,
                                argument_default=argparse.SUPPRESS if suppress else None)
    p.error = refuse
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for name, default, text, kind in flags:
            kind = kind or ({} if default is None else dict(type=type(default)))
            group.add_argument(name, **kind, **({} if suppress else dict(default=default, help=text)))
    return p


def settings(argv, world=scoring.World(0, 1, torch.device("cpu"))):
    """(args, checkpoint or None, notes for the user): defaults, then the preset or the resumed run, then flags."""
    given = vars(parser(suppress=True).parse_args(argv))
    values = vars(parser().parse_args([]))
    checkpoint, path, notes = find_run(given) if world.rank == 0 else (None, None, [])
    path, notes = world.gather_objects((path, notes))[0]   # rank 0 chose for all
    if path is None:
        preset = PRESETS[given.get("preset", values["preset"])]
        return argparse.Namespace(**{**values, **preset, **given, "resume": None}), None, notes
    checkpoint = checkpoint or load_file(path)
    saved = checkpoint["settings"]
    for name in sorted(given.keys() & saved.keys()):
        if given[name] != saved[name] and name in MATTERS:
            raise UserError(f"--{name.replace('_', '-')} {given[name]} differs from the run's {saved[name]}; a run "
                            f"cannot change it: leave it out, or begin a new run")
        if given[name] != saved[name]:
            notes.append(f"changed on resume: {name} {saved[name]} -> {given[name]}")
    values.update(saved, checkpoint_path=given.get("run_dir", str(path.parent)))   # another --run-dir begins a branch
    if saved["run_dir"] == saved["checkpoint_path"]:
        values["run_dir"] = str(path.parent)   # wherever it was moved to
    return argparse.Namespace(**{**values, **given, "resume": str(path)}), checkpoint, notes


def check(args, world):
    """What the flags must satisfy together. Raises UserError."""
    for name in ("global_batch_size", "grad_accum", "epochs", "eval_interval", "log_interval", "num_layers", "H_cycles",
                 "L_cycles", "halt_max_steps", "seq_len", "max_steps", "checkpoint_interval", "keep_last",
                 "eval_limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is below 1; use 1 or more")
    first, last = args.train_max_steps or (1, 1)
    if not 1 <= first <= last:
        raise UserError(f"--train-max-steps {first} {last} does not rise from 1 or more; give two such numbers")
    G, parts = args.global_batch_size, world.size * args.grad_accum
    if G % parts:
        near = max(parts, G // parts * parts)
        ranks = f"{world.size} ranks" + (f" x {args.grad_accum} parts" if args.grad_accum > 1 else "")
        raise UserError(f"--global-batch-size {G} is not a multiple of {ranks}; use {near} or {near + parts}")
    if args.mixer == "attn" and args.hidden_size % (2 * args.num_heads):
        raise UserError(f"--hidden-size {args.hidden_size} does not give {args.num_heads} heads of even width; "
                        f"use a multiple of {2 * args.num_heads}")
    if args.puzzle_emb_ndim > args.puzzle_emb_len * args.hidden_size:
        raise UserError(f"--puzzle-emb-ndim {args.puzzle_emb_ndim} is wider than --puzzle-emb-len {args.puzzle_emb_len} x "
                        f"--hidden-size {args.hidden_size}; lower it to {args.puzzle_emb_len * args.hidden_size}")
    if args.wandb and not importlib.util.find_spec("wandb"):
        raise UserError("--wandb needs the package wandb; pip install wandb, or leave the flag out")


def config_of(args, meta):
    """The model's Config: sizes from dataset.json, the rest from the flags of the same names."""
    sizes = dict(vocab_size=meta["vocab_size"], seq_len=meta["seq_len"], num_puzzles=meta["num_puzzle_identifiers"],
                 input_dim=meta.get("input_dim", 0), target_dim=meta.get("target_dim", 0))
    return Config(**sizes, **{f.name: getattr(args, f.name) for f in fields(Config) if f.name not in sizes})


def fastest_dtype(device):
    """bfloat16 on a GPU; on a CPU, whichever of bfloat16 and float32 multiplies matrices faster here."""
    if device.type != "cpu":
        return "bfloat16" if device.type == "cuda" else "float32"

    def seconds(dtype):
        a, times = torch.ones(1024, 1024, dtype=dtype), []
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return min(times)
    return "bfloat16" if seconds(torch.bfloat16) < seconds(torch.float32) else "float32"


# ---------------------------------------------------------------------------------------------
# Optimizers

class Flat:
    """All parameters of a model in one float32 buffer and their gradients in another, so that an optimizer step,
    an all-reduce or an average is one operation. The parameters become views; each begins at a multiple of 64."""

    def __init__(self, model):
        self.params = dict(model.named_parameters())
        self.starts, end = {}, 0
        for name, p in self.params.items():
            self.starts[name] = end
            end += -(-p.numel() // 64) * 64
        self.data = torch.zeros(end, device=model.y0.device)
        self.grad = torch.zeros_like(self.data)
        data, grad = self.views(self.data), self.views(self.grad)
        for name, p in self.params.items():
            data[name].copy_(p.detach())
            p.data, p.grad = data[name], grad[name]

    def views(self, buffer):
        """{parameter name: its part of a buffer of this layout}"""
        return {n: buffer[self.starts[n]:self.starts[n] + p.numel()].view(p.shape) for n, p in self.params.items()}


def schedule(step, total_steps, warmup, min_ratio):
    """Factor of the learning rate at a step, counted from 1: linear warm-up, then cosine down to min_ratio."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train_max_steps(args, progress):
    """Supervision steps of a puzzle in training at progress 0 .. 1 of the run: N_sup, or from A to B of
    --train-max-steps in even stretches. Few at first show the model more puzzles while it cannot finish one anyway."""
    first, last = args.train_max_steps or (args.halt_max_steps, args.halt_max_steps)
    return min(args.halt_max_steps, last, first + int(progress * (last - first + 1)))


class AdamATan2:
    """Adam with atan2 in place of the division by sqrt(v) + eps (arXiv 2407.05872), on a flat buffer.

    The first moment's bias correction stands outside the atan2, as in the published training code."""

    def __init__(self, size, device, beta1, beta2, weight_decay):
        self.m, self.v = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay

    def step(self, p, grad, lr, t):
        """Update p in place from its gradient; t counts from 1."""
        p.mul_(1 - lr * self.weight_decay)
        self.m.lerp_(grad, 1 - self.beta1)
        self.v.lerp_(grad.square(), 1 - self.beta2)
        denominator = self.v.sqrt().div_(math.sqrt(1 - self.beta2 ** t))
        p.add_(torch.atan2(self.m, denominator), alpha=-lr / (1 - self.beta1 ** t))


def sign_sgd(table, ids, grads, lr, weight_decay):
    """SignSGD with weight decay on the rows `ids` of the puzzle table, in place.

    ids (G,), grads (G, ndim) of the global batch; gradients of the same puzzle are summed. Static shapes and no
    host synchronisation: sorted ids are numbered by segments, and duplicates write equal rows.
    """
    ids, order = ids.long().sort(stable=True)
    segment = torch.cat((ids.new_zeros(1), (ids[1:] != ids[:-1]).long())).cumsum(0)
    total = torch.zeros_like(grads).index_add_(0, segment, grads[order])[segment]
    table.index_copy_(0, ids, table[ids] * (1 - lr * weight_decay) - lr * total.sign())


# ---------------------------------------------------------------------------------------------
# State of a run, and its checkpoints

class Run:
    """All that changes while training, and how it is saved: weights, optimizers, EMA, carry, counters, data cursor."""

    def __init__(self, args, cfg, world, checkpoint=None, epoch_rows=1):
        self.args, self.cfg, self.world, self.epoch_rows = args, cfg, world, epoch_rows
        generator = torch.Generator().manual_seed(args.seed)
        self.model = (build(cfg, checkpoint["model"]) if checkpoint else TRM(cfg, generator)).to(world.device).train()
        if args.freeze_weights:
            self.model.requires_grad_(False)
        self.flat = Flat(self.model)
        self.adam = AdamATan2(len(self.flat.data), world.device, args.beta1, args.beta2, args.weight_decay)
        self.ema = self.flat.data.clone() if args.ema else None
        self.rows = args.global_batch_size // world.size            # of this rank
        part = self.rows // args.grad_accum
        self.deltas = [torch.zeros(part, cfg.puzzle_emb_ndim, device=world.device, requires_grad=True)
                       for _ in range(args.grad_accum)]
        self.carries = self.batches = None     # one per part of the batch, at fixed addresses from the first step on
        self.max_steps = torch.tensor(args.halt_max_steps, dtype=torch.int32, device=world.device)
        self.sums = torch.zeros(len(metric_names(cfg)), device=world.device)   # since the last log line
        self.nan_step = torch.zeros((), dtype=torch.int64, device=world.device)
        self.cursor, self.data = Cursor(), {}
        self.step, self.logged_step, self.best, self.train_s, self.logged_s, self.eval_due = 0, 0, None, 0.0, 0.0, False

    def hold(self, batch):
        """Copy a batch into the buffers that every step reads: with them and the carry, which is overwritten in place,
        a step finds everything at the same addresses, as CUDA graphs need."""
        parts = [Batch(*part) for part in zip(*(t.chunk(self.args.grad_accum) for t in batch))]
        if self.batches is None:
            self.batches = [Batch(*(torch.empty_like(t, device=self.world.device) for t in part)) for part in parts]
        for held, part in zip(self.batches, parts):
            for buffer, t in zip(held, part):
                buffer.copy_(t, non_blocking=True)
        self.carries = self.carries or [self.model.empty_carry(b) for b in self.batches]

    def note(self, value):
        """Remember the first step at which a value was not finite; does not wait for the device."""
        self.nan_step.copy_(torch.where((self.nan_step == 0) & ~value.isfinite(), self.step + 1, self.nan_step))

    def restore(self, checkpoint):
        """Everything but the weights, which the constructor took."""
        for buffer, name in ((self.ema, "ema"), (self.adam.m, "m"), (self.adam.v, "v")):
            if buffer is not None and checkpoint[name] is not None:
                for key, view in self.flat.views(buffer).items():
                    view.copy_(checkpoint[name][key])
        for name in COUNTERS:
            setattr(self, name, checkpoint[name])
        measure = ("monitor", "monitor_mode", "data_test", "eval_limit")
        if any(checkpoint["settings"][k] != getattr(self.args, k) for k in measure):
            self.best = None
        self.cursor = unpack_cursor(checkpoint["cursor"])
        sums = checkpoint["sums"]   # of every rank; in a world of another size the first one takes them all
        if len(sums) == self.world.size:
            self.sums.copy_(sums[self.world.rank])
        elif self.world.rank == 0:
            self.sums.copy_(sums.sum(0))
        if checkpoint.get("carry"):   # slots of the global batch in order: rank by rank, part by part
            n, device = self.rows // self.args.grad_accum, self.world.device
            starts = range(self.world.rank * self.rows, (self.world.rank + 1) * self.rows, n)
            self.carries = [Carry(*(t[i:i + n].to(device, copy=True) for t in checkpoint["carry"])) for i in starts]

    def checkpoint(self):
        """The content of a checkpoint file on rank 0, None elsewhere. A collective: every rank calls it."""
        first, carry = self.world.rank == 0, []
        for parts in zip(*self.carries or []):   # one at a time leaves the device: they are large
            whole = self.world.gather(torch.cat(parts))
            carry.append(whole.cpu() if first else None)
        sums = self.world.gather(self.sums.view(1, -1))
        if not first:
            return None

        def copy(buffer):
            return None if buffer is None else {k: v.cpu().clone() for k, v in self.flat.views(buffer).items()}
        return {
            "config": asdict(self.cfg), "model": {k: v.cpu().clone() for k, v in self.model.state_dict().items()},
            "ema": copy(self.ema), "m": copy(self.adam.m), "v": copy(self.adam.v), "carry": carry or None,
            "sums": sums.cpu(), "cursor": pack_cursor(self.cursor), "epoch": self.epoch, **self.data,
            **{name: getattr(self, name) for name in COUNTERS}, "torch": str(torch.__version__),
            "settings": {k: v for k, v in vars(self.args).items() if k not in OF_THIS_START}}

    @property
    def epoch(self):
        return self.step * self.args.global_batch_size / self.epoch_rows

    def with_ema(self):
        """Swap the averaged weights in (and, called again, out)."""
        if self.ema is not None:
            held = self.flat.data.clone()
            self.flat.data.copy_(self.ema)
            self.ema.copy_(held)


def pack_cursor(cursor):
    """A Cursor as plain numbers, which a weights_only checkpoint may hold."""
    def plain(v):
        if isinstance(v, dict):
            return {k: plain(x) for k, x in v.items()}
        return v.tolist() if isinstance(v, np.ndarray) else v
    return [cursor.iteration, cursor.position, plain(cursor.rng)]


def unpack_cursor(packed):
    iteration, position, rng = packed
    if rng is not None:
        state = {k: np.array(v, dtype=np.uint64) for k, v in rng["state"].items()}
        rng = {**rng, "state": state, "buffer": np.array(rng["buffer"], dtype=np.uint64)}
    return Cursor(iteration, position, rng)


def checkpoints(folder):
    """Step checkpoints of a folder, the newest first."""
    return sorted(Path(folder).glob("step_*.ckpt"), reverse=True)


def run_folders(*folders):
    """Those that hold a log, the one last written to first."""
    logs = [Path(f) / "log.jsonl" for f in folders]
    return [p.parent for p in sorted((p for p in logs if p.exists()), key=lambda p: p.stat().st_mtime, reverse=True)]


def last_start(run_dir):
    """The last "start" record in the log of a run: its settings, command, machine."""
    return next((r for r in reversed(read_log(Path(run_dir) / "log.jsonl")) if r["event"] == "start"), {})


def checkpoint_folder(run_dir):
    """Where a run saves: its folder, or the --checkpoint-path in its log."""
    if checkpoints(run_dir):
        return run_dir
    return Path(last_start(run_dir).get("settings", {}).get("checkpoint_path", run_dir))


def find_run(given):
    """(checkpoint, its file, notes) that the flags given ask to go on with; (None, None, []) for a new run.

    Started again by torchrun (--max-restarts), it goes on with what its job had begun. Raises UserError."""
    resume, run_dir, job = given.get("resume"), given.get("run_dir"), os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if job != "none" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":   # an id is new with every torchrun
        named = [Path(p).parent if Path(p).is_file() else p for p in (run_dir, resume) if p]
        for folder in run_folders(*named, *Path("runs").glob("*")):
            if last_start(folder).get("job") == job and checkpoints(checkpoint_folder(folder)):
                return find_checkpoint(folder)
    if resume == "newest":
        preset = given.get("preset", "mini")
        folders = run_folders(*([run_dir] if run_dir else Path("runs").glob(f"{preset}-*")))
        resume = next((f for f in folders if checkpoints(checkpoint_folder(f))), None)
        if resume is None:
            raise UserError(f"--resume: no run with a checkpoint in {run_dir or f'runs/{preset}-*'}; name a run folder "
                            f"or a file")
    return find_checkpoint(Path(resume)) if resume else (None, None, [])


def find_checkpoint(path):
    """(content, file, notes) of a checkpoint file, or of the newest good one of a run folder. Raises UserError."""
    if not path.is_dir():
        files, notes = [path], []
    else:
        folder, notes = checkpoint_folder(path), []
        files, latest = checkpoints(folder), folder / "latest.txt"
        name = latest.read_text().strip() if latest.exists() else ""
        if folder / name in files:   # those after it are of a future that this run left
            files = files[files.index(folder / name):]
    for file in files:
        try:
            content = load_file(file)
        except CheckpointError as e:
            notes.append(str(e))
            continue
        if not {"settings", "m", "sums"} <= content.keys():
            raise UserError(f"{file} holds weights, but no state of training; --resume needs a checkpoint of train.py, "
                            f"--init takes weights")
        return content, file, [f"{note}; using {file.name}, the one before" for note in notes]
    raise UserError("; ".join(notes) or f"{path} holds no checkpoint (step_*.ckpt); name another, or begin a new run")


def about_data(split, test):
    """What a checkpoint says of its data. data_sha256: of the sizes and a hundred examples, to know the data again."""
    some = np.linspace(0, len(split) - 1, 100).astype(np.int64)
    digest = hashlib.sha256(json.dumps([len(split), sorted(split.meta.items())], default=str).encode())
    for array in split.gather(some):
        digest.update(array.tobytes())
    return {"identity": split.identity, "recipe": split.recipe, "data_sha256": digest.hexdigest(),
            "data": [str(d) for d in split.dirs], "data_test": [str(d) for d in test.dirs]}


def must_match(checkpoint, cfg, data):
    """Refuse to resume a run with another architecture or other data, by name."""
    if any(checkpoint[k] != data[k] for k in ("identity", "data_sha256")):
        raise UserError(f"--data {' '.join(data['data'])} holds other puzzles than the run was trained on; leave it out "
                        f"or name its data ({' '.join(checkpoint['data'])} then), or begin a new run")
    for name, old in checkpoint["config"].items():
        new = getattr(cfg, name)
        if old != new:
            raise UserError(f"--{name.replace('_', '-')} {new} differs from the run's {old}; a run cannot change it: "
                            f"leave it out, or begin a new run")


def save(run, log, is_best=False):
    """Write step_N.ckpt, latest.txt and, if it is the best, best.ckpt; then drop what --keep-last does not keep.
    Raises UserError on every rank when rank 0 could not, unless --on-save-error continue."""
    args, folder, failed = run.args, Path(run.args.checkpoint_path), False
    content = run.checkpoint()
    if run.world.rank == 0:
        path = folder / f"step_{run.step:08d}.ckpt"
        try:
            for torn in folder.glob("*.tmp"):   # of a run that was killed while it saved
                torn.unlink()
            save_file(path, content)
            write_bytes(folder / "latest.txt", f"{path.name}\n".encode())
            if is_best:
                mirror(path, folder / "best.ckpt")
            upto = checkpoints(folder)
            for old in upto[upto.index(path):][args.keep_last or len(upto):]:
                old.unlink()
        except OSError as e:
            failed = True
            log.say(f"saving {path} failed ({e.strerror or e}); the older checkpoints are untouched")
    if run.world.agree(int(failed)) and args.on_save_error == "stop":
        raise UserError(f"no checkpoint at step {run.step}: make room in {folder} and --resume, or use --on-save-error "
                        f"continue")


def write_bytes(path, content):
    """All or nothing, as save_file."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        tmp.write_bytes(content)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def mirror(path, target):
    """target becomes the same file, as a hard link where the file system has them: it stays when `path` is deleted."""
    tmp = target.with_name(target.name + ".tmp")
    try:
        os.link(path, tmp)
    except OSError:
        shutil.copyfile(path, tmp)
    os.replace(tmp, target)


# ---------------------------------------------------------------------------------------------
# Log

class Log:
    """log.jsonl, the console and, if asked for, wandb; silent on all ranks but the first."""

    def __init__(self, run_dir, args, rank, checkpoint=None):
        self.file = self.wandb = self.began = None
        if rank:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path, kept = run_dir / "log.jsonl", []
        if checkpoint is not None:   # what comes after it will be written again, and an evaluation that is still due
            kept = [r for r in read_log(path) if r["step"] <= checkpoint["step"] and r["event"] != "result"
                    and not (checkpoint["eval_due"] and (r["event"], r["step"]) == ("val", checkpoint["step"]))]
        self.began = kept[0].get("began") if kept else int(time.time())
        write_bytes(path, b"".join(json.dumps(r).encode() + b"\n" for r in kept))
        self.file = open(path, "ab", buffering=0)
        if args.wandb:
            import wandb
            self.wandb = wandb.init(project=args.wandb, name=run_dir.name, config=vars(args), resume="allow",
                                    id=f"{run_dir.name}-{self.began}")

    def write(self, event, step, **values):
        """A line of the log, and train/* and val/* to wandb. A full disk costs the line, all of it, not the run."""
        if not self.file:
            return
        line = json.dumps({"event": event, "step": step, **values}).encode() + b"\n"
        size = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(line) < len(line):
                raise OSError("disk full")
        except OSError as e:
            self.file.truncate(size)
            self.say(f"log.jsonl lost a line of step {step}: {e.strerror or e}")
        if self.wandb and event in ("train", "val"):
            self.wandb.log(values, step=step)

    def say(self, text):
        if self.file:
            tqdm.write(text)

    def close(self):
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def read_log(path):
    """The records of a log.jsonl; a line torn by a crash is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def plot(run_dirs, out):
    """Loss and whole-puzzle accuracy over steps, training and validation, of one or several runs; a PNG."""
    from matplotlib.figure import Figure   # half a second: only where it is needed
    from matplotlib.ticker import LogLocator
    fig = Figure(figsize=(12, 5), dpi=100)
    fig.subplots_adjust(left=0.05, right=0.98, bottom=0.11, top=0.92, wspace=0.13)
    axes = dict(zip(("loss", "score"), fig.subplots(1, 2)))
    for i, run_dir in enumerate(run_dirs):
        records = read_log(Path(run_dir) / "log.jsonl")
        if not any(r["event"] in ("train", "val") for r in records):
            raise UserError(f"{run_dir}/log.jsonl has no training lines to draw; name a run folder")
        regression = any("train/regression_loss" in r for r in records)
        names = ("regression_loss", "within_tolerance") if regression else ("lm_loss", "exact_acc")
        val = "val (EMA)" if last_start(run_dir).get("settings", {}).get("ema") else "val"
        for panel, key in zip(axes, names):
            for split, label, style in (("train", "train", dict(alpha=0.5)), ("val", val, dict(marker="o", lw=2))):
                name = f"{split}/{key}"
                points = [(r["step"], r[name]) for r in records if r["event"] == split and r.get(name) is not None]
                if len(run_dirs) == 1:
                    colour = "C0" if split == "train" else "C1"
                else:
                    colour, label = f"C{i}", f"{Path(run_dir).name}: {label}"
                axes[panel].plot(*zip(*points) if points else ((), ()), color=colour, label=label, **style)
            axes[panel].set(xlabel="training step", title=key)
    axes["loss"].set_yscale("log")
    axes["loss"].yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 5, 7)))
    axes["loss"].yaxis.set_major_formatter("{x:g}")
    axes["loss"].yaxis.set_minor_formatter("{x:g}")
    axes["score"].set_ylim(-0.02, 1.02)
    for ax in axes.values():
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9)
    picture = BytesIO()
    fig.savefig(picture, format="png")
    write_bytes(out, picture.getvalue())
    return out


def git_hash():
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                           cwd=Path(__file__).parent)
    return found.stdout.strip() or None


# ---------------------------------------------------------------------------------------------
# The loop and what it calls

def iterations(args):
    """How often a run evaluates."""
    return -(-args.epochs // args.eval_interval)


class Resident:
    """The tokens of a whole split in the memory of a device, so that a step sends it no more than example numbers."""

    def __init__(self, split, device):
        self.ignore = split.meta["ignore_label_id"]
        self.inputs, self.labels = (torch.empty(len(split), split.meta["seq_len"], dtype=torch.uint8, device=device)
                                    for _ in range(2))
        for source, start in zip(split.sources, split.offsets):
            for field, whole in (("inputs", self.inputs), ("labels", self.labels)):
                array = getattr(source, field)
                for i in range(0, len(array), 1 << 16):
                    part = torch.from_numpy(np.array(array[i:i + (1 << 16)]))
                    whole[start + i:start + i + len(part)] = part.to(device)

    @staticmethod
    def fits(split, device):
        """Whether it takes at most a quarter of the free memory of a GPU."""
        if device.type != "cuda" or split.meta.get("input_dim") or split.meta["vocab_size"] > 256:
            return False
        return 8 * len(split) * split.meta["seq_len"] <= torch.cuda.mem_get_info(device)[0]

    def batch(self, examples, puzzle_ids, min_steps):
        """The Batch of the given examples (B,), on the device."""
        labels = self.labels[examples].int()
        if self.ignore is not None:
            labels = torch.where(labels == self.ignore, IGNORE, labels)
        return Batch(self.inputs[examples].int(), labels, puzzle_ids, min_steps)


def stream(split, args, world, cursor, step, resident=None):
    """Yield (tensors, cursor after them) for this rank, from a cursor on to the end of the run. The tensors, on the
    CPU, are those of a Batch, or the arguments of resident.batch."""
    rows = args.global_batch_size // world.size
    mine = slice(world.rank * rows, (world.rank + 1) * rows)
    while cursor.iteration <= iterations(args):
        epochs = min(args.eval_interval, args.epochs - (cursor.iteration - 1) * args.eval_interval)
        for examples, puzzles, cursor in training_order(split, args.seed, epochs, args.global_batch_size, cursor):
            step += 1
            explore = exploration(args.seed, step, args.global_batch_size, args.halt_exploration_prob,
                                  args.halt_max_steps)
            examples, puzzles = examples[mine], puzzles[mine]
            arrays = (examples, split.puzzle_identifiers[puzzles]) if resident else split.gather(examples, puzzles)
            tensors = [torch.from_numpy(a) for a in (*arrays, explore[mine])]
            yield [t.pin_memory() for t in tensors] if world.device.type == "cuda" else tensors, cursor


def backward(run, batch):
    """Forward and backward of one training step on this rank; gradients and metric sums are added up in `run`."""
    run.hold(batch)
    torch.compiler.cudagraph_mark_step_begin()   # for --compile-mode reduce-overhead
    for batch, carry, delta in zip(run.batches, run.carries, run.deltas):
        new, logits, q = run.model.step(carry, batch, delta, run.max_steps)
        target = run.model.continue_target(new) if run.cfg.q_continue else None
        loss, sums = act_loss(run.cfg, new, logits, q, target)
        (loss / run.args.global_batch_size).backward()
        run.sums += sums
        run.note(loss)
        for held, t in zip(carry, new):
            held.copy_(t)


def update(run, factor):
    """All-reduce the gradients and apply both optimizers and the EMA. factor: of the learning rates."""
    args, flat, t = run.args, run.flat, run.step + 1
    if not args.freeze_weights:
        run.world.sum(flat.grad)
        if args.grad_clip:
            flat.grad.mul_((args.grad_clip / flat.grad.norm().clamp(min=1e-12)).clamp(max=1))
        run.adam.step(flat.data, flat.grad, args.lr * factor, t)
        run.note(flat.grad.sum() + flat.data.sum())
        flat.grad.zero_()
    if run.ema is not None:
        decay = min(args.ema, (1 + t) / (10 + t)) if args.ema_warmup else args.ema
        run.ema.lerp_(flat.data, 1 - decay)
    ids = torch.cat([c.puzzle_ids for c in run.carries])
    grads = torch.cat([d.grad for d in run.deltas])
    rows = run.world.gather(torch.cat((grads, ids[:, None].float()), dim=1))   # exact below 2 ** 24 puzzles
    run.note(rows[:, :-1].sum())
    sign_sgd(run.model.puzzle_emb, rows[:, -1], rows[:, :-1], args.puzzle_emb_lr * factor,
             args.puzzle_emb_weight_decay)
    for d in run.deltas:
        d.grad.zero_()
    run.step += 1


def train_metrics(run):
    """Means since the last log line, as train/...; the one place that waits for the device. Raises UserError on NaN."""
    totals = run.world.sum(run.sums.clone()).tolist()
    bad = run.world.agree(int(run.nan_step))
    if bad:
        raise UserError(f"the loss, a gradient or a weight is not finite at step {bad}; the last good checkpoint is "
                        f"kept: lower --lr and --resume")
    rows = max(1, run.step - run.logged_step) * run.args.global_batch_size
    names = metric_names(run.cfg)
    count = totals[0]
    # of the rows that halted, None where none did
    metrics = {f"train/{n}": v / count if count else None for n, v in zip(names[1:5], totals[1:5])}
    metrics |= {f"train/{n}": v / rows for n, v in zip(names[5:], totals[5:])}
    metrics["train/loss"] = (totals[5] + 0.5 * (totals[6] + totals[7])) / rows
    metrics["train/count"] = count
    return metrics


def evaluate(run, test, limit):
    """val/... of the test split, by the averaged weights. Raises UserError, with the valid names, for --monitor."""
    run.with_ema()
    run.model.eval()
    results = scoring.evaluate(run.model, test, run.world, run.rows // run.args.grad_accum, limit=limit)
    run.model.train()
    run.with_ema()
    metrics = {f"val/{k}": v for k, v in results.items()}
    if run.args.monitor not in metrics and run.args.monitor != "none":
        raise UserError(f"--monitor {run.args.monitor} is not measured; choose one of {', '.join(metrics)}, none")
    return metrics


def is_best(run, metrics):
    """Whether the monitored one is better than ever before."""
    if run.args.monitor == "none":
        return False
    value, sign = metrics[run.args.monitor], 1 if run.args.monitor_mode == "max" else -1
    best = run.best is None or sign * value > sign * run.best
    run.best = value if best else run.best
    return best


def sanity_checks(run, splits, log):
    """First batch of every split, a forward and a backward, an evaluation, before hours are spent. Raises UserError."""
    rows = run.rows // run.args.grad_accum
    for split in reversed(splits):   # the training batch comes last, and is used below
        for line in split.check() if run.world.rank == 0 else ():   # reads all of it
            log.say(f"checked {line}")
        inputs, labels, ids = arrays = split.gather(np.arange(min(rows, len(split))), size=rows)
        asked = ~np.isnan(labels).any(-1) if run.cfg.regression else labels != IGNORE
        if not asked.any():
            raise UserError(f"{split.name}: all labels of the first {rows} rows are ignored; build the dataset again")
        if np.isnan(inputs).any():
            raise UserError(f"{split.name}: an input of the first {rows} rows is NaN; build the dataset again")
        log.say(f"checked the first batch of {split.name}: inputs {inputs.shape} {inputs.dtype} in {inputs.min():.6g} "
                f".. {inputs.max():.6g}, labels {labels.shape} {labels.dtype}, {asked.mean():.0%} asked, puzzle rows "
                f"{ids.min()} .. {ids.max()}")
    batch = Batch(*(torch.from_numpy(a).to(run.world.device) for a in (*arrays, np.zeros(rows, np.int32))))
    carry, logits, q = run.model.step(run.model.empty_carry(batch), batch, run.deltas[0])
    loss, _ = act_loss(run.cfg, carry, logits, q)
    (loss / rows).backward()
    norm = (run.deltas[0].grad if run.args.freeze_weights else run.flat.grad).norm().item()
    if not (math.isfinite(loss.item()) and math.isfinite(norm)):
        raise UserError(f"the first loss is {loss.item()} and its gradient norm {norm}; look at the data and --lr")
    log.say(f"checked a forward and a backward: logits {tuple(logits.shape)} {str(logits.dtype)[6:]}, "
            f"loss {loss.item() / rows:.4f}, gradient norm {norm:.4f}")
    run.flat.grad.zero_()
    run.deltas[0].grad.zero_()
    log.say(f"checked an evaluation: {', '.join(evaluate(run, splits[1], limit=1))}")


class Stopped(Exception):
    """A signal that ends the run where it is; args[0] is its number."""


class StopSignal:
    """Within it SIGTERM and SIGINT ask the loop to stop after its step. With at_once, or on a second Ctrl-C, they raise
    Stopped."""

    def __init__(self):
        self.number, self.at_once = 0, False

    def __enter__(self):
        self.before = {n: signal.signal(n, self.catch) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number, frame):
        if self.at_once or self.number == number == signal.SIGINT:
            raise Stopped(number)
        self.number = number


def must_stop(run, stopper, started):
    """Signal number to stop for, LIMIT_REACHED for --max-steps or --max-minutes, else 0: the same on every rank."""
    args = run.args
    limit = (args.max_steps is not None and run.step >= args.max_steps
             or args.max_minutes is not None and time.time() - started > 60 * args.max_minutes)
    return run.world.agree(stopper.number or LIMIT_REACHED * limit)


def train(run, split, test, log, total_steps):
    """The loop: step, log, save, evaluate, stop. Returns (the last val/... or None, what stopped it)."""
    args, world = run.args, run.world
    started, tick, outcome, reason = time.time(), time.perf_counter(), None, 0
    bar = tqdm(total=total_steps, initial=run.step, disable=world.rank > 0, unit="step", dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 20)
    with StopSignal() as stopper, bar:
        if run.eval_due:   # it was stopped while it evaluated
            outcome = evaluate_and_save(run, test, log, total_steps, stopper)
        resident = Resident(split, world.device) if Resident.fits(split, world.device) else None
        make = resident.batch if resident else Batch
        for tensors, cursor in prefetch(stream(split, args, world, run.cursor, run.step, resident)):
            if run.step >= min(total_steps, args.max_steps or total_steps):
                break
            batch = make(*(t.to(world.device, non_blocking=True) for t in tensors))
            factor = schedule(run.step + 1, total_steps, args.lr_warmup_steps, args.lr_min_ratio)
            run.max_steps.fill_(train_max_steps(args, run.step / total_steps))
            backward(run, batch)
            update(run, factor)
            run.cursor = cursor
            bar.update()
            reason = must_stop(run, stopper, started)
            ends = cursor.rng is None or run.step == total_steps       # of an iteration, or of the run
            run.eval_due = ends or reason == LIMIT_REACHED
            log_now = ends or run.step % args.log_interval == 0
            save_now = run.eval_due or reason or args.checkpoint_interval and run.step % args.checkpoint_interval == 0
            if not (log_now or save_now):
                continue
            metrics = train_metrics(run)                               # waits for the device, and refuses a NaN
            run.train_s += time.perf_counter() - tick
            if log_now:
                log_step(run, log, bar, metrics, args.lr * factor)
            if save_now:
                save(run, log)
            if run.eval_due:
                reason = max(reason, world.agree(stopper.number))      # saving may have taken a while
            if reason > LIMIT_REACHED:
                break
            if run.eval_due:
                outcome = evaluate_and_save(run, test, log, total_steps, stopper)
            if reason:
                break
            tick = time.perf_counter()
    return outcome, reason


def evaluate_and_save(run, test, log, total_steps, stopper):
    """Evaluate, and save again, now with the outcome. All was saved before: a signal need not wait for the end."""
    stopper.at_once = True
    metrics = evaluate(run, test, run.args.eval_limit)
    stopper.at_once = run.eval_due = False
    log.write("val", run.step, epoch=run.epoch, **metrics)
    shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
    log.say(f"step {run.step}/{total_steps}: {shown}")
    save(run, log, is_best(run, metrics))
    if run.world.rank == 0:
        draw(log, plot, [run.args.run_dir], Path(run.args.checkpoint_path) / "train_vs_val.png")
    return metrics


def draw(log, picture, *args):
    """picture(*args), which returns its path. A full disk costs the picture, not the run."""
    try:
        return picture(*args)
    except OSError as e:
        log.say(f"a picture could not be written: {e}")


def log_step(run, log, bar, metrics, lr):
    """Write the means since the last line, and begin new ones."""
    dt_ms = 1000 * (run.train_s - run.logged_s) / (run.step - run.logged_step)
    log.write("train", run.step, epoch=run.epoch, **{"train/lr": lr}, **metrics, dt_ms=dt_ms)
    score = "within_tolerance" if run.cfg.regression else "exact_acc"
    right = "-" if metrics[f"train/{score}"] is None else f"{metrics[f'train/{score}']:.3f}"
    bar.set_postfix_str(f"loss {metrics['train/loss']:.3f} {score} {right} {dt_ms:.0f} ms")
    run.logged_step, run.logged_s = run.step, run.train_s
    run.sums.zero_()


def estimate_without_gpu(args, cfg, meta, device):
    """One line with what the run would take here, from a measured step of a few rows; raised as a UserError."""
    rows = 4 if cfg.seq_len > 100 else 16
    total = total_training_steps(args, meta)
    small = argparse.Namespace(**{**vars(args), "global_batch_size": rows, "grad_accum": 1})
    cfg = replace(cfg, num_puzzles=1)
    run = Run(small, cfg, scoring.World(0, 1, device))
    batch = synthetic_batch(cfg, rows)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        backward(run, batch)
        update(run, 1.0)
        seconds.append(time.perf_counter() - start)
    step = min(seconds) * args.global_batch_size / rows
    raise UserError(f"no GPU here: {args.preset} takes {total:,} steps of about {step:.0f} s on this {device.type} "
                    f"(estimated from {rows} rows in {min(seconds):.2f} s), {step * total / 86400:,.0f} days; add "
                    f"--allow-cpu to do it all the same, "
                    f"or try --preset mini")


def synthetic_batch(cfg, rows):
    """A Batch of random tokens or numbers in the shapes of a Config."""
    g = torch.Generator().manual_seed(0)
    if cfg.regression:
        question, answer = (torch.randn(rows, cfg.seq_len, dim, generator=g) for dim in (cfg.input_dim, cfg.target_dim))
    else:
        question, answer = torch.randint(1, cfg.vocab_size, (2, rows, cfg.seq_len), dtype=torch.int32, generator=g)
    ids = torch.randint(cfg.num_puzzles, (rows,), dtype=torch.int32, generator=g)
    return Batch(question, answer, ids, torch.zeros(rows, dtype=torch.int32))


# ---------------------------------------------------------------------------------------------
# --bench: how near to the machine's peak

def step_flops(cfg):
    """(forward, training step) FLOPs of one row and supervision step by formula; multiply-add = 2, matrix products only.

    A net costs twice its multiply-adds; T (n + 1) nets go forward, and backward costs the last n + 1 twice more."""
    D, L, S = cfg.hidden_size, cfg.length, cfg.seq_len
    mixer = 3 * D * L * swiglu_width(L, cfg.expansion) if cfg.mixer == "mlp" else 4 * L * D * D + 2 * L * L * D
    net = 2 * cfg.num_layers * (mixer + 3 * L * D * swiglu_width(D, cfg.expansion))
    ends = 2 * S * D * (cfg.input_dim or cfg.vocab_size) + 2 * S * D * (cfg.target_dim or cfg.vocab_size) + 4 * D
    forward = cfg.H_cycles * (cfg.L_cycles + 1) * net + ends
    # y and z enter the last round as leaves that want a gradient, and the one-hot input wants none
    return forward, forward + 2 * (cfg.L_cycles + 1) * net + 2 * ends - 2 * S * D * (cfg.input_dim or cfg.vocab_size)


def counted_flops(cfg):
    """The same two figures by torch's FLOP counter, on the meta device, where nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        model = TRM(cfg, None).train()
        batch = Batch(*(t.to("meta") for t in synthetic_batch(replace(cfg, num_puzzles=1), 1)))
        carry = model.empty_carry(batch)
        with FlopCounterMode(display=False) as forward:
            carry, logits, q = model.step(carry, batch)
        with FlopCounterMode(display=False) as backward:
            (logits.sum() + q.sum()).backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


def wait(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds_of(function, repeats, device):
    """Times of single calls in seconds, each waited for."""
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - start)
    return times


def matmul_peak(device, dtype):
    """FLOP/s of a large square product, the best of several."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(seconds_of(lambda: a @ a, 8, device))


def bench(args, world, n):
    """Time n training steps on this machine; prints a table and appends a line to bench.jsonl (rank 0)."""
    shape = dict(zip(SHAPE_KEYS, SHAPES[args.preset]))
    dataset = Split(args.data, "train") if all(Path(d).exists() for d in args.data) else None
    cfg = config_of(args, dataset.meta if dataset else shape)
    run, device = Run(args, cfg, world), world.device
    if args.compile and not compiler_lacks(device):
        compile_model(run.model, args.compile_unit, args.compile_mode)
    batch = synthetic_batch(cfg, run.rows)

    def step():
        backward(run, batch)
        update(run, 1.0)

    def forward():
        for part, carry, delta in zip(run.batches, run.carries, run.deltas):
            new, logits, q = run.model.step(carry, part, delta)
            act_loss(cfg, new, logits, q)

    def communicate():
        world.sum(run.flat.grad)
        world.gather(torch.cat([torch.cat((d.grad, d.grad[:, :1]), dim=1) for d in run.deltas]))
    step()
    wait(device)
    first_s = time.perf_counter() - STARTED
    step()
    times = median_ms({"step": step, "forward": forward, "optimizer": lambda: update(run, 0.0),
                       "communication": communicate}, n, device, run.model.dtype)
    data_ms = None   # without the dataset
    if dataset:
        source = stream(dataset, args, world, Cursor(), 0)
        data_ms = 1000 * float(np.median(seconds_of(lambda: next(source), n + 1, device)[1:]))
    flops, counted = (run.rows * f for f in (step_flops(cfg)[1], counted_flops(cfg)[1]))
    report({"preset": args.preset, "what": "training step", "compile": args.compile and args.compile_unit,
            **speed(cfg, world, run.rows, flops, counted, times["step"], times["peak_tflops"]), "first_step_s": first_s,
            "forward_ms": times["forward"], "backward_ms": times["step"] - times["forward"] - times["optimizer"],
            "optimizer_ms": times["optimizer"], "of it communication_ms": times["communication"],
            "data_ms": data_ms, "n": n}, world)


def median_ms(calls, n, device, dtype):
    """{name: ms} of each of the calls, in turn with the matmul peak, so that a machine whose speed drifts is compared
    with itself; and peak_tflops."""
    seconds, peaks = {name: [] for name in calls}, []
    for _ in range(n):
        peaks.append(matmul_peak(device, dtype))
        for name, call in calls.items():
            seconds[name] += seconds_of(call, 1, device)
    times = {name: 1000 * float(np.median(s)) for name, s in seconds.items()}
    return {**times, "peak_tflops": float(np.median(peaks)) / 1e12}


def speed(cfg, world, rows, flops, counted, ms, peak_tflops):
    """What both benches print of FLOPs, and rows, of each rank that took ms."""
    memory = (torch.cuda.max_memory_allocated() if world.device.type == "cuda"
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    tflops = flops / ms / 1e9
    return {"device": device_name(world.device), "ranks": world.size, "dtype": cfg.dtype, "hidden_size": cfg.hidden_size,
            "rows of a rank": rows, "ms": ms, "rows_per_s": 1000 * rows * world.size / ms, "gflop": flops / 1e9,
            "gflop by torch's counter": counted / 1e9, "tflops": tflops, "peak_tflops": peak_tflops,
            "share_of_peak": tflops / peak_tflops, "peak_memory_gib": memory / 2 ** 30}


def report(row, world):
    """Print the figures of a bench and append them to bench.jsonl (rank 0)."""
    if world.rank == 0:
        for key, value in row.items():
            text = value if not isinstance(value, float) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
            print(f"{key:>24}  {text}")
        with open("bench.jsonl", "a") as f:
            f.write(json.dumps({**row, "git": git_hash(), "torch": torch.__version__}) + "\n")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} x {platform.machine()} {device.type}"


# ---------------------------------------------------------------------------------------------

def total_training_steps(args, meta):
    return int(args.epochs * meta["total_groups"] * meta["mean_puzzle_examples"] / args.global_batch_size)


def prepare_run(args, checkpoint, notes, world):
    """(Run, train split, test split, Log) ready to go on."""
    splits = [Split(args.data, split, args.data_test, args.seq_len) for split in ("train", "test")]
    cfg = config_of(args, splits[0].meta)
    splits[0].must_agree(splits[1].meta, splits[1].dirs[0] / "test")
    if args.seq_len not in (None, cfg.seq_len):
        raise UserError(f"--seq-len {args.seq_len} is for latent episodes; {splits[0].dirs[0]} has {cfg.seq_len}: leave it out")
    if cfg.regression and args.monitor == parser().get_default("monitor"):
        args.monitor, args.monitor_mode = "val/regression_loss", "min"
    meta, data = splits[0].meta, about_data(*splits)
    if checkpoint is not None:
        must_match(checkpoint, cfg, data)
    total_steps = total_training_steps(args, meta)
    if total_steps < 1:
        raise UserError(f"--epochs {args.epochs} of {meta['total_groups']} groups do not fill one batch of "
                        f"--global-batch-size {args.global_batch_size}; raise the one or lower the other")
    if args.run_dir is None:
        args.run_dir = world.gather_objects(new_run_dir(args.preset) if world.rank == 0 else None)[0]
    args.checkpoint_path = args.checkpoint_path or args.run_dir
    if checkpoint is None and checkpoints(args.checkpoint_path):
        raise UserError(f"{args.checkpoint_path} holds the checkpoints of a run; go on with --resume "
                        f"{args.checkpoint_path}, or name another --run-dir")
    start = checkpoint or (args.init and first_weights(args.init, cfg, data))
    run = Run(args, cfg, world, start, meta["total_groups"] * meta["mean_puzzle_examples"])
    run.data = data
    log = Log(Path(args.run_dir), args, world.rank, checkpoint)
    for note in notes:
        log.say(note)
    if checkpoint is not None:
        run.restore(checkpoint)
        checkpoint.clear()   # it may be gigabytes
        log.say(f"resumed from {args.resume} at step {run.step}"
                + ("" if run.carries else "; it holds no carry: every row begins a new puzzle"))
    lacks = compiler_lacks(world.device)
    if args.compile and lacks:
        log.say(f"not compiled, which is slower: this machine lacks {lacks}")
    elif args.compile:
        compile_model(run.model, args.compile_unit, args.compile_mode)
    table = run.model.puzzle_emb.numel()
    n_params = sum(p.numel() for p in run.model.parameters())
    log.write("start", run.step, command=shlex.join(sys.argv), git=git_hash(), settings=vars(args), config=asdict(cfg),
              notes=notes, began=log.began, job=os.environ.get("TORCHELASTIC_RUN_ID"), torch=torch.__version__,
              device=str(world.device), ranks=world.size, total_steps=total_steps,
              parameters=n_params, parameters_with_puzzle_table=n_params + table)
    log.say(f"{args.run_dir}: {n_params:,} parameters, {n_params + table:,} with the puzzle table; {total_steps:,} steps of "
            f"{args.global_batch_size} rows on {world.size} x {world.device.type}, {cfg.dtype}")
    if not args.skip_sanity_checks:
        sanity_checks(run, splits, log)
    return run, *splits, log, total_steps


def first_weights(path, cfg, data):
    """{"model": state dict} of --init, of our checkpoints (average) or a published one. A table of other puzzles is
    replaced by its mean row. Raises UserError."""
    content = load_file(scoring.find_file(path))
    state = scoring.read_model(content, asdict(cfg), cfg.seq_len, ema=True)[1]
    if content.get("identity", data["identity"]) != data["identity"] or len(state["puzzle_emb"]) != cfg.num_puzzles:
        state["puzzle_emb"] = state["puzzle_emb"].mean(0).repeat(cfg.num_puzzles, 1)
    return {"model": state}


def new_run_dir(preset):
    """Make a folder for a run; two that start in the same second get two."""
    name = f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        try:
            Path(name + suffix).mkdir(parents=True)
            return name + suffix
        except FileExistsError:
            continue


def main(argv=None):
    try:
        flags = parser().parse_args(argv)
        if flags.plot:
            name = "train_vs_val.png" if len(flags.plot) == 1 else "comparison.png"
            print(plot(flags.plot, checkpoint_folder(Path(flags.plot[0])) / name))
            return 0
        world = scoring.start_world(flags.device, flags.dist_timeout)
        code = run_preset(*settings(argv, world), world)
    except (UserError, OSError):
        if int(os.environ.get("RANK", 0)):   # mostly rank 0 says the same, and then torchrun ends this one
            time.sleep(2)
        raise
    world.close()
    return code


def run_preset(args, checkpoint, notes, world):
    check(args, world)
    if args.dtype == "auto":   # rank 0 decides
        args.dtype = world.gather_objects(fastest_dtype(world.device))[0]
    if args.bench:
        bench(args, world, args.bench)
        return 0
    big = args.preset != "mini" and args.data == PRESETS[args.preset]["data"]
    if big and world.device.type == "cpu" and not args.allow_cpu:
        shape = dict(zip(SHAPE_KEYS, SHAPES[args.preset]))
        estimate_without_gpu(args, config_of(args, shape), shape, world.device)
    if args.data == PRESETS["mini"]["data"] and not Path(args.data[0]).exists():
        build_mini(args.data[0], world)
    run, split, test, log, total_steps = prepare_run(args, checkpoint, notes, world)
    began = time.time()
    try:
        try:
            metrics, reason = train(run, split, test, log, total_steps)
        except Stopped as e:
            reason = e.args[0]
        if reason > LIMIT_REACHED:
            log.say(f"stopped by {signal.Signals(reason).name} at step {run.step}; go on with --resume {args.run_dir}")
            return 128 + reason
        metrics = metrics or evaluate(run, test, args.eval_limit)   # none: it was resumed at its end
        finished = run.step >= total_steps or run.cursor.iteration > iterations(args)   # not: stopped by --max-steps
        finish(run, test, log, {k.removeprefix("val/"): v for k, v in metrics.items()}, finished, time.time() - began)
    finally:
        log.close()
    return 0


def finish(run, test, log, results, finished, wall_s):
    """The curves, a picture of one puzzle for the small boards, and the RESULT line, which ends the log."""
    args = run.args
    if run.world.rank:
        return
    run.with_ema()
    run.model.eval()
    pictures = [Path(args.checkpoint_path) / "train_vs_val.png"]   # drawn at the last evaluation
    if args.preset == "mini" and not run.cfg.regression:
        pictures.append(draw(log, scoring.puzzle_picture, run.model, test, Path(args.run_dir) / "puzzle.png", run.rows))
    line = scoring.result_line(args.preset, results, run.step, run.train_s, run.world.device)
    log.say(f"wall time of training, evaluation and saving: {wall_s:.0f} s; pictures: {', '.join(map(str, pictures))}")
    log.say(line)
    log.write("result", run.step, line=line, train_s=run.train_s, finished=finished, **results)


def build_mini(path, world):
    """Generate mini's dataset (rank 0)."""
    if world.rank == 0:
        from prepare import sudoku
        sudoku.main(["--source", "generate", "--size", "6", "--num-aug", "1000", "--output-dir", path])
    world.gather_objects(None)


if __name__ == "__main__":
    cli(main)
