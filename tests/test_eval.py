"""eval.py: scoring, compute at test time, results, which checkpoint fits which dataset."""
import json
import re
from dataclasses import asdict, replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

import common
import eval as scoring
import hub
import results
import runs
from common import UserError
from data import Split, write_dataset
from model import Batch, act_loss, build
from prepare import maze
from runs import ALONE, ARC_CFG, ROOT, TINY, Oracle, altered, arc_model, boards, model_of, png_size, \
    save_run, torchrun


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return runs.sudoku_dir(tmp_path_factory.mktemp("data") / "sudoku-4x4")


@pytest.fixture(scope="module")
def split(data_dir):
    return Split(data_dir, "test")


@pytest.fixture(scope="module")
def arc_dir(tmp_path_factory):
    return runs.arc_dir(tmp_path_factory.mktemp("arc"))


def metrics_of(model, split, batch_size, **how):
    return scoring.evaluate(model, split, ALONE, batch_size, quiet=True, **how).metrics


def score(model, split, batch_size, world=ALONE, examples=None, **how):
    """scoring.score of all rows."""
    examples = np.arange(len(split)) if examples is None else examples
    return scoring.score(model, split, world, batch_size, examples, quiet=True, **how)


def ranks_of(n):
    return [common.World(rank, n, ALONE.device) for rank in range(n)]


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text())


# ---------------------------------------------------------------------------------------------
# Scoring

def naive(model, split):
    """Metrics by model.step and act_loss, row by row."""
    totals = {}
    for i in range(len(split)):
        row = (torch.from_numpy(a) for a in split.gather(np.array([i])))
        batch = Batch(*row, torch.zeros(1, dtype=torch.int32))
        carry = model.empty_carry(batch)
        with torch.no_grad():
            for _ in range(model.cfg.halt_max_steps):
                carry, logits, q = model.step(carry, batch)
            for name, value in act_loss(model.cfg, carry, logits, q)[1].items():
                totals[name] = totals.get(name, 0) + value.item()
    return {name: value / len(split) for name, value in totals.items()}


