"""Runs that are killed, preempted, moved, resumed on other ranks, or that find their files damaged."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ALONE, ROOT, altered, at, count_events, flags, go, last, log_of, run_folder, run_ranks
from runs import same_run, steps_of, unlike, without_curves, write_boards

import model
import train
from tools.common import UserError

LOGGED = [3, 4, 6, 8, 9, 12, 15, 16, 17]  # steps with a log line: every 4th, and those of a checkpoint


@pytest.fixture(scope="session")
def whole(tmp_path_factory, boards):
    """whole(dtype, ranks): (folder of an undisturbed run, number of events on its rank 0), run once."""
    done = {}

    def run(dtype="float32", ranks=1):
        if (dtype, ranks) not in done:
            tmp = tmp_path_factory.mktemp("whole")
            argv = flags(boards, tmp / "run", "--dtype", dtype, "--checkpoint-interval", 3, "--keep-last", 0)
            codes, text = run_ranks(tmp, argv, ranks, (None, True))
            assert codes == [0] * ranks, text
            done[dtype, ranks] = tmp / "run", int(next(tmp.glob("output*events0")).read_text())
        return done[dtype, ranks]

    return run


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    without_curves(monkeypatch)


# ---------------------------------------------------------------------------------------------
# Killed and preempted


def kill_and_resume(tmp_path, boards, whole, dtype, ranks, event, hooked=0):
    """Names of what differs from the undisturbed run, and where the run was when it died."""
    run_dir = tmp_path / f"killed-{dtype}-{ranks}-{event}"
    argv = flags(boards, run_dir, "--dtype", dtype, "--checkpoint-interval", 3, "--keep-last", 0)
    codes, text = run_ranks(tmp_path, argv, ranks, (event, signal.SIGKILL), hooked)
    assert -signal.SIGKILL in codes and 0 not in codes, text
    died = len(log_of(run_dir)), sorted(p.name for p in run_dir.glob("*.ckpt*"))
    resume = ["--resume", str(run_dir)] if run_folder.checkpoints(run_dir) else argv
    codes, text = run_ranks(tmp_path, resume, ranks)
    assert codes == [0] * ranks, text
    assert not list(run_dir.glob("step*.tmp")), f"left behind: {list(run_dir.glob('*.tmp'))}"
    best = [run_folder.load_file(d / "best.ckpt") for d in (run_dir, whole(dtype, ranks)[0])]
    return same_run(whole(dtype, ranks)[0], run_dir) + unlike(*best, "best"), died


EVENTS = [
    ("after update", 8, 1),
    ("after link_or_copy", 1, 1),
    ("before evaluate", 2, 1),
    ("after log_step", 5, 2),
]


@pytest.mark.parametrize("name, n, ranks", EVENTS)
def test_killed_and_resumed_is_bit_identical(tmp_path, boards, whole, name, n, ranks):
    different, died = kill_and_resume(tmp_path, boards, whole, "float32", ranks, (name, n), hooked=ranks - 1)
    assert not different, f"killed {name} {n} with {died}: {different}"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_anywhere_and_resumed_is_bit_identical(tmp_path, boards, whole, dtype, ranks):
    """20 different events over the four kinds: in a step, while saving, while evaluating, while logging."""
    n = whole(dtype, ranks)[1]
    for event in random.Random(f"{dtype}{ranks}").sample(range(n), 5):
        different, died = kill_and_resume(tmp_path, boards, whole, dtype, ranks, event)
        where = f"{dtype} x{ranks}: killed at event {event} of {n} with {died[0]} log lines and {died[1]}"
        print(f"{where}: {len(different)} differences")
        assert not different, f"{where}: {different}"


def test_killed_again_and_again(tmp_path, boards):
    """Also before it saved anything new, and while it evaluates: the resumed run makes up for it."""
    assert go(*flags(boards, tmp_path / "a")) == 0
    argv = flags(boards, tmp_path / "b")
    for event in (("after update", 10), ("after update", 1), ("before evaluate", 1)):
        assert run_ranks(tmp_path, argv, 1, (event, signal.SIGKILL))[0] == [-9]
        argv = ["--resume", str(tmp_path / "b")]
    assert go(*argv) == 0
    assert not same_run(tmp_path / "a", tmp_path / "b")


# signal, event, step at which the run stops
SIGNALS = [("INT", ("before update", 6), 6), ("HUP", ("after update", 7), 7)]
SIGNALS += [("USR1", ("before save_file", 3), 9), ("USR2", ("after update", 8), 8)]


@pytest.mark.parametrize("name, event, step", SIGNALS)
def test_a_signal_stops_a_run_after_its_step(tmp_path, boards, whole, monkeypatch, capsys, name, event, step):
    """Also between two checkpoints, while it saves and evaluates, and before a due evaluation."""
    run_dir, number = tmp_path / "run", signal.Signals[f"SIG{name}"]
    with monkeypatch.context() as patch:
        count_events(at(event, lambda: signal.raise_signal(number)), patch.setattr)
        assert go(*flags(boards, run_dir, "--checkpoint-interval", 3)) == 128 + number
    out = capsys.readouterr().out
    assert f"stopped by SIG{name} at step {step}; continue with --resume {run_dir}\n" in out, out
    assert last(run_dir)["step"] == step and go("--resume", run_dir) == 0
    assert not unlike(last(run_dir), last(whole()[0]))
    assert steps_of(run_dir, "val") == [8, 17]
    assert sorted({*LOGGED, step}) == steps_of(run_dir, "train")


def test_two_ranks_stop_for_the_signal_of_one(tmp_path, boards, whole):
    run_dir = tmp_path / "run"
    argv, event = flags(boards, run_dir, "--checkpoint-interval", 3), ("before update", 6)
    codes, text = run_ranks(tmp_path, argv, 2, (event, signal.SIGTERM), hooked=1)
    assert codes == [143, 143] and "stopped by SIGTERM at step 6;" in text, (codes, text)
    codes, text = run_ranks(tmp_path, ["--resume", run_dir], 2)
    assert codes == [0, 0] and not same_run(whole("float32", 2)[0], run_dir), text


def test_a_closed_stdout_does_not_end_a_run(tmp_path, boards):
    """`train.py | head -1`: the output is lost, the run is not."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, str(ROOT / "train.py"), *flags(boards, tmp_path / "run", "--max-steps", 9)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=environment, **pipes)
    first = process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0 and not err, err
    assert "parameters" in first and log_of(tmp_path / "run")[-1]["event"] == "result"


