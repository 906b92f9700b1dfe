"""draw.py: what the pictures show, not only that there are some."""
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

import draw
import eval as scoring
from common import UserError
from data import Split, write_dataset
from prepare import arc, maze, sudoku
from runs import ALONE, TINY, Oracle, model_of, png_size, sudoku_dir


def write_log(folder, *records, ema=True):
    folder.mkdir(exist_ok=True)
    start = {"event": "start", "step": 0, "settings": {"ema": 0.99 if ema else 0.0}}
    lines = [json.dumps(r) for r in (start, *records)]
    torn = '{"event": "train", "step": 9, "tr'      # by a crash
    (folder / "log.jsonl").write_text("\n".join([*lines, torn]))
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
    """{(title of the axes, label): [(x, y)]}"""
    return {(ax.get_title(), line.get_label()): list(zip(*line.get_data()))
            for ax in figure.axes for line in ax.lines}


def test_the_curves_are_those_of_the_log(tmp_path, figures, capsys):
    run = write_log(tmp_path / "run", *RECORDS)
    draw.main([str(run)])
    assert capsys.readouterr().out == f"{run / 'train_vs_val.png'}\n"
    assert png_size(run / "train_vs_val.png") == (1200, 500)
    assert curves(figures[0]) == {
        ("lm_loss", "train"): list(LOSSES.items()), ("lm_loss", "val (EMA)"): [(3, 0.4)],
        ("exact_acc", "train"): [(2, 0.25), (3, 0.75)], ("exact_acc", "val (EMA)"): [(3, 0.75)]}


def test_several_runs_are_overlaid(tmp_path, figures, capsys):
    one = write_log(tmp_path / "one", *RECORDS)
    numbers = {"train/regression_loss": 0.1, "train/within_tolerance": 0.5}
    two = write_log(tmp_path / "two", {"event": "train", "step": 1, **numbers}, ema=False)
    draw.main([str(one), str(two)])
    draw.main([str(one), str(two), "--output", str(tmp_path / "new" / "both.png")])
    assert capsys.readouterr().out.split() == [str(one / "comparison.png"), str(tmp_path / "new/both.png")]
    assert (one / "comparison.png").read_bytes() == (tmp_path / "new/both.png").read_bytes()
    labels = {label for _, label in curves(figures[0])}
    assert labels == {"one: train", "one: val (EMA)", "two: train", "two: val"}
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
    panels = draw.panels_of("sudoku", thoughts, [1, 2])
    figure = draw.draw_panels("sudoku", "title", panels, 4)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["question", f"step 1: {thoughts.wrong[0].sum()} wrong, q_halt -1.0",
                      "step 2: no cell wrong, q_halt +0.0", "target"]
    none = np.zeros(size ** 2, bool)
    boards, marks = (question, *thoughts.boards, label), (none, *thoughts.wrong, none)
    for ax, board, wrong in zip(figure.axes, boards, marks):
        digits = [text.get_text() for text in ax.texts]
        assert digits == [str(t - 1) if t > 1 else "" for t in board]
        red = [text.get_color() == draw.WRONG for text in ax.texts]
        assert red == wrong.tolist()
        bold = [text.get_weight() == "bold" for text in ax.texts]
        assert bold == (question > 1).tolist()
    pale = np.array(figure.axes[1].images[0].get_array()).ravel() == 2
    assert np.array_equal(pale, thoughts.wrong[0])


def crosses(ax):
    """{(row, column)} of the crosses in a panel."""
    return {(int(y), int(x)) for x, y in ax.collections[0].get_offsets()}


def test_a_maze_shows_its_colours_and_crosses():
    question, label = (b.astype(int) for b in maze.make_maze(np.random.RandomState(0), 8, 5)[:2])
    thoughts = thoughts_of(question, label, (0.5, 0.0))
    figure = draw.draw_panels("maze", "title", draw.panels_of("maze", thoughts, [1]), 3)
    image = figure.axes[2].images[0]
    shown = [to_hex(colour).upper() for colour in image.to_rgba(label.reshape(8, 8)).reshape(-1, 4)]
    assert shown == [draw.MAZE_COLOURS[token] for token in label]
    wrong = {divmod(int(cell), 8) for cell in np.flatnonzero(thoughts.wrong[0])}
    assert crosses(figure.axes[1]) == wrong and crosses(figure.axes[0]) == set()
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == ["wall", "open", "start", "goal", "path", "wrong cell"]


