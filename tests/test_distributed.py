"""Two gloo ranks: the same as one process, under torchrun, and when one of them dies."""
import signal
import time
from pathlib import Path

import pytest
import torch

import train
from runs import ROOT, Ranks, flags, last, log_of, run_ranks, same_run, steps_of, torchrun, without_curves

# A training script that keeps what every rank was given and has at its end. Disturbed, rank 1 is killed at
# step 10 of its first start, and torchrun gets a SIGTERM at step 16 of the second.
SCRIPT = """
import atexit, contextlib, os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import common, runs, train
runs.without_curves()
deed, rank, first = sys.argv.pop(1), int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
backward, loop, batches = train.backward, train.train, []

def watched(run, parts):
    batches.extend(parts)
    backward(run, parts)
    if deed == "disturb" and (rank, run.step, first) == (1, 9, True):
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "disturb" and (rank, run.step, first) == (0, 15, False):
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)     # until torchrun passes it on, which the loop would outrun

def names_of_threads():
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):      # it has just ended
            yield open(f"/proc/self/task/{{task}}/comm").read()

def threads():
    for _ in range(50):     # one that was joined is listed for a moment
        names = list(names_of_threads())
        if not any("gloo" in name for name in names):
            break
        time.sleep(0.1)
    open(f"threads{{rank}}", "w").writelines(names)

def kept(run, *others):
    import torch.distributed.nn     # as parts of torch do once they are needed
    result = loop(run, *others)
    torch.save((run.model.puzzle_emb, [list(b) for b in batches]), f"kept{{rank}}.pt")
    return result
train.backward, train.train = watched, kept
if os.path.isdir("/proc/self/task"):
    atexit.register(threads)
common.cli(train.main)
"""
LONGER = ["--epochs", 6, "--eval-interval", 3, "--max-steps", 20, "--log-interval", 1,
          "--checkpoint-interval", 7]


def under_torchrun(tmp_path, deed, *argv, launcher=()):
    """(exit code, output, seconds) of two ranks that run SCRIPT in tmp_path."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    started = time.time()
    process = torchrun(deed, *argv, launcher=launcher, script=script, cwd=tmp_path)
    text = process.communicate(timeout=120)[0]
    return process.returncode, text, time.time() - started


@pytest.fixture(scope="session")
def pair(tmp_path_factory, boards):
    """The folder of a run of 20 steps on two ranks that nothing disturbed."""
    tmp = tmp_path_factory.mktemp("pair")
    code, text, _ = under_torchrun(tmp, "nothing", *flags(boards, "run", *LONGER))
    assert code == 0 and "FutureWarning" not in text, text      # of what torch will drop
    return tmp


def test_two_ranks_are_one_process(pair, tmp_path, boards, monkeypatch):
    """Same batches, losses to 1e-5 over 20 steps, the same puzzle table on both ranks."""
    batches, backward = [], train.backward
    without_curves(monkeypatch)
    monkeypatch.setattr(train, "backward", lambda run, parts: (batches.extend(parts), backward(run, parts)))
    assert train.main([str(a) for a in flags(boards, tmp_path, *LONGER)]) == 0
    (table0, first), (table1, second) = (torch.load(pair / f"kept{rank}.pt") for rank in range(2))
    assert len(first) == len(second) == len(batches) == 20
    for one, a, b in zip(batches, first, second):
        for whole, *halves in zip(one, a, b):
            assert torch.equal(whole, torch.cat(halves))
    assert torch.equal(table0, table1) and table0.any()
    assert torch.equal(table0, last(tmp_path)["model"]["puzzle_emb"])
    assert steps_of(pair / "run", "train") == steps_of(tmp_path, "train") == list(range(1, 21))
    for ours, theirs in zip(log_of(pair / "run", "train", "val"), log_of(tmp_path, "train", "val")):
        assert ours.keys() == theirs.keys() and ours.get("train/count") == theirs.get("train/count")
        for key in ("train/loss", "train/lm_loss", "train/q_halt_loss", "val/lm_loss", "val/exact_acc"):
            assert key not in ours or abs(ours[key] - theirs[key]) < 1e-5, (key, ours, theirs)


def test_torchrun_restarts_and_is_preempted(pair, tmp_path, boards):
    """A rank is killed at step 10: torchrun starts both again, they go on with what this job had begun. Then
    torchrun gets a SIGTERM: both finish the step, save and end. Resumed, it ends bit for bit as if nothing
    had happened."""
    argv, run_dir = flags(boards, "run", *LONGER, "--resume"), tmp_path / "run"
    code, text, seconds = under_torchrun(tmp_path, "disturb", *argv, launcher=["--max-restarts=1"])
    assert text.count("resumed from ") == 1 and "step_00000007.ckpt at step 7" in text, text
    assert code != 0 and seconds < 90, (code, seconds, text)
    assert "stopped by SIGTERM at step 16; go on with --resume run" in text, text
    assert last(run_dir)["step"] == 16 and "Traceback" not in text.partition("stopped by")[0]
    codes, text = run_ranks(tmp_path, ["--resume", str(run_dir), "--max-steps", "20"], 2)
    assert codes == [0, 0] and not same_run(pair / "run", run_dir), text
    assert [r["step"] for r in log_of(run_dir, "start")] == [0, 7, 16]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_no_thread_of_gloo_outlives_the_process_group(pair, rank):
    """One that is at work while Python ends would abort the process."""
    threads = (pair / f"threads{rank}").read_text().split()
    assert threads and not [name for name in threads if "gloo" in name]


@pytest.mark.slow
def test_an_error_of_all_ranks_is_one_line_under_torchrun(tmp_path, boards):
    """Whatever torchrun itself writes about it."""
    process = torchrun(*flags(boards, "run", "--eval-interval", "0"), cwd=tmp_path)
    text = process.communicate(timeout=120)[0]
    error = "error: argument --eval-interval: 0 is out of range; give 1 or more; see --help\n"
    assert process.returncode != 0 and text.count(error) == 1, text
    assert "train.py\", line" not in text and not list(tmp_path.rglob("*.ckpt")), text


@pytest.mark.parametrize("number, limit", [(signal.SIGKILL, 600), (signal.SIGSTOP, 3)])
def test_a_rank_that_dies_or_hangs_ends_the_other(tmp_path, boards, number, limit):
    """Killed: at once. Hanging: after --dist-timeout. One line says so, and what was saved stays."""
    started = time.time()
    argv = flags(boards, "run", "--checkpoint-interval", 3, "--dist-timeout", limit)
    ranks = Ranks(tmp_path, argv, 2, (("before update", 5), number), hooked=1)
    ranks.processes[0].join(40)
    codes, seconds = [p.exitcode for p in ranks.processes], time.time() - started
    ranks.wait(0)
    assert codes == [2, -signal.SIGKILL if number == signal.SIGKILL else None], ranks.text()
    error, = [line for line in ranks.text().splitlines() if line.startswith("error: ")]
    assert error.startswith("error: another rank died or hangs ("), error
    assert "Traceback" not in ranks.text(), ranks.text()
    assert seconds < 30 and last(tmp_path / "run")["step"] == 3
