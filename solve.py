"""Solve one puzzle and look at it: a Sudoku, a maze or an ARC task.

    python solve.py --checkpoint RUN         the first puzzle of its test split
    python solve.py --checkpoint RUN "1.3.5..."
    python solve.py --hf alphaXiv/trm-model-maze maze.txt --gif thinking.gif
    python solve.py --checkpoint RUN task.json --augment 8 --adapt 200

A Sudoku: digits, and . 0 * ? _ x or spaces for blanks; commas, brackets, pipes
and dashes may stand between. A maze: rows of # (walls), spaces or dots, with
one S and one G. An ARC task: JSON, {"train": [{"input", "output"}], "test":
[{"input"}]}. Exit code 1: the answer is wrong.
"""
import json
import os
import re
import sys
from dataclasses import replace
from math import isqrt
from pathlib import Path

import common  # noqa: F401  before torch, for a Ctrl-C while that is imported
import numpy as np
import torch

import draw
import train
from common import Parser, UserError, World, cli, progress, start_world, within
from data import on_the_board, windows
from eval import checkpoint_flags, open_model, thoughts
from model import IGNORE, Batch
from prepare import arc, maze, sudoku
from vote import grid_key, test_puzzles

ADAPT_ROWS = 32     # of a batch of test-time training


# ---------------------------------------------------------------------------------------------
# Reading a puzzle

def read_text(source):
    """The text that the command line means: of a file, of stdin ("-"), or itself. Raises UserError."""
    if source == "-":
        text = sys.stdin.read()
    elif os.path.exists(source):
        text = Path(source).read_text(encoding="utf-8", errors="replace")
    elif re.match(r"\s*[\[{]", source) or not re.search(r"[a-wyzA-FH-RT-WYZ/\\]", source):
        text = source
    else:       # letters that stand in no Sudoku and no maze
        raise UserError(f"{source}: file not found; name a file, text, or - for stdin")
    return text.removeprefix("\ufeff")      # some editors mark UTF-8 with it


def read_sudoku(text, side):
    """Tokens (S,) of a Sudoku. Raises UserError."""
    rows = "".join(line.ljust(side) for line in text.splitlines())
    # a dash, or a space, stands between cells or is a blank: whatever makes a whole board
    readings = [re.sub(r"[\s,;|+=()\[\]{}'\"-]", "", reading)
                for reading in (text, text.replace("-", "."), rows.replace(" ", "."))]
    cells = next((cells for cells in readings if len(cells) == side * side), readings[0])
    cells = re.sub("[0*?_xX]", ".", cells)
    return tokens_of("sudoku", cells, side, ".123456789"[:1 + side])


def read_maze(text, side):
    """Tokens (S,) of a maze. Raises UserError."""
    lines = text.strip("\r\n").splitlines()
    width = side if len(lines) > 1 else side * side     # one line may hold all of it
    cells = "".join(line.rstrip().ljust(width) for line in lines).replace(".", " ")
    tokens = tokens_of("maze", cells, side, "# SG")
    if cells.count("S") != 1 or cells.count("G") != 1:
        raise UserError(f"the maze has {cells.count('S')} S and {cells.count('G')} G; give one of each")
    return tokens


def tokens_of(kind, cells, side, alphabet):
    """(S,) tokens, 1 for the first of the alphabet. Raises UserError for others, and for too few or many."""
    odd = [c for c in cells if c not in alphabet]
    if odd or len(cells) != side * side:
        what = f"character {odd[0]!r}" if odd else f"{len(cells)} cells"
        raise UserError(f"{what} in the puzzle; this checkpoint solves {kind}s of {side} x {side} cells, of "
                        f"{alphabet!r}; see --help")
    return np.array([1 + alphabet.index(c) for c in cells], np.int32)


def read_task(text):
    """The dict of an ARC task; an output of "test" may be missing, or null. Raises UserError."""
    try:
        task = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"no ARC task, which is JSON as --help shows it: {e}") from None
    arc.check_examples(task, "the task")
    for key in ("train", "test"):
        for i, example in enumerate(task[key]):
            arc.check_grid(example.get("input"), f"input of {key} example {i}")
            if key == "train" or example.get("output") is not None:
                arc.check_grid(example.get("output"), f"output of {key} example {i}")
    return task


# ---------------------------------------------------------------------------------------------
# Sudokus and mazes

SIGNS = {"arc": "0123456789", "maze": " # SGo", "sudoku": "..123456789"}
SHADES = {"arc": (16, 33, 203, 41, 220, 248, 201, 208, 117, 88), "maze": (16, 240, 255, 41, 208, 33)}


