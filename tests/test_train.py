"""The training loop: what it refuses, what it writes, and its flags. test_resume.py resumes runs."""

import math
import re
import sys
import time
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from runs import ALONE, Ranks, arc_dir, flags, go, last, log_of, run_folder, run_ranks, same_run, steps_of
from runs import boards as draw_boards
from runs import unlike, without_curves, write_boards

import eval as scoring
import model
import prepare
import train
from tools import common, draw
from tools.common import UserError


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    without_curves(monkeypatch)


@pytest.fixture(scope="session")
def plain(tmp_path_factory, boards):
    """The folder of an ordinary run of 17 steps."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_curves(patch)
        assert go(*flags(boards, run_dir, "--log-interval", 1)) == 0
    return run_dir


# ---------------------------------------------------------------------------------------------
# Flags


def test_help_fits_80_columns(capsys):
    """Every flag has a phrase of help, and none of the words that a reader would stumble over."""
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    widest = max(text.splitlines(), key=len)
    assert len(widest) <= 80, f"{len(widest)} columns: {widest}"
    for action in train.flags()._actions:
        assert action.help and not action.help.endswith("."), f"{action.option_strings}: {action.help}"
    odd = re.findall(r"\b(?:told|held|asked|likewise|mend|goes on|lies|stands|says)\b", text)
    assert not odd, odd


def test_one_line_and_exit_code_2(tmp_path, boards):
    """All ranks fail without a traceback. Rank 1 waits before it prints, so that torchrun, which ends it when
    rank 0 has ended, prints the line once."""
    ranks = Ranks(tmp_path, flags(boards, tmp_path / "run", "--global-batch-size", 9), 2)
    ranks.processes[0].join(60)
    line = "error: --global-batch-size must be a multiple of 2 (ranks x micro-batches); use 8\n"
    assert ranks.text(0) == line
    assert not ranks.text(1) and ranks.wait() == [2, 2] and ranks.text(1) == line


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--presset", "mini"], "unrecognized arguments: --presset mini; see --help"),
        (["--preset", "arc3"], "argument --preset: invalid choice: 'arc3'"),
        (
            ["--grad-accum", "3"],
            "--global-batch-size must be a multiple of 3 (ranks x micro-batches); use 6",
        ),
        (["--keep-last", "-1"], "argument --keep-last: -1 is out of range"),
        (["--ema", "2"], "argument --ema: 2 is out of range; it must be between 0 and 0.999999"),
        (["--mixer", "attn", "--num-heads", "3"], "--hidden-size 32 is not a multiple of 2 x --num-heads 3"),
        (["--puzzle-emb-len", "0"], "--puzzle-emb-ndim 32 exceeds the prefix of 0 numbers"),
        (
            ["--global-batch-size", "800"],
            "--epochs 4 and --eval-interval 2 do not fill one batch of --global",
        ),
        (["--eval-interval", "1", "--global-batch-size", "64"], "--epochs 4 and --eval-interval 1 do not"),
        (["--score-mod", "grid"], "--score-mod grid needs --mixer attn and square grids"),
        (["--canvases", "4"], "--canvases needs --mixer attn and"),
        (["--canvases", "4", "--mixer", "attn"], "--canvases works for ARC only"),
        (["--seq-len", "9"], "--seq-len 9 is for latent episodes"),
        (["--device", "mps"], "--device mps is not available on this machine; use --device auto"),
        (["--monitor", "val/accuracy"], "--monitor val/accuracy is not measured; choose val/exact_acc, "),
        (["--data", "nowhere/sudoku"], "nowhere/sudoku not found; pass another folder, or build one"),
        (
            ["--data", "nowhere/arc1concept-aug-1000", "--allow-cpu"],
            "nowhere/arc1concept-aug-1000 not found; ",
        ),
        (["--init", "nothing.ckpt"], "nothing.ckpt not found"),
    ],
)
def test_refused(tmp_path, boards, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        go(*flags(boards, tmp_path / "run"), *argv)
    assert str(e.value).startswith(message) and "\n" not in str(e.value), e.value
    assert not list(tmp_path.rglob("*.ckpt*"))


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_trains_a_step(tmp_path, boards, capsys, preset):
    """With its own mixer, loss, schedule and canvases; only the sizes are small."""
    small = dict(hidden_size=32, num_heads=1, num_layers=1, puzzle_emb_len=1, puzzle_emb_ndim=32, L_cycles=1)
    small |= dict(H_cycles=1, halt_max_steps=2, dtype="float32", epochs=4, eval_interval=4, eval_limit=1)
    small |= dict(global_batch_size=2, max_minutes=0.0)
    argv = ["--preset", preset, "--run-dir", tmp_path / "run", "--no-compile", "--device", "cpu"]
    for name, value in small.items():
        argv += ["--" + name.replace("_", "-"), value]
    data = str(arc_dir(tmp_path) if "arc" in preset else boards)
    assert go(*argv, "--data", data, "--data-test", data) == 0
    settings = log_of(tmp_path / "run", "start")[0]["settings"]
    for name, value in {**train.PRESETS[preset], **small, "data": [data], "data_test": [data]}.items():
        assert settings[name] == value, f"{name} is {settings[name]}, not {value}"
    (line,) = log_of(tmp_path / "run", "train")
    assert math.isfinite(line["train/loss"]), line
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"RESULT preset={preset} ")


def test_every_large_preset_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "matmul_flops", lambda *args, **kwargs: 1e12)
    for preset in train.PRESETS:
        folder = train.PRESETS[preset]["data"][0]
        assert prepare.known_dataset(folder), f"{preset}: nobody knows how to build {folder}"
        if preset in ("mini", "mini-maze", "mini-arc", "sudoku-9x9"):
            continue
        with pytest.raises(UserError, match=f"^no GPU: {preset} takes [0-9,]+ days or more on this CPU; use"):
            go("--preset", preset)
    assert not list(tmp_path.iterdir())


def test_a_new_field_of_config_is_a_flag_that_older_checkpoints_lack(tmp_path, boards, monkeypatch):
    """An older run resumes with the field's default; code without the field names it and stops."""
    run_dir = tmp_path / "run"
    assert go(*flags(boards, run_dir, "--max-steps", 3)) == 0

    @dataclass
    class Config(model.Config):
        twist: float = model.option(1.0, "twist of a researcher", type=common.bounded(float, 0))

    monkeypatch.setattr(train, "Config", Config)
    monkeypatch.setattr(model, "Config", Config)
    assert train.settings(flags(boards, "x", "--twist", 2), ALONE)[0].twist == 2
    assert go("--resume", run_dir, "--max-steps", 5) == 0 and last(run_dir)["config"]["twist"] == 1
    with pytest.raises(UserError, match="a run cannot change twist from 1.0 to 3.0; start"):
        go("--resume", run_dir, "--twist", 3)
    monkeypatch.undo()
    without_curves(monkeypatch)
    with pytest.raises(UserError, match="the checkpoint has the unknown setting twist"):
        go("--resume", run_dir)


