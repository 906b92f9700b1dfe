"""ARC voting: the published figures, a naive loop, and what an evaluation has of it."""
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_arc import pair, tiny_subsets

import data
import vote
from common import UserError
from prepare import arc
from runs import arc_dir
from vote import PASS_K, ArcVotes

GOLDEN = Path(__file__).resolve().parent / "golden"


def rows_of(puzzles, rng, n):
    """n test rows in random augmentations; predictions among few candidates, so that there are ties."""
    names, inputs, preds, true = ["<blank>"], [], [], []
    for _ in range(n):
        name = list(puzzles)[rng.randint(len(puzzles))]
        test = puzzles[name]["test"][rng.randint(len(puzzles[name]["test"]))]
        t, colours = rng.randint(8), bytes([0, *rng.permutation(np.arange(1, 10))])
        candidate = [test["output"], [[1, 2]], [[1], [2]], [[3]]][rng.randint(4)]
        names.append(arc.make_name(name, t, colours))
        for rows, grid in ((inputs, test["input"]), (preds, candidate)):
            rows.append(arc.encode(arc.augment(np.array(grid), t, colours)))
        true.append((name, str(test["input"]), str(candidate)))
    return names, np.array(inputs), np.array(preds), true


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_voting_equals_published_figures(ranks):
    golden = json.loads((GOLDEN / "arc_voting" / "golden.json").read_text())
    rows = np.load(GOLDEN / "arc_voting" / "data.npz")
    rows = [rows[name] for name in ("inputs", "preds", "q_halt_logits", "puzzle_identifiers")]
    names = {int(i): name for i, name in golden["identifiers"].items()}
    unseen = {f"unseen {i}": {"test": [pair([[i % 10]], [[1]])] * 2}    # puzzles that the run has no rows of
              for i in range(golden["n_puzzles"] - len(golden["test_puzzles"]))}
    votes = [ArcVotes({**golden["test_puzzles"], **unseen}, names) for _ in range(ranks)]
    for start in range(0, len(rows[0]), 64):    # global batches of 64, a slice per rank
        for rank, part in enumerate(np.array_split(np.arange(start, start + 64), ranks)):
            votes[rank].add(*(a[part] for a in rows), part)
    payloads = [v.payload() for v in votes][::-1]
    assert sum(map(len, payloads)) == golden["n_rows"]
    votes[0].merge(payloads)
    result, submission = votes[0].result(), votes[0].submission()
    assert {f"ARC/{name}": value for name, value in result.items()} == golden["result"]
    assert {name: submission[name] for name in golden["submission"]} == golden["submission"]
    assert submission["unseen 7"] == [{"attempt_1": [[0]], "attempt_2": [[0]]}] * 2
    places = votes[0].places()
    assert (len(places), sum(map(len, places))) == (400, 43 + 2 * len(unseen))


def naive_ranks(true, q):
    """{(puzzle, input): candidates, the best first}: by votes, mean of sigmoid(q), the first of equals."""
    tally, ranks = {}, {}
    for (name, given, candidate), logit in zip(true, q):
        halts = tally.setdefault((name, given), {}).setdefault(candidate, [])
        halts.append(1 / (1 + np.exp(-logit)))
    for task, halts in tally.items():
        worth = {candidate: (len(h), sum(h) / len(h)) for candidate, h in halts.items()}
        ranks[task] = sorted(worth, key=worth.get, reverse=True)    # stable: the first of equals stays first
    return ranks


@pytest.mark.parametrize("seed, n", [*((seed, 60) for seed in range(10)), (10, 300)])
def test_votes_and_ties_equal_naive_loop(seed, n):
    rng = np.random.RandomState(seed)
    puzzles = tiny_subsets()["evaluation"]
    names, inputs, preds, true = rows_of(puzzles, rng, n)
    q = rng.randint(0, 2, n) * 0.5      # few values: many ties
    expected = naive_ranks(true, q)
    payloads = []
    for part in (np.arange(rank, n, 5) for rank in (3, 0, 4, 2, 1)):
        votes = ArcVotes(puzzles, names)
        for i in part:
            votes.add(inputs[[i]], preds[[i]], q[[i]], np.array([i + 1]), np.array([i]))
        payloads.append(votes.payload())
    votes.merge(payloads)
    result, submission = votes.result(), votes.submission()
    for name, puzzle in puzzles.items():
        for test, attempt in zip(puzzle["test"], submission[name], strict=True):
            assert [str(g) for g in attempt.values()] == expected[name, str(test["input"])][:2]
    for k in (1, 2, 5):
        solved = [[str(test["output"]) in expected[name, str(test["input"])][:k] for test in puzzle["test"]]
                  for name, puzzle in puzzles.items()]
        assert result[f"pass@{k}"] == np.mean([np.mean(s) for s in solved])
        assert [(places < k).tolist() for places in votes.places()] == solved


def test_votes_of_batches_are_those_of_all_rows():
    puzzles, payloads = tiny_subsets()["evaluation"], []
    names, inputs, preds, _ = rows_of(puzzles, np.random.RandomState(3), 50)
    for size in (1, 7, 1000):
        votes = ArcVotes(puzzles, names)
        for i in range(0, 50, size):
            rows = np.arange(i, min(50, i + size))
            votes.add(inputs[rows], preds[rows], np.zeros(len(rows)), rows + 1, rows)
        payloads.append(votes.payload())
    assert payloads[0] == payloads[1] == payloads[2]


