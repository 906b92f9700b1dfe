"""Train a TRM.

    python train.py                                   mini: 6x6 Sudoku, on a CPU
    torchrun --nproc_per_node=8 train.py --preset arc1
    python train.py --preset sudoku --global-batch-size 768 --lr 1e-4
    python train.py --resume runs/arc1-20260102-030405
    python train.py --preset arc1 --run-dir DIR --resume
                                                      goes on, or begins

In the order of time: settings, data, one step, log and save and evaluate, the
loop, what stands before and after. state.py holds all that changes meanwhile.
"""
import argparse
import importlib.util
import math
import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import common  # noqa: F401  before torch, for a Ctrl-C while that is imported
import torch

import draw
import eval as scoring
import hub
import prepare
import sanity
from common import Parser, UserError, cli, compiler_lacks, fastest_dtype, start_world, wait, within
from data import Split, exploration, orders, parts_of, places, prefetch, put_on_canvases
from model import OVER_ALL_ROWS, Batch, Carry, Config, act_loss, compile_model, metric_names, read_config
from optim import schedule, sign_sgd
from results import result_line
from rundir import Bar, Log, Signals, Stopped, checkpoints, find_checkpoint, mirror, new_run_dir, \
    read_log, save_checkpoint
from state import Run

# What each task changes (the 8-GPU reproduction's settings). A flag on the command line wins.
SUDOKU = dict(data=[prepare.KNOWN["sudoku"].folder], epochs=50_000, eval_interval=5_000, weight_decay=1.0,
              puzzle_emb_weight_decay=1.0, puzzle_emb_lr=1e-4, eval_limit=4096)
ARC = dict(epochs=100_000, eval_interval=5_000, eval_limit=40_000)  # of 386,000 rows, 965 a task
CANVASES = [11, 16, 21, 30]
NARROW = dict(expansion=2.0, width_multiple=64)     # SwiGLUs of at most half the width: see REPORT.md
MINI = dict(hidden_size=64, H_cycles=1, puzzle_emb_len=1, puzzle_emb_ndim=64, dtype="auto",
            global_batch_size=64, lr_warmup_steps=100, ema=0.99, ema_warmup=True)
PRESETS = {
    "mini": dict(MINI, data=[prepare.KNOWN["mini"].folder], mixer="mlp", pos_encodings="none", num_heads=1,
                 L_cycles=1, lr=8e-3, puzzle_emb_lr=4e-3, lr_min_ratio=0.0, weight_decay=0.5,
                 puzzle_emb_weight_decay=0.5, train_max_steps=[2, 8], epochs=85, eval_interval=17, **NARROW),
    "mini-maze": dict(MINI, data=[prepare.KNOWN["mini-maze"].folder], score_mod="grid", pos_encodings="none",
                      num_heads=8, L_cycles=2, halt_max_steps=8, halt_exploration_prob=1.0, loss="softmax",
                      lr=3e-3, puzzle_emb_lr=4e-3, lr_min_ratio=0.6, train_max_steps=[4, 6]),
    "mini-arc": dict(MINI, data=[prepare.KNOWN["mini-arc-tune"].folder], canvases=[6], num_heads=2,
                     pos_encodings="learned", num_layers=1, L_cycles=1, halt_max_steps=2, loss="softmax",
                     lr=2e-3, puzzle_emb_lr=5e-2, lr_min_ratio=0.0, train_max_steps=[1, 2], epochs=3600,
                     eval_interval=900, **NARROW),
    "sudoku": dict(SUDOKU, mixer="mlp", pos_encodings="none"),
    "sudoku-fast": dict(SUDOKU, mixer="mlp", pos_encodings="none", **NARROW),
    "sudoku-att": SUDOKU,
    "maze": dict(SUDOKU, data=[prepare.KNOWN["maze"].folder], L_cycles=4),
    "arc1": dict(ARC, data=[prepare.KNOWN["arc1"].folder]),
    "arc1-fast": dict(ARC, data=[prepare.KNOWN["arc1"].folder], canvases=CANVASES),
    "arc2": dict(ARC, data=[prepare.KNOWN["arc2"].folder]),
    "arc2-fast": dict(ARC, data=[prepare.KNOWN["arc2"].folder], canvases=CANVASES),
}
LIMIT = 1   # why a run stops: --max-steps or --max-minutes; else the number of a signal, which is higher
# no change on resume, nor of the Config
MATTERS = ("preset", "global_batch_size", "seed", "eval_interval", "canvases")


