"""Pictures: the curves of runs, boards, how a puzzle is solved.

    python draw.py RUN               the curves of a run, into its folder
    python draw.py RUN RUN ...       of several, into the folder of the first
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

def draw_run(axes, records, name, colours):
    """Training and validation of one run, from the records of its log, into the axes of loss and of score.

    name: in front of the labels. colours: of training and of validation."""
    start = next((r for r in reversed(records) if r["event"] == "start"), {})
    regression = any("val/regression_loss" in r or "train/regression_loss" in r for r in records)
    metrics = ("regression_loss", "within_tolerance") if regression else ("lm_loss", "exact_acc")
    val = "val (EMA)" if start.get("settings", {}).get("ema") else "val"
    for ax, metric in zip(axes, metrics):
        ax.set(xlabel="training step", title=metric)
        for event, label, colour in zip(("train", "val"), ("train", val), colours):
            key = f"{event}/{metric}"       # null where no row halted between two lines of the log
            points = [(r["step"], r[key]) for r in records if r["event"] == event and r.get(key) is not None]
            style = {"marker": "o", "lw": 2} if event == "val" else {"alpha": 0.5}
            ax.plot([x for x, _ in points], [y for _, y in points], color=colour, label=name + label, **style)


def plot(run_dirs, path):
    """PNG of loss and whole-puzzle accuracy over steps, in training and validation, of one or several runs;
    returns its path. Raises UserError for a folder whose log has nothing to draw."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
    figure = Figure(figsize=(WIDTH, 5), dpi=DPI)
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.11, top=0.92, wspace=0.13)
    loss, score = axes = figure.subplots(1, 2)
    for i, run_dir in enumerate(run_dirs):
        records = read_log(Path(run_dir) / "log.jsonl")
        if not any(r["event"] in ("train", "val") for r in records):
            raise UserError(f"{run_dir}/log.jsonl has no training lines to draw; name a run folder")
        if len(run_dirs) == 1:
            draw_run(axes, records, "", ("C0", "C1"))
        else:
            draw_run(axes, records, f"{Path(run_dir).name}: ", (f"C{i}", f"C{i}"))
    loss.set_yscale("log")      # its ticks as plain numbers, some between the powers of ten
    loss.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 5, 7)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("{x:g}")
    score.set_ylim(-0.02, 1.02)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9)
    return save(figure, path)


# ---------------------------------------------------------------------------------------------
# Boards

class Panel(NamedTuple):
    title: str
    board: np.ndarray                   # (S,) tokens, or (S, d) numbers
    question: np.ndarray                # likewise: where a Sudoku has its givens
    wrong: np.ndarray | None = None     # (S,) bool: cells to mark


OUTSIDE, END, WALL = "#FFFFFF", "#D9D9D9", "#37474F"
ARC_COLOURS = (OUTSIDE, END, "#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00", "#AAAAAA", "#F012BE",
               "#FF851B", "#7FDBFF", "#870C25")     # the last ten are those of the ARC site
MAZE_COLOURS = (OUTSIDE, WALL, "#FFFFFF", "#2ECC40", "#FF851B", "#64B5F6")
COLOURS = {"arc": ARC_COLOURS, "maze": MAZE_COLOURS}
WRONG, PALE, GIVEN, ANSWER = "#D50000", "#FFCDD2", "#E6E6E6", "#0D47A1"
LEGEND = {"sudoku": [(GIVEN, "given"), (ANSWER, "answer"), (PALE, "wrong cell")],
          "maze": list(zip(MAZE_COLOURS[1:], ("wall", "open", "start", "goal", "path"))),
          "arc": [(END, "end of the grid")], "numbers": [(PALE, "outside the tolerance")], "tokens": []}


def wrong_cells(cfg, board, label):
    """(..., S) bool: where predicted boards miss their labels; regression: by the tolerance or more."""
    if cfg.regression:
        return (np.square(board - label).mean(-1) >= cfg.halt_tolerance) & ~np.isnan(label).any(-1)
    return (board != label) & (label != IGNORE)


