"""Shared by sudoku.py and maze.py: flags, generating boards, reading files, leaks between the splits."""

import csv
import sys
from collections.abc import Callable
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

import prepare
from tools.common import Parser, UserError, bounded, progress, require, user_error

MAX_HASHED = 50_000  # boards whose symmetric forms are compared, which takes 30 us per board


class BoardTask(NamedTuple):
    """What differs between Sudokus and mazes. A board is S = size * size tokens."""

    repo: str  # the published boards on the Hugging Face hub
    published_size: int
    sizes: tuple
    alphabet: dict  # {character: token} in text files
    is_valid: Callable  # (questions (..., S), answers (..., S), size) -> (...) bool
    symmetry_hash: Callable  # the same arguments -> (...) ints that are equal for symmetric boards


def common_flags(description, task):
    """A parser with the flags of both builders."""
    parser = Parser(description)
    add = parser.add_argument
    count = bounded(int, 1, 10**7)
    sources = f"hf ({task.repo}), generate, a folder with train.csv and test.csv, or one file"
    add("--source", default="hf", help=sources)
    add("--num-train", type=count, default=1000, metavar="N", help="training boards to generate")
    add(
        "--num-test",
        type=count,
        default=1000,
        metavar="N",
        help="test boards to generate, or to split off a file",
    )
    add("--subsample-size", type=count, metavar="N", help="train on N random boards instead of all")
    add("--min-difficulty", type=int, metavar="R", help="keep only boards with a rating of R or more")
    add("--seed", type=bounded(int, 0, 2**32 - 1), default=0, metavar="N", help="seed of all random draws")
    prepare.add_output_flags(add)
    return parser


def generate(make, num_train, num_test):
    """Generate different boards: [training, test], each (2, N, S).

    make() returns a question, an answer and their symmetry hash. The hash alone selects the split, so no test
    board is symmetric to a training board. Raises UserError if make() repeats itself too often."""
    total = num_train + num_test
    wanted = (num_train, num_test)
    found = ({}, {})
    with progress(total=total, desc="generating", unit=" boards") as bar:
        for _ in range(20 * total + 1000):
            question, answer, symmetry_hash = make()
            split = int(symmetry_hash % total >= num_train)
            boards = found[split]
            key = question.tobytes()
            if len(boards) < wanted[split] and key not in boards:
                boards[key] = question, answer
                bar.update()
            if len(found[0]) + len(found[1]) == total:
                return [np.array(list(boards.values())).swapaxes(0, 1) for boards in found]
    raise UserError(f"too few different boards for --num-train {num_train} --num-test {num_test}; lower them")


# ---------------------------------------------------------------------------------------------
# Reading

ALIASES = {
    "puzzle": "question",
    "puzzles": "question",
    "questions": "question",
    "quiz": "question",
    "quizzes": "question",
    "answers": "answer",
    "solution": "answer",
    "solutions": "answer",
    "difficulty": "rating",
}


