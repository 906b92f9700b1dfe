"""Measure the speed of a training step and an evaluation, and their share of
this machine's peak.

    python -m tools.bench --preset sudoku
    torchrun --nproc_per_node=8 -m tools.bench --preset arc1

Weights and boards are random, so the dataset need not exist (except for presets
with canvases, whose shares it tells). The peak is the speed of large matrix
products. Everything is measured in turn, so that a drift of the machine's speed
affects all of it. All numbers are per rank.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

import prepare
import train
from data import Split, assign_canvases
from eval import all_exact, supervision_steps
from model import Batch, compile_model, flops
from tools.common import Parser, bounded, cli, matmul_flops, start_world, synchronize


def new_run(preset, world, rows=None, **changes):
    """A train.Run with random weights. rows: per rank, by default as many as fit a small GPU or a CPU.

    changes: settings that replace those of the preset."""
    args = train.flags(**{**train.PRESETS[preset], **changes}).parse_args([])
    shape = prepare.known_dataset(args.data[0]).shape
    if rows is None:
        positions = 2**16 if world.device.type == "cuda" else 2**12  # arc1: 71 rows (18 GiB), or 4
        rows_that_fit = positions // (args.puzzle_emb_len + shape["seq_len"])
        rows = max(1, min(args.global_batch_size // world.size, rows_that_fit))
    args.global_batch_size = rows * world.size
    train.check_settings(args, world)  # chooses --dtype auto
    canvas_sizes = None
    if args.canvases:
        train_split = Split(args.data, "train")
        assign_canvases(train_split, Split(args.data, "test"), args.canvases)
        canvas_sizes = train_split.examples_per_canvas()
    return train.Run(args, train.config_of(args, shape), world, canvas_sizes=canvas_sizes)


def bench(run, canvas=0, rounds=5):
    """{name: median over the rounds} for a training step, the optimizers alone, and an evaluation of one
    batch with all supervision steps. canvas: side of the grids, or 0 for the whole grid of the preset."""
    device, rows = run.world.device, run.rows_per_rank
    cfg = replace(run.cfg, seq_len=canvas**2) if canvas else run.cfg
    boards = torch.randint(1, cfg.vocab_size, (2, rows, cfg.seq_len), dtype=torch.int32)
    inputs, labels = boards.to(device)
    zeros = torch.zeros(rows, dtype=torch.int32, device=device)
    batch = Batch(inputs, labels, puzzle_ids=zeros, min_halt_steps=zeros)

    def step():
        train.forward_backward(run, batch, canvas)
        train.update(run, 1.0, canvas)

    def optimizer():
        train.update(run, 0.0, canvas)

    def evaluation():
        for logits, _ in supervision_steps(run.model, inputs, zeros, cfg.halt_max_steps):
            all_exact(cfg, logits, labels)

    calls = {"step": step, "optimizer": optimizer, "evaluation": evaluation}
    for call in calls.values():  # compiles and allocates
        call()
    peaks = []  # FLOP/s
    seconds = {"step": [], "optimizer": [], "evaluation": []}
    for _ in range(rounds):
        peaks.append(matmul_flops(device, run.model.dtype))
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    once = flops(cfg)
    forwards = cfg.halt_max_steps * (once.forward - once.embed)
    work = {
        "step": rows * once.train_step,
        "evaluation": rows * (once.embed + forwards),  # x is embedded once
    }
    peak = statistics.median(peaks)
    values = {"peak_tflops": peak / 1e12}
    for name in calls:
        median = statistics.median(seconds[name])
        values[f"{name}_ms"] = 1000 * median
        if name in work:
            values[f"{name}_tflops"] = work[name] / median / 1e12
            values[f"{name}_share_of_peak"] = work[name] / median / peak
    if device.type == "cuda":
        values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return values


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    count = bounded(int, 1)
    add("--preset", choices=list(train.PRESETS), default="mini", metavar="NAME", help="preset of train.py")
    add("--steps", type=count, default=5, metavar="N", help="number of measurements, whose median is shown")
    add("--rows", type=count, metavar="N", help="rows per rank (default: what fits a small GPU or a CPU)")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="cuda, then mps, then cpu")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    args = parser.parse_args(argv)
    world = start_world(args.device)
    run = new_run(args.preset, world, args.rows)
    if args.compile:
        compile_model(run.model)
    rows = run.rows_per_rank
    lines = [f"{args.preset}: {world.size} x {rows} rows, {world.device}, {run.cfg.dtype}"]
    mean_ms = 0.0
    for canvas, n in run.canvas_sizes.items():
        share = n / sum(run.canvas_sizes.values())
        values = bench(run, canvas, args.steps)
        mean_ms += share * values["step_ms"]
        if canvas:
            lines.append(f"canvas {canvas} x {canvas}: {share:.1%} of the training steps")
        lines += [f"  {name:<24} {value:,.3f}" for name, value in values.items()]
    if run.args.canvases:
        lines.append(f"mean step_ms over the canvases: {mean_ms:.3f}")
    if world.rank == 0:
        print(*lines, sep="\n")
    world.close()


if __name__ == "__main__":
    cli(main)
