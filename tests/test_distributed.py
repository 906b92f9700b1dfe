"""Two gloo ranks: the same as one process, under torchrun, and when one of them dies."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ROOT, Ranks, flags, last, log_of, run_ranks, same_run, steps_of, torchrun, without_curves
from runs import write_boards

import data
import train

# A training script that keeps what every rank was given and has at its end. With "disturb", rank 1 is killed
# at step 10 of its first start, and torchrun gets a SIGTERM at step 16 of the second.
SCRIPT = """
import atexit, contextlib, os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import torch
import runs, train
from tools import common
runs.without_curves()
deed, rank, first = sys.argv.pop(1), int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
forward_backward, loop, batches = train.forward_backward, train.train, []

def watched(run, batch, *canvas):
    batches.append(batch)
    forward_backward(run, batch, *canvas)
    if deed == "disturb" and (rank, run.step, first) == (1, 9, True):
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "disturb" and (rank, run.step, first) == (0, 15, False):
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)  # until torchrun passes it on, or the loop would end first

def names_of_threads():
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has just ended
            yield open(f"/proc/self/task/{{task}}/comm").read()

def threads():
    for _ in range(50):  # one that was joined is listed for a moment
        names = list(names_of_threads())
        if not any("gloo" in name for name in names):
            break
        time.sleep(0.1)
    open(f"threads{{rank}}", "w").writelines(names)

def kept(run, *others):
    import torch.distributed.nn  # as parts of torch do when they are needed
    result = loop(run, *others)
    torch.save((run.model.puzzle_emb, [list(batch) for batch in batches]), f"kept{{rank}}.pt")
    return result
train.forward_backward, train.train = watched, kept
if os.path.isdir("/proc/self/task"):
    atexit.register(threads)
common.cli(train.main)
"""
LONGER = "--epochs 6 --eval-interval 3 --max-steps 20 --log-interval 1 --checkpoint-interval 7".split()


def under_torchrun(tmp_path, deed, *argv, launcher=()):
    """(exit code, output) of two ranks that run SCRIPT in tmp_path."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    process = torchrun(deed, *argv, launcher=launcher, script=script, cwd=tmp_path)
    text = process.communicate(timeout=120)[0]
    return process.returncode, text


@pytest.fixture(scope="session")
def pair(tmp_path_factory, boards):
    """The folder of a run of 20 steps on two ranks that nothing disturbed."""
    tmp = tmp_path_factory.mktemp("pair")
    code, text = under_torchrun(tmp, "nothing", *flags(boards, "run", *LONGER))
    assert code == 0 and "FutureWarning" not in text, text  # of what torch will remove
    return tmp


def test_two_ranks_are_one_process(pair, tmp_path, boards, monkeypatch):
    """The same batches, losses to 1e-5 over 20 steps, the same puzzle table on both ranks."""
    batches, forward_backward = [], train.forward_backward

    def watched(run, batch, *canvas):
        batches.append(batch)
        forward_backward(run, batch, *canvas)

    without_curves(monkeypatch)
    monkeypatch.setattr(train, "forward_backward", watched)
    assert train.main([str(a) for a in flags(boards, tmp_path, *LONGER)]) == 0
    (table0, first), (table1, second) = (torch.load(pair / f"kept{rank}.pt") for rank in range(2))
    assert len(first) == len(second) == len(batches) == 21, "20 steps, and one before them"
    for number, (one, a, b) in enumerate(zip(batches[1:], first[1:], second[1:])):
        for name, whole, *halves in zip(one._fields, one, a, b):
            assert torch.equal(whole, torch.cat(halves)), f"{name} of step {number + 1}"
    assert torch.equal(table0, table1) and table0.any()
    assert torch.equal(table0, last(tmp_path)["model"]["puzzle_emb"])
    assert steps_of(pair / "run", "train") == steps_of(tmp_path, "train") == list(range(1, 21))
    for ours, theirs in zip(log_of(pair / "run", "train", "val"), log_of(tmp_path, "train", "val")):
        assert ours.keys() == theirs.keys() and ours.get("train/count") == theirs.get("train/count")
        for key in ("train/loss", "train/lm_loss", "train/q_halt_loss", "val/lm_loss", "val/exact_acc"):
            assert key not in ours or abs(ours[key] - theirs[key]) < 1e-5, (key, ours, theirs)


