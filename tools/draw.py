"""Pictures of runs and boards, and a table of runs.

    python -m tools.draw RUN          curves: train_vs_val.png in the run folder
    python -m tools.draw RUN RUN ...    comparison.png in the first folder

The table gives mean and standard deviation over the seeds of finished runs with
equal settings and equal data.
"""

import os
import statistics
from io import BytesIO
from itertools import product
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prepare import sudoku
from tools.common import IGNORE_LABEL, Parser, cli, one_line, replacing, require
from tools.run_folder import read_log

WIDTH, GIF_WIDTH, DPI = 12, 8, 100  # inches, inches, pixels per inch: 1200 and 800 pixels


def try_to_draw(say, function, *args):
    """function(*args), the path of a picture, or None if it fails in any way: a picture never ends a run.

    say: prints a line. Only the first failure of a process is reported."""
    try:
        return function(*args)
    except Exception as e:
        if not try_to_draw.has_failed:
            say(f"warning: could not draw a picture ({one_line(e)}); continuing without pictures")
        try_to_draw.has_failed = True
        return None


try_to_draw.has_failed = False


def new_figure(width, height):
    """An empty matplotlib Figure; width and height in inches."""
    # Notebooks set MPLBACKEND to a module that this Python may lack; drawing into a file needs no backend.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure  # imported here because it takes half a second
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure, path):
    """Write a PNG atomically and return its path."""
    with replacing(path) as tmp:
        figure.savefig(tmp, format="png")
    return path


# ---------------------------------------------------------------------------------------------
# Curves

CURVES = {"lm_loss": 0, "regression_loss": 0, "exact_acc": 1, "within_tolerance": 1}  # left or right axes
STYLES = {"train": {"alpha": 0.5}, "val": {"marker": "o", "lw": 2}}


def plot(run_dirs, path):
    """Draw loss and share of solved puzzles over steps, in training and validation; returns the path."""
    figure = new_figure(WIDTH, 5)
    axes = figure.subplots(1, 2)
    for i, run_dir in enumerate(run_dirs):
        records = read_log(Path(run_dir) / "log.jsonl")
        for metric, event in product(CURVES, STYLES):
            key = f"{event}/{metric}"  # null if no row halted between two records
            found = [r for r in records if r.get(key) is not None]
            points = [(r["step"], r[key]) for r in found]
            if points:
                label = f"{Path(run_dir).name} {event}"
                axes[CURVES[metric]].plot(*zip(*points), label=label, color=f"C{i}", **STYLES[event])
    axes[0].set(title="loss", yscale="log")
    axes[1].set(title="share of puzzles solved (exact_acc)", ylim=(-0.02, 1.02))
    for ax in axes:
        ax.set_xlabel("training step")
        ax.grid(alpha=0.3)
        ax.legend(*ax.get_legend_handles_labels())
    return save(figure, path)


# ---------------------------------------------------------------------------------------------
# The table of runs

SCORES = ("pass@2", "exact_acc", "optimal_path_acc", "within_tolerance")
# Settings of one start, of the machine or of the files, which do not change what a run learns.
NOT_COMPARED = set(
    "seed run_dir resume max_steps max_minutes device wandb compile allow_cpu grad_accum log_interval "
    "checkpoint_interval keep_last monitor monitor_mode eval_limit skip_sanity_checks".split()
)


def read_run(run_dir):
    """(seed, {(setting, its value as text)}, the last record) of a run; the record is None if the run was cut
    short or is still running. A setting that changed on resume has several values."""
    seed, result = None, None
    settings = set()
    for record in read_log(Path(run_dir) / "log.jsonl"):
        if record["event"] == "start":
            values = {**record["settings"], "data_sha256": record.get("data_sha256")}
            if values["data_sha256"]:
                values["data"] = None  # equal data may be in different folders
            for name in values.keys() - NOT_COMPARED:
                settings.add((name, str(values[name])))
            seed = values["seed"]
        if record["event"] == "result" and record["finished"]:
            result = record
    return seed, frozenset(settings), result


def print_table(run_dirs):
    """Print the runs in groups of equal settings and data, and the mean scores of each group."""
    groups = {}  # settings: {seed: (run_dir, result)}
    for run_dir in run_dirs:
        seed, settings, result = read_run(run_dir)
        group = groups.get(settings, {})
        if result is None:
            print(f"{run_dir}: not a finished run, so not counted")
        elif " n=0 " in result["line"]:
            print(f"{run_dir}: hidden test set, so it has no score")
        elif seed in group:
            original, _ = group[seed]
            print(f"{run_dir}: a copy of {original} (same settings and seed), so not counted")
        else:
            group[seed] = run_dir, result
            groups[settings] = group
    first = next(iter(groups), None)
    for number, (settings, group) in enumerate(groups.items(), 1):
        differences = {name for name, _ in first ^ settings}
        print(f"group {number}:", *(differences and ["differs from group 1 in", *sorted(differences)]))
        for seed, (run_dir, result) in group.items():
            print(f"  {run_dir}: seed {seed}, {result['line']}")
        print_means([result for _, result in group.values()])


