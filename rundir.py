"""The folder of a run: its checkpoint files, its log, its lock.

    log.jsonl        first line: command, git hash, settings; last line: the result
    step_*.ckpt      everything that a run needs to go on; best.ckpt is the best of them, latest.txt names the
    newest lock             held while a process writes here
"""
import errno
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from common import UserError, finite, one_line, progress, replacing, sha256, write

try:
    import fcntl
except ImportError:     # native Windows: a run folder is not locked there
    fcntl = None


# ---------------------------------------------------------------------------------------------
# Checkpoint files

# keys under which others save their weights, the surest first
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "shadow")
SHA_LENGTH = (64).to_bytes(2, "little")     # what stands before the sha256 at the end of a file of save_file


def save_file(path, content):
    """torch.save that is all or nothing: temporary file, fsync, rename. The sha256 of the bytes stands at the
    end as the comment of the zip archive, so that plain torch.load reads the file too. Raises OSError."""
    try:
        with replacing(path) as tmp:
            with open(tmp, "wb") as f:      # by Python's file, whose errors say what they are
                torch.save(content, f)
            digest = sha256(tmp).encode()
            with open(tmp, "r+b") as f:
                f.seek(-2, os.SEEK_END)     # a zip archive ends with the length of its comment
                f.write(SHA_LENGTH + digest)
    except RuntimeError as e:   # torch's zip writer trips over a full disk, and hides what it was
        raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def check_sha256(path):
    """False when a file carries no checksum of save_file, True when it is right. Raises UserError when it is
    wrong."""
    with open(path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - 66))
        tail, left, digest = f.read(), size - 66, hashlib.sha256()
        if tail[:2] != SHA_LENGTH:
            return False
        f.seek(0)
        while left:
            block = f.read(min(left, 1 << 22))
            digest.update(block)
            left -= len(block)
        digest.update(b"\0\0")      # the length of the comment when it was summed
    if digest.hexdigest().encode() != tail[2:]:
        raise UserError(f"{path} is damaged: its sha256 is not the one it was saved with")
    return True


def load_file(path):
    """What save_file wrote, or any plain torch file (those carry no checksum). Tensors come to the CPU;
    weights_only, so that a file can never run code. Raises UserError for a missing or damaged file."""
    try:
        checked = check_sha256(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(content, dict) and "config" in content and (
            "settings" in content or not content.keys() & set(WRAPPERS))
        if ours and not checked:
            raise UserError(f"{path} is damaged: its sha256 is missing")
        return content
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except pickle.UnpicklingError as e:     # torch's own text advises to let the file run code
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(e))
        raise UserError(f"{path} cannot be read as a checkpoint: " + (
            f"it holds a Python object ({found[1]}), which could run code; where it comes from, save the "
            "weights alone: torch.save(model.state_dict(), F)" if found else "it is no torch file")) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as e:
        raise UserError(f"{path} cannot be read as a checkpoint: {one_line(e)}") from None


def checkpoints(folder):
    """Step checkpoints of a run folder, the newest first."""
    return sorted(Path(folder).glob("step_*.ckpt"), reverse=True)


def mirror(path, target):
    """target becomes the same file, as a hard link where the file system has them: it stays when `path` is
    deleted."""
    tmp = target.with_name(target.name + ".tmp")
    tmp.unlink(missing_ok=True)
    try:
        os.link(path, tmp)
    except OSError:
        shutil.copyfile(path, tmp)
    os.replace(tmp, target)


def save_checkpoint(folder, step, content, keep_last):
    """Write step_N.ckpt and latest.txt, then drop all but the last `keep_last`. Raises UserError."""
    folder = Path(folder)
    path = folder / f"step_{step:08d}.ckpt"
    try:
        for torn in folder.glob("*.tmp"):   # of a run that was killed while it saved
            torn.unlink()
        save_file(path, content)
        write(folder / "latest.txt", f"{path.name}\n".encode())
    except OSError as e:
        raise UserError(f"no checkpoint at step {step}: {path}: {e.strerror or e}; the older ones are "
                        f"untouched: make room and --resume {folder}") from None
    upto = checkpoints(folder)
    for old in upto[upto.index(path):][keep_last:]:    # those before are the future of a run that went back
        old.unlink()


def find_file(path):
    """The newest checkpoint of a run folder, or the file itself. Raises UserError."""
    path, newest = Path(path), Path(path) / "latest.txt"
    if path.is_dir() and not newest.exists():
        raise UserError(f"{path} holds no latest.txt, so it is no run folder; name a run folder or a "
                        f"checkpoint file")
    return path / newest.read_text().strip() if path.is_dir() else path


