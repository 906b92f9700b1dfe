"""How near a training step and an evaluation come to this machine's peak.

    python bench.py --preset sudoku                     random weights, boards
    torchrun --nproc_per_node=8 bench.py --preset arc1  a rank of several
    python bench.py --votes data/arc1concept-aug-1000   ARC voting: rows/s

The peak is that of large matrix products, measured in turn with the rest. The
data of a preset need not be there. Appends what it prints to bench.jsonl.
"""
import argparse
import json
from functools import partial
from pathlib import Path

import common  # before torch, for a Ctrl-C while that is imported
import numpy as np
import torch

import eval as scoring
import prepare
import train
from common import Parser, UserError, cli, within
from data import Split, parts_of
from model import Batch, act_loss, compile_model, flops, row_scores
from vote import ArcVotes, test_puzzles


def open_run(preset, world, rows=None, **changes):
    """(train.Run with random weights, [Batch of random boards of every part]); the arguments are those of
    bench. Only with canvases the data must be there, which say how many rows lie on each."""
    known = prepare.known(train.PRESETS[preset]["data"][0])
    if not known:
        raise UserError(f"--preset {preset}: the shape of its data is not known; add them to prepare.KNOWN")
    settings = train.flags(**{**train.PRESETS[preset], **changes}).parse_args(["--allow-cpu"])
    if settings.dtype == "auto":    # rank 0 decides
        settings.dtype = world.gather_objects(common.fastest_dtype(world.device))[0]
    split = train.open_data(settings, world)[0] if settings.canvases else None
    cfg = train.config_of(settings, split.meta if split else known.shape)
    positions = 2 ** 16 if world.device.type == "cuda" else 2 ** 12     # arc1: 71 rows (18 GiB) or 4
    rows = rows or max(1, min(settings.global_batch_size // world.size, positions // cfg.length))
    rows = max(rows, 8 * len(settings.canvases or ()))
    settings.global_batch_size = rows * world.size
    parts = parts_of(split, settings.global_batch_size, world.size) if split else None
    run, generator = train.Run(settings, cfg, world, parts=parts), torch.Generator().manual_seed(0)
    return run, [random_batch(run.config_of(part), n, generator, world.device)
                 for part, n in zip(run.parts, run.rows_of)]


def random_batch(cfg, rows, generator, device):
    boards = torch.randint(1, cfg.vocab_size, (2, rows, cfg.seq_len), generator=generator).int()
    zeros = torch.zeros(rows, dtype=torch.int32)        # the blank puzzle, no exploration
    return Batch(*(t.to(device) for t in (*boards, zeros, zeros)))


def calls_of(run, batches):
    """{what: a function that does it once}"""
    def step():
        train.backward(run, batches)
        train.update(run, 1.0)

    def forward():
        for carry, batch in zip(run.carries, batches):
            delta = run.delta[:len(batch.inputs)]
            carry, logits, q = run.model.step(carry, batch, delta, run.max_steps)
            act_loss(run.cfg, carry, logits, q)

    def evaluation():
        for inputs, labels, ids, _ in batches:
            for logits, _ in scoring.think(run.model, inputs, ids, run.cfg.halt_max_steps):
                scoring.all_right(run.cfg, logits, labels)
            row_scores(run.cfg, logits, labels)
    return {"step": step, "forward": forward, "optimizer": lambda: train.update(run, 0.0),
            "evaluation": evaluation}


def median_ms(calls, rounds, device, dtype):
    """({what: ms}, FLOP/s of the peak), medians of everything in turn: so a machine whose speed drifts is
    compared with itself."""
    seconds, peaks = {name: [] for name in calls}, []
    for _ in range(rounds):
        peaks.append(common.matmul_peak(device, dtype))
        for name, call in calls.items():
            seconds[name] += common.seconds_of(call, 1, device)
    return {name: 1000 * float(np.median(s)) for name, s in seconds.items()}, float(np.median(peaks))


def bench(preset, world, rows=None, compiled=True, rounds=5, **changes):
    """A row {name: value} for a preset: its training step and, after "evaluation_", a whole evaluation.

    world: common.World(0, 1, device) for one process. rows: of a rank, by default what fits a small GPU, or a
    CPU. changes: of the preset's settings. FLOPs and TFLOP/s are of one rank; memory: None without a GPU."""
    device, on_gpu = world.device, world.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)      # another preset may have run before
    run, batches = open_run(preset, world, rows, **changes)
    compiled = compiled and not common.compiler_lacks(device)
    if compiled:
        compile_model(run.model)
    calls = calls_of(run, batches)
    (first_step_s,) = common.seconds_of(calls["step"], 1, device)
    for call in calls.values():     # the first call of each compiles and allocates
        call()
    ms, peak = median_ms(calls, rounds, device, run.model.dtype)

    def speed(ms, flop):
        tflops = flop / ms / 1e9
        return {"ms": ms, "rows_per_s": 1000 * run.rows * world.size / ms, "tflops": tflops,
                "share_of_peak": tflops / (peak / 1e12)}
    evaluation = 0
    for part, n in zip(run.parts, run.rows_of):
        once = flops(run.config_of(part))
        evaluation += n * (run.cfg.halt_max_steps * (once.forward - once.embed) + once.embed)
    return {"preset": preset, "device": common.device_name(device), "ranks": world.size, "rows": run.rows,
            "dtype": run.cfg.dtype, "compiled": compiled, "peak_tflops": peak / 1e12,
            **speed(ms["step"], run.step_flops / world.size), "forward_ms": ms["forward"],
            "backward_ms": ms["step"] - ms["forward"] - ms["optimizer"], "optimizer_ms": ms["optimizer"],
            **{f"evaluation_{name}": v for name, v in speed(ms["evaluation"], evaluation).items()},
            "first_step_s": first_step_s,
            "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2 ** 30 if on_gpu else None}


def bench_votes(folder):
    """A row {name: value}: voting over the test split of an ARC dataset. Its labels are the predictions, half
    of them wrong in two cells. Raises UserError."""
    if not Path(folder, "test_puzzles.json").exists():
        raise UserError(f"--votes {folder}: there is no test_puzzles.json; name the folder of an ARC dataset")
    split, rng, times, cpu = Split(folder, "test"), np.random.default_rng(0), [], torch.device("cpu")
    votes = ArcVotes(test_puzzles(split), split.names)
    for rows in np.array_split(np.arange(len(split)), 1 + len(split) // 4096):
        inputs, labels, ids = split.gather(rows)
        preds = labels.clip(0)
        preds[::2, :2] = rng.integers(2, 12, 2)
        vote = partial(votes.add, inputs, preds, rng.standard_normal(len(rows)), ids, rows)
        times += common.seconds_of(vote, 1, cpu)
    times += common.seconds_of(lambda: votes.merge([votes.payload()]), 1, cpu)
    return {"votes": str(folder), "rows": len(split), "seconds": sum(times),
            "rows_per_s": len(split) / sum(times), "pass@2": votes.result().get("pass@2")}


def report(row):
    """Print it, then append it to bench.jsonl."""
    for name, value in row.items():
        print(f"{name:<24} {format(value, ',.3f') if isinstance(value, float) else value}")
    with open("bench.jsonl", "a") as file:
        file.write(json.dumps({**row, "git": common.git_hash(), "torch": torch.__version__}) + "\n")


def flags():
    parser, number = Parser(__doc__), within(int, 1)
    add = parser.add_argument
    add("--preset", choices=list(train.PRESETS), default="mini", metavar="NAME", help="a task of train.py")
    add("--votes", metavar="DATASET", help="folder of an ARC dataset: time the voting instead")
    add("--steps", type=number, default=5, metavar="N", help="rounds, of which the table has the median")
    add("--rows", type=number, metavar="N", help="of a rank; by default what fits a small GPU, or a CPU")
    add("--dtype", choices=["bfloat16", "float32", "auto"], help="default: the preset's")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="to run on")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    return parser


def main(argv=None):
    parser = flags()
    args = parser.parse_args(argv)
    if args.votes:
        parser.alone(args, "votes")
        return report(bench_votes(args.votes))
    world = common.start_world(args.device, 600)       # seconds until a dead rank ends the others
    changes = {"dtype": args.dtype} if args.dtype else {}
    row = bench(args.preset, world, args.rows, args.compile, args.steps, **changes)
    if world.rank == 0:
        report(row)
    world.close()


if __name__ == "__main__":
    cli(main)
