"""A run that is killed, preempted, moved, resumed on another machine or finds its files damaged."""
import os
import random
import resource
import signal
import shutil
from pathlib import Path

import pytest
import torch

import model
import rundir
import train
from common import UserError
from runs import ALONE, altered, flags, go, last, log_of, run_ranks, same_run, steps_of, unlike, \
    without_curves, write_boards

LOGGED = [3, 4, 6, 8, 9, 12, 15, 16, 17]    # steps with a log line: every 4th, and those of a checkpoint
KINDS = [("float32", 1), ("bfloat16", 1), ("float32", 2), ("bfloat16", 2)]


@pytest.fixture(scope="session")
def whole(tmp_path_factory, boards):
    """whole(dtype, ranks): (folder of an undisturbed run, number of events on its rank 0), run once."""
    done = {}

    def run(dtype="float32", ranks=1):
        if (dtype, ranks) not in done:
            tmp = tmp_path_factory.mktemp("whole")
            argv = flags(boards, tmp / "run", "--dtype", dtype, "--checkpoint-interval", 3, "--keep-last", 99)
            codes, text = run_ranks(tmp, argv, ranks, (None, 1))
            assert codes == [0] * ranks, text
            done[dtype, ranks] = tmp / "run", int(next(tmp.glob("output*events0")).read_text())
        return done[dtype, ranks]
    return run


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    without_curves(monkeypatch)


def kill_and_resume(tmp_path, boards, whole, dtype, ranks, event, hooked=0):
    """Names of what differs from the undisturbed run, and where the run was when it died."""
    run_dir = tmp_path / f"killed-{dtype}-{ranks}-{event}"
    argv = flags(boards, run_dir, "--dtype", dtype, "--checkpoint-interval", 3, "--keep-last", 99)
    codes, text = run_ranks(tmp_path, argv, ranks, (event, signal.SIGKILL), hooked)
    assert -signal.SIGKILL in codes and 0 not in codes, text
    died = len(log_of(run_dir)), sorted(p.name for p in run_dir.glob("*.ckpt*"))
    resume = ["--resume", str(run_dir)] if rundir.checkpoints(run_dir) else argv
    codes, text = run_ranks(tmp_path, resume, ranks)
    assert codes == [0] * ranks, text
    assert not list(run_dir.glob("*.tmp")), f"left behind: {list(run_dir.glob('*.tmp'))}"
    best = rundir.load_file(run_dir / "best.ckpt"), rundir.load_file(whole(dtype, ranks)[0] / "best.ckpt")
    return same_run(whole(dtype, ranks)[0], run_dir) + unlike(*best, "best"), died


@pytest.mark.parametrize("dtype, ranks, event", [
    ("float32", 1, ("after update", 8)), ("float32", 1, ("after mirror", 1)),
    ("bfloat16", 1, ("after backward", 14)), ("bfloat16", 1, ("before evaluate", 2)),
    ("float32", 2, ("after log_step", 5)), ("bfloat16", 2, ("before backward", 12))])
def test_killed_and_resumed_is_bit_identical(tmp_path, boards, whole, dtype, ranks, event):
    different, died = kill_and_resume(tmp_path, boards, whole, dtype, ranks, event, hooked=ranks - 1)
    assert not different, f"killed {event} with {died}: {different}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype, ranks", KINDS)
def test_killed_anywhere_and_resumed_is_bit_identical(tmp_path, boards, whole, dtype, ranks):
    """20 different events over the four kinds: in a step, while saving, while evaluating, while logging."""
    n = whole(dtype, ranks)[1]
    for event in random.Random(f"{dtype}{ranks}").sample(range(n), 5):
        different, died = kill_and_resume(tmp_path, boards, whole, dtype, ranks, event)
        told = f"{dtype} x{ranks}: killed at event {event} of {n} with {died[0]} log lines and {died[1]}"
        print(f"{told}: {len(different)} differences")
        assert not different, f"{told}: {different}"


def test_killed_again_and_again(tmp_path, boards):
    """Also before it saved anything new, and while it evaluates: what is still due is done after the resume.
    (A new run evaluates a row among its first checks, too.)"""
    argv = flags(boards, tmp_path / "a")
    assert go(*argv) == 0
    argv = flags(boards, tmp_path / "b")
    for event in (("after update", 10), ("after update", 1), ("before evaluate", 1)):
        assert run_ranks(tmp_path, argv, 1, (event, signal.SIGKILL))[0] == [-9]
        argv = ["--resume", str(tmp_path / "b")]
    assert go(*argv) == 0
    assert not same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("number, event, ranks, step", [
    (signal.SIGTERM, ("before backward", 6), 1, 6), (signal.SIGINT, ("after update", 6), 1, 6),
    (signal.SIGTERM, ("before backward", 6), 2, 6), (signal.SIGTERM, ("before evaluate", 1), 1, 8),
    (signal.SIGINT, ("before save_file", 3), 1, 8)])