# ---------------------------------------------------------------------------------------------
# Settings

def flags(**defaults):
    """defaults: in place of those of the flags, as a row of PRESETS says them."""
    parser = Parser(__doc__)
    onoff, count = argparse.BooleanOptionalAction, within(int, 1)
    add = parser.add_argument_group("what").add_argument
    add("--preset", default="mini", choices=list(PRESETS), metavar="NAME",
        help=f"a task with its settings: {', '.join(PRESETS)}")
    add("--data", nargs="+", metavar="DIR", help="dataset folders, joined; default: the preset's")
    add("--data-test", nargs="+", metavar="DIR", help="folders of the test split; default: as --data")
    add("--seq-len", type=count, metavar="N", help="windows of latent episodes; default: the longest")
    add("--canvases", nargs="+", type=count, metavar="N", help="ARC: a task lies on the smallest N x N")
    add("--seed", metavar="X", type=within(int, 0, 2 ** 31), default=0, help="of weights, data, exploration")
    add("--init", metavar="CKPT", help="start from its weights; for other puzzles from its mean puzzle row")
    add = parser.add_argument_group("model").add_argument
    for f in fields(Config):
        if f.metadata:      # the others are sizes of the data
            how = {"action": onoff} if isinstance(f.default, bool) else {"metavar": "X"}
            how = {} if "choices" in f.metadata else how
            add("--" + f.name.replace("_", "-"), default=f.default, **how, **f.metadata)
    optimization_flags(parser.add_argument_group("training").add_argument, onoff, count)
    add = parser.add_argument_group("run").add_argument
    add("--run-dir", metavar="DIR", help="default: runs/PRESET-TIME")
    add("--resume", nargs="?", const="newest", metavar="PATH",
        help="go on with a run folder or checkpoint; alone: with --run-dir, else the newest run")
    add("--checkpoint-interval", type=count, metavar="N", help="steps; an evaluation saves, too")
    add("--keep-last", type=count, default=3, metavar="N", help="checkpoints to keep, besides the best")
    add("--monitor", default="val/exact_acc", help="what best.ckpt is best in; none: no best.ckpt")
    add("--monitor-mode", default="max", choices=["max", "min"], help="of --monitor")
    add("--eval-limit", type=count, metavar="N", help="score N examples in between, all at the end")
    add("--log-interval", type=count, default=10, metavar="N", help="steps")
    add("--skip-sanity-checks", action="store_true", help="of data and model, before a new run begins")
    add("--wandb", metavar="PROJECT", help="log there, too")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="to run on")
    add("--compile", action=onoff, default=True, help="torch.compile")
    add("--dist-timeout", metavar="X", type=within(float, 1), default=600.0,
        help="seconds until a dead rank ends the run")
    add("--allow-cpu", action="store_true", help="train a big preset without a GPU")
    parser.set_defaults(**defaults)
    return parser


def optimization_flags(add, onoff, count):
    rate, number = within(float, 0), partial(add, metavar="X")
    number("--global-batch-size", type=count, default=1536, help="rows over all ranks")
    add("--grad-accum", type=count, metavar="N", help="parts of a rank's batch; default: what fits the GPU")
    number("--epochs", type=count, default=1, help="passes over the groups")
    number("--eval-interval", type=count, default=1, help="epochs between evaluations")
    number("--lr", type=rate, default=2e-4, help="learning rate")
    number("--puzzle-emb-lr", type=rate, default=1e-2, help="of the puzzle table's SignSGD")
    number("--weight-decay", type=rate, default=0.1, help="a step takes lr times this off a weight")
    number("--puzzle-emb-weight-decay", type=rate, default=0.1, help="likewise")
    number("--beta1", type=within(float, 0, 0.999999), default=0.9, help="of AdamATan2")
    number("--beta2", type=within(float, 0, 0.999999), default=0.95, help="of AdamATan2")
    number("--grad-clip", type=rate, default=0.0, help="norm of the gradient at most; 0: off")
    number("--lr-warmup-steps", type=within(int, 0), default=4000, help="linear")
    number("--lr-min-ratio", type=within(float, 0, 1), default=1.0, help="where the cosine ends; 1: constant")
    number("--ema", type=within(float, 0, 0.999999), default=0.999, help="decay of averaged weights; 0: off")
    add("--ema-warmup", action=onoff, default=False, help="a shorter average at the start")
    add("--freeze-weights", action=onoff, default=False, help="train the puzzle table only")
    add("--train-max-steps", nargs=2, type=count, metavar=("A", "B"), help="N_sup in training, rising")
    number("--halt-exploration-prob", type=within(float, 0, 1), default=0.1, help="of a least N of steps")
    add("--max-steps", type=count, metavar="N", help="stop there")
    add("--max-minutes", type=within(float, 0), metavar="M", help="stop then")


