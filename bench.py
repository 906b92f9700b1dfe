"""How near a training step and an evaluation come to this machine's peak.

    python bench.py --preset sudoku                     random weights
    torchrun --nproc_per_node=8 bench.py --preset arc1  with what ranks exchange
    python bench.py --votes data/arc1concept-aug-1000   ARC voting: rows/s

The data need not be there: without them puzzles are random. The peak is that
of large matrix products, measured in turn with the rest. Prints a table, and
appends every column of it to bench.jsonl as a line.
"""
import time

STARTED = time.perf_counter()   # the first step comes after all imports, which take seconds

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

import common
import eval as scoring
import prepare
import train
from common import Parser, UserError, cli, within
from data import Split
from model import Batch, act_loss, compile_model, flops, row_scores
from vote import ArcVotes, test_puzzles


def open_run(args, world):
    """A preset's train.Run with random weights, and its (train, test) splits, None without the data."""
    parser = train.flags()
    parser.set_defaults(**train.PRESETS[args.preset])
    settings = parser.parse_args([])
    settings.dtype = args.dtype or settings.dtype
    if settings.dtype == "auto":    # rank 0 decides
        settings.dtype = world.gather_objects(common.fastest_dtype(world.device))[0]
    known, splits = prepare.known(settings.data[0]), None
    if not known or all(Path(d).exists() for d in settings.data):
        prepare.must_exist(settings.data)
        splits = [Split(settings.data, name) for name in ("train", "test")]
    cfg = train.config_of(settings, splits[0].meta if splits else known.shape)
    positions = 2 ** 16 if world.device.type == "cuda" else 2 ** 12     # arc1: 71 rows (18 GiB) or 4
    rows = args.rows or max(1, min(settings.global_batch_size // world.size, positions // cfg.length))
    settings.global_batch_size, settings.grad_accum = rows * world.size, 1
    return train.Run(settings, cfg, world), splits


def some_batch(run, splits):
    """A Batch of test puzzles, or of random tokens, on the device."""
    S, rows = run.cfg.seq_len, run.rows
    if splits:
        arrays = splits[1].gather(np.arange(min(rows, len(splits[1]))), size=rows)
        tensors = [torch.from_numpy(a) for a in arrays]
    else:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, run.cfg.vocab_size, (2, rows, S), generator=generator)
        tensors = [*tokens.int(), torch.zeros(rows, dtype=torch.int32)]
    return Batch(*(t.to(run.world.device) for t in (*tensors, torch.zeros(rows, dtype=torch.int32))))


def calls_of(run, batch):
    """{what: a function that does it once}"""
    cfg, world = run.cfg, run.world

    def step():
        train.backward(run, batch)
        train.update(run, 1.0)

    def forward():
        carry, logits, q = run.model.step(run.carry, batch, run.delta, run.max_steps)
        act_loss(cfg, carry, logits, q)

    def communicate():
        world.sum(run.flat.grad)
        world.gather(torch.cat((run.delta.grad, run.delta.grad[:, :1]), dim=1))

    def evaluate():
        for logits, _ in scoring.think(run.model, batch.inputs, batch.puzzle_ids, cfg.halt_max_steps):
            scoring.all_right(cfg, logits, batch.labels)
        row_scores(cfg, logits, batch.labels)
    return {"step": step, "forward": forward, "optimizer": lambda: train.update(run, 0.0),
            "communication": communicate, "evaluation": evaluate}


def median_ms(calls, n, device, dtype):
    """({what: ms}, FLOP/s of the peak), medians of n rounds of everything in turn: so a machine whose speed
    drifts is compared with itself."""
    seconds, peaks = {name: [] for name in calls}, []
    for _ in range(n):
        peaks.append(common.matmul_peak(device, dtype))
        for name, call in calls.items():
            seconds[name] += common.seconds_of(call, 1, device)
    return {name: 1000 * float(np.median(s)) for name, s in seconds.items()}, float(np.median(peaks))


def peak_memory_gib(device):
    """Of the GPU, else of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    if os.name != "posix":
        return None
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def bench(args, world):
    """Two columns {name: value}: the training step and the evaluation pass."""
    (run, splits), device = open_run(args, world), world.device
    cfg, n_steps = run.cfg, run.cfg.halt_max_steps
    compiled = args.compile and not common.compiler_lacks(device)
    if compiled:
        compile_model(run.model)
    calls = calls_of(run, some_batch(run, splits))
    calls["step"]()
    common.wait(device)
    first_step_s = time.perf_counter() - STARTED
    for call in calls.values():     # the first call of each compiles and allocates
        call()
    if splits:
        source, test = train.batches(run, splits[0]), splits[1]
        calls["training data"] = lambda: next(source)
        calls["test data"] = lambda: test.gather(np.arange(min(run.rows, len(test))), size=run.rows)
    ms, peak = median_ms(calls, args.steps, device, run.model.dtype)
    about = {"preset": args.preset, "device": common.device_name(device), "ranks": world.size,
             "dtype": cfg.dtype, "compile": compiled, "hidden_size": cfg.hidden_size,
             "rows of a rank": run.rows, "n": args.steps}

    def column(what, ms, gflop, data_ms):
        return {"what": what, **about, "ms": ms, "rows_per_s": 1000 * run.rows * world.size / ms,
                "gflop": gflop, "tflops": gflop / ms, "peak_tflops": peak / 1e12,
                "share_of_peak": gflop / ms / (peak / 1e12), "data_ms": data_ms,
                "peak_memory_gib": peak_memory_gib(device)}
    once = flops(cfg)
    training = column("training step", ms["step"], run.rows * once.step / 1e9, ms.get("training data"))
    training |= {"first_step_s": first_step_s, "forward_ms": ms["forward"],
                 "backward_ms": ms["step"] - ms["forward"] - ms["optimizer"], "optimizer_ms": ms["optimizer"],
                 "of it communication_ms": ms["communication"]}
    gflop = run.rows * (n_steps * (once.forward - once.embed) + once.embed) / 1e9       # embedded once a pass
    return training, column(f"evaluation, {n_steps} steps", ms["evaluation"], gflop, ms.get("test data"))


def bench_votes(folder):
    """A column {name: value}: voting over the test split of an ARC dataset. Its labels are the predictions,
    half of them spoiled in two cells."""
    if prepare.known(folder):
        prepare.must_exist([folder])    # says how to build it
    if not Path(folder, "test_puzzles.json").exists():
        raise UserError(f"--votes {folder}: there is no test_puzzles.json; name the folder of an ARC dataset")
    split, rng, seconds = Split(folder, "test"), np.random.default_rng(0), 0.0
    votes = ArcVotes(test_puzzles(split), split.names)
    for start in range(0, len(split), 4096):
        rows = np.arange(start, min(len(split), start + 4096))
        inputs, labels, ids = split.gather(rows)
        preds, q_halt = labels.clip(0), rng.standard_normal(len(rows)).astype(np.float32)
        for row in np.flatnonzero(rng.random(len(rows)) < 0.5):
            preds[row, rng.integers(0, 100, 2)] = rng.integers(2, 12, 2)
        tick = time.perf_counter()
        votes.add(inputs, preds, q_halt, ids, rows)
        seconds += time.perf_counter() - tick
    tick = time.perf_counter()
    votes.merge([votes.payload()])
    result = votes.result()
    seconds += time.perf_counter() - tick
    return {"what": "ARC voting", "data": str(folder), "rows": len(split), "seconds": seconds,
            "rows_per_s": len(split) / seconds, "pass@2": result["pass@2"],
            "peak_memory_gib": peak_memory_gib(torch.device("cpu"))}


def report(*columns):
    """Print them side by side, then append them to bench.jsonl."""
    def text(value):
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        return "-" if value is None else str(value)
    for key in dict.fromkeys(key for column in columns for key in column):
        print(f"{key:>22}" + "".join(f"{text(column.get(key)):>24}" for column in columns))
    with open("bench.jsonl", "a") as file:
        for column in columns:
            file.write(json.dumps({**column, "git": common.git_hash(), "torch": torch.__version__}) + "\n")


def flags():
    parser, number = Parser(__doc__), within(int, 1)
    add = parser.add_argument
    add("--preset", choices=list(train.PRESETS), default="mini", help="a task of train.py")
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
        for name, value in vars(args).items():
            if name != "votes" and value != parser.get_default(name):
                raise UserError(f"--{name} does nothing with --votes; leave it out")
        return report(bench_votes(args.votes))
    world = common.start_world(args.device, 600)       # seconds until a dead rank ends the others
    columns = bench(args, world)
    if world.rank == 0:
        report(*columns)
    world.close()


if __name__ == "__main__":
    cli(main)
