"""Shared by every script: one-line errors, flags, processes and devices, atomic files."""

import argparse
import ctypes
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

IGNORE_LABEL = -100  # a label that is neither trained on nor scored (PyTorch's default ignore_index)
progress = partial(tqdm, disable=None, dynamic_ncols=True, leave=False)  # None: shown on a terminal only

# ---------------------------------------------------------------------------------------------
# Errors and flags


class UserError(Exception):
    """A user error, printed as one line: what is wrong and how to fix it."""


def require(condition, message):
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def one_line(error):
    """An exception's message on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def user_error(what, *exceptions):
    """Turn these exceptions into a UserError that begins with `what`, a file name for example."""
    try:
        yield
    except exceptions as e:
        reason = getattr(e, "strerror", None) or one_line(e)
        raise UserError(f"{what}: {reason}") from e


def cli(main):
    """Run main() as a script. A UserError becomes one line and exit code 2; bugs keep their traceback."""
    try:
        sys.exit(main() or 0)
    except SystemExit:  # first, because naming torch._dynamo below imports it, which takes seconds
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has ended, as in `eval.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as e:
        message = str(e)
    except OSError as e:
        if e.filename is None:  # not about a file of the user
            raise
        message = f"{e.filename}: {e.strerror}"
    except torch.OutOfMemoryError:
        message = "out of GPU memory; use train.py --grad-accum N or eval.py --batch-size N"
    except torch._dynamo.exc.BackendCompilerFailed as e:
        message = f"torch.compile failed ({one_line(e.inner_exception)}); use --no-compile"
    if int(os.environ.get("RANK", 0)):
        time.sleep(2)  # rank 0 usually prints the same line, and torchrun then stops this rank
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the docstring's line breaks and show every default except None and False."""

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "kind", None)
        return {int: "N", float: "X"}.get(kind, "VALUE")

    def _get_help_string(self, action):
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with our help layout, whose errors are UserErrors."""

    def __init__(self, description, usage="%(prog)s [flags]"):
        formatter = partial(HelpFormatter, max_help_position=30, width=80)
        super().__init__(description=description, usage=usage, allow_abbrev=False, formatter_class=formatter)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def bounded(kind, low, high=math.inf):
    """For add_argument(type=...): an int or a float between low and high, both included."""

    def convert(text):
        value = kind(text)  # argparse reports a ValueError as "invalid int value: 'x'"
        if not low <= value <= high or value == math.inf:
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {limits}")
        return value

    convert.__name__ = kind.__name__
    convert.kind, convert.low, convert.high = kind, low, high  # for values that come from a file
    return convert


# ---------------------------------------------------------------------------------------------
# Processes and devices


@dataclass
class World:
    """The processes of a run. Every collective is a no-op in a world of one."""

    rank: int
    size: int
    device: torch.device

    def all_reduce(self, tensor):
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, number):
        """The largest of all ranks' ints. It travels over gloo on the CPU, so no rank waits for its GPU."""
        box = torch.tensor(int(number))
        if self.size > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def all_gather(self, tensor):
        """(B, ...) on every rank, concatenated in rank order to (size * B, ...)."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def all_gather_object(self, value):
        """List of every rank's picklable value, in rank order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value):
        """Rank 0's picklable value."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def choose_device(name, local_rank=0):
    """The torch.device for "auto" (cuda, then mps, then cpu) or for a name."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(filter(available.get, available))
    require(available[name], f"--device {name} is not available on this machine; use --device auto")
    if name != "cuda":
        return torch.device(name)
    n_gpus = torch.cuda.device_count()
    require(local_rank < n_gpus, f"more processes than GPUs: use torchrun --nproc_per_node={n_gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def keep_freed_memory():
    """Tell glibc to keep large freed blocks: otherwise every CPU step pays for fresh pages."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # other C libraries have none
        mallopt(-4, 0)  # M_MMAP_MAX: never give a block a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def start_world(device="auto", timeout_s=600):
    """Join the other processes if torchrun started this one (it sets RANK, WORLD_SIZE and LOCAL_RANK)."""
    major, minor = torch.__version__.split(".")[:2]
    is_recent = (int(major), int(minor)) >= (2, 10)
    require(is_recent, f"torch {torch.__version__} is too old; install torch>=2.10, see requirements.txt")
    env = os.environ
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    partly = "RANK" in env or "WORLD_SIZE" in env
    require(not (missing and partly), f"{' and '.join(missing)} not set; start several ranks with torchrun")
    require(
        not missing or env.get("SLURM_STEP_NUM_TASKS", "1") == "1",  # set within srun only
        "Slurm started several tasks; start one per node and run torchrun in it",
    )
    rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    device = choose_device(device, int(env.get("LOCAL_RANK", 0)))
    if device.type == "cpu":
        keep_freed_memory()
    if size > 1:
        # An import after init_process_group would keep gloo's threads alive (PyTorch issue 190489).
        from torch.distributed import nn  # noqa: F401

        timeout = timedelta(seconds=timeout_s)
        store = next(dist.rendezvous("env://", rank, size, timeout=timeout))[0]
        # A restarted rank would otherwise find the addresses of the ranks that died in the store.
        # Only on one machine: several machines may count their restarts differently.
        if env.get("LOCAL_WORLD_SIZE") == str(size):
            store = dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device)


def missing_compiler(device):
    """What torch.compile lacks on this machine, for example "a C++ compiler"; "" if nothing is missing."""
    if device.type == "mps":
        return ""
    names = ("c++", "g++", "clang++") if device.type == "cpu" else ("cc", "gcc", "clang")
    if not any(map(shutil.which, names)):
        return "a C++ compiler" if device.type == "cpu" else "a C compiler"
    has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return "" if has_headers else "Python.h (Debian: python3-dev)"


def synchronize(device):
    """Wait until the device has finished all queued work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def matmul_flops(device, dtype, n=None, repeats=8):
    """FLOP/s of an n x n matrix product, the best of several."""
    n = n or (2048 if device.type == "cpu" else 8192)
    a = torch.ones(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def fastest_dtype(device):
    """Return "bfloat16" or "float32", whichever multiplies matrices faster on this device."""
    return max(("bfloat16", "float32"), key=lambda name: matmul_flops(device, getattr(torch, name), 1024))


# ---------------------------------------------------------------------------------------------
# Files


@contextmanager
def replacing(path):
    """Yield a temporary path that replaces `path` when the block succeeds: readers see the old file or the
    new one, never a part. Raises UserError when it cannot be written."""
    path = Path(os.path.realpath(path))  # a symbolic link stays a link
    tmp = path.with_name(f"{path.name}.tmp")
    with user_error(f"cannot write {path}", OSError):
        tmp.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield tmp
            with open(tmp, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)


def write_file(path, content):
    """Write bytes atomically."""
    with replacing(path) as tmp:
        tmp.write_bytes(content)


def finite(value):
    """The value as JSON would give it back, with None for NaN and infinity, which JSON lacks."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def write_json(path, value):
    write_file(path, json.dumps(finite(value)).encode())


def read_json(path, kind=dict):
    """The content of a JSON file. Raises UserError if it is missing, invalid or not of this kind."""
    with user_error(path, OSError, ValueError, RecursionError):
        value = json.loads(Path(path).read_text())
    require(isinstance(value, kind), f"{path} does not hold a {kind.__name__}")
    return value


def sha256_of_file(path):
    """Hexadecimal SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def git_hash():
    """Short hash of the checked-out commit, or None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
