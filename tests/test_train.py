"""The training loop: what it refuses, what it writes, its flags."""
import json
import math
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import common
import hub
import model
import rundir
import sanity
import train
from common import UserError
from data import Split
from runs import ALONE, ROOT, Ranks, flags, go, last, log_of, run_ranks, same_run, steps_of, unlike, \
    without_curves, write_boards


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
# What is refused: one line, exit code 2

def test_one_line_and_exit_code_2(tmp_path, boards):
    """For a user's error on all of two ranks as for a wrong flag, without a traceback; rank 1 waits, so that
    torchrun, which ends it when rank 0 has ended, prints nothing twice."""
    ranks = Ranks(tmp_path, flags(boards, tmp_path / "run", "--global-batch-size", 9), 2)
    ranks.processes[0].join(60)
    assert ranks.text(0) == "error: --global-batch-size 9 is not a multiple of 2 ranks; use 8 or 10\n"
    assert not ranks.text(1) and ranks.wait() == [2, 2] and ranks.text(0) == ranks.text(1)
    codes, text = run_ranks(tmp_path, ["--preset", "nope"])
    assert codes == [2] and text.startswith("error: argument --preset: invalid choice: 'nope' (choose from ")
    assert text.count("\n") == 1, text


@pytest.mark.parametrize("argv, message", [
    (["--presset", "mini"], "unrecognized arguments: --presset mini; see --help"),
    (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (["--preset", "arc3"], "argument --preset: invalid choice: 'arc3'"),
    (["--lr", "fast"], "argument --lr: 'fast' is no number"),
    (["--epochs", "2.5"], "argument --epochs: '2.5' is no whole number"),
    (["--monitor-mode", "most"], "argument --monitor-mode: invalid choice"),
    (["--global-batch-size", "0"], "argument --global-batch-size: 0 is out of range; give 1 or more"),
    (["--grad-accum", "0"], "argument --grad-accum: 0 is out of range; give 1 or more"),
    (["--grad-accum", "3"], "--global-batch-size 8 is not a multiple of 1 ranks x 3 parts; use 6 or 9"),
    (["--keep-last", "0"], "argument --keep-last: 0 is out of range"),
    (["--checkpoint-interval", "-5"], "argument --checkpoint-interval: -5 is out of range"),
    (["--ema", "2"], "argument --ema: 2 is out of range; give 0 .. 0.999999"),
    (["--lr-warmup-steps", "-5"], "argument --lr-warmup-steps: -5 is out of range; give 0 or more"),
    (["--halt-exploration-prob", "7"], "argument --halt-exploration-prob: 7 is out of range; give 0 .. 1"),
    (["--lr-min-ratio", "1.5"], "argument --lr-min-ratio: 1.5 is out of range"),
    (["--lr", "nan"], "argument --lr: nan is out of range"),
    (["--weight-decay", "inf"], "argument --weight-decay: inf is out of range"),
    (["--seed", "-1"], "argument --seed: -1 is out of range"),
    (["--max-minutes", "-1"], "argument --max-minutes: -1 is out of range"),
    (["--dist-timeout", "0"], "argument --dist-timeout: 0 is out of range"),
    (["--expansion", "0"], "argument --expansion: 0 is out of range"),
    (["--mixer", "attn", "--num-heads", "3"], "--hidden-size 32 does not give 3 heads of even width; use a"),
    (["--puzzle-emb-len", "0"], "--puzzle-emb-ndim 32 is wider than --puzzle-emb-len 0 x --hidden-size 32"),
    (["--global-batch-size", "800"],
     "--epochs 4 of 20 groups do not fill one batch of --global-batch-size 800"),
    (["--train-max-steps", "3", "2"], "--train-max-steps 3 2 does not rise; give the lower number first"),
    (["--score-mod", "sudoku"], "--score-mod sudoku needs --mixer attn and boards of"),
    (["--num-heads", "4"], "--num-heads 4 does nothing with --mixer mlp; leave it out"),
    (["--pos-encodings", "rope"], "--pos-encodings rope does nothing with --mixer mlp; leave it out"),
    (["--ema", "0", "--ema-warmup"], "--ema-warmup True does nothing with --ema 0; leave it out"),
    (["--device", "cuda"], "--device cuda is not available here; use cpu"),
    (["--wandb", "project"], "--wandb needs the package wandb; pip install wandb, or leave the flag out"),
    (["--monitor", "val/accuracy"], "--monitor val/accuracy is not measured; choose one of val/exact_acc, "),
    (["--data", "nowhere/sudoku"], "nowhere/sudoku not found; name another folder with --data, or build it"),
    (["--data", "nowhere/arc2concept-aug-1000", "--allow-cpu"],
     f"nowhere/arc2concept-aug-1000 not found; build it: python {ROOT / 'prepare/arc.py'} --subsets "
     f"training2 evaluation2 concept --test-set-name evaluation2 --output-dir nowhere/arc2concept-aug-1000"),
    (["--init", "nothing.ckpt"], "nothing.ckpt not found"),
])
def test_refused(tmp_path, boards, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None) if "--wandb" in argv else None
    if torch.cuda.is_available() and "cuda" in argv:
        pytest.skip("there is a GPU")
    with pytest.raises(UserError) as e:
        go(*flags(boards, tmp_path / "run"), *argv)
    assert str(e.value).startswith(message) and "\n" not in str(e.value), e.value
    assert not list(tmp_path.rglob("*.ckpt*"))


@pytest.mark.parametrize("ranks, ok", [(3, False), (4, True), (7, False), (8, True)])
def test_batch_must_divide_by_ranks(boards, ranks, ok):
    args = train.settings(flags(boards, "run"), ALONE)[0]
    world = common.World(0, ranks, torch.device("cpu"))
    if ok:
        return train.check(args, args, world)
    with pytest.raises(UserError, match=f"--global-batch-size 8 is not a multiple of {ranks} ranks; use "):
        train.check(args, args, world)


def test_one_supervision_step_trains(tmp_path, boards):
    one = ["--halt-max-steps", 1, "--halt-exploration-prob", 0.1]
    assert go(*flags(boards, tmp_path, *one, "--max-steps", 4)) == 0
    assert log_of(tmp_path, "train")[-1]["train/steps"] == 1


def test_a_new_field_of_config_is_a_flag_and_an_older_checkpoint_lacks_it(tmp_path, boards, monkeypatch):
    """An older run goes on with the default of the field; without the field its value is refused by name."""
    run_dir = tmp_path / "run"
    assert go(*flags(boards, run_dir, "--max-steps", 3)) == 0

    @dataclass
    class Config(model.Config):
        twist: float = model.option(1.0, "of a researcher", type=common.within(float, 0))
    monkeypatch.setattr(train, "Config", Config)
    monkeypatch.setattr(model, "Config", Config)
    assert train.settings(flags(boards, "x", "--twist", 2), ALONE)[0].twist == 2
    assert go("--resume", run_dir, "--max-steps", 5) == 0 and last(run_dir)["config"]["twist"] == 1
    with pytest.raises(UserError, match="^--twist 3.0 differs from the run's 1.0"):
        go("--resume", run_dir, "--twist", 3)
    monkeypatch.undo()
    without_curves(monkeypatch)
    with pytest.raises(UserError, match="the checkpoint has twist, which this model.py does not know"):
        go("--resume", run_dir)


def test_every_preset_says_what_a_cpu_takes_or_builds_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sanity, "matmul_peak", lambda device, dtype: 1e12)
    for preset in train.PRESETS:
        if preset.startswith("mini"):
            continue
        told = f"no GPU here: {preset} takes [0-9,]+ steps of at least [0-9]+ s"
        with pytest.raises(UserError, match=told):
            go("--preset", preset)
    assert not list(tmp_path.iterdir())


