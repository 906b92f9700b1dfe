"""eval.py: scoring, test-time compute, results, which checkpoint fits which dataset."""

import json
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
import runs
import torch
from runs import ALONE, ARC_CFG, ROOT, TINY, Oracle, altered, arc_model, boards, model_of, png_size, save_run
from runs import torchrun

import eval as scoring
from data import Split
from model import Batch, act_loss, build_model
from prepare import arc, maze, write_dataset
from tools import common, hub
from tools.common import UserError


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return Split(runs.sudoku_dir(tmp_path_factory.mktemp("data") / "sudoku-4x4"), "test")


@pytest.fixture(scope="module")
def arc_dir(tmp_path_factory):
    return runs.arc_dir(tmp_path_factory.mktemp("arc"))


def metrics_of(model, split, batch_size, **how):
    return scoring.evaluate(model, split, ALONE, batch_size, **how).metrics


def score(model, split, batch_size, world=ALONE, examples=None, **compute):
    """scoring.score of all rows; compute: fields of TestTimeCompute."""
    examples = np.arange(len(split)) if examples is None else examples
    return scoring.score(model, split, world, batch_size, examples, scoring.TestTimeCompute(**compute))


def ranks_of(n):
    return [common.World(rank, n, ALONE.device) for rank in range(n)]


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def run(folder, *flags):
    return scoring.main(["--checkpoint", str(folder), *map(str, flags)])


# ---------------------------------------------------------------------------------------------
# Scoring


def naive(model, split):
    """Metrics by model.step and act_loss, row by row."""
    totals = {}
    for i in range(len(split)):
        row = (torch.from_numpy(array) for array in split.gather(np.array([i])))
        batch = Batch(*row, torch.zeros(1, dtype=torch.int32))
        carry = model.initial_carry(batch)
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


def test_ranks_share_the_rows(split):
    model = model_of()
    parts = [score(model, split, 8, world) for world in ranks_of(3)]
    assert [len(part.examples) for part in parts] == [8, 7, 7]
    for column, joined_column in zip(score(model, split, 8), scoring.joined(parts)):
        assert np.array_equal(column, joined_column)
    few = score(model, split, 8, ranks_of(3)[2], np.arange(2))
    assert few.examples.shape == (0,) and few.preds.shape == (0, 16) and few.exact_by_step.shape == (0, 4)


def test_limit_and_steps(split):
    found = metrics_of(model_of(), split, 8, limit=5, compute=scoring.TestTimeCompute(steps=7))
    longer = build_model(replace(TINY, halt_max_steps=7), model_of().state_dict()).eval()
    assert found == pytest.approx(metrics_of(longer, split, 5, limit=5))
    assert found["n"] == 5 and found["steps"] == 7


def test_rows_without_labels_do_not_count(tmp_path):
    questions, answers = np.copy(boards(4))
    answers[2] = 0
    write_dataset(tmp_path / "d", {"train": (questions, answers), "test": (questions, answers)}, 6)
    split = Split(tmp_path / "d", "test")
    scores, found = score(model_of(), split, 3), metrics_of(model_of(), split, 3)
    assert scores.n_labels.tolist() == [16, 16, 0, 16] and found["n"] == 3
    assert found["cell_acc"] == pytest.approx(scores.cell_acc[[0, 1, 3]].mean())


def test_supervision_steps_leave_the_gradient_mode_alone(split):
    inputs, _, ids = (torch.from_numpy(array) for array in split.gather(np.arange(2)))
    for logits, q in scoring.supervision_steps(model_of(), inputs, ids, 2):
        assert torch.is_grad_enabled() and not logits.requires_grad and not q.requires_grad


def needs_of(split):
    """(N,) number of steps after which Oracle solves each board."""
    return np.array([Oracle.needs(None, row) for row in split.gather(np.arange(len(split)))[0]])


