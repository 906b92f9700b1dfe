"""The folder of a run: checkpoints, log, lock.

log.jsonl     first line: command, git hash, settings; last line: the result
step_*.ckpt   all that a run needs to resume; latest.txt names the newest
best.ckpt     the best of them by --monitor
lock          held by the process that writes into the folder
"""

import fcntl
import json
import os
import platform
import shutil
import signal
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from tools.common import UserError, finite, replacing, require, user_error, write_file

# ---------------------------------------------------------------------------------------------
# Checkpoint files


def save_file(path, content):
    """torch.save that is atomic: temporary file, fsync, rename. Raises UserError when the disk is full."""
    with replacing(path) as tmp:
        try:
            with open(tmp, "wb") as f:
                torch.save(content, f)
        except RuntimeError as e:  # torch's zip writer hides the OSError of a full disk
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def load_file(path, verify=True):
    """A torch file with its tensors memory-mapped. weights_only, so that a file can never run code.

    verify: read the whole file and compare its checksums, which torch.load ignores. Raises UserError."""
    require(Path(path).is_file(), f"{path} not found")
    with user_error(f"{path} cannot be read as a checkpoint", Exception):  # torch may raise almost anything
        is_zip = zipfile.is_zipfile(path)
        if is_zip and verify:
            with zipfile.ZipFile(path) as archive:
                require(not archive.testzip(), "it is damaged, because a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def checkpoints(folder):
    """Step checkpoints of a run folder, newest first. Checkpoints newer than latest.txt are ignored:
    leftovers from before a rollback."""
    latest = Path(folder, "latest.txt")
    newest = latest.read_text().strip() if latest.exists() else "step_~"  # sorts after every number
    found = [path for path in Path(folder).glob("step_*.ckpt") if path.name <= newest]
    return sorted(found, reverse=True)


def find_checkpoint(path):
    """The newest checkpoint of a run folder, or the file itself. Raises UserError."""
    path = Path(path)
    files = checkpoints(path) if path.is_dir() else [path]
    require(files, f"{path} has no checkpoint (step_*.ckpt); pass a run folder or a checkpoint file")
    return files[0]


def save_checkpoint(folder, step, content, keep_last):
    """Write step_N.ckpt and latest.txt, then delete all but the last `keep_last` (0: keep all)."""
    path = Path(folder, f"step_{step:08d}.ckpt")
    for torn in Path(folder).glob("step_*.ckpt.tmp"):  # left by a run that was killed while saving
        torn.unlink()
    save_file(path, content)
    write_file(path.with_name("latest.txt"), f"{path.name}\n".encode())
    if keep_last:
        for old in checkpoints(folder)[keep_last:]:
            old.unlink()


def link_or_copy(path, target):
    """Make target the same file: a hard link, or a copy on file systems without links."""
    with replacing(target) as tmp:
        try:
            os.link(path, tmp)
        except OSError:
            shutil.copyfile(path, tmp)


def new_run_dir(preset):
    """Create runs/PRESET-TIME; if another run starts in the same second, wait for the next one."""
    while True:
        path = Path("runs", f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            path.mkdir(parents=True)
            return str(path)
        except FileExistsError:
            time.sleep(1)


def newest_run(preset=None):
    """The run in runs/ that was written to last, of any preset or of the given one. Raises UserError."""
    found = []
    for log in Path("runs").glob("*/log.jsonl"):
        start = (read_log(log) or [{}])[0]
        same_preset = preset in (None, start.get("settings", {}).get("preset"))
        if same_preset and checkpoints(log.parent):
            found.append(log)
    of_preset = f" of preset {preset}" if preset else ""
    require(found, f"--resume: no run{of_preset} with a checkpoint in runs/; pass a run folder or a file")
    return max(found, key=lambda log: log.stat().st_mtime).parent


# ---------------------------------------------------------------------------------------------
# The log


def lock_folder(folder):
    """An open file that keeps other processes out of a run folder until it is closed or the process ends."""
    file = open(Path(folder, "lock"), "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise UserError(f"{folder} is in use by {owner}; stop it, or pass another --run-dir") from None
    except OSError:  # this file system has no locks
        pass
    file.truncate(0)
    print(f"pid {os.getpid()} on {platform.node()}", file=file, flush=True)
    return file


def read_log(path):
    """The records of a log.jsonl. Lines that are no record, such as one torn by a crash, are skipped."""
    records = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and "event" in record and "step" in record:
                records.append(record)
    return records


class Log:
    """log.jsonl of a run folder, the console and optionally wandb. Silent on every rank but the first.

    keep_until_step: a resumed run keeps its records up to this step; None starts a new log."""

    def __init__(self, folder, rank=0, keep_until_step=None):
        self.file, self.wandb, self.records = None, None, []
        if rank:
            return
        path = Path(folder, "log.jsonl")
        self.lock = lock_folder(folder)
        if keep_until_step is not None:
            for r in read_log(path):
                if r["step"] <= keep_until_step and r["event"] != "result":
                    self.records.append(r)
        lines = [json.dumps(record) + "\n" for record in self.records]
        write_file(path, "".join(lines).encode())
        self.file = open(path, "a", buffering=1)  # line-buffered: a crash loses nothing

    def write(self, event, step, **values):
        """Append a record; train/* and val/* also go to wandb."""
        if not self.file:
            return
        record = finite({"event": event, "step": step, **values})
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        if self.wandb and event in ("train", "val"):
            self.wandb.log(values, step=step)

    def say(self, text):
        """Print a line at once. A closed stdout costs the output, not the run."""
        if not self.file:
            return
        with suppress(ValueError):  # sys.stdout is closed
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except OSError:  # the reader has ended: discard its output, also what is flushed at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def is_best(self, name, mode, metrics):
        """Whether metrics[name] beats ("max" or "min") every earlier evaluation of as many examples."""
        require(name in metrics, f"--monitor {name} is not measured; choose {', '.join(metrics)} or none")
        sign = 1 if mode == "max" else -1
        best = float("-inf")
        for r in self.records:
            if r["event"] == "val" and r.get(name) is not None and r["val/n"] == metrics["val/n"]:
                best = max(best, sign * r[name])
        return sign * metrics[name] > best

    def close(self):
        if self.file:
            self.file.close()
            self.lock.close()
        if self.wandb:
            self.wandb.finish()


class StopSignals:
    """Within the block, SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 ask the loop to stop after its step;
    `number` is the signal received (0: none). A second signal interrupts at once."""

    NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    number = 0

    def __enter__(self):
        self.before = {}
        for name in self.NAMES:
            number = getattr(signal, name)
            # nohup ignores SIGHUP; leave it so
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.catch)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number, frame):
        if self.number:
            raise KeyboardInterrupt
        self.number = number