def test_an_arc_grid_is_cut_to_what_is_used():
    label = arc.encode(np.arange(6, dtype=np.uint8).reshape(2, 3)).astype(int)
    far = label.copy()
    far[4 * 30 + 5] = 7
    thoughts = draw.Thoughts(label, far[None], (far != label)[None], np.zeros(1))
    figure = draw.draw_panels("arc", "title", draw.panels_of("arc", thoughts, [1]), 2)
    shapes = [ax.images[0].get_array().shape for ax in figure.axes]
    assert shapes == [(3, 4), (5, 6)], "with the end line, and as far as the wrong cell"
    assert crosses(figure.axes[1]) == {(4, 5)}


def test_numbers_and_other_tokens():
    cfg = replace(TINY, vocab_size=0, input_dim=2, target_dim=1, halt_tolerance=0.25)
    label = np.array([[0.0], [1.0], [2.0], [np.nan]])
    board = np.array([[0.4], [0.4], [2.5], [9.0]])
    wrong = draw.wrong_cells(cfg, board, label)
    assert wrong.tolist() == [False, True, True, False], "by the tolerance or more, where it is asked"
    thoughts = draw.Thoughts(np.zeros((4, 2)), board[None], wrong[None], np.zeros(1), label)
    figure = draw.draw_panels("numbers", "title", draw.panels_of("numbers", thoughts, [1]), 3)
    assert [len(ax.patches) for ax in figure.axes] == [0, 2, 0]
    assert {ax.images[0].get_clim() for ax in figure.axes} == {(-9.0, 9.0)}, "one scale for all"
    tokens = np.array([1, 2, 3, -100, 2])
    wrong = draw.wrong_cells(TINY, np.array([1, 3, 3, 3, 1]), tokens)
    assert wrong.tolist() == [False, True, False, False, True]
    thoughts = draw.Thoughts(tokens.clip(0), tokens.clip(0)[None], None, np.zeros(1), tokens)
    figure = draw.draw_panels("tokens", "title", draw.panels_of("tokens", thoughts, [1]), 3)
    assert figure.axes[1].get_title() == "step 1: q_halt +0.0"
    assert figure.axes[2].images[0].get_array().shape == (1, 5)


# ---------------------------------------------------------------------------------------------
# Files

def test_steps_and_gif(tmp_path, figures):
    question, label = (b.astype(int) for b in sudoku.make_puzzle(np.random.RandomState(0), 9)[:2])
    thoughts = thoughts_of(question, label, np.linspace(1, 0, 6))
    assert png_size(draw.draw_steps("sudoku", tmp_path / "a.png", thoughts))[0] == 1200
    titles = [ax.get_title().split(":")[0] for ax in figures[0].axes if ax.get_title()]
    assert titles == ["question", "step 1", "step 2", "step 4", "step 6", "target"]
    with Image.open(draw.animate("sudoku", tmp_path / "a.gif", thoughts._replace(label=None))) as gif:
        durations, corners = [], set()
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
            corners.add(gif.convert("RGB").getpixel((1, 1)))
        assert gif.n_frames == 6 and durations == [500] * 5 + [3000] and gif.size[0] == 800
    assert corners == {(255, 255, 255)} and (tmp_path / "a.gif").stat().st_size < 300_000


def test_the_slowest_puzzle_is_drawn(tmp_path, figures):
    split = Split(sudoku_dir(tmp_path / "d"), "test")
    model = Oracle(replace(TINY, halt_max_steps=16))
    thoughts = scoring.slow_puzzle(model, split, 8)
    assert thoughts.wrong.any(1).sum() == max(model.needs(row) for row in split.gather(np.arange(8))[0]) - 1
    assert png_size(draw.draw_steps(split.kind, tmp_path / "p.png", thoughts))[0] == 1200


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


def test_examples_of_numbers(tmp_path, figures):
    rng = np.random.RandomState(0)
    inputs, targets = (rng.randn(9, 16, dim).astype(np.float32) for dim in (2, 1))
    arrays = inputs, targets, np.arange(16) < np.arange(4, 13)[:, None]
    write_dataset(tmp_path / "numbers", {"train": arrays, "test": arrays})
    split = Split(tmp_path / "numbers", "test")
    cfg = replace(TINY, vocab_size=0, input_dim=2, target_dim=1)
    scores = scoring.score(model_of(cfg), split, ALONE, 4, np.arange(9), quiet=True)
    draw.draw_examples(cfg, split.kind, tmp_path / "show.png", split, scores, 3)
    assert split.kind == "numbers" and png_size(tmp_path / "show.png")[0] == 1200


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    figure = SimpleNamespace(savefig=lambda file, format: file.write(b"new"))
    path = draw.save(figure, tmp_path / "a.png")
    assert path.read_bytes() == b"new"

    def full_disk(*names):
        raise OSError(28, "No space left on device")
    figure.savefig = lambda file, format: file.write(b"newer")
    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        draw.save(figure, path)
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