def test_preempted_run_saves_and_goes_on(tmp_path, boards, whole, number, event, ranks, step):
    """Between two checkpoints and log lines (step 6), while it evaluates, and while it saves just before."""
    run_dir = tmp_path / "run"
    argv = flags(boards, run_dir, "--checkpoint-interval", 3)
    codes, text = run_ranks(tmp_path, argv, ranks, (event, number))
    assert codes == [128 + number] * ranks, text
    assert f"stopped by {number.name} at step {step}" in text and last(run_dir)["step"] == step, text
    codes, text = run_ranks(tmp_path, ["--resume", str(run_dir)], ranks)
    assert codes == [0] * ranks and not same_run(whole("float32", ranks)[0], run_dir), text
    assert steps_of(run_dir, "val") == [8, 17] and steps_of(run_dir, "train") == LOGGED


def test_one_rank_resumes_two_and_back(tmp_path, boards, whole):
    """The carry is dealt again by slots of the global batch: the run of one rank, but for rounding."""
    run_dir = tmp_path / "run"
    argv = flags(boards, run_dir, "--checkpoint-interval", 3)
    for ranks, steps in ((1, 5), (2, 11), (1, 99)):
        codes, text = run_ranks(tmp_path, [*argv, "--max-steps", str(steps)], ranks)
        assert codes == [0] * ranks, text
        argv = ["--resume", str(run_dir)]
    assert_close(last(run_dir), last(whole()[0]))
    kept = [log_of(d, "train") for d in (run_dir, whole()[0])]
    assert len(kept[0]) == len(kept[1]) + 2, "steps 5 and 11, where it was stopped, have a line, too"
    theirs = {r["step"]: r["train/loss"] for r in kept[1]}
    for ours in kept[0]:
        if ours["step"] not in (5, 6, 11, 12):      # means over the same steps
            assert abs(ours["train/loss"] - theirs[ours["step"]]) < 1e-5, (ours, theirs)


def assert_close(a, b, places=1e-4):
    """Two checkpoints of a step: equal rows in slots, equal tables, weights and states but for rounding."""
    assert a["step"] == b["step"] and a["cursor"] == b["cursor"]
    for name, x, y in zip(model.Carry._fields, a["carry"], b["carry"]):
        near = (x - y).abs().max() < places if x.is_floating_point() else torch.equal(x, y)
        assert near, f"carry.{name}: {unlike(x, y)}"
    for name, x in a["model"].items():
        assert (x - b["model"][name]).abs().max() < places, f"{name}: {unlike(x, b['model'][name])}"
    assert torch.equal(a["model"]["puzzle_emb"], b["model"]["puzzle_emb"])


@pytest.mark.parametrize("ranks, parts, then_ranks, then_parts", [(2, 2, 1, 2), (2, 4, 2, 1)])
def test_carry_is_in_global_slot_order(tmp_path, boards, whole, ranks, parts, then_ranks, then_parts):
    """With any number of ranks and of parts, before and after a resume: --grad-accum may change, too."""
    run_dir = tmp_path / "run"
    codes, text = run_ranks(tmp_path, flags(boards, run_dir, "--grad-accum", parts, "--max-steps", 9), ranks)
    assert codes == [0] * ranks, text
    saved = rundir.load_file(whole()[0] / "step_00000009.ckpt")
    assert len(saved["carry"][4].unique(dim=0)) == 8, "the slots must differ for this test to mean anything"
    assert_close(last(run_dir), saved)
    codes, text = run_ranks(tmp_path, ["--resume", str(run_dir), "--grad-accum", str(then_parts)], then_ranks)
    assert codes == [0] * then_ranks, text
    assert_close(last(run_dir), last(whole()[0]))


# ---------------------------------------------------------------------------------------------
# Files

@pytest.fixture
def stopped(tmp_path, boards, whole):
    """A copy of the undisturbed run with what it had at step 12."""
    run_dir = tmp_path / "stopped"
    shutil.copytree(whole()[0], run_dir)
    for file in ("step_00000015.ckpt", "step_00000017.ckpt", "best.ckpt"):
        (run_dir / file).unlink()
    (run_dir / "latest.txt").write_text("step_00000012.ckpt\n")
    return run_dir


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [altered, truncated, emptied, Path.unlink])
def test_damaged_newest_is_named_and_the_one_before_is_used(stopped, whole, damage, capsys):
    damage(stopped / "step_00000012.ckpt")
    assert go("--resume", stopped) == 0
    out = capsys.readouterr().out
    assert "at step 9" in out and ("step_00000012.ckpt" in out) == (damage is not Path.unlink), out
    assert not same_run(whole()[0], stopped)


