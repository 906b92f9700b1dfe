"""Pictures: the curves of runs, boards, how a puzzle is solved.

    python draw.py RUN               its curves: train_vs_val.png in its folder
    python draw.py RUN RUN ...       comparison.png in the folder of the first
"""
from io import BytesIO
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import Parser, UserError, cli, write
from model import IGNORE
from prepare import sudoku
from rundir import read_log

# `kind` always says what boards are: "sudoku", "maze", "arc", "numbers" (regression) or "tokens" (others).
# matplotlib is imported where it is needed: it takes half a second.
WIDTH, GIF_WIDTH, DPI = 12, 8, 100      # inches, inches, pixels per inch: 1200 and 800 pixels


def save(figure, path):
    """Write a PNG, all or nothing; returns its path. Raises OSError."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    write(path, drawn.getvalue())
    return path


# ---------------------------------------------------------------------------------------------
# Curves

CURVES = {"loss": ("lm_loss", "regression_loss"),
          "share of puzzles that are right (exact_acc)": ("exact_acc", "within_tolerance")}


def plot(run_dirs, path):
    """PNG of the loss and of the share of puzzles that are right over steps, in training and validation, of
    one or several runs; returns its path. Raises UserError for a folder whose log has nothing to draw."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(WIDTH, 5), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2)
    for i, run_dir in enumerate(run_dirs):
        records = read_log(Path(run_dir) / "log.jsonl")
        if not any(r["event"] in ("train", "val") for r in records):
            raise UserError(f"{run_dir}/log.jsonl has no training lines to draw; name a run folder")
        several = len(run_dirs) > 1
        name, colours = (f"{Path(run_dir).name}: ", (f"C{i}", f"C{i}")) if several else ("", ("C0", "C1"))
        for ax, metrics in zip(axes, CURVES.values()):
            draw_curve(ax, records, "train", metrics, label=f"{name}train", color=colours[0], alpha=0.5)
            draw_curve(ax, records, "val", metrics, label=f"{name}val", color=colours[1], marker="o", lw=2)
    for ax, title in zip(axes, CURVES):
        ax.set(xlabel="training step", title=title)
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0].set_yscale("log")
    axes[1].set_ylim(-0.02, 1.02)
    return save(figure, path)


def draw_curve(ax, records, event, metrics, **style):
    """One of the metrics over steps: a task has one. It is null where no row halted between two records."""
    points = [(r["step"], r[f"{event}/{metric}"]) for r in records for metric in metrics
              if r.get(f"{event}/{metric}") is not None]
    ax.plot([x for x, _ in points], [y for _, y in points], **style)


# ---------------------------------------------------------------------------------------------
# Boards

OUTSIDE, END, WALL = "#FFFFFF", "#D9D9D9", "#37474F"
COLOURS = {     # of the tokens; of ARC the last ten are those of its site
    "arc": (OUTSIDE, END, "#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00", "#AAAAAA", "#F012BE",
            "#FF851B", "#7FDBFF", "#870C25"),
    "maze": (OUTSIDE, WALL, "#FFFFFF", "#2ECC40", "#FF851B", "#64B5F6"),
    "tokens": (OUTSIDE, *(f"C{i}" for i in range(255))),    # matplotlib knows ten, again and again
    "sudoku": (OUTSIDE, "#E6E6E6", "#FFCDD2")}              # not of tokens: answer, given, wrong
WRONG, ANSWER = "#D50000", "#0D47A1"
CROSS = (WRONG, "x: wrong cell")
LEGEND = {
    "sudoku": [*zip(COLOURS["sudoku"][1:], ("given", "wrong cell")), (ANSWER, "answer")],
    "maze": [*zip(COLOURS["maze"][1:], ("wall", "open", "start", "goal", "path")), CROSS],
    "arc": [(END, "end of the grid"), CROSS], "tokens": [CROSS],
    "numbers": [("#F2B3B3", "outside the tolerance")]}


class Panel(NamedTuple):
    title: str
    board: np.ndarray                   # (S,) tokens, or (S, d) numbers
    question: np.ndarray                # likewise: where a Sudoku has its givens
    wrong: np.ndarray | None = None     # (S,) bool: cells to mark


