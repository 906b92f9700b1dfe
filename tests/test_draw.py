"""draw.py: what the pictures show, not only that there are some."""
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image, ImageSequence

import draw
import eval as scoring
from common import UserError
from data import Split
from prepare import arc, maze, sudoku
from runs import ALONE, TINY, Oracle, png_size, sudoku_dir


def write_log(folder, *records):
    folder.mkdir(exist_ok=True)
    torn = '{"event": "train", "step": 9, "tr'      # by a crash
    (folder / "log.jsonl").write_text("\n".join([*map(json.dumps, records), torn]))
    return folder


LOSSES = {1: 2.0, 2: 1.5, 3: 0.5}
SCORES = {1: None, 2: 0.25, 3: 0.75}    # no row halted at first
RECORDS = [{"event": "train", "step": step, "train/lm_loss": LOSSES[step], "train/exact_acc": SCORES[step]}
           for step in LOSSES] + [{"event": "val", "step": 3, "val/lm_loss": 0.4, "val/exact_acc": 0.75}]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in order."""
    kept, save = [], draw.save
    monkeypatch.setattr(draw, "save", lambda figure, path: kept.append(figure) or save(figure, path))
    return kept


# ---------------------------------------------------------------------------------------------
# Curves

def curves(figure):
    """{(number of the axes, label): [(x, y)]}"""
    return {(i, line.get_label()): list(zip(*line.get_data()))
            for i, ax in enumerate(figure.axes) for line in ax.lines}


def test_the_curves_are_those_of_the_log(tmp_path, figures, capsys):
    run = write_log(tmp_path / "run", *RECORDS)
    draw.main([str(run)])
    assert capsys.readouterr().out == f"{run / 'train_vs_val.png'}\n"
    assert png_size(run / "train_vs_val.png") == (1200, 500)
    assert curves(figures[0]) == {
        (0, "train"): list(LOSSES.items()), (0, "val"): [(3, 0.4)],
        (1, "train"): [(2, 0.25), (3, 0.75)], (1, "val"): [(3, 0.75)]}


def test_several_runs_are_overlaid(tmp_path, figures, capsys):
    one = write_log(tmp_path / "one", *RECORDS)
    numbers = {"train/regression_loss": 0.1, "train/within_tolerance": 0.5}
    two = write_log(tmp_path / "two", {"event": "train", "step": 1, **numbers})
    draw.main([str(one), str(two)])
    assert capsys.readouterr().out == f"{one / 'comparison.png'}\n"
    assert png_size(one / "comparison.png") == (1200, 500)
    found = curves(figures[0])
    assert {label for _, label in found} == {"one: train", "one: val", "two: train", "two: val"}
    assert (found[0, "two: train"], found[1, "two: train"]) == ([(1, 0.1)], [(1, 0.5)])
    colours = {line.get_label().split(":")[0]: line.get_color() for line in figures[0].axes[0].lines}
    assert colours == {"one": "C0", "two": "C1"}


def test_a_folder_without_a_log_is_one_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "start", "step": 0}\n')
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="has no training lines to draw; name a run folder"):
            draw.main([str(folder)])


# ---------------------------------------------------------------------------------------------
# Boards

def thoughts_of(question, label, shares, seed=0):
    """Thoughts that come nearer to the label: at step i a share of the cells is random."""
    rng, high = np.random.RandomState(seed), label.max() + 1
    boards = np.stack([np.where(rng.rand(len(label)) < share, rng.randint(1, high, len(label)), label)
                       for share in shares])
    return draw.Thoughts(question, boards, boards != label, np.arange(len(shares)) - 1.0, label)


@pytest.mark.parametrize("size", sudoku.BOX)
def test_a_sudoku_shows_digits_givens_and_wrong_cells(size):
    question, label = (b.astype(int) for b in sudoku.make_puzzle(np.random.RandomState(0), size)[:2])
    thoughts = thoughts_of(question, label, (0.7, 0.0))
    figure = draw.draw_panels("sudoku", "title", draw.panels_of(thoughts, [1, 2]), 4)
    assert [ax.get_title() for ax in figure.axes] == [
        "question", f"step 1: {thoughts.wrong[0].sum()} wrong, q_halt -1.0",
        "step 2: no cell wrong, q_halt +0.0", "target"]
    none = np.zeros(size ** 2, bool)
    boards, marks = (question, *thoughts.boards, label), (none, *thoughts.wrong, none)
    for ax, board, wrong in zip(figure.axes, boards, marks):
        assert [text.get_text() for text in ax.texts] == [str(t - 1) if t > 1 else "" for t in board]
        assert [text.get_color() == draw.WRONG for text in ax.texts] == wrong.tolist()
        assert [text.get_weight() == "bold" for text in ax.texts] == (question > 1).tolist()
    pale = [colour == draw.COLOURS["sudoku"][2] for colour in colours(figure.axes[1])]
    assert pale == thoughts.wrong[0].tolist()


def colours(ax):
    """Of the cells of a panel."""
    return [to_hex(colour).upper() for colour in np.array(ax.images[0].get_array()).reshape(-1, 3)]


def crosses(ax):
    """{(row, column)} of the crosses in a panel."""
    return {(int(y), int(x)) for x, y in ax.collections[-1].get_offsets()}


def test_a_maze_shows_its_colours_and_crosses():
    question, label = (b.astype(int) for b in maze.make_maze(np.random.RandomState(0), 8, 5)[:2])
    thoughts = thoughts_of(question, label, (0.5, 0.0))
    figure = draw.draw_panels("maze", "title", draw.panels_of(thoughts, [1]), 3)
    assert colours(figure.axes[2]) == [draw.COLOURS["maze"][token] for token in label]
    wrong = {divmod(int(cell), 8) for cell in np.flatnonzero(thoughts.wrong[0])}
    assert crosses(figure.axes[1]) == wrong and crosses(figure.axes[0]) == set()
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == ["wall", "open", "start", "goal", "path", "x: wrong cell"]


def test_an_arc_grid_is_cut_to_what_is_used():
    label = arc.encode(np.arange(6, dtype=np.uint8).reshape(2, 3)).astype(int)
    far = label.copy()
    far[4 * 30 + 5] = 7
    thoughts = draw.Thoughts(label, far[None], (far != label)[None], np.zeros(1))
    figure = draw.draw_panels("arc", "title", draw.panels_of(thoughts, [1]), 2)
    shapes = [ax.images[0].get_array().shape[:2] for ax in figure.axes]
    assert shapes == [(3, 4), (5, 6)], "with the end line, and as far as the wrong cell"
    assert crosses(figure.axes[1]) == {(4, 5)}


def test_numbers_and_other_tokens():
    cfg = replace(TINY, vocab_size=0, input_dim=2, target_dim=1, halt_tolerance=0.25)
    label = np.array([[0.0], [1.0], [2.0], [np.nan]])
    board = np.array([[0.4], [0.4], [2.5], [9.0]])
    wrong = draw.wrong_cells(cfg, board, label)
    assert wrong.tolist() == [False, True, True, False], "by the tolerance or more, where it is asked"
    thoughts = draw.Thoughts(np.zeros((4, 2)), board[None], wrong[None], np.zeros(1), label)
    figure = draw.draw_panels("numbers", "title", draw.panels_of(thoughts, [1]), 3)
    assert [len(ax.patches) for ax in figure.axes] == [0, 2, 0]
    assert {ax.images[0].get_clim() for ax in figure.axes} == {(0.0, 9.0)}, "one scale for all"
    tokens = np.array([1, 2, 3, -100, 2])
    wrong = draw.wrong_cells(TINY, np.array([1, 3, 3, 3, 1]), tokens)
    assert wrong.tolist() == [False, True, False, False, True]
    thoughts = draw.Thoughts(tokens.clip(0), tokens.clip(0)[None].astype(np.uint8), None, np.zeros(1), tokens)
    figure = draw.draw_panels("tokens", "title", draw.panels_of(thoughts, [1]), 3)
    assert figure.axes[1].get_title() == "step 1: q_halt +0.0"
    assert figure.axes[2].images[0].get_array().shape == (1, 5, 3) and colours(figure.axes[2])[3] == "#FFFFFF"


def test_steps_and_gif(tmp_path, figures):
    question, label = (b.astype(int) for b in sudoku.make_puzzle(np.random.RandomState(0), 9)[:2])
    thoughts = thoughts_of(question, label, np.linspace(1, 0, 6))
    assert png_size(draw.draw_steps("sudoku", tmp_path / "a.png", thoughts))[0] == 1200
    titles = [ax.get_title().split(":")[0] for ax in figures[0].axes if ax.get_title()]
    assert titles == ["question", "step 1", "step 2", "step 4", "step 6", "target"]
    with Image.open(draw.animate("sudoku", tmp_path / "a.gif", thoughts._replace(label=None))) as gif:
        seen = [(frame.info["duration"], frame.convert("RGB").getpixel((1, 1)))
                for frame in ImageSequence.Iterator(gif)]
        assert seen == [(500, (255, 255, 255))] * 5 + [(3000, (255, 255, 255))] and gif.size[0] == 800
    assert (tmp_path / "a.gif").stat().st_size < 300_000


def test_examples_are_half_wrong_where_there_are_any(tmp_path, figures):
    split = Split(sudoku_dir(tmp_path / "d"), "test")
    model = Oracle(replace(TINY, halt_max_steps=2))
    scores = scoring.score(model, split, ALONE, 8, np.arange(22), quiet=True)
    assert 2 <= scores.right.sum() <= 20, "else this test shows nothing"
    draw.draw_examples(TINY, split.kind, tmp_path / "show.png", split, scores, 4)
    titles = [ax.get_title() for ax in figures[0].axes if ax.get_title()]
    assert titles[2::3] == ["target"] * 4 and png_size(tmp_path / "show.png")[0] == 1200
    chosen = [int(title.removeprefix("puzzle ")) for title in titles[::3]]
    right = scores.right[np.searchsorted(scores.examples, chosen)]
    assert Counter(right.tolist()) == {True: 2, False: 2}
    assert [title.startswith("no cell wrong") for title in titles[1::3]] == right.tolist()
    all_right = scores._replace(right=np.ones_like(scores.right), preds=split.gather(np.arange(22))[1])
    draw.draw_examples(TINY, split.kind, tmp_path / "show.png", split, all_right, 3)
    assert sum(ax.get_title() == "target" for ax in figures[1].axes) == 3
    hidden = scores._replace(n=0 * scores.n)
    draw.draw_examples(TINY, split.kind, tmp_path / "show.png", split, hidden, 3)
    assert figures[2].axes[1].get_title().startswith("q_halt"), "nobody knows a hidden answer"
