"""Canvases: crops of ARC grids, the model on them, training with one canvas per step, evaluation, voting."""

import json
import signal
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ALONE, ARC_CFG, ROOT, arc_model, go, last, log_of, model_of, run_ranks, same_run, steps_of
from runs import unlike, without_curves, write_source_of_sizes

import eval as scoring
import prepare
import train
from data import Split, assign_canvases, canvas_order, crop_to_canvas, extent, paste_top_left
from model import flops
from prepare import arc
from tools.common import UserError

CANVASES = [6, 9, 11, 16, 30]
USED = [6, 9, 11, 16]  # no task of the dataset below needs 30
FLAGS = (
    "--preset arc1 --hidden-size 32 --puzzle-emb-ndim 32 --puzzle-emb-len 1 --num-heads 2 --H-cycles 1 "
    "--L-cycles 1 --num-layers 1 --halt-max-steps 2 --global-batch-size 32 --epochs 12 --eval-interval 6 "
    "--eval-limit 8 --lr-warmup-steps 2 --log-interval 1 --dtype float32 --no-compile --device cpu "
    "--allow-cpu --skip-sanity-checks"
).split()
SOLUTIONS = "arc-agi_evaluation_solutions.json"


def build(source, folder):
    argv = ["--source", str(source), "--subsets", "evaluation", "--num-aug", "2", "--output-dir", str(folder)]
    arc.main(argv)
    return folder


@pytest.fixture(scope="session")
def sized(tmp_path_factory):
    """An ARC dataset of twelve tasks, three for each canvas in USED; two augmentations."""
    folder = tmp_path_factory.mktemp("sized")
    write_source_of_sizes(folder, [4, 5, 3, 8, 7, 6, 10, 9, 9, 15, 13, 12])
    return build(folder, folder / "built")


def splits(folder, canvases=CANVASES):
    train_split, test = Split(folder, "train"), Split(folder, "test")
    if canvases:
        assign_canvases(train_split, test, canvases)
    return train_split, test


def canvases_of(split):
    """(N,) canvas of every example."""
    return split.canvas_of(np.arange(len(split)))


def largest_side(pairs):
    """Of all grids in the pairs of a task."""
    grids = [grid for pair in pairs for grid in pair.values()]
    return max(max(len(grid), len(grid[0])) for grid in grids)


def flags(folder, run_dir, *more):
    return [*FLAGS, "--data", str(folder), "--run-dir", str(run_dir), *map(str, more)]


# ---------------------------------------------------------------------------------------------
# Crops


def test_extent_is_that_of_the_tokens_asked_for():
    grids = np.zeros((3, 30, 30), np.int32)
    grids[0, 4:7, 2:12] = 5
    grids[0, 7, 2:12] = 1  # end lines
    grids[0, 4:7, 12] = 1
    grids[1] = 11
    grids = grids.reshape(3, -1)
    assert np.array(extent(grids, 2)).T.tolist() == [[4, 2, 3, 10], [0, 0, 30, 30], [0, 0, 0, 0]]
    assert np.array(extent(grids, 1)).T.tolist()[0] == [4, 2, 4, 11]


def corners_of(grids, crops, canvas):
    """Corners (row, column) where all crops are windows of their grids."""
    grids = np.reshape(grids, (-1, 30, 30))
    crops = np.reshape(crops, (-1, canvas, canvas))
    corners = []
    for row in range(31 - canvas):
        for col in range(31 - canvas):
            if (grids[:, row : row + canvas, col : col + canvas] == crops).all():
                corners.append((row, col))
    return corners


@pytest.mark.parametrize("where", ["first", "last", "random"])
def test_a_crop_lies_inside_the_grid_and_around_the_colours(sized, where):
    split, _ = splits(sized)
    n = len(split)
    choices = {"first": np.zeros((n, 2)), "last": np.full((n, 2), 1 - 1e-12)}
    offsets = choices.get(where, np.random.default_rng(0).random((n, 2)))
    seen = set()
    for i, canvas in enumerate(canvases_of(split)):
        inputs, labels, _ = split.gather(np.array([i]))
        crops = crop_to_canvas(inputs, labels, canvas, offsets[i : i + 1])
        (top,), (left,), (height,), (width,) = extent(np.maximum(inputs, labels), 2)
        corners = corners_of([inputs, labels], crops, canvas)
        rows = range(top + height - canvas, top + 1)
        columns = range(left + width - canvas, left + 1)
        around = [(row, col) for row, col in corners if row in rows and col in columns]
        assert around, f"{canvas}: colours of {height} x {width} at {top}, {left}; the crop is at {corners}"
        seen.update(around)
    assert where != "random" or len(seen) > 20, f"only {len(seen)} corners in {n} crops"