def change(name, edit):
    def damage(folder):
        a = np.load(folder / f"train/all__{name}.npy")
        np.save(folder / f"train/all__{name}.npy", edit(a))
    return damage


def without(field, split="train"):
    def damage(folder):
        meta = json.loads((folder / split / "dataset.json").read_text())
        del meta[field]
        (folder / split / "dataset.json").write_text(json.dumps(meta))
    return damage


def set_token(a):
    a[-1, -1] = 6
    return a


def cut(name):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-7])
    return damage


@pytest.mark.parametrize("damage, words", [
    (lambda d: (d / "train/all__labels.npy").unlink(),
     ["all__labels.npy not found", "build the dataset again"]),
    (cut("train/all__inputs.npy"), ["train/all__inputs.npy", "truncated"]),
    (lambda d: (d / "test/all__inputs.npy").write_bytes(b""), ["test/all__inputs.npy", "truncated"]),
    (lambda d: (d / "train/dataset.json").write_text('{"vocab'), ["train/dataset.json", "not valid JSON"]),
    (lambda d: (d / "identifiers.json").unlink(), ["identifiers.json not found"]),
    (without("vocab_size"), ["train/dataset.json lacks vocab_size"]),
    (without("seq_len", "test"), ["test/dataset.json lacks seq_len"]),
    (change("inputs", set_token), ["train inputs: tokens", "6, but vocab_size is 6"]),
    (change("labels", set_token), ["train labels: tokens", "6, but vocab_size is 6"]),
    (change("labels", np.zeros_like), ["train", "all", "ignored"]),
    (change("labels", lambda a: a[:-1]), ["train/all__labels", "(78, 16)", "(79, 16)"]),
    (change("puzzle_indices", lambda a: a[::-1].copy()), ["all__puzzle_indices.npy does not rise from 0"]),
    (change("puzzle_identifiers", lambda a: a + 1), ["all__puzzle_identifiers.npy", "up to 41"]),
])
def test_bad_dataset_is_refused(tmp_path, damage, words):
    write_boards(tmp_path / "boards")
    damage(tmp_path / "boards")
    with pytest.raises(UserError) as e:
        go(*flags(tmp_path / "boards", tmp_path / "run"))
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value), e.value
    assert not list(tmp_path.rglob("*.ckpt*"))


