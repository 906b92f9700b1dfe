"""eval.py: scoring, compute at test time, results, which checkpoint fits which dataset."""
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import eval as scoring
from data import Split, UserError, write_dataset
from model import TRM, Batch, Config, act_loss, build, from_published, load_file, metric_names, save_file, \
    to_published
from prepare import arc, maze, sudoku

ROOT = Path(__file__).resolve().parent.parent
ALONE = scoring.World(0, 1, torch.device("cpu"))
TINY = Config(vocab_size=6, seq_len=16, hidden_size=32, num_heads=2, num_layers=1, mixer="mlp", pos_encodings="none",
              puzzle_emb_len=1, puzzle_emb_ndim=32, H_cycles=1, L_cycles=1, halt_max_steps=4, dtype="float32")


def boards(n, seed=0):
    """(2, n, 16): 4x4 Sudokus and their answers."""
    rng = np.random.RandomState(seed)
    return np.array([sudoku.make_puzzle(rng, 4)[:2] for _ in range(n)]).swapaxes(0, 1)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sudoku-4x4"
    write_dataset(folder, {"train": boards(8), "test": boards(22, seed=1)}, 6, {"builder": "sudoku", "size": 4})
    return folder


@pytest.fixture(scope="module")
def split(data_dir):
    return Split(data_dir, "test")


