"""What sudoku.py and maze.py share: generating boards, reading CSV files, splits, overlap, flags."""
import codecs
import csv
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, progress, sha256, within
from prepare import command, recipe_flags


def generate(make, num_train, num_test):
    """Call make() -> question, answer, kinship for different boards: {"train": (2, N, S), "test": ...}.

    Kinship alone decides which split a board belongs to, so that no symmetry maps a test board onto a
    training board. Raises UserError when too few different boards turn up.
    """
    want, splits, seen = {"train": num_train, "test": num_test}, {"train": [], "test": []}, set()
    total = num_train + num_test
    with progress(total=total, desc="generating", unit=" boards") as bar:
        for _ in range(20 * total + 1000):
            question, answer, kin = make()
            split = "train" if kin % total < num_train else "test"
            if len(splits[split]) < want[split] and question.tobytes() not in seen:
                seen.add(question.tobytes())
                splits[split].append((question, answer))
                bar.update()
            if len(seen) == total:
                return {split: np.array(pairs).swapaxes(0, 1) for split, pairs in splits.items()}
    raise UserError(f"--num-train {num_train} and --num-test {num_test}: only {len(seen)} different boards "
                    f"were found in {20 * total + 1000} tries; ask for fewer or for a larger --size")


# ---------------------------------------------------------------------------------------------
# CSV files

QUESTION = "question", "questions", "puzzle", "puzzles", "quiz", "quizzes"
ANSWER = "answer", "answers", "solution", "solutions"
RATING = "rating", "ratings", "difficulty"
PUBLISHED = ["source", "question", "answer", "rating"]
UTF8_MARK = codecs.BOM_UTF8.decode("latin-1")
ROWS = 20_000       # that are turned into tokens at once


class Language(NamedTuple):
    """How boards are written in a CSV, and which of them are right."""
    alphabet: dict          # {character: token}
    lengths: list           # numbers of cells that a board may have
    right: Callable         # (questions (N, S), answers (N, S)) -> (N,) bool


def encoding_of(path):
    """latin-1 takes any byte, and only ASCII matters here; UTF-16, as Windows may write it, needs its own."""
    with open(path, "rb") as f:
        return "utf-16" if f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"