def wrong_cells(cfg, board, label):
    """(..., S) bool: where predicted boards miss their labels; regression: by the tolerance or more."""
    if cfg.regression:
        return (np.square(board - label).mean(-1) >= cfg.halt_tolerance) & ~np.isnan(label).any(-1)
    return (board != label) & (label != IGNORE)


def draw_cells(ax, kind, grid):
    """(rows, columns) tokens as colours; returns the size of a cell in points."""
    from matplotlib.colors import to_rgb
    colours = np.array([to_rgb(colour) for colour in COLOURS[kind]])
    tokens = grid.astype(int).clip(0) % len(colours)     # uint8 is too small for their number
    ax.imshow(colours[tokens], aspect="equal" if len(grid) > 1 else "auto")
    box, (rows, columns) = ax.get_window_extent(), grid.shape
    return 72 / DPI * min(box.width / columns, box.height / rows)


def draw_sudoku(ax, grid, given, wrong):
    """grid, given, wrong: (side, side) tokens, bool and bool."""
    side, (height, width) = len(grid), sudoku.BOX[len(grid)]
    points = draw_cells(ax, "sudoku", np.where(wrong, 2, given))
    for i in range(side + 1):
        ax.axhline(i - 0.5, color="black", lw=0.4 if i % height else 1.6)
        ax.axvline(i - 0.5, color="black", lw=0.4 if i % width else 1.6)
    for (r, c), token in np.ndenumerate(grid):
        colour = WRONG if wrong[r, c] else "black" if given[r, c] else ANSWER
        ax.text(c, r, str(token - 1) if token > 1 else "", ha="center", va="center_baseline", color=colour,
                fontsize=points / 2, weight="bold" if given[r, c] else None)


def draw_tokens(ax, kind, grid, wrong):
    """grid, wrong: (rows, columns) tokens and bool; crosses where it is wrong."""
    if kind == "arc":       # as much of the canvas as is used
        used = (grid > 0) | wrong
        h, w = (max(1, 1 + np.flatnonzero(used.any(axis)).max(initial=0)) for axis in (1, 0))
        grid, wrong = grid[:h, :w], wrong[:h, :w]
        ax.vlines(np.arange(0.5, w - 1), -0.5, h - 0.5, color="#888888", lw=0.3)
        ax.hlines(np.arange(0.5, h - 1), -0.5, w - 0.5, color="#888888", lw=0.3)
    points = draw_cells(ax, kind, grid)
    y, x = np.nonzero(wrong)
    ax.scatter(x, y, marker="x", color=WRONG, s=(0.6 * points) ** 2, linewidths=0.1 * points)


def draw_panel(ax, kind, panel, low, high):
    """One board. low, high: the least and the greatest number of all boards."""
    ax.set(xticks=[], yticks=[])
    ax.set_title(panel.title, fontsize=10)
    S = len(panel.board)
    wrong = np.zeros(S, bool) if panel.wrong is None else panel.wrong
    shape = (isqrt(S), -1) if isqrt(S) ** 2 == S else (1, S)
    if kind == "numbers":
        ax.imshow(panel.board.T, aspect="auto", cmap="viridis", vmin=low, vmax=high)
        for i in np.flatnonzero(wrong):
            ax.axvspan(i - 0.5, i + 0.5, color=WRONG, alpha=0.3)
    elif kind == "sudoku":
        draw_sudoku(ax, *(a.reshape(shape) for a in (panel.board, panel.question > 1, wrong)))
    else:
        draw_tokens(ax, kind, panel.board.reshape(shape), wrong.reshape(shape))