def test_the_hardest_solved_puzzle(split):
    seen = scoring.hardest_solved_puzzle(Oracle(), split, 8)
    wrong = seen.wrong.any(-1).tolist()
    assert wrong == sorted(wrong, reverse=True) and not wrong[-1]
    assert np.array_equal(seen.answers[-1], seen.label)
    assert sum(wrong) == needs_of(split)[:8].max() - 1


# ---------------------------------------------------------------------------------------------
# Test-time compute


def test_halting_refills_slots_and_scores_every_row_once(split):
    model, needs = Oracle(), needs_of(split)
    full = score(model, split, 6)
    assert np.array_equal(full.exact_by_step, np.arange(1, 5) >= needs[:, None])
    assert np.array_equal(full.preds, split.gather(full.examples)[1]) and full.exact.all()
    fixed_calls, model.calls = model.calls, 0
    scores = score(model, split, 6, halt_threshold=0.0)
    work = needs.sum()
    assert np.array_equal(scores.exact_by_step, np.ones((22, 1)))
    assert np.array_equal(scores.steps, needs) and np.array_equal(scores.examples, np.arange(22))
    assert np.array_equal(scores.preds, full.preds) and scores.exact.all()
    assert fixed_calls == 16 and -(-work // 6) <= model.calls <= work // 6 + 4, (model.calls, work)
    empty = score(model, split, 8, ranks_of(3)[2], np.arange(2), halt_threshold=0.0)
    assert empty.preds.shape == (0, 16) and empty.exact_by_step.shape == (0, 1)


def test_halting_with_a_real_model_equals_all_steps_if_nothing_halts(split):
    full, halted = score(model_of(), split, 6), score(model_of(), split, 6, halt_threshold=1e9)
    assert np.array_equal(full.preds, halted.preds) and np.allclose(full.q_halt, halted.q_halt, atol=1e-5)
    assert np.allclose(full.loss, halted.loss, rtol=1e-5) and (halted.steps == 4).all()


def test_rollouts_keep_the_try_with_the_highest_q_halt(split):
    model = Oracle()
    model.noise_helps = True  # it solves a board only if noise increases a state
    one, many = score(model, split, 6), score(model, split, 6, rollouts=12, noise=0.5)
    assert not one.exact.any() and many.exact.mean() > 0.8


def test_noise_depends_on_example_and_rollout_alone(split):
    model, how = model_of(), {"rollouts": 3, "noise": 0.5}
    found = score(model, split, 6, **how)
    assert not np.array_equal(found.q_halt, score(model, split, 6).q_halt)
    parts = [score(model, split, 4, world, **how) for world in ranks_of(2)]
    for other in (score(model, split, 22, **how), scoring.joined(parts)):
        assert np.allclose(found.q_halt, other.q_halt, atol=1e-5)
        assert np.array_equal(found.preds, other.preds)
    more = score(model, split, 6, rollouts=5, noise=0.5)
    assert (more.q_halt >= found.q_halt).all() and (more.q_halt == found.q_halt).any()


# ---------------------------------------------------------------------------------------------
# Mazes


def all_answers(rng):
    """A 4x4 maze (S,) with walls in a quarter of the cells, and all answers (N, S) with a path anywhere, also
    with a wall or an end that became path, free or wall."""
    question = np.where(rng.rand(16) < 0.25, maze.WALL, maze.FREE).astype(np.uint8)
    question[rng.choice(16, 2, replace=False)] = maze.START, maze.GOAL
    free = np.flatnonzero(question == maze.FREE)
    answers = question[None].repeat(2 ** len(free), 0)
    answers[:, free] = np.array(list(product((maze.FREE, maze.PATH), repeat=len(free))))
    changed = answers[rng.randint(len(answers), size=2000)]
    cells = rng.choice(np.flatnonzero(question != maze.FREE), 2000)
    changed[np.arange(2000), cells] = rng.choice([maze.WALL, maze.FREE, maze.PATH], 2000)
    return question, np.concatenate((answers, changed))


def test_optimal_paths_equal_a_search():
    rng, n_labels, n_optimal = np.random.RandomState(0), [], 0
    for _ in range(12):
        question, answers = all_answers(rng)
        questions = question[None].repeat(len(answers), 0)
        expected = maze.check(questions, answers, 4)
        n_labels.append(expected.sum())
        for label in answers[expected][:2]:  # any shortest path is a label
            arrays = (questions, label[None].repeat(len(answers), 0), answers)
            found = scoring.optimal_paths(*map(torch.from_numpy, arrays)).numpy()
            assert np.array_equal(found, expected), (question.reshape(4, 4), label.reshape(4, 4))
            n_optimal += found.sum()
    assert max(n_labels) > 2 and n_optimal > 20, (n_labels, n_optimal)


def test_optimal_path_acc(tmp_path, monkeypatch):
    """One question three times; answers: the label, another shortest path, none."""
    question = np.array([3, 2, 2, 2, 1, 2, 2, 2, 4], np.uint8)  # a wall in the middle of 3x3
    paths = question[None].repeat(3, 0)
    paths[0, [1, 2, 5]] = paths[1, [3, 6, 7]] = maze.PATH
    boards = question[None].repeat(3, 0), paths[[0, 0, 0]]
    write_dataset(tmp_path / "maze", {"train": boards, "test": boards}, 6, {"builder": "maze"})
    answers = torch.nn.functional.one_hot(torch.from_numpy(paths).long(), 6).float()

    def answer(model, inputs, puzzle_ids, *how):
        yield answers[: len(inputs)], torch.zeros(len(inputs), 2)

    monkeypatch.setattr(scoring, "supervision_steps", answer)
    split = Split(tmp_path / "maze", "test")
    folder = save_run(tmp_path / "run", split, model_of(replace(TINY, seq_len=9)))
    run(folder, "--batch-size", 3)
    results = read(folder)
    assert results["metrics"]["exact_acc"] == pytest.approx(1 / 3)
    assert results["metrics"]["optimal_path_acc"] == pytest.approx(2 / 3)
    low, high = results["95% interval of optimal_path_acc"]
    assert low < 2 / 3 < high
    assert "=0.3333 optimal_path_acc=0.6667 " in scoring.result_line("x", results["metrics"], 1, 2, 2, "cpu")
    run(folder, "--batch-size", 2, "--halt")  # the model itself: steps without a row that ends


# ---------------------------------------------------------------------------------------------
# The command line


def test_results_of_a_run_folder(tmp_path, split, capsys):
    folder, out = save_run(tmp_path / "run", split, model_of()), tmp_path / "out"
    assert run(folder, "--output", out, "--steps", 6, "--save-preds", "--show", 4, "--batch-size", 8) == 0
    printed, results = capsys.readouterr().out, read(out)
    expected = metrics_of(model_of(), split, 8, compute=scoring.TestTimeCompute(steps=6))
    assert results["metrics"] == pytest.approx(expected)
    assert len(results["exact after each step"]) == 6 and results["config"] == asdict(TINY)
    assert results["test_time_compute"] == scoring.TestTimeCompute(steps=6)._asdict()
    low, high = results["95% interval of exact_acc"]
    assert low <= results["metrics"]["exact_acc"] + 1e-4 <= high
    for name in ("exact_acc", "95% interval of exact_acc", "exact after each step", "seconds", "averaged"):
        assert f"\n{name}" in f"\n{printed}", printed
    saved = np.load(out / "predictions.npz")
    labels = split.gather(saved["examples"])[1]
    assert saved["preds"].shape == labels.shape == (22, 16) and saved["q_halt"].shape == (22,)
    assert (saved["preds"] == labels).all(1).mean() == pytest.approx(results["metrics"]["exact_acc"])
    assert png_size(out / "show.png")[0] == 1200
    assert {p.name for p in out.iterdir()} == {"results.json", "predictions.npz", "show.png"}


def test_min_exact_limit_and_default_output(tmp_path, split, capsys):
    folder = save_run(tmp_path / "run", split, model_of())
    assert run(folder / "step_00000010.ckpt", "--limit", 5, "--min-exact", 0.9) == 1
    captured = capsys.readouterr()
    assert "5 of 22" in captured.out and "below --min-exact 0.9" in captured.err
    assert read(folder, "part-results.json")["rows"] == "5 of 22"
    assert run(folder, "--min-exact", 0, "--halt", "--halt-threshold", -1.5) == 0
    assert 1 <= read(folder)["metrics"]["steps"] <= 4
    assert run(folder, "--rollouts", 2) == 0
    assert read(folder)["test_time_compute"]["noise"] == 0.3


def test_a_part_never_replaces_the_whole(tmp_path, arc_dir):
    split = Split(arc_dir, "test")
    folder, names = save_run(tmp_path / "run", split, arc_model(split)), ("results.json", "submission.json")
    assert run(folder) == 0
    whole = {name: (folder / name).read_bytes() for name in names}
    for part in (["--limit", 1], ["--max-aug", 0]):
        assert run(folder, *part) == 0
        assert {name: (folder / name).read_bytes() for name in names} == whole, part
        assert all((folder / f"part-{name}").exists() for name in names)


def test_an_output_that_cannot_be_written_is_found_before_scoring(tmp_path, split, monkeypatch):
    folder = save_run(tmp_path / "run", split, model_of())
    monkeypatch.setattr(scoring, "score", lambda *args: pytest.fail("it was scored first"))
    with pytest.raises(UserError, match="cannot write .*latest.txt/out"):
        run(folder, "--output", folder / "latest.txt" / "out")


def test_a_full_disk_costs_the_files_and_a_closed_stdout_the_output(tmp_path, split, monkeypatch, capsys):
    folder = save_run(tmp_path / "run", split, model_of())

    def fail(*args):
        raise UserError("cannot write: No space left on device")

    with monkeypatch.context() as m:
        m.setattr(scoring, "write_json", fail)
        with pytest.raises(UserError, match="No space left"):
            run(folder)
    assert "exact_acc" in capsys.readouterr().out
    monkeypatch.setattr(scoring, "print_results", fail)
    with pytest.raises(UserError):
        run(folder)
    assert read(folder)["metrics"]["n"] == 22


def test_averaged_weights_are_scored(tmp_path, split):
    last, average = model_of(seed=1), model_of(seed=2)
    folder = save_run(tmp_path / "run", split, last, ema=dict(average.named_parameters()))
    for flag, model in (("--ema", average), ("--no-ema", last)):
        run(folder, flag)
        mixed = build_model(TINY, {**last.state_dict(), **dict(model.named_parameters())}).eval()
        expected = metrics_of(mixed, split, 30)["lm_loss"]
        assert read(folder)["metrics"]["lm_loss"] == pytest.approx(expected, rel=1e-6), flag


def test_overrides_reach_the_model(tmp_path, split):
    folder = save_run(tmp_path / "run", split, model_of())
    run(folder, "--H-cycles", 2, "--L-cycles", 3)
    cfg = replace(TINY, H_cycles=2, L_cycles=3)
    other = build_model(cfg, model_of().state_dict()).eval()
    assert read(folder)["config"] == asdict(cfg)
    assert read(folder)["metrics"] == pytest.approx(metrics_of(other, split, 30))


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "pass either --checkpoint or --hf"),
        (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt not found"),
        (["--checkpoint", "."], "has no checkpoint"),
        (["--checkpoint", "x", "--limit", "0"], "argument --limit: 0 is out of range; it must be at least 1"),
        (["--checkpoint", "x", "--halt", "--rollouts", "2"], "not allowed with argument"),
        (["--hf", "nonsense"], "is not OWNER/REPO"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        scoring.main(flags)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# Intervals, the RESULT line


def test_wilson_interval():
    low, high = scoring.wilson_interval(0.1, 10)  # 1 of 10, from the formula in closed form
    assert (low, high) == pytest.approx((0.017876, 0.404150), abs=1e-5)
    assert scoring.wilson_interval(1.0, 400)[1] == pytest.approx(1.0)


def test_result_line():
    metrics = {"exact_acc": 0.998, "cell_acc": 0.99957, "lm_loss": 1.0, "n": 386000}
    assert scoring.result_line("mini", metrics, 870, 2.175e12, 58.149, "cpu") == (
        "RESULT preset=mini exact_acc=0.9980 cell_acc=0.9996 n=386000 steps=870 train_pflop=0.002175 "
        "train_s=58.1 device=cpu"
    )
    metrics = {"n": 9, "exact_acc": 0.3, "pass@2": 0.45, "pass@1": 0.4, "regression_loss": 0.5}
    line = scoring.result_line("arc1", metrics, 1, 2, 2, "cuda:0")
    expected = (
        "RESULT preset=arc1 pass@1=0.4000 pass@2=0.4500 exact_acc=0.3000 regression_loss=0.5000 n=9 steps=1 "
    )
    assert line.startswith(expected)


# ---------------------------------------------------------------------------------------------
# Which checkpoint fits which dataset


def test_arc_results(tmp_path, arc_dir):
    split = Split(arc_dir, "test")
    folder = save_run(tmp_path / "run", split, arc_model(split))
    run(folder, "--batch-size", 4)
    results, submission = read(folder), read(folder, "submission.json")
    assert list(results["metrics"])[:2] == ["pass@1", "pass@2"] and results["metrics"]["n"] == 12
    assert [name for name in results if "interval" in name] == [f"95% interval of {scoring.POOLED}"]
    assert {name: len(tests) for name, tests in submission.items()} == {"task0": 1, "task1": 2, "task2": 1}
    run(folder, "--max-aug", 1)
    assert read(folder, "part-results.json")["metrics"]["n"] == 8
    assert metrics_of(arc_model(split), split, 5)["pass@2"] == results["metrics"]["pass@2"]


@pytest.mark.parametrize("correct", [True, False])
def test_correct_answers_pass(arc_dir, monkeypatch, correct):
    split = Split(arc_dir, "test")
    inputs, labels, _ = split.gather(np.arange(12))
    tokens = torch.from_numpy(labels.clip(0)).long() if correct else torch.full((12, 900), 2)

    def answer(model, questions, puzzle_ids, *how):
        assert np.array_equal(questions.numpy(), inputs)
        yield torch.nn.functional.one_hot(tokens, 12).float(), torch.zeros(12, 2)

    monkeypatch.setattr(scoring, "supervision_steps", answer)
    assert metrics_of(arc_model(split), split, 12)["pass@2"] == float(correct)


def test_hidden_answers_are_submitted_and_not_scored(tmp_path, capsys):
    """Kaggle's hidden test set: no solutions, no pass@K, every test input in submission.json."""
    source = tmp_path / "arc"
    source.mkdir()
    runs.arc_dir(source)  # writes the files of a subset "evaluation"
    (source / "arc-agi_evaluation_solutions.json").unlink()
    flags = ["--source", str(source), "--subsets", "evaluation", "--num-aug", "2"]
    arc.main([*flags, "--output-dir", str(tmp_path / "hidden")])
    split = Split(tmp_path / "hidden", "test")
    folder = save_run(tmp_path / "run", split, arc_model(split))
    capsys.readouterr()
    assert run(folder, "--halt") == run(folder) == 0
    assert "pass@" not in capsys.readouterr().out
    results, submission = read(folder), read(folder, "submission.json")
    assert results["metrics"] == {"n": 0} and not any("interval" in name for name in results)
    assert {name: len(tests) for name, tests in submission.items()} == {"task0": 1, "task1": 2, "task2": 1}


def test_a_dataset_with_other_puzzles_is_refused(tmp_path, arc_dir):
    split = Split(arc_dir, "test")
    folder = save_run(tmp_path / "run", split, arc_model(split), puzzle_ids_sha256="0" * 64)
    with pytest.raises(UserError, match="other puzzles .*--reset-puzzle-emb"):
        run(folder)
    run(folder, "--reset-puzzle-emb")
    mean = arc_model(split)
    mean.puzzle_emb[:] = mean.puzzle_emb.mean(0)
    expected = metrics_of(mean, split, 12)["lm_loss"]
    assert read(folder)["metrics"]["lm_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_published_table_of_another_size_is_refused(tmp_path, arc_dir):
    model = model_of(replace(ARC_CFG, num_puzzles=5))
    torch.save(hub.to_published(model.cfg, model.state_dict()), tmp_path / "step_1")
    flags = ["--data", arc_dir, "--num-heads", 2, "--dtype", "float32", "--H-cycles", 1, "--L-cycles", 1]
    with pytest.raises(UserError, match="has other puzzles than the checkpoint.*--reset-puzzle-emb"):
        run(tmp_path / "step_1", *flags)
    assert run(tmp_path / "step_1", *flags, "--reset-puzzle-emb") == 0


def test_another_task_and_a_damaged_checkpoint_are_refused(tmp_path, split, arc_dir):
    folder = save_run(tmp_path / "run", split, model_of())
    with pytest.raises(UserError, match="does not have the checkpoint's seq_len 16; change --data"):
        run(folder, "--data", arc_dir)
    altered(folder / "step_00000010.ckpt")
    with pytest.raises(UserError, match="step_00000010.ckpt cannot be read .* it is damaged"):
        run(folder)


def test_a_checkpoint_of_the_former_version(tmp_path, split):
    """3244f72 wrote `identity`, and a config with q_continue."""
    content = {"config": {**asdict(TINY), "q_continue": False}, "puzzle_ids_sha256": None}
    same, other = split.puzzle_ids_sha256, "0" * 64
    assert run(save_run(tmp_path / "a", split, model_of(), identity=same, **content)) == 0
    folder = save_run(tmp_path / "b", split, model_of(), identity=other, **content)
    with pytest.raises(UserError, match="other puzzles"):
        run(folder)


def test_regression(tmp_path):
    rng = np.random.RandomState(0)
    mask = np.arange(16) < np.arange(4, 13)[:, None]
    arrays = rng.randn(9, 16, 2).astype(np.float32), rng.randn(9, 16, 1).astype(np.float32), mask
    write_dataset(tmp_path / "numbers", {"train": arrays, "test": arrays})
    split = Split(tmp_path / "numbers", "test")
    model = model_of(replace(TINY, vocab_size=0, input_dim=2, target_dim=1, halt_tolerance=2.0))
    folder, expected = save_run(tmp_path / "run", split, model), naive(model, split)
    run(folder, "--show", 3, "--save-preds", "--batch-size", 4)
    metrics = read(folder)["metrics"]
    for name in ("mae", "within_tolerance", "regression_loss", "q_halt_acc"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
    assert 0 < metrics["within_tolerance"] < 1 and "95% interval of within_tolerance" in read(folder)
    assert np.load(folder / "predictions.npz")["preds"].shape == (9, 16, 1)
    assert png_size(folder / "show.png")[0] == 1200


def test_two_processes_give_the_scores_of_one(tmp_path, arc_dir):
    split = Split(arc_dir, "test")
    folder = save_run(tmp_path / "run", split, arc_model(split))
    flags = ["--checkpoint", str(folder), "--batch-size", "5", "--device", "cpu"]
    scoring.main([*flags, "--output", str(tmp_path / "one")])
    flags += ["--output", tmp_path / "two"]
    process = torchrun(*flags, launcher=["--standalone"], script=ROOT / "eval.py")
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6) and two["device"] == "2 x cpu"
    assert (tmp_path / "one/submission.json").read_text() == (tmp_path / "two/submission.json").read_text()