def settings(argv, world):
    """(args, checkpoint or None, notes for the user): defaults, then the preset or the checkpoint, then what
    is typed. Only rank 0 reads the checkpoint, as it may hold gigabytes; the others know its settings."""
    args = flags().parse_args(argv)
    path, checkpoint, notes = find_checkpoint(args) if world.rank == 0 else (None, None, [])
    saved = checkpoint and {k: v for k, v in checkpoint["settings"].items() if k in vars(args)}
    path, saved, notes = world.gather_objects((path, saved, notes))[0]
    parser = flags(**({**saved, "run_dir": str(path.parent)} if saved else PRESETS[args.preset]))
    base, args = parser.parse_args([]), parser.parse_args(argv)
    for name, old in (saved or {}).items():
        new = getattr(args, name)
        if new != old and name in MATTERS:
            refuse_change(name, new, old)
        if new != old and new != getattr(base, name):   # its folder may have moved
            notes.append(f"changed on resume: {name} {old} -> {new}")
    check(args, base, world)
    args.resume = path and str(path)
    if args.dtype == "auto":   # rank 0 decides
        args.dtype = world.gather_objects(fastest_dtype(world.device))[0]
    return args, checkpoint, notes


def refuse_change(name, new, old):
    raise UserError(f"--{name.replace('_', '-')} {new} differs from the run's {old}; a run cannot change it: "
                    f"leave it out, or begin a new run")


