"""Before hours are spent: how long a CPU would take, the room for checkpoints, what runs here, the data, a
forward and a backward, an evaluation."""
import math
import shlex
import shutil
import sys
from dataclasses import asdict

import numpy as np
import torch

import eval as scoring
from common import UserError, git_hash, matmul_peak
from model import IGNORE, Batch, act_loss, flops
from optim import schedule


def refuse_a_cpu(name, cfg, steps, rows, device):
    """One line with what a run of `steps` steps of `rows` rows would take here, raised as a UserError."""
    seconds = rows * flops(cfg).step / matmul_peak(device, getattr(torch, cfg.dtype))
    days = seconds * steps / 86400
    raise UserError(f"no GPU here: {name} takes {steps:,} steps of at least {seconds:.0f} s on this CPU "
                    f"(FLOPs at the peak of its matrix products), {days:,.0f} days; add --allow-cpu to do it "
                    f"all the same, or try --preset mini")


def room_for_checkpoints(run_dir, size, keep_last):
    """A warning when the disk has less room than three checkpoints of `size` bytes, else ""."""
    free = shutil.disk_usage(run_dir).free
    return "" if free > 3 * size else (
        f"warning: {run_dir} has {free / 2 ** 30:.1f} GiB free, less than three checkpoints of "
        f"{size / 2 ** 30:.1f} GiB; make room, or lower --keep-last (now {keep_last})")


def describe(run, log, notes):
    """The first record of the log and the first lines on the console: what runs here (rank 0)."""
    if run.world.rank:
        return
    args, world, total = run.args, run.world, run.total_steps
    n_params, table = sum(p.numel() for p in run.model.parameters()), run.model.puzzle_emb.numel()
    log.write("start", run.step, command=shlex.join(sys.argv), git=git_hash(), settings=vars(args),
              config=asdict(run.cfg), notes=notes, began=log.began,
              torch=torch.__version__, device=str(world.device), ranks=world.size, total_steps=total,
              parameters=n_params, parameters_with_puzzle_table=n_params + table)
    for note in notes:
        log.say(note)
    if args.resume:
        log.say(f"resumed from {args.resume} at step {run.step}"
                + ("" if run.carry else "; it holds no carry: every row begins a new puzzle"))
    log.say(f"{args.run_dir}: {n_params:,} parameters, {n_params + table:,} with the puzzle table; {total:,} "
            f"steps of {args.global_batch_size} rows on {world.size} x {world.device.type}, {run.cfg.dtype}")
    if total < args.lr_warmup_steps:
        log.say(f"--lr-warmup-steps {args.lr_warmup_steps} are more than the run has: its learning rate ends "
                f"at {schedule(total, total, args.lr_warmup_steps, args.lr_min_ratio):.0%}; lower them")
    vectors = 4 - (run.ema is None)     # weights, two moments, average
    carry = 2 * args.global_batch_size * run.cfg.length * run.cfg.hidden_size * run.model.dtype.itemsize
    size = 4 * (vectors * n_params + table) + carry
    warning = room_for_checkpoints(args.run_dir, size, args.keep_last)
    if warning:
        log.say(warning)


def check_batch(split, rows):
    """The first batch of a split, and a line that says what is in it. Raises UserError when nothing can be
    learned."""
    inputs, labels, ids = arrays = split.gather(np.arange(min(rows, len(split))), size=rows)
    asked = ~np.isnan(labels).any(-1) if labels.dtype.kind == "f" else labels != IGNORE
    if split.name == "train" and not asked.any():
        raise UserError(f"{split.name}: all labels of the first {rows} rows are ignored; build the dataset "
                        f"again")
    if np.isnan(inputs).any():
        raise UserError(f"{split.name}: an input of the first {rows} rows is NaN; build the dataset again")
    return arrays, (f"checked the first batch of {split.name}: inputs {inputs.shape} {inputs.dtype} in "
                    f"{inputs.min():.6g} .. {inputs.max():.6g}, labels {labels.shape} {labels.dtype}, "
                    f"{asked.mean():.0%} asked, puzzle rows {ids.min()} .. {ids.max()}")


def check_all(run, train_split, test, log):
    """Everything once, on `run.part` rows; leaves no trace in the run. Raises UserError."""
    for split in (test, train_split):   # the training batch comes last, and is used below
        for line in split.check() if run.world.rank == 0 else ():   # reads all of it
            log.say(f"checked {line}")
        arrays, line = check_batch(split, run.part)
        log.say(line)
    arrays = *arrays, np.zeros(run.part, np.int32)
    batch = Batch(*(torch.from_numpy(a).to(run.world.device) for a in arrays))
    carry, logits, q = run.model.step(run.model.empty_carry(batch), batch, run.delta[:run.part])
    loss, _ = act_loss(run.cfg, carry, logits, q)
    (loss / run.part).backward()
    norm = (run.delta.grad if run.args.freeze_weights else run.flat.grad).norm().item()
    if not (math.isfinite(loss.item()) and math.isfinite(norm)):
        raise UserError(f"the first loss is {loss.item()} and its gradient norm {norm}; look at the data and "
                        f"--lr")
    log.say(f"checked a forward and a backward: logits {tuple(logits.shape)} {str(logits.dtype)[6:]}, "
            f"loss {loss.item() / run.part:.4f}, gradient norm {norm:.4f}")
    run.flat.grad.zero_()
    run.delta.grad.zero_()
    found = scoring.evaluate(run.model.eval(), test, run.world, run.part, limit=1, quiet=True).metrics
    run.model.train()
    metrics = {f"val/{name}": value for name, value in found.items()}
    if run.world.rank == 0 and run.args.monitor != "none":
        log.is_best(run.args.monitor, run.args.monitor_mode, metrics)
    log.say(f"checked an evaluation: {', '.join(metrics)}")
