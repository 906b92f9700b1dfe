"""prepare/: the writer, prepare/sudoku.py and prepare/maze.py: published bytes, rules, files, refusals."""

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from itertools import islice, product
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

import prepare
from prepare import boards, maze, sudoku
from tools.common import UserError, cli, sha256_of_file

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/boards.json").read_text())
MAZE_HARD = ROOT.parent / "shared/data/maze-hard-train.npz"
SUDOKU_CHARS, MAZE_CHARS = "?.123456789", "?# SGo"
SMALL = "--source generate --size 4 --num-train 6 --num-test 3".split()


def golden_pairs(split):
    if split.startswith("maze"):
        return [(line.replace("o", " "), line) for line in GOLDEN["boards"][split]]
    return [tuple(line.split(",")) for line in GOLDEN["boards"][split]]


def write_csv(path, pairs, header="source,question,answer,rating", row="gen,{q},{a},{i}"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row.format(q=q, a=a, i=i, zeros=q.replace(".", "0")) for i, (q, a) in enumerate(pairs)]
    path.write_text("".join(f"{line}\n" for line in [header, *rows]))
    return path


def write_tokens(path, pairs, characters=SUDOKU_CHARS):
    """Write boards (2, N, S) as CSV."""
    texts = [["".join(characters[token] for token in board) for board in pair] for pair in zip(*pairs)]
    return write_csv(path, texts)


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


def contents(folder):
    """{path: bytes} of all files; None for folders and links."""
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(builder, argv, tmp_path, capsys, out="out"):
    """The line that a refused build prints. Nothing may change on disk."""
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as e:
        cli(lambda: build(builder, tmp_path / out, *argv))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert contents(tmp_path) == before
    return err


# ---------------------------------------------------------------------------------------------
# The published bytes


@pytest.mark.parametrize(
    "case, flags",
    [
        ("sudoku_default", ""),
        ("sudoku_s20_a5", "--subsample-size 20 --num-aug 5"),
        ("maze_default", ""),
        ("maze_noaug_s20", "--subsample-size 20"),
        ("maze_aug_s20", "--subsample-size 20 --aug"),
        ("maze_aug_full", "--aug"),
    ],
)
def test_equal_to_published_builder(case, flags, source, tmp_path):
    name = case.split("_")[0]
    builder = {"sudoku": sudoku, "maze": maze}[name]
    folder = build(builder, tmp_path / "d", "--source", source / name, *flags.split())
    assert {f: sha256_of_file(folder / f) for f in GOLDEN["sha256"][case]} == GOLDEN["sha256"][case]


@pytest.mark.parametrize(
    "builder, flags, expected",
    [
        (sudoku, "--size 4 --num-aug 3", "89bc0274ffde5992be352d0bc3e0b29a383f47eb1942ee3468737fdbe62b8ce2"),
        (sudoku, "--size 6 --num-aug 3", "15dace0ee5c3029b0553186ed0e98fb1dddbcb022aa9905592c6f67bd8e43cf1"),
        (sudoku, "--size 9 --num-aug 3", "9f73c552fa2956037c58d5514357710cf2f31117d2e069bfb511e6fa5c2beb43"),
        (maze, "--size 9 --min-path 12", "ce2e7aa2a2928ecade4976dde97098372ca7f7fe09490c11247eef8a98d03c00"),
    ],
)
def test_generated_bytes(builder, flags, expected, tmp_path):
    """REPORT's figures were measured on boards of this generator: no random draw may change."""
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
    rng, result = np.random.RandomState(3), {}
    for size, n in ((4, 40), (6, 30), (9, 3)):
        train, test = boards.generate(partial(sudoku.make_puzzle, rng, size), n, n)
        assert not set(sudoku.symmetry_hash(*train, size)) & set(sudoku.symmetry_hash(*test, size))
        result[size] = {"train": train, "test": test}
    return result


