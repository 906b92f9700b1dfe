"""prepare/sudoku.py and prepare/maze.py: the published bytes, the rules of the boards, what is refused."""
import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
from collections import Counter
from functools import cache, partial
from itertools import permutations, product
from operator import eq
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

import data
import prepare
from common import cli, sha256
from prepare import boards, maze, sudoku

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/boards.json").read_text())
SUDOKU_CHARS, MAZE_CHARS = "?.123456789", "?# SGo"


def write_csv(path, pairs):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"gen,{q},{a},{i}" for i, (q, a) in enumerate(pairs)]
    path.write_text("".join(f"{line}\n" for line in ["source,question,answer,rating", *rows]))
    return path


def golden_pairs(split):
    return [(line.replace("o", " "), line) if split.startswith("maze") else line.split(",")
            for line in GOLDEN["boards"][split]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csv")
    for split in GOLDEN["boards"]:
        write_csv(folder / f"{split}.csv", golden_pairs(split))
    return folder


def tokens(text, characters):
    return np.array([characters.index(c) for c in text], np.uint8)


def build(builder, folder, *argv):
    """The folder that a builder wrote."""
    builder.main([*map(str, argv), "--output-dir", str(folder)])
    return folder


def load(folder, split="train"):
    return np.stack([np.load(Path(folder) / split / f"all__{name}.npy") for name in ("inputs", "labels")])


# ---------------------------------------------------------------------------------------------
# The published bytes

@pytest.mark.parametrize("case, flags", [
    ("sudoku_default", []), ("sudoku_s20_a5", ["--subsample-size", "20", "--num-aug", "5"]),
    ("maze_default", []), ("maze_noaug_s20", ["--subsample-size", "20"]),
    ("maze_aug_s20", ["--subsample-size", "20", "--aug"]), ("maze_aug_full", ["--aug"])])
def test_equal_to_published_builder(case, flags, source, tmp_path):
    name = case.split("_")[0]
    folder = build({"sudoku": sudoku, "maze": maze}[name], tmp_path / "d", "--source", source / name, *flags)
    got = {file: sha256(folder / file) for file in GOLDEN["sha256"][case]}
    assert got == GOLDEN["sha256"][case]


@pytest.mark.parametrize("builder, flags, expected", [
    (sudoku, "--size 4 --num-aug 3", "89bc0274ffde5992be352d0bc3e0b29a383f47eb1942ee3468737fdbe62b8ce2"),
    (sudoku, "--size 6 --num-aug 3", "15dace0ee5c3029b0553186ed0e98fb1dddbcb022aa9905592c6f67bd8e43cf1"),
    (sudoku, "--size 9 --num-aug 3", "9f73c552fa2956037c58d5514357710cf2f31117d2e069bfb511e6fa5c2beb43"),
    (maze, "--size 11 --min-path 14", "f4d0e9c6300e8631114e3d60fc77d563ac04260974d0d2828063aaeed7192c39")])
def test_generated_bytes_are_those_of_november_2025(builder, flags, expected, tmp_path):
    """REPORT's figures of generated boards were measured on these: no draw may move."""
    argv = f"--source generate --num-train 5 --num-test 5 {flags}".split()
    folder, digest = build(builder, tmp_path / "d", *argv), hashlib.sha256()
    for name in ("train/all__inputs", "train/all__labels", "test/all__inputs", "test/all__labels"):
        digest.update((folder / f"{name}.npy").read_bytes())
    assert digest.hexdigest() == expected


# ---------------------------------------------------------------------------------------------
# Sudoku: rules, symmetries, generated puzzles

@pytest.fixture(scope="module")
def puzzles():
    """A few generated puzzles of every size: {size: {"train": (2, N, S), "test": ...}}."""
    rng = np.random.RandomState(3)
    return {size: dict(zip(("train", "test"), boards.generate(partial(sudoku.make_puzzle, rng, size), n, n)))
            for size, n in ((4, 40), (6, 30), (9, 3))}


@cache
def peers(size):
    """For every cell the cells that must differ from it."""
    h, w = sudoku.BOX[size]
    units = [(i // size, i % size, (i // size // h, i % size // w)) for i in range(size * size)]
    return [[j for j, other in enumerate(units) if any(map(eq, unit, other))] for unit in units]


def count_solutions(question, size, limit=2):
    """Naive: the blank cell with the fewest digits left, every one of them."""
    board, best = [int(t) - 1 for t in question], None
    for cell in (i for i, digit in enumerate(board) if digit == 0):
        left = set(range(1, size + 1)) - {board[j] for j in peers(size)[cell]}
        if best is None or len(left) < len(best[1]):
            best = cell, left
    found = 0
    for digit in best[1] if best else ():
        board[best[0]] = digit
        found += count_solutions([d + 1 for d in board], size, limit - found)
        if found >= limit:
            break
    return found if best else 1


@pytest.mark.parametrize("size", [4, 6, 9])
def test_generated_puzzles_have_one_solution_and_no_spare_clue(puzzles, size):
    for split in ("train", "test"):
        questions, answers = puzzles[size][split]
        assert sudoku.check(questions, answers, size).all()
        for q in questions[:2 if size == 9 else 10]:
            assert count_solutions(q, size) == 1
            for clue in np.flatnonzero(q > 1):
                fewer = q.copy()
                fewer[clue] = 1
                assert count_solutions(fewer, size) == 2


def forms(question, size):
    """All geometric forms of a puzzle as bytes, digits renamed by first appearance; not by our own code."""
    h, w = sudoku.BOX[size]

    def orders(m):
        for bands in permutations(range(size // m)):
            for inside in product(permutations(range(m)), repeat=size // m):
                yield [band * m + i for band, rows in zip(bands, inside) for i in rows]
    grid = question.reshape(size, size)
    for g in [grid, grid.T] if h == w else [grid]:
        for rows, cols in product(orders(h), list(orders(w))):
            names = {1: 1}
            yield bytes(names.setdefault(t, len(names) + 1) for t in g[rows][:, cols].ravel().tolist())


@pytest.mark.parametrize("size", [4, 6])
def test_no_test_puzzle_is_a_form_of_a_training_puzzle(puzzles, size):
    train = {next(forms(q, size)) for q in puzzles[size]["train"][0]}
    tests = puzzles[size]["test"][0][:10 if size == 6 else None]
    assert train & {f for f in forms(puzzles[size]["train"][0, 0], size)}, "forms() must find a puzzle itself"
    for q in tests:
        assert not train & set(forms(q, size)), q


@pytest.mark.parametrize("size", [4, 6, 9])
def test_augmented_boards_stay_legal_and_kin(puzzles, size):
    pairs = puzzles[size]["train"]
    q, a = sudoku.augment(np.random.RandomState(0), pairs, size, 50).reshape(2, -1, 51, size * size)
    assert (q[:, 0] == pairs[0]).all() and (a[:, 0] == pairs[1]).all()
    assert sudoku.check(q, a, size).all()
    assert ((q > 1).sum(-1) == (q[:, :1] > 1).sum(-1)).all()
    assert len(np.unique(q[0], axis=0)) > 25
    for p in range(3):
        assert set(sudoku.kinship(q[p], a[p], size).tolist()) == {int(sudoku.kinship(*pairs[:, p], size))}


def test_puzzles_differ_and_kinship_tells_them_apart(puzzles):
    for size, splits in puzzles.items():
        questions = [q.tobytes() for split in splits.values() for q in split[0]]
        assert len(set(questions)) == len(questions), size
    assert len(set(sudoku.kinship(*puzzles[6]["train"], 6).tolist())) >= 29


@pytest.mark.parametrize("size", [4, 6, 9])
def test_check_rejects_wrong_answers(puzzles, size):
    q, a = puzzles[size]["train"][:, 0]
    assert sudoku.check(q, a, size)
    for cell in range(size * size):
        for token in range(size + 3):
            wrong = a.copy()
            wrong[cell] = token
            assert sudoku.check(q, wrong, size) == (token == a[cell])
    swapped = np.where(a == 2, 3, np.where(a == 3, 2, a)).astype(np.uint8)  # legal, but contradicts a given
    assert sudoku.check(np.ones_like(q), swapped, size) and not sudoku.check(q, swapped, size)
    assert sudoku.check(np.ones_like(q), a.reshape(size, size).T.ravel(), size) == (size != 6)
    rows = np.tile(np.arange(2, size + 2, dtype=np.uint8), size)  # rows are legal, columns are not
    assert not sudoku.check(np.ones_like(q), rows, size)
    latin = np.concatenate([np.roll(np.arange(2, size + 2), r) for r in range(size)])  # boxes are not
    assert not sudoku.check(np.ones_like(q), latin, size)


def test_generated_dataset_on_disk(tmp_path):
    argv = "--source generate --num-train 6 --num-test 4 --num-aug 7".split()
    folder = build(sudoku, tmp_path / "d", *argv)
    assert load(folder).shape == (2, 48, 36) and load(folder, "test").shape == (2, 4, 36)
    meta = json.loads((folder / "train/dataset.json").read_text())
    assert (meta["vocab_size"], meta["seq_len"], meta["total_groups"], meta["total_puzzles"]) == (8, 36, 6, 6)
    assert not list(tmp_path.glob(".*"))


def test_csv_sources(source, tmp_path, monkeypatch):
    """A single file holds rows out, a rating limit drops rows, the hub's files are read like local ones."""
    one = source / "sudoku/train.csv"
    folder = build(sudoku, tmp_path / "d", "--source", one, "--num-test", 12)
    different = {(*q, *a) for split in ("train", "test") for q, a in zip(*load(folder, split).tolist())}
    assert load(folder).shape == (2, 38, 81) and load(folder, "test").shape == (2, 12, 81)
    assert len(different) == 50
    build(sudoku, folder, "--source", source / "sudoku", "--min-difficulty", 15)
    assert load(folder).shape[1] == 35 and load(folder, "test").shape[1] == 5
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["files"]["train.csv"] == sha256(one) and recipe["min_difficulty"] == 15
    assert (recipe["source"], recipe["name"]) == (str(source / "sudoku"), "sudoku")

    def download(repo, repo_type, allow_patterns):
        assert (repo_type, allow_patterns) == ("dataset", ["train.csv", "test.csv"])
        return str(source / ("maze" if "maze" in repo else "sudoku"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    sudoku.main(["--subsample-size", "20", "--num-aug", "2"])
    assert load("data/sudoku-extreme-20-aug-2").shape == (2, 60, 81)
    maze.main([])
    assert load("data/maze-30x30-hard-1k").shape[2] == 900


# ---------------------------------------------------------------------------------------------
# Mazes

def shortest_paths(question, size):
    """Naive: all shortest paths from S to G, as sets of cells, by breadth over whole paths' last cells."""
    grid = question.reshape(size, size)
    (start,), (goal,) = (np.argwhere(grid == t).tolist() for t in (maze.START, maze.GOAL))
    layers, seen = [Counter({tuple(start): 1})], {tuple(start)}
    while tuple(goal) not in layers[-1]:
        layer = Counter()
        for (r, c), ways in layers[-1].items():
            for cell in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
                if grid[cell] != maze.WALL and cell not in seen:
                    layer[cell] += ways
        assert layer, "no way from S to G"
        seen |= set(layer)
        layers.append(layer)
    return len(layers) - 1, layers[-1][tuple(goal)]


@pytest.fixture(scope="module")
def mazes(tmp_path_factory):
    argv = "--source generate --size 11 --min-path 14 --num-train 40 --num-test 20".split()
    return build(maze, tmp_path_factory.mktemp("maze") / "d", *argv)


def test_generated_mazes_have_one_shortest_path(mazes):
    for split in ("train", "test"):
        questions, answers = load(mazes, split)
        assert maze.check(questions, answers, 11).all()
        for q, a in zip(questions, answers):
            steps, ways = shortest_paths(q, 11)
            assert ways == 1 and steps >= 14 and (a == maze.PATH).sum() == steps - 1


@pytest.mark.parametrize("size, n", [(11, 20), (5, 18)])    # few 5x5 mazes exist
def test_no_test_maze_is_a_form_of_a_training_maze(size, n, tmp_path):
    argv = ["--source", "generate", "--size", size, "--num-train", n, "--num-test", n]
    folder = build(maze, tmp_path / "d", *argv)
    train, test = (load(folder, split)[0].reshape(-1, size, size) for split in ("train", "test"))
    forms = {data.dihedral(m, t).tobytes() for m in train for t in range(8)}
    assert len({m.tobytes() for m in (*train, *test)}) == 2 * n
    assert not forms & {m.tobytes() for m in test}


def test_maze_check():
    """A shortest path; with shortest=False any that is unbroken. In batches, too."""
    cases = [
        ("######Soo## #o##  G######", True, True),
        ("######S  ##o# ##ooG######", True, True),
        ("######Soo##o#o##ooG######", False, True),     # a cell too many
        ("######So ## #o##  G######", False, False),    # broken
        ("######S  ## # ##  G######", False, False),    # no path
        ("######Soo## #o##  o######", False, False),    # runs over G
        ("######Soo##o o##ooG######", False, False),    # opens a wall
        ("######Soo## oo##  G######", False, False),    # walks through a wall
        ("######Soo## #o##  G#####?", False, False)]
    answers = np.stack([tokens(text, MAZE_CHARS) for text, *_ in cases])
    q = tokens("######S  ## # ##  G######", MAZE_CHARS)
    for a, (text, shortest, unbroken) in zip(answers, cases):
        assert (maze.check(q, a, 5), maze.check(q, a, 5, shortest=False)) == (shortest, unbroken), text
    questions = np.broadcast_to(q, answers.shape)
    assert maze.check(questions, answers, 5).tolist() == [shortest for _, shortest, _ in cases]
    assert not maze.check(tokens("#" * 25, MAZE_CHARS), tokens("#" * 25, MAZE_CHARS), 5)
    # past the goal to the other way round: longer, although no cell of the short way is missing
    q, a = (tokens(text, MAZE_CHARS) for text in ("######S G##   ##   ######", "######S G##ooo##   ######"))
    assert not maze.check(q, a, 5) and maze.check(q, a, 5, shortest=False)


# ---------------------------------------------------------------------------------------------
# CSV files as people have them

def table(pairs, header, row):
    rows = [row.format(q=q, a=a, i=i, zeros=q.replace(".", "0")) for i, (q, a) in enumerate(pairs)]
    return "".join(f"{line}\n" for line in [header, *rows])


def pairs_read(builder, content, tmp_path):
    """The boards that a builder makes of a CSV file with this content (bytes), as text."""
    file, characters = tmp_path / "boards.csv", SUDOKU_CHARS if builder is sudoku else MAZE_CHARS
    file.write_bytes(content)
    folder = build(builder, tmp_path / "d", "--source", file, "--num-test", 1)
    read = np.concatenate([load(folder, "train"), load(folder, "test")], axis=1)
    return sorted(tuple("".join(characters[t] for t in board) for board in pair) for pair in zip(*read))


PLAIN = "source,question,answer,rating", "gen,{q},{a},{i}"


@pytest.mark.parametrize("header, row", [
    PLAIN, ("quizzes,solutions", "{zeros},{a}"), ("answer,rating,question", "{a},{i},{q}"),
    ("id,puzzle,solution,clues,difficulty", "{i},{q},{a},24,2.2"), ("Puzzle,Solution", "{q},{a}"),
    (" question , answer ", "{q} ,\t{a}  "), ('"source","question","answer"', '"a, b","{q}","{a}"'),
    ('"question", "answer"', '"{q}", "{a}"'), ("question,note,answer", '{q},"two\nlines",{a}'),
    ("question\tanswer", "{q}\t{a}"), ("question;answer;rating", "{q};{a};1,5"),
    ("\n\nquestion,answer", "{q},{a}\n\n  \n,")])
def test_csv_is_read_as_it_comes(header, row, tmp_path, capsys):
    """From Unix, without an end of the last line, and from Windows, with a mark at its beginning."""
    pairs = [tuple(pair) for pair in golden_pairs("sudoku/train")[:5]]
    text = table(pairs, header, row)
    for content in (text[:-1].encode(), text.replace("\n", "\r\n").encode("utf-8-sig")):
        assert pairs_read(sudoku, content, tmp_path) == sorted(pairs)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("header, row", [
    PLAIN, ("solution\tpuzzle", "{a}\t{q}"), ("question,answer", '"{q}","{a}"')])
def test_csv_of_mazes_that_begin_and_end_with_a_free_cell(header, row, tmp_path):
    """A space is a cell: it is no space around the board."""
    pairs = [(" S  G" + " " * 20, " SooG" + " " * 20), ("  S G" + " " * 20, "  SoG" + " " * 20),
             ("#" * 20 + "#S G#", "#" * 20 + "#SoG#")]
    assert pairs_read(maze, table(pairs, header, row).encode(), tmp_path) == sorted(pairs)


def test_spaces_around_a_maze(tmp_path):
    pairs = golden_pairs("maze/train")[:3]
    content = table(pairs, "question, answer", " {q} , {a}  ")
    assert pairs_read(maze, content.encode(), tmp_path) == sorted(pairs)


def test_ratings_under_another_name(tmp_path):
    """Decimal ratings, in a column called difficulty, and not the fourth."""
    pairs, file = golden_pairs("sudoku/train")[:6], tmp_path / "boards.csv"
    file.write_text(table(pairs, "difficulty,puzzle,solution", "{i}.5,{q},{a}"))
    folder = build(sudoku, tmp_path / "d", "--source", file, "--num-test", 1, "--min-difficulty", 3)
    assert load(folder).shape == (2, 2, 81)     # of 3.5, 4.5, 5.5


@pytest.fixture
def boards_of(tmp_path):
    """Write boards as tokens (2, N, S) to a CSV and return its path."""
    def write(name, pairs, characters=SUDOKU_CHARS):
        return write_csv(tmp_path / name, [["".join(characters[t] for t in board) for board in pair]
                                           for pair in zip(*pairs)])
    return write


def warnings(builder, tmp_path, capsys, *argv):
    build(builder, tmp_path / "d", "--source", tmp_path, *argv)
    return capsys.readouterr().err.splitlines()


def test_overlap_of_sudokus_is_said(puzzles, boards_of, tmp_path, capsys, monkeypatch):
    train, other = puzzles[6]["train"], puzzles[6]["test"]
    moved = sudoku.augment(np.random.RandomState(0), train[:, :4], 6, 1)[:, 1::2]
    boards_of("train.csv", train)
    boards_of("test.csv", np.concatenate([train[:, 5:8], moved, other[:, :10]], axis=1))
    assert warnings(sudoku, tmp_path, capsys) == [
        "warning: 7 of 17 test boards also stand in the training split (3 as they are, else turned, mirrored "
        "or renamed): their score is memory"]
    monkeypatch.setattr(boards, "FEW", 10)      # more are compared only as they are
    assert "warning: 3 of 17 test boards" in warnings(sudoku, tmp_path, capsys)[0]
    boards_of("test.csv", train)
    assert "30 of 30 test boards" in warnings(sudoku, tmp_path, capsys)[0]
    # what is not drawn is not trained on
    assert "1 of 30 test boards" in warnings(sudoku, tmp_path, capsys, "--subsample-size", 1)[0]
    boards_of("test.csv", other)
    assert warnings(sudoku, tmp_path, capsys) == []
    one = boards_of("one.csv", np.repeat(train, 3, axis=1))
    assert "of 8 test boards" in warnings(sudoku, tmp_path, capsys, "--source", one, "--num-test", 8)[0]


def test_overlap_of_mazes_is_said(mazes, boards_of, tmp_path, capsys):
    train, test = load(mazes), load(mazes, "test")
    turned = data.dihedral(train[:, :3].reshape(2, 3, 11, 11), 1).reshape(2, 3, 121)
    boards_of("train.csv", train, MAZE_CHARS)
    boards_of("test.csv", np.concatenate([test, train[:, 7:9], turned], axis=1), MAZE_CHARS)
    assert "5 of 25 test boards also stand in the training split (2 as" in warnings(maze, tmp_path, capsys)[0]


@pytest.mark.parametrize("size", [4, 6])
def test_several_solutions_are_counted(puzzles, boards_of, tmp_path, capsys, size):
    questions, answers = puzzles[size]["train"][:, :12].copy()
    for q in questions[::2]:
        q[np.flatnonzero(q > 1)[:2]] = 1        # no clue was to spare
    assert sum(count_solutions(q, size) > 1 for q in questions) == 6
    boards_of("train.csv", np.stack([questions, answers]))
    boards_of("test.csv", puzzles[size]["test"][:, :3])
    err = warnings(sudoku, tmp_path, capsys)
    assert "warning: 6 of the 15 puzzles that were looked at have several solutions" in err[-1]


# ---------------------------------------------------------------------------------------------
# What is refused: one line, exit code 2, nothing left behind

Q, A = GOLDEN["boards"]["sudoku/train"][0].split(",")
Q2, A2 = GOLDEN["boards"]["sudoku/train"][1].split(",")
MQ, MA = golden_pairs("maze/train")[0]


def refused(builder, argv, folder, capsys):
    """Run main as a script does; the line it prints."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as e:
        cli(lambda: build(builder, folder / "out", *argv))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert sorted(folder.rglob("*")) == before
    return err


WRONG = "the answer contradicts the question or breaks the rules; correct or remove the row"


@pytest.mark.parametrize("builder, rows, words", [
    (sudoku, [(Q, A), (Q[:-1], A2)], "line 3: boards of 80 and 81 characters; need 81; correct or remove"),
    (sudoku, [(Q, A), (Q2, A2 + "1")], "line 3: boards of 81 and 82 characters; need 81"),
    (sudoku, [(Q[:7], A[:7])], "line 2: boards of 7 and 7 characters; need 16, 36, 81"),
    (sudoku, [(Q, A), (Q2, A2 + ",5")], "line 3: 5 columns; need 4, as in the first line"),
    (sudoku, [(Q, A), ("x" + Q2[1:], A2)], "line 3: character 'x' stands for nothing; correct or remove"),
    (sudoku, [(Q, A), (Q2, A2[:-1] + "é")], "line 3: character 'é' stands for nothing"),
    (sudoku, [(Q, A), (Q2, A)], f"train.csv line 3: {WRONG}"),
    (sudoku, [(Q, A), ("." * 81, A2.replace("1", "2"))], f"line 3: {WRONG}"),
    (sudoku, [(Q, Q)], f"line 2: {WRONG}"),
    (sudoku, [("." * 36, "123456" * 6)], f"line 2: {WRONG}"),
    (sudoku, [(Q, '"' + "1" * 200_000)], "cannot be read (field larger than field limit (131072)); put"),
    (sudoku, [], "train.csv has no boards"),
    (maze, [(MQ, MA), (MQ[:-1], MA)], "line 3: boards of 899 and 900 characters; need 900"),
    (maze, [(MQ[:899], MA[:899])], "need 25, 36, 49 .."),
    (maze, [(MQ, MA.replace("o", "x", 1))], "line 2: character 'x' stands for nothing"),
    (maze, [(MQ, MA.replace("o", " ", 1))], f"line 2: {WRONG}"),
    (maze, [(MQ.replace("#", " ", 1), MA)], f"line 2: {WRONG}"),
    (maze, [(MQ.replace("S", " "), MA.replace("S", "o"))], f"line 2: {WRONG}")])
def test_bad_rows(builder, rows, words, tmp_path, capsys):
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "test.csv", [(Q, A) if builder is sudoku else (MQ, MA)])
    assert words in refused(builder, ["--source", tmp_path], tmp_path, capsys)


@pytest.mark.parametrize("text, words", [
    ("q,a\n{q},{a}\n", "boards.csv: 'q,a' does not name the columns question, answer; begin the file with a"),
    ("question,rating\n{q},1\n", "'question,rating' does not name the columns"),
    ("{q},{a}\n{q},{a}\n", "' does not name the columns"),         # a board is not lost for a header
    ("", "'' does not name the columns"),
    ("question|answer\n{q}|{a}\n", "'question|answer' does not name the columns"),
    ("<html><body>404</body></html>\n", "'<html><body>404</body></html>' does not name"),
    ("question,note,answer\n{q},'a\nb',{a}\n", "line 2: 2 columns; need 3"),
    ('question,note,answer\n{q},"a\n\nb",{a}\n{q},,{q}\n', "line 5: the answer contradicts the question"),
    ("question,answer\n\n\n{q},{q}\n", "line 4: the answer contradicts the question"),
    ("question,answer\n{q},{a}\nquestion,answer\n", "line 3: boards of 8 and 6 characters; need 81"),
    ("answer,question\n{q},{a}\n", "line 2: the answer contradicts the question")])
def test_bad_csv(text, words, tmp_path, capsys):
    file = tmp_path / "boards.csv"
    file.write_text(text.format(q=Q, a=A))
    assert words in refused(sudoku, ["--source", file, "--num-test", 1], tmp_path, capsys)


@pytest.mark.parametrize("builder, flags, words", [
    (sudoku, "--source {}/none", "none/train.csv'); put train.csv and test.csv, as in https:"),
    (sudoku, "--source {}/none.csv", "cannot be read ([Errno 2] No such file or directory: "),
    (sudoku, "--source {} --subsample-size 3", "--subsample-size 3 is more than the 2 training boards"),
    (sudoku, "--source {} --min-difficulty 9", "train.csv has no boards of --min-difficulty 9 or more"),
    (sudoku, "--source {}/rated.csv --min-difficulty 9",
     "line 2: could not convert string to float: 'hard'; correct or remove the row"),
    (sudoku, "--source {}/train.csv --num-test 2", "has 2 boards, all of them for --num-test 2"),
    (sudoku, "--source {}/mixed", "test.csv line 2: boards of 16 and 16 characters; need 81"),
    (sudoku, "--source {}/bare.csv --min-difficulty 9",
     "'question,answer' does not name the columns question, answer, rating"),
    (sudoku, "--source generate --num-aug -1", "--num-aug: -1 is out of range; give 0 .. 1000000"),
    (sudoku, "--source generate --seed 4294967296", "--seed: 4294967296 is out of range"),
    (sudoku, "--source generate --subsample-size 0", "--subsample-size: 0 is out of range; give 1 or more"),
    (sudoku, "--source generate --min-difficulty 1", "--min-difficulty 1 needs ratings"),
    (sudoku, "--source {}/bare.csv --size 9", "--size does nothing without --source generate"),
    (maze, "--source {} --min-path 5", "--min-path does nothing without --source generate"),
    (sudoku, "--source generate --num-train 5 --num-test 5 --subsample-size 6", "6 is more than the 5 "),
    (sudoku, "--source generate --size 4 --num-train 60 --num-test 1", "ask for fewer"),
    (maze, "--source generate --size 4", "--size: 4 is out of range; give 5 .. 100"),
    (maze, "--source generate --size 6 --min-path 50", "--min-path 50 was not reached in 200 mazes"),
    (maze, "--source generate --size 5 --num-train 80 --num-test 80", "ask for fewer")])
def test_bad_flags(builder, flags, words, tmp_path, capsys):
    write_csv(tmp_path / "train.csv", [(Q, A), (Q2, A2)])
    write_csv(tmp_path / "test.csv", [(Q, A)])
    (tmp_path / "rated.csv").write_text(f"question,answer,rating\n{Q},{A},hard\n")
    (tmp_path / "bare.csv").write_text(f"question,answer\n{Q},{A}\n{Q2},{A2}\n")
    write_csv(tmp_path / "mixed/train.csv", [(Q, A)])
    write_csv(tmp_path / "mixed/test.csv", [("1" + "." * 15, "1234341221434321")])
    assert words in refused(builder, flags.format(tmp_path).split(), tmp_path, capsys)


def test_no_network(source, tmp_path):
    """One line that says which files to fetch, where to put them, and the whole command after that."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    argv = [sys.executable, ROOT / "prepare/sudoku.py", "--subsample-size", "20", "--min-difficulty", "1"]
    r = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert r.returncode == 2 and r.stderr.count("\n") == 1 and not (tmp_path / "data").exists(), r.stderr
    fetch, then = r.stderr.split(" into a folder DIR, then: ")
    assert fetch.startswith("error: --source hf cannot be read (") and fetch.endswith(
        "put train.csv and test.csv, as in https://huggingface.co/datasets/sapientinc/sudoku-extreme,")
    python, script, *argv = shlex.split(then)
    assert (python, Path(script)) == ("python", ROOT / "prepare/sudoku.py")
    assert argv == ["--source", "DIR", "--subsample-size", "20", "--min-difficulty", "1", "--output-dir",
                    "data/sudoku-extreme-20-aug-0"]
    build(sudoku, tmp_path / "d", *argv[:-2], "--source", source / "sudoku")
    assert load(tmp_path / "d").shape == (2, 20, 81)


@pytest.mark.parametrize("builder, argv", [
    (sudoku, "--source generate --size 4 --num-train 6 --num-test 3 --seed 2"),
    (sudoku, "--source {}/sudoku --subsample-size 9 --num-aug 2 --min-difficulty 3"),
    (sudoku, "--source {}/sudoku/train.csv --num-test 7"),
    (maze, "--source generate --size 7 --num-train 4 --num-test 2 --min-path 5"),
    (maze, "--source {}/maze --aug --seed 3")])
def test_recipe_rebuilds_the_dataset(builder, argv, source, tmp_path):
    first = build(builder, tmp_path / "a", *argv.format(source).split())
    recipe = json.loads((first / "recipe.json").read_text())
    name, flags = prepare.recipe_flags(recipe)
    assert builder.__name__ == f"prepare.{name}"
    again = build(builder, tmp_path / "b", *flags)
    files = [p.relative_to(first) for p in first.rglob("*") if p.is_file()]
    assert {p: sha256(first / p) for p in files} == {p: sha256(again / p) for p in files}
    del recipe["name"]      # as before, when "source" was a short name
    assert prepare.recipe_flags(recipe) is None


def test_full_disk(source, tmp_path, capsys):
    """A file size limit stands in for a full disk; the dataset that was there stays whole."""
    argv = ["--source", source / "sudoku", "--num-aug", 20]
    build(sudoku, tmp_path / "out", *argv)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        err = refused(sudoku, argv, tmp_path, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "could not be written (File too large)" in err and "--output-dir" in err
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_interrupted_build_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(path, value):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(sudoku, tmp_path / "out", "--source", source / "sudoku")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_dataset_is_not_replaced(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    assert "is no dataset" in refused(sudoku, ["--source", source / "sudoku"], tmp_path, capsys)


def test_mazes_without_loops_have_one_way(tmp_path):
    """As many free cells as ways between them, and one more; by default some have two ways."""
    loops = []
    for more in ([], ["--loops", "0"]):
        build(maze, tmp_path / f"d{len(more)}", "--source", "generate", "--size", "11", "--num-train", "30",
              "--num-test", "10", *more)
        free = load(tmp_path / f"d{len(more)}")[0].reshape(-1, 11, 11) != maze.WALL
        ways = (free[:, 1:] & free[:, :-1]).sum((1, 2)) + (free[:, :, 1:] & free[:, :, :-1]).sum((1, 2))
        loops.append(ways - free.sum((1, 2)) + 1)
    assert loops[0].any() and not loops[1].any(), loops
