"""prepare/sudoku.py and prepare/maze.py: the published bytes, the rules of the boards, what is refused."""
import json
import os
import resource
import shlex
import subprocess
import sys
from collections import Counter
from itertools import permutations, product
from pathlib import Path

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
    builder = {"sudoku": sudoku, "maze": maze}[name]
    argv = ["--source", str(source / name), "--seed", "0", "--output-dir", str(tmp_path / "d")]
    folder = builder.build([*argv, *flags])
    got = {file: sha256(folder / file) for file in GOLDEN["sha256"][case]}
    assert got == GOLDEN["sha256"][case]


@pytest.mark.parametrize("size", [4, 6, 9])
@pytest.mark.parametrize("n", [1, 3, 300])
def test_draws_are_numpys(size, n):
    """A naive loop over the published builder's draws gives the same, and leaves the generator alike."""
    h, w = sudoku.BOX[size]
    one, bulk = np.random.RandomState(n), np.random.RandomState(n)
    for _ in range(20 if n < 300 else 1):
        relabel, cells = sudoku.draw_symmetries(bulk, n, size)
        for k in range(n):
            digits = one.permutation(np.arange(1, size + 1))
            flip = h == w and one.rand() < 0.5
            rows = np.concatenate([band * h + one.permutation(h) for band in one.permutation(size // h)])
            cols = np.concatenate([band * w + one.permutation(w) for band in one.permutation(size // w)])
            grid = np.arange(size * size).reshape(size, size)
            assert relabel[k].tolist() == [0, 1, *(digits + 1)]
            assert (cells[k].reshape(size, size) == (grid.T if flip else grid)[rows][:, cols]).all()
    assert one.randint(2 ** 31) == bulk.randint(2 ** 31)


# ---------------------------------------------------------------------------------------------
# Sudoku: rules, symmetries, generated puzzles

@pytest.fixture(scope="module")
def puzzles():
    """A few generated puzzles of every size: {size: {"train": (2, N, S), "test": ...}}."""
    rng = np.random.RandomState(3)
    return {size: boards.generate(lambda size=size: sudoku.make_puzzle(rng, size), n, n)
            for size, n in ((4, 40), (6, 30), (9, 3))}


def count_solutions(question, size, limit=2):
    """Naive: the first blank cell, every digit."""
    h, w = sudoku.BOX[size]
    board = [int(t) - 1 for t in question]
    if 0 not in board:
        return 1
    at, found = board.index(0), 0
    r, c = divmod(at, size)
    seen = {board[i] for i in range(size * size)
            if i // size == r or i % size == c or (i // size // h, i % size // w) == (r // h, c // w)}
    for digit in set(range(1, size + 1)) - seen:
        board[at] = digit
        found += count_solutions([d + 1 for d in board], size, limit - found)
        if found >= limit:
            break
    return found


@pytest.mark.parametrize("size", [4, 6])
def test_generated_puzzles_have_one_solution_and_no_spare_clue(puzzles, size):
    for split in ("train", "test"):
        questions, answers = puzzles[size][split]
        assert sudoku.check(questions, answers, size).all()
        for q in questions[:10]:
            assert count_solutions(q, size) == 1
            for clue in np.flatnonzero(q > 1):
                fewer = q.copy()
                fewer[clue] = 1
                assert count_solutions(fewer, size) == 2


def test_generated_9x9_puzzle_has_one_solution(puzzles):
    question, answer = puzzles[9]["train"][:, 0]
    assert sudoku.check(question, answer, 9)
    given = answer.copy()  # the naive solver is slow: it starts with the answer's upper four rows
    given[36:] = question[36:]
    assert count_solutions(given, 9) == 1
    bits, order = [1 << t - 2 if t > 1 else 0 for t in question.tolist()], [[1 << d for d in range(9)]] * 81
    for cell in np.flatnonzero(question == 1)[:20]:  # every other digit in a blank cell leads nowhere
        others = [bit for bit in order[0] if bit.bit_length() + 1 != answer[cell]]
        assert sudoku.solve(bits, 9, [others if c == cell else order[c] for c in range(81)]) is None
    assert [b.bit_length() + 1 for b in sudoku.solve(bits, 9, order)] == answer.tolist()


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


def test_generated_puzzles_differ(puzzles):
    for size, splits in puzzles.items():
        questions = [q.tobytes() for split in splits.values() for q in split[0]]
        assert len(set(questions)) == len(questions), size


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


def test_kinship_tells_puzzles_apart(puzzles):
    questions, answers = puzzles[6]["train"]
    assert len({sudoku.kinship(q, a, 6) for q, a in zip(questions, answers)}) >= 29


@pytest.mark.parametrize("size", [4, 6, 9])
def test_symmetries_are_undone(puzzles, size):
    board = puzzles[size]["train"][0, 0]
    symmetries = sudoku.draw_symmetries(np.random.RandomState(1), 20, size)
    forward = sudoku.transform(board, *symmetries)
    assert (sudoku.transform(forward, *sudoku.inverse(*symmetries)) == board).all()
    assert (sudoku.transform(np.zeros_like(board), *symmetries) == 0).all()  # padding stays padding


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
    argv = ["--source", "generate", "--num-train", "6", "--num-test", "4", "--num-aug", "7", "--seed", "5"]
    a = sudoku.build([*argv, "--output-dir", str(tmp_path / "a")])
    b = sudoku.build([*argv, "--output-dir", str(tmp_path / "b")])
    train, test = load(a), load(a, "test")
    assert train.shape == (2, 48, 36) and test.shape == (2, 4, 36) and train.dtype == np.uint8
    assert (train == load(b)).all() and (a / "recipe.json").read_text() == (b / "recipe.json").read_text()
    meta = json.loads((a / "train/dataset.json").read_text())
    assert (meta["vocab_size"], meta["seq_len"], meta["total_groups"], meta["total_puzzles"]) == (8, 36, 6, 6)
    recipe = json.loads((a / "recipe.json").read_text())
    assert (recipe["builder"], recipe["seed"], recipe["size"], recipe["name"]) == ("sudoku", 5, 6, "6x6")
    assert not list(tmp_path.glob(".*"))


def test_csv_sources(source, tmp_path, monkeypatch):
    """A single file holds rows out, a rating limit drops rows, the hub's files are read like local ones."""
    out, one = ["--output-dir", str(tmp_path / "d")], str(source / "sudoku/train.csv")
    folder = sudoku.build(["--source", one, "--num-test", "12", *out])
    different = {(*q, *a) for split in ("train", "test") for q, a in zip(*load(folder, split).tolist())}
    assert load(folder).shape == (2, 38, 81) and load(folder, "test").shape == (2, 12, 81)
    assert len(different) == 50
    folder = sudoku.build(["--source", str(source / "sudoku"), "--min-difficulty", "15", *out])
    assert load(folder).shape[1] == 35 and load(folder, "test").shape[1] == 5
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["files"]["train.csv"] == sha256(one) and recipe["min_difficulty"] == 15
    assert (recipe["source"], recipe["name"]) == (str(source / "sudoku"), "sudoku")

    import huggingface_hub

    def download(repo, name, repo_type):
        return str(source / ("maze" if "maze" in repo else "sudoku") / name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    folder = sudoku.build(["--subsample-size", "20", "--num-aug", "2"])
    assert folder.as_posix() == "data/sudoku-extreme-20-aug-2"
    assert load("data/sudoku-extreme-20-aug-2").shape == (2, 60, 81)
    assert maze.build([]).as_posix() == "data/maze-30x30-hard-1k"


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
    folder = tmp_path_factory.mktemp("maze")
    return maze.build(["--source", "generate", "--size", "11", "--min-path", "14", "--num-train", "40",
                       "--num-test", "20",
                       "--output-dir", str(folder / "d")])


def test_generated_mazes_have_one_shortest_path(mazes):
    for split in ("train", "test"):
        questions, answers = load(mazes, split)
        assert maze.check(questions, answers, 11).all()
        for q, a in zip(questions, answers):
            steps, ways = shortest_paths(q, 11)
            assert ways == 1 and steps >= 14 and (a == maze.PATH).sum() == steps - 1


def test_no_test_maze_is_a_form_of_a_training_maze(mazes):
    train, test = (load(mazes, split)[0].reshape(-1, 11, 11) for split in ("train", "test"))
    forms = {data.dihedral(m, t).tobytes() for m in train for t in range(8)}
    assert len({m.tobytes() for m in (*train, *test)}) == 60
    assert not forms & {m.tobytes() for m in test}


def test_tiny_mazes_are_split_by_form(tmp_path):
    """Few 5x5 mazes exist, so that a chance split would overlap."""
    folder = maze.build(["--source", "generate", "--size", "5", "--num-train", "18", "--num-test", "18",
                         "--output-dir", str(tmp_path / "d")])
    train, test = (load(folder, split)[0].reshape(-1, 5, 5) for split in ("train", "test"))
    assert not {data.dihedral(m, t).tobytes() for m in train for t in range(8)} & {m.tobytes() for m in test}


def test_maze_check():
    q = tokens("######S  ## # ##  G######", MAZE_CHARS)

    def answer(text):
        a = tokens(text, MAZE_CHARS)
        return maze.check(q, a, 5), maze.check(q, a, 5, shortest=False)
    assert answer("######Soo## #o##  G######") == (True, True)
    assert answer("######S  ##o# ##ooG######") == (True, True)
    assert answer("######Soo##o#o##ooG######") == (False, True)  # a cell too many
    assert answer("######So ## #o##  G######") == (False, False)  # broken
    assert answer("######S  ## # ##  G######") == (False, False)  # no path
    assert answer("######Soo## #o##  o######") == (False, False)  # runs over G
    assert answer("######Soo##o o##ooG######") == (False, False)  # opens a wall
    assert answer("######Soo## oo##  G######") == (False, False)  # walks through a wall
    assert answer("######Soo## #o##  G#####?") == (False, False)
    assert not maze.check(tokens("#" * 25, MAZE_CHARS), tokens("#" * 25, MAZE_CHARS), 5)


def test_maze_check_in_batches_and_longer_paths():
    texts = "######S G##   ##   ######", "######SoG##   ##   ######", "######S G##ooo##   ######"
    grids = np.stack([tokens(text, MAZE_CHARS) for text in texts])
    q = np.broadcast_to(grids[0], (2, 3, 25))
    a = np.broadcast_to(grids, (2, 3, 25))
    assert maze.check(q, a, 5).tolist() == [[False, True, False]] * 2
    assert maze.check(q, a, 5, shortest=False).tolist() == [[False, True, True]] * 2


def test_dihedral_is_the_specs_table():
    grid = np.arange(12).reshape(3, 4)
    want = [grid, np.rot90(grid), np.rot90(grid, 2), np.rot90(grid, 3), np.fliplr(grid), np.flipud(grid),
            grid.T, np.fliplr(np.rot90(grid))]
    for t in range(8):
        assert np.array_equal(data.dihedral(grid, t), want[t]), t
        assert np.array_equal(data.dihedral(np.stack([grid, grid + 1]), t)[1], want[t] + 1), t
        assert np.array_equal(data.dihedral(want[t], data.DIHEDRAL_INVERSE[t]), grid), t


# ---------------------------------------------------------------------------------------------
# CSV files as people have them

def table(header, pairs, row):
    rows = [row.format(q=q, a=a, i=i, zeros=q.replace(".", "0")) for i, (q, a) in enumerate(pairs)]
    return "".join(f"{line}\n" for line in [header, *rows])


PLAIN = "source,question,answer,rating", "gen,{q},{a},{i}"
SUDOKU_FILES = {
    "published": lambda pairs: table(PLAIN[0], pairs, PLAIN[1]),
    "a million": lambda pairs: table("quizzes,solutions", pairs, "{zeros},{a}"),
    "three millions": lambda pairs: table("id,puzzle,solution,clues,difficulty", pairs, "{i},{q},{a},24,2.2"),
    "other order": lambda pairs: table("answer,rating,question", pairs, "{a},{i},{q}"),
    "capitals": lambda pairs: table("Puzzle,Solution", pairs, "{q},{a}"),
    "spaces": lambda pairs: table(" question , answer ", pairs, "{q} ,\t{a}  "),
    "quotes": lambda pairs: table('"source","question","answer"', pairs, '"a, b","{q}","{a}"'),
    "quotes and spaces": lambda pairs: table('"question", "answer"', pairs, '"{q}", "{a}"'),
    "line in a field": lambda pairs: table("question,note,answer", pairs, '{q},"two\nlines",{a}'),
    "tabs": lambda pairs: table("question\tanswer", pairs, "{q}\t{a}"),
    "semicolons": lambda pairs: table("question;answer;rating", pairs, "{q};{a};1,5"),
    "empty lines": lambda pairs: "\n\n" + table(PLAIN[0], pairs, PLAIN[1] + "\n\n  \n") + ",,,\n\n",
    "no last line end": lambda pairs: table(PLAIN[0], pairs, PLAIN[1])[:-1],
    "no header": lambda pairs: table("", pairs, PLAIN[1]),
    "no header, two columns": lambda pairs: table("", pairs, "{q};{a}"),
    "no header, spaces": lambda pairs: table("", pairs, "x, {q} , {a}"),
}


def pairs_read(builder, content, tmp_path):
    """The boards that a builder makes of a CSV file with this content (bytes), as text."""
    file, characters = tmp_path / "boards.csv", SUDOKU_CHARS if builder is sudoku else MAZE_CHARS
    file.write_bytes(content)
    folder = builder.build(["--source", str(file), "--num-test", "1", "--output-dir", str(tmp_path / "d")])
    read = np.concatenate([load(folder, "train"), load(folder, "test")], axis=1)
    return sorted(tuple("".join(characters[t] for t in board) for board in pair) for pair in zip(*read))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", SUDOKU_FILES)
def test_csv_is_read_as_it_comes(kind, encoding, end, tmp_path, capsys):
    pairs = [tuple(pair) for pair in golden_pairs("sudoku/train")[:5]]
    content = SUDOKU_FILES[kind](pairs).replace("\n", end).encode(encoding)
    assert pairs_read(sudoku, content, tmp_path) == sorted(pairs)
    assert capsys.readouterr().err == ""


MAZE_FILES = {"published": (PLAIN[0], PLAIN[1]), "tabs": ("solution\tpuzzle", "{a}\t{q}"),
              "no header": ("", "{q};{a}"), "quotes": ("question,answer", '"{q}","{a}"')}


@pytest.mark.parametrize("kind", MAZE_FILES)
def test_csv_of_mazes_that_begin_and_end_with_a_free_cell(kind, tmp_path):
    """A space is a cell: it is no space around the board."""
    pairs = [(" S  G" + " " * 20, " SooG" + " " * 20), ("  S G" + " " * 20, "  SoG" + " " * 20),
             ("#" * 20 + "#S G#", "#" * 20 + "#SoG#")]
    content = table(MAZE_FILES[kind][0], pairs, MAZE_FILES[kind][1])
    assert pairs_read(maze, content.encode(), tmp_path) == sorted(pairs)


def test_spaces_around_a_maze(tmp_path):
    pairs = golden_pairs("maze/train")[:3]
    content = table("question, answer", pairs, " {q} , {a}  ")
    assert pairs_read(maze, content.encode(), tmp_path) == sorted(pairs)


def test_ratings_under_another_name(tmp_path):
    """Decimal ratings, in a column called difficulty, and not the fourth."""
    pairs = golden_pairs("sudoku/train")[:6]
    (tmp_path / "boards.csv").write_text(table("difficulty,puzzle,solution", pairs, "{i}.5,{q},{a}"))
    argv = ["--source", str(tmp_path / "boards.csv"), "--num-test", "1", "--output-dir", str(tmp_path / "d")]
    assert load(sudoku.build([*argv, "--min-difficulty", "3"])).shape == (2, 2, 81)     # 3.5, 4.5, 5.5


@pytest.fixture
def boards_of(tmp_path):
    """Write boards as tokens (2, N, S) to a CSV and return its path."""
    def write(name, pairs, characters=SUDOKU_CHARS):
        return write_csv(tmp_path / name, [["".join(characters[t] for t in board) for board in pair]
                                           for pair in zip(*pairs)])
    return write


def warnings(builder, argv, tmp_path, capsys):
    builder.build([*map(str, argv), "--output-dir", str(tmp_path / "d")])
    return capsys.readouterr().err.splitlines()


def test_overlap_of_sudokus_is_said(puzzles, boards_of, tmp_path, capsys):
    train, other = puzzles[6]["train"], puzzles[6]["test"]
    moved = sudoku.augment(np.random.RandomState(0), train[:, :4], 6, 1)[:, 1::2]
    boards_of("train.csv", train)
    boards_of("test.csv", np.concatenate([train[:, 5:8], moved, other[:, :10]], axis=1))
    assert warnings(sudoku, ["--source", tmp_path], tmp_path, capsys) == [
        "warning: 3 of 17 test boards also stand in the training split: their score is memory",
        "warning: 4 of 17 test boards stand in the training split in another form, as turned, mirrored or "
        "renamed"]
    boards_of("test.csv", train)
    assert "30 of 30 test boards also stand" in warnings(sudoku, ["--source", tmp_path], tmp_path, capsys)[0]
    boards_of("test.csv", other)
    assert warnings(sudoku, ["--source", tmp_path], tmp_path, capsys) == []
    one = boards_of("one.csv", np.repeat(train, 3, axis=1))
    argv = ["--source", one, "--num-test", 8]
    assert "of 8 test boards also stand" in warnings(sudoku, argv, tmp_path, capsys)[0]
    few = ["--source", tmp_path, "--subsample-size", 1]     # what is not drawn is not trained on
    boards_of("test.csv", train)
    assert "1 of 30 test boards" in warnings(sudoku, few, tmp_path, capsys)[0]


def test_overlap_of_mazes_is_said(mazes, boards_of, tmp_path, capsys):
    train, test = load(mazes), load(mazes, "test")
    turned = data.dihedral(train[:, :3].reshape(2, 3, 11, 11), 1).reshape(2, 3, 121)
    boards_of("train.csv", train, MAZE_CHARS)
    boards_of("test.csv", np.concatenate([test, train[:, 7:9], turned], axis=1), MAZE_CHARS)
    assert warnings(maze, ["--source", tmp_path], tmp_path, capsys) == [
        "warning: 2 of 25 test boards also stand in the training split: their score is memory",
        "warning: 3 of 25 test boards stand in the training split in another form, as turned, mirrored or "
        "renamed"]


def test_more_boards_are_compared_only_as_they_are(puzzles, capsys):
    train = puzzles[4]["train"]
    boards.warn_of_leaks(train, train[:, :2], None, many=10)
    assert capsys.readouterr().err.splitlines() == [
        "warning: 2 of 2 test boards also stand in the training split: their score is memory"]


@pytest.mark.parametrize("size", [4, 6])
def test_several_solutions_are_counted(puzzles, boards_of, tmp_path, capsys, size):
    questions, answers = puzzles[size]["train"][:, :12].copy()
    for q in questions[::2]:
        q[np.flatnonzero(q > 1)[:2]] = 1        # no clue was to spare
    several = sum(count_solutions(q, size) > 1 for q in questions)
    assert several == 6 == sum(not sudoku.has_one_solution(q, a, size) for q, a in zip(questions, answers))
    boards_of("train.csv", np.stack([questions, answers]))
    boards_of("test.csv", puzzles[size]["test"][:, :3])
    err = warnings(sudoku, ["--source", tmp_path], tmp_path, capsys)
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
        cli(lambda: builder.main([*argv, "--output-dir", str(folder / "out")]))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert sorted(folder.rglob("*")) == before
    return err


@pytest.mark.parametrize("rows, words", [
    ([(Q, A), (Q[:-1], A2)], "train.csv line 3: columns of [3, 80, 81, 1] characters"),
    ([(Q, A), (Q2, A2 + "1")], "with 81 in question and answer"),
    ([(Q[:7], A[:7])], "train.csv line 2: columns of [3, 7, 7, 1]"),
    ([(Q, A), (Q2, A2 + ",5")], "columns of [3, 81, 81, 1, 1]"),
    ([(Q, A), ("x" + Q2[1:], A2)], "line 3: character 'x' is none of '.0123456789'"),
    ([(Q, A), (Q2, A2[:-1] + "é")], "line 3: columns of"),
    ([(Q, A), (Q2, A)], "line 3: the answer contradicts the question"),
    ([(Q, A), ("." * 81, A2.replace("1", "2"))],
     "line 3: the answer contradicts the question or breaks the rules"),
    ([(Q, Q)], "line 2: the answer contradicts the question or breaks the rules"),
    ([("." * 36, "123456" * 6)], "line 2: the answer contradicts"),
    ([(Q, '"' + "1" * 200_000)], "is no CSV file"),
    ([], "has no rows below its header")])
def test_bad_sudoku_rows(rows, words, tmp_path, capsys):
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "test.csv", [(Q, A)])
    assert words in refused(sudoku, ["--source", str(tmp_path)], tmp_path, capsys)


@pytest.mark.parametrize("text, words", [
    ("q,a\n{q},{a}\n", "line 1: 'q, a' names no column question or none answer; begin the file with a"),
    ("question,rating\n{q},1\n", "line 1: 'question, rating' names no column question or none answer"),
    ("\n\nx,{q0},{a},1\n", "names no column question or none answer"),
    ("{q},{q},{a}\n", "names no column question or none answer"),
    ("question|answer\n{q}|{a}\n", "line 1: 'question|answer' names no column"),
    ("<html><body>404</body></html>\n", "line 1: '<html><body>404</bod' names no column"),
    ("{q},{a}\n{q},{a},1\n", "line 2: columns of [81, 81, 1] characters; need column 1, column 2, with 81"),
    ("{q},{a}\n\n\n{q},{q}\n", "line 4: the answer contradicts the question"),
    ("question,note,answer\n{q},'a\nb',{a}\n", "line 2: columns of [81, 2] characters"),
    ('question,note,answer\n{q},"a\n\nb",{a}\n{q},,{q}\n', "line 5: the answer contradicts the question"),
    ("question,answer\n{q},{a}\nquestion,answer\n", "line 3: columns of [8, 6] characters; need question,"),
    ("answer,question\n{q},{a}\n", "line 2: the answer contradicts the question")])
def test_bad_csv(text, words, tmp_path, capsys):
    file = tmp_path / "boards.csv"
    file.write_text(text.format(q=Q, a=A, q0=Q[1:]))
    assert words in refused(sudoku, ["--source", str(file), "--num-test", "1"], tmp_path, capsys)


@pytest.mark.parametrize("rows, words", [
    ([(MQ, MA), (MQ[:-1], MA)], "line 3: columns of [3, 899, 900, 1]"),
    ([(MQ[:899], MA[:899])], "with 25, 36, 49 .. in question"),
    ([(MQ, MA.replace("o", "x", 1))], "line 2: character 'x' is none of '# SGo'"),
    ([(MQ, MA.replace("o", " ", 1))], "line 2: the answer contradicts the question or breaks the rules"),
    ([(MQ.replace("#", " ", 1), MA)], "line 2: the answer contradicts the question"),
    ([(MQ.replace("S", " "), MA.replace("S", "o"))], "line 2: the answer contradicts the question")])
def test_bad_maze_rows(rows, words, tmp_path, capsys):
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "test.csv", [(MQ, MA)])
    assert words in refused(maze, ["--source", str(tmp_path)], tmp_path, capsys)


@pytest.mark.parametrize("flags, words", [
    (["--source", "{}/none"], "none/train.csv not found"),
    (["--source", "{}/none.csv"], "none.csv not found"),
    (["--source", "{}", "--subsample-size", "3"], "--subsample-size 3 is more than the 2 training boards"),
    (["--source", "{}", "--min-difficulty", "9"], "no rows with a rating of 9 or more"),
    (["--source", "{}/rated", "--min-difficulty", "9"], "rating 'hard' is no whole number"),
    (["--source", "{}/nan", "--min-difficulty", "9"], "train.csv line 2: rating 'nan' is no whole number"),
    (["--source", "{}/train.csv", "--num-test", "2"], "has 2 boards, all of them for --num-test 2"),
    (["--source", "{}/mixed"], "boards of 81 cells in train.csv and 16 in test.csv"),
    (["--source", "{}/bare.csv", "--min-difficulty", "9"],
     "no column is named rating or ratings or difficulty, which --min-difficulty 9 needs"),
    (["--source", "generate", "--num-aug", "-1"], "--num-aug: -1 is out of range; give 0 .. 1000000"),
    (["--source", "generate", "--seed", "-3"], "--seed: -3 is out of range"),
    (["--source", "generate", "--seed", str(2 ** 32)], "--seed: 4294967296 is out of range"),
    (["--source", "generate", "--num-test", "0"], "--num-test: 0 is out of range; give 1 .."),
    (["--source", "generate", "--subsample-size", "0"], "--subsample-size: 0 is out of range; give 1 or mo"),
    (["--source", "generate", "--num-aug", "many"], "--num-aug: 'many' is no whole number"),
    (["--source", "generate", "--augment", "3"], "unrecognized arguments: --augment 3"),
    (["--source", "generate", "--min-difficulty", "1"], "--min-difficulty 1 needs the ratings of a CSV"),
    (["--source", "generate", "--num-train", "5", "--num-test", "5", "--subsample-size", "6"],
     "--subsample-size 6 is more than the 5"),
    (["--source", "generate", "--size", "4", "--num-train", "60", "--num-test", "1"], "ask for fewer")])
def test_bad_sudoku_flags(flags, words, tmp_path, capsys):
    write_csv(tmp_path / "train.csv", [(Q, A), (Q2, A2)])
    write_csv(tmp_path / "test.csv", [(Q, A)])
    for name, rating in (("rated", "hard"), ("nan", "nan")):
        write_csv(tmp_path / name / "test.csv", [(Q, A)])
        text = f"source,question,answer,rating\ngen,{Q},{A},{rating}\n"
        (tmp_path / name / "train.csv").write_text(text)
    (tmp_path / "bare.csv").write_text(f"question,answer\n{Q},{A}\n{Q2},{A2}\n")
    write_csv(tmp_path / "mixed/train.csv", [(Q, A)])
    write_csv(tmp_path / "mixed/test.csv", [("1" + "." * 15, "1234341221434321")])
    assert words in refused(sudoku, [f.format(tmp_path) for f in flags], tmp_path, capsys)


@pytest.mark.parametrize("flags, words", [
    (["--source", "generate", "--size", "4"], "--size: 4 is out of range; give 5 .. 100"),
    (["--source", "generate", "--size", "6", "--min-path", "50"],
     "--min-path 50 was not reached in 200 mazes"),
    (["--source", "generate", "--size", "5", "--num-train", "80", "--num-test", "80"], "ask for fewer")])
def test_bad_maze_flags(flags, words, tmp_path, capsys):
    assert words in refused(maze, flags, tmp_path, capsys)


def test_no_network(tmp_path):
    """One line that says which files to fetch, where to put them, and the whole command after that."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    argv = [sys.executable, ROOT / "prepare/maze.py", "--aug", "--output-dir", tmp_path / "out"]
    r = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=env)
    assert r.returncode == 2 and r.stderr.count("\n") == 1 and not (tmp_path / "out").exists(), r.stderr
    for word in ("train.csv and test.csv", "datasets/sapientinc/maze-30x30-hard-1k",
                 f"python prepare/maze.py --source DIR --aug --output-dir {tmp_path / 'out'}"):
        assert word in r.stderr


def test_command_for_fetched_files_builds_what_was_asked_for(source, tmp_path, monkeypatch, capsys):
    """The line that is printed without a network, pasted with the folder's name, builds what was wanted."""
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli(lambda: sudoku.main(["--subsample-size", "20", "--num-aug", "2", "--min-difficulty", "1"]))
    python, script, *argv = shlex.split(capsys.readouterr().err.split(" then: ")[1])
    assert (python, Path(script)) == ("python", ROOT / "prepare/sudoku.py")
    folder = sudoku.build([str(source / "sudoku") if word == "DIR" else word for word in argv])
    assert folder.as_posix() == "data/sudoku-extreme-20-aug-2" and load(folder).shape == (2, 60, 81)
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["subsample_size"], recipe["num_aug"], recipe["min_difficulty"]) == (20, 2, 1)


@pytest.mark.parametrize("builder, argv", [
    (sudoku, ["--source", "generate", "--size", "4", "--num-train", "6", "--num-test", "3", "--seed", "2"]),
    (sudoku, ["--source", "{}/sudoku", "--subsample-size", "9", "--num-aug", "2", "--min-difficulty", "3"]),
    (sudoku, ["--source", "{}/sudoku/train.csv", "--num-test", "7"]),
    (maze, ["--source", "generate", "--size", "7", "--num-train", "4", "--num-test", "2", "--min-path", "5"]),
    (maze, ["--source", "{}/maze", "--aug", "--seed", "3"])])
def test_recipe_rebuilds_the_dataset(builder, argv, source, tmp_path):
    first = builder.build([*(word.format(source) for word in argv), "--output-dir", str(tmp_path / "a")])
    recipe = json.loads((first / "recipe.json").read_text())
    name, flags = prepare.recipe_flags(recipe)
    assert builder.__name__ == f"prepare.{name}"
    again = builder.build([*flags, "--output-dir", str(tmp_path / "b")])
    files = [p.relative_to(first) for p in first.rglob("*") if p.is_file()]
    assert {p: sha256(first / p) for p in files} == {p: sha256(again / p) for p in files}
    del recipe["name"]      # as before, when "source" was a short name
    assert prepare.recipe_flags(recipe) is None


def test_full_disk(source, tmp_path, capsys):
    """A file size limit stands in for a full disk; the dataset that was there stays whole."""
    argv = ["--source", str(source / "sudoku"), "--num-aug", "20", "--output-dir", str(tmp_path / "out")]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for there in (False, True):
        if there:
            sudoku.build(argv)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        capsys.readouterr()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
            with pytest.raises(SystemExit) as e:
                cli(lambda: sudoku.main(argv))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1, err
        assert "could not be written (File too large)" in err and "--output-dir" in err
        assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_interrupted_build_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(path, value):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sudoku.build(["--source", str(source / "sudoku"), "--output-dir", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_dataset_is_not_replaced(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    assert "is no dataset" in refused(sudoku, ["--source", str(source / "sudoku")], tmp_path, capsys)


@pytest.mark.parametrize("builder", [sudoku, maze])
def test_help_fits_a_terminal(builder, capsys):
    with pytest.raises(SystemExit) as e:
        builder.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert e.value.code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80, "\n".join(lines)


def test_script_runs_from_anywhere(tmp_path):
    argv = "--source generate --size 4 --num-train 3 --num-test 2".split()
    r = subprocess.run([sys.executable, ROOT / "prepare/sudoku.py", *argv], capture_output=True, text=True,
                       cwd=tmp_path)
    assert r.returncode == 0 and r.stderr == "", r.stderr
    assert load(tmp_path / "data/sudoku-4x4-full-aug-0").shape == (2, 3, 16)