def test_nan_loss_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, boards):
    """The weights overflow at step 6, whose loss is still finite; saving at each step keeps nothing of it."""
    argv = flags(boards, tmp_path, "--checkpoint-interval", 1, "--log-interval", 1)
    assert go(*argv, "--max-steps", 5) == 0
    told = "not finite in steps 6 .. 6; the last good checkpoint is kept: lower --lr"
    with pytest.raises(UserError, match=told) as e:
        go("--resume", tmp_path, "--lr", 1e38)
    good = last(tmp_path)
    finite = all(t.isfinite().all() for t in good["model"].values())
    assert finite, f"step {good['step']} was saved, then: {e.value}"
    assert go("--resume", tmp_path, "--lr", 1e-3) == 0 and last(tmp_path)["step"] == 17
    assert all(math.isfinite(r["train/loss"]) for r in log_of(tmp_path, "train"))


def test_nan_between_log_lines(tmp_path, boards, monkeypatch):
    """A single NaN gradient at step 6 is found at the log line of step 8, before anything is saved."""
    backward = train.backward

    def poisoned(run, batch):
        backward(run, batch)
        if run.step + 1 == 6:
            run.flat.grad[3] = math.nan
    monkeypatch.setattr(train, "backward", poisoned)
    with pytest.raises(UserError, match="not finite in steps 5 .. 8;"):
        go(*flags(boards, tmp_path))
    assert not rundir.checkpoints(tmp_path)


# ---------------------------------------------------------------------------------------------
# What is written

def test_sanity_checks_say_what_they_checked(tmp_path, boards, capsys):
    assert go(*flags(boards, tmp_path / "a", "--max-steps", 1)) == 0
    out = capsys.readouterr().out
    for words in ("boards/train: 79 examples, tokens inside 0..5", "checked the first batch of train: ",
                  "checked the first batch of test: inputs (8, 16) int32 in 1 .. 5, labels (8, 16) int32, "
                  "100% asked, puzzle rows 1 .. 8",
                  "checked a forward and a backward: logits (8, 16, 6) float32, loss ", "gradient norm",
                  "checked an evaluation: val/exact_acc, val/cell_acc"):
        assert words in out, (words, out)
    assert go(*flags(boards, tmp_path / "b", "--max-steps", 1, "--skip-sanity-checks")) == 0
    assert "checked" not in capsys.readouterr().out
    assert not unlike(last(tmp_path / "a"), last(tmp_path / "b")), "the checks leave no trace in the run"