# ---------------------------------------------------------------------------------------------
# Other numbers of ranks, other micro-batches


def assert_close(a, b, places=1e-4):
    """Two checkpoints have equal puzzles in their rows, equal tables, and equal weights but for rounding."""
    assert a["step"] == b["step"] and a["samplers"] == b["samplers"]
    for name, x, y in zip(model.Carry._fields, a["carry"][0], b["carry"][0], strict=True):
        near = (x - y).abs().max() < places if x.is_floating_point() else torch.equal(x, y)
        assert near, f"carry.{name}: {unlike(x, y)}"
    for name, x in a["model"].items():
        assert (x - b["model"][name]).abs().max() < places, f"{name}: {unlike(x, b['model'][name])}"
    assert torch.equal(a["model"]["puzzle_emb"], b["model"]["puzzle_emb"])


def test_ranks_and_micro_batches_may_change(tmp_path, boards, whole):
    """One rank resumes two and back, with other --grad-accum: the rows of the carry are dealt out again, and
    the run is the same but for rounding."""
    run_dir = tmp_path / "run"
    argv = flags(boards, run_dir, "--checkpoint-interval", 3, "--keep-last", 0)
    for ranks, parts, steps in ((1, 2, 5), (2, 2, 9), (2, 4, 11), (1, 1, 99)):
        codes, text = run_ranks(tmp_path, [*argv, "--grad-accum", parts, "--max-steps", steps], ranks)
        assert codes == [0] * ranks, text
        argv = ["--resume", run_dir]
    for step in (9, 17):
        ours, theirs = (run_folder.load_file(d / f"step_{step:08}.ckpt") for d in (run_dir, whole()[0]))
        assert len(theirs["carry"][0][4].unique(dim=0)) == 8, "equal rows would hide a wrong order"
        assert_close(ours, theirs)
    ours, theirs = (log_of(d, "train") for d in (run_dir, whole()[0]))
    losses = {r["step"]: r["train/loss"] for r in theirs}
    assert len(ours) == len(theirs) + 2, "steps 5 and 11, where it was stopped, have a line, too"
    for r in ours:
        if r["step"] not in (5, 6, 11, 12):  # means over the same steps
            assert abs(r["train/loss"] - losses[r["step"]]) < 1e-5, (r, losses[r["step"]])


