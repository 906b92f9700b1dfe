"""Canvases: windows of ARC boards, the model on them, training in parts, evaluation, voting."""
import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as scoring
import model as models
import prepare
import train
import vote
from common import UserError
from data import Split, extent, parts_of, put_on_canvases, windows
from model import flops
from prepare import arc
from runs import ALONE, ARC_CFG, arc_model, last, log_of, model_of, run_ranks, same_run, unlike, \
    without_curves, write_source_of_sizes

GOLDEN = Path(__file__).resolve().parent / "golden"
SIDES = [6, 9, 11, 16, 30]
USED = [6, 9, 11, 16]       # no task of the dataset below lies on 30
FLAGS = ("--preset arc1 --hidden-size 32 --puzzle-emb-ndim 32 --puzzle-emb-len 1 --num-heads 2 --H-cycles 1 "
         "--L-cycles 1 --num-layers 1 --halt-max-steps 2 --global-batch-size 32 --epochs 12 "
         "--eval-interval 6 --eval-limit 8 --lr-warmup-steps 2 --log-interval 1 --dtype float32 "
         "--no-compile --device cpu --allow-cpu --skip-sanity-checks").split()


@pytest.fixture(scope="session")
def sized(tmp_path_factory):
    """An ARC dataset of twelve tasks, three of each size up to 6, 9, 11 and 16; two augmentations."""
    folder = tmp_path_factory.mktemp("sized")
    write_source_of_sizes(folder, [4, 5, 3, 8, 7, 6, 10, 9, 9, 15, 13, 12])
    arc.main(["--source", str(folder), "--subsets", "evaluation", "--num-aug", "2",
              "--output-dir", str(folder / "built")])
    return folder / "built"


def splits(folder, canvases=None):
    train_split, test = (Split(folder, name) for name in ("train", "test"))
    if canvases:
        put_on_canvases(train_split, test, canvases)
    return train_split, test


def flags(folder, run_dir, *more):
    return [*FLAGS, "--data", str(folder), "--run-dir", str(run_dir), *map(str, more)]


# ---------------------------------------------------------------------------------------------
# Windows

def test_extent_is_that_of_the_colours_alone():
    canvas = np.zeros((3, 30, 30), np.int32)
    canvas[0, 4:7, 2:12] = 5
    canvas[0, 7, 2:12] = canvas[0, 4:7, 12] = 1     # end lines
    assert [int(x[0]) for x in extent(canvas.reshape(3, -1), 1)] == [4, 2, 4, 11]
    canvas[1] = 11
    assert np.array(extent(canvas.reshape(3, -1))).T.tolist() == [[4, 2, 3, 10], [0, 0, 30, 30],
                                                                  [0, 0, 0, 0]]


@pytest.mark.parametrize("where", ["first", "last", "random"])
def test_a_window_lies_on_the_board_and_holds_both_grids(sized, where):
    """Its cells are those of the board from one corner on: nothing is cut but padding, nothing invented."""
    split, _ = splits(sized, SIDES)
    rng = np.random.default_rng(0)
    starts = set()
    for side in USED:
        rows = np.flatnonzero(split.side_of(np.arange(len(split))) == side)
        boards = split.gather(rows)[:2]
        place = {"first": np.zeros((len(rows), 2)), "last": np.full((len(rows), 2), 1 - 1e-12),
                 "random": rng.random((len(rows), 2))}[where]
        cut = windows(*boards, side, place)
        top, left, height, width = extent(np.maximum(*boards))
        for i in range(len(rows)):
            pair, small = ([a[i].reshape(n, n) for a in kind] for kind, n in ((boards, 30), (cut, side)))
            found = [(r, c) for r in range(31 - side) for c in range(31 - side)
                     if all((b[r:r + side, c:c + side] == s).all() for b, s in zip(pair, small))]
            assert any(r <= top[i] and top[i] + height[i] <= r + side and c <= left[i]
                       and left[i] + width[i] <= c + side for r, c in found), (side, i)
            starts.update((r, c) for r, c in found if side > height[i] and where == "random")
    assert where != "random" or len(starts) > 8, starts