def test_an_evaluation_crops_at_the_top_left_and_ignores_the_labels(sized):
    _, test = splits(sized)
    for canvas in CANVASES:
        examples = np.flatnonzero(canvases_of(test) <= canvas)
        whole, cropped = test.gather(examples), test.gather(examples, canvas=canvas)
        for before, after in zip(whole[:2], cropped[:2]):
            expected = before.reshape(-1, 30, 30)[:, :canvas, :canvas]
            assert np.array_equal(expected.reshape(len(examples), -1), after)
        if canvas < 30:
            elsewhere = np.roll(whole[1], 30 * 9 + 9, axis=1)
            assert np.array_equal(crop_to_canvas(whole[0], elsewhere, canvas)[0], cropped[0])


# ---------------------------------------------------------------------------------------------
# Assignment


def test_a_task_gets_the_smallest_canvas_for_its_demonstrations_and_test_inputs(sized):
    """Including end lines, which the largest canvas need not hold. All augmentations share it."""
    source = json.loads((sized.parent / "arc-agi_evaluation_challenges.json").read_text())
    for split in splits(sized):
        for group, canvas in enumerate(split.canvases):
            first, last = split.group_indices[group : group + 2]
            (task,) = {arc.parse_name(split.names[i])[0] for i in split.puzzle_identifiers[first:last]}
            side = largest_side(source[task]["train"] + source[task]["test"])
            assert canvas == min(c for c in CANVASES if c > side), (task, canvas, side)
    assert set(splits(sized, [15])[1].canvases) == {15}


