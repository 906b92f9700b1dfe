"""Train a TRM.

python train.py                                   mini: 6x6 Sudoku, on a CPU
torchrun --nproc_per_node=8 train.py --preset arc1
python train.py --preset sudoku --global-batch-size 768 --lr 1e-4
python train.py --resume runs/arc1-20260102-030405
python train.py --preset arc1 --run-dir DIR --resume
                                                  resumes, or starts a new run
"""

# In this order: presets, flags, optimizers, the state of a run, one training step, logging and evaluation,
# the loop, and what happens before and after it.

import argparse
import math
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import eval as scoring
import prepare
from data import (
    SamplerState,
    Split,
    assign_canvases,
    batch_order,
    canvas_order,
    min_halt_steps,
    prefetch,
    random_crop_offsets,
)
from model import (
    MEAN_OVER_ALL_ROWS,
    TRM,
    Batch,
    Carry,
    Config,
    act_loss,
    build_model,
    compile_model,
    config_from_dict,
    flops,
    metric_names,
)
from tools import draw, hub
from tools.common import (
    Parser,
    bounded,
    cli,
    fastest_dtype,
    git_hash,
    matmul_flops,
    missing_compiler,
    progress,
    require,
    start_world,
    synchronize,
    user_error,
)
from tools.run_folder import (
    Log,
    StopSignals,
    checkpoints,
    find_checkpoint,
    link_or_copy,
    load_file,
    new_run_dir,
    newest_run,
    read_log,
    save_checkpoint,
)

# ---------------------------------------------------------------------------------------------
# Presets: what each task changes. A flag on the command line wins.

# The published settings of the 8-GPU reproduction (SPEC section 7).
SUDOKU = dict(
    data=["data/sudoku-extreme-1k-aug-1000"],
    epochs=50_000,
    eval_interval=5_000,
    weight_decay=1.0,
    puzzle_emb_weight_decay=1.0,
    puzzle_emb_lr=1e-4,
    eval_limit=4096,
)
MAZE = dict(SUDOKU, data=["data/maze-30x30-hard-1k"], L_cycles=4)
ARC = dict(
    epochs=100_000,
    eval_interval=5_000,
    eval_limit=40_000,  # of 386,000 rows, 965 per task
)
CANVASES = [11, 16, 21, 30]
# SwiGLUs of at most half the published width; REPORT.md compares them
NARROW = dict(expansion=2.0, width_multiple=64)
# Small models for a laptop
MINI = dict(
    hidden_size=64,
    H_cycles=1,
    puzzle_emb_len=1,
    puzzle_emb_ndim=64,
    dtype="auto",
    global_batch_size=64,
    lr_warmup_steps=100,
    ema=0.99,
    ema_warmup=True,
)
SUDOKU_MINI = dict(
    MINI,
    mixer="mlp",
    pos_encodings="none",
    num_heads=1,
    L_cycles=1,
    puzzle_emb_lr=4e-3,
    lr_min_ratio=0.0,
    weight_decay=0.5,
    puzzle_emb_weight_decay=0.5,
    train_max_steps=[2, 8],
    **NARROW,
)
PRESETS = {
    "mini": dict(SUDOKU_MINI, data=["data/sudoku-6x6-mini"], lr=8e-3, epochs=85, eval_interval=17),
    "sudoku-9x9": dict(
        SUDOKU_MINI,
        data=["data/sudoku-9x9"],
        hidden_size=128,
        puzzle_emb_ndim=128,
        lr=4e-3,
        epochs=192,
        eval_interval=32,
        eval_limit=256,
    ),
    "mini-maze": dict(
        MINI,
        data=["data/maze-9x9-hard"],
        score_mod="grid",
        pos_encodings="none",
        num_heads=8,
        L_cycles=2,
        halt_max_steps=8,
        halt_exploration_prob=1.0,
        loss="softmax",
        lr=3e-3,
        puzzle_emb_lr=4e-3,
        lr_min_ratio=0.0,
        train_max_steps=[4, 6],
    ),
    "mini-arc": dict(
        MINI,
        data=["data/arc-6x6-mini-tune"],
        canvases=[6],
        num_heads=2,
        pos_encodings="learned",
        num_layers=1,
        L_cycles=1,
        halt_max_steps=2,
        loss="softmax",
        lr=2e-3,
        puzzle_emb_lr=5e-2,
        lr_min_ratio=0.0,
        train_max_steps=[1, 2],
        epochs=3600,
        eval_interval=900,
        **NARROW,
    ),
    "sudoku": dict(SUDOKU, mixer="mlp", pos_encodings="none"),
    "sudoku-fast": dict(SUDOKU, mixer="mlp", pos_encodings="none", **NARROW),
    "sudoku-att": SUDOKU,
    "maze": MAZE,
    # trained on 100,000 generated mazes, scored on the published test set
    "maze-gen": dict(
        MAZE,
        data=["data/maze-30x30-generated"],
        data_test=["data/maze-30x30-hard-1k"],
        epochs=500,
        eval_interval=50,
    ),
    "arc1": dict(ARC, data=["data/arc1concept-aug-1000"]),
    "arc1-fast": dict(ARC, data=["data/arc1concept-aug-1000"], canvases=CANVASES),
    "arc2": dict(ARC, data=["data/arc2concept-aug-1000"]),
    "arc2-fast": dict(ARC, data=["data/arc2concept-aug-1000"], canvases=CANVASES),
}

# ---------------------------------------------------------------------------------------------
# Flags


