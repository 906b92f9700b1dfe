"""The folder of a run: its checkpoint files, its log, its lock.

    log.jsonl       first line: command, git hash, settings; last line: the result
    step_*.ckpt     everything that a run needs to go on; latest.txt names the newest
    best.ckpt       the best of them
    lock            held while a process writes here
"""
import json
import os
import pickle
import platform
import re
import shutil
import signal
import sys
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from common import UserError, finite, one_line, replacing, write

# ---------------------------------------------------------------------------------------------
# Checkpoint files

def save_file(path, content):
    """torch.save that is all or nothing: temporary file, fsync, rename. Raises OSError."""
    try:
        with replacing(path) as tmp, open(tmp, "wb") as f:  # Python's file, whose errors say what they are
            torch.save(content, f)
    except RuntimeError as e:   # torch's zip writer trips over a full disk, and hides what it was
        raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def load_file(path):
    """What save_file wrote, or any torch file, its tensors on the CPU; weights_only, so that a file can never
    run code. Raises UserError for a missing or damaged file."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():   # torch.save writes checksums, but torch.load looks at none
                    raise UserError(f"{path} is damaged: a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except pickle.UnpicklingError as e:     # torch's own text advises to let the file run code
        what, found = "it is no torch file", re.search(r"Unsupported global: GLOBAL (\S+)", str(e))
        if found:
            what = (f"it holds a Python object ({found[1]}), which could run code; where it comes from, save "
                    f"the weights alone: torch.save(model.state_dict(), F)")
        raise UserError(f"{path} cannot be read as a checkpoint: {what}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path} cannot be read as a checkpoint: {one_line(e)}") from None


def checkpoints(folder):
    """Step checkpoints of a run folder, the newest first. Those after latest.txt do not count: they are the
    future of a run that went back."""
    latest = Path(folder, "latest.txt")
    upto = latest.read_text().strip() if latest.exists() else "step_~"      # which is after all numbers
    return sorted((p for p in Path(folder).glob("step_*.ckpt") if p.name <= upto), reverse=True)


def candidates(path):
    """The checkpoints of a run folder, the newest first, or the file itself. Raises UserError."""
    path = Path(path)
    files = checkpoints(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no checkpoint (step_*.ckpt); name a run folder or a checkpoint file")
    return files


def find_file(path):
    """The newest checkpoint of a run folder, or the file itself. Raises UserError."""
    return candidates(path)[0]


def save_checkpoint(folder, step, content, keep_last):
    """Write step_N.ckpt and latest.txt, then drop all but the last `keep_last`. Raises UserError."""
    path = Path(folder, f"step_{step:08d}.ckpt")
    try:
        for torn in path.parent.glob("*.tmp"):  # of a run that was killed while it saved
            torn.unlink()
        save_file(path, content)
        write(path.with_name("latest.txt"), f"{path.name}\n".encode())
    except OSError as e:
        raise UserError(f"no checkpoint at step {step}: {path}: {e.strerror or e}; the older ones are "
                        f"untouched: make room and --resume {folder}") from None
    for old in checkpoints(folder)[keep_last:]:
        old.unlink()


def mirror(path, target):
    """target becomes the same file, as a hard link where the file system has them: it stays when `path` is
    deleted."""
    with replacing(target) as tmp:
        tmp.unlink(missing_ok=True)     # of a run that was killed here
        try:
            os.link(path, tmp)
        except OSError:
            shutil.copyfile(path, tmp)


def find_checkpoint(args):
    """(file, content, notes) that --resume asks for: the newest good checkpoint of a run; (None, None, [])
    for a new run. Raises UserError."""
    path, bad = args.resume, []
    if path == "newest":
        path = args.run_dir or newest_run(args.preset)
        path = path if checkpoints(path) else None      # --run-dir DIR --resume begins where there is none
    if path is None:
        return None, None, []
    for file in candidates(path):
        try:
            content = load_file(file)
        except UserError as e:
            bad.append(str(e))
            continue
        if not isinstance(content, dict) or not {"settings", "m", "cursor"} <= content.keys():
            raise UserError(f"{file} holds weights, but no state of training; --resume needs a checkpoint of "
                            f"train.py, --init takes weights")
        return file, content, [f"{e}; using the one before" for e in bad]
    raise UserError("; ".join(bad))


def newest_run(preset):
    """The run of a preset that was written to last. Raises UserError."""
    logs = [log for log in Path("runs").glob(f"{preset}-*/log.jsonl") if checkpoints(log.parent)]
    if not logs:
        raise UserError(f"--resume: no run with a checkpoint in runs/{preset}-*; name a run folder or a file")
    return max(logs, key=lambda log: log.stat().st_mtime).parent


def new_run_dir(preset):
    """Make a folder for a run; of two that start in the same second one waits for the next."""
    path = Path("runs", f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        time.sleep(1)
        return new_run_dir(preset)
    return str(path)


# ---------------------------------------------------------------------------------------------
# The log of a run

def lock(run_dir):
    """Hold a run folder for this process: an open file that keeps others out until it is closed, or the
    process ends in whatever way. Raises UserError that names the process that holds it."""
    file = open(Path(run_dir, "lock"), "a+")
    try:
        import fcntl    # native Windows has none
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{run_dir} is being written by {file.read().strip() or 'another process'}; wait for "
                        f"it, stop it, or name another --run-dir") from None
    except (ImportError, OSError):      # no locks here, or not on this file system
        pass
    file.truncate(0)
    print(f"pid {os.getpid()} on {platform.node()}", file=file, flush=True)
    return file


def read_log(path):
    """The records of a log.jsonl; whatever is no record, as a line torn by a crash, is left out."""
    records = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and "event" in record and "step" in record:
                records.append(record)
    return records


class Log:
    """log.jsonl of a run folder, the console and, if asked for, wandb; silent on all ranks but the first.

    keep_to: a run that is resumed keeps the records up to this step; None begins a new log. Use it as a
    context manager: the folder is locked within."""

    def __init__(self, run_dir, rank=0, keep_to=None, wandb_project=None, settings=None):
        self.file, self.wandb, self.records = None, None, []
        if rank:
            return
        path = Path(run_dir, "log.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = lock(run_dir)
        if keep_to is not None:     # what comes after it will be written again
            self.records = [r for r in read_log(path) if r["step"] <= keep_to and r["event"] != "result"]
        self.began = next((r["began"] for r in self.records if "began" in r), int(time.time()))
        write(path, b"".join(json.dumps(r).encode() + b"\n" for r in self.records))
        self.file = open(path, "a", buffering=1)    # a line at a time: a crash loses nothing
        if wandb_project:
            import wandb
            name = path.parent.name
            self.wandb = wandb.init(project=wandb_project, name=name, config=settings, resume="allow",
                                    id=f"{name}-{self.began}")

    def write(self, event, step, **values):
        """A line of the log, and train/* and val/* to wandb. Raises OSError when the disk is full."""
        if not self.file:
            return
        record = finite({"event": event, "step": step, **values})
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        if self.wandb and event in ("train", "val"):
            self.wandb.log(values, step=step)

    def is_best(self, name, mode, metrics):
        """Whether metrics[name] is better (mode: "max" or "min") than in all evaluations of as many examples.
        Raises UserError, with the valid names."""
        if not metrics["val/n"]:    # a hidden test set
            return False
        if name not in metrics:
            raise UserError(f"--monitor {name} is not measured; choose one of {', '.join(metrics)}, none")
        sign = 1 if mode == "max" else -1
        before = [sign * r[name] for r in self.records
                  if r["event"] == "val" and r.get(name) is not None and r["val/n"] == metrics["val/n"]]
        return sign * metrics[name] > max(before, default=float("-inf"))

    def say(self, text):
        if self.file:
            tqdm.write(text)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.file:
            self.lock.close()
            self.file.close()
        if self.wandb:
            self.wandb.finish()


# ---------------------------------------------------------------------------------------------
# What a loop shows, and what stops it

class Stopped(Exception):
    """A signal that ends the run where it is; args[0] is its number."""


class Signals:
    """Within it SIGTERM and SIGINT ask the loop to stop after its step. With at_once, or on a second Ctrl-C,
    they raise Stopped."""

    def __init__(self):
        self.number, self.at_once = 0, False

    def __enter__(self):
        self.before = {n: signal.signal(n, self.catch) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number, frame):
        if self.at_once or self.number == number == signal.SIGINT:
            raise Stopped(number)
        self.number = number


class Bar(tqdm):
    """How far the run is: a bar on a terminal, elsewhere a plain line at most every 20 seconds."""

    def __init__(self, run, log):
        quiet = run.world.rank > 0 or not sys.stderr.isatty()
        super().__init__(disable=quiet, total=run.total_steps, initial=run.step, unit="step", mininterval=0.5,
                         dynamic_ncols=True, leave=False)
        self.run, self.log, self.told = run, log, time.monotonic()

    def show(self, text):
        self.set_postfix_str(text, refresh=False)
        if self.disable and time.monotonic() - self.told > 20:
            self.told = time.monotonic()
            self.log.say(f"train {self.run.step}/{self.run.total_steps}: {text}")