def draw_digits(ax, grid, given, wrong):
    """A Sudoku; grid, given, wrong: (side, side) tokens, bool and bool."""
    from matplotlib.colors import ListedColormap
    side, (rows, cols) = len(grid), sudoku.BOX[len(grid)]
    ax.imshow(np.where(wrong, 2, given), cmap=ListedColormap(("white", GIVEN, PALE)), vmin=0, vmax=2)
    for i in range(side + 1):
        ax.axhline(i - 0.5, color="black", lw=0.4 if i % rows else 1.6)
        ax.axvline(i - 0.5, color="black", lw=0.4 if i % cols else 1.6)
    size = 0.5 * 72 / DPI * ax.get_window_extent().width / side         # points
    for (r, c), token in np.ndenumerate(grid):
        colour = WRONG if wrong[r, c] else "black" if given[r, c] else ANSWER
        ax.text(c, r, str(token - 1) if token > 1 else "", ha="center", va="center_baseline", fontsize=size,
                color=colour, weight="bold" if given[r, c] else None)


def draw_cells(ax, kind, grid, wrong, top):
    """Coloured cells; grid, wrong: (rows, columns) tokens and bool. top: the token of the last colour."""
    from matplotlib.colors import ListedColormap
    if kind == "arc":       # as much of the canvas as is used
        used = (grid > 0) | wrong
        h, w = (max(1, 1 + np.flatnonzero(used.any(axis)).max(initial=0)) for axis in (1, 0))
        grid, wrong = grid[:h, :w], wrong[:h, :w]
        ax.set_xticks(np.arange(0.5, w - 1), minor=True)
        ax.set_yticks(np.arange(0.5, h - 1), minor=True)
        ax.grid(which="minor", color="#888888", lw=0.3)
        ax.tick_params(which="minor", length=0)
    colours = ListedColormap(COLOURS[kind]) if kind in COLOURS else "tab20"
    ax.imshow(grid, cmap=colours, vmin=0, vmax=top, aspect="equal" if len(grid) > 1 else "auto")
    box = ax.get_window_extent()
    cell = 72 / DPI * min(box.width / grid.shape[1], box.height / grid.shape[0])        # points
    ax.scatter(*np.nonzero(wrong)[::-1], marker="x", color=WRONG, s=(0.6 * cell) ** 2,
               linewidths=max(0.8, 0.08 * cell))


def draw_panel(ax, kind, panel, top):
    """One board. top: the number, or the token, of the last colour."""
    ax.set(xticks=[], yticks=[])
    ax.set_title(panel.title, fontsize=10)
    S = len(panel.board)
    wrong = np.zeros(S, bool) if panel.wrong is None else panel.wrong
    shape = (isqrt(S), -1) if isqrt(S) ** 2 == S else (1, S)
    if kind == "numbers":
        ax.imshow(panel.board.T, aspect="auto", cmap="viridis", vmin=-top, vmax=top)
        for i in np.flatnonzero(wrong):
            ax.axvspan(i - 0.5, i + 0.5, color=WRONG, alpha=0.3)
    elif kind == "sudoku":
        draw_digits(ax, *(a.reshape(shape) for a in (panel.board, panel.question > 1, wrong)))
    else:
        draw_cells(ax, kind, panel.board.reshape(shape), wrong.reshape(shape), top)