def model_of(cfg=TINY, seed=0):
    """Random weights; a q head that differs between rows."""
    model = TRM(cfg, torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        model.q_head.normal_(generator=torch.Generator().manual_seed(seed))
        model.q_bias.zero_()
        model.puzzle_emb.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def save_run(folder, split, model, **changes):
    """A run folder as train.py leaves it."""
    content = {"config": asdict(model.cfg), "model": model.state_dict(), "ema": None, "identity": split.identity,
               "recipe": split.recipe, "data": [str(d) for d in split.dirs], "data_test": [str(d) for d in split.dirs],
               "settings": {"preset": "mini"}, "step": 10, **changes}
    save_file(folder / "step_00000010.ckpt", content)
    (folder / "latest.txt").write_text("step_00000010.ckpt\n")
    return folder


class Oracle(TRM):
    """Solves 4x4 Sudokus and, when `needs` says so, only after some steps; q_halt tells truly whether it is right.

    State y: feature 0 the tokens, 1 the number of steps, 2 what noise made of 0.
    """
    noise_helps = False

    def __init__(self, cfg=TINY):
        super().__init__(cfg, torch.Generator().manual_seed(0))
        self.y0.zero_()
        self.eval()

    def embed(self, inputs, rows):
        x = torch.zeros(len(inputs), self.cfg.length, self.cfg.hidden_size)
        x[:, 1:, 0] = inputs
        return x

    def improve(self, x, y, z):
        y = y.clone()
        y[..., 0] = x[..., 0]
        y[..., 1] += 1
        self.calls = getattr(self, "calls", 0) + 1
        return y, z

    def needs(self, tokens):
        return 1 + int(tokens.sum()) % 4        # steps until it knows

    def knows(self, tokens, state):
        return state[0, 2] > 0.5 if self.noise_helps else round(float(state[0, 1])) >= self.needs(tokens)

    def heads(self, y):
        logits = torch.zeros(len(y), 16, 6)
        q = torch.full((len(y), 2), -3.0)
        for i, state in enumerate(y):
            tokens = state[1:, 0].round().int().tolist()
            bits = sudoku.solve([1 << t - 2 if t > 1 else 0 for t in tokens], 4, [[1, 2, 4, 8]] * 16) if min(tokens) else None
            answer = [b.bit_length() + 1 for b in bits] if bits else tokens
            right = self.knows(np.array(tokens), state)
            logits[i, range(16), answer if right else answer[::-1]] = 9
            q[i, 0] = 3 if right else -3
        return logits, q


# ---------------------------------------------------------------------------------------------
# Scoring

def naive(model, split):
    """Metrics by model.step and act_loss, row by row."""
    totals = 0
    for i in range(len(split)):
        batch = Batch(*(torch.from_numpy(a) for a in split.gather(np.array([i]))), torch.zeros(1, dtype=torch.int32))
        carry = model.empty_carry(batch)
        with torch.no_grad():
            for _ in range(model.cfg.halt_max_steps):
                carry, logits, q = model.step(carry, batch)
            totals = totals + act_loss(model.cfg, carry, logits, q)[1]
    return dict(zip(metric_names(model.cfg), (totals / len(split)).tolist()))


@pytest.mark.parametrize("batch_size", [5, 22, 30])
def test_evaluate_equals_a_loop_of_supervision_steps(split, batch_size):
    model = model_of()
    expected = naive(model, split)
    found = scoring.evaluate(model, split, ALONE, batch_size, progress=False)
    assert found["n"] == 22
    for name in ("cell_acc", "exact_acc", "q_halt_acc", "steps", "lm_loss", "q_halt_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), (name, found, expected)


class Together(scoring.World):
    """Rank `rank` of several whose values were collected before: stands in for the collective."""
    def gather_objects(self, value):
        return self.values


def test_ranks_share_the_rows(split):
    model, parts = model_of(), []
    for rank in range(3):
        parts.append(scoring.score(model, split, scoring.World(rank, 3, ALONE.device), 8, progress=False, keep_preds=True))
    world = Together(0, 3, ALONE.device)
    world.values = parts
    together = scoring.gather_scores(world, None)
    alone = scoring.score(model, split, ALONE, 8, progress=False, keep_preds=True)
    assert [len(p.examples) for p in parts] == [8, 8, 6]
    for name, a, b in zip(alone._fields, alone, together):
        assert np.array_equal(a, b), name
    few = scoring.score(model, split, scoring.World(2, 3, ALONE.device), 8, np.arange(9), progress=False, keep_preds=True)
    assert few.examples.shape == (0,) and few.preds.shape == (0, 16) and few.history.shape == (0, 4)


def test_limit_and_steps(split):
    model = model_of()
    found = scoring.evaluate(model, split, ALONE, 8, limit=5, steps=7, progress=False)
    longer = scoring.evaluate(build(replace(TINY, halt_max_steps=7), model.state_dict()).eval(), split, ALONE, 5, limit=5, progress=False)
    assert found == pytest.approx(longer) and found["n"] == 5 and found["steps"] == 7


def test_rows_without_labels_do_not_count(tmp_path):
    questions, answers = boards(4)
    answers = answers.copy()
    answers[2] = 0
    write_dataset(tmp_path / "d", {"train": (questions, answers), "test": (questions, answers)}, 6, {})
    scores = scoring.score(model_of(), Split(tmp_path / "d", "test"), ALONE, 3, progress=False)
    assert scores.examples.tolist() == [0, 1, 3]


def test_thinking_leaves_the_gradient_mode_alone(split):
    inputs, _, ids = (torch.from_numpy(a) for a in split.gather(np.arange(2)))
    for logits, q in scoring.think(model_of(), inputs, ids, 2):
        assert torch.is_grad_enabled() and not logits.requires_grad and not q.requires_grad


class NoSync(TorchDispatchMode):
    """Counts what makes the host wait for the device."""
    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


def test_supervision_steps_do_not_wait_for_the_device(split):
    model = model_of()
    with NoSync() as mode:
        scoring.score(model, split, ALONE, 8, progress=False)
    assert mode.waits == 0


def test_history_tells_when_each_row_was_right(split):
    scores = scoring.score(Oracle(), split, ALONE, 6, progress=False, keep_preds=True)
    inputs, labels, _ = split.gather(scores.examples)
    needs = np.array([Oracle.needs(None, row) for row in inputs])
    assert np.array_equal(scores.history, np.arange(1, 5) >= needs[:, None])
    assert np.array_equal(scores.preds, labels) and scores.right.all() and (scores.steps == 4).all()


def test_result_line():
    line = scoring.result_line("mini", {"exact_acc": 0.998, "cell_acc": 0.99957, "lm_loss": 1.0, "n": 1000}, 870, 58.149, "cpu")
    assert line == "RESULT preset=mini exact_acc=0.9980 cell_acc=0.9996 n=1000 steps=870 train_s=58.1 device=cpu"
    line = scoring.result_line("arc1", {"pass@1": 0.4, "pass@2": 0.45, "exact_acc": 0.3, "cell_acc": 0.8, "n": 9}, 1, 2, "cuda:0")
    assert line.startswith("RESULT preset=arc1 pass@1=0.4000 pass@2=0.4500 exact_acc=0.3000 ")
    assert "regression_loss=0.5000" in scoring.result_line("x", {"regression_loss": 0.5, "n": 1}, 1, 1, "cpu")


# ---------------------------------------------------------------------------------------------
# Compute at test time

def test_halting_refills_slots_and_scores_every_row_once(split):
    model = Oracle()
    full = scoring.score(model, split, ALONE, 6, progress=False, keep_preds=True)
    fixed_calls, model.calls = model.calls, 0
    scores = scoring.score(model, split, ALONE, 6, effort=scoring.Effort(halt=0.0), progress=False, keep_preds=True)
    inputs = split.gather(np.arange(22))[0]
    needs = np.array([Oracle.needs(None, row) for row in inputs])
    assert np.array_equal(scores.steps, needs) and np.array_equal(scores.examples, np.arange(22))
    assert np.array_equal(scores.preds, full.preds) and scores.right.all()
    assert fixed_calls == 16 and -(-needs.sum() // 6) <= model.calls <= needs.sum() // 6 + 4, (model.calls, needs.sum())
    never = scoring.score(model, split, ALONE, 6, effort=scoring.Effort(halt=99.0), progress=False)
    assert (never.steps == 4).all() and never.right.all()


def test_halting_with_a_real_model_equals_all_steps_when_nothing_halts(split):
    model = model_of()
    full = scoring.score(model, split, ALONE, 6, progress=False, keep_preds=True)
    halted = scoring.score(model, split, ALONE, 6, effort=scoring.Effort(halt=1e9), progress=False, keep_preds=True)
    assert np.array_equal(full.preds, halted.preds) and np.allclose(full.q, halted.q, atol=1e-5)
    assert np.allclose(full.loss, halted.loss, rtol=1e-5)


def test_rollouts_take_the_surest_try(split):
    model = Oracle()
    model.noise_helps = True        # right only where noise pushed a state up
    one = scoring.score(model, split, ALONE, 6, progress=False)
    many = scoring.score(model, split, ALONE, 6, effort=scoring.Effort(rollouts=12, noise=0.5), progress=False)
    again = scoring.score(model, split, scoring.World(1, 2, ALONE.device), 6, effort=scoring.Effort(rollouts=12, noise=0.5), progress=False)
    assert not one.right.any() and many.right.mean() > 0.8
    assert np.array_equal(many.right[6:12], again.right[:6])    # the noise does not depend on the number of ranks


class Biased(Oracle):
    """Wrong on the boards as they are, right on most of their copies."""
    def knows(self, tokens, state):
        return int((tokens * np.arange(16)).sum()) % 3 > 0


def test_augmented_copies_are_undone_and_voted(split):
    plain = scoring.score(Biased(), split, ALONE, 6, progress=False)
    voted = scoring.score(Biased(), split, ALONE, 6, effort=scoring.Effort(augment=8), progress=False, keep_preds=True)
    assert plain.right.mean() < 0.9 and voted.right.mean() == 1.0, (plain.right.mean(), voted.right.mean())
    assert np.array_equal(voted.preds, split.gather(np.arange(22))[1])


def test_maze_copies_are_undone():
    cfg = replace(TINY, seq_len=25)
    board = np.random.RandomState(0).randint(1, 6, 25)
    for k in range(1, 8):
        relabel, cells = scoring.symmetries(cfg, None, 1, k)
        copy = relabel[0][board[cells[0]]]
        assert np.array_equal(copy.reshape(5, 5), maze.dihedral(board.reshape(5, 5), k))
        assert np.array_equal(np.argsort(relabel[0])[copy[np.argsort(cells[0])]], board)


# ---------------------------------------------------------------------------------------------
# The command line

def test_results_of_a_run_folder(tmp_path, split, capsys):
    run = save_run(tmp_path / "run", split, model_of())
    out = tmp_path / "out"
    assert scoring.main(["--checkpoint", str(run), "--output", str(out), "--steps", "6", "--save-preds", "--show", "4",
                         "--batch-size", "8"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    expected = scoring.evaluate(model_of(), split, ALONE, 8, steps=6, progress=False)
    assert results["metrics"] == pytest.approx(expected)
    assert len(results["exact_acc_by_step"]) == 6 and results["part"] is None
    low, high, n, unit = results["intervals"]["exact_acc"]
    assert (n, unit) == (22, "puzzles") and low <= results["metrics"]["exact_acc"] + 1e-9 <= high
    assert results["about"]["with puzzle table"] - results["about"]["parameters"] == TINY.puzzle_emb_ndim
    for text in ("exact_acc", "95% interval", "of 22 puzzles", "right by step", "rows/s", "float32"):
        assert text in printed, printed
    preds = np.load(out / "predictions.npz")
    assert {k: v.shape for k, v in preds.items()} == {"inputs": (22, 16), "labels": (22, 16), "preds": (22, 16),
                                                      "puzzle_identifiers": (22,), "q_halt_logits": (22,)}
    assert (preds["preds"] == preds["labels"]).all(1).mean() == pytest.approx(results["metrics"]["exact_acc"])
    for name in ("steps.png", "show.png"):
        assert png_width(out / name) == 1200


def png_width(path):
    header = path.read_bytes()[:20]
    assert header[1:4] == b"PNG"
    return int.from_bytes(header[16:20], "big")


def test_min_exact_limit_and_default_output(tmp_path, split, capsys):
    run = save_run(tmp_path / "run", split, model_of())
    assert scoring.main(["--checkpoint", str(run / "step_00000010.ckpt"), "--limit", "5", "--min-exact", "0.9"]) == 1
    captured = capsys.readouterr()
    assert "a part: the first 5 of 22 rows" in captured.out and "--min-exact 0.9" in captured.err
    assert json.loads((run / "results.json").read_text())["part"] == "the first 5 of 22 rows"
    assert scoring.main(["--checkpoint", str(run), "--min-exact", "0"]) == 0


def test_averaged_weights_are_scored(tmp_path, split):
    last, average = model_of(seed=1), model_of(seed=2)
    run = save_run(tmp_path / "run", split, last, ema=dict(average.named_parameters()))
    losses = {}
    for flags, model in (((), average), (("--no-ema",), last)):
        scoring.main(["--checkpoint", str(run), *flags])
        mixed = build(TINY, {**last.state_dict(), **dict(model.named_parameters())}).eval()
        losses[flags] = json.loads((run / "results.json").read_text())["metrics"]["lm_loss"]
        assert losses[flags] == pytest.approx(scoring.evaluate(mixed, split, ALONE, 30, progress=False)["lm_loss"])
    assert losses[()] != losses["--no-ema",]


def test_overrides_reach_the_model(tmp_path, split):
    run = save_run(tmp_path / "run", split, model_of())
    scoring.main(["--checkpoint", str(run), "--H-cycles", "2", "--L-cycles", "3", "--dtype", "bfloat16"])
    results = json.loads((run / "results.json").read_text())
    other = build(replace(TINY, H_cycles=2, L_cycles=3, dtype="bfloat16"), model_of().state_dict()).eval()
    assert results["about"]["precision"] == "bfloat16"
    assert results["metrics"] == pytest.approx(scoring.evaluate(other, split, ALONE, 30, progress=False), rel=1e-2)


def test_halting_reports_the_full_run_too(tmp_path, split, capsys):
    run = save_run(tmp_path / "run", split, model_of())
    scoring.main(["--checkpoint", str(run), "--halt", "--halt-threshold", "-1.5", "--batch-size", "8"])
    assert "without halting" in capsys.readouterr().out
    assert 1 <= json.loads((run / "results.json").read_text())["metrics"]["steps"] <= 4


@pytest.mark.parametrize("flags, message", [
    ([], "give one of --checkpoint, --hf and --bench"),
    (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt not found"),
    (["--checkpoint", "."], "holds no latest.txt"),
    (["--checkpoint", "x", "--limit", "0"], "--limit 0 is below 1"),
    (["--checkpoint", "x", "--halt", "--augment", "2"], "only one of them"),
    (["--checkpoint", "x", "--gif", "a.gif"], "--gif does nothing without --solve"),
    (["--checkpoint", "x", "--rollouts", "3"], "tries differ by noise only"),
    (["--checkpoint", "x", "--halt-threshold", "1"], "does nothing without --halt"),
    (["--checkpoint", "RUN", "--max-aug", "3"], "--max-aug does nothing for"),
    (["--checkpoint", "RUN", "--pool-votes"], "--pool-votes does nothing for"),
    (["--hf", "nonsense"], "is no owner/repo"),
])
def test_bad_flags_are_one_line(tmp_path, split, flags, message):
    save_run(tmp_path / "run", split, model_of())
    with pytest.raises(UserError, match=message) as error:
        scoring.main([str(tmp_path / "run") if f == "RUN" else f for f in flags])
    assert "\n" not in str(error.value)


def test_damaged_checkpoint_is_refused_by_name(tmp_path, split):
    path = save_run(tmp_path / "run", split, model_of()) / "step_00000010.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="step_00000010.ckpt is damaged"):
        scoring.main(["--checkpoint", str(tmp_path / "run")])


def test_help_is_one_screen(capsys):
    with pytest.raises(SystemExit):
        scoring.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 80, (len(lines), max(lines, key=len))


# ---------------------------------------------------------------------------------------------
# Intervals and comparisons

def test_wilson_interval():
    low, high = scoring.wilson(0.1, 10)     # 1 of 10, from the formula in closed form
    assert (low, high) == pytest.approx((0.017876, 0.404150), abs=1e-5)
    assert scoring.wilson(0.0, 400)[1] == pytest.approx(0.0095119, abs=1e-6) and scoring.wilson(1.0, 400)[1] == pytest.approx(1.0)


def results_file(folder, right, data="d"):
    folder.mkdir()
    right = np.array(right, bool)
    np.savez(folder / "right.npz", row=np.arange(len(right)), right=right, data=data)
    (folder / "results.json").write_text(json.dumps({
        "metrics": {"exact_acc": float(right.mean())}, "intervals": {"exact_acc": [0, 1, len(right), "puzzles"]}}))
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
    with pytest.raises(UserError, match="no results.json"):
        scoring.main(["--compare", a, str(tmp_path / "nowhere.json")])


# ---------------------------------------------------------------------------------------------
# Which checkpoint fits which dataset; published format

ARC_CFG = replace(TINY, vocab_size=12, seq_len=900, mixer="attn", pos_encodings="rope", halt_max_steps=2)


@pytest.fixture(scope="module")
def arc_dir(tmp_path_factory):
    """Three small tasks, one of them with two test inputs, two augmentations each."""
    rng, source = np.random.RandomState(0), tmp_path_factory.mktemp("arc")

    def pair():
        grid = rng.randint(0, 10, (rng.randint(2, 5), rng.randint(2, 5)))
        return {"input": grid.tolist(), "output": grid[::-1].tolist()}
    tasks = {f"task{i}": {"train": [pair(), pair()], "test": [pair() for _ in range(1 + (i == 1))]} for i in range(3)}
    solutions = {name: [e.pop("output") for e in task["test"]] for name, task in tasks.items()}
    (source / "arc-agi_evaluation_challenges.json").write_text(json.dumps(tasks))
    (source / "arc-agi_evaluation_solutions.json").write_text(json.dumps(solutions))
    arc.main(["--source", str(source), "--subsets", "evaluation", "--num-aug", "2", "--output-dir", str(source / "built")])
    return source / "built"


def arc_model(split, seed=0):
    return model_of(replace(ARC_CFG, num_puzzles=split.meta["num_puzzle_identifiers"]), seed)


def test_arc_results(tmp_path, arc_dir, capsys):
    split = Split(arc_dir, "test")
    run = save_run(tmp_path / "run", split, arc_model(split))
    scoring.main(["--checkpoint", str(run), "--batch-size", "4"])
    results = json.loads((run / "results.json").read_text())
    assert [k for k in results["metrics"]][:2] == ["pass@1", "pass@2"]
    assert results["intervals"]["pass@2"][2:] == [3, "tasks"] and results["intervals"]["pass@2 of test inputs"][2:] == [4, "test inputs"]
    submission = json.loads((run / "submission.json").read_text())
    assert {name: len(tests) for name, tests in submission.items()} == {"task0": 1, "task1": 2, "task2": 1}
    assert all(test.keys() == {"attempt_1", "attempt_2"} for tests in submission.values() for test in tests)
    scoring.main(["--checkpoint", str(run), "--max-aug", "1"])
    part = json.loads((run / "results.json").read_text())
    assert part["metrics"]["n"] == 8 and part["part"] == "1 augmentations a puzzle" and results["metrics"]["n"] == 12
    assert scoring.evaluate(arc_model(split), split, ALONE, 5, progress=False)["pass@2"] == results["metrics"]["pass@2"]


def test_right_answers_pass_and_votes_are_pooled_only_when_asked(tmp_path, arc_dir, monkeypatch):
    split = Split(arc_dir, "test")
    labels = split.gather(np.arange(len(split)))[1]
    model = arc_model(split)
    right = {"step": True}

    def think(model, inputs, ids, steps, *noise):
        for _ in range(steps):
            rows = [next(i for i in range(len(labels)) if np.array_equal(split.gather(np.array([i]))[0][0], row)) if row.any() else 0
                    for row in inputs.numpy()]
            tokens = torch.from_numpy(np.where(labels[rows] < 0, 0, labels[rows])).long()
            logits = torch.nn.functional.one_hot(tokens if right["step"] else tokens * 0 + 2, 12).float()
            yield logits, torch.zeros(len(rows), 2)
    monkeypatch.setattr(scoring, "think", think)
    run = save_run(tmp_path / "run", split, model)
    save_file(run / "later.ckpt", load_file(run / "step_00000010.ckpt"))
    found = []
    for step, name, flags in ((True, "step_00000010", []), (True, "step_00000010", ["--pool-votes"]), (False, "later", []),
                              (False, "later", ["--pool-votes"]), (False, "later", ["--pool-votes"])):
        right["step"] = step
        scoring.main(["--checkpoint", str(run / f"{name}.ckpt"), *flags])
        found.append(json.loads((run / "results.json").read_text())["metrics"]["pass@2"])
    assert found == [1.0, 1.0, 0.0, 1.0, 1.0]      # the same evaluation again replaces its own votes


def test_dataset_with_other_puzzles_is_refused(tmp_path, arc_dir):
    split = Split(arc_dir, "test")
    run = save_run(tmp_path / "run", split, arc_model(split), identity="0" * 64)
    with pytest.raises(UserError, match="not those the checkpoint was trained on.*--reset-puzzle-emb"):
        scoring.main(["--checkpoint", str(run)])
    scoring.main(["--checkpoint", str(run), "--reset-puzzle-emb"])
    mean = arc_model(split)
    mean.puzzle_emb[:] = mean.puzzle_emb.mean(0)
    expected = scoring.evaluate(mean, split, ALONE, 12, progress=False)["lm_loss"]
    assert json.loads((run / "results.json").read_text())["metrics"]["lm_loss"] == pytest.approx(expected, rel=1e-5)


def test_published_table_of_another_size_is_refused(tmp_path, arc_dir):
    split = Split(arc_dir, "test")
    model = model_of(replace(ARC_CFG, num_puzzles=5))
    torch.save(to_published(model.cfg, model.state_dict()), tmp_path / "step_1")
    flags = ["--checkpoint", str(tmp_path / "step_1"), "--data", str(arc_dir), "--num-heads", "2", "--dtype", "float32"]
    with pytest.raises(UserError, match="does not say --H-cycles and --L-cycles"):
        scoring.main(flags)
    flags += ["--H-cycles", "1", "--L-cycles", "1"]
    with pytest.raises(UserError, match="table has 5 rows, .* has 10 identifiers; .*--reset-puzzle-emb"):
        scoring.main(flags)
    with pytest.raises(UserError, match="unexpected|lacks|has unknown|do not fit"):
        content = torch.load(tmp_path / "step_1")
        content["_orig_mod.model.inner.extra"] = torch.zeros(1)
        torch.save(content, tmp_path / "step_2")
        scoring.main(["--checkpoint", str(tmp_path / "step_2"), *flags[2:]])


def test_another_task_is_refused(tmp_path, split, arc_dir):
    run = save_run(tmp_path / "run", split, model_of())
    with pytest.raises(UserError, match="seq_len 900, the checkpoint 16"):
        scoring.main(["--checkpoint", str(run), "--data", str(arc_dir)])


@pytest.mark.parametrize("mixer, pos", [("mlp", "none"), ("attn", "rope"), ("attn", "learned")])
def test_export_and_import_give_equal_logits(tmp_path, split, mixer, pos):
    cfg = replace(TINY, mixer=mixer, pos_encodings=pos, puzzle_emb_len=16, num_layers=2)
    model, average = model_of(cfg, 1), model_of(cfg, 2)
    run = save_run(tmp_path / "run", split, model, ema=dict(average.named_parameters()))
    assert scoring.main(["--checkpoint", str(run), "--export", str(tmp_path / "step_10")]) == 0
    content = torch.load(tmp_path / "step_10", weights_only=True)
    assert all(key.startswith("_orig_mod.model.inner.") for key in content)
    back = build(*from_published(content, dict(seq_len=16, num_heads=2, H_cycles=1, L_cycles=1, halt_max_steps=4, dtype="float32")))
    model.load_state_dict(dict(average.named_parameters()), strict=False)
    inputs, labels, ids = (torch.from_numpy(a) for a in split.gather(np.arange(8)))
    for (a, qa), (b, qb) in zip(scoring.think(model, inputs, ids, 4), scoring.think(back.eval(), inputs, ids, 4)):
        assert torch.equal(a, b) and torch.equal(qa, qb)
    flags = ["--checkpoint", str(tmp_path / "step_10"), "--data", str(split.dirs[0]), "--H-cycles", "1", "--L-cycles", "1",
             "--num-heads", "2", "--dtype", "float32", "--steps", "4"]
    scoring.main(flags)
    scores = scoring.evaluate(model, split, ALONE, 22, steps=4, progress=False)
    assert json.loads((tmp_path / "results.json").read_text())["metrics"]["lm_loss"] == pytest.approx(scores["lm_loss"], rel=1e-5)


# ---------------------------------------------------------------------------------------------
# Pictures, regression, two processes

def test_puzzle_picture(tmp_path, split):
    path = scoring.puzzle_picture(Oracle(replace(TINY, halt_max_steps=16)), split, tmp_path / "p.png", 8)
    assert png_width(path) == 1200


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
    results = json.loads((run / "results.json").read_text())
    for name in ("mae", "within_tolerance", "regression_loss", "q_halt_acc"):
        assert results["metrics"][name] == pytest.approx(expected[name], rel=1e-5), name
    assert 0 < results["metrics"]["within_tolerance"] < 1 and list(results["intervals"]) == ["within_tolerance"]
    assert np.load(run / "predictions.npz")["preds"].shape == (9, 16, 1) and png_width(run / "show.png") == 1200
    with pytest.raises(UserError, match="this checkpoint is of another task"):
        scoring.main(["--checkpoint", str(run), "--solve", "123"])


def test_two_processes_give_the_figures_of_one(tmp_path, arc_dir):
    split = Split(arc_dir, "test")
    run = save_run(tmp_path / "run", split, arc_model(split))
    flags = ["--checkpoint", str(run), "--batch-size", "5", "--device", "cpu"]
    scoring.main([*flags, "--output", str(tmp_path / "one")])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "eval.py"),
                           *flags, "--output", str(tmp_path / "two")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6) and two["about"]["device"] == "2 x cpu"
    assert (tmp_path / "one/submission.json").read_text() == (tmp_path / "two/submission.json").read_text()