def count_solutions(question, size, limit=2):
    """Naive: try every digit that is left for the blank with the fewest."""
    h, w = sudoku.BOX[size]
    board, best = question.reshape(size, size), None
    for r, c in np.argwhere(board == 1).tolist():
        box = board[r // h * h :, c // w * w :][:h, :w]
        left = set(range(2, size + 2)) - {*board[r].tolist(), *board[:, c].tolist(), *box.ravel().tolist()}
        if best is None or len(left) < len(best[2]):
            best = r, c, left
    if best is None:
        return 1
    found = 0
    for token in best[2]:
        filled = board.copy()
        filled[best[:2]] = token
        found += count_solutions(filled, size, limit - found)
        if found >= limit:
            break
    return found


@pytest.mark.parametrize("size", [4, 6, 9])
def test_generated_puzzles_have_one_solution_and_no_redundant_clue(puzzles, size):
    for split in ("train", "test"):
        questions, answers = puzzles[size][split]
        assert sudoku.check(questions, answers, size).all()
        assert len(np.unique(questions, axis=0)) == len(questions)
        for q in questions[: 2 if size == 9 else 10]:
            assert count_solutions(q, size) == 1
            for clue in np.flatnonzero(q > 1):
                fewer = q.copy()
                fewer[clue] = 1
                assert count_solutions(fewer, size) == 2


@pytest.mark.parametrize("size", [4, 6, 9])
def test_augmented_boards_are_legal_and_symmetric(puzzles, size):
    pairs = puzzles[size]["train"]
    q, a = sudoku.augment(np.random.RandomState(0), pairs, size, 50).reshape(2, -1, 51, size * size)
    assert (q[:, 0] == pairs[0]).all() and (a[:, 0] == pairs[1]).all()
    assert sudoku.check(q, a, size).all()
    assert ((q > 1).sum(-1) == (q[:, :1] > 1).sum(-1)).all()
    assert len(np.unique(q[0], axis=0)) > 25
    hashes = sudoku.symmetry_hash(q, a, size)
    assert (hashes == hashes[:, :1]).all()
    if size > 4:  # few puzzles of 4x4 exist
        assert len(np.unique(hashes)) == len(q)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_check_rejects_wrong_answers(puzzles, size):
    q, a = puzzles[size]["train"][:, 0]
    for cell, token in product(range(size * size), range(size + 3)):
        wrong = a.copy()
        wrong[cell] = token
        assert sudoku.check(q, wrong, size) == (token == a[cell])
    empty = np.ones_like(q)
    swapped = np.where(a == 2, 3, np.where(a == 3, 2, a)).astype(np.uint8)  # legal, but contradicts a given
    assert sudoku.check(empty, swapped, size) and not sudoku.check(q, swapped, size)
    assert sudoku.check(empty, a.reshape(size, size).T.ravel(), size) == (size != 6)
    rows = np.tile(np.arange(2, size + 2, dtype=np.uint8), size)  # rows are legal, columns are not
    latin = np.concatenate([np.roll(np.arange(2, size + 2), r) for r in range(size)])  # boxes are not
    assert not sudoku.check(empty, rows, size) and not sudoku.check(empty, latin, size)


# ---------------------------------------------------------------------------------------------
# Mazes


def naive_steps(question, size, start_token=maze.START):
    """{cell: steps from S} with a set of cells per step."""
    grid = question.reshape(size, size)
    layer, steps, n = {tuple(np.argwhere(grid == start_token)[0].tolist())}, {}, 0
    while layer:
        steps |= dict.fromkeys(layer, n)
        near = {(r + y, c + x) for r, c in layer for y, x in ((1, 0), (-1, 0), (0, 1), (0, -1))}
        inside = {(r, c) for r, c in near if 0 <= r < size and 0 <= c < size and grid[r, c] != maze.WALL}
        layer, n = inside - steps.keys(), n + 1
    return steps


@pytest.fixture(scope="module")
def mazes(tmp_path_factory):
    argv = "--source generate --size 11 --min-path 14 --num-train 150 --num-test 50".split()
    return build(maze, tmp_path_factory.mktemp("maze") / "d", *argv)


def test_generated_mazes_are_of_the_kind_of_maze_hard(mazes):
    """Statistics, and shortest paths."""
    lengths, shares = [], []
    for split in ("train", "test"):
        questions, answers = load(mazes, split)
        assert maze.check(questions, answers, 11).all()
        for q, a in zip(questions, answers):
            goal = tuple(np.argwhere(q.reshape(11, 11) == maze.GOAL)[0].tolist())
            lengths.append(naive_steps(q, 11)[goal])
            assert lengths[-1] == (a == maze.PATH).sum() + 1 >= 14
            shares.append((q == maze.WALL).mean())
    assert 0.28 <= min(shares) < 0.32 and 0.41 < max(shares) <= 0.45
    assert 14 < np.median(lengths) < 20 and max(lengths) > 22
    q = load(mazes)[0].reshape(-1, 11, 11)
    for token in (maze.WALL, maze.START, maze.GOAL):  # no border: some are in the first row
        assert (q[:, 0] == token).any()


def test_boards_of_size_30_like_maze_hard():
    for question, answer, _ in islice(maze.draw_mazes(np.random.RandomState(0), 30, 109), 3):
        assert maze.check(question, answer, 30) and (answer == maze.PATH).sum() + 1 >= 109
    sizes = {5: 3, 9: 9, 30: 109, 40: 145, 100: 363}
    assert {size: maze.default_min_path(size) for size in sizes} == sizes


@pytest.mark.parametrize("size, n", [(11, 20), (5, 60)])
def test_no_test_maze_is_a_form_of_a_training_maze(size, n, tmp_path):
    argv = ["--source", "generate", "--size", size, "--num-train", n, "--num-test", n]
    folder = build(maze, tmp_path / "d", *argv)
    train, test = (load(folder, split)[0].reshape(-1, size, size) for split in ("train", "test"))
    train_forms = {prepare.dihedral(m, t).tobytes() for m in train for t in range(8)}
    assert len({m.tobytes() for m in (*train, *test)}) == 2 * n
    assert not train_forms & {m.tobytes() for m in test}
    assert folder.joinpath("recipe.json").exists()


@pytest.mark.parametrize(
    "expected",
    [
        "S    o    o    o    ooooG",
        "G    o    o    o    ooooS",
        "    S    o    o    oGoooo",
        "    G    o    o    oSoooo",
    ],
)
def test_rule_on_a_board_without_walls(expected):
    """Down comes before left and right, which come before up, so every path uses the bottom row."""
    answer = maze.label_path(tokens(expected.replace("o", " "), MAZE_CHARS), 5)
    assert "".join(MAZE_CHARS[token] for token in answer) == expected


@pytest.mark.skipif(not MAZE_HARD.exists(), reason="needs ../shared/data/maze-hard-train.npz")
def test_every_answer_of_maze_hard_follows_the_rule():
    arrays = np.load(MAZE_HARD)
    answers = np.stack([maze.label_path(question, 30) for question in arrays["inputs"]])
    assert (answers == arrays["labels"]).all(1).sum() == 1000
    assert maze.check(arrays["inputs"], arrays["labels"], 30).all()


CHECK_CASES = [  # answer to ######S  ## # ##  G######, is it a shortest path, is it a path
    ("######Soo## #o##  G######", True, True),
    ("######S  ##o# ##ooG######", True, True),
    ("######Soo##o#o##ooG######", False, True),  # a cell too many
    ("######So ## #o##  G######", False, False),  # broken
    ("######S  ## # ##  G######", False, False),  # no path
    ("######Soo## #o##  o######", False, False),  # over G
    ("######Soo##o o##ooG######", False, False),  # opens a wall
    ("######Soo## oo##  G######", False, False),  # through a wall
    ("######Soo## #o##  G#####?", False, False),
]


def test_maze_check():
    answers = np.stack([tokens(text, MAZE_CHARS) for text, *_ in CHECK_CASES])
    q = tokens("######S  ## # ##  G######", MAZE_CHARS)
    for a, (text, shortest, unbroken) in zip(answers, CHECK_CASES):
        assert (maze.check(q, a, 5), maze.check(q, a, 5, shortest=False)) == (shortest, unbroken), text
    questions = np.broadcast_to(q, answers.shape)
    assert maze.check(questions, answers, 5).tolist() == [shortest for _, shortest, _ in CHECK_CASES]
    walls = tokens("#" * 25, MAZE_CHARS)
    assert not maze.check(walls, walls, 5)
    # a detour, although no cell of the short way is missing; 4 rows of 6
    q, a = (tokens(text, MAZE_CHARS) for text in ("#######S G###   ########", "#######S G###ooo########"))
    assert not maze.check(q, a, 6) and maze.check(q, a, 6, shortest=False)


def relabeled(source, tmp_path, *flags):
    return build(maze, tmp_path / "relabeled", "--source", source, "--relabel", *flags)


def test_relabel_follows_the_rule(mazes, tmp_path, capsys):
    """It reproduces generated answers; with --aug, all eight copies agree with the rule."""
    train, test = load(mazes), load(mazes, "test")
    source = tmp_path / "csv"
    write_tokens(source / "train.csv", train, MAZE_CHARS)
    write_tokens(source / "test.csv", test, MAZE_CHARS)
    plain = relabeled(source, tmp_path)
    assert np.array_equal(load(plain), train) and np.array_equal(load(plain, "test"), test)
    augmented = build(maze, tmp_path / "aug", "--source", source, "--aug")
    assert capsys.readouterr().out.count("rotated answers contradict the tie-break") == 1
    both = relabeled(source, tmp_path, "--aug", "--overwrite")
    assert "contradict" not in capsys.readouterr().out
    questions, answers = load(both)
    assert np.array_equal(questions, load(augmented)[0]) and len(questions) == 8 * train.shape[1]
    assert not np.array_equal(answers, load(augmented)[1])
    assert maze.check(questions, answers, 11).all()
    for q, a in zip(questions[::17], answers[::17]):
        assert np.array_equal(maze.label_path(q, 11), a)
    meta = json.loads((both / "train/dataset.json").read_text())
    assert (meta["total_groups"], meta["total_puzzles"]) == (150, 150)


def test_relabel_replaces_valid_answers_of_a_file(tmp_path):
    other_way = [("S" + " " * 23 + "G", "Soooo" + "    o" * 3 + "    G")]
    folder = relabeled(write_csv(tmp_path / "one.csv", other_way * 2), tmp_path, "--num-test", "1")
    assert "".join(MAZE_CHARS[token] for token in load(folder)[1, 0]) == "S    o    o    o    ooooG"


# ---------------------------------------------------------------------------------------------
# Sources


def test_generated_dataset_on_disk(tmp_path, capsys):
    folder = build(sudoku, tmp_path / "d", *SMALL[:2], "--num-train", 6, "--num-test", 4, "--num-aug", 7)
    assert load(folder).shape == (2, 48, 36) and load(folder, "test").shape == (2, 4, 36)
    meta = json.loads((folder / "train/dataset.json").read_text())
    assert (meta["vocab_size"], meta["seq_len"], meta["total_groups"], meta["total_puzzles"]) == (8, 36, 6, 6)
    build(maze, tmp_path / "m", *"--source generate --size 6 --num-train 9 --num-test 9".split())
    questions, answers = np.concatenate([load(tmp_path / "m"), load(tmp_path / "m", "test")], axis=1)
    share, steps = (questions == maze.WALL).mean(), np.median((answers == maze.PATH).sum(1) + 1)
    line = f"mean wall share {share:.3f}, median path length {steps:.0f} steps"
    assert line in capsys.readouterr().out


def test_sources(source, tmp_path, monkeypatch):
    """A single file is split, a rating limit drops rows, the hub's files are read like local ones."""
    one = source / "sudoku/train.csv"
    folder = build(sudoku, tmp_path / "d", "--source", one, "--num-test", 12)
    pairs = np.concatenate([load(folder), load(folder, "test")], axis=1).swapaxes(0, 1)
    assert load(folder).shape == (2, 38, 81) and load(folder, "test").shape == (2, 12, 81)
    assert len(np.unique(pairs.reshape(50, -1), axis=0)) == 50
    folder = build(sudoku, tmp_path / "e", "--source", source / "sudoku", "--min-difficulty", 15)
    assert load(folder).shape[1] == 35 and load(folder, "test").shape[1] == 5

    def download(repo, repo_type, allow_patterns):
        assert (repo_type, allow_patterns) == ("dataset", ["train.csv", "test.csv"])
        return str(source / ("maze" if "maze" in repo else "sudoku"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    maze.main([])
    assert load("data/maze-30x30-hard-1k").shape[2] == 900
    maze.main(["--overwrite", "--output-dir", "data/maze-30x30-hard-1k", "--aug"])
    with pytest.raises(UserError, match="--output-dir is required"):
        sudoku.main(["--subsample-size", "20", "--num-aug", "2"])
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["maze-30x30-hard-1k"]


def test_without_network_the_message_names_the_files(tmp_path, monkeypatch, capsys):
    def download(repo, repo_type, allow_patterns):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    err = refused(sudoku, ["--subsample-size", "20"], tmp_path, capsys)
    assert "huggingface.co/datasets/sapientinc/sudoku-extreme; put its train.csv and test.csv into" in err
    assert err.endswith("and pass --source DIR: offline\n")


def pairs_read(builder, content, tmp_path):
    """The boards that a builder reads from a file with this content (bytes), as text."""
    file, characters = tmp_path / "boards.csv", SUDOKU_CHARS if builder is sudoku else MAZE_CHARS
    file.write_bytes(content)
    folder = build(builder, tmp_path / "d", "--source", file, "--num-test", 1)
    read = np.concatenate([load(folder, "train"), load(folder, "test")], axis=1)
    return sorted(tuple("".join(characters[t] for t in board) for board in pair) for pair in zip(*read))


@pytest.mark.parametrize(
    "header, row",
    [
        ("source,question,answer,rating", "gen,{q},{a},{i}"),
        ("quizzes,solutions", "{zeros},{a}"),
        ("answer,rating,question", "{a},{i},{q}"),
        ("id,puzzle,solution,clues,difficulty", "{i},{q},{a},24,2.2"),
        ("Quiz,Solution", "{q},{a}"),
        (" question , answer ", "{q} ,\t{a}  "),
        ('"source","question","answer"', '"a, b","{q}","{a}"'),
        ('"question", "answer"', '"{q}", "{a}"'),
        ("question,note,answer", '{q},"two\nlines",{a}'),
        ("question\tanswer", "{q}\t{a}"),
        ("question;answer;rating", "{q};{a};1,5"),
        ("# a comment\n\nquestion,answer", "{q},{a}\n"),
        # without a header
        ("# a comment", "{q},{a}"),
        ("", "{zeros}\n{a}\n# a comment"),
        ("a,b", "| {q} | {a} |"),
    ],
)
def test_csv_files_of_other_makers(header, row, tmp_path, capsys):
    """From Unix, without a newline at the end, and from Windows, with a byte order mark."""
    pairs = golden_pairs("sudoku/train")[:5]
    text = write_csv(tmp_path / "text", pairs, header, row).read_text()
    for content in (text[:-1].encode(), text.replace("\n", "\r\n").encode("utf-8-sig")):
        assert pairs_read(sudoku, content, tmp_path) == sorted(pairs)
    assert capsys.readouterr().err == ""


def test_boards_drawn_in_nine_lines(tmp_path):
    """Question and answer in turn, with comments and box-drawing signs."""
    pairs, lines = golden_pairs("sudoku/train")[:3], []
    for board in (board for pair in pairs for board in pair):
        lines += ["# puzzle", "┌───────┬───────┬───────┐"]
        for r in range(0, 81, 9):
            lines.append("│ " + " │ ".join(" ".join(board[r + c : r + c + 3]) for c in (0, 3, 6)) + " │")
    assert pairs_read(sudoku, "\n".join(lines).encode(), tmp_path) == sorted(pairs)


@pytest.mark.parametrize(
    "header, row", [("solution\tpuzzle", "{a}\t{q}"), ("question,answer", '"{q}","{a}"')]
)
def test_spaces_at_the_ends_of_mazes_are_cells(header, row, tmp_path):
    pairs = [(" S  G" + " " * 20, " SooG" + " " * 20), ("#" * 20 + "#S G#", "#" * 20 + "#SoG#")]
    text = write_csv(tmp_path / "text", pairs, header, row).read_text()
    assert pairs_read(maze, text.encode(), tmp_path) == sorted(pairs)


def leaks(builder, tmp_path, capsys, *argv):
    capsys.readouterr()
    build(builder, tmp_path / "d", "--source", tmp_path, "--overwrite", *argv)
    return capsys.readouterr().err


def test_leaks_of_sudokus(puzzles, tmp_path, capsys, monkeypatch):
    train, other = puzzles[6]["train"], puzzles[6]["test"]
    symmetric = sudoku.augment(np.random.RandomState(0), train[:, :4], 6, 1)[:, 1::2]
    write_tokens(tmp_path / "train.csv", train)
    write_tokens(tmp_path / "test.csv", np.concatenate([train[:, 5:8], symmetric, other[:, :10]], axis=1))
    message = "warning: 7 of 17 test boards are also in the training split, exactly or up to symmetry\n"
    assert leaks(sudoku, tmp_path, capsys) == message
    monkeypatch.setattr(boards, "MAX_HASHED", 10)  # larger splits are compared exactly
    assert "warning: 3 of 17 test boards" in leaks(sudoku, tmp_path, capsys)
    write_tokens(tmp_path / "test.csv", train)
    assert "warning: 1 of 30 test boards" in leaks(sudoku, tmp_path, capsys, "--subsample-size", 1)
    write_tokens(tmp_path / "test.csv", other)
    assert leaks(sudoku, tmp_path, capsys) == ""


def test_leaks_of_mazes(mazes, tmp_path, capsys):
    train, test = load(mazes), load(mazes, "test")
    rotated = prepare.dihedral(train[:, :3].reshape(2, 3, 11, 11), 1).reshape(2, 3, 121)
    write_tokens(tmp_path / "train.csv", train, MAZE_CHARS)
    write_tokens(tmp_path / "test.csv", np.concatenate([test, train[:, 7:9], rotated], axis=1), MAZE_CHARS)
    assert "5 of 55 test boards are also in the training split" in leaks(maze, tmp_path, capsys)


# ---------------------------------------------------------------------------------------------
# Refusals: one line, exit code 2, nothing left behind

(Q, A), (Q2, A2) = golden_pairs("sudoku/train")[:2]
MQ, MA = golden_pairs("maze/train")[0]
WRONG = "contradicts its question or breaks the rules"


@pytest.mark.parametrize(
    "builder, rows, message",
    [
        (sudoku, [(Q, A), (Q[:-1], A2)], "train.csv row 2: 80 and 81 cells, not 81 each"),
        (sudoku, [(Q, A), (Q2, A2 + "1")], "row 2: 81 and 82 cells, not 81 each"),
        (sudoku, [(Q, A), ("x" + Q2[1:], A2)], "row 2: 80 and 81 cells, not 81 each"),
        (sudoku, [(Q[:7], A[:7])], "found no boards"),
        (sudoku, [(Q, A), (Q2, A)], f"train.csv: the answer of board 2 {WRONG}"),
        (sudoku, [(Q, A), ("." * 81, A2.replace("1", "2"))], f"board 2 {WRONG}"),
        (sudoku, [("." * 36, "123456" * 6)], f"board 1 {WRONG}"),
        (sudoku, [(Q, '"' + "1" * 200_000)], "train.csv: field larger than field limit (131072)"),
        (sudoku, [], "train.csv: found no boards; the first line must name the columns answer, question, or"),
        (maze, [(MQ, MA), (MQ[:-1], MA)], "row 2: 899 and 900 cells, not 900 each"),
        (maze, [(MQ[:899], MA[:899])], "found no boards"),
        (maze, [(MQ, MA.replace("o", " ", 1))], f"board 1 {WRONG}"),
        (maze, [(MQ.replace("#", " ", 1), MA)], f"board 1 {WRONG}"),
        (maze, [(MQ.replace("S", " "), MA.replace("S", "o"))], f"board 1 {WRONG}"),
    ],
)
def test_bad_rows(builder, rows, message, tmp_path, capsys):
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "test.csv", [(Q, A) if builder is sudoku else (MQ, MA)])
    assert message in refused(builder, ["--source", tmp_path], tmp_path, capsys)


@pytest.mark.parametrize(
    "text, message",
    [
        ("question,rating\n{q},1\n", "columns answer, question, or questions and answers of 81 cells must"),
        ("{q}\n", "must alternate"),
        ("{q}\n{q}\n", WRONG),
        ("Grid 01\n{q}\n{a}\n", "must alternate"),
        ("<html><body>404</body></html>\n", "must alternate"),
        ("", "found no boards"),
        ("question,note,answer\n{q},'a\nb',{a}\n", "row 1: 81 and 0 cells"),
        ("answer,question\n{q},{a}\n", WRONG),
    ],
)
def test_bad_files(text, message, tmp_path, capsys):
    (tmp_path / "boards.csv").write_text(text.format(q=Q, a=A))
    assert message in refused(
        sudoku, ["--source", tmp_path / "boards.csv", "--num-test", 1], tmp_path, capsys
    )


@pytest.mark.parametrize(
    "builder, flags, message",
    [
        (sudoku, "--source {}/none", "none/train.csv: No such file or directory"),
        (sudoku, "--source {} --subsample-size 3", "--subsample-size 3 is more than the 2 training boards"),
        (sudoku, "--source {} --min-difficulty 9", "train.csv: found no boards"),
        (sudoku, "--source {}/rated.csv --min-difficulty 9", "could not convert string to float: 'hard'"),
        (sudoku, "--source {}/bare.csv --min-difficulty 9", "the columns answer, question, rating, or"),
        (sudoku, "--source {}/train.csv --num-test 2", "--num-test 2 leaves none of the file's 2 boards"),
        (sudoku, "--source {}/mixed", "contain boards of different sizes"),
        (sudoku, "--source generate --num-aug -1", "--num-aug: -1 is out of range"),
        (sudoku, "--source generate --seed 4294967296", "--seed: 4294967296 is out of range"),
        (sudoku, "--source generate --size 4 --num-train 60 --num-test 1", "too few different boards"),
        (maze, "--source generate --size 4", "--size: 4 is out of range"),
        (maze, "--source generate --size 5 --min-path 30", "found no maze of --size 5 with --min-path 30"),
    ],
)
def test_bad_flags(builder, flags, message, tmp_path, capsys):
    write_csv(tmp_path / "train.csv", [(Q, A), (Q2, A2)])
    write_csv(tmp_path / "test.csv", [(Q, A)])
    (tmp_path / "rated.csv").write_text(f"question,answer,rating\n{Q},{A},hard\n")
    (tmp_path / "bare.csv").write_text(f"question,answer\n{Q},{A}\n{Q2},{A2}\n")
    write_csv(tmp_path / "mixed/train.csv", [(Q, A)])
    write_csv(tmp_path / "mixed/test.csv", [("1" + "." * 15, "1234341221434321")])
    assert message in refused(builder, flags.format(tmp_path).split(), tmp_path, capsys)


# ---------------------------------------------------------------------------------------------
# The writer: a build replaces nothing until it is complete


@pytest.fixture
def old(tmp_path, capsys):
    """A folder with a dataset in out/, beside which a user keeps notes."""
    build(sudoku, tmp_path / "out", *SMALL)
    (tmp_path / "out/notes.txt").write_text("precious")
    capsys.readouterr()
    return tmp_path


def test_only_the_same_recipe_replaces_a_dataset(old, capsys):
    before = contents(old)
    build(sudoku, old / "out", *SMALL)
    assert contents(old) == before
    err = refused(sudoku, [*SMALL, "--seed", "1"], old, capsys)
    assert "out contains a dataset with another recipe; pass --overwrite to replace it, or" in err
    (old / "out/test_puzzles.json").write_text("{}")  # as if an ARC dataset were replaced
    build(sudoku, old / "out", *SMALL, "--seed", "1", "--overwrite")
    after = contents(old)
    assert after.keys() == before.keys() and after[old / "out/notes.txt"] == b"precious"
    assert after[old / "out/train/all__inputs.npy"] != before[old / "out/train/all__inputs.npy"]


@pytest.mark.parametrize("recipe", ["null", '{"builder": "sudoku", "size": 4}', None])
def test_a_dataset_of_unknown_origin_is_not_replaced(recipe, old, capsys):
    path = old / "out/recipe.json"
    path.write_text(recipe) if recipe else path.unlink()
    assert "another recipe" in refused(sudoku, SMALL, old, capsys)
    arrays = (np.ones((2, 4), np.uint8), np.ones((2, 4), np.uint8))
    with pytest.raises(UserError, match="another recipe"):
        prepare.write_dataset(old / "out", {"train": arrays, "test": arrays}, vocab_size=2)


def test_other_folders_and_files_are_not_replaced(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    assert "contains other files, but no dataset" in refused(
        sudoku, [*SMALL, "--overwrite"], tmp_path, capsys
    )
    assert "Not a directory" in refused(sudoku, SMALL, tmp_path, capsys, out="out/thesis.txt")


def test_links_are_followed(tmp_path):
    """To an empty folder on another disk, and to a folder that does not exist yet."""
    (tmp_path / "disk/empty").mkdir(parents=True)
    for name in ("empty", "new"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        for seed in ("1", "2"):
            build(sudoku, tmp_path / name, *SMALL, "--seed", seed, "--overwrite")
        assert (tmp_path / name).is_symlink() and load(tmp_path / "disk" / name).shape == (2, 6, 16)
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["empty", "new"]
    assert not list(tmp_path.rglob(".building-*"))


MOUNT = """mount -t tmpfs none vol && mkdir vol/lost+found && cp -r out/. vol/ &&
{} prepare/sudoku.py {} --seed 1 --output-dir {}/vol --overwrite && ls vol && cp vol/recipe.json ."""


def test_mount_points_are_exchanged_in_place(old):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    (old / "vol").mkdir()
    (old / "prepare").symlink_to(ROOT / "prepare")
    script = MOUNT.format(sys.executable, " ".join(SMALL), old)
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, cwd=old)
    assert done.returncode == 0, done.stderr
    for name in ("identifiers.json", "lost+found", "notes.txt", "recipe.json", "test", "train"):
        assert f"\n{name}\n" in done.stdout, done.stdout
    assert "--seed 1" in (old / "recipe.json").read_text()


def test_full_disk(old, capsys):
    """A limit of the file size acts as a full disk."""
    argv = [*SMALL, "--num-aug", "5000", "--overwrite"]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        assert f"error: cannot write {old / 'out'}: " in refused(sudoku, argv, old, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("n_moves", range(6))
def test_interrupted_exchange_is_undone(n_moves, after, tmp_path, monkeypatch):
    """Interrupted before or right after one of the five moves; the sixth does not exist."""
    for name in ("new/identifiers.json", "new/train/x", "new/test/x", "d/identifiers.json", "d/train/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "old").mkdir()
    before, replace, calls = contents(tmp_path), os.replace, []

    def interrupt(*args):
        calls.append(args)
        stop = len(calls) == n_moves + 1
        if after or not stop:
            replace(*args)
        if stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare.os, "replace", interrupt)
    folders = [tmp_path / name for name in ("new", "d", "old")]
    if n_moves < 5:
        with pytest.raises(KeyboardInterrupt):
            prepare.exchange(*folders)
        assert contents(tmp_path) == before
    else:
        prepare.exchange(*folders)
        assert (tmp_path / "d/test/x").exists() and (tmp_path / "old/train/x").read_text() == "d/train/x"


def test_terminated_build_leaves_nothing(tmp_path):
    argv = ["--source", "generate", "--size", "9", "--num-train", "100000", "--output-dir", tmp_path / "a/b"]
    process = subprocess.Popen([sys.executable, ROOT / "prepare/sudoku.py", *argv], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("a/.building-*")) and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    assert list(tmp_path.iterdir()) == []


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(sudoku, tmp_path / "a/b", *SMALL)
    assert not list(tmp_path.iterdir())


def test_write_dataset_groups_copies_with_their_original(tmp_path):
    boards = np.arange(24, dtype=np.uint8).reshape(6, 4)

    def augment(rng, inputs, labels):
        offset = rng.integers(100, 200)
        return inputs + offset, labels + offset

    splits = {"train": (boards, boards), "test": (boards, boards)}
    prepare.write_dataset(tmp_path / "d", splits, 256, augment=augment, num_aug=3)
    inputs, labels = load(tmp_path / "d")
    assert np.array_equal(inputs, labels) and np.array_equal(inputs[::4], boards)
    for copy in range(4):
        offset = inputs[copy::4].astype(int) - boards
        assert (offset == offset[0, 0]).all() and (copy == 0) == (offset[0, 0] == 0)
    groups = np.load(tmp_path / "d/train/all__group_indices.npy")
    assert groups.tolist() == [0, 4, 8, 12, 16, 20, 24] and groups.dtype == np.int32
    with pytest.raises(UserError, match="6 train examples do not make groups of 4"):
        prepare.write_dataset(tmp_path / "e", splits, 256, group_size=4)
    assert not (tmp_path / "e").exists()


# ---------------------------------------------------------------------------------------------
# The known datasets


def test_known_folders_are_the_default(monkeypatch):
    """The README's commands write to the folders that the presets read."""
    modules = {"sudoku": sudoku, "maze": maze, "arc": __import__("prepare.arc").arc}
    for dataset in prepare.KNOWN.values():
        argv = list(dataset.flags)
        args = modules[dataset.builder].flags().parse_args(argv)
        recipe = prepare.recipe_of(dataset.builder, argv)
        assert prepare.output_dir(args, recipe) == dataset.folder
        argv += ["--overwrite", "--output-dir", "x"]
        assert prepare.recipe_of(dataset.builder, argv) == recipe
        args = modules[dataset.builder].flags().parse_args(argv)
        assert prepare.output_dir(args, recipe) == "x"
        assert prepare.known_dataset(Path("elsewhere", Path(dataset.folder).name)) == dataset
    assert prepare.known_dataset("data/mine") is None


def test_missing_folder_is_refused_with_the_command_that_builds_it(tmp_path):
    command = "python prepare/sudoku.py --subsample-size 1000 --num-aug 1000"
    folder = tmp_path / "sudoku-extreme-1k-aug-1000"
    with pytest.raises(UserError, match=f"^{folder} not found; build it: {command} --output-dir {folder}$"):
        prepare.check_exists([tmp_path, folder])
    recipes = [{"builder": "maze", "command": "python prepare/maze.py --aug"}]
    with pytest.raises(
        UserError, match="x not found; build it: python prepare/maze.py --aug --output-dir x$"
    ):
        prepare.check_exists(["x"], recipes)
    with pytest.raises(UserError, match="^x not found; pass another folder, or build one with"):
        prepare.check_exists(["x"], [{"builder": "maze", "size": 9}])  # a recipe of 3244f72
    assert prepare.task_of(recipes) == "maze" and prepare.task_of([]) is None
    assert prepare.task_of([*recipes, {"builder": "arc"}]) is prepare.task_of([None]) is None


def test_build_if_missing(tmp_path, monkeypatch, capsys):
    dataset = prepare.Dataset("data/small", "sudoku", tuple(SMALL), {})
    monkeypatch.setattr(prepare, "KNOWN", {"small": dataset})
    assert dataset.generated and not prepare.Dataset("x", "maze", (), {}).generated
    (tmp_path / "small").mkdir()  # an empty folder, or mount point, is no dataset
    for n_builds in (1, 0):
        prepare.build_if_missing(tmp_path / "small")
        assert capsys.readouterr().out.count("+ python prepare/sudoku.py --source generate") == n_builds
    assert load(tmp_path / "small").shape == (2, 6, 16)