def test_test_outputs_do_not_influence_the_canvas(sized, tmp_path):
    """With outputs of 30 x 30 instead of the true ones: the same canvases, and cut answers are wrong."""
    for file in sized.parent.glob("*_challenges.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    solutions = json.loads((sized.parent / SOLUTIONS).read_text())
    huge = {task: [np.full((30, 30), 3).tolist() for _ in outputs] for task, outputs in solutions.items()}
    (tmp_path / SOLUTIONS).write_text(json.dumps(huge))
    found = []
    for folder in (sized, build(tmp_path, tmp_path / "built")):
        train_split, test = splits(folder)
        canvas_of_task = {}
        for i, canvas in enumerate(canvases_of(test)):
            name = test.names[test.gather(np.array([i]))[2][0]]
            canvas_of_task[arc.parse_name(name)[0]] = canvas
        found.append((canvas_of_task, train_split.canvases.tolist()))
    assert found[0] == found[1]
    evaluation = scoring.evaluate(arc_model(test), test, ALONE, 4)
    cut = canvases_of(test) < 30
    assert evaluation.metrics["cut_answers"] == cut.sum() > 9, evaluation.metrics
    assert np.array_equal(~evaluation.scores.fits_canvas, cut)
    assert not evaluation.scores.exact[cut].any() and not evaluation.scores.exact_by_step[cut].any()


def test_impossible_canvases_are_refused(sized, boards, tmp_path):
    with pytest.raises(UserError, match="--canvases 11: a grid has side 15; add 15"):
        splits(sized, [6, 11])
    with pytest.raises(UserError, match="--canvases works for ARC only"):
        assign_canvases(Split(boards, "train"), Split(boards, "test"), [4])
    for change in (["--mixer", "mlp"], ["--score-mod", "grid"]):
        with pytest.raises(UserError, match="--canvases needs --mixer attn and --score-mod none"):
            go("--preset", "arc1-fast", *change)
    with pytest.raises(UserError, match="--eval-interval 2: so few epochs do not fill a batch"):
        go(*flags(sized, tmp_path, "--canvases", *CANVASES, "--eval-interval", 2))


# ---------------------------------------------------------------------------------------------
# The model on a canvas


@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
def test_a_canvas_gives_the_logits_of_a_grid_with_limited_attention(positions):
    S, canvas = 100, 7
    cells = torch.arange(S)
    inside = (cells // 10 < canvas) & (cells % 10 < canvas)
    visible = torch.cat((torch.ones(2, dtype=torch.bool), inside))
    cfg = replace(ARC_CFG, seq_len=S, pos_encodings=positions, puzzle_emb_len=2, L_cycles=2, num_layers=2)
    limited, model = model_of(cfg), model_of(cfg)
    limited.score_mod = lambda score, b, h, i, j: torch.where(visible[j], score, -torch.inf)
    grids = torch.randint(0, 12, (3, S), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ids = torch.zeros(3, dtype=torch.int32)
    *_, (on_grid, q_grid) = scoring.supervision_steps(limited, grids, ids, 3)
    *_, (on_canvas, q_canvas) = scoring.supervision_steps(model, grids[:, inside].contiguous(), ids, 3)
    *_, (unlimited, _) = scoring.supervision_steps(model, grids, ids, 3)
    difference = (on_grid[:, inside] - on_canvas).abs().max()
    assert difference < 1e-4 and (q_grid - q_canvas).abs().max() < 1e-4, f"by {difference:.2e}"
    without_limit = (unlimited[:, inside] - on_canvas).abs().max()
    assert without_limit > 0.01, f"the limit changes logits by {without_limit:.2e} only"


# ---------------------------------------------------------------------------------------------
# One canvas per step

ARC1_SIZES = {11: 1309, 16: 1181, 21: 820, 30: 678}


@pytest.mark.parametrize("sizes", [ARC1_SIZES, {30: 1, 6: 1, 9: 2}, {6: 6, 9: 6, 11: 6}, {0: 7}], ids=str)
def test_the_canvas_with_the_largest_deficit_is_next(sizes):
    """share * step - steps so far, in fractions; the smaller canvas on a tie. The order is the same again."""
    total = sum(sizes.values())
    steps = dict.fromkeys(sorted(sizes), 0)
    order = list(islice(canvas_order(sizes), 2 * total))
    assert order == list(islice(canvas_order(dict(reversed(sizes.items()))), 2 * total))
    for t, canvas in enumerate(order, 1):
        deficits = {c: Fraction(n * t, total) - steps[c] for c, n in sizes.items()}
        largest = max(deficits.values())
        assert canvas == min(c for c in sizes if deficits[c] == largest), (t, canvas, deficits)
        steps[canvas] += 1
        if t % total == 0:
            assert steps == {c: n * t // total for c, n in sizes.items()}, t


def test_every_canvas_draws_all_of_its_tasks_equally_often(sized):
    """A step takes all its rows from the tasks of one canvas, and no tasks from others."""
    split, _ = splits(sized)
    args = train.settings(flags(sized, "run", "--canvases", *CANVASES, "--global-batch-size", 16), ALONE)[0]
    cfg = train.config_of(args, split.meta)
    run = train.Run(args, cfg, ALONE, canvas_sizes=split.examples_per_canvas())
    assert run.canvas_sizes == dict.fromkeys(USED, 6)
    drawn = {canvas: [] for canvas in USED}
    for canvas, batch, _ in islice(train.batches(run, split), 60):
        assert batch.inputs.shape == batch.labels.shape == (16, canvas**2)
        drawn[canvas] += [arc.parse_name(split.names[i])[0] for i in batch.puzzle_ids]
    tasks = set()
    for canvas, names in drawn.items():
        counts = {name: names.count(name) for name in set(names)}
        assert len(names) == 15 * 16 and len(counts) == 3, (canvas, counts)
        assert min(counts.values()) > 0.8 * max(counts.values()), (canvas, counts)
        tasks |= counts.keys()
    assert len(tasks) == 12


@pytest.fixture(scope="session")
def four(sized, tmp_path_factory):
    """(folder, output) of an undisturbed run of 9 steps with four canvases."""
    folder = tmp_path_factory.mktemp("four")
    argv = flags(sized, folder / "run", "--canvases", *CANVASES, "--checkpoint-interval", 4)
    codes, text = run_ranks(folder, argv)
    assert codes == [0], text
    return folder / "run", text


def test_a_run_has_one_carry_and_one_sampler_per_canvas(four):
    folder, text = four
    checkpoint = last(folder)
    shapes = {canvas: tuple(carry[0].shape) for canvas, carry in checkpoint["carry"].items()}
    assert shapes == {canvas: (32, 1 + canvas**2, 32) for canvas in USED}
    assert list(checkpoint["samplers"]) == USED and checkpoint["step"] == 9
    assert steps_of(folder, "train") == list(range(1, 10)) and steps_of(folder, "val") == [5, 9]
    assert str(dict.fromkeys(USED, 6)) in text, text
    # FLOPs are summed over the steps
    cfg = train.config_from_dict(checkpoint["config"])
    total = 0
    for canvas in (*USED, *USED, USED[0]):  # the order of the 9 steps
        total += 32 * flops(replace(cfg, seq_len=canvas**2)).train_step
    assert checkpoint["train_flops"] == total
    assert f"train_pflop={total / 1e15:.4g} " in text, (text, total)


def test_canvas_30_equals_no_canvases_to_the_bit(sized, tmp_path, monkeypatch):
    without_curves(monkeypatch)
    runs = []
    for name, more in ("plain", []), ("canvas", ["--canvases", 30]):
        argv = flags(sized, tmp_path / name, "--global-batch-size", 4, "--eval-limit", 99, *more)
        assert go(*argv, "--max-steps", 3) == 0
        checkpoint = last(tmp_path / name)
        for key in ("carry", "samplers"):
            ((canvas, checkpoint[key]),) = checkpoint[key].items()
            assert canvas == (30 if more else 0)
        runs.append((checkpoint, log_of(tmp_path / name, "train", "val")))
    assert runs[1][1][-1].pop("val/cut_answers") == 0
    assert not unlike(*runs)


@pytest.mark.parametrize("event", [("after update", 6), ("before evaluate", 1)])
def test_a_killed_run_with_four_canvases_resumes_bit_for_bit(four, sized, tmp_path, event):
    argv = flags(sized, "run", "--canvases", *CANVASES, "--checkpoint-interval", 4, "--resume")
    codes, text = run_ranks(tmp_path, argv, hook=(event, signal.SIGKILL))
    assert codes == [-signal.SIGKILL], text
    codes, text = run_ranks(tmp_path, argv)
    assert codes == [0], text
    assert not same_run(four[0], tmp_path / "run")


def test_two_ranks_equal_one_and_may_resume_its_run(four, sized, tmp_path):
    """Losses to 1e-5, because sums over rows have another order."""
    argv = flags(sized, "two", "--canvases", *CANVASES)
    codes, text = run_ranks(tmp_path, argv, 2)
    assert codes == [0, 0], text
    argv = flags(sized, "resumed", "--canvases", *CANVASES, "--max-steps", 6)
    assert run_ranks(tmp_path, argv)[0] == [0]
    codes, text = run_ranks(tmp_path, ["--resume", "resumed", "--max-steps", 9], 2)
    assert codes == [0, 0], text
    for name in ("two", "resumed"):
        one, other = (log_of(folder, "train") for folder in (four[0], tmp_path / name))
        assert len(one) == len(other) == 9
        for a, b in zip(one, other):
            assert abs(a["train/loss"] - b["train/loss"]) < 1e-5, (name, a, b)
        assert last(tmp_path / name)["samplers"] == last(four[0])["samplers"]


# ---------------------------------------------------------------------------------------------
# Evaluation


def test_predictions_are_those_of_the_canvas_in_an_empty_grid(sized):
    _, test = splits(sized)
    model = arc_model(test)
    scores = scoring.evaluate(model, test, ALONE, 5, keep_preds=True).scores
    assert scores.examples.tolist() == list(range(len(test)))
    for i in (0, 7, 20, 31):
        canvas = int(canvases_of(test)[i])
        inputs, _, ids = map(torch.from_numpy, test.gather(np.array([i]), canvas=canvas))
        *_, (logits, _) = scoring.supervision_steps(model, inputs, ids, 2)
        expected = np.zeros((30, 30))
        expected[:canvas, :canvas] = logits[0].argmax(-1).view(canvas, canvas)
        assert np.array_equal(scores.preds[i].reshape(30, 30), expected), i


def test_halting_on_canvases_scores_the_same_rows(sized):
    """With a threshold that no row reaches, the scores are those of a full evaluation."""
    _, test = splits(sized)
    model = arc_model(test)
    full = scoring.evaluate(model, test, ALONE, 5, keep_preds=True)
    compute = scoring.TestTimeCompute(halt_threshold=99.0)
    halted = scoring.evaluate(model, test, ALONE, 5, compute=compute, keep_preds=True)
    assert halted.metrics == full.metrics
    assert np.array_equal(full.scores.preds, halted.scores.preds)


def test_eval_takes_the_canvases_of_the_checkpoint_or_of_its_flag(four, tmp_path, capsys):
    folder = str(four[0])
    for flag, batch_size in ([], 4096 // (1 + 16**2)), (["--canvases", "15", "30"], 4096 // (1 + 30**2)):
        argv = ["--checkpoint", folder, "--device", "cpu", "--output", str(tmp_path), *flag]
        assert scoring.main(argv) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        assert "cut_answers" in results["metrics"]
        assert results["batch size per rank"] == batch_size
    with pytest.raises(UserError, match="--canvases 11: a grid has side 15; add 15"):
        scoring.main(["--checkpoint", folder, "--canvases", "11", "--device", "cpu"])
    capsys.readouterr()


def test_golden_votes_survive_canvases():
    """Published predictions, cropped to the canvas of their task and pasted back, elect the same answers. The
    figures have no demonstrations; the true outputs replace them."""
    folder = Path(__file__).parent / "golden" / "arc_voting"
    golden = json.loads((folder / "golden.json").read_text())
    rows = np.load(folder / "data.npz")
    rows = {name: column[rows["puzzle_identifiers"] > 0] for name, column in rows.items()}  # without padding
    inputs, preds, ids = rows["inputs"], rows["preds"], rows["puzzle_identifiers"]
    names = {int(i): name for i, name in golden["identifiers"].items()}
    canvases = np.zeros(len(inputs), int)
    for i, puzzle_id in enumerate(ids):
        side = largest_side(golden["test_puzzles"][arc.parse_name(names[puzzle_id])[0]]["test"])
        canvases[i] = min(c for c in CANVASES if c >= side)
    pasted = preds.copy()
    for canvas in CANVASES[:-1]:
        chosen = canvases == canvas
        pasted[chosen] = paste_top_left(crop_to_canvas(inputs[chosen], preds[chosen], canvas)[1], 30)
    assert (pasted != preds).any()
    results = []
    for answers in (preds, pasted):
        votes = scoring.ArcVotes(golden["test_puzzles"], names)
        votes.add(inputs, answers, rows["q_halt_logits"], ids, np.arange(len(inputs)))
        votes.merge([votes.votes])
        results.append(votes.result())
    assert results[0] == results[1] and results[0]["pass@2"] > 0, results


# ---------------------------------------------------------------------------------------------
# ARC itself


ARC2_SIZES = {11: 1583, 16: 1485, 21: 1262, 30: 1243}
ARC = [("arc1", ARC1_SIZES, (0.376, 0.475), 4), ("arc2", ARC2_SIZES, (0.426, 0.807), 1)]


@pytest.mark.slow
@pytest.mark.parametrize("preset, sizes, ratios, n_cut", ARC)
def test_canvases_of_arc_save_flops(preset, sizes, ratios, n_cut, tmp_path):
    """FLOPs of training and of an evaluation with the canvases of the -fast presets, as shares of those
    without canvases. Augmentations change no size, so the originals are enough."""
    source = ROOT.parent / "shared" / "arc"
    if not source.exists():
        pytest.skip("needs the files of ARC in ../shared/arc")
    canvases = train.PRESETS[f"{preset}-fast"]["canvases"]
    assert train.PRESETS[f"{preset}-fast"] == {**train.PRESETS[preset], "canvases": canvases}
    dataset = prepare.known_dataset(train.PRESETS[preset]["data"][0])
    arc.main([*dataset.flags, "--source", str(source), "--num-aug", "0", "--output-dir", str(tmp_path / "d")])
    train_split, test = splits(tmp_path / "d", canvases)
    assert train_split.examples_per_canvas() == sizes
    args = train.flags(**train.PRESETS[preset]).parse_args([])
    cfg = train.config_of(args, dataset.shape)
    per_canvas = {canvas: flops(replace(cfg, seq_len=canvas**2)) for canvas in canvases}
    training = sum(n * per_canvas[canvas].train_step for canvas, n in sizes.items()) / sum(sizes.values())
    evaluation = np.mean([per_canvas[canvas].forward for canvas in canvases_of(test)])
    found = training / flops(cfg).train_step, evaluation / flops(cfg).forward
    assert found == pytest.approx(ratios, abs=5e-4)
    _, labels, _ = test.gather(np.arange(len(test)))
    _, _, height, width = extent(labels, 2)
    cut = np.maximum(height, width) > canvases_of(test)
    assert cut.sum() == n_cut
