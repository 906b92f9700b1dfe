"""ARC voting (SPEC section 9), to be pasted into eval.py."""
from itertools import repeat

import numpy as np

from data import DIHEDRAL_INVERSE, UserError, dihedral
from prepare.arc import ORIGINAL, TO_TOKEN, crop, parse_name

PASS_K = (1, 2, 5, 10, 100, 1000)
CHUNK = 8192                                     # rows undone at once: more do not fit the cache


def grid_key(grid):
    """A grid as bytes: its number of columns, then its cells. The empty grid is b"\\0"."""
    grid = np.asarray(grid, np.uint8)
    return bytes([grid.shape[-1]]) + grid.tobytes()


def key_grid(key):
    return np.frombuffer(key, np.uint8, offset=1).reshape(-1, key[0]).tolist() if key[0] else []


def undo_rows(tokens, t, tables):
    """(N, 900) uint8 tokens, (N,) transforms, N tables from token to former colour -> N keys of the former grids."""
    height, width = crop(tokens)
    canvas, keys = tokens.reshape(-1, 30, 30), [None] * len(tokens)
    kind = (t * 31 + height) * 31 + width        # rows of one kind are turned back at once
    order = np.argsort(kind, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(kind[order])) + 1):
        h, w = height[rows[0]], width[rows[0]]
        grids = dihedral(canvas[rows, :h, :w], DIHEDRAL_INVERSE[t[rows[0]]])
        columns, cells = bytes([grids.shape[2]]), grids.tobytes()
        for row, i in zip(rows.tolist(), range(0, len(rows) * h * w, h * w) if w else repeat(0)):
            keys[row] = columns + cells[i:i + h * w].translate(tables[row])
    return keys


class ArcVotes:
    """The votes of one evaluation. Every rank adds its own rows; the payloads of all ranks together give one result,
    the same for any number of ranks and any split.

        votes = ArcVotes(test_puzzles, identifiers)      # test_puzzles.json, identifiers.json
        votes.add(inputs, preds, q_halt, puzzle_identifiers, first_row)          # per batch
        votes.merge([votes.payload()])                   # or the list that all_gather_object filled
        votes.result(), votes.submission()
    """

    def __init__(self, test_puzzles, identifiers):
        self.identifiers = identifiers
        self.tasks, self.tests = {}, {}          # (id, input): number; id: [(number, right output)] per test input
        for name, puzzle in test_puzzles.items():
            for e in puzzle["test"]:             # equal inputs of a puzzle share their votes
                task = self.tasks.setdefault((name, grid_key(e["input"])), len(self.tasks))
                self.tests.setdefault(name, []).append((task, grid_key(e["output"])))
        self.waiting, self.row, self.q = [], [], []      # per batch
        self.task, self.grid, self.grids = [], [], {}    # per vote: test input, candidate; all candidates in order

    def add(self, inputs, preds, q_halt, identifiers, first_row):
        """One batch of arrays: (B, 900) tokens twice, (B,) logits, (B,) rows of the puzzle table, 0 for padding.

        first_row: the place of its first row in the test split (of equal candidates that of the first row wins).
        Raises UserError when a row belongs to no test input.
        """
        real = np.flatnonzero(identifiers)
        self.waiting.append((inputs[real].astype(np.uint8), preds[real].astype(np.uint8), identifiers[real]))
        self.row.append(real + first_row)
        self.q.append(np.exp(-np.logaddexp(0, -q_halt[real].astype(np.float64))))
        if sum(len(batch[2]) for batch in self.waiting) >= CHUNK:
            self.count()

    def count(self):
        """Turn the rows that wait into votes."""
        inputs, preds, identifiers = map(np.concatenate, zip(*self.waiting))
        self.waiting = []
        if not len(identifiers):
            return
        names, t, colours = zip(*(parse_name(self.identifiers[i]) for i in identifiers.tolist()))
        t, tables = np.array(t), [bytes.maketrans(c.translate(TO_TOKEN), ORIGINAL) for c in colours]
        for name, given, answer in zip(names, undo_rows(inputs, t, tables), undo_rows(preds, t, tables)):
            if (name, given) not in self.tasks:
                raise UserError(f"a row of the test split is no test input of puzzle {name} in test_puzzles.json: "
                                f"they were not built together; build both again with prepare/arc.py")
            self.task.append(self.tasks[name, given])
            self.grid.append(self.grids.setdefault(answer, len(self.grids)))

    def payload(self):
        """What rank 0 needs: per vote its row, test input, candidate (a place in grids) and sigmoid(q_halt)."""
        if self.waiting:
            self.count()
        return {"row": np.concatenate([np.zeros(0, np.int64), *self.row]), "q": np.concatenate([np.zeros(0), *self.q]),
                "task": np.array(self.task, np.int32), "grid": np.array(self.grid, np.int32), "grids": list(self.grids)}

    def merge(self, payloads):
        """Rank the candidates of every test input by (votes, mean sigmoid(q_halt)), ties in order of the rows."""
        row, task, q = (np.concatenate([p[name] for p in payloads]) for name in ("row", "task", "q"))
        keys = [p["grids"][i] for p in payloads for i in p["grid"].tolist()]
        task, q, votes = task.tolist(), q.tolist(), [{} for _ in self.tasks]
        for i in np.argsort(row, kind="stable").tolist():
            tally = votes[task[i]].setdefault(keys[i], [0, 0.0])
            tally[0] += 1
            tally[1] += q[i]
        self.ranked = [sorted(c, key=lambda key: (c[key][0], c[key][1] / c[key][0]), reverse=True) for c in votes]

    def result(self):
        """-> {"pass@K": mean over puzzles of the mean over test inputs (the official figure), "hits@K": test inputs
        solved, ..., "puzzles", "inputs": how many there are}. Whatever has no votes is not solved."""
        def place(task, right):
            return self.ranked[task].index(right) if right in self.ranked[task] else np.inf

        puzzles = [np.array([place(*test) for test in tests]) for tests in self.tests.values()]
        pooled = np.concatenate(puzzles)
        result = {"puzzles": len(puzzles), "inputs": len(pooled)}
        for k in PASS_K:
            result[f"pass@{k}"] = float(np.mean([np.mean(places < k) for places in puzzles]))
            result[f"hits@{k}"] = int((pooled < k).sum())
        return result

    def submission(self):
        """-> {puzzle id: [{"attempt_1": grid, "attempt_2": grid}]} with every test input. The only candidate is both
        attempts; without any they are [[0]]."""
        best = {name: [[key_grid(key) for key in self.ranked[task][:2]] or [[[0]]] for task, _ in tests]
                for name, tests in self.tests.items()}
        return {name: [{"attempt_1": b[0], "attempt_2": b[-1]} for b in tests] for name, tests in best.items()}