# ---------------------------------------------------------------------------------------------
# What ends a run


def test_an_infinite_weight_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, boards):
    """The weights overflow at step 6, whose loss is still finite; every step would save a checkpoint."""
    argv = flags(boards, tmp_path, "--checkpoint-interval", 1, "--log-interval", 1)
    assert go(*argv, "--max-steps", 5) == 0
    with pytest.raises(UserError, match="became NaN or infinite after step 5; .* --resume it with a lower"):
        go("--resume", tmp_path, "--lr", 1e38)
    good = last(tmp_path)
    for name, tensor in good["model"].items():
        assert good["step"] == 5 and tensor.isfinite().all(), f"{name} of step {good['step']}"
    assert go("--resume", tmp_path, "--lr", 1e-3) == 0 and last(tmp_path)["step"] == 17
    assert all(math.isfinite(r["train/loss"]) for r in log_of(tmp_path, "train"))


def test_a_nan_between_log_lines_is_found_before_a_checkpoint(tmp_path, boards, monkeypatch):
    """A single gradient is NaN at step 6; step 8 logs and saves."""
    forward_backward = train.forward_backward

    def poisoned(run, *batch):
        forward_backward(run, *batch)
        if run.step + 1 == 6:
            run.grad[3] = math.nan

    monkeypatch.setattr(train, "forward_backward", poisoned)
    with pytest.raises(UserError, match="NaN or infinite after step 4;"):
        go(*flags(boards, tmp_path))
    assert not run_folder.checkpoints(tmp_path)