# ---------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def stopped(tmp_path, whole):
    """A copy of the undisturbed run as it was at step 12."""
    run_dir = tmp_path / "stopped"
    shutil.copytree(whole()[0], run_dir)
    for file in ("step_00000015.ckpt", "step_00000017.ckpt", "best.ckpt"):
        (run_dir / file).unlink()
    (run_dir / "latest.txt").write_text("step_00000012.ckpt\n")
    return run_dir


def test_a_damaged_checkpoint_is_one_line(stopped, whole):
    """It is never replaced silently; the one before can be passed by name."""
    altered(stopped / "step_00000012.ckpt")
    with pytest.raises(UserError, match="step_00000012.ckpt .*damaged") as e:
        go("--resume", stopped)
    assert "\n" not in str(e.value)
    shutil.copy(whole()[0] / "best.ckpt", stopped)  # of step 8
    assert go("--resume", stopped / "best.ckpt") == 0 and not same_run(whole()[0], stopped)


def test_what_is_no_checkpoint_is_refused(stopped, tmp_path):
    with pytest.raises(UserError, match="nothing.ckpt not found"):
        go("--resume", stopped / "nothing.ckpt")
    with pytest.raises(UserError, match="has no checkpoint"):
        go("--resume", tmp_path)
    torch.save({"model.inner.H_init": torch.zeros(3)}, tmp_path / "published")
    with pytest.raises(UserError, match="published holds no training state; --resume needs a checkpoint"):
        go("--resume", tmp_path / "published")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_can_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder.save_file(tmp_path / "a.ckpt", {"config": Evil()})
    with pytest.raises(UserError, match="a.ckpt cannot be read as a checkpoint"):
        run_folder.load_file(tmp_path / "a.ckpt")
    assert not (tmp_path / "evil").exists()


def test_an_altered_byte_changes_nothing_or_is_refused_and_so_is_every_length(tmp_path):
    """A small checkpoint with one bit flipped at 300 places (some are padding), and cut at 100."""
    path, bad, content = tmp_path / "a.ckpt", tmp_path / "bad.ckpt", {"a": {"b": 1}, "w": torch.randn(300)}
    run_folder.save_file(path, content)
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    for i in rng.sample(range(len(good)), 300):
        changed = bytearray(good)
        changed[i] ^= 1 << rng.randrange(8)
        bad.write_bytes(changed)
        try:
            assert not unlike(run_folder.load_file(bad), content), f"byte {i} altered, and it loads"
        except UserError as e:
            refused += str(e).startswith(f"{bad} ")
    assert refused > 100, refused
    for n in rng.sample(range(len(good)), 100):
        bad.write_bytes(good[:n])
        with pytest.raises(UserError, match="bad.ckpt"):
            run_folder.load_file(bad)


