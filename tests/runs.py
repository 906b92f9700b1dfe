"""Shared by the tests: small datasets and models, and runs in this process, in forked ones or under torchrun.

A forked run starts with torch already imported, and a hook can end it at any event. A test that kills a run
20 times therefore takes seconds.
"""

import multiprocessing
import os
import random
import socket
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tiny_arc import pair, write_source

import prepare
import train
from model import TRM, Config
from prepare import arc, sudoku
from tools import common, run_folder

ROOT = Path(train.__file__).parent
FLAGS = (
    "--preset sudoku --hidden-size 32 --puzzle-emb-ndim 32 --H-cycles 2 --L-cycles 1 --num-layers 1 "
    "--halt-max-steps 4 --halt-exploration-prob 0.5 --global-batch-size 8 --epochs 4 --eval-interval 2 "
    "--lr 3e-3 --lr-warmup-steps 5 --puzzle-emb-lr 1e-2 --log-interval 4 --dtype float32 --no-compile "
    "--device cpu"
).split()
TIMINGS = {"train_s", "dt_ms", "settings", "line"}
ALONE = common.World(0, 1, torch.device("cpu"))
SIZES = dict(hidden_size=32, num_heads=2, num_layers=1, puzzle_emb_len=1, puzzle_emb_ndim=32)
STEPS = dict(H_cycles=1, L_cycles=1, halt_max_steps=4, mixer="mlp", pos_encodings="none", dtype="float32")
TINY = Config(vocab_size=6, seq_len=16, **SIZES, **STEPS)
ARC_CFG = replace(TINY, vocab_size=12, seq_len=900, mixer="attn", pos_encodings="rope", halt_max_steps=2)


# ---------------------------------------------------------------------------------------------
# Small datasets and models


def boards(n, seed=0):
    """(2, n, 16): 4x4 Sudokus and their answers."""
    rng = np.random.RandomState(seed)
    return np.array([sudoku.make_puzzle(rng, 4)[:2] for _ in range(n)]).swapaxes(0, 1)


def sudoku_dir(folder):
    """A dataset of 4x4 Sudokus as prepare/sudoku.py would write it."""
    recipe = {"builder": "sudoku", "size": 4, "source": "generate"}
    prepare.write_dataset(folder, {"train": boards(8), "test": boards(22, seed=1)}, 6, recipe)
    return folder


def flipped(rng, height, width):
    """A pair of an ARC task: a random grid, and the same upside down."""
    grid = rng.randint(0, 10, (height, width))
    return pair(grid, grid[::-1])


def arc_dir(folder):
    """Three small tasks, one with two test inputs; two augmentations each; built from files in `folder`."""
    rng, tasks = np.random.RandomState(0), {}
    for i in range(3):
        pairs = [flipped(rng, rng.randint(2, 5), rng.randint(2, 5)) for _ in range(3 + (i == 1))]
        tasks[f"task{i}"] = {"train": pairs[:2], "test": pairs[2:]}
    write_source(folder, {"evaluation": tasks})
    argv = ["--source", str(folder), "--subsets", "evaluation", "--num-aug", "2"]
    arc.main([*argv, "--output-dir", str(folder / "built")])
    return folder / "built"


def write_source_of_sizes(folder, sizes):
    """Kaggle's files of a subset `evaluation`, a task of every size: its largest grid is size x size."""
    rng, tasks = np.random.RandomState(0), {}
    for i, size in enumerate(sizes):
        tests = [flipped(rng, size - 1, 2)]
        tasks[f"task{i}"] = {"train": [flipped(rng, size, size), flipped(rng, 2, size - 1)], "test": tests}
    write_source(folder, {"evaluation": tasks})


