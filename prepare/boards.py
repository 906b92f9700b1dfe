"""What sudoku.py and maze.py share: flags, generating boards, reading CSV files, overlap of the splits."""
import csv
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import Parser, UserError, one_line, progress, sha256, within
from prepare import command, recipe_flags

FEW = 50_000        # boards whose symmetric forms are compared, too, which takes some 30 us each


class Game(NamedTuple):
    """What tells Sudokus from mazes in here."""
    builder: str            # prepare/BUILDER.py
    repo: str               # of the published boards on the hub
    published: str          # their name in that of the default folder
    alphabet: dict          # {character: token} in CSV files
    sizes: Iterable         # rows = columns that a board may have
    right: Callable         # (questions (N, S), answers (N, S), size) -> (N,) bool
    kinship: Callable       # the same -> N integers, equal for the symmetric forms of a board


# ---------------------------------------------------------------------------------------------
# Flags

def flags(description, game):
    """A parser with the flags that both builders have."""
    parser = Parser(description)
    add = parser.add_argument
    add("--source", default="hf",
        help=f"hf ({game.repo}), generate, a folder of train.csv and test.csv, or FILE.csv")
    add("--num-train", type=within(int, 1, 10 ** 7), default=1000, metavar="N", help="generate N")
    add("--num-test", type=within(int, 1, 10 ** 7), default=1000, metavar="N",
        help="generate N, or hold out N of FILE.csv")
    add("--subsample-size", type=within(int, 1), metavar="N", help="N random training boards; without, all")
    add("--min-difficulty", type=int, metavar="R", help="only rows of rating R or more; without, all")
    add("--seed", type=within(int, 0, 2 ** 32 - 1), default=0, metavar="N", help="of every draw")
    add("--output-dir", metavar="DIR", help=f"without, data/{game.builder}-{game.published} or the like")
    return parser


def source_name(args, game):
    """The source in the name of the default folder."""
    short = {"hf": game.published, "generate": f"{args.size}x{args.size}"}
    return short.get(args.source) or Path(args.source).absolute().stem


# ---------------------------------------------------------------------------------------------
# Generating

def generate(make, num_train, num_test):
    """Call make() -> question, answer, kinship for different boards: [training, test], each (2, N, S).

    Kinship alone decides which of the two a board belongs to, so that no symmetry maps a test board onto a
    training board. Raises UserError when too few different boards turn up.
    """
    total, wanted, found = num_train + num_test, (num_train, num_test), ({}, {})
    with progress(total=total, desc="generating", unit=" boards") as bar:
        for _ in range(20 * total + 1000):
            question, answer, kin = make()
            split = int(kin % total >= num_train)
            boards, key = found[split], question.tobytes()
            if len(boards) < wanted[split] and key not in boards:
                boards[key] = question, answer
                bar.update()
            if sum(map(len, found)) == total:
                return [np.array(list(boards.values())).swapaxes(0, 1) for boards in found]
    raise UserError(f"--num-train {num_train} and --num-test {num_test}: {sum(map(len, found))} different "
                    f"boards in {20 * total + 1000} tries; ask for fewer or for a larger --size")


# ---------------------------------------------------------------------------------------------
# CSV files

SAME = {"questions": "question", "puzzle": "question", "puzzles": "question", "quiz": "question",
        "quizzes": "question", "answers": "answer", "solution": "answer", "solutions": "answer",
        "ratings": "rating", "difficulty": "rating"}


def tokens_of(question, answer, lengths, table):
    """Tokens (2 * S bytes) of two cells of a CSV. Raises ValueError unless both have S of `lengths`."""
    # a space at an end of a maze is a free cell, unless it is one too many
    boards = [cell if len(cell) in lengths else cell.strip() for cell in (question, answer)]
    S, other = map(len, boards)
    if S != other or S not in lengths:
        some = ", ".join(map(str, sorted(lengths)[:3]))
        raise ValueError(f"boards of {S} and {other} characters; need {some}{' ..' * (len(lengths) > 3)}")
    text = "".join(boards)
    tokens = text.encode("latin-1", "replace").translate(table)
    if 0 in tokens:
        raise ValueError(f"character {text[tokens.index(0)]!r} stands for nothing")
    return tokens