def flags(**defaults):
    """The parser. defaults: a row of PRESETS or the settings of a checkpoint."""
    parser = Parser(__doc__)
    on_off = argparse.BooleanOptionalAction
    count, rate = bounded(int, 1), bounded(float, 0)
    share, decay = bounded(float, 0, 1), bounded(float, 0, 0.999999)
    preset_help = f"settings of a task (default: mini): {', '.join(PRESETS)}"

    # ---- what to train on
    add = parser.add_argument_group("task").add_argument
    add("--preset", choices=list(PRESETS), metavar="NAME", help=preset_help)
    add("--data", nargs="+", metavar="DIR", help="dataset folders to join (default: the preset's)")
    add("--data-test", nargs="+", metavar="DIR", help="folders of the test split (default: --data)")
    add("--seq-len", type=count, help="window length of latent episodes (default: the longest)")
    add("--canvases", nargs="+", type=count, help="ARC: put each task on the smallest N x N")
    add("--seed", type=bounded(int, 0, 2**31), default=0, help="seed of weights and sampling")
    add("--init", metavar="CKPT", help="initial weights; new puzzles start from the mean puzzle row")

    # ---- the fields of Config; those without metadata are sizes of the dataset
    add = parser.add_argument_group("model").add_argument
    for f in fields(Config):
        if f.metadata:
            add("--" + f.name.replace("_", "-"), default=f.default, **f.metadata)

    # ---- optimization
    add = parser.add_argument_group("training").add_argument
    add("--global-batch-size", type=count, default=1536, help="rows per step over all ranks")
    add("--grad-accum", type=count, default=1, help="micro-batches per step, raised when memory runs out")
    add("--epochs", type=count, default=1, help="passes over the groups of the dataset")
    add("--eval-interval", type=count, default=1, help="epochs between evaluations")
    add("--lr", type=rate, default=2e-4, help="learning rate of the weights (AdamATan2)")
    add("--puzzle-emb-lr", type=rate, default=1e-2, help="learning rate of the puzzle table (SignSGD)")
    add("--weight-decay", type=rate, default=0.1, help="weight decay of the weights")
    add("--puzzle-emb-weight-decay", type=rate, default=0.1, help="weight decay of the puzzle table")
    add("--beta1", type=decay, default=0.9, help="AdamATan2's decay of the first moment")
    add("--beta2", type=decay, default=0.95, help="AdamATan2's decay of the second moment")
    add("--grad-clip", type=rate, default=0.0, help="maximum gradient norm (0: no clipping)")
    add("--lr-warmup-steps", type=bounded(int, 0), default=4000, help="steps of linear warm-up")
    add("--lr-min-ratio", type=share, default=1.0, help="end of the cosine schedule (1: constant)")
    add("--ema", type=decay, default=0.999, help="decay of the averaged weights (0: no average)")
    add("--ema-warmup", action=on_off, default=False, help="shorter average at the start of training")
    add("--freeze-weights", action=on_off, default=False, help="train only the puzzle table")
    add(
        "--train-max-steps",
        nargs=2,
        type=count,
        metavar=("A", "B"),
        help="raise N_sup from A to B in training",
    )
    add("--halt-exploration-prob", type=share, default=0.1, help="probability of a minimum of steps")
    add("--max-steps", type=count, help="stop after N training steps")
    add("--max-minutes", type=rate, help="stop after M minutes")

    # ---- files, logging, hardware
    add = parser.add_argument_group("run").add_argument
    add("--run-dir", metavar="DIR", help="run folder (default: runs/PRESET-TIME)")
    resume_help = "run folder or checkpoint to resume (default: --run-dir, else the newest run)"
    add("--resume", nargs="?", const="newest", metavar="PATH", help=resume_help)
    add("--checkpoint-interval", type=count, help="steps between checkpoints, besides evaluations")
    add("--keep-last", type=bounded(int, 0), default=3, help="checkpoints to keep (0: all)")
    add(
        "--monitor",
        default="val/exact_acc",
        metavar="METRIC",
        help="metric of best.ckpt (none: no best.ckpt)",
    )
    add("--monitor-mode", default="max", choices=["max", "min"], help="whether --monitor should rise or fall")
    add("--eval-limit", type=count, help="examples per evaluation (the last one scores all)")
    add("--log-interval", type=count, default=10, help="steps between log lines")
    add("--skip-sanity-checks", action="store_true", help="start without reading the whole dataset first")
    add("--wandb", metavar="[ENTITY/]PROJECT", help="also log to Weights & Biases")
    add(
        "--device",
        default="auto",
        choices=["auto", "cuda", "mps", "cpu"],
        help="device (auto: cuda, mps, cpu)",
    )
    add("--compile", action=on_off, default=True, help="use torch.compile")
    add("--allow-cpu", action="store_true", help="train a large preset without a GPU")
    parser.set_defaults(**defaults)
    return parser


# Not stored in checkpoints: they concern one start of a run.
PER_START = ("resume", "max_steps", "max_minutes", "device", "allow_cpu")
# A resumed run cannot change these; load_run compares the fields of Config.
FIXED = ("preset", "global_batch_size", "seed", "eval_interval", "canvases")


def checkpoint_to_resume(args):
    """The path of the checkpoint that --resume names, or None for a new run."""
    if args.resume is None:
        return None
    if args.resume != "newest":
        return find_checkpoint(args.resume)
    if args.run_dir:
        # --run-dir DIR --resume: the same command starts and resumes a run
        return find_checkpoint(args.run_dir) if checkpoints(args.run_dir) else None
    return find_checkpoint(newest_run(args.preset))


def settings(argv, world):
    """(args, checkpoint or None, notes to print). Precedence: defaults, then the preset or the checkpoint's
    settings, then the command line."""
    # ---- a new run
    typed = flags().parse_args(argv)
    path = world.broadcast_object(checkpoint_to_resume(typed) if world.rank == 0 else None)
    if path is None:
        preset = typed.preset or "mini"
        args = flags(preset=preset, **PRESETS[preset]).parse_args(argv)
        args.resume = None
        check_settings(args, world)
        return args, None, []

    # ---- a resumed run: every rank maps the file into memory and reads only what it needs
    checkpoint = load_file(path, verify=world.rank == 0)
    has_state = isinstance(checkpoint, dict) and {"settings", "m"} <= checkpoint.keys()
    require(has_state, f"{path} holds no training state; --resume needs a checkpoint, --init takes weights")
    # the defaults fill in for settings that earlier code did not store, or stored as None
    saved = vars(flags().parse_args([]))
    saved |= {name: value for name, value in checkpoint["settings"].items() if value is not None}
    saved = {name: value for name, value in saved.items() if name in typed and name not in PER_START}
    saved["run_dir"] = str(path.parent)
    args = flags(**saved).parse_args(argv)
    # what the command line changes
    notes = []
    for name, old in saved.items():
        new = getattr(args, name)
        if new != old and name != "run_dir":
            change = f"--{name.replace('_', '-')} {old} -> {new}"
            require(name not in FIXED, f"a run cannot change {change}; start a new run")
            notes.append(f"changed on resume: {change}")
    args.resume = str(path)
    check_settings(args, world)
    return args, checkpoint, notes