def test_disk_full(stopped, whole):
    """The limit on the size of a file stands for the disk: log lines fit, checkpoints do not."""
    before = {p.name: p.read_bytes() for p in stopped.glob("*.ckpt")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="^cannot write .*step_00000015.ckpt: File too large"):
            go("--resume", stopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {p.name: p.read_bytes() for p in stopped.glob("*.ckpt*")}
    assert after == before, "the older checkpoints as they were, no part of a new one"
    assert (stopped / "latest.txt").read_text() == "step_00000012.ckpt\n" and not list(stopped.glob("*.tmp"))
    assert go("--resume", stopped) == 0 and not same_run(whole()[0], stopped)


def test_two_runs_cannot_write_into_one_folder(tmp_path, boards, stopped):
    """Neither a second new one nor a second --resume; a lock that a killed run left is taken over."""
    new = tmp_path / "run"
    new.mkdir()
    for folder, argv in ((new, flags(boards, new)), (stopped, ["--resume", stopped])):
        log = run_folder.Log(folder, keep_until_step=99)
        before = (folder / "log.jsonl").read_bytes()
        with pytest.raises(
            UserError, match=f"{folder} is in use by pid {os.getpid()} on .*another --run-dir"
        ):
            go(*argv)
        assert (folder / "log.jsonl").read_bytes() == before
        log.close()
        (folder / "lock").write_text("pid 1 on a machine that is gone\n")
        assert go(*argv, "--max-steps", 13) == 0


@pytest.mark.parametrize("keep, kept", [(2, [17, 15]), (0, [17, 15, 12, 9, 8, 6, 3])])
def test_keep_last_and_best(tmp_path, boards, keep, kept):
    """0 keeps all. best.ckpt stays when the checkpoint it links to is deleted, and so do foreign files."""
    foreign = [tmp_path / "notes.tmp", tmp_path / "best.ckpt.tmp.mine", tmp_path / "sub.tmp" / "a.tmp"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "step_00000003.ckpt.tmp").write_text("left by a run that was killed while it saved")
    monitor = ["--monitor", "val/lm_loss", "--monitor-mode", "max"]
    assert go(*flags(boards, tmp_path, "--checkpoint-interval", 3, "--keep-last", keep, *monitor)) == 0
    assert [int(p.stem[5:]) for p in run_folder.checkpoints(tmp_path)] == kept
    values = [r["val/lm_loss"] for r in log_of(tmp_path, "val")]
    assert run_folder.load_file(tmp_path / "best.ckpt")["step"] == 8 and max(values) == values[0] > values[1]
    assert (tmp_path / "latest.txt").read_text() == "step_00000017.ckpt\n"
    assert all(path.read_text() == "mine" for path in foreign) and not list(tmp_path.glob("step*.tmp"))


def test_a_rollback_leaves_a_consistent_log_and_the_new_checkpoints(stopped, whole):
    """Resumed from an older file: later log lines go, --keep-last does not count the checkpoints after it."""
    with open(stopped / "log.jsonl", "a") as f:
        f.write('{"event": "train", "step": 99, "train/lo')  # torn by a crash
    assert go("--resume", stopped / "step_00000006.ckpt", "--max-steps", 9, "--keep-last", 1) == 0
    assert steps_of(stopped, "train") == LOGGED[:5] and steps_of(stopped, "val") == [8, 9]
    assert (stopped / "latest.txt").read_text() == "step_00000009.ckpt\n"
    assert sorted(p.name for p in stopped.glob("step*")) == ["step_00000009.ckpt", "step_00000012.ckpt"]
    assert [p.name for p in run_folder.checkpoints(stopped)] == ["step_00000009.ckpt"], "12 is a leftover"
    altered(stopped / "step_00000012.ckpt")  # nobody reads it
    assert go("--resume", stopped) == 0
    lines = [r for r in log_of(stopped, "train", "val") if (r["event"], r["step"]) != ("val", 9)]
    assert not unlike(lines, log_of(whole()[0], "train", "val"))


def test_a_finished_run_prints_its_result_again(tmp_path, whole, capsys):
    """The run folder may be spelled differently; whatever changes on resume is still accepted."""
    shutil.copytree(whole()[0], tmp_path / "run")
    before = (tmp_path / "run/log.jsonl").read_bytes()
    assert go("--run-dir", f"{tmp_path}/./run/", "--preset", "sudoku", "--resume") == 0
    out = capsys.readouterr().out
    assert out.startswith(log_of(tmp_path / "run")[-1]["line"] + "\n") and "is finished" in out, out
    assert (tmp_path / "run/log.jsonl").read_bytes() == before
    assert go("--resume", tmp_path / "run", "--epochs", 6) == 0 and last(tmp_path / "run")["step"] == 26


def test_a_checkpoint_of_3244f72_resumes(tmp_path):
    """Written before the rewrite: the state of step 5, and what the code of then made of it at step 17."""
    golden = torch.load(ROOT / "tests/golden/checkpoint_3244f72.pt", weights_only=True)
    start, end = golden["start"], golden["end"]
    data, run_dir = write_boards(tmp_path / "boards"), tmp_path / "run"
    run_folder.save_file(run_dir / "step_00000005.ckpt", start)
    assert go("--resume", run_dir, "--data", data) == 0
    ours = last(run_dir)
    assert ours["step"] == end["step"] == 17 and ours["samplers"] == {0: end["cursor"]}
    ours["carry"] = dict(zip(model.Carry._fields, ours["carry"][0], strict=True))
    end["carry"] = dict(zip(model.Carry._fields, end["carry"], strict=True))
    for part in ("model", "ema", "carry"):
        for name, x in ours[part].items():  # equal bits on the machine that wrote it
            y = end[part][name]
            assert x.dtype == y.dtype and (x.float() - y.float()).abs().max() < 1e-5, (name, unlike(x, y))


# ---------------------------------------------------------------------------------------------
# Settings


FIXED = "H-cycles 2 3,hidden-size 32 64,mixer mlp attn,loss stablemax softmax,dtype float32 bfloat16,seed 0 1"
FIXED += ",global-batch-size 8 16,eval-interval 2 1,preset sudoku mini,canvases None 4"


@pytest.mark.parametrize("change", FIXED.split(","))
def test_a_changed_setting_that_matters_is_refused_by_name(whole, change):
    name, old, new = change.split()
    words = f"^a run cannot change .*{name.replace('-', '.')}.* {old} .*{new}.*; start a new run$"
    with pytest.raises(UserError, match=words):
        go("--resume", whole()[0], f"--{name}", new)


EPOCHS = ([], ["--epochs", 2], ["--epochs", 3], ["--epochs", 5], ["--epochs", 6])
CHANGES = [epochs + more for epochs in EPOCHS for more in ([], ["--eval-interval", 1])]
CHANGES += [["--max-steps", 99], ["--epochs", 6, "--max-steps", 99]]


@pytest.mark.parametrize("epochs, stop_at", [(4, 99), (4, 8), (4, 5), (3, 99)])
def test_a_resumed_run_never_does_less_than_it_should(tmp_path, boards, epochs, stop_at):
    """With every combination of changes it ends as an uninterrupted run with these flags, or in one line."""
    base = [*flags(boards, "")[:-2], "--skip-sanity-checks", "--monitor", "none", "--keep-last", 1]
    first = tmp_path / "first"
    assert go(*base, "--run-dir", first, "--epochs", epochs, "--max-steps", stop_at) == 0
    wholes, refused = {}, []
    for more in CHANGES:
        run_dir = tmp_path / "-".join(map(str, ["run", *more]))
        shutil.copytree(first, run_dir)
        try:
            assert go("--resume", run_dir, *more) == 0
        except UserError as e:
            assert "\n" not in str(e) and "start a new run" in str(e), (more, e)
            refused.append(more)
            continue
        n_epochs = dict(zip(more[::2], more[1::2])).get("--epochs", epochs)
        if n_epochs not in wholes:
            wholes[n_epochs] = tmp_path / f"whole{n_epochs}"
            assert go(*base, "--run-dir", wholes[n_epochs], "--epochs", n_epochs) == 0
        different = unlike(last(wholes[n_epochs]), last(run_dir))
        assert not different, f"stopped at {stop_at}, resumed with {more}: {different[:5]}"
        assert log_of(run_dir)[-1]["finished"], more
    assert 5 <= len(refused) < len(CHANGES), refused


def test_other_data_is_refused_and_moved_data_is_not(tmp_path, stopped, boards, whole):
    for i, change in enumerate((dict(seed=1), dict(shift=1), dict(groups=21), dict(vocab_size=7))):
        other = write_boards(tmp_path / f"other{i}", **change)
        with pytest.raises(UserError, match=rf"^--data {other} is not the data of this run \({boards}\)"):
            go("--resume", stopped, "--data", other)
    shutil.copytree(boards, tmp_path / "moved")
    assert go("--resume", stopped, "--data", tmp_path / "moved") == 0
    different = [name.split("[")[0] for name in same_run(whole()[0], stopped)]
    assert different == ["/data", "/data_test"], different


def test_the_best_is_looked_up_in_the_log(stopped):
    """By another metric after a resume; the values of earlier evaluations count."""
    assert go("--resume", stopped, "--monitor", "val/lm_loss", "--monitor-mode", "max") == 0
    values = [r["val/lm_loss"] for r in log_of(stopped, "val")]
    assert values[0] > values[1] and not (stopped / "best.ckpt").exists(), values


def test_a_harmless_change_is_accepted_and_logged(stopped, capsys):
    more = ["--lr", 1e-3, "--epochs", 6, "--keep-last", 3, "--seed", 0, "--eval-limit", 9]
    assert go("--resume", stopped, *more) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed on resume")]
    changes = "--epochs 4 -> 6", "--lr 0.003 -> 0.001", "--keep-last 0 -> 3", "--eval-limit 4096 -> 9"
    assert notes == [f"changed on resume: {change}" for change in changes], notes
    assert last(stopped)["settings"]["lr"] == log_of(stopped, "train")[-1]["train/lr"] == 1e-3
    assert last(stopped)["step"] == 26


def test_where_a_run_is_found(tmp_path, boards, monkeypatch):
    """--resume alone, with --preset, with --run-dir, of a moved run; and a branch into another folder."""
    monkeypatch.chdir(tmp_path)
    base = flags(boards, "")[: -len(["--run-dir", ""])] + ["--hidden-size", 16, "--puzzle-emb-ndim", 16]
    with pytest.raises(
        UserError, match="--resume: no run with a checkpoint in runs/; pass a run folder or a"
    ):
        go("--resume")
    for name, preset in (("mini-1", "mini"), ("mini-maze-2", "mini-maze"), ("odd", "sudoku")):
        argv = [*base, "--preset", preset, "--mixer", "mlp", "--score-mod", "none", "--canvases", 4]
        argv = argv[:-2]  # --canvases is for ARC only
        assert go(*argv, "--run-dir", f"runs/{name}", "--resume", "--max-steps", 3) == 0, "starts a run"
    with pytest.raises(UserError, match="^--resume: no run of preset arc1 with a checkpoint in runs/"):
        go("--preset", "arc1", "--resume")
    assert go("--resume", "--max-steps", 4) == 0 and last("runs/odd")["step"] == 4, "the newest of all"
    assert go("--preset", "mini", "--resume", "--max-steps", 5) == 0, "the newest of a preset"
    assert last("runs/mini-1")["step"] == 5 and last("runs/mini-maze-2")["step"] == 3
    with pytest.raises(UserError, match="runs/odd already holds a run; use --resume runs/odd, or another"):
        go(*base, "--run-dir", "runs/odd")
    assert go(*base, "--run-dir", "runs/odd", "--resume", "--max-steps", 8) == 0, "resumes"
    assert len(log_of("runs/odd", "start")) == 3
    assert go("--resume", "runs/odd", "--run-dir", "runs/branch", "--max-steps", 9) == 0
    assert last("runs/branch")["step"] == 9 and last("runs/odd")["step"] == 8
    assert steps_of("runs/branch", "val") == [9], "the evaluation of step 8 belongs to the other run"
    with pytest.raises(UserError, match="runs/branch already holds a run"):
        go("--resume", "runs/odd", "--run-dir", "runs/branch")
    shutil.move("runs/branch", "moved")
    assert go("--resume", "moved", "--max-steps", 10) == 0
    assert last("moved")["step"] == 10 and steps_of("moved", "start") == [8, 9]
    assert not Path("runs/branch").exists()


def test_torchrun_restarts_need_a_folder_to_resume_from(boards, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(UserError, match="--max-restarts would start over after a failure; add --run-dir DIR"):
        train.settings(flags(boards, "x"), ALONE)
    argv = [*flags(boards, "x"), "--resume"]
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    assert train.settings(argv, ALONE)[1] is None