def out_of_memory_above(rows, set_attribute=setattr, from_step=0):
    """Let TRM.step fail for batches of more rows, from a training step on."""
    step, update, updates = model.TRM.step, train.update, []

    def failing(self, carry, batch, *args):
        if len(batch.inputs) > rows and len(updates) >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(self, carry, batch, *args)

    def counted(*args):
        update(*args)
        updates.append(1)

    set_attribute(model.TRM, "step", failing)
    set_attribute(train, "update", counted)


def out_of_memory_above_3():
    out_of_memory_above(3)


def test_out_of_memory_splits_batches(tmp_path, boards, capsys, monkeypatch):
    """8 rows fail, then 4; the run continues with 2 at a time as if --grad-accum 4 had been passed."""
    assert go(*flags(boards, tmp_path / "split", "--grad-accum", 4)) == 0
    capsys.readouterr()
    out_of_memory_above(3, monkeypatch.setattr)
    assert go(*flags(boards, tmp_path / "oom")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("out of memory")]
    expected = ["2 (4 rows at a time)", "4 (2 rows at a time)"]
    assert lines == [f"out of memory: continuing with --grad-accum {words}" for words in expected]
    assert not same_run(tmp_path / "split", tmp_path / "oom")
    assert last(tmp_path / "oom")["settings"]["grad_accum"] == 4, "a resumed run begins with what fits"


def test_out_of_memory_on_one_of_two_ranks(tmp_path, boards):
    """Both ranks split their batches, or their collectives would not match."""
    argv = flags(boards, tmp_path / "run", "--max-steps", 2)
    ranks = Ranks(tmp_path, argv, 2, (None, out_of_memory_above_3), hooked=1)
    assert ranks.wait() == [0, 0], ranks.text(0) + ranks.text(1)
    assert ranks.text().count("continuing with --grad-accum 2 (2 rows at a time)\n") == 1, ranks.text()


@pytest.mark.parametrize(
    "rows, from_step, message",
    [
        (0, 0, "out of memory with one row per micro-batch; lower --global-batch-size or"),
        (3, 2, "out of GPU memory; use train.py --grad-accum N or"),
    ],
)
def test_out_of_memory_is_one_line(tmp_path, boards, capsys, monkeypatch, rows, from_step, message):
    """If not even one row fits, and if it happens later."""
    out_of_memory_above(rows, monkeypatch.setattr, from_step)
    with pytest.raises(SystemExit) as stop:
        common.cli(lambda: go(*flags(boards, tmp_path)))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1, err


# ---------------------------------------------------------------------------------------------
# What is written


def test_sanity_checks_print_what_they_checked_and_leave_no_trace(tmp_path, boards, capsys):
    assert go(*flags(boards, tmp_path / "a", "--max-steps", 1)) == 0
    out = capsys.readouterr().out
    assert "checked test: 40 examples, 640 labels\nchecked train: 79 examples, 1,264 labels\n" in out, out
    assert re.search(r"checked a forward and a backward: loss \d\.\d+, gradient norm \d\.\d+\n", out), out
    assert go(*flags(boards, tmp_path / "b", "--max-steps", 1, "--skip-sanity-checks")) == 0
    assert "examples" not in capsys.readouterr().out
    different = unlike(last(tmp_path / "a"), last(tmp_path / "b"))
    assert not different, different


def test_log_and_result(plain, boards):
    records = log_of(plain)
    start, result = records[0], records[-1]
    assert start["event"] == "start" and start["settings"]["data"] == [boards]
    assert start["total_steps"] == 19 and start["device"] == "cpu"
    keys = {"command", "git", "config", "torch", "ranks", "parameters", "data_sha256"}
    assert keys <= start.keys(), keys - start.keys()
    assert result["event"] == "result" and result["line"].startswith("RESULT preset=sudoku exact_acc=")
    assert result["finished"], "17 of 19 steps: the last batch of an iteration is not full and is dropped"
    assert steps_of(plain, "train") == list(range(1, 18)) and steps_of(plain, "val") == [8, 17]
    lines = log_of(plain, "train")
    assert len({tuple(r) for r in lines}) == 1, "the keys of a line are fixed"
    names = ("lr", "loss", "lm_loss", "exact_acc", "cell_acc", "q_halt_acc", "q_halt_loss", "steps", "count")
    first = lines[0]
    assert {f"train/{name}" for name in names} <= first.keys()
    assert first["train/exact_acc"] is None and first["train/count"] == 0, "no row halts in the first step"
    assert abs(lines[7]["epoch"] - 8 * 8 / (20 * 79 / 40)) < 1e-9
    for r in lines:
        assert abs(r["train/loss"] - r["train/lm_loss"] - 0.5 * r["train/q_halt_loss"]) < 1e-6
    best = max(log_of(plain, "val"), key=lambda r: r["val/exact_acc"])
    assert run_folder.load_file(plain / "best.ckpt")["step"] == best["step"]