def check_settings(args, world):
    """Refuse flags that contradict each other, and let rank 0 choose --dtype auto."""
    # torchrun runs the same command again after a failure
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    require(
        args.resume or not restarts or (args.run_dir and "--resume" in sys.argv),
        "torchrun --max-restarts would start over after a failure; add --run-dir DIR --resume",
    )
    # every micro-batch of every rank has as many rows
    parts = world.size * args.grad_accum
    nearest = max(1, args.global_batch_size // parts) * parts
    require(
        args.global_batch_size % parts == 0,
        f"--global-batch-size must be a multiple of {parts} (ranks x micro-batches); use {nearest}",
    )
    # both of these know one number of positions
    needs_whole_grid = args.mixer == "mlp" or args.score_mod != "none"
    require(
        not (args.canvases and needs_whole_grid),
        "--canvases needs --mixer attn and --score-mod none",
    )
    if args.dtype == "auto":
        args.dtype = world.broadcast_object(fastest_dtype(world.device))


def config_of(args, meta):
    """The model's Config: sizes from dataset.json, everything else from the flags of the same names."""
    sizes = dict(
        vocab_size=meta["vocab_size"],
        seq_len=meta["seq_len"],
        input_dim=meta.get("input_dim", 0),
        target_dim=meta.get("target_dim", 0),
        num_puzzles=meta["num_puzzle_identifiers"],
    )
    chosen = {f.name: getattr(args, f.name) for f in fields(Config) if f.metadata}
    return Config(**sizes, **chosen)


def rows_per_epoch(meta):
    """Training examples of an epoch: one puzzle from every group."""
    return meta["total_groups"] * meta["mean_puzzle_examples"]


def total_training_steps(args, meta):
    return int(args.epochs * rows_per_epoch(meta) / args.global_batch_size)


# ---------------------------------------------------------------------------------------------
# Optimizers: AdamATan2 for the weights, SignSGD for the rows of the puzzle table


class AdamATan2:
    """Adam with atan2 instead of the division by sqrt(v) + eps (arXiv 2407.05872), on one flat vector.

    The bias correction of the first moment stays outside the atan2, as in the published training code."""

    def __init__(self, weights, beta1, beta2, weight_decay):
        self.m = torch.zeros_like(weights)
        self.v = torch.zeros_like(weights)
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay

    def step(self, weights, grad, lr, t):
        """Update the weights in place. t: number of the step, from 1."""
        weights.mul_(1 - lr * self.weight_decay)
        self.m.lerp_(grad, 1 - self.beta1)
        self.v.lerp_(grad.square(), 1 - self.beta2)
        denominator = self.v.sqrt().div_(math.sqrt(1 - self.beta2**t))
        direction = torch.atan2(self.m, denominator)
        weights.add_(direction, alpha=-lr / (1 - self.beta1**t))


def sign_sgd(table, ids, grads, lr, weight_decay):
    """SignSGD with weight decay on the rows `ids` (G,) of the puzzle table, in place. grads: (G, ndim).

    Static shapes and no host synchronisation: rows of the same puzzle all write the same value."""
    ids = ids.long()
    # Sum the gradients of equal puzzles by a matrix product. index_add_ on CUDA would add in any order, and
    # a sum near 0 could change its sign; float64 makes the order irrelevant (MPS has only float32).
    dtype = torch.float32 if grads.device.type == "mps" else torch.float64
    same_puzzle = (ids[:, None] == ids).to(dtype)  # (G, G)
    total = same_puzzle @ grads.to(dtype)  # (G, ndim)
    decayed = table[ids] * (1 - lr * weight_decay)
    table.index_copy_(0, ids, decayed - lr * total.sign().float())


def schedule(step, total_steps, warmup, min_ratio):
    """Factor of the learning rates at a step, from 1: linear warm-up, then cosine down to min_ratio."""
    if step < warmup:
        return step / warmup
    # the share of the steps after the warm-up that is done
    progress = (step - warmup) / max(1, total_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min_ratio + (1 - min_ratio) * cosine


def train_max_steps(args, progress):
    """Supervision steps per puzzle at progress 0 .. 1 of the run: N_sup, or rising from A to B in equal
    stretches. Few at first: an untrained model learns more from many puzzles than from many steps on one."""
    if not args.train_max_steps:
        return args.halt_max_steps
    # as many equal stretches as there are values from first to last
    first, last = args.train_max_steps
    current = first + int(progress * (last - first + 1))
    return min(args.halt_max_steps, last, current)


# ---------------------------------------------------------------------------------------------
# The state of a run


class Run:
    """Everything that changes during training: weights, optimizers, EMA, carries, sampler states, counters.

    state: a state dict to start from. canvas_sizes: {canvas: number of examples per epoch}; canvas 0 is the
    whole grid."""

    def __init__(self, args, cfg, world, state=None, canvas_sizes=None):
        self.args, self.cfg, self.world = args, cfg, world
        model = build_model(cfg, state) if state else TRM(cfg, torch.Generator().manual_seed(args.seed))
        self.model = model.to(world.device).train()
        self.model.requires_grad_(not args.freeze_weights)
        # All parameters are views of one vector and all gradients of another, so that an optimizer step, an
        # all-reduce or an EMA update is one operation. Largest first: then views start at 16-byte boundaries.
        self.params = dict(sorted(self.model.named_parameters(), key=lambda item: -item[1].numel()))
        self.weights = parameters_to_vector(self.params.values()).detach()
        vector_to_parameters(self.weights, self.params.values())
        self.grad = torch.zeros_like(self.weights)
        for name, view in self.views(self.grad).items():
            self.params[name].grad = view
        # optimizers and EMA
        self.adam = AdamATan2(self.weights, args.beta1, args.beta2, args.weight_decay)
        self.ema = self.weights.clone() if args.ema else None
        # zeros added to the puzzle rows of this rank's batch, whose gradient SignSGD uses
        self.rows_per_rank = args.global_batch_size // world.size
        delta = torch.zeros(self.rows_per_rank, cfg.puzzle_emb_ndim, device=world.device)
        self.puzzle_emb_delta = delta.requires_grad_()
        self.puzzle_emb_delta.grad = torch.zeros_like(delta)
        # per canvas: the state of unfinished puzzles, and the position in the data
        self.canvas_sizes = canvas_sizes or {0: 1}
        self.carries = {}
        self.samplers = {canvas: SamplerState() for canvas in self.canvas_sizes}
        # counters
        self.step, self.train_s, self.train_flops = 0, 0.0, 0
        self.logged_step, self.logged_s = 0, 0.0
        self.total_steps, self.epoch_rows = 0, 1
        self.data_identity = {}
        # on the device, so that a step never waits for it: N_sup, metric sums since the last log line, and a
        # sum that becomes NaN or infinite as soon as anything does
        self.max_steps = torch.tensor(args.halt_max_steps, dtype=torch.int32, device=world.device)
        self.metric_sums = {}
        self.finite_check = torch.zeros((), device=world.device)

    def views(self, vector):
        """{parameter name: its part of a vector like self.weights}"""
        parts = vector.split([p.numel() for p in self.params.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(self.params.items(), parts)}

    @property
    def epoch(self):
        return self.step * self.args.global_batch_size / self.epoch_rows

    @property
    def evaluation_due(self):
        """Whether an evaluation interval ends at this step."""
        if self.step == self.total_steps:
            return True
        if len(self.samplers) == 1:
            (sampler,) = self.samplers.values()
            return sampler.rng is None  # the start of an iteration
        # several canvases: count rows over all of them
        interval = self.args.eval_interval * self.epoch_rows
        rows = self.step * self.args.global_batch_size
        return rows // interval > (rows - self.args.global_batch_size) // interval

    def step_flops(self, canvas):
        """FLOPs of one training step on all ranks."""
        cfg = replace(self.cfg, seq_len=canvas**2) if canvas else self.cfg
        return self.args.global_batch_size * flops(cfg).train_step

    def swap_ema(self):
        """Exchange the weights with their average; call it again to swap back."""
        if self.ema is not None:
            weights = self.weights.clone()
            self.weights.copy_(self.ema)
            self.ema.copy_(weights)

    def checkpoint(self):
        """The content of a checkpoint; None on other ranks than 0. A collective: carries are gathered."""
        is_writer = self.world.rank == 0
        # the carries of all ranks in global row order, one tensor at a time because they are large
        carries = {}
        for canvas, carry in self.carries.items():
            carries[canvas] = []
            for tensor in carry:
                gathered = self.world.all_gather(tensor)
                carries[canvas].append(gathered.cpu() if is_writer else None)
        if not is_writer:
            return None

        def by_name(vector):
            if vector is None:
                return None
            return {name: view.cpu() for name, view in self.views(vector).items()}

        return {
            "config": asdict(self.cfg),
            "model": {name: tensor.cpu() for name, tensor in self.model.state_dict().items()},
            "ema": by_name(self.ema),
            "m": by_name(self.adam.m),
            "v": by_name(self.adam.v),
            "carry": carries,
            "samplers": {canvas: list(state) for canvas, state in self.samplers.items()},
            "step": self.step,
            "epoch": self.epoch,
            "train_s": self.train_s,
            "train_flops": self.train_flops,
            **self.data_identity,
            "torch": str(torch.__version__),
            "settings": {k: v for k, v in vars(self.args).items() if k not in PER_START},
        }

    def restore(self, checkpoint):
        """Load everything but the weights, which the constructor took."""
        # optimizers and EMA
        for name, vector in ("m", self.adam.m), ("v", self.adam.v), ("ema", self.ema):
            if vector is not None and checkpoint[name] is not None:
                for key, view in self.views(vector).items():
                    view.copy_(checkpoint[name][key])
        # carries and sampler states
        carries, samplers = checkpoint["carry"], checkpoint.get("samplers")
        if samplers is None:
            # written before December 2026, for a single canvas
            canvas, *others = self.samplers
            require(not others, "earlier code wrote this run of several canvases; start a new run")
            samplers = {canvas: checkpoint["cursor"]}
            carries = {canvas: carries}
        # this rank's rows of the global batch
        first_row = self.world.rank * self.rows_per_rank
        rows = slice(first_row, first_row + self.rows_per_rank)
        for canvas, carry in carries.items():
            self.carries[canvas] = Carry(*(tensor[rows].to(self.world.device) for tensor in carry))
        self.samplers = {canvas: SamplerState(*state) for canvas, state in samplers.items()}
        # counters
        self.step = self.logged_step = checkpoint["step"]
        self.train_s = self.logged_s = checkpoint["train_s"]
        per_step = self.step_flops(next(iter(self.samplers)))
        self.train_flops = checkpoint.get("train_flops", self.step * per_step)


# ---------------------------------------------------------------------------------------------
# One training step


def batches(run, split):
    """Yield (canvas, Batch of this rank on the CPU, sampler state after it) from the run's position to its
    end."""
    args, n_done = run.args, run.step
    G = args.global_batch_size
    # this rank's rows of the global batch
    first_row = run.world.rank * run.rows_per_rank
    rows = slice(first_row, first_row + run.rows_per_rank)
    # one stream of batches per canvas
    several = len(run.samplers) > 1
    streams = {}
    for i, canvas in enumerate(sorted(run.samplers)):
        groups = np.flatnonzero(split.canvases == canvas)
        seed = args.seed + (i << 40)
        state = run.samplers[canvas]
        streams[canvas] = batch_order(split, seed, args.epochs, args.eval_interval, G, state, groups, several)
    # the canvas of a step follows from its number
    for step, canvas in enumerate(canvas_order(run.canvas_sizes), 1):
        if step <= n_done:
            continue
        drawn = next(streams[canvas], None)
        if drawn is None:
            return
        examples, puzzles, state = drawn
        min_steps = min_halt_steps(args.seed, step, G, args.halt_exploration_prob, args.halt_max_steps)
        offsets = random_crop_offsets(args.seed, step, G)[rows] if canvas else None
        arrays = split.gather(examples[rows], puzzles[rows], canvas=canvas, crop_offsets=offsets)
        batch = Batch(*map(torch.from_numpy, (*arrays, min_steps[rows])))
        if run.world.device.type == "cuda":
            # pinned memory is copied while the GPU computes
            batch = Batch(*(tensor.pin_memory() for tensor in batch))
        yield canvas, batch, state


def forward_backward(run, batch, canvas=0):
    """Forward and backward of one step on this rank, in micro-batches. Accumulates the gradients and metric
    sums and updates the carry."""
    batch = Batch(*(tensor.to(run.world.device, non_blocking=True) for tensor in batch))
    if canvas not in run.carries:
        run.carries[canvas] = run.model.initial_carry(batch)
    carry = run.carries[canvas]
    micro_batch_size = run.rows_per_rank // run.args.grad_accum
    for start in range(0, run.rows_per_rank, micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        old_carry = Carry(*(tensor[rows] for tensor in carry))
        micro_batch = Batch(*(tensor[rows] for tensor in batch))
        delta = run.puzzle_emb_delta[rows]
        new_carry, logits, q = run.model.step(old_carry, micro_batch, delta, run.max_steps)
        loss, sums = act_loss(run.cfg, new_carry, logits, q)
        run.finite_check += loss.detach()
        loss = loss / run.args.global_batch_size
        loss.backward()
        for name, value in sums.items():
            run.metric_sums[name] = run.metric_sums.get(name, 0) + value
        for whole, part in zip(carry, new_carry):
            whole[rows] = part


def update(run, lr_factor, canvas=0):
    """Apply both optimizers and the EMA to the gradients of all ranks. lr_factor: see schedule."""
    args, t = run.args, run.step + 1
    # ---- AdamATan2 on all weights at once
    if not args.freeze_weights:
        run.world.all_reduce(run.grad)
        if args.grad_clip:
            norm = run.grad.norm().clamp(min=1e-12)
            run.grad.mul_((args.grad_clip / norm).clamp(max=1))
        run.adam.step(run.weights, run.grad, args.lr * lr_factor, t)
        run.finite_check += run.grad.sum() + run.weights.sum()
        run.grad.zero_()
    # ---- EMA of the weights
    if run.ema is not None:
        decay = min(args.ema, (1 + t) / (10 + t)) if args.ema_warmup else args.ema
        run.ema.lerp_(run.weights, 1 - decay)
    # ---- SignSGD on the puzzle rows of this batch. The ids travel with their gradients, so that one gather
    # suffices; float32 is exact for ids below 2**24.
    ids = run.carries[canvas].puzzle_ids[:, None].float()
    grads_and_ids = run.world.all_gather(torch.cat((run.puzzle_emb_delta.grad, ids), dim=1))
    grads, ids = grads_and_ids[:, :-1], grads_and_ids[:, -1]
    run.finite_check += grads.sum()
    table, puzzle_lr = run.model.puzzle_emb, args.puzzle_emb_lr * lr_factor
    sign_sgd(table, ids, grads, puzzle_lr, args.puzzle_emb_weight_decay)
    run.puzzle_emb_delta.grad.zero_()
    run.step += 1
    run.train_flops += run.step_flops(canvas)


# ---------------------------------------------------------------------------------------------
# Logging and evaluation


def log_step(run, log, lr, start):
    """Log the means since the last log line and return them as text. The only place of a step that waits for
    the device. start: perf_counter when these steps began. Raises UserError if anything is not finite."""
    synchronize(run.world.device)
    run.train_s += time.perf_counter() - start
    *sums, finite_check = run.world.all_reduce(
        torch.stack([*run.metric_sums.values(), run.finite_check])
    ).tolist()
    require(
        math.isfinite(finite_check),
        f"the loss, a gradient or a weight became NaN or infinite after step {run.logged_step}; "
        "the last checkpoint is intact: --resume it with a lower --lr",
    )
    # ---- sums over rows become means
    sums = dict(zip(run.metric_sums, sums))
    n_steps = run.step - run.logged_step
    n_rows = n_steps * run.args.global_batch_size
    n_halted = sums.pop("count")
    metrics = {}
    for name, value in sums.items():
        if name in MEAN_OVER_ALL_ROWS:
            metrics[f"train/{name}"] = value / n_rows
        else:  # None: no row halted
            metrics[f"train/{name}"] = value / n_halted if n_halted else None
    # the training loss, as in model.act_loss
    names = metric_names(run.cfg)
    loss = metrics[f"train/{names.loss}"] + 0.5 * metrics["train/q_halt_loss"]
    dt_ms = 1000 * (run.train_s - run.logged_s) / n_steps
    metrics |= {"train/loss": loss, "train/count": n_halted, "train/lr": lr, "dt_ms": dt_ms}
    log.write("train", run.step, epoch=run.epoch, **metrics)
    # ---- start over
    run.logged_step, run.logged_s = run.step, run.train_s
    run.metric_sums = {}
    run.finite_check.zero_()
    exact = metrics[f"train/{names.exact}"] or 0.0
    return f"loss {loss:.3f} {names.exact} {exact:.3f} {dt_ms:.0f} ms"


def evaluate(run, test, limit):
    """{"val/NAME": value} on the first `limit` test examples (None: all), with the averaged weights."""
    run.swap_ema()
    run.model.eval()
    batch_size = run.rows_per_rank // run.args.grad_accum
    metrics = scoring.evaluate(run.model, test, run.world, batch_size, limit).metrics
    run.model.train()
    run.swap_ema()
    return {f"val/{name}": value for name, value in metrics.items()}


def evaluate_and_log(run, test, log):
    """Evaluate the weights that were just saved, link best.ckpt, draw the curves."""
    folder, args = Path(run.args.run_dir), run.args
    metrics = evaluate(run, test, args.eval_limit)
    if run.world.rank == 0:
        monitored = args.monitor != "none" and metrics["val/n"] > 0  # no labels in a hidden test set
        if monitored and log.is_best(args.monitor, args.monitor_mode, metrics):
            link_or_copy(folder / f"step_{run.step:08d}.ckpt", folder / "best.ckpt")
        log.write("val", run.step, epoch=run.epoch, **metrics)
        shown = [f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)]
        log.say(f"step {run.step}/{run.total_steps}: {'  '.join(shown)}")
        draw.try_to_draw(log.say, draw.plot, [folder], folder / "train_vs_val.png")
    return metrics


# ---------------------------------------------------------------------------------------------
# The loop

# Why the loop stops, also its exit code: time is up, or 128 + the number of a signal
OUT_OF_TIME = 1


def train(run, train_split, test, log):
    """Train to the end, a limit or a signal. Returns (metrics of the last evaluation or None, stop code)."""
    args, world = run.args, run.world
    metrics, stop_code = None, 0
    last_step = min(run.total_steps, args.max_steps or run.total_steps)
    started = time.perf_counter()
    with StopSignals() as signals, progress(total=run.total_steps, initial=run.step, unit="step") as bar:
        # ---- the evaluation after this checkpoint, if the run was stopped before it ended
        evaluated = any(r["event"] == "val" and r["step"] == run.step for r in log.records)
        missed = run.step > 0 and run.evaluation_due and not evaluated and resumes_in_place(args)
        if world.broadcast_object(missed):
            metrics = evaluate_and_log(run, test, log)
        timer = last_line = time.perf_counter()
        for canvas, batch, sampler in prefetch(batches(run, train_split)):
            if run.step >= last_step:
                break
            # ---- one step
            run.max_steps.fill_(train_max_steps(args, run.step / run.total_steps))
            lr_factor = schedule(run.step + 1, run.total_steps, args.lr_warmup_steps, args.lr_min_ratio)
            forward_backward(run, batch, canvas)
            update(run, lr_factor, canvas)
            run.samplers[canvas] = sampler
            bar.update()

            # ---- what is due now. A signal may reach one rank only, so the ranks agree on it.
            minutes = (time.perf_counter() - started) / 60
            out_of_time = args.max_minutes is not None and minutes > args.max_minutes
            own_code = 128 + signals.number if signals.number else OUT_OF_TIME * out_of_time
            stop_code = world.all_reduce_max(own_code)
            evaluates = run.evaluation_due or run.step == last_step or stop_code == OUT_OF_TIME
            interval = args.checkpoint_interval
            saves = evaluates or stop_code > 0 or (interval and run.step % interval == 0)

            # ---- log; a program that reads our output gets a line every 20 seconds
            if saves or run.step % args.log_interval == 0:
                line = log_step(run, log, args.lr * lr_factor, timer)
                bar.set_postfix_str(line, refresh=False)
                timer = time.perf_counter()
                if bar.disable and timer - last_line > 20:
                    last_line = timer
                    log.say(f"train {run.step}/{run.total_steps}: {line}")

            # ---- checkpoint, then evaluate with the averaged weights. The timer excludes both.
            if saves:
                content = run.checkpoint()
                if world.rank == 0:
                    save_checkpoint(args.run_dir, run.step, content, args.keep_last)
                if evaluates and stop_code <= OUT_OF_TIME:
                    metrics = evaluate_and_log(run, test, log)
                timer = time.perf_counter()
            if stop_code:
                break
    return metrics, stop_code


# ---------------------------------------------------------------------------------------------
# Before the loop


def resumes_in_place(args):
    """Whether the run continues in its own folder; otherwise it is new, or a branch of another run."""
    return bool(args.resume) and Path(args.resume).resolve().parent == Path(args.run_dir).resolve()


def check_epochs(args, checkpoint):
    """Refuse --epochs that would change the part of the sampling order that a run has already used."""
    samplers = checkpoint.get("samplers") or {0: checkpoint["cursor"][:3]}
    if len(samplers) > 1:
        return  # iterations of several canvases are always whole
    (sampler,) = samplers.values()
    iteration, position, _ = sampler
    n_iterations = iteration if position else iteration - 1
    used = n_iterations * args.eval_interval
    old = checkpoint["settings"]["epochs"]
    require(
        min(old, used) == min(args.epochs, used),
        f"--epochs {args.epochs} would change epochs that this run of {old} has used; start a new run",
    )


def refuse_slow_cpu(args, dataset, world):
    """Raise UserError with an estimate if a large preset would run on a CPU."""
    shape, canvases = dataset.shape, args.canvases
    if canvases:
        # a lower bound: every task on the smallest canvas
        shape = {**shape, "seq_len": min(canvases) ** 2}
    steps = total_training_steps(args, dataset.shape)
    work = steps * args.global_batch_size * flops(config_of(args, shape)).train_step
    # minutes or hours on any CPU
    if work < 1e16:
        return
    days = work / matmul_flops(world.device, getattr(torch, args.dtype), repeats=2) / 86400
    require(
        days < 1,
        f"no GPU: {args.preset} takes {days:,.0f} days or more on this CPU; use --preset mini or --allow-cpu",
    )


def load_data(args, world):
    """(train split, test split, Config). Builds known datasets that need no download."""
    for folder in args.data:
        dataset = prepare.known_dataset(folder)
        if dataset is None:
            continue
        if world.device.type == "cpu" and not args.allow_cpu:
            refuse_slow_cpu(args, dataset, world)
        if dataset.generated:
            prepare.build_if_missing(folder, world)
    # both splits, which must fit together
    train_split = Split(args.data, "train", args.data_test, args.seq_len)
    test = Split(args.data, "test", args.data_test, args.seq_len)
    meta = train_split.meta
    train_split.check_compatible(test.meta, test.dirs[0] / "test")
    require(
        args.seq_len in (None, meta["seq_len"]),
        f"--seq-len {args.seq_len} is for latent episodes; {args.data[0]} has seq_len {meta['seq_len']}",
    )
    if args.canvases:
        assign_canvases(train_split, test, args.canvases)
    # the model for these data
    cfg = config_of(args, meta)
    if cfg.regression and args.monitor == "val/exact_acc":
        args.monitor, args.monitor_mode = "val/regression_loss", "min"
    n_epochs = min(args.epochs, args.eval_interval)
    require(
        n_epochs * rows_per_epoch(meta) >= args.global_batch_size,
        f"--epochs {args.epochs} and --eval-interval {args.eval_interval} do not fill one batch of "
        f"--global-batch-size {args.global_batch_size}; raise them",
    )
    return train_split, test, cfg


def load_run(args, checkpoint, world, train_split, test, cfg):
    """The Run, new or as its checkpoint left it. Raises UserError for another architecture or other data."""
    # stored in checkpoints and checked on resume
    identity = {
        "puzzle_ids_sha256": train_split.puzzle_ids_sha256,
        "recipe": train_split.recipe,
        "data_sha256": train_split.data_sha256(),
        "data": [str(folder) for folder in train_split.dirs],
        "data_test": [str(folder) for folder in test.dirs],
    }
    # initial weights: of the checkpoint, of --init, or random
    state = None
    if checkpoint:
        state = checkpoint["model"]
        saved_ids = checkpoint.get("puzzle_ids_sha256", checkpoint.get("identity"))  # its name before 2026-12
        same_data = checkpoint["data_sha256"] == identity["data_sha256"]
        require(
            same_data and saved_ids == identity["puzzle_ids_sha256"],
            f"--data {' '.join(args.data)} is not the data of this run ({' '.join(checkpoint['data'])})",
        )
        for name, old in asdict(config_from_dict(checkpoint["config"])).items():
            new = getattr(cfg, name)
            # all attention kernels compute the same
            same = old == new or name == "attention"
            require(same, f"a run cannot change {name} from {old} to {new}; start a new run")
    elif args.init:
        state = hub.initial_weights(args.init, cfg, identity["puzzle_ids_sha256"])
    run = Run(args, cfg, world, state, train_split.examples_per_canvas())
    run.data_identity = identity
    run.total_steps = total_training_steps(args, train_split.meta)
    run.epoch_rows = rows_per_epoch(train_split.meta)
    if checkpoint:
        run.restore(checkpoint)
    return run


def describe(run, log, notes):
    """Write the first record of the log and print what runs here."""
    args, world = run.args, run.world
    n_params = run.weights.numel()
    table_size = run.model.puzzle_emb.numel()
    log.write(
        "start",
        run.step,
        command=shlex.join(sys.argv),
        git=git_hash(),
        began=int(time.time()),
        settings=vars(args),
        config=asdict(run.cfg),
        data_sha256=run.data_identity["data_sha256"],
        torch=torch.__version__,
        device=str(world.device),
        ranks=world.size,
        total_steps=run.total_steps,
        parameters=n_params,
    )
    log.say(f"{args.run_dir}: {n_params:,} parameters and {table_size:,} in the puzzle table")
    rows = args.global_batch_size
    log.say(f"{run.total_steps:,} steps of {rows} rows on {world.size} x {world.device}, {run.cfg.dtype}")
    if args.resume:
        notes.append(f"resumed from {args.resume} at step {run.step}")
    if args.canvases:
        notes.append(f"examples per epoch on each canvas: {run.canvas_sizes}")
    if run.total_steps < args.lr_warmup_steps:
        notes.append(f"warning: --lr-warmup-steps {args.lr_warmup_steps} is more than all steps of the run")
    for note in notes:
        log.say(note)


def start_wandb(args, log):
    """Connect the log to Weights & Biases. Raises UserError without the package, a key or a network."""
    entity, _, project = args.wandb.rpartition("/")
    name = re.sub(r"[^\w.-]+", "-", Path(args.run_dir).resolve().name)
    began = next(r["began"] for r in log.records if "began" in r)
    with user_error("--wandb", Exception):
        import wandb

        log.wandb = wandb.init(
            entity=entity or None,
            project=project,
            name=name,
            id=f"{name}-{began}",
            resume="allow",
            config=vars(args),
        )


def check_data(run, train_split, test, log):
    """Read both splits once, every rank its share. Raises UserError for invalid tokens or numbers."""
    world = run.world
    for split in (test, train_split):
        n_labels = torch.tensor(split.check(world.rank, world.size), device=world.device)
        n_labels = int(world.all_reduce(n_labels))
        hidden = all((folder / "test_puzzles.json").exists() for folder in split.dirs)
        require(
            n_labels or (split is test and hidden), f"{split.dirs[0]}/{split.name}: all labels are ignored"
        )
        log.say(f"checked {split.name}: {len(split):,} examples, {n_labels:,} labels")


def warm_up(run, train_split, log):
    """One forward and backward per canvas that leave no trace in the run: they compile, allocate, and find
    the number of micro-batches that fits into memory. Raises UserError for a loss that is not finite."""
    world, carries = run.world, run.carries
    # the largest canvas first: it needs the most memory
    for canvas in sorted(run.samplers, reverse=True):
        # the first rows on this canvas
        examples = np.arange(len(train_split))
        if canvas:
            examples = np.flatnonzero(train_split.canvas_of(examples) == canvas)
        rows = run.rows_per_rank
        arrays = train_split.gather(examples[:rows], size=rows, canvas=canvas)
        batch = Batch(*map(torch.from_numpy, (*arrays, np.zeros(rows, np.int32))))
        # forward and backward, with more micro-batches until they fit
        out_of_memory = True
        while out_of_memory:
            run.carries = {}
            try:
                forward_backward(run, batch, canvas)
                out_of_memory = False
            except torch.OutOfMemoryError:
                out_of_memory = True
            # read the result, then remove every trace
            loss = run.finite_check.item() / rows
            norm = (run.puzzle_emb_delta.grad if run.args.freeze_weights else run.grad).norm().item()
            for tensor in (run.grad, run.puzzle_emb_delta.grad, run.finite_check):
                tensor.zero_()
            run.carries, run.metric_sums = carries, {}
            # all ranks use the same number of micro-batches
            out_of_memory = world.all_reduce_max(out_of_memory)
            if out_of_memory:
                raise_grad_accum(run, log)
        require(
            math.isfinite(loss + norm), f"the first loss is {loss}, its gradient norm {norm}; check the data"
        )
        log.say(f"checked a forward and a backward: loss {loss:.4f}, gradient norm {norm:.4f}")


def raise_grad_accum(run, log):
    """Split a batch into more micro-batches: the next divisor of the rows per rank."""
    rows = run.rows_per_rank
    larger = [n for n in range(run.args.grad_accum + 1, rows + 1) if rows % n == 0]
    require(larger, "out of memory with one row per micro-batch; lower --global-batch-size or --hidden-size")
    run.args.grad_accum = larger[0]
    log.say(f"out of memory: continuing with --grad-accum {larger[0]} ({rows // larger[0]} rows at a time)")
    if run.world.device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------
# After the loop


def finish(run, test, log, metrics, finished, wall_s):
    """Print and log the RESULT line; draw one puzzle of the mini presets."""
    args, folder = run.args, Path(run.args.run_dir)
    # a picture of the averaged weights solving one puzzle
    if args.preset.startswith("mini") and not run.cfg.regression:
        run.swap_ema()
        run.model.eval()
        batch_size = run.rows_per_rank // args.grad_accum
        puzzle = scoring.hardest_solved_puzzle(run.model, test, batch_size)
        run.model.train()
        run.swap_ema()
        draw.try_to_draw(log.say, draw.draw_steps, test.task, folder / "puzzle.png", puzzle)
    # the RESULT line
    results = {name.removeprefix("val/"): value for name, value in metrics.items()}
    device = run.world.device
    line = scoring.result_line(args.preset, results, run.step, run.train_flops, run.train_s, device)
    pictures = " ".join(str(path) for path in sorted(folder.glob("*.png")))
    log.say(f"{wall_s:.0f} s for training, evaluation and checkpoints; pictures: {pictures}")
    log.say(line)
    log.write("result", run.step, line=line, train_s=run.train_s, finished=finished, **results)


def print_if_finished(args, checkpoint, notes, world):
    """Whether the run to resume is complete and unchanged; rank 0 prints its result again."""
    records = read_log(Path(args.run_dir) / "log.jsonl") if world.rank == 0 else []
    last = records[-1] if records else {}
    finished = bool(last.get("finished")) and last["step"] == checkpoint["step"] and not notes
    if finished:
        print(last["line"])
        print(f"{args.run_dir} is finished; resume it with more --epochs, or start a new run")
    return world.broadcast_object(finished)


def run_training(argv, world):
    """From the flags to the RESULT line, in order of time. Returns the exit code."""
    # ---- settings, data, the run
    args, checkpoint, notes = settings(argv, world)
    if checkpoint:
        if print_if_finished(args, checkpoint, notes, world):
            return 0
        check_epochs(args, checkpoint)
    train_split, test, cfg = load_data(args, world)
    if not args.run_dir:
        args.run_dir = world.broadcast_object(new_run_dir(args.preset) if world.rank == 0 else None)
    Path(args.run_dir).mkdir(parents=True, exist_ok=True)
    require(
        resumes_in_place(args) or not checkpoints(args.run_dir),
        f"{args.run_dir} already holds a run; use --resume {args.run_dir}, or another --run-dir",
    )
    run = load_run(args, checkpoint, world, train_split, test, cfg)
    lacking = missing_compiler(world.device) if args.compile else ""
    if lacking:
        notes.append(f"warning: training without torch.compile, which needs {lacking}")
    elif args.compile:
        compile_model(run.model)

    # ---- log and checks
    log = Log(args.run_dir, world.rank, run.step if args.resume else None)
    try:
        if world.rank == 0:
            describe(run, log, notes)
            if args.wandb:
                start_wandb(args, log)
        if not args.skip_sanity_checks and not args.resume:
            check_data(run, train_split, test, log)
        warm_up(run, train_split, log)
        if not args.skip_sanity_checks and not args.resume:
            metrics = evaluate(run, test, limit=1)
            if world.rank == 0 and args.monitor != "none" and metrics["val/n"]:
                log.is_best(args.monitor, args.monitor_mode, metrics)  # refuses a metric that does not exist

        # ---- train
        start = time.time()
        metrics, stop_code = train(run, train_split, test, log)
        if stop_code > OUT_OF_TIME:
            name = signal.Signals(stop_code - 128).name
            log.say(f"stopped by {name} at step {run.step}; continue with --resume {args.run_dir}")
            return stop_code

        # ---- the result, of all test examples unless time is up
        partial = (args.eval_limit or len(test)) < len(test)
        if metrics is None or (partial and metrics["val/n"] and stop_code != OUT_OF_TIME):
            metrics = evaluate(run, test, limit=None)
        # incomplete batches are dropped, so a complete run may have fewer steps than total_steps
        out_of_steps = args.max_steps is not None and run.step >= args.max_steps
        finished = run.step >= run.total_steps or not (stop_code or out_of_steps)
        if world.rank == 0:
            finish(run, test, log, metrics, finished, time.time() - start)
        return 0
    finally:
        log.close()


def main(argv=None):
    args = flags().parse_args(argv)
    world = start_world(args.device)
    code = run_training(argv, world)
    world.close()
    return code


if __name__ == "__main__":
    cli(main)