def test_log_and_result(plain, boards):
    records = log_of(plain)
    start, result = records[0], records[-1]
    assert start["event"] == "start" and start["settings"]["data"] == [boards]
    assert start["total_steps"] == 19 and start["device"] == "cpu"
    keys = {"command", "git", "config", "torch", "ranks", "parameters", "parameters_with_puzzle_table"}
    assert keys <= start.keys()
    assert start["parameters_with_puzzle_table"] - start["parameters"] == 41 * 32
    assert result["event"] == "result" and result["finished"]
    assert result["line"].startswith("RESULT preset=sudoku exact_acc=")
    assert steps_of(plain, "train") == list(range(1, 18)) and steps_of(plain, "val") == [8, 17]
    lines = log_of(plain, "train")
    assert len({tuple(r) for r in lines}) == 1, "fixed keys"
    names = ("lr", "loss", "lm_loss", "exact_acc", "cell_acc", "q_halt_acc", "q_halt_loss", "steps", "count")
    first = lines[0]
    assert {f"train/{name}" for name in names} <= first.keys()
    assert first["train/exact_acc"] is None and first["train/count"] == 0, "no row halts in the first step"
    assert abs(lines[7]["epoch"] - 8 * 8 / (20 * 79 / 40)) < 1e-9
    for r in lines:
        assert abs(r["train/loss"] - r["train/lm_loss"] - 0.5 * r["train/q_halt_loss"]) < 1e-6
    best = max(r["val/exact_acc"] for r in log_of(plain, "val"))
    at_best = [r["step"] for r in log_of(plain, "val") if r["val/exact_acc"] == best]
    assert rundir.load_file(plain / "best.ckpt")["step"] == at_best[0]


def test_log_interval_means_are_means(plain, tmp_path, boards):
    assert go(*flags(boards, tmp_path / "run", "--log-interval", 5)) == 0
    single = {r["step"]: r["train/lm_loss"] for r in log_of(plain, "train")}
    for first, r in zip((1, 6, 9, 11, 16), log_of(tmp_path / "run", "train")):     # step 8 ends an iteration
        expected = np.mean([single[s] for s in range(first, r["step"] + 1)])
        assert abs(r["train/lm_loss"] - expected) < 1e-5, (r["step"], r["train/lm_loss"], expected)


FAKE_WANDB = """
import json
class Run:
    def log(self, values, step): open("calls", "a").write(json.dumps(["log", step, values]) + "\\n")
    def finish(self): open("calls", "a").write('["finish"]\\n')
def init(project, name, config, resume, id):
    open("calls", "a").write(json.dumps(["init", project, name, config, id]) + "\\n")
    return Run()
"""


def test_wandb_gets_the_same_values(tmp_path, boards, monkeypatch):
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert go(*flags(boards, "run", "--wandb", "a project", "--max-steps", 5)) == 0
    first, *values, end = map(json.loads, (tmp_path / "calls").read_text().splitlines())
    assert first[:3] == ["init", "a project", "run"] and first[3]["lr"] == 3e-3 and end == ["finish"]
    expected = [["log", r.pop("step"), r] for r in log_of("run", "train", "val") if r.pop("event")]
    assert values == expected and len(values) == 3     # steps 4 and 5, and an evaluation
    assert go("--resume", "run", "--max-steps", 6) == 0
    calls = [c for c in map(json.loads, (tmp_path / "calls").read_text().splitlines()) if c[0] == "init"]
    assert [c[4] for c in calls] == [f"run-{log_of('run')[0]['began']}"] * 2, "the same run there, too"


# ---------------------------------------------------------------------------------------------
# Flags that change how it trains

def test_grad_accum_gives_the_same_losses(plain, tmp_path, boards):
    assert go(*flags(boards, tmp_path, "--log-interval", 1, "--grad-accum", 4)) == 0
    for ours, theirs in zip(log_of(tmp_path, "train", "val"), log_of(plain, "train", "val")):
        for key in ("train/loss", "train/lm_loss", "train/q_halt_loss", "val/lm_loss"):
            assert key not in ours or abs(ours[key] - theirs[key]) < 1e-5, (key, ours, theirs)
    assert len(last(tmp_path)["carry"][0]) == 8
    assert torch.equal(last(tmp_path)["model"]["puzzle_emb"], last(plain)["model"]["puzzle_emb"])


def test_freeze_weights_trains_the_table_only(tmp_path, boards, plain, monkeypatch):
    """From the weights of a run, on other puzzles: no weight gets a gradient, rows in use move."""
    other = write_boards(tmp_path / "other", shift=100, groups=10)
    seen, update = [], train.update

    def watched(run, factor):
        seen.append((any(p.requires_grad for p in run.model.parameters()), int(run.flat.grad.count_nonzero()),
                     bool(run.delta.grad.abs().sum() > 0)))
        update(run, factor)
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
    with pytest.raises(UserError, match="hidden_size 32, not 64"):
        go(*flags(boards, tmp_path / "wide", "--init", plain, "--hidden-size", 64))