def test_no_good_checkpoint_is_refused_by_name(stopped, tmp_path):
    for path in rundir.checkpoints(stopped):
        altered(path)
    with pytest.raises(UserError, match="step_00000012.ckpt is damaged.*step_00000003.ckpt is damaged"):
        go("--resume", stopped)
    with pytest.raises(UserError, match="step_00000009.ckpt is damaged"):
        go("--resume", stopped / "step_00000009.ckpt")
    with pytest.raises(UserError, match="nothing.ckpt not found"):
        go("--resume", stopped / "nothing.ckpt")
    with pytest.raises(UserError, match="holds no checkpoint"):
        go("--resume", tmp_path)
    torch.save({"model.inner.H_init": torch.zeros(3)}, tmp_path / "published")
    with pytest.raises(UserError, match="holds weights, but no state of training"):
        go("--resume", tmp_path / "published")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_can_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rundir.save_file(tmp_path / "a.ckpt", {"config": Evil()})
    with pytest.raises(UserError, match="a.ckpt cannot be read as a checkpoint"):
        rundir.load_file(tmp_path / "a.ckpt")
    assert not (tmp_path / "evil").exists()


def test_an_altered_byte_changes_nothing_or_is_refused_and_so_is_every_length(tmp_path):
    """A small checkpoint, a bit turned at 300 places (some only pad) and cut at 100."""
    path, bad, content = tmp_path / "a.ckpt", tmp_path / "bad.ckpt", {"a": {"b": 1}, "w": torch.randn(300)}
    rundir.save_file(path, content)
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    assert not unlike(torch.load(path, weights_only=True), content), "plain torch.load reads it"
    for i in rng.sample(range(len(good)), 300):
        bad.write_bytes(good[:i] + bytes([good[i] ^ 1 << rng.randrange(8)]) + good[i + 1:])
        try:
            assert not unlike(rundir.load_file(bad), content), f"byte {i} altered, and it loads"
        except UserError as e:
            refused += str(e).startswith(f"{bad} ")
    assert refused > 100, refused
    for n in rng.sample(range(len(good)), 100):
        bad.write_bytes(good[:n])
        with pytest.raises(UserError, match="bad.ckpt"):
            rundir.load_file(bad)


