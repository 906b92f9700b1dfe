"""Before hours are spent: how long a CPU would take, what runs here, the room for checkpoints, the data, a
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
    """Raise a UserError that says what a run of `steps` steps of `rows` rows would take here, if it is more
    than a day."""
    seconds = rows * flops(cfg).step / matmul_peak(device, getattr(torch, cfg.dtype))
    if seconds * steps < 86400:
        return
    raise UserError(f"no GPU here: {name} takes {steps:,} steps of at least {seconds:.0f} s on this CPU, "
                    f"{seconds * steps / 86400:,.0f} days; add --allow-cpu to do it all the same, or try "
                    f"--preset mini")


def warn_of_a_full_disk(run, log):
    """When there is less room than for three checkpoints."""
    args, cfg = run.args, run.cfg
    positions = sum(part.rows * run.config_of(part).length for part in run.parts)
    carry = 2 * positions * cfg.hidden_size * run.model.dtype.itemsize
    size = sum(t.nbytes for t in run.tensors().values()) + carry
    free = shutil.disk_usage(args.run_dir).free
    if free < 3 * size:
        log.say(f"warning: {args.run_dir} has {free / 2 ** 30:.1f} GiB free, less than three checkpoints of "
                f"{size / 2 ** 30:.1f} GiB; make room, or lower --keep-last (now {args.keep_last})")


def describe(run, log, notes):
    """The first record of the log and the first lines on the console: what runs here (rank 0)."""
    if run.world.rank:
        return
    args, world, total = run.args, run.world, run.total_steps
    n_params = sum(p.numel() for p in run.model.parameters())
    with_table = n_params + run.model.puzzle_emb.numel()
    log.write("start", run.step, command=shlex.join(sys.argv), git=git_hash(), settings=vars(args),
              config=asdict(run.cfg), notes=notes, began=log.began,
              torch=torch.__version__, device=str(world.device), ranks=world.size, total_steps=total,
              parameters=n_params, parameters_with_puzzle_table=with_table)
    if args.canvases:
        rows = ", ".join(f"{part.rows} rows of {part.side}x{part.side}" for part in run.parts)
        whole = args.global_batch_size * flops(run.cfg).step
        notes = [*notes, f"canvases: {rows}; {run.step_flops / whole:.3f} of the FLOPs without"]
    for note in notes:
        log.say(note)
    if args.resume:
        log.say(f"resumed from {args.resume} at step {run.step}"
                + ("" if run.carries else "; it holds no carry: every row begins a new puzzle"))
    log.say(f"{args.run_dir}: {n_params:,} parameters, {with_table:,} with the puzzle table; {total:,} "
            f"steps of {args.global_batch_size} rows on {world.size} x {world.device.type}, {run.cfg.dtype}")
    if total < args.lr_warmup_steps:
        log.say(f"--lr-warmup-steps {args.lr_warmup_steps} are more than the run has: its learning rate ends "
                f"at {schedule(total, total, args.lr_warmup_steps, args.lr_min_ratio):.0%}; lower them")
    warn_of_a_full_disk(run, log)


def check_batch(split, part, rows, log):
    """The first `rows` rows of a part of a split, as arrays. Raises UserError when nothing can be learned
    from them."""
    examples = np.flatnonzero(split.side_of(np.arange(len(split))) == part.side)[:rows]
    inputs, labels, ids = arrays = split.gather(examples, size=rows, side=part.side)
    asked = ~np.isnan(labels).any(-1) if labels.dtype.kind == "f" else labels != IGNORE
    if split.name == "train" and not asked.any():
        raise UserError(f"train: all labels of the first {rows} rows are ignored; build the dataset again")
    log.say(f"checked the first batch of {split.name}: inputs {inputs.shape} {inputs.dtype} in "
            f"{inputs.min():.6g} .. {inputs.max():.6g}, labels {labels.shape} {labels.dtype}, "
            f"{asked.mean():.0%} asked, puzzle rows {ids.min()} .. {ids.max()}")
    return arrays


def check_all(run, train_split, test, log):
    """Everything once, on as many rows as go through the model at once; leaves no trace in the run. Raises
    UserError."""
    for split in (test, train_split):
        for line in split.check() if run.world.rank == 0 else ():   # reads all of it
            log.say(f"checked {line}")
    for part, rows in zip(run.parts, run.at_once):
        check_batch(test, part, rows, log)
        arrays = check_batch(train_split, part, rows, log)
        check_step(run, *arrays, np.zeros(rows, np.int32), log=log)
    found = scoring.evaluate(run.model.eval(), test, run.world, max(run.at_once), limit=1, quiet=True).metrics
    run.model.train()
    if run.world.rank == 0 and run.args.monitor != "none":
        log.is_best(run.args.monitor, run.args.monitor_mode, {f"val/{k}": v for k, v in found.items()})
    log.say(f"checked an evaluation: {', '.join(f'val/{name}' for name in found)}")


def check_step(run, *arrays, log):
    """A forward and a backward of a Batch in arrays. Raises UserError when they are not finite."""
    batch = Batch(*(torch.from_numpy(a).to(run.world.device) for a in arrays))
    rows = len(batch.puzzle_ids)
    carry, logits, q = run.model.step(run.model.empty_carry(batch), batch, run.delta[:rows])
    loss, _ = act_loss(run.cfg, carry, logits, q)
    (loss / rows).backward()
    norm = (run.delta.grad if run.args.freeze_weights else run.flat.grad).norm().item()
    if not math.isfinite(loss.item() + norm):
        raise UserError(f"the first loss is {loss.item()}, its gradient norm {norm}; look at the data, "
                        "lower --lr")
    log.say(f"checked a forward and a backward: logits {tuple(logits.shape)} {str(logits.dtype)[6:]}, "
            f"loss {loss.item() / rows:.4f}, gradient norm {norm:.4f}")
    run.flat.grad.zero_()
    run.delta.grad.zero_()
