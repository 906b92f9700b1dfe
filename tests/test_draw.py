"""tools/draw.py: what the pictures show, the table of runs, and that a failing picture never ends a run."""

import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import cycle
from unittest.mock import Mock

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image, ImageSequence
from runs import ALONE, ROOT, TINY, Oracle, png_size, sudoku_dir

import eval as scoring
from data import Split
from prepare import arc, maze, sudoku
from tools import draw
from tools.common import UserError

LOSSES = {1: 2.0, 2: 1.5, 3: 0.5}
SCORES = {1: None, 2: 0.25, 3: 0.75}  # no row halted at first
CURVES = [
    {"event": "train", "step": step, "train/lm_loss": LOSSES[step], "train/exact_acc": SCORES[step]}
    for step in LOSSES
]
CURVES.append({"event": "val", "step": 3, "val/lm_loss": 0.4, "val/exact_acc": 0.75})


def write_log(folder, *records):
    folder.mkdir(exist_ok=True)
    torn_by_a_crash = '{"event": "train", "step": 9, "tr'
    (folder / "log.jsonl").write_text("\n".join([*map(json.dumps, records), torn_by_a_crash]))
    return str(folder)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in order."""
    saved, save = [], draw.save
    monkeypatch.setattr(draw, "save", lambda figure, path: saved.append(figure) or save(figure, path))
    return saved


# ---------------------------------------------------------------------------------------------
# Curves


def curves(figure):
    """{(number of the axes, label): [(x, y)]}"""
    found = {}
    for i, ax in enumerate(figure.axes):
        for line in ax.lines:
            found[i, line.get_label()] = list(zip(*line.get_data()))
    return found


def test_the_curves_are_those_of_the_logs(tmp_path, figures, capsys):
    one = write_log(tmp_path / "one", {"event": "start", "step": 0, "settings": {"seed": 0}}, *CURVES)
    numbers = {"train/regression_loss": 0.1, "train/within_tolerance": 0.5}
    two = write_log(tmp_path / "two", {"event": "train", "step": 1, **numbers})
    of_one = {
        (0, "one train"): list(LOSSES.items()),
        (0, "one val"): [(3, 0.4)],
        (1, "one train"): [(2, 0.25), (3, 0.75)],
        (1, "one val"): [(3, 0.75)],
    }
    draw.main([one])
    assert capsys.readouterr().out.splitlines()[0] == f"{one}/train_vs_val.png"
    assert png_size(tmp_path / "one/train_vs_val.png") == (1200, 500) and curves(figures[0]) == of_one
    draw.main([one, two, str(tmp_path / "nowhere")])
    assert capsys.readouterr().out.splitlines()[0] == f"{one}/comparison.png"
    assert curves(figures[1]) == of_one | {(0, "two train"): [(1, 0.1)], (1, "two train"): [(1, 0.5)]}
    colors = {line.get_label().split()[0]: line.get_color() for line in figures[1].axes[0].lines}
    assert colors == {"one": "C0", "two": "C1"}
    with pytest.raises(UserError, match="nowhere has no log.jsonl; pass run folders"):
        draw.main([str(tmp_path / "nowhere")])
    assert not (tmp_path / "nowhere").exists()


# ---------------------------------------------------------------------------------------------
# The table of runs


def log_of(folder, seed, score=0.5, n=10, finished=True, data_sha256="d", starts=1, **settings):
    settings = {"seed": seed, "run_dir": str(folder), "data": [str(folder)], "lr": 1e-3, **settings}
    start = {"event": "start", "step": 0, "settings": settings, "data_sha256": data_sha256}
    line = f"RESULT preset=mini exact_acc={score:.4f} n={n} steps=5"
    if not n:
        line = "RESULT preset=mini n=0 steps=5"
    result = {"event": "result", "step": 5, "line": line, "finished": finished, "exact_acc": score}
    resumed = {**start, "step": 3, "settings": {**settings, "resume": "step_3.ckpt", "max_steps": 9}}
    return write_log(folder, start, *CURVES, *[resumed] * (starts - 1), result)


def test_only_runs_of_equal_settings_and_data_are_pooled(tmp_path, capsys):
    runs = [
        log_of(tmp_path / "a", 0, 0.5),
        log_of(tmp_path / "copy of a", 0, 0.5),
        log_of(tmp_path / "b", 1, 0.7, device="cuda", starts=3),  # resumed twice
        log_of(tmp_path / "other lr", 2, 0.9, lr=2e-3),
        log_of(tmp_path / "other data", 3, 0.9, data_sha256="e"),
        log_of(tmp_path / "cut short", 4, 0.9, finished=False, max_steps=5),
        log_of(tmp_path / "hidden", 5, n=0),
        write_log(tmp_path / "running", *CURVES),
        str(tmp_path / "nowhere"),
        log_of(tmp_path / "old", 6, data_sha256=None),  # compared by the folder of its data
    ]
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("other lr", "a")]
    (tmp_path / "resumed with another lr").mkdir()
    (tmp_path / "resumed with another lr/log.jsonl").write_text("\n".join(logs))
    draw.main([*runs, str(tmp_path / "resumed with another lr")])
    printed = capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines()[1:]
    line = "RESULT preset=mini exact_acc={} n=10 steps=5"
    assert printed == [
        "copy of a: a copy of a (same settings and seed), so not counted",
        "cut short: not a finished run, so not counted",
        "hidden: hidden test set, so it has no score",
        "running: not a finished run, so not counted",
        "nowhere: not a finished run, so not counted",
        "group 1:",
        f"  a: seed 0, {line.format('0.5000')}",
        f"  b: seed 1, {line.format('0.7000')}",
        "  exact_acc 0.6000, standard deviation 0.1414, 2 seeds",
        "group 2: differs from group 1 in lr",
        f"  other lr: seed 2, {line.format('0.9000')}",
        "group 3: differs from group 1 in data_sha256",
        f"  other data: seed 3, {line.format('0.9000')}",
        "group 4: differs from group 1 in data data_sha256",
        f"  old: seed 6, {line.format('0.5000')}",
        "group 5: differs from group 1 in lr",
        f"  resumed with another lr: seed 0, {line.format('0.5000')}",
    ]


# ---------------------------------------------------------------------------------------------
# Boards


def trajectory_of(question, label, shares, seed=0):
    """Answers that approach the label: at step i, a share of the cells is random."""
    rng, high = np.random.RandomState(seed), label.max() + 1
    answers = []
    for share in shares:
        random = rng.randint(1, high, len(label))
        answers.append(np.where(rng.rand(len(label)) < share, random, label))
    answers = np.stack(answers)
    return draw.Trajectory(question, answers, answers != label, np.arange(len(shares)) - 1.0, label)


def colors_of(ax):
    """Colors of the cells of a board, in rows; call it after the figure was drawn."""
    return [to_hex(color).upper() for color in ax.collections[-1].get_facecolor()]


def crosses(ax):
    """{(row, column)}"""
    return {(int(y), int(x)) for x, y in zip(*ax.lines[0].get_data())}


@pytest.mark.parametrize("size", sudoku.BOX)
def test_a_sudoku_shows_digits_givens_and_wrong_cells(size):
    question, label = (b.astype(int) for b in sudoku.make_puzzle(np.random.RandomState(0), size)[:2])
    trajectory = trajectory_of(question, label, (0.7, 0.0))
    figure = draw.draw_panels("sudoku", "title", draw.make_panels(trajectory, [1, 2]), 4)
    titles = [ax.get_title() for ax in figure.axes]
    steps = [f"step 1: {trajectory.wrong[0].sum()} wrong, q_halt -1.0", "step 2: 0 wrong, q_halt +0.0"]
    assert titles == ["question", *steps, "target"]
    none = np.zeros(size**2, bool)
    boards, marks = (question, *trajectory.answers, label), (none, *trajectory.wrong, none)
    figure.draw_without_rendering()
    _, given, wrong_cell = (color.upper() for color in draw.COLORS["sudoku"])
    for ax, board, wrong in zip(figure.axes, boards, marks):
        shown = np.full((size, size), 1)
        for text in ax.texts:
            column, row = (int(x) for x in text.get_position())
            shown[row, column] = 1 + int(text.get_text())
            assert (text.get_color() == draw.WRONG) == wrong.reshape(size, size)[row, column]
        assert np.array_equal(shown.ravel(), board)
        backgrounds = [c if c in (given, wrong_cell) else "" for c in colors_of(ax)]
        assert backgrounds == np.where(wrong, wrong_cell, np.where(question > 1, given, "")).tolist()


def test_a_maze_shows_its_colors_and_crosses():
    boards = next(maze.draw_mazes(np.random.RandomState(0), 8, 5))
    question, label = (b.astype(int) for b in boards[:2])
    trajectory = trajectory_of(question, label, (0.5, 0.0))
    figure = draw.draw_panels("maze", "title", draw.make_panels(trajectory, [1]), 3)
    figure.draw_without_rendering()
    assert colors_of(figure.axes[2]) == [draw.COLORS["maze"][token] for token in label]
    wrong = {divmod(int(cell), 8) for cell in np.flatnonzero(trajectory.wrong[0])}
    assert crosses(figure.axes[1]) == wrong and crosses(figure.axes[0]) == set()
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == ["wall", "free", "start", "goal", "path", "x: wrong cell"]


def test_an_arc_grid_is_cut_to_what_is_used():
    label = arc.encode(np.arange(6, dtype=np.uint8).reshape(2, 3)).astype(int)
    far = label.copy()
    far[4 * 30 + 5] = 7
    trajectory = draw.Trajectory(label, far[None], (far != label)[None], np.zeros(1))
    figure = draw.draw_panels("arc", "title", draw.make_panels(trajectory, [1]), 2)
    limits = [(ax.get_ylim(), ax.get_xlim()) for ax in figure.axes]
    # with the end line, and as far as the wrong cell
    assert limits == [((3, 0), (0, 4)), ((5, 0), (0, 6))]
    assert crosses(figure.axes[1]) == {(4, 5)}


def test_numbers_and_other_tokens():
    cfg = replace(TINY, vocab_size=0, input_dim=2, target_dim=1, halt_tolerance=0.25)
    label = np.array([[0.0], [1.0], [2.0], [np.nan]])
    board = np.array([[0.4], [0.4], [2.5], [9.0]])
    wrong = draw.wrong_cells(cfg, board, label)
    assert wrong.tolist() == [False, True, True, False], "by the tolerance or more, where it is labelled"
    trajectory = draw.Trajectory(np.zeros((4, 2)), board[None], wrong[None], np.zeros(1), label)
    figure = draw.draw_panels("regression", "title", draw.make_panels(trajectory, [1]), 3)
    assert crosses(figure.axes[1]) == {(0, 1), (0, 2)} and crosses(figure.axes[2]) == set()
    assert {ax.collections[-1].get_clim() for ax in figure.axes} == {(0.0, 9.0)}, "one scale for all"
    assert figure.get_suptitle() == "title (colors from 0 to 9)"
    tokens = np.array([1, 2, 3, -100, 2])
    wrong = draw.wrong_cells(TINY, np.array([1, 3, 3, 3, 1]), tokens)
    assert wrong.tolist() == [False, True, False, False, True]
    answer = tokens.clip(0).astype(np.uint8)
    trajectory = draw.Trajectory(answer, answer[None], None, np.zeros(1), tokens)
    figure = draw.draw_panels("tokens", "title", draw.make_panels(trajectory, [1]), 3)
    assert figure.axes[1].get_title() == "step 1: q_halt +0.0", "the target is unknown"
    figure.draw_without_rendering()
    assert len(colors_of(figure.axes[2])) == 5 and colors_of(figure.axes[2])[3] == "#FFFFFF"


def test_steps_and_gif(tmp_path, figures):
    question, label = (b.astype(int) for b in sudoku.make_puzzle(np.random.RandomState(0), 9)[:2])
    trajectory = trajectory_of(question, label, np.linspace(1, 0, 5))
    assert png_size(draw.draw_steps("sudoku", tmp_path / "a.png", trajectory))[0] == 1200
    titles = [ax.get_title().split(":")[0] for ax in figures[0].axes]
    assert titles == ["question", "step 1", "step 2", "step 4", "step 5", "target"]
    with Image.open(draw.animate("sudoku", tmp_path / "a.gif", trajectory._replace(label=None))) as gif:
        frames = ImageSequence.Iterator(gif)
        assert [frame.info["duration"] for frame in frames] == [500] * 4 + [3000]
        assert gif.size[0] == 800
    assert (tmp_path / "a.gif").stat().st_size < 300_000


def test_examples_are_half_wrong_where_there_are_any(tmp_path, figures):
    split = Split(sudoku_dir(tmp_path / "d"), "test")
    model = Oracle(replace(TINY, halt_max_steps=2))
    scores = scoring.score(model, split, ALONE, 8, np.arange(22))
    assert 2 <= scores.exact.sum() <= 20, "else this test shows nothing"

    def titles_of(scores, n):
        draw.draw_examples(TINY, split.task, tmp_path / "show.png", split, scores, n)
        return [ax.get_title() for ax in figures.pop().axes]

    titles = titles_of(scores, 4)
    assert titles[2::3] == ["target"] * 4 and png_size(tmp_path / "show.png")[0] == 1200
    chosen = [int(title.removeprefix("puzzle ")) for title in titles[::3]]
    exact = scores.exact[np.searchsorted(scores.examples, chosen)]
    assert Counter(exact.tolist()) == {True: 2, False: 2}
    assert [title.startswith("0 wrong") for title in titles[1::3]] == exact.tolist()
    for n, value in ((1, True), (3, False)):  # fewer wrong or solved ones than half
        all_equal = scores._replace(exact=np.full_like(scores.exact, value))
        assert len(titles_of(all_equal, n)) == 3 * n
    hidden = scores._replace(n_labels=0 * scores.n_labels)
    assert titles_of(hidden, 1)[1].startswith("q_halt"), "nobody knows a hidden answer"


# ---------------------------------------------------------------------------------------------
# A picture never ends a run


def pictures(folder):
    """Every kind of picture that training and evaluation draw, as (function, *arguments)."""
    question, label = (b.astype(int) for b in sudoku.make_puzzle(np.random.RandomState(0), 4)[:2])
    trajectory = trajectory_of(question, label, (0.0,))
    split = Split(sudoku_dir(folder / "d"), "test")
    scores = scoring.score(Oracle(replace(TINY, halt_max_steps=1)), split, ALONE, 1, np.arange(1))
    return [
        (draw.plot, [write_log(folder / "run", *CURVES)], folder / "curves.png"),
        (draw.draw_steps, "sudoku", folder / "steps.png", trajectory),
        (draw.animate, "sudoku", folder / "steps.gif", trajectory),
        (draw.draw_examples, TINY, "sudoku", folder / "show.png", split, scores, 1),
    ]


def test_whatever_fails_in_a_picture_is_one_line(tmp_path, monkeypatch):
    functions = dict(inspect.getmembers(draw, inspect.isfunction))
    names = {name for name, f in functions.items() if f.__module__ == "tools.draw"}
    names |= {"replacing", "read_log"}
    names -= {"try_to_draw", "main", "read_run", "print_table", "print_means"}
    errors = cycle([RuntimeError("font\ncache"), MemoryError(), UserError("no space"), ImportError("Agg")])
    jobs = pictures(tmp_path)
    for name, error in zip(sorted(names), errors):
        said = []
        with monkeypatch.context() as patch:
            patch.setattr(draw.try_to_draw, "has_failed", False)
            patch.setattr(draw, name, Mock(side_effect=error))
            functions = {function: getattr(draw, function.__name__) for function, *_ in jobs}
            paths = [draw.try_to_draw(said.append, functions[function], *args) for function, *args in jobs]
        assert None in paths, f"{name} is used by no picture"
        assert len(said) == 1 and "\n" not in said[0], (name, said)
    monkeypatch.setattr(draw.try_to_draw, "has_failed", False)
    said = []
    paths = [draw.try_to_draw(said.append, *job) for job in jobs]
    assert all(path.exists() for path in paths) and not said
    for _ in range(2):
        assert draw.try_to_draw(said.append, draw.plot, [], tmp_path / "run/log.jsonl/x.png") is None
    assert len(said) == 1 and "cannot write" in said[0]


SCRIPT = """
import sys; sys.path.insert(0, {root!r})
from tools import draw
for i in range(2):
    print(draw.try_to_draw(print, draw.plot, [{run!r}], {png!r}))
"""


@pytest.mark.parametrize("environment", ["notebook", "no matplotlib", "no font cache"])
def test_a_picture_in_another_environment(tmp_path, environment):
    """With a notebook's MPLBACKEND the picture is drawn; without matplotlib there is one line."""
    run, png = write_log(tmp_path / "run", *CURVES), tmp_path / "a.png"
    script, env = SCRIPT.format(root=str(ROOT), run=run, png=str(png)), dict(os.environ, OMP_NUM_THREADS="1")
    if environment == "notebook":
        env["MPLBACKEND"] = "module://no_such_module.backend_inline"
    elif environment == "no matplotlib":
        script = "import sys; sys.modules['matplotlib'] = None\n" + script
    else:
        env |= {"MPLCONFIGDIR": "/proc/no/such", "TMPDIR": "/proc/no/such"}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    if environment == "no matplotlib":
        assert lines[1:] == ["None", "None"] and "matplotlib" in lines[0] and not png.exists()
    else:
        assert lines == [str(png)] * 2 and png_size(png) == (1200, 500)
