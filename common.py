"""What every script needs: errors of one line, flags, processes and devices, files that are all or nothing.

Nothing here knows a model, a dataset or a task. Scripts import it first: all that its import does is to make
one line of a Ctrl-C while torch is imported, which takes seconds; later `cli` does that.
"""
import argparse
import ctypes
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

if sys.excepthook is sys.__excepthook__:
    def one_line_for_ctrl_c(kind, *error):
        if kind is KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
        else:
            sys.__excepthook__(kind, *error)
    sys.excepthook = one_line_for_ctrl_c

import torch
import torch.distributed as dist
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# Errors and flags

class UserError(Exception):
    """Something the user can mend: one line with the value, the limit and the cure."""


def cli(main):
    """Run main() as a script: what the user can mend is one line and exit code 2, Ctrl-C one line and 130."""
    code = 2
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        code, message = 130, "\ninterrupted"
    except UserError as e:
        message = f"error: {e}"
    except OSError as e:
        message = f"error: {e.strerror or e}: {e.filename or ''}".rstrip(": ")
    except torch.OutOfMemoryError:
        message = ("error: out of memory on the GPU: train.py takes --grad-accum N (twice as many parts, "
                   "half the memory), eval.py --batch-size N")
    except torch._dynamo.exc.BackendCompilerFailed as e:
        message = (f"error: torch.compile failed ({one_line(e.inner_exception)}); --no-compile does without; "
                   "where /tmp is full or noexec, set TMPDIR and TORCHINDUCTOR_CACHE_DIR to another folder")
    if int(os.environ.get("RANK", 0)):      # mostly rank 0 says the same, and then torchrun ends this one
        time.sleep(2)
    print(message, file=sys.stderr)
    sys.exit(code)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every flag with its default."""

    def _get_help_string(self, action):     # without "(default: None)"
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with the help of all our scripts, whose errors are UserErrors."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, usage="%(prog)s [flags]",
                         formatter_class=lambda prog: HelpFormatter(prog, max_help_position=30, width=80))

    def error(self, message):
        raise UserError(f"{message}; see --help")

    def alone(self, args, name):
        """Refuse flags that change nothing beside one that does something else. Raises UserError."""
        for other, value in vars(args).items():
            if other != name and value != self.get_default(other):
                raise UserError(f"--{other.replace('_', '-')} does nothing with --{name}; leave it out")


def within(kind, low, high=math.inf):
    """For add_argument(type=...): a number of `kind` (int or float) in low .. high, the ends included."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number") from None
        if not low <= value <= high or value == math.inf:
            limits = f"{low} or more" if high == math.inf else f"{low} .. {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; give {limits}")
        return value
    return convert


def progress(iterable=None, quiet=False, **options):
    """A tqdm bar on a terminal; nothing elsewhere, where a log would fill with control characters."""
    quiet = quiet or not sys.stderr.isatty()
    return tqdm(iterable, disable=quiet, dynamic_ncols=True, leave=False, **options)


# ---------------------------------------------------------------------------------------------
# Processes and devices

@contextmanager
def peers():
    """Around a collective: a rank that died or hangs becomes a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:      # a RuntimeError, too, but this rank's own
        raise
    except RuntimeError as e:
        raise UserError(f"another rank died or hangs ({one_line(e)}); look for its own message above, and "
                        f"start again (train.py: with --resume)") from None


@dataclass
class World:
    """The processes of a run. Every collective is a no-op in a world of one."""
    rank: int
    size: int
    device: torch.device

    @peers()
    def sum(self, tensor):
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @peers()
    def agree(self, number):
        """The largest of all ranks' whole numbers; over gloo, so that it does not wait for a GPU."""
        box = torch.tensor(number)
        if self.size > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    @peers()
    def gather(self, tensor):
        """(B, ...) of every rank, concatenated in rank order to (size * B, ...)."""
        if self.size == 1:
            return tensor
        out = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        dist.all_gather_single(out, tensor.contiguous())
        return out

    @peers()
    def gather_on_first(self, tensor):
        """As gather, on the CPU, for rank 0 alone; None on the others, which allocate nothing."""
        if self.size == 1:
            return tensor.cpu()
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(tensor.contiguous(), parts)
        return None if parts is None else torch.cat([part.cpu() for part in parts])

    @peers()
    def scatter(self, out, whole):
        """Fill `out` with this rank's share of `whole` (size * B, ...), which only rank 0 has, on the CPU."""
        if self.size == 1:
            return out.copy_(whole)
        parts = [part.to(out.device) for part in whole.chunk(self.size)] if self.rank == 0 else None
        dist.scatter(out, parts)
        return out

    @peers()
    def broadcast(self, tensor):
        """Rank 0's values for all, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    @peers()
    def gather_objects(self, value):
        """List of every rank's picklable value, in rank order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def choose_device(name, local_rank=0):
    """torch.device of "auto", "cuda", "mps" or "cpu". Raises UserError when it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [d for d, is_there in available.items() if is_there]
    name = there[0] if name == "auto" else name
    if name not in there:
        raise UserError(f"--device {name} is not available here; use {' or '.join(there)}")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def keep_freed_memory():
    """Have glibc's malloc keep large blocks that are freed, and hand them out again: by default it returns
    them to the system, and every step on a CPU pays for the pages anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:     # other C libraries have none
        mallopt(-4, 0)      # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)     # M_TRIM_THRESHOLD: the heap never shrinks