def model_of(cfg=TINY, seed=0):
    """Random weights; a q head that differs between rows."""
    model = TRM(cfg, torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        model.q_head.normal_(generator=torch.Generator().manual_seed(seed))
        model.q_bias.zero_()
        model.puzzle_emb.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def arc_model(split, seed=0):
    return model_of(replace(ARC_CFG, num_puzzles=split.meta["num_puzzle_identifiers"]), seed)


def save_run(folder, split, model, **changes):
    """A run folder as train.py leaves it."""
    dirs = [str(d) for d in split.dirs]
    content = dict(config=asdict(model.cfg), model=model.state_dict(), ema=None, settings={"preset": "mini"})
    content |= dict(puzzle_ids_sha256=split.puzzle_ids_sha256, recipe=split.recipe, step=10)
    content |= dict(data=dirs, data_test=dirs) | changes
    run_folder.save_file(folder / "step_00000010.ckpt", content)
    (folder / "latest.txt").write_text("step_00000010.ckpt\n")
    return folder


class Oracle(TRM):
    """Solves 4x4 Sudokus after `needs` supervision steps; q_halt is positive exactly when it is right.
    Features of the state y: 0 the tokens, 1 the number of steps, 2 the noise added so far."""

    noise_helps = False

    def __init__(self, cfg=TINY):
        super().__init__(cfg, torch.Generator().manual_seed(0))
        self.y0.zero_()
        self.calls = 0
        self.eval()

    def embed(self, inputs, puzzle_rows):
        x = torch.zeros(len(inputs), self.cfg.length, self.cfg.hidden_size)
        x[:, 1:, 0] = inputs
        return x

    def deep_recursion(self, x, y, z):
        y = y.clone()
        y[..., 0] = x[..., 0]
        y[..., 1] += 1
        self.calls += 1
        return y, z

    def needs(self, tokens):
        """Number of steps until the answer is right."""
        return 1 + int(tokens.sum()) % 4

    def knows(self, tokens, state):
        if self.noise_helps:
            return state[0, 2] > 0.5
        return round(float(state[0, 1])) >= self.needs(tokens)

    def heads(self, y):
        logits = torch.zeros(len(y), 16, 6)
        q = torch.full((len(y), 2), -3.0)
        for i, state in enumerate(y):
            tokens = state[1:, 0].round().int().tolist()
            givens = [1 << t - 2 if t > 1 else 0 for t in tokens]
            bits = sudoku.solve(givens, 4, [[1, 2, 4, 8]] * 16) if min(tokens) else None
            answer = [b.bit_length() + 1 for b in bits] if bits else tokens
            right = self.knows(np.array(tokens), state)
            logits[i, range(16), answer if right else answer[::-1]] = 9
            q[i, 0] = 3 if right else -3
        return logits, q


def altered(path):
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def png_size(path):
    """(width, height) in pixels."""
    header = Path(path).read_bytes()[:24]
    assert header[1:4] == b"PNG"
    return struct.unpack(">II", header[16:])


# ---------------------------------------------------------------------------------------------
# Runs


def write_boards(folder, groups=20, seed=0, vocab_size=6, shift=0):
    """A dataset of 4x4 Sudokus in groups of two puzzles, each with an identifier and up to three examples."""
    rng = np.random.default_rng(seed)
    solved = np.array([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1])
    several = rng.integers(1, 4, 2 * groups)
    ids = np.arange(1, 2 * groups + 1, dtype=np.int32)
    for split, sizes in (("train", several), ("test", np.ones_like(several))):
        labels = np.stack([rng.permutation(4)[solved - 1] + 2 for _ in range(sizes.sum())])
        inputs = np.where(rng.random(labels.shape) < 0.5, 1, labels)
        arrays = {
            "inputs": inputs.astype(np.uint8),
            "labels": labels.astype(np.uint8),
            "puzzle_identifiers": ids,
            "puzzle_indices": np.concatenate(([0], np.cumsum(sizes))).astype(np.int32),
            "group_indices": np.arange(0, 2 * groups + 1, 2, dtype=np.int32),
        }
        prepare.write_split(Path(folder) / split, arrays, vocab_size, len(ids) + 1)
    names = [f"puzzle{i + shift}" for i in ids]
    common.write_json(Path(folder) / "identifiers.json", ["<blank>", *names])
    common.write_json(Path(folder) / "recipe.json", {"seed": seed})
    return str(folder)


def flags(boards, run_dir, *more):
    return [*FLAGS, "--data", str(boards), "--run-dir", str(run_dir), *map(str, more)]


def log_of(run_dir, *events):
    """Records of a run's log, all or those of the given events."""
    records = run_folder.read_log(Path(run_dir) / "log.jsonl")
    return [r for r in records if not events or r["event"] in events]


def steps_of(run_dir, event):
    return [r["step"] for r in log_of(run_dir, event)]


def last(run_dir):
    """Content of the newest checkpoint of a run."""
    return run_folder.load_file(run_folder.checkpoints(run_dir)[0])


def unlike(a, b, name=""):
    """Names of what differs, bit for bit, between two checkpoints or two logs; timings do not count."""
    found = []
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted((a.keys() | b.keys()) - TIMINGS, key=str):
            if key in a and key in b:
                found += unlike(a[key], b[key], f"{name}/{key}")
            else:
                found.append(f"{name}/{key} is missing in one")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            found += unlike(x, y, f"{name}[{i}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        if a.dtype != b.dtype or not torch.equal(a, b):
            found.append(f"{name} by {(a.double() - b.double()).abs().max():.3g}")
    elif type(a) is not type(b) or a is not b and a != b:
        found.append(f"{name}: {str(a)[:60]} != {str(b)[:60]}")
    return found


def same_run(a, b):
    """What differs between the ends of two runs, and between their logs."""
    logs = [log_of(run_dir, "train", "val") for run_dir in (a, b)]
    return unlike(last(a), last(b)) + unlike(*logs, "log")


# ---------------------------------------------------------------------------------------------
# Runs in processes of their own


def count_events(act, set_attribute=setattr):
    """Call act(name, number) before and after everything that a run does to its state or its files."""
    numbers = iter(range(10**9))

    def wrap(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            act(f"before {name}", next(numbers))
            result = function(*args, **kwargs)
            act(f"after {name}", next(numbers))
            return result

        set_attribute(owner, name, wrapped)

    for name in ("forward_backward", "update", "log_step", "evaluate", "link_or_copy"):
        wrap(train, name)
    for owner, name in (
        (run_folder, "save_file"),
        (run_folder.Log, "write"),
        (os, "replace"),
        (torch, "save"),
    ):
        wrap(owner, name)


def at(event, do):
    """act for count_events: do() at event number `event`; if it is (name, n), at the n-th of that name."""
    seen = []

    def act(name, number):
        seen.append(name)
        if event in (number, (name, seen.count(name))):
            do()

    return act


def without_curves(monkeypatch=None):
    """Pictures take a second each: only tests/test_draw.py draws."""
    set_attribute = monkeypatch.setattr if monkeypatch else setattr
    set_attribute(train.draw, "plot", lambda run_dirs, path: path)


def go(*argv):
    """train.main in this process."""
    return train.main([str(a) for a in argv])


def child(rank, size, port, cwd, argv, event, action, output):
    """One rank. action: the signal that it sends itself at `event`; without an event, a function to call
    before the run, or True to count the events into a file."""
    os.chdir(cwd)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    file = os.open(f"{output}{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    without_curves()
    if event is not None:
        count_events(at(event, lambda: os.kill(os.getpid(), action)))
    elif callable(action):
        action()
    elif action:
        count_events(lambda name, n: Path(f"{output}events{rank}").write_text(str(n)))
    common.cli(lambda: train.main(argv))


class Ranks:
    """A run of `size` processes, started at once. hook: (event, action) of the rank `hooked`, see child."""

    def __init__(self, tmp_path, argv, size=1, hook=(None, None), hooked=0):
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("forkserver")
        drawing = ["matplotlib.figure", "matplotlib.backends.backend_agg"]
        context.set_forkserver_preload(["train", "runs", "numpy.random", "torch.distributed.nn", *drawing])
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.output = str(Path(tmp_path) / f"output{random.random()}-")
        self.processes = []
        for rank in range(size):
            event, action = hook if rank == hooked else (None, None)
            args = (rank, size, port, str(tmp_path), [str(a) for a in argv], event, action, self.output)
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