def print_means(results):
    """Print mean and standard deviation over seeds of each score."""
    for score in SCORES:
        values = [result[score] for result in results if result.get(score) is not None]
        if len(values) > 1:
            mean = statistics.mean(values)
            deviation = statistics.stdev(values)
            print(f"  {score} {mean:.4f}, standard deviation {deviation:.4f}, {len(values)} seeds")


# ---------------------------------------------------------------------------------------------
# Boards

OUTSIDE, END = "#FFFFFF", "#D9D9D9"
WRONG, ANSWER = "#D50000", "#0D47A1"
ARC_COLORS = "#000000 #0074D9 #FF4136 #2ECC40 #FFDC00 #AAAAAA #F012BE #FF851B #7FDBFF #870C25"  # arcprize.org
COLORS = {  # of the tokens
    "arc": [OUTSIDE, END, *ARC_COLORS.split()],
    "maze": [
        OUTSIDE,
        "#37474F",  # wall
        "#FFFFFF",  # free
        "#2ECC40",  # start
        "#FF851B",  # goal
        "#64B5F6",  # path
    ],
    "tokens": [OUTSIDE, *(f"C{i}" for i in range(255))],  # matplotlib repeats its ten colors
    "sudoku": [OUTSIDE, "#E6E6E6", "#FFCDD2"],  # of answers, givens and wrong cells, not of tokens
}
CROSS = (WRONG, "x: wrong cell")
LEGEND = {
    "arc": [(END, "end of the grid"), CROSS],
    "maze": [*zip(COLORS["maze"][1:], ("wall", "free", "start", "goal", "path")), CROSS],
    "tokens": [CROSS],
    "sudoku": [*zip(COLORS["sudoku"][1:], ("given", "wrong cell")), (ANSWER, "answer")],
    "regression": [(WRONG, "x: outside the tolerance")],
}


class Trajectory(NamedTuple):
    """One puzzle and its answer after every supervision step. In regression, boards are (S, d) numbers."""

    question: np.ndarray  # (S,) tokens
    answers: np.ndarray  # (steps, S) tokens
    wrong: np.ndarray | None  # (steps, S) bool, the cells to mark; None if the target is unknown
    q_halt: np.ndarray  # (steps,) logits
    label: np.ndarray | None = None  # (S,) the target, or None


def wrong_cells(cfg, answers, label):
    """(..., S) bool: where answers miss the label; in regression, by the tolerance or more."""
    if cfg.regression:
        error = np.square(answers - label).mean(-1)
        return (error >= cfg.halt_tolerance) & ~np.isnan(label).any(-1)
    return (answers != label) & (label != IGNORE_LABEL)


def draw_panel(ax, task, board, wrong, given, low, high):
    """Draw a board, (S,) tokens or (S, d) numbers with colors from low to high, and mark its wrong cells.

    wrong, given: (S,) bool; the givens are those of a Sudoku."""
    from matplotlib.colors import ListedColormap

    S = len(board)
    square = isqrt(S) ** 2 == S and task != "regression"
    shape = (isqrt(S), -1) if square else (1, S)
    wrong = wrong.reshape(shape)
    if task == "regression":
        cells = board.T  # (d, S)
        colors = "viridis"
    else:
        cells = board.reshape(shape)
        colors = ListedColormap(COLORS[task])
        low, high = 0, colors.N - 1
    if task == "sudoku":
        given = given.reshape(shape)
        draw_digits(ax, cells, wrong, given)
        cells = np.where(wrong, 2, given)
    else:
        y, x = np.nonzero(wrong)
        style = {"color": WRONG, "markersize": 8, "markeredgewidth": 2}
        ax.plot(x + 0.5, y + 0.5, "x", **style)
    rows, columns = cells.shape
    if task == "arc":  # only the used part of the canvas
        rows, columns = 1 + np.argwhere((cells > 0) | wrong).max(0, initial=0)
    line_width = 0.3 if square else 0
    ax.pcolormesh(cells, cmap=colors, vmin=low, vmax=high, edgecolors="#888888", linewidth=line_width)
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.set(xticks=[], yticks=[])
    ax.set_aspect("equal" if square else "auto")


def draw_digits(ax, board, wrong, given):
    """Draw the digits and box borders of a Sudoku. board, wrong, given: (size, size) tokens, bool, bool."""
    size = len(board)
    box_height, box_width = sudoku.BOX[size]
    borders = {"color": "black", "clip_on": False}
    ax.hlines(range(0, size + 1, box_height), 0, size, **borders)
    ax.vlines(range(0, size + 1, box_width), 0, size, **borders)
    ink = np.where(given, "black", ANSWER)
    ink[wrong] = WRONG
    font_size = 0.5 * ax.get_window_extent().width / size
    style = {"ha": "center", "va": "center_baseline", "fontsize": font_size}
    for r, c in np.argwhere(board > 1):
        ax.text(c + 0.5, r + 0.5, board[r, c] - 1, color=ink[r, c], **style)