def test_torchrun_restarts_and_is_preempted(pair, tmp_path, boards):
    """A rank is killed at step 10: torchrun starts both again, and they resume what this job had begun. Then
    torchrun gets a SIGTERM: both finish the step, save and end. Resumed, the run ends bit for bit as if
    nothing had happened."""
    argv, run_dir = flags(boards, "run", *LONGER, "--resume"), tmp_path / "run"
    code, text = under_torchrun(tmp_path, "disturb", *argv, launcher=["--max-restarts=1"])
    assert text.count("resumed from ") == 1 and "step_00000007.ckpt at step 7" in text, text
    assert code != 0 and "stopped by SIGTERM at step 16; continue with --resume run" in text, (code, text)
    assert last(run_dir)["step"] == 16
    codes, text = run_ranks(tmp_path, ["--resume", str(run_dir), "--max-steps", "20"], 2)
    assert codes == [0, 0] and not same_run(pair / "run", run_dir), text
    assert [r["step"] for r in log_of(run_dir, "start")] == [0, 7, 16]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_no_thread_of_gloo_outlives_the_process_group(pair, rank):
    """One that is working while Python ends would abort the process."""
    threads = (pair / f"threads{rank}").read_text().split()
    assert threads and not [name for name in threads if "gloo" in name]


@pytest.mark.slow
def test_an_error_of_all_ranks_is_one_line_under_torchrun(tmp_path, boards):
    """Whatever torchrun itself prints about it."""
    process = torchrun(*flags(boards, "run", "--eval-interval", "0"), cwd=tmp_path)
    text = process.communicate(timeout=120)[0]
    error = "error: argument --eval-interval: 0 is out of range; it must be at least 1; see --help\n"
    assert process.returncode != 0 and text.count(error) == 1, text
    assert 'train.py", line' not in text and not list(tmp_path.rglob("*.ckpt")), text


def test_a_rank_that_dies_ends_the_other(tmp_path, boards):
    """What was saved stays."""
    argv = flags(boards, "run", "--checkpoint-interval", 3)
    ranks = Ranks(tmp_path, argv, 2, (("before update", 5), signal.SIGKILL), hooked=1)
    codes = ranks.wait(60)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), (codes, ranks.text())
    assert last(tmp_path / "run")["step"] == 3


def test_every_rank_checks_its_share(tmp_path):
    """Each row is read by exactly one of three ranks; of two, the second finds a bad token at the end."""
    folders = [write_boards(tmp_path / "d"), write_boards(tmp_path / "e", seed=1, shift=50)]
    split, read = data.Split(folders, "train"), []
    for source in split.sources:
        original = source.read

        def watched(rows, source=source, original=original):
            read.extend((source.folder, row) for row in range(rows.start, rows.stop))
            return original(rows)

        source.read = watched
    counts = [split.check(rank, 3) for rank in range(3)]
    expected = [(source.folder, row) for source in split.sources for row in range(len(source))]
    assert sorted(read) == sorted(expected), f"{len(read)} rows read of {len(expected)}"
    assert sum(counts) == 16 * len(split) and max(counts) < 0.4 * sum(counts), counts

    path = tmp_path / "d" / "train" / "all__inputs.npy"
    inputs = np.load(path)
    inputs[-1, -1] = 9
    np.save(path, inputs)
    ranks = Ranks(tmp_path, flags(tmp_path / "d", tmp_path / "run"), 2)
    codes = ranks.wait()
    assert codes[1] == 2 and " 9, but vocab_size is 6" in ranks.text(1), (codes, ranks.text(1))
    assert codes[0] not in (0, None) and "vocab_size" not in ranks.text(0), (codes, ranks.text(0))