def draw_panels(kind, title, panels, columns, width=WIDTH):
    """A matplotlib Figure of boards, `columns` in a row, with a legend. width: in inches."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    rows = -(-len(panels) // columns)
    height = rows * (width / columns + 0.25) + 1.0
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.6 / height, top=1 - 0.8 / height, wspace=0.08,
                           hspace=0.16)
    top = max(np.nanmax(np.abs(p.board)) for p in panels)      # the same in all panels
    for ax, panel in zip(axes, panels):
        draw_panel(ax, kind, panel, len(COLOURS[kind]) - 1 if kind in COLOURS else top)
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    handles = [Patch(facecolor=colour, edgecolor="grey", label=text) for colour, text in LEGEND[kind]]
    if kind == "numbers":
        handles.append(Patch(alpha=0, label=f"colours from {-top:.3g} to {top:.3g}"))
    elif kind != "sudoku":
        handles.append(Line2D([], [], color=WRONG, marker="x", ls="", label="wrong cell"))
    figure.suptitle(title, fontsize=14)
    figure.legend(handles=handles, loc="lower center", ncols=6, frameon=False)
    return figure


# ---------------------------------------------------------------------------------------------
# How puzzles are solved

EACH_STEP = "The answer after each supervision step"


class Thoughts(NamedTuple):
    """One puzzle and what was thought about it."""
    question: np.ndarray                # (S,) tokens, or (S, input_dim) numbers
    boards: np.ndarray                  # (steps, S), or (steps, S, target_dim): the answer after every step
    wrong: np.ndarray | None            # (steps, S) bool: the cells to mark; None where nobody knows
    q: np.ndarray                       # (steps,) q_halt, a logit
    label: np.ndarray | None = None     # like a board: the target, where it is known


def panels_of(kind, thoughts, steps, prefix="step {}: "):
    """The question, the answer after some steps (counted from 1), and the target where it is known."""
    panels = [Panel("question", thoughts.question, thoughts.question)]
    for step in steps:
        wrong = None if thoughts.wrong is None else thoughts.wrong[step - 1]
        count = "" if wrong is None else f"{wrong.sum()} wrong, " if wrong.any() else "no cell wrong, "
        title = f"{prefix.format(step)}{count}q_halt {thoughts.q[step - 1]:+.1f}"
        panels.append(Panel(title, thoughts.boards[step - 1], thoughts.question, wrong))
    if thoughts.label is not None:      # cells that are not asked for look like padding
        label = thoughts.label if kind == "numbers" else thoughts.label.clip(0)
        panels.append(Panel("target", label, thoughts.question))
    return panels


def draw_steps(kind, path, thoughts, title=EACH_STEP):
    """PNG of one puzzle: the question, its answer after some steps, the target; returns its path."""
    last = len(thoughts.boards)
    panels = panels_of(kind, thoughts, [s for s in (1, 2, 4, 8, 16) if s < last] + [last])
    return save(draw_panels(kind, title, panels, 3 if thoughts.label is None else 4), path)


def animate(kind, path, thoughts, title=EACH_STEP):
    """GIF of the answer, half a second a step, beside the question and the target; returns its path."""
    from PIL import Image
    frames, gif = [], BytesIO()
    for step in range(1, 1 + len(thoughts.boards)):
        panels, drawn = panels_of(kind, thoughts, [step]), BytesIO()
        draw_panels(kind, title, panels, len(panels), GIF_WIDTH).savefig(drawn)
        frames.append(np.asarray(Image.open(drawn).convert("RGB")))                     # (height, width, 3)
    height, width, _ = frames[0].shape
    strip = Image.fromarray(np.concatenate(frames)).quantize(64)    # one palette for all halves the file
    first, *others = (strip.crop((0, y, width, y + height)) for y in range(0, strip.height, height))
    first.save(gif, "GIF", save_all=True, append_images=others, duration=[500] * len(others) + [3000], loop=0)
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
        first, *others = panels_of(kind, thoughts, [1], prefix="")
        panels += [first._replace(title=f"puzzle {scores.examples[row]}"), *others]
    return save(draw_panels(kind, "Test puzzles: question, answer, target", panels, 6), path)


def flags():
    parser = Parser(__doc__)
    parser.usage = "%(prog)s [flags] RUN ..."
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, with a log.jsonl")
    parser.add_argument("--output", metavar="FILE",
                        help="a PNG; by default train_vs_val.png or comparison.png in the first folder")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    name = "train_vs_val.png" if len(args.runs) == 1 else "comparison.png"
    print(plot(args.runs, args.output or Path(args.runs[0]) / name))


if __name__ == "__main__":
    cli(main)