def test_log_interval_means_are_means(plain, tmp_path, boards):
    assert go(*flags(boards, tmp_path / "run", "--log-interval", 5)) == 0
    single = {r["step"]: r["train/lm_loss"] for r in log_of(plain, "train")}
    firsts = (1, 6, 9, 11, 16)  # step 8 ends an iteration
    for first, r in zip(firsts, log_of(tmp_path / "run", "train"), strict=True):
        expected = np.mean([single[s] for s in range(first, r["step"] + 1)])
        assert abs(r["train/lm_loss"] - expected) < 1e-5, (r["step"], r["train/lm_loss"], expected)


def test_finish_leaves_the_weights_as_they_were(tmp_path, boards, monkeypatch):
    """The weights of the last checkpoint, not their average."""
    found = []
    finish = train.finish

    def watched(run, *args):
        before = run.weights.clone(), run.ema.clone()
        finish(run, *args)
        found.append(unlike(before, (run.weights, run.ema)))

    monkeypatch.setattr(train, "finish", watched)
    monkeypatch.setattr(draw, "draw_steps", lambda *args: None)
    assert go(*flags(boards, tmp_path, "--max-steps", 2, "--preset", "mini")) == 0
    assert found == [[]], found


@pytest.mark.parametrize("more", [[], ["--skip-sanity-checks"]])
def test_train_s_excludes_compilation(tmp_path, boards, monkeypatch, more):
    """Also in a resumed run and without the checks: a step takes a second here, the first one of a process
    an hour more."""
    forward_backward, clock, compiled = train.forward_backward, types.SimpleNamespace(**vars(time)), set()
    clock.now, clock.perf_counter = 0.0, lambda: clock.now

    def slow_at_first(run, *batch):
        clock.now += 1 if id(run) in compiled else 3600
        compiled.add(id(run))
        forward_backward(run, *batch)

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "forward_backward", slow_at_first)
    for steps in (3, 7):
        assert go(*flags(boards, tmp_path, "--resume", "--max-steps", steps, *more)) == 0
        assert log_of(tmp_path)[-1]["train_s"] == steps
    assert [r["dt_ms"] for r in log_of(tmp_path, "train")] == [1000] * 3


# ---------------------------------------------------------------------------------------------
# wandb and pictures


class FakeWandb(types.ModuleType):
    """Records the calls that Log makes."""

    def __init__(self, error=None):
        super().__init__("wandb")
        self.calls, self.error = [], error

    def init(self, **settings):
        if self.error:
            raise self.error
        self.calls.append(("init", settings))
        return self

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize(
    "flag, entity, project, folder, name",
    [("puzzles", None, "puzzles", "run", "run"), ("team/puzzles", "team", "puzzles", "a b: ü#1/", "a-b-ü-1")],
)
def test_wandb_gets_the_same_values(tmp_path, boards, monkeypatch, flag, entity, project, folder, name):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.chdir(tmp_path)
    assert go(*flags(boards, folder, "--wandb", flag, "--max-steps", 5)) == 0
    (_, settings), *values, end = wandb.calls
    assert (settings["entity"], settings["project"], settings["name"]) == (entity, project, name)
    assert re.fullmatch(rf"{name}-\d+", settings["id"]) and settings["config"]["lr"] == 3e-3
    expected = [("log", r.pop("step"), r) for r in log_of(folder, "train", "val") if r.pop("event")]
    assert values == expected and len(values) == 3, values  # steps 4 and 5, and an evaluation
    assert end == ("finish",)
    assert go("--resume", folder, "--max-steps", 6) == 0
    ids = [call[1]["id"] for call in wandb.calls if call[0] == "init"]
    assert ids == [settings["id"]] * 2, "wandb resumes the same run"