def read_boards(path, task, min_difficulty=None):
    """Questions and answers as tokens (2, N, S) uint8 from a text file.

    A CSV file has a header with the columns question and answer. Without a header, the file is a sequence of
    boards of the published size, each question followed by its answer. Characters that cannot be cells are
    ignored. Raises UserError."""
    table = bytes(task.alphabet.get(chr(i), 0) for i in range(256))
    not_cells = bytes(i for i in range(256) if not table[i])

    def to_tokens(text):
        return text.encode("latin-1", "replace").translate(table, not_cells)

    columns = {"question", "answer"} if min_difficulty is None else {"question", "answer", "rating"}
    tokens = bytearray()
    S = 0
    with user_error(path, OSError, ValueError, csv.Error):
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as f:
            header = next((line for line in f if line.strip() and not line.startswith("#")), "")
            delimiter = max(",;\t|", key=header.count)
            fields = [field.strip(' "\r\n').lower() for field in header.split(delimiter)]
            names = [ALIASES.get(field, field) for field in fields]
            if columns <= set(names):
                rows = csv.DictReader(f, names, restval="", delimiter=delimiter)
                rows = progress(rows, desc=f"reading {path.name}", unit=" rows")
                for number, row in enumerate(rows, 1):
                    if min_difficulty is not None and float(row["rating"]) < min_difficulty:
                        continue
                    question = to_tokens(row["question"])
                    answer = to_tokens(row["answer"])
                    S = S or len(question)
                    found = f"{len(question)} and {len(answer)} cells"
                    require(len(question) == len(answer) == S, f"{path} row {number}: {found}, not {S} each")
                    tokens += question + answer
            elif min_difficulty is None:
                f.seek(0)
                for line in f:
                    if "#" in task.alphabet or not line.startswith("#"):  # in a Sudoku file, a comment
                        tokens += to_tokens(line)
                S = task.published_size**2
    known_size = S in [size * size for size in task.sizes]
    require(
        known_size and len(tokens) > 0 and len(tokens) % (2 * S) == 0,
        f"{path}: found no boards; the first line must name the columns {', '.join(sorted(columns))}, "
        f"or questions and answers of {task.published_size**2} cells must alternate",
    )
    boards = np.frombuffer(tokens, np.uint8).reshape(-1, 2, S).swapaxes(0, 1)
    for start in range(0, boards.shape[1], 20_000):  # all at once would take 10 times the memory
        part = boards[:, start : start + 20_000]
        valid = task.is_valid(*part, isqrt(S))
        wrong = start + valid.argmin() + 1
        require(
            valid.all(), f"{path}: the answer of board {wrong} contradicts its question or breaks the rules"
        )
    return boards


def read_source(args, task):
    """Boards (2, N, S) of train.csv and test.csv, or of the one file that --source names."""
    folder = args.source
    names = ["train.csv", "test.csv"]
    if Path(folder).is_file():
        return [read_boards(Path(folder), task, args.min_difficulty)]
    if folder == "hf":
        import huggingface_hub

        url = f"https://huggingface.co/datasets/{task.repo}"
        hint = (
            f"cannot download {url}; put its train.csv and test.csv into a folder DIR and pass --source DIR"
        )
        with user_error(hint, Exception):  # its client raises errors of several libraries
            folder = huggingface_hub.snapshot_download(task.repo, repo_type="dataset", allow_patterns=names)
    return [read_boards(Path(folder, name), task, args.min_difficulty) for name in names]


def train_test_split(boards, n_test, rng):
    """[training, test] boards, n_test of them drawn from (2, N, S) for testing, in their order."""
    total = boards.shape[1]
    require(n_test < total, f"--num-test {n_test} leaves none of the file's {total} boards; lower it")
    order = rng.permutation(total)
    return [boards[:, np.sort(order[n_test:])], boards[:, np.sort(order[:n_test])]]


# ---------------------------------------------------------------------------------------------
# Both


def warn_of_leaks(train, test, task):
    """Print how many test boards are also training boards. train, test: (2, N, S)."""
    if train.shape[1] + test.shape[1] <= MAX_HASHED:
        size = isqrt(test.shape[2])
        trained = task.symmetry_hash(*train, size)
        tested = task.symmetry_hash(*test, size)
    else:
        trained = map(bytes, train[0])
        tested = map(bytes, test[0])
    trained = set(trained)
    leaked = sum(board in trained for board in tested)
    if leaked:
        message = f"warning: {leaked} of {test.shape[1]} test boards are also in the training split"
        print(f"{message}, exactly or up to symmetry", file=sys.stderr)


def load(args, task, make, rng):
    """Training and test boards (2, N, S) for the flags. make: see generate. Raises UserError."""
    if args.source == "generate":
        train, test = generate(make, args.num_train, args.num_test)
    else:
        splits = read_source(args, task)
        train, test = splits if len(splits) == 2 else train_test_split(*splits, args.num_test, rng)
        same_size = train.shape[2] == test.shape[2]
        require(same_size, f"{args.source}: train.csv and test.csv contain boards of different sizes")
    total = train.shape[1]
    n = args.subsample_size or total
    require(n <= total, f"--subsample-size {n} is more than the {total} training boards; lower it")
    if n < total:
        train = train[:, rng.choice(total, n, replace=False)]
    warn_of_leaks(train, test, task)
    return train, test
