"""A run that is killed, preempted, moved, resumed on another machine or finds its files damaged."""
import json
import os
import random
import resource
import signal
import shutil
from pathlib import Path

import pytest
import torch

import train
from data import UserError
from runs import Ranks, flags, last, log_of, run_ranks, same_run, steps_of, unlike, write_boards

KINDS = [("float32", 1), ("bfloat16", 1), ("float32", 2), ("bfloat16", 2)]


@pytest.fixture(scope="session")
def boards(tmp_path_factory):
    return write_boards(tmp_path_factory.mktemp("data") / "boards")


@pytest.fixture(scope="session")
def whole(tmp_path_factory, boards):
    """whole(dtype, ranks): (folder of a run that nothing disturbed, number of events on its rank 0), run once."""
    done = {}

    def run(dtype="float32", ranks=1):
        if (dtype, ranks) not in done:
            tmp = tmp_path_factory.mktemp("whole")
            codes, text = run_ranks(tmp, flags(boards, tmp / "run", "--dtype", dtype, "--checkpoint-interval", 3), ranks, (None, 1))
            assert codes == [0] * ranks, text
            done[dtype, ranks] = tmp / "run", int(next(tmp.glob("output*events0")).read_text())
        return done[dtype, ranks]
    return run


def go(*argv):
    """train.main in this process."""
    return train.main([str(a) for a in argv])


def kill_and_resume(tmp_path, boards, whole, dtype, ranks, event):
    """Names of what differs from the undisturbed run, and where the run was when it died."""
    run_dir = tmp_path / f"killed-{dtype}-{ranks}-{event}"
    argv = flags(boards, run_dir, "--dtype", dtype, "--checkpoint-interval", 3)
    codes, text = run_ranks(tmp_path, argv, ranks, (event, signal.SIGKILL), hooked=random.Random(str(event)).randrange(ranks))
    assert -signal.SIGKILL in codes and 0 not in codes, text
    died = len(log_of(run_dir)), sorted(p.name for p in run_dir.glob("*.ckpt*"))
    resume = ["--resume", str(run_dir)] if train.checkpoints(run_dir) else argv
    codes, text = run_ranks(tmp_path, resume, ranks)
    assert codes == [0] * ranks, text
    assert not list(run_dir.glob("*.tmp")), f"left behind: {list(run_dir.glob('*.tmp'))}"
    best = train.load_file(run_dir / "best.ckpt"), train.load_file(whole(dtype, ranks)[0] / "best.ckpt")
    return same_run(whole(dtype, ranks)[0], run_dir) + unlike(*best, "best"), died


@pytest.mark.parametrize("dtype, ranks, event", [
    ("float32", 1, ("after update", 8)), ("float32", 1, ("before replace", 7)), ("bfloat16", 1, ("after backward", 14)),
    ("bfloat16", 1, ("before evaluate", 2)), ("float32", 2, ("after train_metrics", 5)), ("bfloat16", 2, ("after mirror", 1))])
def test_killed_and_resumed_is_bit_identical(tmp_path, boards, whole, dtype, ranks, event):
    different, died = kill_and_resume(tmp_path, boards, whole, dtype, ranks, event)
    assert not different, f"killed {event} with {died}: {different}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype, ranks", KINDS)
def test_killed_anywhere_and_resumed_is_bit_identical(tmp_path, boards, whole, dtype, ranks):
    """20 different events over the four kinds: in a step, while saving, while evaluating, while logging."""
    n = whole(dtype, ranks)[1]
    for event in random.Random(f"{dtype}{ranks}").sample(range(n), 5):
        different, died = kill_and_resume(tmp_path, boards, whole, dtype, ranks, event)
        print(f"{dtype} x{ranks}: killed at event {event} of {n} with {died[0]} log lines and {died[1]}: {len(different)} differences")
        assert not different, f"killed at event {event} of {n} with {died}: {different}"


def test_killed_twice_and_with_compile(tmp_path, boards):
    """A resumed run that is killed again, before it saved anything."""
    argv = flags(boards, tmp_path / "a")
    assert go(*argv) == 0
    argv = flags(boards, tmp_path / "b")
    for event in (("after update", 10), ("after update", 1), ("before evaluate", 1)):
        assert run_ranks(tmp_path, argv, 1, (event, signal.SIGKILL))[0] == [-9]
        argv = ["--resume", str(tmp_path / "b")]
    assert go(*argv) == 0
    assert not same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("number, event, ranks", [
    (signal.SIGTERM, ("before backward", 6), 1), (signal.SIGINT, ("after update", 6), 1), (signal.SIGTERM, ("before backward", 6), 2),
    (signal.SIGTERM, ("after evaluate", 1), 1), (signal.SIGTERM, ("before save_file", 1), 1)])
def test_preempted_run_saves_and_goes_on(tmp_path, boards, whole, number, event, ranks):
    """Between two checkpoints and two log lines (step 6), or when all is saved and the evaluation would take long."""
    argv = flags(boards, tmp_path / "run", "--checkpoint-interval", 3)
    if event[0] == "after evaluate":    # while it evaluates, that is
        ranks = Ranks(tmp_path, argv, 1, (("before evaluate", 1), signal.SIGTERM))
    codes, text = run_ranks(tmp_path, argv, ranks, (event, number)) if isinstance(ranks, int) else (ranks.wait(), ranks.text())
    assert set(codes) == {128 + number}, text
    step = {"after evaluate": 8, "before save_file": 3}.get(event[0], 6)
    assert f"stopped by {number.name} at step {step}" in text and last(tmp_path / "run")["step"] == step, text
    assert go("--resume", tmp_path / "run") == 0
    if ranks != 2:
        assert not same_run(whole()[0], tmp_path / "run")
    assert steps_of(tmp_path / "run", "val") == [8, 17] and steps_of(tmp_path / "run", "train") == [4, 8, 12, 16, 17]
