"""eval.py --solve: reading puzzles, the rules, the board on the terminal, pictures, test-time training on an ARC task."""
import io
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as scoring
from data import Split, UserError, write_dataset
from model import Config
from prepare import arc, maze, sudoku
from test_eval import ALONE, ARC_CFG, TINY, Oracle, arc_dir, arc_model, boards, model_of, png_width, save_run

MAZE_CFG = replace(TINY, vocab_size=6, seq_len=100, halt_max_steps=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 4x4 boards whose dataset is gone: solving needs none."""
    folder = tmp_path_factory.mktemp("solve")
    write_dataset(folder / "d", {"train": boards(4), "test": boards(4)}, 6, {})
    return save_run(folder / "run", Split(folder / "d", "test"), model_of(), data_test=["gone"])


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.setattr(scoring, "build", lambda cfg, state: Oracle(cfg))


def text_of(board):
    return "".join(".123456789"[t - 1] for t in board)


def solve(run, capsys, *flags, code=0):
    found = scoring.main(["--checkpoint", str(run), "--device", "cpu", *flags])
    printed = capsys.readouterr().out
    assert found == code, printed
    return printed


QUESTION, ANSWER = (b[0] for b in boards(1, seed=3))


def test_sudoku_is_solved_and_checked_by_the_rules(run, oracle, capsys):
    printed = solve(run, capsys, "--solve", text_of(QUESTION))
    lines = printed.splitlines()
    digits = text_of(ANSWER)
    assert lines[0].split() == ["question", "answer"]
    shown = ["".join(c for c in line[13:] if c.isdigit()) for line in lines[1:6] if "+" not in line]
    assert "".join(shown) == digits, printed
    assert "RIGHT: the answer is a legal Sudoku that keeps the givens" in printed
    assert f"last changed at step {Oracle.needs(None, QUESTION)}" in printed and "q_halt +3.00" in printed
    assert "\033" not in printed and max(map(len, lines)) <= 80
    halted = solve(run, capsys, "--solve", text_of(QUESTION).replace(".", "0"), "--halt")
    assert f"steps {Oracle.needs(None, QUESTION)}, " in halted


def test_file_and_stdin(run, oracle, capsys, tmp_path, monkeypatch):
    rows = "\n".join(" ".join(text_of(QUESTION)[i:i + 4]) for i in range(0, 16, 4)) + "\n"
    (tmp_path / "board.txt").write_text(rows)
    assert "RIGHT" in solve(run, capsys, "--solve", str(tmp_path / "board.txt"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(rows))
    assert "RIGHT" in solve(run, capsys, "--solve", "-")


def test_wrong_answers_are_told_without_a_label(run, capsys):
    printed = solve(run, capsys, "--solve", text_of(QUESTION), code=1)
    assert "WRONG: the answer is not a legal Sudoku" in printed and "cells break the rules" in printed


@pytest.mark.parametrize("flags", [("--augment", "6"), ("--rollouts", "4", "--noise", "0.01")])
def test_more_compute_for_one_puzzle(run, oracle, capsys, flags):
    assert "RIGHT" in solve(run, capsys, "--solve", text_of(QUESTION), *flags)


@pytest.mark.parametrize("text, message", [
    ("123", "3 cells in the puzzle; this checkpoint solves sudokus of 4 x 4 cells"),
    ("5" * 16, "character '5' in the puzzle"), ("x" * 16, "character 'x'")])
def test_bad_puzzles_are_one_line(run, text, message):
    with pytest.raises(UserError, match=message) as error:
        scoring.main(["--checkpoint", str(run), "--solve", text])
    assert "\n" not in str(error.value)


def test_rule_breakers_are_the_cells_that_clash():
    for size in sudoku.BOX:
        question, answer = sudoku.make_puzzle(np.random.RandomState(size), size)[:2]
        assert not scoring.rule_breakers("sudoku", question, answer, size).any()
        i, j = np.flatnonzero(answer[:size] != answer[0])[:2]       # two cells of the first row
        broken = answer.copy()
        broken[i] = broken[j]
        bad = scoring.rule_breakers("sudoku", question, broken, size)
        assert bad[i] and bad[j] and bad.sum() <= 5 and not sudoku.check(question, broken, size)
        given = np.flatnonzero(question > 1)[0]
        broken = answer.copy()
        broken[given] = 1
        assert scoring.rule_breakers("sudoku", question, broken, size)[given]


# ---------------------------------------------------------------------------------------------
# Colours, pictures

def test_terminal_is_coloured_only_on_a_terminal(monkeypatch):
    boards = {"sudoku": (ANSWER.reshape(4, 4), (QUESTION > 1).reshape(4, 4), np.eye(4, dtype=bool)),
              "maze": (np.arange(1, 6)[None], None, np.zeros((1, 5), bool)), "arc": (np.arange(10)[None], None, np.zeros((1, 10), bool))}
    plain = {kind: scoring.terminal(kind, *board) for kind, board in boards.items()}
    assert plain["sudoku"][2] == "----+-----"[:len(plain["sudoku"][2])] and plain["maze"] == ["# SGo"] and plain["arc"] == ["0123456789"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    coloured = {kind: scoring.terminal(kind, *board) for kind, board in boards.items()}
    bare = [re.sub("\033.*?m", "", line) for line in coloured["sudoku"]]
    assert bare == plain["sudoku"] and coloured["sudoku"][0].count("\033[41;97m") == 1
    assert len(set(re.findall("\033.*?m", coloured["arc"][0]))) == 11 and coloured["maze"][0].count("\033[48;5;") == 5


def test_large_boards_stand_below_each_other_in_80_columns(capsys):
    scoring.side_by_side([("a", ["x" * 30] * 2), ("b", ["y" * 30] * 2)])
    side = capsys.readouterr().out.splitlines()
    scoring.side_by_side([("a", ["x" * 60] * 2), ("b", ["y" * 60] * 2)])
    below = capsys.readouterr().out.splitlines()
    assert side[1] == "x" * 30 + "    " + "y" * 30 and len(below) == 8 and max(map(len, side + below)) <= 80


def frames(path):
    with Image.open(path) as image:
        return image.n_frames, image.size[0]


def test_gif_and_png(run, oracle, capsys, tmp_path):
    solve(run, capsys, "--solve", text_of(QUESTION), "--gif", str(tmp_path / "a.gif"), "--png", str(tmp_path / "a.png"))
    assert png_width(tmp_path / "a.png") == 1200
    n, width = frames(tmp_path / "a.gif")
    assert n >= 2 and width == 1200     # equal frames are merged


# ---------------------------------------------------------------------------------------------
# Mazes

def test_maze_from_a_text_file(tmp_path, capsys, monkeypatch):
    question, answer = maze.make_maze(np.random.RandomState(0), 10, 5)[:2]
    text = "\n".join("".join(" # SGo"[t] for t in row).rstrip() for row in question.reshape(10, 10)) + "\n"
    (tmp_path / "maze.txt").write_text(text)
    write_dataset(tmp_path / "d", {s: (question[None], answer[None]) for s in ("train", "test")}, 6, {})
    run = save_run(tmp_path / "run", Split(tmp_path / "d", "test"), model_of(MAZE_CFG))
    assert "WRONG: the answer is not a shortest path from S to G" in solve(run, capsys, "--solve", str(tmp_path / "maze.txt"), code=1)

    def think(model, inputs, ids, steps, *noise):
        for step in range(steps):
            board = answer if step else question
            yield torch.nn.functional.one_hot(torch.from_numpy(board[None]).long(), 6).float(), torch.full((1, 2), float(step))
    monkeypatch.setattr(scoring, "think", think)
    printed = solve(run, capsys, "--solve", str(tmp_path / "maze.txt"), "--png", str(tmp_path / "m.png"))
    assert "RIGHT: the answer is a shortest path" in printed and "last changed at step 2" in printed
    assert printed.splitlines()[1].startswith("#" * 10) and png_width(tmp_path / "m.png") == 1200


# ---------------------------------------------------------------------------------------------
# ARC tasks

TASK = {"train": [{"input": [[1, 0], [0, 0]], "output": [[0, 1], [0, 0]]}, {"input": [[0, 2], [0, 0]], "output": [[2, 0], [0, 0]]},
                  {"input": [[0, 0], [3, 0]], "output": [[0, 0], [0, 3]]}],
        "test": [{"input": [[0, 0], [0, 4]], "output": [[0, 0], [4, 0]]}, {"input": [[5, 0], [0, 0]]}]}


def write_task(folder, task=TASK, name="flip"):
    (folder / f"{name}.json").write_text(json.dumps(task))
    return str(folder / f"{name}.json")


def test_unknown_task_is_answered_from_the_mean_row(tmp_path, arc_dir, capsys):
    split = Split(arc_dir, "test")
    run = save_run(tmp_path / "run", split, arc_model(split))
    printed = solve(run, capsys, "--solve", write_task(tmp_path), "--augment", "2", "--gif", str(tmp_path / "t.gif"), "--png",
                    str(tmp_path / "t.png"), code=1)
    assert "has no row in the checkpoint's table" in printed and "of 3 votes" in printed and "test input 1:" in printed
    assert printed.count("WRONG") == 1 and png_width(tmp_path / "t.png") == 1200 and frames(tmp_path / "t.gif")[1] == 1200


def test_known_task_uses_its_rows(tmp_path, arc_dir, capsys, monkeypatch):
    split = Split(arc_dir, "test")
    run = save_run(tmp_path / "run", split, arc_model(split))
    task = json.loads((arc_dir / "test_puzzles.json").read_text())["task1"]
    asked, think = [], scoring.think
    monkeypatch.setattr(scoring, "think", lambda model, inputs, ids, *rest: asked.append((inputs.numpy(), ids.tolist())) or
                        think(model, inputs, ids, *rest))
    printed = solve(run, capsys, "--solve", write_task(tmp_path, task, "task1"), "--augment", "2", code=1)
    assert "mean row" not in printed
    names = [split.names[i] for i in asked[0][1]]
    assert names[0] == "task1" and len(names) == 3 and all(n.split("|||")[0] == "task1" for n in names)
    of_dataset = [split.gather(np.array([i]))[0][0] for i in range(len(split)) if split.gather(np.array([i]))[2][0] in asked[0][1]]
    assert all(any(np.array_equal(row, known) for known in of_dataset) for row in asked[0][0])


def demonstration_loss(model):
    """Mean loss of the demonstrations as they are, after 4 steps."""
    inputs, labels = (torch.from_numpy(np.stack([arc.encode(np.array(e[k])) for e in TASK["train"]]).astype(np.int32))
                      for k in ("input", "output"))
    for logits, _ in scoring.think(model, inputs, torch.zeros(3, dtype=torch.int32), 4):
        pass
    return scoring.score_rows(model.cfg, logits, torch.where(labels == 0, -100, labels))[0].mean().item()


@pytest.mark.parametrize("flags", [[], ["--adapt-all"]])
def test_adapting_trains_a_row_or_all(tmp_path, arc_dir, capsys, monkeypatch, flags):
    split = Split(arc_dir, "test")
    cfg = replace(ARC_CFG, num_puzzles=split.meta["num_puzzle_identifiers"], halt_max_steps=4)
    run = save_run(tmp_path / "run", split, model_of(cfg))
    kept, build = [], scoring.build
    monkeypatch.setattr(scoring, "build", lambda *a: kept.append(build(*a)) or kept[0])
    solve(run, capsys, "--solve", write_task(tmp_path), "--adapt", "16", "--augment", "1", "--batch-size", "4", *flags, code=1)
    (model,), before = kept, model_of(cfg)
    before.puzzle_emb = before.puzzle_emb.mean(0).repeat(2, 1)
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters())]
    assert model.puzzle_emb.shape == (2, 32) and not torch.equal(model.puzzle_emb[0], model.puzzle_emb[1])
    assert not any(same[:2]) if flags else all(same)
    assert not flags or demonstration_loss(model) < demonstration_loss(before) - 0.1


@pytest.mark.parametrize("text, message", [
    ("[1]", "no ARC task"), ('{"train": [], "tes": []}', "no ARC task"), ("nonsense", "no ARC task"),
    (json.dumps({"train": [{"input": [[11]], "output": [[1]]}], "test": [{"input": [[1]]}]}), "colour 11, outside 0..9")])
def test_bad_tasks_are_one_line(tmp_path, arc_dir, text, message):
    split = Split(arc_dir, "test")
    run = save_run(tmp_path / "run", split, arc_model(split))
    with pytest.raises(UserError, match=message) as error:
        scoring.main(["--checkpoint", str(run), "--solve", text])
    assert "\n" not in str(error.value)