def show(title, kind, grid):
    """Print a board, (rows, columns) of tokens (ARC: of colours), coloured on a terminal."""
    height, width = sudoku.BOX[len(grid)] if kind == "sudoku" else grid.shape
    print(title)
    for r, tokens in enumerate(grid):
        if r and r % height == 0:
            print("+-".join(["-" * 2 * width] * (len(grid) // width)))
        cells = [f"{SIGNS[kind][token]} " for token in tokens]
        if kind in SHADES and sys.stdout.isatty():
            cells = [f"\033[48;5;{SHADES[kind][token]}m  \033[0m" for token in tokens]
        print("| ".join("".join(cells[c:c + width]) for c in range(0, len(cells), width)).rstrip())
    print()


def solve_board(model, kind, question, steps):
    """Solve a Sudoku or a maze and print it: (whether it is right by the rules, draw.Thoughts)."""
    side = isqrt(len(question))
    boards, q = (a[:, 0] for a in thoughts(model, question[None], np.zeros(1, np.int32), steps))
    answer = boards[-1].astype(np.int32)                                                # (S,)
    show("question", kind, question.reshape(side, side))
    show("answer", kind, answer.reshape(side, side))
    if kind == "sudoku":
        right, rule = sudoku.check(question, answer, side), "a legal Sudoku that keeps the givens"
    else:
        right, rule = maze.check(question, answer, side), "a shortest path from S to G"
    print(f"{'RIGHT: the answer is' if right else 'WRONG: the answer is not'} {rule}")
    changes = [step for step, board in enumerate(boards[:-1], 2) if (board != answer).any()]
    print(f"steps {steps}, q_halt {q[-1]:+.2f}; the answer last changed at step {max(changes, default=1)}")
    # nobody knows which cells of an answer are right, until it is
    return bool(right), draw.Thoughts(question, boards, boards != answer if right else None, q)


# ---------------------------------------------------------------------------------------------
# ARC tasks

def adapt(model, examples, augs, n_steps, side):
    """Train the rows of the puzzle table, one for each of augs, on the demonstrations of an ARC task in all
    its copies, on a canvas; returns the model."""
    flags = (f"--global-batch-size {ADAPT_ROWS} --halt-max-steps {model.cfg.halt_max_steps} --ema 0 "
             f"--freeze-weights")
    cfg, world = replace(model.cfg, num_puzzles=len(augs)), World(0, 1, model.y0.device)
    run = train.Run(train.flags().parse_args(flags.split()), cfg, world, model.state_dict())
    rng = np.random.RandomState(0)
    inputs, labels = (np.frombuffer(b"".join(rows), np.uint8).reshape(-1, arc.CELLS).astype(np.int32)
                      for rows in arc.render(examples, augs, True, rng))
    labels = np.where(labels == 0, IGNORE, labels)
    ids = np.arange(len(augs), dtype=np.int32).repeat(len(examples))
    no_minimum = np.zeros(ADAPT_ROWS, np.int32)     # no exploration
    for _ in progress(range(n_steps), desc="adapting", unit="step"):
        i, place = rng.randint(len(ids), size=ADAPT_ROWS), rng.rand(ADAPT_ROWS, 2)
        arrays = *windows(inputs[i], labels[i], side, place), ids[i], no_minimum
        train.backward(run, [Batch(*map(torch.from_numpy, arrays))])
        train.update(run, 1.0)
    return run.model.eval()


def copies_of(opened, task_id, examples, args, side):
    """(model, rows of its puzzle table, augmentations) of the copies that vote: the task's own rows or, when
    it has none or with --adapt, new ones that begin as the mean row."""
    model, names = opened.model, opened.split.names if opened.split else []
    mine = [i for i, name in enumerate(names) if arc.parse_name(name)[0] == task_id][:1 + args.augment]
    if mine and not args.adapt:
        return model, mine, [arc.parse_name(names[i])[1:] for i in mine]
    augs = arc.augmentations(examples, args.augment, np.random.RandomState(0))
    model.puzzle_emb = model.puzzle_emb.mean(0).repeat(len(augs), 1)
    if args.adapt:
        model = adapt(model, examples, augs, args.adapt, side)
    else:
        print(f"{task_id} has no row in the checkpoint's table, or its dataset is not here to tell.\n"
              f"Answering from the mean row; --adapt N trains one.\n")
    return model, list(range(len(augs))), augs


def canvas_of(opened, task):
    """Side of the canvas that a task lies on, as data.put_on_canvases has it; 30 without canvases. Raises
    UserError."""
    canvases = sorted(opened.content.get("settings", {}).get("canvases") or [arc.SIDE])
    asked = [{"input": example["input"]} for example in task["test"]]   # an output is never looked at
    largest = arc.side_of({**task, "test": asked})
    if largest > canvases[-1]:
        raise UserError(f"a grid of the task is {largest} cells long, the largest canvas of the checkpoint "
                        f"{canvases[-1]}; take another checkpoint")
    return next((side for side in canvases if side > largest), canvases[-1])


def solve_task(opened, task_id, task, args, steps):
    """Answer every test input of an ARC task by the vote of its copies: (False when a known output is missed,
    draw.Thoughts of the first input)."""
    examples = [arc.arrays(example) for example in task["train"]]
    side = canvas_of(opened, task)
    model, rows, augs = copies_of(opened, task_id, examples, args, side)
    verdicts, seen = [], []
    for number, example in enumerate(task["test"]):
        given = np.array(example["input"], np.uint8)
        target = example.get("output") and np.array(example["output"], np.uint8)
        inputs = np.stack([arc.encode(arc.augment(given, *aug)) for aug in augs]).astype(np.int32)
        inputs, _ = windows(inputs, inputs, side)
        boards, q = thoughts(model, inputs, rows, steps)                # (steps, copies, side * side)
        whole = on_the_board(boards[-1], arc.SIDE)
        answers = [arc.undo(arc.decode(board), *aug) for board, aug in zip(whole, augs)]
        keys = [grid_key(answer) for answer in answers]
        ranks = [(keys.count(key), sure) for key, sure in zip(keys, q[-1])]     # most votes, then the surest
        best = ranks.index(max(ranks))
        print(f"test input {number}:\n")
        show("input", "arc", given)
        show("answer", "arc", answers[best])
        label = wrong = None
        if target is not None:
            show("target", "arc", target)
            verdicts.append(keys[best] == grid_key(target))
            print("RIGHT" if verdicts[-1] else "WRONG", end=": ")
            board = arc.encode(target).astype(np.int32)[None]
            label = windows(board, board, side)[0][0]
            wrong = (boards[:, 0] != label) & (label > 0)
        print(f"steps {steps}, q_halt {q[-1, best]:+.2f}, {ranks[best][0]} of {len(keys)} votes\n")
        seen.append(draw.Thoughts(inputs[0], boards[:, 0], wrong, q[:, 0], label))      # of the task as it is
    return all(verdicts), seen[0]


# ---------------------------------------------------------------------------------------------
# The command line

def kind_of(opened, args):
    """"sudoku", "maze" or "arc", by the checkpoint or its data, else by --task. Raises UserError, also for
    flags that do nothing for it."""
    cfg, side = opened.model.cfg, isqrt(opened.model.cfg.seq_len)
    kind = args.task if opened.kind in (None, "tokens") else opened.kind
    fits = {"sudoku": side in sudoku.BOX and cfg.vocab_size == side + 2, "maze": cfg.vocab_size == 6,
            "arc": (side, cfg.vocab_size) == (arc.SIDE, 12)}
    if side ** 2 != cfg.seq_len or not fits.get(kind) or args.task not in (None, kind):
        raise UserError(f"the checkpoint is for {kind or 'unknown'} boards, {cfg.seq_len} cells of "
                        f"{cfg.vocab_size} tokens; take another one, or say --task sudoku, maze or arc")
    for name in ("adapt", "augment"):
        if getattr(args, name) and kind != "arc":
            raise UserError(f"--{name} does nothing for {kind} puzzles; leave it out")
    return kind


def flags():
    parser, count = Parser(__doc__), within(int, 1)
    parser.usage = "%(prog)s [flags] [PUZZLE]"
    parser.add_argument("puzzle", nargs="?", metavar="PUZZLE",
                        help="text, a file, or - for stdin; default: of the test split")
    checkpoint_flags(parser.add_argument_group("what").add_argument)
    add = parser.add_argument_group("the puzzle").add_argument
    add("--task", choices=["sudoku", "maze", "arc"], help="when the checkpoint does not say it")
    add("--steps", type=count, metavar="N", help="supervision steps; default: the checkpoint's")
    add("--augment", type=count, default=0, metavar="K", help="ARC: vote with K augmented copies")
    add("--adapt", type=count, metavar="N", help="ARC: first train puzzle rows for it, N steps")
    add("--gif", metavar="FILE", help="how it is solved, moving")
    add("--png", metavar="FILE", help="the same, side by side")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    text = None if args.puzzle is None else read_text(args.puzzle)
    opened = open_model(args, start_world(args.device, 7200), needs_data=text is None)
    kind, cfg = kind_of(opened, args), opened.model.cfg
    side, steps = isqrt(cfg.seq_len), args.steps or cfg.halt_max_steps
    if kind == "arc":
        if text is None:
            task_id, task = next(iter(test_puzzles(opened.split).items()))
        else:
            task_id = Path(args.puzzle).stem if os.path.exists(args.puzzle) else "the task"
            task = read_task(text)
        right, seen = solve_task(opened, task_id, task, args, steps)
    else:
        read = read_sudoku if kind == "sudoku" else read_maze
        question = opened.split.gather(np.zeros(1, int))[0][0] if text is None else read(text, side)
        right, seen = solve_board(opened.model, kind, question, steps)
    for picture, path in ((draw.draw_steps, args.png), (draw.animate, args.gif)):
        if path:
            print(f"wrote {picture(kind, path, seen)}")
    return int(not right)


if __name__ == "__main__":
    cli(main)
