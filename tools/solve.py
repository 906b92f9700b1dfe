"""Solve a Sudoku or a maze and check the answer by the rules.

    python -m tools.solve --checkpoint RUN             its first test puzzle
    python -m tools.solve --checkpoint RUN "1.3.5..."
    python -m tools.solve --hf alphaXiv/trm-model-maze maze.txt --gif solved.gif

PUZZLE is a file or the text itself. A Sudoku is written as digits, and . 0 * ?
_ x - or spaces for blanks; a maze as rows of # (walls) and spaces or dots, with
one S (start) and one G, E or X (goal). Exit code 1: the answer is wrong.
"""

import os
import re
import sys
from math import isqrt
from pathlib import Path
from textwrap import dedent

import numpy as np

import prepare
from eval import checkpoint_flags, load_model, trajectory
from prepare import maze, sudoku
from tools import draw
from tools.common import Parser, bounded, cli, require, start_world

SIGNS = {"sudoku": "?.123456789", "maze": "?# SGo"}  # one for each token
MAZE_COLORS = (16, 240, 255, 41, 208, 33)  # one for each token, of the 256 colors of a terminal
FORMATS = {
    "sudoku": "digits, and . 0 * ? _ x - or spaces for blanks",
    "maze": "rows of # (walls) and spaces or dots, with one S (start) and one G, E or X (goal)",
}
RULES = {
    "sudoku": "a complete Sudoku that keeps the givens",
    "maze": "a shortest path from S to G on free cells",
}


# ---------------------------------------------------------------------------------------------
# Reading a puzzle


def read_sudoku(text, size):
    """The size * size cells, as digits and "." for blanks; "" if the text does not have as many."""
    lines = [line for line in text.splitlines() if not re.search("[#A-WYZa-wyz]", line)]  # no comments
    readings = (
        [line for line in lines if "--" not in line],  # the others are borders
        [line.replace("-", ".") for line in lines],
        [line.ljust(size).replace(" ", ".") for line in lines],
    )
    for rows in readings:
        one_line = max(rows, key=len, default="")  # of a file with one puzzle per line
        for part in ("".join(rows), one_line):
            cells = re.sub("[0*?_xX]", ".", part)
            cells = re.sub("[^0-9.]", "", cells)
            if len(cells) == size * size and max(cells) <= str(size):
                return cells
    return ""


def read_maze(text, size):
    """The size * size cells, as characters of "# SG"; "" if the text does not have as many."""
    aliases = str.maketrans("s.geExX", "S GGGGG")
    for reading in (text, text.strip("\n"), dedent(text), dedent(text).strip("\n")):
        lines = [line.translate(aliases).rstrip() for line in reading.splitlines()]
        rows = [line.ljust(size) for line in lines if set(line) <= set("# SG")]  # no comments
        cells = "".join(rows)
        if len(rows) == 1:
            cells = cells.ljust(size * size)
        complete = len(cells) == size * size and len(rows) in (1, size)
        if complete and cells.count("S") == cells.count("G") == 1:
            return cells
    return ""


def read_puzzle(puzzle, task, size):
    """(S,) tokens of a puzzle: a file or the text itself. Raises UserError."""
    text = puzzle
    if os.path.exists(puzzle):
        text = Path(puzzle).read_text(encoding="utf-8-sig", errors="replace")
    read = read_sudoku if task == "sudoku" else read_maze
    cells = read(text, size)
    message = f"{puzzle[:40]!r} is not a {size} x {size} {task}, nor a file with one"
    require(cells, f"{message}; write {FORMATS[task]}")
    return np.array([SIGNS[task].index(cell) for cell in cells], np.int32)


def task_of(loaded):
    """ "sudoku" or "maze". Raises UserError for a checkpoint of another task."""
    recipe = loaded.content.get("recipe")
    if loaded.split:
        task = loaded.split.task
    elif recipe:
        task = prepare.task_of(recipe)
    else:  # published weights: the number of tokens tells
        task = {11: "sudoku", 6: "maze"}.get(loaded.model.cfg.vocab_size)
    require(task in SIGNS, f"{loaded.path} is for neither Sudokus nor mazes; see eval.py --show")
    return task


# ---------------------------------------------------------------------------------------------
# Showing it


def show(title, task, grid):
    """Print a (rows, columns) grid of tokens, mazes in color on a terminal."""
    box_height, box_width = sudoku.BOX[len(grid)] if task == "sudoku" else grid.shape
    print(title)
    for r, tokens in enumerate(grid):
        if r and r % box_height == 0:
            print("+-".join(["--" * box_width] * (len(grid) // box_width)))
        cells = [f"{SIGNS[task][token]} " for token in tokens]
        if task == "maze" and sys.stdout.isatty():
            cells = [f"\033[48;5;{MAZE_COLORS[token]}m  \033[0m" for token in tokens]
        boxes = ["".join(cells[c : c + box_width]) for c in range(0, len(cells), box_width)]
        print("| ".join(boxes).rstrip())
    print()


def main(argv=None):
    parser = Parser(__doc__, "%(prog)s [flags] [PUZZLE]")
    add = parser.add_argument
    add("puzzle", nargs="?", metavar="PUZZLE", help="file or text (default: the first test puzzle)")
    checkpoint_flags(add)
    add("--steps", type=bounded(int, 1), metavar="N", help="supervision steps (default: the checkpoint's)")
    add("--gif", metavar="FILE", help="write an animation of the answer")
    add("--png", metavar="FILE", help="write a picture of the answer after some steps")
    args = parser.parse_args(argv)
    loaded = load_model(args, start_world(args.device), needs_data=args.puzzle is None)
    task = task_of(loaded)
    cfg = loaded.model.cfg
    size = isqrt(cfg.seq_len)
    steps = args.steps or cfg.halt_max_steps
    if args.puzzle is None:
        question = loaded.split.gather(np.zeros(1, int))[0][0]
    else:
        question = read_puzzle(args.puzzle, task, size)

    # ---- solve it and check the answer
    answers, q_halt = trajectory(loaded.model, question[None], np.zeros(1, np.int32), steps)
    answers = answers[:, 0]  # (steps, S)
    q_halt = q_halt[:, 0]
    answer = answers[-1].astype(np.int32)
    check = sudoku.check if task == "sudoku" else maze.check
    solved = bool(check(question, answer, size))

    # ---- show it
    show("question", task, question.reshape(size, size))
    show("answer", task, answer.reshape(size, size))
    if solved:
        print(f"solved: {RULES[task]}")
    else:
        print(f"not solved: the answer is not {RULES[task]}")
    print(f"{steps} supervision steps, q_halt {q_halt[-1]:+.2f}")
    wrong = answers != answer if solved else None  # which cells of a wrong answer are wrong is unknown
    puzzle = draw.Trajectory(question, answers, wrong, q_halt)
    for picture, path in ((draw.draw_steps, args.png), (draw.animate, args.gif)):
        if path and draw.try_to_draw(print, picture, task, path, puzzle):
            print(f"wrote {path}")
    return int(not solved)


if __name__ == "__main__":
    cli(main)
