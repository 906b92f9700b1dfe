"""What the tests of training share: a small dataset, runs in this process, in forked ones and under torchrun.

A forked run begins with torch imported, and a hook can end it at any event, so that a test of 20 crashes takes seconds.
"""
import multiprocessing
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import data
import train

ROOT = Path(train.__file__).parent
FLAGS = ("--preset sudoku --hidden-size 32 --puzzle-emb-ndim 32 --H-cycles 2 --L-cycles 1 --num-layers 1 "
         "--halt-max-steps 4 --halt-exploration-prob 0.5 --global-batch-size 8 --epochs 4 --eval-interval 2 --lr 3e-3 "
         "--lr-warmup-steps 5 --puzzle-emb-lr 1e-2 --log-interval 4 --dtype float32 --no-compile --device cpu").split()
TIMINGS = {"train_s", "logged_s", "dt_ms", "settings", "line"}


def write_boards(folder, groups=20, seed=0, vocab_size=6, shift=0):
    """A dataset of 4x4 Sudoku boards in groups of two puzzles with an identifier and one to three examples each."""
    rng = np.random.default_rng(seed)
    solved = np.array([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1])

    def boards(n):
        labels = np.stack([rng.permutation(4)[solved - 1] + 2 for _ in range(n)])
        return np.where(rng.random(labels.shape) < 0.5, 1, labels).astype(np.uint8), labels.astype(np.uint8)
    sizes = rng.integers(1, 4, 2 * groups)
    ids = np.arange(1, 2 * groups + 1, dtype=np.int32)
    for split, sizes in (("train", sizes), ("test", np.ones_like(sizes))):
        inputs, labels = boards(sizes.sum())
        data.write_split(Path(folder) / split, {
            "inputs": inputs, "labels": labels, "puzzle_identifiers": ids,
            "puzzle_indices": np.concatenate(([0], np.cumsum(sizes))).astype(np.int32),
            "group_indices": np.arange(0, 2 * groups + 1, 2, dtype=np.int32)}, vocab_size, len(ids) + 1)
    data.write_json(Path(folder) / "identifiers.json", ["<blank>", *(f"puzzle{i + shift}" for i in ids)])
    data.write_json(Path(folder) / "recipe.json", {"seed": seed})
    return str(folder)


def flags(boards, run_dir, *more):
    return [*FLAGS, "--data", str(boards), "--run-dir", str(run_dir), *map(str, more)]


def log_of(run_dir, *events):
    return [r for r in train.read_log(Path(run_dir) / "log.jsonl") if not events or r["event"] in events]


def steps_of(run_dir, event):
    return [r["step"] for r in log_of(run_dir, event)]


def last(run_dir):
    """Content of the newest checkpoint of a run."""
    return train.load_file(train.checkpoints(run_dir)[0])


def unlike(a, b, name=""):
    """Names of what differs, bit for bit, between two checkpoints or two logs; timings do not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted((a.keys() | b.keys()) - TIMINGS, key=str)
        one_only = [f"{name}/{k}" for k in keys if (k in a) != (k in b)]
        return one_only + [n for k in keys if k in a and k in b for n in unlike(a[k], b[k], f"{name}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [n for i, (x, y) in enumerate(zip(a, b)) for n in unlike(x, y, f"{name}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype == b.dtype and torch.equal(a, b):
            return []
        return [f"{name} by {(a.double() - b.double()).abs().max():.3g}" if a.shape == b.shape else name]
    return [] if type(a) is type(b) and a == b else [f"{name}: {str(a)[:60]} != {str(b)[:60]}"]


def same_run(a, b):
    """What differs between the ends of two runs, and between their logs."""
    return unlike(last(a), last(b)) + unlike(log_of(a, "train", "val"), log_of(b, "train", "val"), "log")


# ---------------------------------------------------------------------------------------------
# Runs in processes of their own

def count_events(act):
    """Call act(name, number) around everything that a run does to its state or its files."""
    number = iter(range(10 ** 9))

    def wrap(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            act(f"before {name}", next(number))
            result = function(*args, **kwargs)
            act(f"after {name}", next(number))
            return result
        setattr(owner, name, wrapped)
    for name in ("backward", "update", "train_metrics", "evaluate", "save_file", "mirror"):
        wrap(train, name)
    for owner, name in ((train.Log, "write"), (os, "replace"), (torch, "save")):
        wrap(owner, name)


def at(event, do):
    """act for count_events: do() at event number `event`, or at the `n`-th event of a name when event is (name, n)."""
    seen = []

    def act(name, number):
        if isinstance(event, tuple) and name == event[0]:
            seen.append(name)
        if number == event or isinstance(event, tuple) and name == event[0] and len(seen) == event[1]:
            do()
    return act


def child(rank, size, port, cwd, argv, event, number, output):
    """One rank. number: of a signal that it sends to itself at `event`; None: count the events into a file."""
    os.chdir(cwd)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    file = os.open(f"{output}{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1), os.dup2(file, 2)
    torch.set_num_threads(1)
    train.plot = lambda run_dirs, out: out   # a second each: tests/test_train.py draws
    if event is not None:
        count_events(at(event, lambda: os.kill(os.getpid(), number)))
    elif number:
        count_events(lambda name, n: Path(f"{output}events{rank}").write_text(str(n)))
    data.cli(lambda: train.main(argv))


class Ranks:
    """A run of `size` processes, started at once. hook: (event, signal) of the rank `hooked`, see child."""

    def __init__(self, tmp_path, argv, size=1, hook=(None, None), hooked=0):
        os.environ.setdefault("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train", "runs", "matplotlib.figure", "matplotlib.backends.backend_agg"])
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.output = str(Path(tmp_path) / f"output{random.random()}-")
        self.processes = []
        for rank in range(size):
            event = hook if rank == hooked else (None, None)
            args = (rank, size, port, str(tmp_path), argv, *event, self.output)
            self.processes.append(context.Process(target=child, args=args, daemon=True))
            self.processes[-1].start()

    def wait(self, timeout=60):
        """Exit codes; a process that outlives the timeout is killed and counts as None."""
        for p in self.processes:
            p.join(timeout)
        codes = [p.exitcode for p in self.processes]
        for p in self.processes:
            p.kill()
        return codes

    def text(self, rank=0):
        return Path(f"{self.output}{rank}").read_text(errors="replace")


def run_ranks(tmp_path, argv, size=1, hook=(None, None), hooked=0):
    """(exit codes, what rank 0 printed)"""
    ranks = Ranks(tmp_path, argv, size, hook, hooked)
    codes = ranks.wait()
    return codes, ranks.text()


def torchrun(*argv, launcher=(), script=ROOT / "train.py", **popen):
    """A process of torchrun with two ranks; stdout and stderr together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *launcher, str(script)]
    command += map(str, argv)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)