class BoardFile:
    """A CSV file of boards of one size.

    The first line names the columns, in any order and among others; without names it must be a board itself.
    Commas, semicolons or tabs stand between columns. Empty lines and spaces around a board do not matter.
    """

    def __init__(self, path, language, min_difficulty=None):
        self.path, self.language, self.min_difficulty = path, language, min_difficulty
        self.names = None                                       # of the columns, once the first line is read
        self.question = self.answer = self.rating = None        # numbers of columns
        self.S = None                                           # cells of a board

    def bad(self, line, what):
        return UserError(f"{self.path} line {line}: {what}")

    def read(self):
        """Questions and answers as tokens (2, N, S) uint8. Raises csv.Error and UserError, with the line."""
        parts, encoding = [], encoding_of(self.path)
        with (open(self.path, newline="", encoding=encoding, errors="replace") as f,
              progress(desc="reading", unit=" rows") as bar):
            rows = self.rows(f)
            while chunk := list(islice(rows, ROWS)):
                parts.append(self.tokens(*zip(*chunk)))
                bar.update(len(chunk))
        if not parts:
            raise UserError(f"{self.path} has no rows " + (
                f"with a rating of {self.min_difficulty} or more; lower --min-difficulty" if self.S else
                "below its header; fetch it again"))
        return np.concatenate(parts, axis=1)

    def rows(self, f):
        """Yield (line, question, answer) of the boards of an open file that are difficult enough."""
        start = len(UTF8_MARK) if f.read(len(UTF8_MARK)) == UTF8_MARK else 0
        f.seek(start)
        first = next((line for line in f if line.strip()), "")
        f.seek(start)
        skip = " " not in self.language.alphabet        # a maze may begin with a free cell, which is a space
        reader = csv.reader(f, delimiter=max(",;\t", key=first.count), skipinitialspace=skip)
        for row in reader:
            if not "".join(row).strip():
                continue
            if self.names is None and self.is_header(reader.line_num, row):
                continue
            if len(row) != len(self.names) or not len(row[self.question]) == len(row[self.answer]) == self.S:
                row = self.tidy(reader.line_num, row)
            if self.min_difficulty is None or self.difficulty(reader.line_num, row) >= self.min_difficulty:
                yield reader.line_num, row[self.question], row[self.answer]

    def is_header(self, line, row):
        """Find the columns by the first row: by its names, or, when it is a board itself, by its contents."""
        names = [name.strip().lower() for name in row]
        self.question, self.answer, self.rating = (
            next((names.index(n) for n in kind if n in names), None) for kind in (QUESTION, ANSWER, RATING))
        named = self.question is not None and self.answer is not None
        pair = [] if named else [i for i, cell in enumerate(map(self.board, row)) if self.is_board(cell)]
        if len(pair) == 2:
            self.question, self.answer = pair
            published = pair == [1, 2] and len(row) == len(PUBLISHED)
            self.rating = 3 if published else None
            names = PUBLISHED if published else [f"column {i + 1}" for i in range(len(row))]
        elif not named:
            shown = ", ".join(cell.strip()[:20] for cell in row[:8])
            raise self.bad(line, f"{shown!r} names no column question or none answer; begin the file with a "
                                 "line that names both (puzzle, quizzes, solution, difficulty will do)")
        if self.rating is None and self.min_difficulty is not None:
            raise self.bad(line, f"no column is named {' or '.join(RATING)}, which --min-difficulty "
                                 f"{self.min_difficulty} needs; name it, or leave --min-difficulty out")
        self.names = names
        return named

    def is_board(self, cell):
        return len(cell) in self.language.lengths and set(cell) <= self.language.alphabet.keys()

    def board(self, cell):
        """A cell without the spaces around it, unless its length is right with them: a maze may have some."""
        fits = len(cell) in self.language.lengths if self.S is None else len(cell) == self.S
        return cell if fits else cell.strip()

    def tidy(self, line, row):
        """A row with boards of the right length. Raises UserError when it has none."""
        if len(row) == len(self.names):
            row = [self.board(cell) if i in (self.question, self.answer) else cell
                   for i, cell in enumerate(row)]
            length = len(row[self.question])
            if self.S is None and length in self.language.lengths:
                self.S = length
            if self.S == length == len(row[self.answer]):
                return row
        lengths = self.language.lengths
        want = self.S or ", ".join(map(str, lengths[:3])) + " .." * (len(lengths) > 3)
        raise self.bad(line, f"columns of {[len(cell) for cell in row]} characters; need "
                             f"{', '.join(self.names)}, with {want} in {self.names[self.question]} and "
                             f"{self.names[self.answer]}; correct the row")

    def difficulty(self, line, row):
        try:
            rating = float(row[self.rating])
        except ValueError:
            rating = float("nan")
        if rating != rating:        # a row that is lost for its rating must be lost with a word
            raise self.bad(line, f"rating {row[self.rating]!r} is no whole number (nor a decimal one), which "
                                 f"--min-difficulty needs; correct the row")
        return rating

    def tokens(self, lines, questions, answers):
        """Tokens (2, n, S) of n boards as text. Raises UserError for foreign characters and wrong answers."""
        alphabet, table = self.language.alphabet, np.zeros(256, np.uint8)
        for character, token in alphabet.items():
            table[ord(character)] = token
        text = "".join(questions + answers).encode("latin-1", "replace")
        boards = table[np.frombuffer(text, np.uint8)].reshape(2, len(lines), self.S)
        wrong = (boards == 0).any((0, 2)) | ~self.language.right(*boards)
        if wrong.any():
            i = int(wrong.argmax())
            odd = [c for c in questions[i] + answers[i] if c not in alphabet]
            raise self.bad(lines[i], f"character {odd[0]!r} is none of {''.join(alphabet)!r}; correct the row"
                           if odd else "the answer contradicts the question or breaks the rules; correct or "
                                       "remove the row")
        return boards


# ---------------------------------------------------------------------------------------------
# Splits

def fetch(repo, names, cure):
    """{split: path} of the files {split: name} of a dataset on the hub, or in its cache. Raises UserError."""
    import huggingface_hub  # only here, so that nothing else needs it
    try:
        return {split: Path(huggingface_hub.hf_hub_download(repo, name, repo_type="dataset"))
                for split, name in names.items()}
    except (OSError, ValueError) as e:
        raise UserError(f"dataset {repo} cannot be fetched ({type(e).__name__}); put train.csv and test.csv "
                        f"of https://huggingface.co/datasets/{repo} into a folder DIR, then: {cure}") from e