def test_init_from_the_same_puzzles_keeps_the_table(tmp_path, boards, plain):
    args, split = train.settings(flags(boards, tmp_path), ALONE)[0], Split(boards, "train")
    cfg = train.config_of(args, split.meta)
    state = hub.first_weights(plain, cfg, split.identity)
    assert torch.equal(state["puzzle_emb"], last(plain)["model"]["puzzle_emb"]) and state["puzzle_emb"].any()
    torch.save(hub.to_published(cfg, state), tmp_path / "published")
    assert not unlike(hub.first_weights(tmp_path / "published", cfg, split.identity), state)


@pytest.mark.parametrize("limit, steps", [(("--max-steps", 6), 6), (("--max-minutes", 1e-9), 1)])
def test_limits_end_with_evaluation_and_checkpoint(tmp_path, boards, limit, steps):
    assert go(*flags(boards, tmp_path, *limit)) == 0
    assert last(tmp_path)["step"] == steps and steps_of(tmp_path, "val") == [steps]
    result = log_of(tmp_path)[-1]
    assert result["event"] == "result" and f"steps={steps} " in result["line"] and not result["finished"]
    assert go("--resume", tmp_path, *limit) == 0
    assert last(tmp_path)["step"] == (6 if steps == 6 else 2), "the limit holds after a resume"
    assert go("--resume", tmp_path) == 0 and log_of(tmp_path)[-1]["finished"]


@pytest.mark.parametrize("argv", [
    ["--monitor", "none", "--ema-warmup"],
    ["--monitor", "val/lm_loss", "--monitor-mode", "min", "--ema", "0"],
    ["--grad-clip", "0.1", "--train-max-steps", "1", "3"], ["--q-continue", "--eval-limit", "5"]])
def test_options_train_save_and_resume(tmp_path, boards, argv):
    """Bit for bit, with whatever state an option brings."""
    run_dir = tmp_path / "run"
    assert go(*flags(boards, tmp_path / "whole", *argv)) == 0
    assert go(*flags(boards, run_dir, *argv, "--max-steps", 8)) == 0 and go("--resume", run_dir) == 0
    assert not same_run(tmp_path / "whole", run_dir)
    assert (run_dir / "best.ckpt").exists() == ("none" not in argv)
    if "val/lm_loss" in argv:
        best = min(log_of(run_dir, "val"), key=lambda r: r["val/lm_loss"])
        assert rundir.load_file(run_dir / "best.ckpt")["step"] == best["step"]
    if "--eval-limit" in argv:
        assert log_of(run_dir, "val")[0]["val/n"] == 5


@pytest.mark.parametrize("argv, steps", [
    (["--epochs", 5, "--eval-interval", 2, "--global-batch-size", 48], [1, 2]),     # the fifth fills no batch
    (["--epochs", 3, "--eval-interval", 1, "--global-batch-size", 64], [])])        # and here none does
def test_epochs_that_fill_no_batch_end(tmp_path, boards, argv, steps):
    """Instead of waiting for one for ever."""
    assert go(*flags(boards, tmp_path, *argv, "--log-interval", 1)) == 0
    assert steps_of(tmp_path, "train") == steps and log_of(tmp_path)[-1]["finished"]


def test_no_puzzle_positions(tmp_path, boards):
    assert go(*flags(boards, tmp_path, "--puzzle-emb-len", 0, "--puzzle-emb-ndim", 0, "--max-steps", 2)) == 0
    assert last(tmp_path)["model"]["puzzle_emb"].shape == (41, 0)


def test_init_says_what_no_shape_tells(tmp_path, boards, plain, capsys):
    assert go(*flags(boards, tmp_path, "--init", plain, "--L-cycles", 2, "--max-steps", 1)) == 0
    assert f"note: {plain} was trained with L_cycles 1, not 2" in capsys.readouterr().err


def test_a_run_is_not_resumed_into_the_folder_of_another(tmp_path, boards, plain):
    assert go(*flags(boards, tmp_path / "other", "--max-steps", 2)) == 0
    before = (tmp_path / "other/log.jsonl").read_bytes()
    with pytest.raises(UserError, match="other holds the checkpoints of a run"):
        go("--resume", plain, "--run-dir", tmp_path / "other", "--epochs", 5)
    assert (tmp_path / "other/log.jsonl").read_bytes() == before


def test_a_typed_grad_accum_holds_after_a_resume(tmp_path, boards):
    assert go(*flags(boards, tmp_path, "--grad-accum", 4, "--max-steps", 2)) == 0
    assert go("--resume", tmp_path, "--max-steps", 3) == 0
    assert [r["settings"]["grad_accum"] for r in log_of(tmp_path, "start")] == [4, 4]
