"""ARC: the augmented copies of a task vote for its answers.

A prediction is cropped, its augmentation undone; the input, undone the same way, names the test input that it
votes for.
"""
from itertools import chain

import numpy as np

from common import UserError, read_json
from data import DIHEDRAL_INVERSE, dihedral
from prepare.arc import ORIGINAL, TO_TOKEN, crop, parse_name

PASS_K = (1, 2, 5, 10, 100, 1000)


def test_puzzles(split):
    """test_puzzles.json of the split's folders, {id: {"train": ..., "test": [{input, output}]}}; None: not
    ARC."""
    files = [d / "test_puzzles.json" for d in split.dirs]
    if all(f.exists() for f in files):
        return {k: v for f in files for k, v in read_json(f, "build the dataset again").items()}


def grid_key(grid):
    """A grid as bytes: its number of columns, then its cells. The empty grid is b"\\0"."""
    grid = np.asarray(grid, np.uint8)
    return bytes([grid.shape[-1]]) + grid.tobytes()


def key_grid(key):
    return np.frombuffer(key, np.uint8, offset=1).reshape(-1, key[0]).tolist() if key[0] else []


def former_grids(tokens, parsed):
    """(N, 900) uint8 tokens, N times what parse_name gives -> N keys of the grids before the augmentation."""
    keys = []
    for board, height, width, (_, t, colours) in zip(tokens.reshape(-1, 30, 30), *crop(tokens), parsed):
        grid = dihedral(board[:height, :width], DIHEDRAL_INVERSE[t])
        # token -> colour of the augmented grid -> colour of the original one, by one table for all cells
        cells = grid.tobytes().translate(bytes.maketrans(colours.translate(TO_TOKEN), ORIGINAL))
        keys.append(bytes([grid.shape[1]]) + cells)
    return keys


class ArcVotes:
    """The votes of one evaluation. Every rank adds its own rows; the payloads of all ranks together give one
    result, the same for any number of ranks and any split.

        votes = ArcVotes(test_puzzles, identifiers)      # test_puzzles.json, identifiers.json
        votes.add(inputs, preds, q_halt, puzzle_identifiers, rows)               # per batch
        votes.merge([votes.payload()])                   # or the list that all_gather_object filled
        votes.result(), votes.submission()
    """

    def __init__(self, test_puzzles, identifiers, partial=False):
        self.identifiers, self.partial = identifiers, partial    # partial: puzzles without votes do not count
        self.tasks, self.tests = {}, {}     # (id, input): number; id: [(number, right output or None)]
        for name, puzzle in test_puzzles.items():
            for e in puzzle["test"]:        # equal inputs of a puzzle share their votes
                task = self.tasks.setdefault((name, grid_key(e["input"])), len(self.tasks))
                right = grid_key(e["output"]) if "output" in e else None
                self.tests.setdefault(name, []).append((task, right))
        self.votes, self.grids = [], {}     # (row, task, grid, sigmoid(q_halt)); equal grids are one object

    def add(self, inputs, preds, q_halt, identifiers, rows):
        """One batch of arrays: (B, 900) tokens twice, (B,) logits, (B,) rows of the puzzle table, 0 for
        padding, (B,) places in the test split (of equal candidates that of the first row wins).

        Raises UserError when a row belongs to no test input."""
        real = np.flatnonzero(identifiers)
        parsed = [parse_name(self.identifiers[i]) for i in identifiers[real].tolist()]
        given, answers = (former_grids(a[real].astype(np.uint8), parsed) for a in (inputs, preds))
        sure = np.exp(-np.logaddexp(0, -q_halt[real].astype(np.float64)))   # sigmoid that cannot overflow
        votes = zip(parsed, given, answers, rows[real].tolist(), sure.tolist())
        for (name, _, _), key, grid, row, q in votes:
            if (name, key) not in self.tasks:
                raise UserError(f"a row of the test split is no test input of puzzle {name} in "
                                f"test_puzzles.json: build both again with prepare/arc.py")
            self.votes.append((row, self.tasks[name, key], self.grids.setdefault(grid, grid), q))

    def payload(self):
        """What the other ranks need, to be pickled."""
        return self.votes

    def merge(self, payloads):
        """Rank the candidates of every test input by (votes, mean sigmoid(q_halt)), ties in order of the
        rows."""
        tallies = [{} for _ in self.tasks]      # {grid: [votes, sum of sigmoid(q_halt)]}
        for _, task, grid, q in sorted(chain(*payloads)):
            tally = tallies[task].setdefault(grid, [0, 0.0])
            tally[0] += 1
            tally[1] += q
        self.ranked = []
        for tally in tallies:
            worth = {grid: (n, total / n) for grid, (n, total) in tally.items()}
            self.ranked.append(sorted(worth, key=worth.get, reverse=True))

    def places(self):
        """Per puzzle with a known answer the places (from 0, inf: none) of the right outputs of its test
        inputs among the candidates."""
        puzzles = []
        for tests in self.tests.values():
            candidates = [(self.ranked[task], right) for task, right in tests if right is not None]
            if candidates and (not self.partial or any(ranked for ranked, _ in candidates)):
                puzzles.append(np.array([ranked.index(right) if right in ranked else np.inf
                                         for ranked, right in candidates]))
        return puzzles

    def result(self):
        """-> {"pass@K": mean over puzzles of the mean over test inputs (the official figure)}; whatever has
        no votes is not solved. Empty where no answer is known."""
        puzzles = self.places()
        if not puzzles:
            return {}
        return {f"pass@{k}": float(np.mean([np.mean(places < k) for places in puzzles])) for k in PASS_K}

    def submission(self):
        """-> {puzzle id: [{"attempt_1": grid, "attempt_2": grid}]} with every test input. The only candidate
        is both attempts; without any they are [[0]]."""
        answers = {}
        for name, tests in self.tests.items():
            best = [[key_grid(key) for key in self.ranked[task][:2]] or [[[0]]] for task, _ in tests]
            answers[name] = [{"attempt_1": b[0], "attempt_2": b[-1]} for b in best]
        return answers
