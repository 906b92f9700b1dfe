"""Solve one puzzle and look at it: a Sudoku, a maze or an ARC task.

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
import string
import sys
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import draw
import train
from common import Parser, UserError, World, cli, progress, start_world, within
from eval import answer, checkpoint_flags, effort_flags, effort_of, open_model, think, thoughts, with_effort
from model import IGNORE, Batch
from prepare import arc, maze, sudoku
from vote import grid_key

ADAPT_ROWS = 32     # of a batch of test-time training


# ---------------------------------------------------------------------------------------------
# Reading a puzzle

def read_text(source):
    """The text that the command line means: of a file, of stdin ("-"), or itself. Raises UserError."""
    # a folder, a suffix, or a word: "x" is a blank, "o" a path in a maze
    path_like = re.search(r"[/\\]|\.(?![\dx_]*$)[a-z]\w*$|[a-np-wyz]{3}", source, re.I)
    if source == "-":
        text = sys.stdin.read()
    elif os.path.exists(source) and not os.path.isdir(source):
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{source} is no text in UTF-8; save the puzzle as plain text") from None
    elif path_like and source.lstrip()[0] not in "[{":
        raise UserError(f"{source}: file not found; name a file, text, or - for stdin")
    else:
        text = source
    text = text.removeprefix("\ufeff")      # some editors mark UTF-8 with it
    if not text.strip():
        raise UserError("the puzzle is empty (a shell variable that is not set?); give text, a file or -")
    return text


def read_sudoku(text, side):
    """Tokens (S,) of a Sudoku. Raises UserError."""
    digits, blanks, cells = "123456789"[:side], set(".0*?_xX"), None
    between = set(string.whitespace + ",;|+-=[](){}'\"")
    for also_blank in ("", "-", " "):       # the first reading that gives a whole board
        lines = [line.ljust(side) for line in text.splitlines()] if also_blank == " " else [text]
        kept = [c for c in "".join(lines) if c not in between or c == also_blank]
        if cells is None or len(kept) == side * side != len(cells):
            cells, empty = kept, blanks | {also_blank}
    must_be_cells("sudoku", cells, set(digits) | empty, f"{digits}, or . for a blank", side)
    return np.array([1 if c in empty else int(c) + 1 for c in cells], np.int32)


def read_maze(text, side):
    """Tokens (S,) of a maze. Raises UserError."""
    lines = text.strip("\r\n").splitlines()
    width = side if len(lines) > 1 else side * side     # one line may hold all of it
    cells = "".join(line.rstrip().ljust(width) for line in lines).replace(".", " ")
    must_be_cells("maze", cells, set("# SG"), "# (wall), space, S (start) and G (goal)", side)
    if cells.count("S") != 1 or cells.count("G") != 1:
        raise UserError(f"the maze has {cells.count('S')} S and {cells.count('G')} G; give one of each")
    return np.array(["# SG".index(c) + 1 for c in cells], np.int32)


def must_be_cells(kind, cells, known, alphabet, side):
    """Refuse characters that mean nothing, and more or fewer cells than it has. Raises UserError."""
    odd = [c for c in cells if c not in known]
    if odd or len(cells) != side * side:
        what = f"character {odd[0]!r}" if odd else f"{len(cells)} cells"
        raise UserError(f"{what} in the puzzle; this checkpoint solves {kind}s of {side} x {side} cells: "
                        f"{alphabet}")


def read_task(text):
    """The dict of an ARC task. Raises UserError."""
    try:
        task = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"no ARC task, which is JSON as --help shows it: {e}") from None
    arc.check_examples(task, "the task")
    for key, part in (("train", "input"), ("train", "output"), ("test", "input"), ("test", "output")):
        for i, example in enumerate(task[key]):
            if (key, part) != ("test", "output") or example.get(part) is not None:
                arc.check_grid(example.get(part), f"{part} of {key} example {i}")
    return task


# ---------------------------------------------------------------------------------------------
# On the terminal

SHADES = {"arc": (16, 33, 203, 41, 220, 248, 201, 208, 117, 88), "maze": (16, 240, 255, 41, 208, 33)}
SIGNS = {"arc": "0123456789", "maze": " # SGo", "sudoku": "..123456789"}


def cell_text(kind, token, given, bad):
    """One cell: a character, or on a terminal coloured, "maze" and "arc" as two cells of background."""
    sign = SIGNS[kind][token]
    if not sys.stdout.isatty():
        return f"{sign} " if kind == "sudoku" else sign
    if kind == "sudoku":
        return f"\033[{'41;97' if bad else '1' if given else '34'}m{sign}\033[0m "
    return f"\033[48;5;{196 if bad else SHADES[kind][token]}m  \033[0m"


def show(title, kind, grid, given=None, bad=None):
    """Print a board: tokens (ARC: colours) and bools, (rows, columns) each."""
    given, bad = (np.zeros(grid.shape, bool) if a is None else a.reshape(grid.shape) for a in (given, bad))
    rows, columns = sudoku.BOX[len(grid)] if kind == "sudoku" else (len(grid), grid.shape[1])
    print(title)
    for r, tokens in enumerate(grid):
        if r and r % rows == 0:
            print("+-".join(["-" * 2 * columns] * (len(grid) // columns)))
        cells = [cell_text(kind, *cell) for cell in zip(tokens, given[r], bad[r])]
        boxes = ["".join(cells[c:c + columns]) for c in range(0, len(cells), columns)]
        print("| ".join(boxes).rstrip())
    print()


def save_pictures(args, kind, thoughts):
    """What --png and --gif ask for."""
    for picture, path in ((draw.draw_steps, args.png), (draw.animate, args.gif)):
        if path:
            print(f"wrote {picture(kind, path, thoughts)}")


# ---------------------------------------------------------------------------------------------
# Sudokus and mazes

def rule_breakers(kind, question, board, side):
    """(S,) bool: cells of an answer that change the question, or clash with another cell of a Sudoku."""
    if kind == "maze":
        return (board != question) & ~((question == maze.FREE) & (board == maze.PATH))
    bad = (board != question) & (question > 1) | (board < 2)
    for unit in np.array(sudoku.units(side)).T:     # the row of every cell, its column, its box
        _, cell, count = np.unique(unit * 16 + board, return_inverse=True, return_counts=True)
        bad |= count[cell] > 1
    return bad


def solve_board(model, kind, question, args, effort):
    """Solve a Sudoku or a maze and print it; True when it is right by the rules."""
    cfg, side, boards, halts = model.cfg, isqrt(model.cfg.seq_len), [], []
    inputs = torch.from_numpy(question[None]).to(model.y0.device)
    ids = torch.zeros(1, dtype=torch.int32, device=inputs.device)

    def board_of(logits):
        return answer(cfg, logits)[0].cpu().numpy().astype(np.int32)
    for logits, q in think(model, inputs, ids, effort.of(cfg)):
        boards.append(board_of(logits))
        halts.append(q[0, 0].item())
        if effort.halt is not None and halts[-1] > effort.halt:
            break
    logits, q = with_effort(model, kind, inputs, ids, effort, 0, logits, q)
    board = board_of(logits)
    bad = rule_breakers(kind, question, board, side)
    show("question", kind, question.reshape(side, side), question > 1)
    show("answer", kind, board.reshape(side, side), question > 1, bad)
    check = {"sudoku": sudoku.check, "maze": maze.check}[kind]
    rule = {"sudoku": "a legal Sudoku that keeps the givens", "maze": "a shortest path from S to G"}[kind]
    right = bool(check(question, board, side))
    print(f"{'RIGHT: the answer is' if right else 'WRONG: the answer is not'} {rule}")
    if bad.any():
        print(f"{bad.sum()} cells break the rules")
    changes = [step for step, b in enumerate(boards[:-1], 1) if (b != boards[-1]).any()]
    print(f"steps {len(boards)}, q_halt {q[0, 0].item():+.2f}; the answer last changed at step "
          f"{1 + max(changes, default=0)}")
    wrong = np.stack([rule_breakers(kind, question, b, side) for b in boards])
    save_pictures(args, kind, draw.Thoughts(question, np.stack(boards), wrong, np.array(halts)))
    return right


# ---------------------------------------------------------------------------------------------
# ARC tasks

class Copy(NamedTuple):
    """An augmented copy of a task: its row of the puzzle table, transform, images of the colours as bytes."""
    row: int
    t: int
    colours: bytes


def adapt(model, examples, copies, n_steps, whole):
    """A model that was trained on the demonstrations of an ARC task in all its copies: their rows of the
    puzzle table or, with `whole`, all weights."""
    flags = ["--global-batch-size", str(ADAPT_ROWS), "--ema", "0", "--lr", "1e-4"]
    settings = train.flags().parse_args([*flags, *([] if whole else ["--freeze-weights"])])
    settings.halt_max_steps = model.cfg.halt_max_steps
    cfg = replace(model.cfg, num_puzzles=len(copies))
    run = train.Run(settings, cfg, World(0, 1, model.y0.device), model.state_dict())
    augs, rng = [(copy.t, copy.colours) for copy in copies], np.random.RandomState(0)
    inputs, labels = (np.frombuffer(b"".join(rows), np.uint8).reshape(-1, arc.SIDE ** 2).astype(np.int32)
                      for rows in arc.render(examples, augs, True, rng))
    labels = np.where(labels == 0, IGNORE, labels)
    ids = np.repeat(np.array([copy.row for copy in copies], np.int32), len(examples))
    no_minimum = np.zeros(ADAPT_ROWS, np.int32)     # no exploration
    for _ in progress(range(n_steps), desc="adapting", unit="step"):
        i = rng.randint(len(ids), size=ADAPT_ROWS)
        train.backward(run, Batch(*map(torch.from_numpy, (inputs[i], labels[i], ids[i], no_minimum))))
        train.update(run, 1.0)
    return run.model.eval()


def copies_of(opened, task_id, examples, args):
    """(model, the copies that vote): with the task's own rows of the puzzle table or, when it has none or
    with --adapt, with new ones that begin as the mean row."""
    names, model = opened.split.names if opened.split else [], opened.model
    mine = [i for i, name in enumerate(names) if arc.parse_name(name)[0] == task_id]
    known = [Copy(i, *arc.parse_name(names[i])[1:]) for i in mine]
    if known and not args.adapt:
        return model, known[:1 + args.augment]
    augs = arc.augmentations(examples, args.augment, np.random.RandomState(0))
    copies = [Copy(i, *aug) for i, aug in enumerate(augs)]
    model.puzzle_emb = model.puzzle_emb.mean(0).repeat(len(copies), 1)
    if args.adapt:
        return adapt(model, examples, copies, args.adapt, args.adapt_all), copies
    print(f"{task_id} has no row in the checkpoint's table.\n"
          f"Answering from the mean row; --adapt N trains one.\n")
    return model, copies


def solve_task(opened, task, args, effort):
    """Answer every test input of an ARC task by the vote of its copies; True or False when outputs are known,
    else None."""
    examples = [tuple(np.array(e[part], np.uint8) for part in ("input", "output")) for e in task["train"]]
    task_id = Path(args.puzzle).stem if os.path.exists(args.puzzle) else "the task"
    model, copies = copies_of(opened, task_id, examples, args)
    verdicts = []
    for number, example in enumerate(task["test"]):
        given = np.array(example["input"], np.uint8)
        target = None if example.get("output") is None else np.array(example["output"], np.uint8)
        inputs = np.stack([arc.encode(arc.augment(given, c.t, c.colours)) for c in copies]).astype(np.int32)
        boards, q = thoughts(model, inputs, [c.row for c in copies], effort.of(model.cfg))
        answers = [arc.undo(arc.decode(b), c.t, c.colours) for b, c in zip(boards[-1], copies)]
        keys = [grid_key(a) for a in answers]
        ranks = [(keys.count(key), sure) for key, sure in zip(keys, q[-1])]     # most votes, then the surest
        best = ranks.index(max(ranks))
        print(f"test input {number}:\n")
        for title, grid in (("input", given), ("answer", answers[best]), ("target", target)):
            if grid is not None:
                show(title, "arc", grid)
        if target is not None:
            verdicts.append(keys[best] == grid_key(target))
            print("RIGHT" if verdicts[-1] else "WRONG", end=": ")
        print(f"steps {len(boards)}, q_halt {q[-1, best]:+.2f}, {ranks[best][0]} of {len(keys)} votes\n")
        if number == 0:     # the first copy is the task as it is
            label = None if target is None else arc.encode(target).astype(np.int32)
            wrong = None if label is None else (boards[:, 0] != label) & (label > 0)
            save_pictures(args, "arc", draw.Thoughts(inputs[0], boards[:, 0], wrong, q[:, 0], label))
    return all(verdicts) if verdicts else None


# ---------------------------------------------------------------------------------------------
# The command line

def kind_of(opened, task):
    """"sudoku", "maze" or "arc", by the checkpoint or its data, else by --task. Raises UserError."""
    cfg, kind = opened.model.cfg, opened.kind
    if kind not in ("sudoku", "maze", "arc", "numbers"):
        kind = task
    if kind is None:
        raise UserError("the checkpoint does not say what its boards are; add --task sudoku, maze or arc")
    if task not in (None, kind):
        raise UserError(f"--task {task}: this checkpoint is of another task, {kind}; leave it out")
    side = isqrt(cfg.seq_len)
    fits = {"sudoku": side in sudoku.BOX and cfg.vocab_size == side + 2, "maze": cfg.vocab_size == 6,
            "arc": (side, cfg.vocab_size) == (arc.SIDE, 12)}
    if side ** 2 != cfg.seq_len or not fits.get(kind):
        raise UserError(f"this checkpoint is of another task: {cfg.seq_len} cells of {cfg.vocab_size} tokens "
                        f"are no Sudoku, maze or ARC task; eval.py --show draws its puzzles")
    return kind


def check_flags(args, kind):
    """Refuse flags that do nothing for this task. Raises UserError."""
    for name in ("halt", "rollouts") if kind == "arc" else ("adapt", "adapt_all"):
        if getattr(args, name) != flags().get_default(name):
            raise UserError(f"--{name.replace('_', '-')} does nothing for {kind} puzzles; leave it out")
    if args.adapt_all and not args.adapt:
        raise UserError("--adapt-all does nothing without --adapt; add it")
    if kind == "maze" and args.augment > 7:
        raise UserError(f"--augment {args.augment}: a maze has 7 symmetric copies; lower it")


def flags():
    parser = Parser(__doc__)
    parser.usage = "%(prog)s [flags] PUZZLE"
    parser.add_argument("puzzle", metavar="PUZZLE", help="text, a file, or - for stdin")
    checkpoint_flags(parser.add_argument_group("what").add_argument)
    add = parser.add_argument_group("the puzzle").add_argument
    add("--task", choices=["sudoku", "maze", "arc"], help="when the checkpoint does not say it")
    add("--adapt", type=within(int, 1), metavar="N", help="ARC: first train puzzle rows for it, N steps")
    add("--adapt-all", action="store_true", help="with --adapt: all weights, too")
    add("--gif", metavar="FILE", help="how it is solved, moving")
    add("--png", metavar="FILE", help="the same, side by side")
    effort_flags(parser.add_argument_group("compute at test time").add_argument)
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    effort, text = effort_of(args), read_text(args.puzzle)
    opened = open_model(args, start_world(args.device, 7200), needs_data=False)
    kind, side = kind_of(opened, args.task), isqrt(opened.model.cfg.seq_len)
    check_flags(args, kind)
    if kind == "arc":
        right = solve_task(opened, read_task(text), args, effort)
    else:
        question = (read_sudoku if kind == "sudoku" else read_maze)(text, side)
        right = solve_board(opened.model, kind, question, args, effort)
    return int(right is False)


if __name__ == "__main__":
    cli(main)