@pytest.mark.parametrize("module", [None, FakeWandb(RuntimeError("no\nkey")), FakeWandb(OSError("offline"))])
def test_wandb_that_fails_is_one_line_before_the_first_step(tmp_path, boards, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(SystemExit) as stop:
        common.cli(lambda: go(*flags(boards, tmp_path, "--wandb", "project")))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: --wandb: ") and err.count("\n") == 1, err
    assert not log_of(tmp_path, "train")


PLOT = draw.plot  # before without_curves replaces it


def no_matplotlib():
    """As on a machine without the package."""
    sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
    train.draw.plot = PLOT


def test_two_ranks_continue_without_matplotlib(tmp_path, boards):
    argv = flags(boards, tmp_path / "run", "--preset", "mini")
    codes, text = run_ranks(tmp_path, argv, 2, (None, no_matplotlib))
    assert codes == [0, 0] and "RESULT preset=mini" in text, (codes, text)
    assert text.count("warning: could not draw") == 1 and steps_of(tmp_path / "run", "val") == [8, 17], text


@pytest.mark.parametrize("error", [KeyError("font"), MemoryError(), ImportError("no backend"), OSError(28)])
def test_no_picture_ends_a_run(tmp_path, boards, monkeypatch, capsys, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(draw.try_to_draw, "has_failed", False)
    monkeypatch.setattr(draw, "plot", fail)
    monkeypatch.setattr(draw, "draw_steps", fail)
    assert go(*flags(boards, tmp_path, "--preset", "mini", "--epochs", 2)) == 0
    out = capsys.readouterr().out
    assert out.count("warning: could not draw") == 1 and "RESULT preset=mini" in out, out


def test_the_backend_of_a_notebook_does_not_matter(tmp_path, boards, monkeypatch):
    """Jupyter, Colab and Kaggle set MPLBACKEND to a module that this Python may lack."""
    monkeypatch.setenv("MPLBACKEND", "module://no_such_backend")
    monkeypatch.setattr(draw, "plot", PLOT)
    assert go(*flags(boards, tmp_path, "--epochs", 2)) == 0
    assert (tmp_path / "train_vs_val.png").stat().st_size > 1000


# ---------------------------------------------------------------------------------------------
# Flags that change how it trains


def test_mini_learns_what_it_sees(tmp_path):
    """16 boards, which are also the test split: all of them are solved."""
    arrays = draw_boards(16)
    prepare.write_dataset(tmp_path / "d", {"train": arrays, "test": arrays}, 6)
    argv = (
        "--preset mini --hidden-size 32 --puzzle-emb-ndim 32 --global-batch-size 16 --epochs 200 --device cpu"
    )
    argv += " --eval-interval 200 --lr-warmup-steps 10 --no-compile --dtype float32 --log-interval 99"
    assert go(*argv.split(), "--data", tmp_path / "d", "--run-dir", tmp_path / "run") == 0
    result = log_of(tmp_path / "run")[-1]
    assert result["exact_acc"] == 1, result
    losses = [r["train/lm_loss"] for r in log_of(tmp_path / "run", "train")]
    assert losses[-1] < 0.2 * losses[0], losses


def test_grad_accum_gives_the_same_losses(plain, tmp_path, boards):
    assert go(*flags(boards, tmp_path, "--log-interval", 1, "--grad-accum", 4)) == 0
    for ours, theirs in zip(log_of(tmp_path, "train", "val"), log_of(plain, "train", "val"), strict=True):
        for key in ("train/loss", "train/lm_loss", "train/q_halt_loss", "val/lm_loss"):
            assert key not in ours or abs(ours[key] - theirs[key]) < 1e-5, (key, ours, theirs)
    table = last(tmp_path)["model"]["puzzle_emb"]
    assert torch.equal(table, last(plain)["model"]["puzzle_emb"])


def test_freeze_weights_trains_the_table_only(tmp_path, boards, plain, monkeypatch):
    """From the weights of a run, on other puzzles: no weight gets a gradient, rows in use move."""
    other = write_boards(tmp_path / "other", shift=100, groups=10)
    seen, update = [], train.update

    def watched(run, *args):
        trained = any(p.requires_grad for p in run.model.parameters())
        seen.append((trained, int(run.grad.count_nonzero()), bool(run.puzzle_emb_delta.grad.any())))
        update(run, *args)

    monkeypatch.setattr(train, "update", watched)
    before = last(plain)
    frozen = ["--freeze-weights", "--init", plain, "--weight-decay", 1]
    assert go(*flags(other, tmp_path / "run", *frozen, "--max-steps", 4)) == 0
    after = last(tmp_path / "run")
    assert seen == [(False, 0, True)] * 4
    for name, average in before["ema"].items():
        assert torch.equal(after["model"][name], average), f"{name} moved, or is not the average of --init"
    mean, table = before["model"]["puzzle_emb"].mean(0), after["model"]["puzzle_emb"]
    moved = (table != mean).any(1)
    assert table.shape == (21, 32)
    assert 0 < moved.sum() < 21 and not moved[0], f"{moved.sum()} of 21 rows moved"
    with pytest.raises(UserError, match="^the weights do not fit the configuration: "):
        go(*flags(boards, tmp_path / "wide", "--init", plain, "--hidden-size", 64))


@pytest.mark.parametrize("limit, steps", [(("--max-steps", 6), 6), (("--max-minutes", 1e-9), 1)])
def test_limits_end_with_checkpoint_evaluation_and_result(tmp_path, boards, monkeypatch, limit, steps):
    """The evaluation after --max-minutes scores --eval-limit examples: all of them may take hours."""
    scored = []
    evaluate = scoring.evaluate

    def watched(*args):
        scored.append(args[4])
        return evaluate(*args)

    monkeypatch.setattr(scoring, "evaluate", watched)
    limit = (*limit, "--eval-limit", 3)
    assert go(*flags(boards, tmp_path, *limit)) == 0
    assert scored == ([1, 3, None] if steps == 6 else [1, 3]), scored
    assert last(tmp_path)["step"] == steps and steps_of(tmp_path, "val") == [steps]
    result = log_of(tmp_path)[-1]
    assert f"n={40 if steps == 6 else 3} steps={steps} " in result["line"] and not result["finished"], result
    assert go("--resume", tmp_path, *limit) == 0
    assert last(tmp_path)["step"] == (6 if steps == 6 else 2), "the limit holds after a resume"
    assert go("--resume", tmp_path) == 0 and log_of(tmp_path)[-1]["finished"]


@pytest.mark.parametrize(
    "options",
    [
        "--monitor none --ema-warmup",
        "--monitor val/lm_loss --monitor-mode min --ema 0",
        "--grad-clip 0.1 --train-max-steps 1 3 --eval-limit 5 --lr-min-ratio 0.1",
        "--mixer attn --pos-encodings learned --loss softmax --halt-max-steps 1",
        "--puzzle-emb-len 0 --puzzle-emb-ndim 0",
    ],
)
def test_options_train_save_and_resume(tmp_path, boards, options):
    """Bit for bit, with whatever state an option brings."""
    run_dir, argv = tmp_path / "run", options.split()
    assert go(*flags(boards, tmp_path / "whole", *argv)) == 0
    assert go(*flags(boards, run_dir, *argv, "--max-steps", 6)) == 0
    assert go("--resume", run_dir) == 0
    records = log_of(run_dir, "val")
    assert [r["step"] for r in records] == [6, 8, 17]
    assert not unlike(last(tmp_path / "whole"), last(run_dir))
    assert not unlike(log_of(tmp_path / "whole", "val"), records[1:])
    assert (run_dir / "best.ckpt").exists() == ("none" not in argv)
    if "val/lm_loss" in argv:
        best = min(records, key=lambda r: r["val/lm_loss"])
        assert run_folder.load_file(run_dir / "best.ckpt")["step"] == best["step"]
    if "--eval-limit" in argv:
        assert records[0]["val/n"] == 5


def test_an_iteration_that_fills_no_batch_is_skipped(tmp_path, boards):
    """The third iteration has one epoch, which is less than a batch; the run is finished all the same."""
    argv = ["--epochs", 5, "--eval-interval", 2, "--global-batch-size", 48, "--log-interval", 1]
    assert go(*flags(boards, tmp_path, *argv)) == 0
    assert steps_of(tmp_path, "train") == [1, 2] and log_of(tmp_path)[-1]["finished"]