def draw_panels(task, title, panels, columns, width=WIDTH):
    """A matplotlib Figure of boards, `columns` in a row, with a title and a legend. width: in inches.

    panels: [(title, board, wrong, given)], see draw_panel."""
    rows = -(-len(panels) // columns)
    figure = new_figure(width, rows * (width / columns + 0.25) + 1.0)
    from matplotlib.patches import Patch

    boards = [board for _, board, _, _ in panels]
    low = min(map(np.nanmin, boards))
    high = max(map(np.nanmax, boards))
    for number, (name, *arrays) in enumerate(panels, 1):
        ax = figure.add_subplot(rows, columns, number)
        ax.set_title(name, fontsize=10)
        draw_panel(ax, task, *arrays, low, high)
    handles = []
    for color, text in LEGEND[task]:
        handles.append(Patch(facecolor=color, edgecolor="grey", label=text))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    if task == "regression":
        title += f" (colors from {low:.3g} to {high:.3g})"
    figure.suptitle(title, fontsize=14)
    return figure


# ---------------------------------------------------------------------------------------------
# How puzzles are solved


def make_panels(trajectory, steps, name="question", step_title="step {}: "):
    """For draw_panels: question, answers after some steps (counted from 1), and the target if it is known."""
    question, answers, all_wrong, q_halt, label = trajectory
    given = question > 1
    none = np.zeros(len(question), bool)
    panels = [(name, question, none, given)]
    for step in steps:
        title = step_title.format(step)
        wrong = none
        if all_wrong is not None:
            wrong = all_wrong[step - 1]
            title += f"{wrong.sum()} wrong, "
        title += f"q_halt {q_halt[step - 1]:+.1f}"
        panels.append((title, answers[step - 1], wrong, given))
    if label is not None:
        panels.append(("target", label, none, given))
    return panels


def draw_steps(task, path, trajectory):
    """Draw a PNG of one puzzle: question, answer after 1, 2, 4, ... steps, target; returns the path."""
    last = len(trajectory.answers)
    steps = [step for step in (1, 2, 4, 8, 16) if step < last] + [last]
    panels = make_panels(trajectory, steps)
    return save(draw_panels(task, "The answer after some supervision steps", panels, 4), path)


def animate(task, path, trajectory):
    """Draw a GIF of the answer, half a second a step, beside question and target; returns the path."""
    from PIL import Image

    frames = []
    for step in range(1, 1 + len(trajectory.answers)):
        panels = make_panels(trajectory, [step])
        figure = draw_panels(task, "The answer, step by step", panels, len(panels), GIF_WIDTH)
        png = BytesIO()
        figure.savefig(png)
        frames.append(Image.open(png).convert("RGB"))
    durations = [500] * (len(frames) - 1) + [3000]  # milliseconds
    with replacing(path) as tmp:
        frames[0].save(tmp, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return path


def draw_examples(cfg, task, path, split, scores, n):
    """Draw a PNG of n scored test puzzles, half of them wrong if there are enough; returns the path.

    scores: of N rows, with `examples` (their numbers in the split), preds, exact, n_labels and q_halt."""
    wrong_first = np.argsort(scores.exact, kind="stable")
    half_wrong, half_solved = wrong_first[: n // 2], wrong_first[-(n - n // 2) :]
    chosen = np.unique([*half_wrong, *half_solved])
    inputs, labels, _ = split.gather(scores.examples[chosen])
    panels = []
    for row, question, label in zip(chosen, inputs, labels):
        answers, wrong = scores.preds[[row]], None  # one step
        if scores.n_labels[row]:  # else the target is hidden
            wrong = wrong_cells(cfg, answers, label)
        trajectory = Trajectory(question, answers, wrong, scores.q_halt[[row]], label)
        panels += make_panels(trajectory, [1], f"puzzle {scores.examples[row]}", step_title="")
    return save(draw_panels(task, "Test puzzles: question, answer, target", panels, 6), path)


def main(argv=None):
    parser = Parser(__doc__, "%(prog)s RUN [RUN ...]")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, with a log.jsonl")
    runs = parser.parse_args(argv).runs
    require(read_log(Path(runs[0]) / "log.jsonl"), f"{runs[0]} has no log.jsonl; pass run folders")
    name = "train_vs_val.png" if len(runs) == 1 else "comparison.png"
    print(plot(runs, Path(runs[0]) / name))
    print_table(runs)


if __name__ == "__main__":
    cli(main)