def check(args, base, world):
    """What the flags must satisfy together; base: their values without the command line. Raises UserError."""
    if args.resume is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UserError("torchrun --max-restarts would begin anew after a failure: add --run-dir DIR "
                        "--resume")
    first, last = args.train_max_steps or (1, 1)
    if first > last:
        raise UserError(f"--train-max-steps {first} {last} does not rise; give the lower number first")
    G, parts = args.global_batch_size, world.size * (args.grad_accum or 1)
    if G % parts:
        near = max(parts, G // parts * parts)
        ranks = f"{world.size} ranks" + (f" x {args.grad_accum} parts" if parts > world.size else "")
        raise UserError(f"--global-batch-size {G} is not a multiple of {ranks}; use {near} or {near + parts}")
    if args.canvases and (args.mixer == "mlp" or args.score_mod != "none"):
        raise UserError("--canvases need --mixer attn: an MLP over positions knows one number of them, and "
                        "so does a --score-mod; leave it out")
    if args.wandb and not importlib.util.find_spec("wandb"):
        raise UserError("--wandb needs the package wandb; pip install wandb, or leave the flag out")
    for name, useless, why in (
            ("num_heads", args.mixer == "mlp", "--mixer mlp"),
            ("pos_encodings", args.mixer == "mlp" and args.pos_encodings == "rope", "--mixer mlp"),
            ("ema_warmup", args.ema == 0, "--ema 0"),
            ("monitor_mode", args.monitor == "none", "--monitor none"),
            ("grad_clip", args.freeze_weights, "--freeze-weights"),
            ("halt_exploration_prob", args.halt_max_steps == 1, "--halt-max-steps 1")):
        value = getattr(args, name)
        if useless and value != getattr(base, name):
            raise UserError(f"--{name.replace('_', '-')} {value} does nothing with {why}; leave it out")


def config_of(args, meta):
    """The model's Config: sizes from dataset.json, the rest from the flags of the same names."""
    sizes = dict(vocab_size=meta["vocab_size"], seq_len=meta["seq_len"], input_dim=meta.get("input_dim", 0),
                 target_dim=meta.get("target_dim", 0), num_puzzles=meta["num_puzzle_identifiers"])
    return Config(**sizes, **{f.name: getattr(args, f.name) for f in fields(Config) if f.metadata})


def goes_on(args):
    """Whether the run was resumed where it is; else it is new, or a branch of another one."""
    return bool(args.resume) and Path(args.resume).resolve().parent == Path(args.run_dir).resolve()


def total_training_steps(args, meta):
    return int(args.epochs * meta["total_groups"] * meta["mean_puzzle_examples"] / args.global_batch_size)


# ---------------------------------------------------------------------------------------------
# Data

def open_data(args, world):
    """(train split, test split, Config). Builds what needs no network. Raises UserError."""
    for folder in args.data:
        dataset = prepare.known(folder)
        if dataset and world.device.type == "cpu" and not dataset.generated and not args.allow_cpu:
            shape, steps = dataset.shape, total_training_steps(args, dataset.shape)
            if args.canvases:       # how many rows each has is not known before the data are: at least this
                shape = {**shape, "seq_len": min(args.canvases) ** 2}
            cfg = config_of(args, shape)
            sanity.refuse_a_cpu(args.preset, cfg, steps, args.global_batch_size, world.device)
        if dataset and dataset.generated:
            prepare.ensure(folder, world)
    prepare.must_exist([*args.data, *(args.data_test or [])])
    train, test = (Split(args.data, name, args.data_test, args.seq_len) for name in ("train", "test"))
    train.must_agree(test.meta, test.dirs[0] / "test")
    if args.seq_len not in (None, train.meta["seq_len"]):
        raise UserError(f"--seq-len {args.seq_len} is for latent episodes; {train.dirs[0]} has "
                        f"{train.meta['seq_len']}: leave it out")
    if args.canvases:
        put_on_canvases(train, test, args.canvases)
    cfg, meta = config_of(args, train.meta), train.meta
    if cfg.regression and args.monitor == "val/exact_acc":
        args.monitor, args.monitor_mode = "val/regression_loss", "min"
    if total_training_steps(args, meta) < 1:
        raise UserError(f"--epochs {args.epochs} of {meta['total_groups']} groups do not fill one batch of "
                        f"--global-batch-size {args.global_batch_size}; raise the one or lower the other")
    return train, test, cfg


def about_data(train, test):
    """What a checkpoint says of its data, to know them again."""
    return {"identity": train.identity, "recipe": train.recipe, "data_sha256": train.fingerprint(),
            "data": [str(d) for d in train.dirs], "data_test": [str(d) for d in test.dirs]}


def must_match(checkpoint, cfg, data):
    """Refuse to resume a run with another architecture or other data, by name."""
    if any(checkpoint[k] != data[k] for k in ("identity", "data_sha256")):
        now, then = " ".join(data["data"]), " ".join(checkpoint["data"])
        raise UserError(f"--data {now} holds other puzzles than the run was trained on; leave it out or name "
                        f"its data ({then} then), or begin a new run")
    for name, old in asdict(read_config(checkpoint["config"])).items():
        new = getattr(cfg, name)
        if old != new and name != "attention":      # that computes the same
            refuse_change(name, new, old)


def batches(run, split):
    """Yield ([Batch of every part] on the CPU, cursors after them) for this rank, from the run's cursors on
    to its end."""
    args, rank, step = run.args, run.world.rank, run.step
    G, on_gpu = args.global_batch_size, run.world.device.type == "cuda"
    for drawn in orders(split, run.parts, args.seed, args.epochs, args.eval_interval, run.cursors):
        step += 1
        least = exploration(args.seed, step, G, args.halt_exploration_prob, args.halt_max_steps)
        place, parts, start = places(args.seed, step, G), [], 0
        for part, rows, (examples, puzzles, _) in zip(run.parts, run.rows_of, drawn):
            mine = slice(rank * rows, (rank + 1) * rows)    # of the rows of the part
            arrays = split.gather(examples[mine], puzzles[mine], side=part.side, place=place[start:][mine])
            batch = Batch(*map(torch.from_numpy, (*arrays, least[start:][mine])))
            # pinned memory is copied to a GPU while it computes
            parts.append(Batch(*(t.pin_memory() for t in batch)) if on_gpu else batch)
            start += part.rows      # where the next part begins in the global batch
        yield parts, [cursor for _, _, cursor in drawn]


# ---------------------------------------------------------------------------------------------
# One step

def train_max_steps(args, progress):
    """Supervision steps of a puzzle in training at progress 0 .. 1 of the run: N_sup, or from A to B of
    --train-max-steps in even stretches. Few at first: more puzzles for a model that cannot finish one."""
    first, last = args.train_max_steps or (args.halt_max_steps, args.halt_max_steps)
    return min(args.halt_max_steps, last, first + int(progress * (last - first + 1)))


def backward(run, batches):
    """Forward and backward of one training step on this rank, given a Batch for every part; gradients and
    metric sums add up in `run`."""
    batches = [Batch(*(t.to(run.world.device, non_blocking=True) for t in batch)) for batch in batches]
    if run.carries is None:
        run.carries = [run.model.empty_carry(batch) for batch in batches]
    row = 0     # of this rank's share of the batch
    for carry, batch, rows, n in zip(run.carries, batches, run.rows_of, run.at_once):
        for start in range(0, rows, n):
            some, delta = slice(start, start + n), run.delta[row + start:row + start + n]
            old = Carry(*(t[some] for t in carry))
            new, logits, q = run.model.step(old, Batch(*(t[some] for t in batch)), delta, run.max_steps)
            target = run.model.continue_target(new) if run.cfg.q_continue else None
            loss, sums = act_loss(run.cfg, new, logits, q, target)
            (loss / run.args.global_batch_size).backward()
            run.sums = {name: run.sums.get(name, 0) + value for name, value in sums.items()}
            run.health += loss.detach()
            for held, t in zip(carry, new):
                held[some] = t
        row += rows


def update(run, factor):
    """All-reduce the gradients and apply both optimizers and the EMA. factor: of the learning rates."""
    args, flat, t = run.args, run.flat, run.step + 1
    if not args.freeze_weights:
        run.world.sum(flat.grad)
        if args.grad_clip:
            flat.grad.mul_((args.grad_clip / flat.grad.norm().clamp(min=1e-12)).clamp(max=1))
        run.adam.step(flat.data, flat.grad, args.lr * factor, t)
        run.health += flat.grad.sum() + flat.data.sum()
        flat.grad.zero_()
    if run.ema is not None:
        decay = min(args.ema, (1 + t) / (10 + t)) if args.ema_warmup else args.ema
        run.ema.lerp_(flat.data, 1 - decay)
    # ids beside their gradients make one gather of two; float32 is exact below 2 ** 24 puzzles
    ids = torch.cat([carry.puzzle_ids for carry in run.carries])
    rows = run.world.gather(torch.cat((run.delta.grad, ids[:, None].float()), dim=1))
    run.health += rows[:, :-1].sum()
    sign_sgd(run.model.puzzle_emb, rows[:, -1], rows[:, :-1], args.puzzle_emb_lr * factor,
             args.puzzle_emb_weight_decay)
    run.delta.grad.zero_()
    run.step += 1


# ---------------------------------------------------------------------------------------------
# Log, save, evaluate

def log_step(run, log, lr, tick):
    """Write the means since the last log line and begin new ones; returns them as a line. The one place of a
    step that waits for the device. tick: when the steps since then began. Raises UserError when something is
    not finite."""
    wait(run.world.device)
    run.train_s += time.perf_counter() - tick
    *totals, health = run.world.sum(torch.stack([*run.sums.values(), run.health])).tolist()
    if run.world.agree(int(not math.isfinite(health))):
        raise UserError(f"the loss, a gradient or a weight is not finite in steps {run.logged_step + 1} .. "
                        f"{run.step}; the last good checkpoint is kept: lower --lr and --resume")
    sums, steps = dict(zip(run.sums, totals)), run.step - run.logged_step
    count, rows = sums.pop("count"), steps * run.args.global_batch_size
    metrics = {f"train/{name}": value / rows if name in OVER_ALL_ROWS else value / count if count else None
               for name, value in sums.items()}     # None: no row halted
    loss = metrics[f"train/{metric_names(run.cfg).loss}"]
    metrics["train/loss"] = loss + 0.5 * (metrics["train/q_halt_loss"] + metrics["train/q_continue_loss"])
    metrics["train/count"] = count
    dt_ms = 1000 * (run.train_s - run.logged_s) / steps
    log.write("train", run.step, epoch=run.epoch, **{"train/lr": lr}, **metrics, dt_ms=dt_ms)
    run.logged_step, run.logged_s, run.sums = run.step, run.train_s, {}
    run.health.zero_()
    right = metrics[f"train/{metric_names(run.cfg).right}"]
    return (f"loss {metrics['train/loss']:.3f} {metric_names(run.cfg).right} "
            f"{'-' if right is None else format(right, '.3f')} {dt_ms:.0f} ms")


def save(run):
    """Write a checkpoint of now. Raises UserError."""
    content = run.checkpoint()
    if content is not None:
        save_checkpoint(run.args.run_dir, run.step, content, run.args.keep_last)


def evaluate(run, test, limit):
    """val/... of the test split, by the averaged weights."""
    run.with_ema()
    run.model.eval()
    results = scoring.evaluate(run.model, test, run.world, max(run.at_once), limit).metrics
    run.model.train()
    run.with_ema()
    return {f"val/{k}": v for k, v in results.items()}


def evaluate_and_log(run, test, log, signals):
    """val/... of what was just saved, so that a signal need not wait for the end; best.ckpt; the curves."""
    folder, number = Path(run.args.run_dir), run.world.agree(signals.number)
    if number:      # came while it was saved
        raise Stopped(number)
    signals.at_once = True
    metrics = evaluate(run, test, run.args.eval_limit)
    signals.at_once = False
    if run.world.rank:
        return metrics
    if run.args.monitor != "none" and log.is_best(run.args.monitor, run.args.monitor_mode, metrics):
        mirror(folder / f"step_{run.step:08d}.ckpt", folder / "best.ckpt")
    log.write("val", run.step, epoch=run.epoch, **metrics)      # from here on it counts as done
    shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
    log.say(f"step {run.step}/{run.total_steps}: {shown}")
    with suppress(OSError):     # a picture is not worth a run
        draw.plot([folder], folder / "train_vs_val.png")
    return metrics


# ---------------------------------------------------------------------------------------------
# The loop

def train(run, split, test, log):
    """Train to the end, a limit or a signal: returns (the last val/... or None, what stopped it).

    An evaluation is due when the checkpoint ends an iteration and the log lacks it: it was cut short."""
    args, world, outcome, stop = run.args, run.world, None, 0
    started = time.perf_counter()
    last_step = min(run.total_steps, args.max_steps or run.total_steps)
    done = any(r["event"] == "val" and r["step"] == run.step for r in log.records)
    due = run.step and run.ends_iteration and not done and goes_on(args)
    with Signals() as signals, Bar(run, log) as bar:
        if world.agree(int(bool(due) and world.rank == 0)):
            outcome = evaluate_and_log(run, test, log, signals)
        tick = time.perf_counter()
        for batch, cursors in prefetch(batches(run, split)):
            if run.step >= last_step:
                break
            factor = schedule(run.step + 1, run.total_steps, args.lr_warmup_steps, args.lr_min_ratio)
            run.max_steps.fill_(train_max_steps(args, run.step / run.total_steps))
            backward(run, batch)
            update(run, factor)
            run.cursors = cursors
            minutes = (time.perf_counter() - started) / 60
            limit = run.step == args.max_steps or args.max_minutes is not None and minutes > args.max_minutes
            stop = world.agree(signals.number or LIMIT * limit)         # the same on every rank
            evaluates = run.ends_iteration or stop == LIMIT
            saves = evaluates or stop or args.checkpoint_interval and run.step % args.checkpoint_interval == 0
            bar.update()
            if saves or run.step % args.log_interval == 0:
                bar.show(log_step(run, log, args.lr * factor, tick))
                tick = time.perf_counter()
            if saves:
                save(run)
                if evaluates and stop <= LIMIT:
                    outcome = evaluate_and_log(run, test, log, signals)
                tick = time.perf_counter()      # saving and evaluating is no training
            if stop:
                break
    return outcome, stop


# ---------------------------------------------------------------------------------------------
# Before and after the loop

def open_run(args, checkpoint, world, train_split, test, cfg):
    """The Run to go on with, its weights in place."""
    data, meta = about_data(train_split, test), train_split.meta
    state = checkpoint and checkpoint["model"]
    if world.rank == 0 and checkpoint:
        must_match(checkpoint, cfg, data)
    if args.init and not args.resume:
        state = hub.first_weights(args.init, cfg, data["identity"])
    parts = parts_of(train_split, args.global_batch_size, world.size * (args.grad_accum or 1))
    run = Run(args, cfg, world, state, parts)
    run.data, run.total_steps = data, total_training_steps(args, meta)
    run.epoch_rows = meta["total_groups"] * meta["mean_puzzle_examples"]
    if args.resume:
        run.restore(checkpoint)
        (checkpoint or {}).clear()      # it may be gigabytes
    return run


def finish(run, test, log, metrics, finished, wall_s):
    """The RESULT line, which ends the log, and a picture of one puzzle for the small boards."""
    args, results = run.args, {k.removeprefix("val/"): v for k, v in metrics.items()}
    if run.world.rank:
        return
    pictures = [Path(args.run_dir) / "train_vs_val.png"]   # drawn at the last evaluation
    if args.preset.startswith("mini") and not run.cfg.regression:
        run.with_ema()
        run.model.eval()
        pictures.append(Path(args.run_dir) / "puzzle.png")
        with suppress(OSError):
            draw.draw_steps(test.kind, pictures[-1], scoring.slow_puzzle(run.model, test, run.rows))
    line = result_line(args.preset, results, run.step, run.step_flops, run.train_s, run.world.device)
    log.say(f"wall time of training, evaluation and saving: {wall_s:.0f} s; pictures: "
            f"{', '.join(map(str, pictures))}")
    log.say(line)
    log.write("result", run.step, line=line, train_s=run.train_s, finished=finished, **results)


def run_preset(argv, world):
    """From flags to the RESULT line, in the order of time."""
    args, checkpoint, notes = settings(argv, world)
    records = read_log(Path(args.run_dir or "") / "log.jsonl") if args.resume and world.rank == 0 else []
    finished = (checkpoint and records and records[-1].get("finished") and not notes
                and records[-1]["step"] == checkpoint["step"])
    if world.agree(int(bool(finished))):
        if world.rank == 0:
            print(records[-1]["line"], f"{args.run_dir} is finished; move it away to train anew", sep="\n")
        return 0
    train_split, test, cfg = open_data(args, world)
    if not args.run_dir:    # rank 0 makes one for all
        args.run_dir = world.gather_objects(new_run_dir(args.preset) if world.rank == 0 else None)[0]
    if checkpoints(args.run_dir) and not goes_on(args):
        raise UserError(f"{args.run_dir} holds the checkpoints of a run; go on with --resume {args.run_dir}, "
                        f"or name another --run-dir")
    run = open_run(args, checkpoint, world, train_split, test, cfg)
    if not args.grad_accum and world.device.type == "cuda":
        run.fit(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())    # its own counts as free
    with Log(args.run_dir, world.rank, run.step if args.resume else None, args.wandb, vars(args)) as log:
        if args.compile and compiler_lacks(world.device):
            notes.append(f"not compiled, which is slower: this machine lacks {compiler_lacks(world.device)}")
        elif args.compile:
            compile_model(run.model)
        sanity.describe(run, log, notes)
        if not args.skip_sanity_checks and not args.resume:
            sanity.check_all(run, train_split, test, log)
        began = time.time()
        try:
            metrics, stop = train(run, train_split, test, log)
        except Stopped as e:
            metrics, stop = None, e.args[0]
        if stop > LIMIT:
            name = signal.Signals(stop).name
            log.say(f"stopped by {name} at step {run.step}; go on with --resume {args.run_dir}")
            return 128 + stop
        part = (args.eval_limit or len(test)) < len(test)
        if metrics is None or part and metrics["val/n"]:    # resumed at its end; or only a part was scored
            metrics = evaluate(run, test, None)
        cut = stop or args.max_steps and run.step >= args.max_steps
        finish(run, test, log, metrics, run.step >= run.total_steps or not cut, time.time() - began)
    return 0


def main(argv=None):
    args = flags().parse_args(argv)
    world = start_world(args.device, args.dist_timeout)
    code = run_preset(argv, world)
    world.close()
    return code


if __name__ == "__main__":
    cli(main)