def test_evaluation_takes_the_smallest_start_and_the_side_of_the_board_changes_nothing(sized):
    _, test = splits(sized, SIDES)
    for side in [*USED, 30]:
        rows = np.flatnonzero(test.side_of(np.arange(len(test))) <= side)
        whole, small = test.gather(rows), test.gather(rows, side=side)
        for a, b in zip(whole[:2], small[:2]):
            assert np.array_equal(a.reshape(-1, 30, 30)[:, :side, :side].reshape(len(rows), -1), b)
    assert side == 30 and np.array_equal(whole[0], small[0]) and np.array_equal(whole[2], small[2])


def test_the_side_is_the_smallest_that_holds_demonstrations_and_test_inputs(sized):
    """With their end lines; of a task and all its augmentations, in both splits."""
    source = json.loads((sized.parent / "arc-agi_evaluation_challenges.json").read_text())
    for split in splits(sized, SIDES):
        for group, side in enumerate(split.sides):
            rows = [split.names[i] for i in split.puzzle_identifiers[slice(*split.group_indices[group:][:2])]]
            task, = {arc.parse_name(name)[0] for name in rows}
            grids = [e[k] for key in ("train", "test") for e in source[task][key] for k in e]
            largest = max(max(len(g), len(g[0])) for g in grids)
            assert side == min(s for s in SIDES if s > largest), (task, side, largest)
    assert set(splits(sized, [15])[1].sides) == {15}    # the largest canvas need not hold end lines


def test_choosing_a_side_never_reads_a_test_output(sized, tmp_path):
    """Outputs of 30 x 30 in place of the true ones: the same sides, and answers that are cut are wrong."""
    challenges = "arc-agi_evaluation_challenges.json"
    (tmp_path / challenges).write_text((sized.parent / challenges).read_text())
    solutions = json.loads((sized.parent / "arc-agi_evaluation_solutions.json").read_text())
    huge = {name: [np.full((30, 30), 3).tolist() for _ in tests] for name, tests in solutions.items()}
    (tmp_path / "arc-agi_evaluation_solutions.json").write_text(json.dumps(huge))
    arc.main(["--source", str(tmp_path), "--subsets", "evaluation", "--num-aug", "2",
              "--output-dir", str(tmp_path / "built")])
    sides = [[split.sides[split.group_of(np.arange(len(split)))].tolist() for split in splits(folder, SIDES)]
             for folder in (sized, tmp_path / "built")]
    names = [[split.names for split in splits(folder)] for folder in (sized, tmp_path / "built")]
    order = [dict(zip(map(arc.parse_name, names[i][1]), range(99))) for i in range(2)]
    assert {n[0] for n in order[0]} == {n[0] for n in order[1]} and sorted(sides[0][1]) == sorted(sides[1][1])
    _, test = splits(tmp_path / "built", SIDES)
    found = scoring.evaluate(arc_model(test), test, ALONE, 4)
    cut = test.side_of(np.arange(len(test))) < 30
    assert np.array_equal(~found.scores.fits, cut) and found.metrics["cut_answers"] == cut.sum() > 9
    assert not found.scores.right[cut].any() and not found.scores.history[cut].any()


def test_canvases_that_cannot_be_are_refused(sized, boards, tmp_path):
    with pytest.raises(UserError, match="--canvases 6 11: 3 tasks are larger; add 15"):
        splits(sized, [6, 11])
    with pytest.raises(UserError, match="only ARC tasks have sizes of their own"):
        put_on_canvases(Split(boards, "train"), Split(boards, "test"), [4])
    split, _ = splits(sized, SIDES)
    with pytest.raises(UserError, match="size 3 is too small for 4 canvases on 1 ranks; use 4 or more"):
        parts_of(split, 3, 1)
    with pytest.raises(UserError, match="--canvases need --mixer attn"):
        train.main(["--preset", "arc1-fast", "--mixer", "mlp", "--pos-encodings", "none"])


# ---------------------------------------------------------------------------------------------
# The model on a window