def test_no_votes_and_one_candidate():
    puzzles = {"a": {"test": [pair([[1]], [[2]])]}, "b": {"test": [pair([[1]], [[2]]), pair([[3]], [[4]])]}}
    votes = ArcVotes(puzzles, ["<blank>", "b"])
    empty = votes.payload()
    votes.merge([empty, empty])
    assert votes.result() == {f"pass@{k}": 0 for k in PASS_K}
    given = arc.encode(np.array([[3]]))[None].repeat(4, 0)
    preds = np.stack([np.zeros(900)] + [arc.encode(np.array([[4]]))] * 3)
    votes.add(given, preds, np.zeros(4), np.array([0, 1, 0, 1]), np.arange(10, 14))  # two are padding
    assert [row for row, *_ in votes.payload()] == [11, 13]
    votes.merge([votes.payload()])
    assert votes.result()["pass@1"] == 0.25
    assert [places.tolist() for places in votes.places()] == [[np.inf], [np.inf, 0]]
    nothing, one = {"attempt_1": [[0]], "attempt_2": [[0]]}, {"attempt_1": [[4]], "attempt_2": [[4]]}
    assert votes.submission() == {"a": [nothing], "b": [nothing, one]}
    votes = ArcVotes(puzzles, ["<blank>", "b"])     # a prediction without any colour
    votes.add(given[:1], np.zeros((1, 900)), np.zeros(1), np.array([1]), np.arange(1))
    votes.merge([votes.payload()])
    assert votes.submission()["b"][1] == {"attempt_1": [], "attempt_2": []}


def voted(puzzles, partial=False):
    """ArcVotes with one right vote for the last test input of puzzle b, [[3]] -> [[4]]."""
    votes = ArcVotes(puzzles, ["<blank>", "b"], partial)
    rows = [arc.encode(np.array([[colour]]))[None] for colour in (3, 4)]
    votes.add(*rows, np.zeros(1), np.array([1]), np.arange(1))
    votes.merge([votes.payload()])
    return votes


def test_of_a_part_only_the_puzzles_with_votes_count():
    puzzles = {"a": {"test": [pair([[1]], [[2]])]}, "b": {"test": [pair([[1]], [[2]]), pair([[3]], [[4]])]}}
    assert voted(puzzles).result()["pass@1"] == 0.25
    assert voted(puzzles, partial=True).result()["pass@1"] == 0.5
    assert [places.tolist() for places in voted(puzzles, partial=True).places()] == [[np.inf, 0]]
    assert list(voted(puzzles, partial=True).submission()) == ["a", "b"]


def test_unknown_answers_are_submitted_but_not_scored():
    """Kaggle's hidden set: test inputs without outputs. What is known of the others is scored alone."""
    hidden = {"a": {"test": [{"input": [[1]]}]}, "b": {"test": [{"input": [[1]]}, {"input": [[3]]}]}}
    votes = voted(hidden)
    assert votes.result() == {} and votes.places() == []
    nothing, one = {"attempt_1": [[0]], "attempt_2": [[0]]}, {"attempt_1": [[4]], "attempt_2": [[4]]}
    assert votes.submission() == {"a": [nothing], "b": [nothing, one]}
    mixed = {"a": hidden["a"], "b": {"test": [{"input": [[1]]}, pair([[3]], [[4]])]}}
    assert voted(mixed).result()["pass@1"] == 1 and voted(mixed).submission() == votes.submission()


def test_equal_inputs_of_a_puzzle_share_their_votes():
    puzzles = {"b": {"test": [pair([[3]], [[4]]), pair([[3]], [[5]])]}}
    votes = voted(puzzles)
    assert votes.submission()["b"] == [{"attempt_1": [[4]], "attempt_2": [[4]]}] * 2
    assert votes.result()["pass@1"] == 0.5


def test_foreign_test_row_is_refused():
    votes = ArcVotes({"a": {"test": [pair([[1]], [[2]])]}}, ["<blank>", "a"])
    row = arc.encode(np.array([[5]]))[None]
    with pytest.raises(UserError, match="puzzle a in test_puzzles.json") as e:
        votes.add(row, row, np.zeros(1), np.array([1]), np.arange(1))
    assert "\n" not in str(e.value)


def test_grids_and_their_keys():
    for grid in ([[1, 2, 3]], [[1], [2], [3]], [[0, 9], [5, 5]], [[7] * 30] * 30):
        assert vote.key_grid(vote.grid_key(grid)) == grid
    assert vote.grid_key([[1, 2]]) != vote.grid_key([[1], [2]])
    assert vote.grid_key([]) == b"\0" and vote.key_grid(b"\0") == []


def test_former_grids_equal_one_at_a_time():
    rng = np.random.RandomState(0)
    tokens, parsed, wanted = [], [], []
    for t in [*range(8)] * 3:
        grid = rng.randint(0, 10, (rng.randint(1, 31), rng.randint(1, 31)))
        colours = bytes([0, *rng.permutation(np.arange(1, 10))])
        tokens.append(arc.encode(arc.augment(grid, t, colours)))
        parsed.append(("name", t, colours))
        wanted.append(vote.grid_key(grid))
    assert vote.former_grids(np.array(tokens, np.uint8), parsed) == wanted


def test_puzzles_of_a_split(tmp_path):
    """Those of all its folders; None when one of them is no ARC dataset."""
    split = data.Split(arc_dir(tmp_path), "test")
    puzzles = vote.test_puzzles(split)
    assert sorted(puzzles) == ["task0", "task1", "task2"]
    assert [len(puzzles[name]["test"]) for name in sorted(puzzles)] == [1, 2, 1]
    (tmp_path / "built" / "test_puzzles.json").unlink()
    assert vote.test_puzzles(split) is None