def draw_panels(kind, title, panels, columns, width=WIDTH):
    """A matplotlib Figure of boards, `columns` in a row, with a legend. width: in inches."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    rows = -(-len(panels) // columns)
    height = rows * (width / columns + 0.25) + 1.0
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.6 / height, top=1 - 0.8 / height, wspace=0.08,
                           hspace=0.16)
    low, high = min(np.nanmin(p.board) for p in panels), max(np.nanmax(p.board) for p in panels)
    for ax, panel in zip(axes, panels):
        draw_panel(ax, kind, panel, low, high)
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    handles = [Patch(facecolor=colour, edgecolor="grey", label=text) for colour, text in LEGEND[kind]]
    if kind == "numbers":
        handles.append(Patch(alpha=0, label=f"colours from {low:.3g} to {high:.3g}"))
    figure.suptitle(title, fontsize=14)
    figure.legend(handles=handles, loc="lower center", ncols=6, frameon=False)
    return figure


# ---------------------------------------------------------------------------------------------
# How puzzles are solved

class Thoughts(NamedTuple):
    """One puzzle and what was thought about it."""
    question: np.ndarray                # (S,) tokens, or (S, input_dim) numbers
    boards: np.ndarray                  # (steps, S), or (steps, S, target_dim): the answer after every step
    wrong: np.ndarray | None            # (steps, S) bool: the cells to mark; None where nobody knows
    q: np.ndarray                       # (steps,) q_halt, a logit
    label: np.ndarray | None = None     # like a board: the target, where it is known


def panels_of(thoughts, steps, prefix="step {}: "):
    """The question, the answer after some steps (counted from 1), and the target where it is known."""
    panels = [Panel("question", thoughts.question, thoughts.question)]
    for step in steps:
        wrong = None if thoughts.wrong is None else thoughts.wrong[step - 1]
        count = "" if wrong is None else f"{wrong.sum()} wrong, " if wrong.any() else "no cell wrong, "
        title = f"{prefix.format(step)}{count}q_halt {thoughts.q[step - 1]:+.1f}"
        panels.append(Panel(title, thoughts.boards[step - 1], thoughts.question, wrong))
    if thoughts.label is not None:
        panels.append(Panel("target", thoughts.label, thoughts.question))
    return panels


def draw_steps(kind, path, thoughts):
    """PNG of one puzzle: the question, its answer after some steps, the target; returns its path."""
    last = len(thoughts.boards)
    panels = panels_of(thoughts, [s for s in (1, 2, 4, 8, 16) if s < last] + [last])
    columns = 3 if thoughts.label is None else 4
    return save(draw_panels(kind, "The answer after some supervision steps", panels, columns), path)


def animate(kind, path, thoughts):
    """GIF of the answer, half a second a step, beside the question and the target; returns its path."""
    from PIL import Image
    frames, gif = [], BytesIO()
    for step in range(1, 1 + len(thoughts.boards)):
        panels, drawn = panels_of(thoughts, [step]), BytesIO()
        draw_panels(kind, "The answer, step by step", panels, len(panels), GIF_WIDTH).savefig(drawn)
        frames.append(Image.open(drawn).convert("RGB"))
    durations = [500] * (len(frames) - 1) + [3000]
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    write(path, gif.getvalue())
    return path


def draw_examples(cfg, kind, path, split, scores, n):
    """PNG of n test puzzles, half of them wrong ones where there are any; returns its path.

    scores: has, for N rows, `examples` (which of the split), `preds`, `n` (cells asked), `right` and `q`."""
    bad, good = np.flatnonzero(~scores.right), np.flatnonzero(scores.right)
    n_bad = max(min(len(bad), n // 2), n - len(good))
    chosen, panels = [*bad[:n_bad], *good[:n - n_bad]], []
    inputs, labels, _ = split.gather(scores.examples[chosen])
    for row, question, label in zip(chosen, inputs, labels):
        board = scores.preds[[row]]     # one step
        wrong = wrong_cells(cfg, board, label) if scores.n[row] else None       # None: a hidden answer
        thoughts = Thoughts(question, board, wrong, scores.q[[row]], label)
        first, *others = panels_of(thoughts, [1], prefix="")
        panels += [first._replace(title=f"puzzle {scores.examples[row]}"), *others]
    return save(draw_panels(kind, "Test puzzles: question, answer, target", panels, 6), path)


def flags():
    parser = Parser(__doc__)
    parser.usage = "%(prog)s [flags] RUN ..."
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, with a log.jsonl")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    name = "train_vs_val.png" if len(args.runs) == 1 else "comparison.png"
    print(plot(args.runs, Path(args.runs[0]) / name))


if __name__ == "__main__":
    cli(main)