def csv_rows(f, game, lengths, min_difficulty):
    """Yield line and tokens (2 * S bytes, question and answer) of the rows of an open file that are difficult
    enough. lengths: numbers of cells that a board may have. Raises UserError."""
    first = next((line for line in f if line.strip()), "")
    f.seek(0)
    skip = " " not in game.alphabet         # as a free cell of a maze is
    reader = csv.reader(f, delimiter=max(",;\t", key=first.count), skipinitialspace=skip)
    rows = (row for row in reader if "".join(row).strip())
    names = [name.strip().lower() for name in next(rows, [])]
    names = [SAME.get(name, name) for name in names]
    needed = ["question", "answer"] if min_difficulty is None else ["question", "answer", "rating"]
    if not set(needed) <= set(names):
        raise UserError(f"{f.name}: {first.strip()[:60]!r} does not name the columns {', '.join(needed)}; "
                        f"begin the file with a line that does (puzzle, solution, difficulty will do)")
    question, answer, *rating = map(names.index, needed)
    table = bytes(game.alphabet.get(chr(i), 0) for i in range(256))
    for row in rows:
        try:
            if len(row) != len(names):
                raise ValueError(f"{len(row)} columns; need {len(names)}, as in the first line")
            tokens = tokens_of(row[question], row[answer], lengths, table)
            easy = rating and float(row[rating[0]]) < min_difficulty
        except ValueError as e:
            raise bad_row(f.name, reader.line_num, e)
        lengths = {len(tokens) // 2}        # the first row decides for all
        if not easy:
            yield reader.line_num, tokens


def bad_row(path, line, what):
    return UserError(f"{path} line {line}: {what}; correct or remove the row")


def read_csv(path, game, lengths, min_difficulty):
    """Questions and answers as tokens (2, N, S) uint8. Raises UserError, with the line."""
    parts = []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as f:
        rows = iter(progress(csv_rows(f, game, lengths, min_difficulty), desc="reading", unit=" rows"))
        while chunk := list(islice(rows, 20_000)):      # checking all at once would take 10 times the memory
            lines, tokens = zip(*chunk)
            boards = np.frombuffer(b"".join(tokens), np.uint8).reshape(len(lines), 2, -1).swapaxes(0, 1)
            right = game.right(*boards, isqrt(boards.shape[2]))
            if not right.all():
                wrong = lines[right.argmin()]
                raise bad_row(path, wrong, "the answer contradicts the question or breaks the rules")
            parts.append(boards)
    if not parts:
        limit = "" if min_difficulty is None else f" of --min-difficulty {min_difficulty} or more"
        raise UserError(f"{path} has no boards{limit}; name another file or a lower limit")
    return np.concatenate(parts, axis=1)


def read_source(args, game):
    """Paths and boards (2, N, S) of train.csv and test.csv, or of one file to divide. Raises UserError."""
    source, names = args.source, ["train.csv", "test.csv"]
    lengths, read = {size * size for size in game.sizes}, []
    try:
        if source == "hf":
            import huggingface_hub  # only here, so that nothing else needs it
            source = huggingface_hub.snapshot_download(game.repo, repo_type="dataset", allow_patterns=names)
        one_file = source.endswith(".csv") or Path(source).is_file()
        paths = [Path(source)] if one_file else [Path(source, name) for name in names]
        for path in paths:
            read.append(read_csv(path, game, lengths, args.min_difficulty))
            lengths = {read[0].shape[2]}        # the first file decides for the second
    except (OSError, csv.Error) as e:
        own = {**vars(args), "builder": game.builder, "name": "", "source": "DIR", "output_dir": None}
        raise UserError(f"--source {args.source} cannot be read ({one_line(e)}); put train.csv and test.csv, "
                        f"as in https://huggingface.co/datasets/{game.repo}, into a folder DIR, then: "
                        f"{command(*recipe_flags(own), args.output_dir)}")
    return paths, read


def hold_out(boards, n, rng):
    """[the others, n boards drawn from (2, N, S)], both in their order. Raises UserError."""
    total = boards.shape[1]
    if total <= n:
        raise UserError(f"the file has {total} boards, all of them for --num-test {n}; lower it")
    order = rng.permutation(total)
    return [boards[:, np.sort(order[n:])], boards[:, np.sort(order[:n])]]


# ---------------------------------------------------------------------------------------------
# Both

def warn_of_leaks(train, test, game):
    """Say how many test boards are trained on, as they are or in another form. train, test: (2, N, S)."""
    def shared(form):
        trained = set(form(*train, isqrt(train.shape[2])))
        return sum(board in trained for board in form(*test, isqrt(test.shape[2])))

    exact = kin = shared(lambda questions, answers, size: map(np.ndarray.tobytes, questions))
    if train.shape[1] + test.shape[1] <= FEW:
        kin = shared(game.kinship)
    if kin:
        print(f"warning: {kin} of {test.shape[1]} test boards also stand in the training split ({exact} as "
              f"they are, else turned, mirrored or renamed): their score is memory", file=sys.stderr)


def load(args, game, make, rng):
    """Training and test boards (2, N, S) that the flags ask for, and recipe.json. Raises UserError.

    make() -> question, answer, kinship of a random board; both it and this draw from rng."""
    paths = []
    if args.source != "generate":
        _, typed = recipe_flags({**vars(args), "builder": game.builder, "name": ""})
        for flag in {"--num-train", "--size", "--min-path", "--loops"}.intersection(typed):
            raise UserError(f"{flag} does nothing without --source generate; leave it out, or generate")
        paths, read = read_source(args, game)
        train, test = read if len(read) == 2 else hold_out(read[0], args.num_test, rng)
    elif args.min_difficulty is None:
        train, test = generate(make, args.num_train, args.num_test)
    else:
        raise UserError(f"--min-difficulty {args.min_difficulty} needs ratings, which generate has none of")
    total = train.shape[1]
    n = args.subsample_size or total
    if n > total:
        raise UserError(f"--subsample-size {n} is more than the {total} training boards; lower it")
    if n < total:
        train = train[:, rng.choice(total, n, replace=False)]
    warn_of_leaks(train, test, game)
    # what identifies the data: every flag as typed but where they are written, and the bytes of the files
    recipe = {"builder": game.builder, **vars(args), "name": source_name(args, game),
              "files": {path.name: sha256(path) for path in paths}}
    del recipe["output_dir"]
    if paths and args.source != "hf":
        recipe["source"] = str(Path(args.source).resolve())     # to build it again from any directory
    return train, test, recipe
