"""solve.py: reading puzzles, the rules, the terminal, pictures, test-time training on an ARC task."""
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
import solve
import vote
from common import UserError
from data import Split, write_dataset
from prepare import arc, maze
from runs import ARC_CFG, TINY, Oracle, arc_dir, arc_model, boards, model_of, png_size, save_run

SIDE = 6
MAZE_CFG = replace(TINY, vocab_size=6, seq_len=SIDE ** 2, halt_max_steps=3)
QUESTION, ANSWER = (b[0] for b in boards(1, seed=3))


def text_of(board):
    return "".join(".123456789"[t - 1] for t in board)


TEXT = text_of(QUESTION)
ROWS = [TEXT[i:i + 4] for i in range(0, 16, 4)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 4x4 boards whose dataset is gone: solving needs none."""
    folder = tmp_path_factory.mktemp("solve")
    write_dataset(folder / "d", {"train": boards(4), "test": boards(4)}, 6, {"builder": "sudoku"})
    return save_run(folder / "run", Split(folder / "d", "test"), model_of(), data_test=["gone"])


@pytest.fixture(scope="module")
def maze_run(tmp_path_factory):
    """A run on 6x6 mazes, and one of them."""
    folder = tmp_path_factory.mktemp("maze")
    question, answer = maze.make_maze(np.random.RandomState(0), SIDE, 3)[:2]
    pair = question[None], answer[None]
    write_dataset(folder / "d", {"train": pair, "test": pair}, 6, {"builder": "maze"})
    return save_run(folder / "run", Split(folder / "d", "test"), model_of(MAZE_CFG)), question, answer


@pytest.fixture(scope="module")
def arc_split(tmp_path_factory):
    return Split(arc_dir(tmp_path_factory.mktemp("arc")), "test")


@pytest.fixture(scope="module")
def arc_run(tmp_path_factory, arc_split):
    return save_run(tmp_path_factory.mktemp("arc") / "run", arc_split, arc_model(arc_split))


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.setattr(scoring, "build", lambda cfg, state: Oracle(cfg))


def go(run, puzzle, *flags, code=0, capsys=None):
    """What solve.py prints; puzzle: None for none."""
    argv = ["--checkpoint", str(run), "--device", "cpu", *map(str, flags)]
    found = solve.main([*argv, *([] if puzzle is None else [str(puzzle)])])
    printed = capsys.readouterr().out
    assert found == code, printed
    assert max(map(len, printed.splitlines())) <= 80, printed
    return printed


def refused(run, puzzle, *flags):
    """The line that solve.py refuses with."""
    with pytest.raises(UserError) as error:
        solve.main(["--checkpoint", str(run), "--device", "cpu", *flags, str(puzzle)])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sudoku_is_solved_and_checked_by_the_rules(run, oracle, capsys, tmp_path):
    printed = go(run, TEXT, "--gif", tmp_path / "a.gif", "--png", tmp_path / "a.png", capsys=capsys)
    question, answer, verdict = printed.split("\n\n")
    for title, shown, board in (("question", question, QUESTION), ("answer", answer, ANSWER)):
        assert shown.splitlines()[0] == title
        assert "".join(c for c in shown if c.isdigit() or c == ".") == text_of(board), printed
    assert verdict.startswith("RIGHT: the answer is a legal Sudoku that keeps the givens\n"), printed
    needs = Oracle.needs(None, QUESTION)
    assert f"steps 4, q_halt +3.00; the answer last changed at step {needs}\n" in verdict
    assert "\033" not in printed and needs > 1, "else this test shows little"
    with Image.open(tmp_path / "a.gif") as gif:
        assert png_size(tmp_path / "a.png")[0] == 1200 and (gif.n_frames, gif.size[0]) == (4, 800)
    assert "steps 5, " in go(run, TEXT, "--steps", "5", capsys=capsys)


def test_file_and_stdin(run, capsys, tmp_path, monkeypatch):
    """Solved wrongly: that is told without a label."""
    (tmp_path / "board.txt").write_text("\n".join(" ".join(row) for row in ROWS) + "\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(ROWS)))
    for source in (tmp_path / "board.txt", "-"):
        assert "WRONG: the answer is not a legal Sudoku" in go(run, source, code=1, capsys=capsys)


WRITTEN = {
    "zeros": TEXT.replace(".", "0"), "stars": TEXT.replace(".", "*"), "questions": TEXT.replace(".", "?"),
    "underscores": TEXT.replace(".", "_"), "x": TEXT.replace(".", "x"), "X": TEXT.replace(".", "X"),
    "rows": "\n".join(ROWS) + "\n", "crlf": "\r\n".join(ROWS) + "\r\n", "bom": "\ufeff" + TEXT + "\r\n",
    "commas": ",".join(TEXT.replace(".", "0")), "semicolons": ";".join(TEXT),
    "tabs": "\n".join("\t".join(r) for r in ROWS),
    "json": json.dumps([[int(c) for c in row.replace(".", "0")] for row in ROWS]),
    "numpy": str(np.array([list(map(int, row.replace(".", "0"))) for row in ROWS])),
    "drawn": "+--+--+\n" + "\n".join(f"| {r[0]} {r[1]} | {r[2]} {r[3]} |" for r in ROWS) + "\n+--+--+",
    "dashes": TEXT.replace(".", "-"), "spaces": "\n".join(row.replace(".", " ").rstrip() for row in ROWS),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_sudoku_may_be_written_in_many_ways(how, tmp_path):
    text = WRITTEN[how]
    assert np.array_equal(solve.read_sudoku(solve.read_text(text), 4), QUESTION)
    (tmp_path / "file").write_bytes(text.encode())
    assert np.array_equal(solve.read_sudoku(solve.read_text(str(tmp_path / "file")), 4), QUESTION)


@pytest.mark.parametrize("text, message", [
    ("123", "3 cells in the puzzle; this checkpoint solves sudokus of 4 x 4 cells, of '.1234'; see --help"),
    ("5" * 16, "character '5' in the puzzle"), (TEXT + "1", "17 cells"), ("", "0 cells in"),
    ("\n", "0 cells in the puzzle"), ("aa", "aa: file not found"), ("c:\\puzzle", "file not found"),
    ("nowhere/board.txt", "nowhere/board.txt: file not found; name a file, text, or -"),
    ("board.txt", "board.txt: file not found"), ("board", "board: file not found")])
def test_bad_puzzles_are_one_line(run, text, message):
    assert message in refused(run, text)


def test_bad_files_are_one_line(run, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe1\0")
    assert "character '\ufffd' in the puzzle" in refused(run, tmp_path / "binary")
    with pytest.raises(IsADirectoryError):      # one line, by common.cli
        solve.read_text(str(tmp_path))


def test_the_kind_comes_from_recipe_known_weights_or_flag(run, oracle, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    split = type("Nothing", (), {"identity": "", "recipe": [None], "dirs": []})
    unknown = save_run(tmp_path / "unknown", split, model_of())
    assert "unknown boards, 16 cells of 6 tokens; take another one, or say --task" in refused(unknown, TEXT)
    assert "RIGHT" in go(unknown, TEXT, "--task", "sudoku", capsys=capsys)
    assert "is for arc boards, 16 cells" in refused(unknown, TEXT, "--task", "arc")
    assert "is for sudoku boards" in refused(run, TEXT, "--task", "maze")
    file = unknown / "step_00000010.ckpt"
    monkeypatch.setattr(scoring.hub, "fetch", lambda name, world: (file, {}, "sudoku"))
    assert solve.main(["--hf", "someone/sudoku", "--device", "cpu", TEXT]) == 0
    assert "RIGHT" in capsys.readouterr().out


def test_other_tasks_are_refused(tmp_path):
    numbers = np.zeros((9, 16, 1), np.float32)
    arrays = numbers, numbers, np.ones((9, 16), bool)
    write_dataset(tmp_path / "numbers", {"train": arrays, "test": arrays})
    cfg = replace(TINY, vocab_size=0, input_dim=1, target_dim=1)
    run = save_run(tmp_path / "run", Split(tmp_path / "numbers", "test"), model_of(cfg))
    assert "the checkpoint is for numbers boards" in refused(run, "123")


@pytest.mark.parametrize("which, flags, message", [
    ("sudoku", ["--adapt", "3"], "--adapt does nothing for sudoku puzzles"),
    ("maze", ["--augment", "3"], "--augment does nothing for maze puzzles"),
    ("sudoku", ["--steps", "0"], "--steps: 0 is out of range"),
    ("arc", ["--adapt", "0"], "--adapt: 0 is out of range")])
def test_flags_that_do_nothing_are_refused(run, maze_run, arc_run, which, flags, message):
    assert message in refused({"sudoku": run, "maze": maze_run[0], "arc": arc_run}[which], TEXT, *flags)


def test_terminal_is_coloured_only_on_a_terminal(monkeypatch, capsys):
    def lines(kind, board):
        solve.show("title", kind, board)
        title, *found, blank = capsys.readouterr().out.splitlines()
        assert (title, blank) == ("title", "")
        return found
    maze_row, arc_row = np.arange(1, 6)[None], np.arange(10)[None]
    digits = text_of(ANSWER)
    assert lines("sudoku", ANSWER.reshape(4, 4))[1:3] == ["{} {} | {} {}".format(*digits[4:8]), "----+-----"]
    assert lines("maze", maze_row) == ["#   S G o"] and lines("arc", arc_row) == ["0 1 2 3 4 5 6 7 8 9"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert len(set(re.findall("\033.*?m", lines("arc", arc_row)[0]))) == 11
    assert lines("maze", maze_row)[0].count("\033[48;5;") == 5


# ---------------------------------------------------------------------------------------------
# Mazes

def maze_text(board, end="\n"):
    return end.join("".join(" # SGo"[t] for t in row).rstrip() for row in board.reshape(SIDE, SIDE)) + end


def test_maze_from_a_text_file(maze_run, tmp_path, capsys, monkeypatch):
    run, question, answer = maze_run
    (tmp_path / "maze.txt").write_text(maze_text(question))
    printed = go(run, tmp_path / "maze.txt", code=1, capsys=capsys)
    assert "WRONG: the answer is not a shortest path from S to G" in printed
    found = np.stack([question, answer, answer])[:, None], np.zeros((3, 1))
    monkeypatch.setattr(solve, "thoughts", lambda *args: found)
    printed = go(run, tmp_path / "maze.txt", "--png", tmp_path / "m.png", capsys=capsys)
    assert "RIGHT: the answer is a shortest path" in printed and "last changed at step 2" in printed
    assert printed.splitlines()[1] == " ".join("#" * SIDE) and png_size(tmp_path / "m.png")[0] == 1200


def test_a_maze_may_be_written_in_many_ways(maze_run):
    question = maze_run[1]
    plain, crlf = maze_text(question), "\r\n" + maze_text(question, "\r\n")
    one_line = "".join(" # SG"[t] for t in question)
    for text in (plain, crlf, "\ufeff" + plain, plain.replace(" ", "."), one_line):
        assert np.array_equal(solve.read_maze(solve.read_text(text), SIDE), question), text


@pytest.mark.parametrize("change, message", [
    (lambda text: text.replace("S", " "), "the maze has 0 S and 1 G; give one of each"),
    (lambda text: text.replace("#", "%", 1), "character '%' in the puzzle; this checkpoint solves mazes"),
    (lambda text: text + "######\n", "42 cells in the puzzle")])
def test_bad_mazes_are_one_line(maze_run, change, message):
    run, question, _ = maze_run
    assert message in refused(run, change(maze_text(question)))


# ---------------------------------------------------------------------------------------------
# ARC tasks

TASK = {"train": [{"input": [[1, 0], [0, 0]], "output": [[0, 1], [0, 0]]},
                  {"input": [[0, 2], [0, 0]], "output": [[2, 0], [0, 0]]},
                  {"input": [[0, 0], [3, 0]], "output": [[0, 0], [0, 3]]}],
        "test": [{"input": [[0, 0], [0, 4]], "output": [[0, 0], [4, 0]]},
                 {"input": [[5, 0]], "output": None}, {"input": [[5, 0]]}]}


def write_task(folder, task=TASK, name="flip"):
    """As some editors write it."""
    (folder / f"{name}.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(task).replace(", ", ",\r\n").encode())
    return folder / f"{name}.json"


def test_unknown_task_is_answered_from_the_mean_row(tmp_path, arc_run, capsys):
    pictures = ["--gif", tmp_path / "t.gif", "--png", tmp_path / "t.png"]
    printed = go(arc_run, write_task(tmp_path), "--augment", "2", *pictures, code=1, capsys=capsys)
    assert "flip has no row in the checkpoint's table" in printed and "of 3 votes" in printed
    assert "test input 2:" in printed and printed.count("WRONG") == 1, "nobody knows the other two"
    assert png_size(tmp_path / "t.png")[0] == 1200 and (tmp_path / "t.gif").exists()


def test_the_voted_answer_is_told_right(tmp_path, arc_run, capsys, monkeypatch):
    """Predictions that are the target in every copy but one."""
    flipped = {vote.grid_key(e["input"]): np.array(e.get("output") or [[7]], np.uint8) for e in TASK["test"]}

    def thoughts(model, inputs, ids, steps):
        examples = [tuple(np.array(e[k], np.uint8) for k in ("input", "output")) for e in TASK["train"]]
        copies = arc.augmentations(examples, 2, np.random.RandomState(0))
        given = [arc.undo(arc.decode(row), *aug) for row, aug in zip(inputs, copies)]
        targets = [flipped[vote.grid_key(grid)] for grid in given]
        right = np.stack([arc.encode(arc.augment(t, *aug)) for t, aug in zip(targets, copies)])
        right[0] = 0
        return np.stack([np.zeros_like(right), right]), np.array([[0, 0, 0], [9, 0, 0]])
    monkeypatch.setattr(solve, "thoughts", thoughts)
    printed = go(arc_run, write_task(tmp_path), "--augment", "2", capsys=capsys)
    assert "RIGHT: steps 2, q_halt +0.00, 2 of 3 votes" in printed and printed.count("2 of 3 votes") == 3
    assert "answer\n0 0\n4 0\n\ntarget\n0 0\n4 0\n" in printed and "answer\n7\n\nsteps" in printed


def test_known_task_uses_its_rows(tmp_path, arc_split, arc_run, capsys, monkeypatch):
    task = json.loads((arc_split.dirs[0] / "test_puzzles.json").read_text())["task1"]
    asked, thoughts = [], solve.thoughts
    monkeypatch.setattr(solve, "thoughts", lambda *args: asked.append(args[1:]) or thoughts(*args))
    printed = go(arc_run, write_task(tmp_path, task, "task1"), "--augment", "2", code=1, capsys=capsys)
    assert "mean row" not in printed
    names = [arc_split.names[i] for i in asked[0][1]]
    assert names[0] == "task1" and len(names) == 3 and all(n.split("|||")[0] == "task1" for n in names)
    rows = [arc_split.gather(np.array([i])) for i in range(len(arc_split))]
    of_dataset = [inputs[0] for inputs, _, ids in rows if ids[0] in asked[0][1]]
    assert all(any(np.array_equal(row, known) for known in of_dataset) for row in asked[0][0])


def test_adapting_trains_a_row(tmp_path, arc_split, capsys, monkeypatch):
    cfg = replace(ARC_CFG, num_puzzles=arc_split.meta["num_puzzle_identifiers"], halt_max_steps=4)
    run = save_run(tmp_path / "run", arc_split, model_of(cfg))
    kept, adapt = [], solve.adapt
    monkeypatch.setattr(solve, "ADAPT_ROWS", 4)
    monkeypatch.setattr(solve, "adapt", lambda *args: kept.append(adapt(*args)) or kept[0])
    go(run, write_task(tmp_path), "--adapt", "4", "--augment", "1", code=1, capsys=capsys)
    (model,), before = kept, model_of(cfg)
    before.puzzle_emb = before.puzzle_emb.mean(0).repeat(2, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert model.puzzle_emb.shape == (2, 32) and not torch.equal(model.puzzle_emb[0], model.puzzle_emb[1])


@pytest.mark.parametrize("text, message", [
    ("[1]", "the task has null as train examples"),
    ('{"train": [1], "test": []}', "the task has [1] as train examples"),
    (json.dumps({**TASK, "test": []}), "the task has [] as test examples"), ("{nonsense", "no ARC task"),
    (json.dumps(TASK) + "]", "as --help shows it: Extra data"), ("[" * 100_000, "no ARC task"),
    ("missing.json", "missing.json: file not found"), ("", "no ARC task"),
    (json.dumps({**TASK, "test": [{"input": [[11]]}]}), "input of test example 0 is [[11]], not a grid"),
    (json.dumps({**TASK, "test": [{"input": [[1]], "output": [[1], []]}]}), "output of test example 0 is")])
def test_bad_tasks_are_one_line(arc_run, text, message):
    assert message in refused(arc_run, text)


# ---------------------------------------------------------------------------------------------
# Without a puzzle, and on canvases

def test_without_a_puzzle_it_is_the_first_of_the_test_split(oracle, tmp_path, capsys):
    write_dataset(tmp_path / "d", {"train": boards(4), "test": boards(4)}, 6, {"builder": "sudoku"})
    run = save_run(tmp_path / "run", Split(tmp_path / "d", "test"), model_of())
    first = Split(tmp_path / "d", "test").gather(np.zeros(1, int))[0][0]
    capsys.readouterr()     # of the builder
    assert go(run, None, capsys=capsys) == go(run, text_of(first), capsys=capsys)


def test_a_task_is_solved_on_its_canvas(arc_split, tmp_path, monkeypatch, capsys):
    """Grids of up to 4 cells and their end lines lie on 6 x 6, not on 30 x 30; training rows for it, too."""
    run = save_run(tmp_path / "run", arc_split, arc_model(arc_split),
                   settings={"preset": "mini-arc", "canvases": [6, 30]})
    seen, think, gather = [], scoring.think, solve.windows
    monkeypatch.setattr(scoring, "think",
                        lambda model, x, *rest: seen.append(x.shape) or think(model, x, *rest))
    monkeypatch.setattr(solve, "windows", lambda a, b, side, *place: seen.append((side, len(place)))
                        or gather(a, b, side, *place))
    argv = ["--checkpoint", str(run), "--device", "cpu", "--augment", "1", "--adapt", "1"]
    solve.main(argv)
    printed = capsys.readouterr().out
    assert "answer" in printed and "target" in printed, printed
    assert torch.Size([2, 36]) in seen and (6, 1) in seen, seen      # two copies; one step of training
    large = {"input": np.ones((7, 7), int).tolist(), "output": [[1]]}
    (tmp_path / "task.json").write_text(json.dumps({"train": [large], "test": [large]}))
    save_run(tmp_path / "small", arc_split, arc_model(arc_split), settings={"preset": "x", "canvases": [6]})
    with pytest.raises(UserError, match="a grid of the task is 7 cells long, the largest canvas .* 6; take"):
        solve.main(["--checkpoint", str(tmp_path / "small"), str(tmp_path / "task.json")])