@pytest.mark.parametrize("batch_size", [5, 22, 30])
def test_evaluate_equals_a_loop_of_supervision_steps(split, batch_size):
    model = model_of()
    expected = naive(model, split)
    found = metrics_of(model, split, batch_size)
    assert found["n"] == 22
    for name in ("cell_acc", "exact_acc", "q_halt_acc", "steps", "lm_loss", "q_halt_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), (name, found, expected)


class Together(common.World):
    """Rank `rank` of several whose values were collected before: stands in for the collective."""
    def gather_objects(self, value):
        return [part._replace(preds=part.preds[:, :0]) for part in self.values]


def test_ranks_share_the_rows(split, monkeypatch):
    model = model_of()
    parts = [score(model, split, 8, world) for world in ranks_of(3)]
    assert [len(p.examples) for p in parts] == [8, 8, 6]
    alone, together = score(model, split, 8), scoring.joined(parts)
    for name, a, b in zip(alone._fields, alone, together):
        assert np.array_equal(a, b), name
    world = Together(0, 3, ALONE.device)
    world.values = parts
    assert scoring.evaluate(model, split, world, 8, quiet=True).metrics == metrics_of(model, split, 8)
    few = score(model, split, 8, ranks_of(3)[2], np.arange(9))
    assert few.examples.shape == (0,) and few.preds.shape == (0, 16) and few.history.shape == (0, 4)


def test_limit_and_steps(split):
    model = model_of()
    found = metrics_of(model, split, 8, limit=5, effort=scoring.Effort(steps=7))
    longer = metrics_of(build(replace(TINY, halt_max_steps=7), model.state_dict()).eval(), split, 5, limit=5)
    assert found == pytest.approx(longer) and found["n"] == 5 and found["steps"] == 7


def test_rows_without_labels_do_not_count(tmp_path):
    questions, answers = boards(4)
    answers = answers.copy()
    answers[2] = 0
    write_dataset(tmp_path / "d", {"train": (questions, answers), "test": (questions, answers)}, 6, {})
    split = Split(tmp_path / "d", "test")
    scores, found = score(model_of(), split, 3), metrics_of(model_of(), split, 3)
    assert scores.examples.tolist() == [0, 1, 2, 3] and scores.n.tolist() == [16, 16, 0, 16]
    assert found["n"] == 3
    assert found["cell_acc"] == pytest.approx(scores.cell[[0, 1, 3]].mean())


def test_thinking_leaves_the_gradient_mode_alone(split):
    inputs, _, ids = (torch.from_numpy(a) for a in split.gather(np.arange(2)))
    for logits, q in scoring.think(model_of(), inputs, ids, 2):
        assert torch.is_grad_enabled() and not logits.requires_grad and not q.requires_grad


def test_history_tells_when_each_row_was_right(split):
    scores = score(Oracle(), split, 6)
    inputs, labels, _ = split.gather(scores.examples)
    needs = np.array([Oracle.needs(None, row) for row in inputs])
    assert np.array_equal(scores.history, np.arange(1, 5) >= needs[:, None])
    assert np.array_equal(scores.preds, labels) and scores.right.all() and (scores.steps == 4).all()


def test_result_line():
    metrics = {"exact_acc": 0.998, "cell_acc": 0.99957, "lm_loss": 1.0, "n": 1000}
    assert results.result_line("mini", metrics, 870, 2.5e9, 58.149, "cpu") == (
        "RESULT preset=mini exact_acc=0.9980 cell_acc=0.9996 n=1000 steps=870 train_pflop=0.002175 "
        "train_s=58.1 device=cpu")
    metrics = {"pass@1": 0.4, "pass@2": 0.45, "exact_acc": 0.3, "cell_acc": 0.8, "n": 9}
    line = results.result_line("arc1", metrics, 1, 2, 2, "cuda:0")
    assert line.startswith("RESULT preset=arc1 pass@1=0.4000 pass@2=0.4500 exact_acc=0.3000 ")
    line = results.result_line("x", {"regression_loss": 0.5, "n": 1}, 1, 1, 1, "cpu")
    assert "regression_loss=0.5000" in line


# ---------------------------------------------------------------------------------------------
# Compute at test time

def test_halting_refills_slots_and_scores_every_row_once(split):
    model = Oracle()
    full = score(model, split, 6)
    fixed_calls, model.calls = model.calls, 0
    scores = score(model, split, 6, effort=scoring.Effort(halt=0.0))
    inputs = split.gather(np.arange(22))[0]
    needs = np.array([Oracle.needs(None, row) for row in inputs])
    work = needs.sum()
    assert np.array_equal(scores.steps, needs) and np.array_equal(scores.examples, np.arange(22))
    assert np.array_equal(scores.preds, full.preds) and scores.right.all()
    assert fixed_calls == 16 and -(-work // 6) <= model.calls <= work // 6 + 4, (model.calls, work)
    never = score(model, split, 6, effort=scoring.Effort(halt=99.0))
    assert (never.steps == 4).all() and never.right.all()


def test_halting_with_a_real_model_equals_all_steps_when_nothing_halts(split):
    model = model_of()
    full = score(model, split, 6)
    halted = score(model, split, 6, effort=scoring.Effort(halt=1e9))
    assert np.array_equal(full.preds, halted.preds) and np.allclose(full.q, halted.q, atol=1e-5)
    assert np.allclose(full.loss, halted.loss, rtol=1e-5)


def test_rollouts_take_the_surest_try(split):
    model = Oracle()
    model.noise_helps = True        # right only where noise pushed a state up
    one = score(model, split, 6)
    many = score(model, split, 6, effort=scoring.Effort(rollouts=12, noise=0.5))
    again = score(model, split, 6, ranks_of(2)[1], effort=scoring.Effort(rollouts=12, noise=0.5))
    assert not one.right.any() and many.right.mean() > 0.8
    assert np.array_equal(many.right[6:12], again.right[:6])    # the same noise on any number of ranks


class Biased(Oracle):
    """Wrong on the boards as they are, right on most of their copies."""
    def knows(self, tokens, state):
        return int((tokens * np.arange(16)).sum()) % 3 > 0


def test_augmented_copies_are_undone_and_voted(split):
    plain = score(Biased(), split, 6)
    voted = score(Biased(), split, 6, effort=scoring.Effort(augment=8))
    assert plain.right.mean() < 0.9 and voted.right.mean() == 1.0, (plain.right.mean(), voted.right.mean())
    assert np.array_equal(voted.preds, split.gather(np.arange(22))[1])


def test_maze_copies_are_undone():
    cfg = replace(TINY, seq_len=25)
    board = np.random.RandomState(0).randint(1, 6, 25)
    for k in range(1, 8):
        relabel, cells = scoring.symmetries("maze", cfg, None, 1, k)
        copy = relabel[0][board[cells[0]]]
        assert np.array_equal(copy.reshape(5, 5), maze.dihedral(board.reshape(5, 5), k))
        assert np.array_equal(np.argsort(relabel[0])[copy[np.argsort(cells[0])]], board)


# ---------------------------------------------------------------------------------------------
# The command line

def test_results_of_a_run_folder(tmp_path, split, capsys):
    run = save_run(tmp_path / "run", split, model_of())
    out = tmp_path / "out"
    assert scoring.main(["--checkpoint", str(run), "--output", str(out), "--steps", "6", "--save-preds",
                         "--show", "4", "--batch-size", "8"]) == 0
    printed = capsys.readouterr().out
    results = read(out)
    expected = metrics_of(model_of(), split, 8, effort=scoring.Effort(steps=6))
    assert results["metrics"] == pytest.approx(expected)
    assert len(results["exact_acc_by_step"]) == 6 and results["part"] is None
    low, high, n, unit = results["intervals"]["exact_acc"]
    assert (n, unit) == (22, "puzzles") and low <= results["metrics"]["exact_acc"] + 1e-9 <= high
    assert results["about"]["with puzzle table"] - results["about"]["parameters"] == TINY.puzzle_emb_ndim
    for text in ("exact_acc", "95% interval", "of 22 puzzles", "right by step", "rows/s", "float32"):
        assert text in printed, printed
    preds = np.load(out / "predictions.npz")
    assert {k: v.shape for k, v in preds.items()} == {
        "inputs": (22, 16), "labels": (22, 16), "preds": (22, 16), "puzzle_identifiers": (22,),
        "q_halt_logits": (22,)}
    assert (preds["preds"] == preds["labels"]).all(1).mean() == pytest.approx(results["metrics"]["exact_acc"])
    assert png_size(out / "show.png")[0] == 1200


def test_min_exact_limit_and_default_output(tmp_path, split, capsys):
    run = save_run(tmp_path / "run", split, model_of())
    file = str(run / "step_00000010.ckpt")
    assert scoring.main(["--checkpoint", file, "--limit", "5", "--min-exact", "0.9"]) == 1
    captured = capsys.readouterr()
    assert "a part: the first 5 of 22 rows" in captured.out and "--min-exact 0.9" in captured.err
    assert read(run, "part-results.json")["part"] == "the first 5 of 22 rows"
    assert scoring.main(["--checkpoint", str(run), "--min-exact", "0"]) == 0


def test_a_part_never_replaces_the_whole(tmp_path, arc_dir):
    split = Split(arc_dir, "test")
    run = save_run(tmp_path / "run", split, arc_model(split))
    assert scoring.main(["--checkpoint", str(run)]) == 0
    names = ("results.json", "right.npz", "submission.json")
    whole = {name: (run / name).read_bytes() for name in names}
    for part in (["--limit", "1"], ["--max-aug", "0"]):
        assert scoring.main(["--checkpoint", str(run), *part]) == 0
        assert {name: (run / name).read_bytes() for name in names} == whole, part
        assert all((run / f"part-{name}").exists() for name in names)


def test_an_output_that_cannot_be_written_is_found_before_the_first_batch(tmp_path, split, monkeypatch):
    run = save_run(tmp_path / "run", split, model_of())
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(scoring, "measure", lambda *args: pytest.fail("it was scored first"))
    with pytest.raises(UserError, match="--output .*file/out cannot be written .*name another folder"):
        scoring.main(["--checkpoint", str(run), "--output", str(tmp_path / "file/out")])


def test_a_full_disk_costs_the_files_not_the_figures(tmp_path, split, monkeypatch, capsys):
    run = save_run(tmp_path / "run", split, model_of())
    write_json = common.write_json

    def full(path, value):
        if path.name == "results.json":
            raise OSError(28, "No space left on device")
        write_json(path, value)
    monkeypatch.setattr(scoring, "write_json", full)
    assert scoring.main(["--checkpoint", str(run)]) == 1
    captured = capsys.readouterr()
    assert "exact_acc" in captured.out
    assert "did not take results.json (No space left on device)" in captured.err
    assert (run / "right.npz").exists() and not (run / "results.json").exists()


def test_results_are_valid_json_whatever_the_weights_are(tmp_path):
    common.write_json(tmp_path / "r.json", {"a": [float("nan"), {"b": float("-inf")}], "c": 1.5})
    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": [None, {"b": None}], "c": 1.5}


def test_averaged_weights_are_scored(tmp_path, split):
    last, average = model_of(seed=1), model_of(seed=2)
    run = save_run(tmp_path / "run", split, last, ema=dict(average.named_parameters()))
    losses = {}
    for flags, model in (((), average), (("--no-ema",), last)):
        scoring.main(["--checkpoint", str(run), *flags])
        mixed = build(TINY, {**last.state_dict(), **dict(model.named_parameters())}).eval()
        losses[flags] = read(run)["metrics"]["lm_loss"]
        assert losses[flags] == pytest.approx(metrics_of(mixed, split, 30)["lm_loss"])
    assert losses[()] != losses["--no-ema",]


def test_overrides_reach_the_model(tmp_path, split):
    run = save_run(tmp_path / "run", split, model_of())
    scoring.main(["--checkpoint", str(run), "--H-cycles", "2", "--L-cycles", "3", "--dtype", "bfloat16"])
    results = read(run)
    other = build(replace(TINY, H_cycles=2, L_cycles=3, dtype="bfloat16"), model_of().state_dict()).eval()
    assert results["about"]["precision"] == "bfloat16"
    assert results["metrics"] == pytest.approx(metrics_of(other, split, 30), rel=1e-2)


def test_halting_reports_the_full_run_too(tmp_path, split, capsys):
    run = save_run(tmp_path / "run", split, model_of())
    scoring.main(["--checkpoint", str(run), "--halt", "--halt-threshold", "-1.5", "--batch-size", "8"])
    assert "without halting" in capsys.readouterr().out
    assert 1 <= read(run)["metrics"]["steps"] <= 4


@pytest.mark.parametrize("flags, message", [
    ([], "give one of --checkpoint and --hf"),
    (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt not found"),
    (["--checkpoint", "."], "holds no checkpoint"),
    (["--checkpoint", "x", "--limit", "0"], "argument --limit: 0 is out of range; give 1 or more"),
    (["--checkpoint", "x", "--min-exact", "2"], "argument --min-exact: 2 is out of range; give 0 .. 1"),
    (["--checkpoint", "x", "--noise", "-1"], "argument --noise: -1 is out of range"),
    (["--checkpoint", "x", "--stepps", "1"], "unrecognized arguments: --stepps 1; see --help"),
    (["--checkpoint", "x", "--halt", "--augment", "2"], "only one of them"),
    (["--checkpoint", "x", "--rollouts", "3"], "tries differ by noise only"),
    (["--checkpoint", "x", "--halt-threshold", "1"], "does nothing without --halt"),
    (["--checkpoint", "RUN", "--max-aug", "3"], "--max-aug does nothing for"),
    (["--hf", "nonsense"], "is no owner/repo"),
])
def test_bad_flags_are_one_line(tmp_path, split, flags, message):
    save_run(tmp_path / "run", split, model_of())
    with pytest.raises(UserError, match=message) as error:
        scoring.main([str(tmp_path / "run") if f == "RUN" else f for f in flags])
    assert "\n" not in str(error.value)


def test_damaged_checkpoint_is_refused_by_name(tmp_path, split):
    altered(save_run(tmp_path / "run", split, model_of()) / "step_00000010.ckpt")
    with pytest.raises(UserError, match="step_00000010.ckpt is damaged"):
        scoring.main(["--checkpoint", str(tmp_path / "run")])


def test_augment_is_for_boards_that_are_known_to_have_symmetries(tmp_path):
    """An own task of the shape of a Sudoku or a maze has none that we know of."""
    for vocab_size in (6, 12):
        folder = tmp_path / f"own{vocab_size}"
        write_dataset(folder, {"train": boards(8), "test": boards(4, seed=1)}, vocab_size)
        own = Split(folder, "test")
        run = save_run(tmp_path / f"run{vocab_size}", own, model_of(replace(TINY, vocab_size=vocab_size)))
        with pytest.raises(UserError, match=f"--augment does nothing for {folder}; leave it out"):
            scoring.main(["--checkpoint", str(run), "--augment", "2"])


def test_an_older_and_a_newer_config(tmp_path, split):
    cfg = asdict(TINY)
    del cfg["loss"]
    assert scoring.main(["--checkpoint", str(save_run(tmp_path / "old", split, model_of(), config=cfg))]) == 0
    run = save_run(tmp_path / "new", split, model_of(), config={**asdict(TINY), "twist": 1})
    with pytest.raises(UserError, match="the checkpoint has twist, which this model.py does not know"):
        scoring.main(["--checkpoint", str(run)])


# ---------------------------------------------------------------------------------------------
# Intervals and comparisons

def test_wilson_interval():
    low, high = results.wilson(0.1, 10)     # 1 of 10, from the formula in closed form
    assert (low, high) == pytest.approx((0.017876, 0.404150), abs=1e-5)
    assert results.wilson(0.0, 400)[1] == pytest.approx(0.0095119, abs=1e-6)
    assert results.wilson(1.0, 400)[1] == pytest.approx(1.0)


def results_file(folder, right, data="d"):
    folder.mkdir()
    right = np.array(right, bool)
    np.savez(folder / "right.npz", row=np.arange(len(right)), right=right, data=data)
    content = {"metrics": {"exact_acc": float(right.mean())},
               "intervals": {"exact_acc": [0, 1, len(right), "puzzles"]}}
    (folder / "results.json").write_text(json.dumps(content))
    return str(folder / "results.json")


def test_compare(tmp_path, capsys):
    a = results_file(tmp_path / "a", [1] * 50 + [0] * 50)
    b = results_file(tmp_path / "b", [1] * 48 + [0] * 2 + [1] * 12 + [0] * 38)
    assert not scoring.main(["--compare", a, b])
    printed = capsys.readouterr().out
    z = 0.10 / (0.55 * 0.45 * 2 / 100) ** 0.5
    assert f"z = {z:.3f}, one-sided p = {NormalDist().cdf(-z):.4g}" in printed, printed
    tail = sum(np.array([1, 14, 91]).tolist()) / 2 ** 14      # 12 or more of 14 for B
    assert f"only A right 2, only B right 12; exact one-sided p = {tail:.4g}" in printed, printed
    other = results_file(tmp_path / "c", [1] * 100, data="other")
    scoring.main(["--compare", a, other])
    assert "McNemar: needs" in capsys.readouterr().out
    with pytest.raises(UserError, match="--min-exact does nothing with --compare; leave it out"):
        scoring.main(["--compare", a, b, "--min-exact", "0.5"])
    with pytest.raises(UserError, match="nowhere.json not found; --compare takes results.json"):
        scoring.main(["--compare", a, str(tmp_path / "nowhere.json")])


# ---------------------------------------------------------------------------------------------
# Which checkpoint fits which dataset; published format

def test_arc_results(tmp_path, arc_dir, capsys):
    split = Split(arc_dir, "test")
    run = save_run(tmp_path / "run", split, arc_model(split))
    scoring.main(["--checkpoint", str(run), "--batch-size", "4"])
    results = read(run)
    assert [k for k in results["metrics"]][:2] == ["pass@1", "pass@2"]
    intervals = {name: i[2:] for name, i in results["intervals"].items()}
    assert intervals == {"pass@2 of test inputs": [4, "test inputs"]}
    submission = read(run, "submission.json")
    assert {name: len(tests) for name, tests in submission.items()} == {"task0": 1, "task1": 2, "task2": 1}
    assert all(test.keys() == {"attempt_1", "attempt_2"} for tests in submission.values() for test in tests)
    scoring.main(["--checkpoint", str(run), "--max-aug", "1"])
    part = read(run, "part-results.json")
    assert part["metrics"]["n"] == 8 and part["part"] == "1 augmentations a puzzle"
    assert results["metrics"]["n"] == 12
    assert metrics_of(arc_model(split), split, 5)["pass@2"] == results["metrics"]["pass@2"]


def test_right_answers_pass(tmp_path, arc_dir, monkeypatch):
    split = Split(arc_dir, "test")
    inputs, labels, _ = split.gather(np.arange(len(split)))
    for right in (True, False):
        def think(model, asked, ids, steps, *noise, right=right):
            rows = [next((i for i, known in enumerate(inputs) if np.array_equal(known, row)), 0)
                    for row in asked.numpy()]
            tokens = torch.from_numpy(labels[rows].clip(0)).long()
            logits = torch.nn.functional.one_hot(tokens if right else tokens * 0 + 2, 12).float()
            for _ in range(steps):
                yield logits, torch.zeros(len(rows), 2)
        monkeypatch.setattr(scoring, "think", think)
        assert metrics_of(arc_model(split), split, 4)["pass@2"] == float(right)


def test_unknown_answers_are_submitted_and_not_scored(tmp_path, capsys):
    """Kaggle's hidden test set: no solutions, no pass@K, every test input in submission.json."""
    source = tmp_path / "arc"
    source.mkdir()
    runs.arc_dir(source)        # writes the files of a subset "evaluation"
    (source / "arc-agi_evaluation_solutions.json").unlink()
    runs.arc.main(["--source", str(source), "--subsets", "evaluation", "--num-aug", "2",
                   "--output-dir", str(tmp_path / "hidden")])
    split = Split(tmp_path / "hidden", "test")
    run = save_run(tmp_path / "run", split, arc_model(split))
    capsys.readouterr()
    assert scoring.main(["--checkpoint", str(run), "--halt"]) == 0
    assert scoring.main(["--checkpoint", str(run)]) == 0
    assert "pass@" not in capsys.readouterr().out
    results, submission = read(run), read(run, "submission.json")
    assert results["metrics"] == {"n": 0} and results["intervals"] == {}
    assert {name: len(tests) for name, tests in submission.items()} == {"task0": 1, "task1": 2, "task2": 1}


def test_dataset_with_other_puzzles_is_refused(tmp_path, arc_dir):
    split = Split(arc_dir, "test")
    run = save_run(tmp_path / "run", split, arc_model(split), identity="0" * 64)
    with pytest.raises(UserError, match="not those the checkpoint was trained on.*--reset-puzzle-emb"):
        scoring.main(["--checkpoint", str(run)])
    scoring.main(["--checkpoint", str(run), "--reset-puzzle-emb"])
    mean = arc_model(split)
    mean.puzzle_emb[:] = mean.puzzle_emb.mean(0)
    expected = metrics_of(mean, split, 12)["lm_loss"]
    assert read(run)["metrics"]["lm_loss"] == pytest.approx(expected, rel=1e-5)


def test_published_table_of_another_size_is_refused(tmp_path, arc_dir):
    model = model_of(replace(ARC_CFG, num_puzzles=5))
    torch.save(hub.to_published(model.cfg, model.state_dict()), tmp_path / "step_1")
    flags = ["--checkpoint", str(tmp_path / "step_1"), "--data", str(arc_dir), "--num-heads", "2",
             "--dtype", "float32"]
    with pytest.raises(UserError, match="does not say --H-cycles and --L-cycles"):
        scoring.main(flags)
    flags += ["--H-cycles", "1", "--L-cycles", "1"]
    with pytest.raises(UserError, match="table has 5 rows, .* has 10 identifiers; .*--reset-puzzle-emb"):
        scoring.main(flags)
    with pytest.raises(UserError, match="unknown extra"):
        content = torch.load(tmp_path / "step_1")
        content["_orig_mod.model.inner.extra"] = torch.zeros(1)
        torch.save(content, tmp_path / "step_2")
        scoring.main(["--checkpoint", str(tmp_path / "step_2"), *flags[2:]])


def test_another_task_is_refused(tmp_path, split, arc_dir):
    run = save_run(tmp_path / "run", split, model_of())
    with pytest.raises(UserError, match="seq_len 900, the checkpoint 16"):
        scoring.main(["--checkpoint", str(run), "--data", str(arc_dir)])


# ---------------------------------------------------------------------------------------------
# Pictures, regression, two processes

def test_the_slow_puzzle_is_wrong_the_longest_and_right_in_the_end(split):
    seen = scoring.slow_puzzle(Oracle(), split, 8)
    wrong = seen.wrong.any(-1).tolist()
    assert wrong == sorted(wrong, reverse=True) and not wrong[-1]
    assert np.array_equal(seen.boards[-1], seen.label)
    needs = [Oracle.needs(None, row) for row in split.gather(np.arange(8))[0]]
    assert sum(wrong) == max(needs) - 1


def test_regression(tmp_path):
    rng = np.random.RandomState(0)
    mask = np.arange(16) < np.arange(4, 13)[:, None]
    arrays = rng.randn(9, 16, 2).astype(np.float32), rng.randn(9, 16, 1).astype(np.float32), mask
    write_dataset(tmp_path / "numbers", {"train": arrays, "test": arrays})
    split = Split(tmp_path / "numbers", "test")
    model = model_of(replace(TINY, vocab_size=0, input_dim=2, target_dim=1, halt_tolerance=2.0))
    expected = naive(model, split)
    run = save_run(tmp_path / "run", split, model)
    scoring.main(["--checkpoint", str(run), "--show", "3", "--save-preds", "--batch-size", "4"])
    results = read(run)
    for name in ("mae", "within_tolerance", "regression_loss", "q_halt_acc"):
        assert results["metrics"][name] == pytest.approx(expected[name], rel=1e-5), name
    assert 0 < results["metrics"]["within_tolerance"] < 1
    assert list(results["intervals"]) == ["within_tolerance"]
    assert np.load(run / "predictions.npz")["preds"].shape == (9, 16, 1)
    assert png_size(run / "show.png")[0] == 1200


def test_two_processes_give_the_figures_of_one(tmp_path, arc_dir):
    split = Split(arc_dir, "test")
    run = save_run(tmp_path / "run", split, arc_model(split))
    flags = ["--checkpoint", str(run), "--batch-size", "5", "--device", "cpu"]
    scoring.main([*flags, "--output", str(tmp_path / "one")])
    flags += ["--output", tmp_path / "two"]
    process = torchrun(*flags, launcher=["--standalone"], script=ROOT / "eval.py")
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6) and two["about"]["device"] == "2 x cpu"
    assert (tmp_path / "one/submission.json").read_text() == (tmp_path / "two/submission.json").read_text()


def test_a_table_of_runs_with_mean_and_spread(tmp_path, capsys):
    for i, exact in enumerate((0.5, 0.7)):
        line = f"RESULT preset=mini exact_acc={exact:.4f} n=9 steps=3 train_pflop=0.1 train_s=2.5 device=cpu"
        (tmp_path / f"run{i}").mkdir()
        records = [{"event": "start", "step": 0, "settings": {"seed": i}},
                   {"event": "result", "step": 3, "line": line}]
        (tmp_path / f"run{i}" / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert not results.main([str(tmp_path / f"run{i}") for i in range(2)])
    out = capsys.readouterr().out
    assert re.search(r"run1 +1 +exact_acc +0.7000 +3 +0.1 +2\n", out), out
    assert out.endswith("mini: exact_acc 0.6000, standard deviation 0.1414, 2 runs\n"), out
    assert max(map(len, out.splitlines())) <= 80
    with pytest.raises(UserError, match="none has no RESULT in its log.jsonl"):
        results.main([str(tmp_path / "none")])