def read_splits(args, repo, rng, language, cure):
    """{"train": (2, N, S), "test": ...} of --source, and {file: sha256}. Raises UserError.

    A single file is divided by rng. cure: the whole command for files that the user fetched himself."""
    names = {"train": "train.csv", "test": "test.csv"}
    if args.source == "hf":
        paths = fetch(repo, names, cure)
    elif args.source.endswith(".csv"):
        paths = {"all": Path(args.source)}
    else:
        paths = {split: Path(args.source, name) for split, name in names.items()}
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"{path} not found; --source is hf, generate, FILE.csv or a folder that holds "
                            f"train.csv and test.csv")
    try:
        splits = {split: BoardFile(path, language, getattr(args, "min_difficulty", None)).read()
                  for split, path in paths.items()}
    except csv.Error as e:
        raise UserError(f"{args.source} is no CSV file ({e}); see --help for what it must hold") from e
    if "all" in splits:
        boards, n = splits.pop("all"), args.num_test
        if boards.shape[1] <= n:
            raise UserError(f"{args.source} has {boards.shape[1]} boards, all of them for --num-test {n}; "
                            f"lower it")
        order = rng.permutation(boards.shape[1])
        splits = {"train": boards[:, np.sort(order[n:])], "test": boards[:, np.sort(order[:n])]}
    S = [boards.shape[2] for boards in splits.values()]
    if S[0] != S[1]:
        raise UserError(f"{args.source}: boards of {S[0]} cells in train.csv and {S[1]} in test.csv; make "
                        f"them equal")
    return splits, {path.name: sha256(path) for path in paths.values()}


def subsample(rng, boards, n):
    """n of the boards (2, N, S), drawn without replacement; all of them, in order, when n is None or N."""
    total = boards.shape[1]
    if n is not None and n > total:
        raise UserError(f"--subsample-size {n} is more than the {total} training boards; ask for at most "
                        f"{total}")
    return boards if n in (None, total) else boards[:, rng.choice(total, n, replace=False)]


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def warn_of_leaks(train, test, kinship, many=50_000):
    """Say how many test boards are trained on, as they are or in another form. train, test: (2, N, S).

    kinship(questions, answers) -> N integers, equal for the forms of a board. That takes some 30 us a board,
    so that more than `many` are compared only as they are.
    """
    tested = {question.tobytes() for question in test[0]}
    shared = tested.intersection(question.tobytes() for question in train[0])
    exact = np.array([question.tobytes() in shared for question in test[0]])
    if exact.any():
        warn(f"{exact.sum()} of {len(exact)} test boards also stand in the training split: their score is "
             f"memory")
    if train.shape[1] + test.shape[1] <= many:
        moved = np.isin(kinship(*test), kinship(*train)) & ~exact
        if moved.any():
            warn(f"{moved.sum()} of {len(moved)} test boards stand in the training split in another form, as "
                 f"turned, mirrored or renamed")


# ---------------------------------------------------------------------------------------------
# Flags

def add_flags(parser, repo):
    """The flags that sudoku.py and maze.py share."""
    add = parser.add_argument
    add("--source", default="hf",
        help=f"hf ({repo}), generate, a folder of train.csv and test.csv, or FILE.csv")
    add("--num-train", type=within(int, 1, 10 ** 7), default=1000, metavar="N", help="generate N")
    add("--num-test", type=within(int, 1, 10 ** 7), default=1000, metavar="N",
        help="generate N, or hold out N of FILE.csv")
    add("--subsample-size", type=within(int, 1), metavar="N", help="N random training boards; without, all")
    add("--seed", type=within(int, 0, 2 ** 32 - 1), default=0, metavar="N", help="of every draw")


def recipe(builder, args, **facts):
    """What identifies the data: every flag as typed but --output-dir, and facts, as the sha256 of files."""
    return {"builder": builder, **{k: v for k, v in vars(args).items() if k != "output_dir"}, **facts}


def from_folder(builder, args, folder):
    """The command that builds the same `folder` from files that lie in a folder DIR."""
    return command(*recipe_flags(recipe(builder, args, name=folder.name) | {"source": "DIR"}), folder)