def test_disk_full(stopped, whole):
    """This process's limit on the size of a file stands for the disk; no checkpoint fits, log lines do."""
    before = {p.name: p.read_bytes() for p in stopped.glob("*.ckpt")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        told = f"no checkpoint at step 15: .*File too large.*make room and --resume {stopped}"
        with pytest.raises(UserError, match=told):
            go("--resume", stopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {p.name: p.read_bytes() for p in stopped.glob("*.ckpt*")}
    assert after == before, "the older checkpoints as they were, no rest of a new one"
    assert (stopped / "latest.txt").read_text() == "step_00000012.ckpt\n" and not list(stopped.glob("*.tmp"))
    assert go("--resume", stopped) == 0 and not same_run(whole()[0], stopped)


def test_a_full_disk_that_takes_half_a_log_line_ends_the_run(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError), rundir.Log(tmp_path) as log:
            for step in range(3):
                log.write("train", step, loss=0.123)    # 46 bytes
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [r["step"] for r in log_of(tmp_path)] == [0, 1], "the torn line is no record"


def test_disk_space_is_looked_at_before_the_run(tmp_path, boards, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    for free, warned in ((1000, True), (10 ** 9, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        go(*flags(boards, tmp_path / f"{free}", "--max-steps", 1))
        assert ("less than three checkpoints of" in capsys.readouterr().out) == warned, free


def test_two_runs_cannot_write_into_one_folder(tmp_path, boards, stopped):
    """Neither a second new one nor a second --resume; a lock that a killed run left is taken over."""
    new = tmp_path / "run"
    for folder, argv in ((new, flags(boards, new)), (stopped, ["--resume", stopped])):
        told = f"{folder} is being written by pid {os.getpid()} on .*another --run-dir"
        with rundir.Log(folder, keep_to=99):
            log = (folder / "log.jsonl").read_bytes()
            with pytest.raises(UserError, match=told):
                go(*argv)
            codes, text = run_ranks(tmp_path, [str(a) for a in argv])
            assert codes == [2] and "is being written by pid" in text, text
            assert (folder / "log.jsonl").read_bytes() == log
        (folder / "lock").write_text("pid 1 on a machine that is gone\n")
        assert go(*argv, "--max-steps", 13) == 0


def test_keep_last_and_best(tmp_path, boards):
    """best.ckpt stays what it was when the checkpoint that it mirrors is dropped."""
    monitor = ["--monitor", "val/lm_loss", "--monitor-mode", "max"]
    argv = flags(boards, tmp_path, "--checkpoint-interval", 3, "--keep-last", 2, *monitor)
    assert go(*argv) == 0
    assert [p.name for p in rundir.checkpoints(tmp_path)] == ["step_00000017.ckpt", "step_00000015.ckpt"]
    values = [r["val/lm_loss"] for r in log_of(tmp_path, "val")]
    assert rundir.load_file(tmp_path / "best.ckpt")["step"] == 8 and max(values) == values[0] > values[1]
    assert (tmp_path / "latest.txt").read_text() == "step_00000017.ckpt\n"


def test_going_back_leaves_a_consistent_log_and_the_new_checkpoints(stopped, whole, capsys):
    """Resumed from an older file: later lines go, --keep-last does not take the old future for the newest."""
    with open(stopped / "log.jsonl", "a") as f:
        f.write('{"event": "train", "step": 99, "train/lo')     # torn by a crash
    assert go("--resume", stopped / "step_00000006.ckpt", "--max-steps", 9, "--keep-last", 1) == 0
    assert steps_of(stopped, "train") == LOGGED[:5] and steps_of(stopped, "val") == [8, 9]
    assert (stopped / "latest.txt").read_text() == "step_00000009.ckpt\n"
    assert sorted(p.name for p in stopped.glob("step*")) == ["step_00000009.ckpt", "step_00000012.ckpt"]
    assert [p.name for p in rundir.checkpoints(stopped)] == ["step_00000009.ckpt"], "12: an old future"
    altered(stopped / "step_00000012.ckpt")     # of the old future: nobody asks for it
    assert go("--resume", stopped) == 0
    assert "resumed from" in capsys.readouterr().out
    lines = [r for r in log_of(stopped, "train", "val") if (r["event"], r["step"]) != ("val", 9)]
    assert not unlike(lines, log_of(whole()[0], "train", "val"))


def test_best_checkpoint_resumes(tmp_path, whole):
    shutil.copytree(whole()[0], tmp_path / "run")
    assert rundir.load_file(tmp_path / "run/best.ckpt")["step"] == 8
    assert go("--resume", tmp_path / "run/best.ckpt") == 0
    assert not same_run(whole()[0], tmp_path / "run")


def test_finished_run_says_its_result_again(tmp_path, whole, capsys):
    """Without a word more, and whatever changes on resume is still taken."""
    shutil.copytree(whole()[0], tmp_path / "run")
    before = (tmp_path / "run/log.jsonl").read_bytes()
    assert go("--run-dir", tmp_path / "run", "--preset", "sudoku", "--resume") == 0
    out = capsys.readouterr().out
    assert out.startswith(log_of(tmp_path / "run")[-1]["line"] + "\n") and "is finished" in out, out
    assert (tmp_path / "run/log.jsonl").read_bytes() == before
    assert go("--resume", tmp_path / "run", "--epochs", 6) == 0 and last(tmp_path / "run")["step"] == 26


def test_without_carry_rows_are_fresh(stopped, capsys):
    content = rundir.load_file(stopped / "step_00000012.ckpt")
    rundir.save_file(stopped / "step_00000012.ckpt", {**content, "carry": None})
    assert go("--resume", stopped) == 0
    assert "it holds no carry: every row begins a new puzzle" in capsys.readouterr().out
    assert last(stopped)["step"] == 17


# ---------------------------------------------------------------------------------------------
# Settings

@pytest.mark.parametrize("flag, value, old", [
    ("--H-cycles", 3, 2), ("--L-cycles", 2, 1), ("--hidden-size", 64, 32), ("--mixer", "attn", "mlp"),
    ("--loss", "softmax", "stablemax"), ("--halt-max-steps", 8, 4), ("--dtype", "bfloat16", "float32"),
    ("--global-batch-size", 16, 8), ("--seed", 1, 0),
    ("--eval-interval", 1, 2), ("--preset", "mini", "sudoku")])
def test_a_changed_setting_that_matters_is_refused_by_name(whole, flag, value, old):
    told = f"^{flag} {value} differs from the run's {old}; a run cannot change it"
    with pytest.raises(UserError, match=told):
        go("--resume", whole()[0], flag, value)


def test_other_data_is_refused_and_moved_data_is_not(tmp_path, stopped, boards, whole, capsys):
    for i, change in enumerate((dict(seed=1), dict(shift=1), dict(groups=21), dict(vocab_size=7))):
        other = write_boards(tmp_path / f"other{i}", **change)
        told = f"^--data {other} holds other puzzles than the run .*its data .{boards}"
        with pytest.raises(UserError, match=told):
            go("--resume", stopped, "--data", other)
    shutil.copytree(boards, tmp_path / "moved")
    assert go("--resume", stopped, "--data", tmp_path / "moved") == 0
    assert [name.split("[")[0] for name in same_run(whole()[0], stopped)] == ["/data", "/data_test"]


def test_the_best_is_looked_up_in_the_log(stopped):
    """By another metric after a resume; the values of the evaluations before count."""
    assert go("--resume", stopped, "--monitor", "val/lm_loss", "--monitor-mode", "min") == 0
    best = min(log_of(stopped, "val"), key=lambda r: r["val/lm_loss"])
    if best["step"] > 12:
        assert rundir.load_file(stopped / "best.ckpt")["step"] == best["step"]
    else:       # that file was gone before the resume, and nothing after it was better
        assert not (stopped / "best.ckpt").exists()


def test_a_harmless_change_is_taken_and_logged(stopped, capsys):
    assert go("--resume", stopped, "--lr", 1e-3, "--epochs", 6, "--keep-last", 3, "--seed", 0) == 0
    notes = log_of(stopped, "start")[-1]["notes"]
    changes = "epochs 4 -> 6", "lr 0.003 -> 0.001", "keep_last 99 -> 3"
    assert notes == [f"changed on resume: {c}" for c in changes]
    out = capsys.readouterr().out
    assert all(note in out for note in notes), out
    assert last(stopped)["settings"]["lr"] == log_of(stopped, "train")[-1]["train/lr"] == 1e-3
    assert last(stopped)["step"] == 26


def test_where_a_run_is_found(tmp_path, boards, monkeypatch, capsys):
    """--resume alone, with --run-dir, a moved run, a branch; and a folder that holds a run already."""
    monkeypatch.chdir(tmp_path)
    told = "--resume: no run with a checkpoint in runs/sudoku-.*; name a run folder"
    with pytest.raises(UserError, match=told):
        go("--preset", "sudoku", "--resume")
    base = [f for f in flags(boards, "") if f not in ("--run-dir", "")]
    for name in ("first", "second"):
        assert go(*base, "--run-dir", f"runs/sudoku-{name}", "--resume", "--max-steps", 3) == 0, "begins"
    told = "runs/sudoku-second holds the checkpoints of a run; go on with --resume runs"
    with pytest.raises(UserError, match=told):
        go(*base, "--run-dir", "runs/sudoku-second")
    assert go("--preset", "sudoku", "--resume", "--max-steps", 5) == 0
    assert last("runs/sudoku-second")["step"] == 5 and last("runs/sudoku-first")["step"] == 3
    assert len(log_of("runs/sudoku-second", "start")) == 2
    assert go(*base, "--run-dir", "runs/sudoku-second", "--resume", "--max-steps", 6) == 0, "goes on"
    assert last("runs/sudoku-second")["step"] == 6
    assert go("--resume", "runs/sudoku-first", "--run-dir", "runs/branch", "--max-steps", 5) == 0
    assert last("runs/branch")["step"] == 5 and last("runs/sudoku-first")["step"] == 3
    assert len(log_of("runs/sudoku-first", "start")) == 1
    assert go("--resume", "runs/sudoku-second", "--max-steps", 8) == 0, "which ends an iteration"
    assert go("--resume", "runs/sudoku-second", "--run-dir", "runs/late", "--max-steps", 9) == 0
    assert last("runs/late")["step"] == 9 and steps_of("runs/late", "val") == [9]
    shutil.move("runs/branch", "moved")
    assert go("--resume", "moved", "--max-steps", 6) == 0
    assert last("moved")["step"] == 6 and steps_of("moved", "start") == [3, 5]
    assert not Path("runs/branch").exists()


def test_torchrun_restarts_need_a_folder_to_go_on_with(boards, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    told = "--max-restarts would begin anew after a failure: add --run-dir DIR --resume"
    with pytest.raises(UserError, match=told):
        train.settings(flags(boards, "x"), ALONE)
    assert train.settings([*flags(boards, "x"), "--resume"], ALONE)[1] is None