@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
def test_a_window_is_the_same_cells_of_the_board(monkeypatch, positions):
    """Logits of a window equal those of a board whose attention is limited to the cells of the window."""
    side, S = 7, 100
    rows, columns = torch.arange(S) // 10, torch.arange(S) % 10
    inside = (rows < side) & (columns < side)
    cfg = replace(ARC_CFG, seq_len=S, pos_encodings=positions, puzzle_emb_len=2, L_cycles=2, num_layers=2)
    limited, plain = model_of(cfg), model_of(cfg)
    seen = torch.cat((torch.ones(2, dtype=torch.bool), inside))
    limited.score_mod = lambda score, b, h, i, j: torch.where(seen[j], score, -torch.inf)
    board = torch.randint(0, 12, (3, S), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ids = torch.zeros(3, dtype=torch.int32)
    whole, q = scoring.last_thought(limited, board, ids, 3)
    window, q_window = scoring.last_thought(plain, board[:, inside].contiguous(), ids, 3)
    assert window.shape == (3, side * side, 12) and whole.std() > 0.1
    assert (whole[:, inside] - window).abs().max() < 1e-4 and (q - q_window).abs().max() < 1e-4
    unlimited = scoring.last_thought(plain, board, ids, 3)[0][:, inside]
    assert (window - unlimited).abs().max() > 0.01      # the limit does something


# ---------------------------------------------------------------------------------------------
# Parts of a batch

def test_parts_are_shares_of_the_rows_of_an_epoch(sized):
    split, _ = splits(sized, SIDES)
    sizes = np.diff(split.puzzle_indices)[split.group_indices[:-1]]
    for batch_size, ranks in ((768, 1), (768, 8), (768, 16), (32, 2), (60, 4), (5, 1)):
        parts = parts_of(split, batch_size, ranks)
        assert sum(part.rows for part in parts) == batch_size and [p.side for p in parts] == USED
        for part in parts:
            wanted = batch_size * sizes[part.groups].sum() / sizes.sum()
            unit = ranks if batch_size < 48 or batch_size % 8 else max(8, ranks)
            assert part.rows % ranks == 0 and abs(part.rows - wanted) <= unit, (batch_size, ranks, part)
            assert (split.sides[part.groups] == part.side).all()
        assert sorted(np.concatenate([p.groups for p in parts])) == list(range(12))
    one, = parts_of(splits(sized)[0], 7, 7)
    assert one.side == 0 and one.rows == 7


def test_all_parts_draw_their_own_tasks_for_ever(sized):
    """Every epoch draws every task of a canvas once; a part that has drawn all begins anew."""
    split, _ = splits(sized, SIDES)
    parts = parts_of(split, 16, 1)
    drawn, rows = [], [[] for _ in parts]
    for batch, _ in zip(data.orders(split, parts, 0, 4, 2, [data.Cursor() for _ in parts]), range(40)):
        drawn.append(batch)
        for part, seen, (examples, puzzles, _) in zip(parts, rows, batch):
            assert len(examples) == len(puzzles) == part.rows
            assert (split.side_of(examples) == part.side).all()
            seen.extend(split.group_of(examples))
    counts = [np.bincount(seen, minlength=12)[part.groups] for part, seen in zip(parts, rows)]
    assert all(count.min() > 0.6 * count.max() for count in counts), counts
    assert [batch[0][2].iteration for batch in drawn][-1] > 2
    with pytest.raises(UserError, match="--eval-interval 1: so few epochs of the 3 tasks of canvas 6 do not"):
        next(data.orders(split, parts_of(split, 96, 1), 0, 4, 1, [data.Cursor() for _ in parts]))


@pytest.fixture(scope="session")
def four(sized, tmp_path_factory):
    """The folder of a run of 9 steps with four canvases that nothing disturbed."""
    folder = tmp_path_factory.mktemp("four")
    argv = flags(sized, folder / "run", "--canvases", *SIDES, "--checkpoint-interval", 4)
    codes, text = run_ranks(folder, argv)
    assert codes == [0], text
    return folder / "run", text


def test_canvas_30_is_no_canvas_to_the_bit(sized, tmp_path, monkeypatch):
    without_curves(monkeypatch)
    for name, more in (("plain", []), ("canvas", ["--canvases", "30"])):
        argv = flags(sized, tmp_path / name, "--global-batch-size", 4, "--max-steps", 5, *more)
        assert train.main(argv) == 0
    different = unlike(last(tmp_path / "plain"), last(tmp_path / "canvas"))
    logs = unlike(log_of(tmp_path / "plain", "train"), log_of(tmp_path / "canvas", "train"))
    assert not different and not logs, (different, logs)
    vals = [log_of(tmp_path / name, "val")[-1] for name in ("plain", "canvas")]
    assert vals[1].pop("val/cut_answers") == 0 and not unlike(*vals), vals


def test_training_runs_every_canvas_once_a_step(four):
    folder, text = four
    checkpoint = last(folder)
    carries = [checkpoint["carry"][i:i + 7] for i in range(0, 28, 7)]
    assert [c[0].shape[:2] for c in carries] == [(8, 37), (8, 82), (8, 122), (8, 257)]
    assert "canvases: 8 rows of 6x6, 8 rows of 9x9, 8 rows of 11x11, 8 rows of 16x16; 0.0" in text, text
    assert checkpoint["step"] == 9 and steps(folder) == list(range(1, 10))
    cfg = models.read_config(checkpoint["config"])
    a_step = sum(8 * flops(replace(cfg, seq_len=side ** 2)).step for side in USED)
    assert f"train_pflop={9 * a_step / 1e15:.4g}" in text, text


def steps(folder):
    return [r["step"] for r in log_of(folder, "train")]


@pytest.mark.parametrize("event", [("after update", 6), ("before evaluate", 1)])
def test_killed_and_resumed_with_four_parts_is_bit_identical(four, sized, tmp_path, event):
    argv = flags(sized, "run", "--canvases", *SIDES, "--checkpoint-interval", 4, "--resume")
    codes, text = run_ranks(tmp_path, argv, 1, (event, signal.SIGKILL))
    assert codes == [-signal.SIGKILL], text
    codes, text = run_ranks(tmp_path, argv)
    different = same_run(four[0], tmp_path / "run")
    assert codes == [0] and not different, (text, different)


def test_two_ranks_are_one_with_four_parts_and_take_over_from_one(four, sized, tmp_path):
    """Losses to 1e-5; a run that one process began goes on on two ranks, its carries dealt anew."""
    argv = flags(sized, "run", "--canvases", *SIDES, "--checkpoint-interval", 4)
    codes, text = run_ranks(tmp_path, argv, 2)
    assert codes == [0, 0], text
    part = flags(sized, "begun", "--canvases", *SIDES, "--checkpoint-interval", 4)
    assert run_ranks(tmp_path, [*part, "--max-steps", "5"])[0] == [0]
    codes, text = run_ranks(tmp_path, ["--resume", "begun", "--max-steps", "9"], 2)
    assert codes == [0, 0], text
    for name in ("run", "begun"):
        one, two = (log_of(folder, "train") for folder in (four[0], tmp_path / name))
        assert len(one) == len(two) == 9
        for a, b in zip(one, two):
            assert abs(a["train/loss"] - b["train/loss"]) < 1e-5, (name, a, b)


def test_other_rows_on_other_ranks_are_told(four, sized, tmp_path):
    argv = [f if f != "32" else "60" for f in flags(sized, "run", "--canvases", *SIDES)]
    assert run_ranks(tmp_path, [*argv, "--max-steps", "1"])[0] == [0]
    codes, text = run_ranks(tmp_path, ["--resume", "run"], 4)
    assert codes == [2] * 4 and "other rows on 4 ranks; take as many as before" in text, text


# ---------------------------------------------------------------------------------------------
# Evaluation

def test_evaluation_scores_every_row_on_its_canvas(sized):
    """The predictions are those of the model on the window, in the upper left of an empty board."""
    _, test = splits(sized, SIDES)
    net = arc_model(test)
    scores = scoring.evaluate(net, test, ALONE, 5).mine
    assert scores.examples.tolist() == list(range(len(test)))
    for i in (0, 7, 20, 31):
        side = int(test.side_of(np.array([i]))[0])
        inputs, _, ids = map(torch.from_numpy, test.gather(np.array([i]), side=side))
        board = scoring.last_thought(net, inputs, ids, 2)[0].argmax(-1).view(side, side)
        given = scores.preds[i].reshape(30, 30)
        assert np.array_equal(given[:side, :side], board) and given.sum() == board.sum(), i


def test_halting_on_canvases_scores_the_same_rows(sized):
    """With a threshold that nothing reaches, the figures are those of the full evaluation."""
    _, test = splits(sized, SIDES)
    net = arc_model(test)
    full, halted = (scoring.evaluate(net, test, ALONE, 5, effort=scoring.Effort(halt=halt))
                    for halt in (None, 99.0))
    assert halted.metrics == full.metrics
    assert np.array_equal(full.mine.preds, halted.mine.preds)


def test_eval_takes_the_canvases_of_the_checkpoint_or_of_the_flag(four, sized, tmp_path, capsys):
    fits = 2 ** 12 // (ARC_CFG.puzzle_emb_len + 16 ** 2)    # by default: on the largest of the canvases
    for i, (more, size) in enumerate(((["--batch-size", 4], 4), (["--canvases", 30, "--batch-size", 4], 4),
                                      (["--canvases", 15, 16], fits))):
        out = tmp_path / f"out{i}"
        argv = ["--checkpoint", four[0], "--output", out, "--device", "cpu", *more]
        assert scoring.main([*map(str, argv)]) == 0
        results = json.loads((out / "results.json").read_text())
        assert "cut_answers" in results["metrics"] and results["about"]["batch of a rank"] == size
    with pytest.raises(UserError, match="--canvases 11: .* larger; add 15"):
        scoring.main(["--checkpoint", str(four[0]), "--canvases", "11", "--output", str(tmp_path)])
    capsys.readouterr()


def test_golden_votes_through_canvases_and_back():
    """The published predictions, cut to the canvas of their task and put back, elect the same answers. The
    figures have no demonstrations: the true outputs stand for those."""
    golden = json.loads((GOLDEN / "arc_voting" / "golden.json").read_text())
    rows = np.load(GOLDEN / "arc_voting" / "data.npz")
    inputs, preds = rows["inputs"], rows["preds"]
    names = {int(i): name for i, name in golden["identifiers"].items()}
    tasks = [arc.parse_name(names.get(i, ""))[0] for i in rows["puzzle_identifiers"].tolist()]
    needed = {}
    for task, puzzle in golden["test_puzzles"].items():
        grids = [e[k] for e in puzzle["test"] for k in e]
        needed[task] = max(max(len(g), len(g[0])) for g in grids)
    moved, cut = preds.copy(), 0
    for i, task in enumerate(tasks):
        side = next((s for s in SIDES if s >= needed.get(task, 30)), 30)
        board = preds[i].reshape(30, 30)
        moved[i] = np.pad(board[:side, :side], (0, 30 - side)).ravel()
        cut += not np.array_equal(arc.decode(moved[i]), arc.decode(preds[i]))
    results = []
    for answers in (preds, moved):
        votes = vote.ArcVotes(golden["test_puzzles"], names)
        votes.add(inputs, answers, rows["q_halt_logits"], rows["puzzle_identifiers"], np.arange(len(inputs)))
        votes.merge([votes.payload()])
        results.append(votes.result())
    assert results[0] == results[1] and results[0]["pass@2"] > 0, (results, cut)
    assert (moved != preds).any() and cut < 0.1 * len(preds), cut


def test_known_shape_of_the_fast_presets():
    for name in ("arc1", "arc2"):
        fast = train.PRESETS[f"{name}-fast"]
        assert fast == {**train.PRESETS[name], "canvases": [11, 16, 21, 30]}
        assert prepare.known(fast["data"][0]).shape["seq_len"] == 900