def start_world(device, timeout_s):
    """Join the other processes when torchrun started this one (it sets RANK, WORLD_SIZE and LOCAL_RANK)."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()     # of the whole process, whoever calls this
    if size > 1:
        # Imported later, its default arguments would hold the process group: close() would not end gloo's
        # threads, and one that is at work while Python ends aborts the process (PyTorch issue 190489).
        from torch.distributed import nn  # noqa: F401
        timeout = timedelta(seconds=timeout_s)
        with peers():
            store = next(dist.rendezvous("env://", rank, size, timeout=timeout))[0]
            # torchrun hands a process that it starts again the store of the one that died, with its addresses
            if os.environ.get("LOCAL_WORLD_SIZE") == str(size):   # several machines may count differently
                store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} x {platform.machine()} {device.type}"


def compiler_lacks(device):
    """What torch.compile lacks on this machine, in words, or "" when it lacks nothing: for a CPU it writes
    C++, and on a GPU Triton builds a helper with a C compiler."""
    if device.type == "mps":
        return ""
    on_cpu = device.type == "cpu"
    compilers = ("c++", "g++", "clang++") if on_cpu else ("cc", "gcc", "clang")
    lacks = [] if any(map(shutil.which, compilers)) else [f"a {'C++' if on_cpu else 'C'} compiler"]
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacks.append("Python.h (Debian: python3-dev)")
    return " and ".join(lacks)


# ---------------------------------------------------------------------------------------------
# How fast this machine multiplies matrices

def wait(device):
    """Until the device has done all it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds_of(function, repeats, device):
    """Times of single calls in seconds, each waited for."""
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - start)
    return times


def matmul_peak(device, dtype, n=None, repeats=8):
    """FLOP/s of a square product of n x n (by default large for the device), the best of several."""
    n = n or (2048 if device.type == "cpu" else 8192)
    a = torch.ones(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(seconds_of(lambda: a @ a, repeats, device))


def fastest_dtype(device):
    """Name of the faster of bfloat16 and float32 for matrix products on this device, measured."""
    return max("bfloat16", "float32", key=lambda name: matmul_peak(device, getattr(torch, name), 1024, 5))


# ---------------------------------------------------------------------------------------------
# Files

def one_line(error):
    """The first line of an error, cut to 150 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


@contextmanager
def replacing(path):
    """Yield a temporary name beside `path` that takes its place when the block ends well, and is gone when it
    does not: whoever reads `path` finds the old file or the new one, whole. Raises OSError."""
    tmp = Path(f"{path}.tmp")
    tmp.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write(path, content):
    """Write bytes, all or nothing. Raises OSError."""
    with replacing(path) as tmp:
        tmp.write_bytes(content)


def finite(value):
    """A value for JSON, which knows neither NaN nor infinity: None in their place, at any depth."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Write a JSON file, all or nothing, as json.dump does without indent. Raises OSError."""
    write(path, json.dumps(finite(value)).encode())


def read_json(path, cure, kind=object):
    """The content of a JSON file. Raises UserError, which ends with `cure`, when it is missing, no JSON or no
    `kind` (dict, list)."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} not found; {cure}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); {cure}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} holds a {type(value).__name__}, not a {kind.__name__}; {cure}")
    return value


def sha256(path):
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def git_hash():
    """Short hash of the commit of this code, None outside of git."""
    with suppress(OSError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