# ---------------------------------------------------------------------------------------------
# The log of a run

def lock(run_dir):
    """Hold a run folder for this process: an open file that keeps others out until it is closed, or the
    process ends in whatever way. Raises UserError that names the process that holds it."""
    file = open(Path(run_dir) / "lock", "a+")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{run_dir} is being written by {holder}; wait for it, stop it, or name another "
                        f"--run-dir") from None
    except OSError:     # a file system without locks
        pass
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {platform.node()}\n")
    file.flush()
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
        self.run_dir, self.file, self.wandb, self.records = Path(run_dir), None, None, []
        if rank:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.lock, path = lock(run_dir), self.run_dir / "log.jsonl"
        if keep_to is not None:     # what comes after it will be written again
            self.records = [r for r in read_log(path) if r["step"] <= keep_to and r["event"] != "result"]
        self.began = next((r["began"] for r in self.records if "began" in r), int(time.time()))
        write(path, b"".join(json.dumps(r).encode() + b"\n" for r in self.records))
        self.file = open(path, "ab", buffering=0)
        if wandb_project:
            import wandb
            self.wandb = wandb.init(project=wandb_project, name=self.run_dir.name, config=settings,
                                    resume="allow", id=f"{self.run_dir.name}-{self.began}")

    def write(self, event, step, **values):
        """A line of the log, and train/* and val/* to wandb. Raises OSError when the disk is full."""
        if not self.file:
            return
        record = finite({"event": event, "step": step, **values})
        self.records.append(record)
        line = json.dumps(record).encode() + b"\n"
        if self.file.write(line) < len(line):   # unbuffered: a crash loses nothing, a full disk takes a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.run_dir / "log.jsonl"))
        if self.wandb and event in ("train", "val"):
            self.wandb.log(values, step=step)

    def is_best(self, name, mode, metrics):
        """Whether metrics[name] is better (mode: "max" or "min") than in all evaluations of as many examples.
        Raises UserError, with the valid names."""
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
            self.file.close()
            self.lock.close()
        if self.wandb:
            self.wandb.finish()


def new_run_dir(preset):
    """Make a folder for a run; two that start in the same second get two."""
    name = f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        try:
            Path(name + suffix).mkdir(parents=True)
            return name + suffix
        except FileExistsError:
            continue


def find_checkpoint(args):
    """(file, content, notes) that --resume asks for: the newest good checkpoint of a run; (None, None, [])
    for a new run. Raises UserError."""
    if args.resume is None:
        return None, None, []
    path = Path(args.run_dir if args.resume == "newest" and args.run_dir else args.resume)
    if args.resume == "newest" and args.run_dir and not checkpoints(path):
        return None, None, []
    if args.resume == "newest" and not args.run_dir:
        path = newest_run(args.preset)
    files, notes = checkpoints(path) if path.is_dir() else [path], []
    latest = path / "latest.txt"
    if path.is_dir() and latest.exists():
        newest = path / latest.read_text().strip()
        if newest in files:
            files = files[files.index(newest):]     # those after it: a future that the run left
    for file in files:
        try:
            content = load_file(file)
        except UserError as e:
            notes.append(f"{e}; using the one before")
            continue
        if not isinstance(content, dict) or not {"settings", "m", "cursor"} <= content.keys():
            raise UserError(f"{file} holds weights, but no state of training; --resume needs a checkpoint of "
                            f"train.py, --init takes weights")
        return file, content, notes
    raise UserError("; ".join(n.removesuffix("; using the one before") for n in notes) or
                    f"{path} holds no checkpoint (step_*.ckpt); name another, or begin a new run")


def newest_run(preset):
    """The run of a preset that was written to last."""
    logs = [log for log in Path("runs").glob(f"{preset}-*/log.jsonl") if checkpoints(log.parent)]
    if not logs:
        raise UserError(f"--resume: no run with a checkpoint in runs/{preset}-*; name a run folder or a file")
    return max(logs, key=lambda log: log.stat().st_mtime).parent


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


class Bar:
    """How far the run is: a bar on a terminal, elsewhere a plain line at most every 20 seconds."""

    def __init__(self, run, log):
        self.run, self.log, self.told = run, log, time.monotonic()
        self.bar = progress(quiet=run.world.rank > 0, total=run.total_steps, initial=run.step, unit="step",
                            mininterval=0.5)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def update(self):
        self.bar.update()

    def show(self, text):
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable and time.monotonic() - self.told > 20:
            self.told = time.monotonic()
            self.log.say(f"train {self.run.step}/{self.run.total_steps}: {text}")
