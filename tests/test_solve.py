"""tools/solve.py: how puzzles may be written, the rules, the terminal, pictures."""

import json
import sys
from dataclasses import replace
from textwrap import indent

import numpy as np
import pytest
from PIL import Image
from runs import TINY, Oracle, boards, model_of, png_size, save_run

import eval as scoring
import prepare
from data import Split
from prepare import maze
from tools import solve
from tools.common import UserError

SIZE = 6
QUESTION, ANSWER = (b[0] for b in boards(1, seed=3))
MAZE = "######\n# S  #\n# ## #\n#  # #\n# #G #\n######\n"
CORRIDOR = "  S\n ####\nG\n" + "######\n" * 3


def text_of(board):
    return "".join(".123456789"[t - 1] for t in board)


TEXT = text_of(QUESTION)
ROWS = [TEXT[i : i + 4] for i in range(0, 16, 4)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 4x4 Sudokus whose test data are gone: a given puzzle needs no dataset."""
    folder = tmp_path_factory.mktemp("solve")
    prepare.write_dataset(folder / "d", {"train": boards(4), "test": boards(4)}, 6, {"builder": "sudoku"})
    return save_run(folder / "run", Split(folder / "d", "test"), model_of(), data_test=["gone"])


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.setattr(scoring, "build_model", lambda cfg, state: Oracle(cfg))


def go(run, puzzle, *flags, code=0, capsys=None):
    """What tools.solve prints."""
    puzzles = [] if puzzle is None else [str(puzzle)]
    found = solve.main(["--checkpoint", str(run), "--device", "cpu", *map(str, flags), *puzzles])
    printed = capsys.readouterr().out
    assert found == code, printed
    return printed


def refused(run, puzzle, *flags):
    """The line that tools.solve refuses with."""
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
    assert verdict.splitlines() == [
        "solved: a complete Sudoku that keeps the givens",
        "4 supervision steps, q_halt +3.00",
        f"wrote {tmp_path / 'a.png'}",
        f"wrote {tmp_path / 'a.gif'}",
    ]
    with Image.open(tmp_path / "a.gif") as gif:
        assert png_size(tmp_path / "a.png")[0] == 1200 and (gif.n_frames, gif.size[0]) == (4, 800)
    assert "5 supervision steps, " in go(run, TEXT, "--steps", "5", capsys=capsys)


def test_a_wrong_answer_has_exit_code_1(run, capsys, tmp_path):
    (tmp_path / "board.txt").write_text("\n".join(" ".join(row) for row in ROWS) + "\n")
    printed = go(run, tmp_path / "board.txt", "--png", tmp_path / "a.png", code=1, capsys=capsys)
    assert "not solved: the answer is not a complete Sudoku" in printed and (tmp_path / "a.png").exists()


def test_without_a_puzzle_it_is_the_first_of_the_test_split(run, oracle, capsys):
    first = Split(run.parent / "d", "test").gather(np.zeros(1, int))[0][0]
    printed = go(run, None, "--data", run.parent / "d", capsys=capsys)
    assert printed == go(run, text_of(first), capsys=capsys)


# ---------------------------------------------------------------------------------------------
# How puzzles may be written

SUDOKUS = {
    **{f"blanks {blank}": TEXT.replace(".", blank) for blank in "0*?_xX-"},
    "spaces": "\n".join(row.replace(".", " ").rstrip() for row in ROWS),
    "rows": "\r\n".join(ROWS) + "\r\n",
    "byte order mark": "\ufeff" + TEXT,
    "commas": ",".join(TEXT.replace(".", "0")),
    "tabs": "\n".join("\t".join(row) for row in ROWS),
    "json": json.dumps([[int(c) for c in row.replace(".", "0")] for row in ROWS]),
    "borders": "+--+--+\n" + "\n".join(f"| {r[:2]} | {r[2:]} |" for r in ROWS) + "\n+--+--+",
    "stars in borders": "*-----*\n" + "\n".join(f"|{r[:2]}|{r[2:]}|" for r in ROWS) + "\n*-----*",
    "box-drawing signs": "┌──┬──┐\n" + "\n".join(f"│{r[:2]}│{r[2:]}│" for r in ROWS) + "\n└──┴──┘",
    "comments": "# puzzle 1 of 20\n[Puzzle 4x4]\n" + "\n".join(ROWS),
    "one per line": "# 3 boards\n" + f"{TEXT}\n" * 3,
}


@pytest.mark.parametrize("how", SUDOKUS)
def test_a_sudoku_may_be_written_in_many_ways(how, tmp_path):
    (tmp_path / "file").write_bytes(SUDOKUS[how].encode())
    assert np.array_equal(solve.read_puzzle(str(tmp_path / "file"), "sudoku", 4), QUESTION)
    if "\ufeff" not in SUDOKUS[how]:
        assert np.array_equal(solve.read_puzzle(SUDOKUS[how], "sudoku", 4), QUESTION)


def tokens_of_maze(text):
    return ["?# SG".index(c) for line in text.splitlines() for c in line.ljust(SIZE)]


MAZES = {
    "rows": (MAZE, MAZE),
    "dots": (MAZE.replace(" ", "."), MAZE),
    "lower case": (MAZE.replace("S", "s").replace("G", "g"), MAZE),
    "E": (MAZE.replace("G", "E"), MAZE),
    "X, CRLF": (MAZE.replace("G", "X").replace("\n", "\r\n"), MAZE),
    "one line": (MAZE.replace("\n", ""), MAZE),
    "indented": ("\n" + indent(MAZE, "    "), MAZE),
    "a title": ("maze 7\n" + MAZE, MAZE),
    "no border": (CORRIDOR, CORRIDOR),
    "dots, no border, indented": (indent(CORRIDOR.replace(" ", "."), "\t"), CORRIDOR),
}


@pytest.mark.parametrize("how", MAZES)
def test_a_maze_may_be_written_in_many_ways(how, tmp_path):
    text, expected = MAZES[how]
    (tmp_path / "file").write_bytes(text.encode())
    for puzzle in (text, str(tmp_path / "file")):
        assert solve.read_puzzle(puzzle, "maze", SIZE).tolist() == tokens_of_maze(expected)


BAD_SUDOKUS = ["123", "5" * 16, TEXT + "1", "", "\n", "aa", "no/such/file.txt"]
BAD_MAZES = [
    "",
    MAZE + "######\n",
    MAZE.replace("S", " "),
    MAZE.replace("S ", "SS"),
    MAZE.replace("#", "%", 1),
]


def test_a_bad_puzzle_is_one_line_that_names_the_format():
    for task, size, texts in (("sudoku", 4, BAD_SUDOKUS), ("maze", SIZE, BAD_MAZES)):
        for text in texts:
            with pytest.raises(UserError) as error:
                solve.read_puzzle(text, task, size)
            assert f" is not a {size} x {size} {task}, nor a file with one; write " in str(error.value)


# ---------------------------------------------------------------------------------------------
# The task


def test_mazes(tmp_path, capsys, monkeypatch):
    question = np.array(tokens_of_maze(MAZE))
    answer = maze.label_path(question, SIZE)
    pair = question[None].astype(np.uint8), answer[None].astype(np.uint8)
    prepare.write_dataset(tmp_path / "d", {"train": pair, "test": pair}, 6, {"builder": "maze"})
    cfg = replace(TINY, seq_len=SIZE**2, halt_max_steps=3)
    run = save_run(tmp_path / "run", Split(tmp_path / "d", "test"), model_of(cfg))
    printed = go(run, MAZE, code=1, capsys=capsys)
    assert "not solved: the answer is not a shortest path from S to G" in printed
    found = np.stack([question, answer, answer])[:, None], np.zeros((3, 1))
    monkeypatch.setattr(solve, "trajectory", lambda *args: found)
    printed = go(run, MAZE, "--png", tmp_path / "m.png", capsys=capsys)
    assert "solved: a shortest path from S to G" in printed and png_size(tmp_path / "m.png")[0] == 1200
    assert printed.splitlines()[1] == " ".join("#" * SIZE)


def test_published_weights_tell_their_task_by_the_number_of_tokens(run, tmp_path):
    split = Split(run.parent / "d", "test")
    published = save_run(tmp_path / "published", split, model_of(), recipe=None, data_test=[])
    assert "is not a 4 x 4 maze" in refused(published, TEXT)
    arc = save_run(tmp_path / "arc", split, model_of(), recipe=[{"builder": "arc"}], data_test=[])
    save_run(tmp_path / "nine", split, model_of(replace(TINY, vocab_size=9)), recipe=None, data_test=[])
    for folder in (arc, tmp_path / "nine"):
        message = "step_00000010.ckpt is for neither Sudokus nor mazes; see eval.py --show"
        assert message in refused(folder, TEXT)


def test_mazes_are_colored_on_a_terminal_only(monkeypatch, capsys):
    def lines(task, board):
        solve.show("title", task, board)
        title, *found, blank = capsys.readouterr().out.splitlines()
        assert (title, blank) == ("title", "")
        return found

    maze_row, digits = np.arange(1, 6)[None], text_of(ANSWER)
    assert lines("sudoku", ANSWER.reshape(4, 4))[1:3] == ["{} {} | {} {}".format(*digits[4:8]), "----+-----"]
    assert lines("maze", maze_row) == ["#   S G o"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert lines("maze", maze_row)[0].count("\033[48;5;") == 5
