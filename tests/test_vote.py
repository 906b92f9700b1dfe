"""ARC voting in eval.py: the published figures, a naive loop, partial and hidden test sets."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_arc import pair, tiny_subsets

import eval as scoring
from eval import PASS_K, POOLED, ArcVotes
from prepare import arc
from tools.common import UserError

GOLDEN = Path(__file__).resolve().parent / "golden" / "arc_voting"
NOTHING = {"attempt_1": [[0]], "attempt_2": [[0]]}
FOUR = {"attempt_1": [[4]], "attempt_2": [[4]]}


def augmented_rows(puzzles, rng, n):
    """n test rows in random augmentations, with predictions among few candidates, so that there are ties."""
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
    golden = json.loads((GOLDEN / "golden.json").read_text())
    data = np.load(GOLDEN / "data.npz")
    real = data["puzzle_identifiers"] > 0  # the others are padding
    columns = [data[name][real] for name in ("inputs", "preds", "q_halt_logits", "puzzle_identifiers")]
    names = {int(i): name for i, name in golden["identifiers"].items()}
    # puzzles for which there are no rows
    n_unseen = golden["n_puzzles"] - len(golden["test_puzzles"])
    unseen = {f"unseen {i}": {"test": [pair([[i % 10]], [[1]])] * 2} for i in range(n_unseen)}
    votes = [ArcVotes({**golden["test_puzzles"], **unseen}, names) for _ in range(ranks)]
    for start in range(0, len(columns[0]), 64):  # global batches of 64, a slice per rank
        batch = np.arange(len(columns[0]))[start : start + 64]
        for rank, part in enumerate(np.array_split(batch, ranks)):
            votes[rank].add(*(column[part] for column in columns), part)
    votes_of_ranks = [v.votes for v in votes][::-1]
    assert sum(map(len, votes_of_ranks)) == golden["n_rows"]
    votes[0].merge(votes_of_ranks)
    result, submission = votes[0].result(), votes[0].submission()
    solved = np.concatenate(votes[0].ranks()) < 2
    assert result.pop(POOLED) == solved.mean()
    assert {f"ARC/{name}": value for name, value in result.items()} == golden["result"]
    assert {name: submission[name] for name in golden["submission"]} == golden["submission"]
    assert submission["unseen 7"] == [NOTHING] * 2
    assert (len(votes[0].ranks()), len(solved)) == (400, 43 + 2 * n_unseen)


def naive_candidates(true, q_halt):
    """{(puzzle, input): candidates, best first}: by votes, mean sigmoid(q_halt), order of the rows."""
    tally = {}
    for (name, given, candidate), logit in zip(true, q_halt):
        probabilities = tally.setdefault((name, given), {}).setdefault(candidate, [])
        probabilities.append(1 / (1 + np.exp(-logit)))
    ranked = {}
    for question, found in tally.items():
        strength = {candidate: (len(p), sum(p) / len(p)) for candidate, p in found.items()}
        ranked[question] = sorted(strength, key=strength.get, reverse=True)
    return ranked


@pytest.mark.parametrize("seed, n", [*((seed, 60) for seed in range(10)), (10, 300)])
def test_votes_and_ties_equal_naive_loop(seed, n):
    rng = np.random.RandomState(seed)
    puzzles = tiny_subsets()["evaluation"]
    names, inputs, preds, true = augmented_rows(puzzles, rng, n)
    q_halt = rng.randint(0, 2, n) * 0.5  # few values: many ties
    expected = naive_candidates(true, q_halt)
    votes_of_ranks = []
    for part in (np.arange(rank, n, 5) for rank in (3, 0, 4, 2, 1)):
        votes = ArcVotes(puzzles, names)
        for i in part:
            votes.add(inputs[[i]], preds[[i]], q_halt[[i]], np.array([i + 1]), np.array([i]))
        votes_of_ranks.append(votes.votes)
    votes.merge(votes_of_ranks)
    result, submission = votes.result(), votes.submission()
    for name, puzzle in puzzles.items():
        for test, attempts in zip(puzzle["test"], submission[name], strict=True):
            assert [str(g) for g in attempts.values()] == expected[name, str(test["input"])][:2]
    for k in (1, 2, 5):
        solved = []
        for name, puzzle in puzzles.items():
            solved.append([str(t["output"]) in expected[name, str(t["input"])][:k] for t in puzzle["test"]])
        assert result[f"pass@{k}"] == np.mean([np.mean(s) for s in solved])
        assert [(ranks < k).tolist() for ranks in votes.ranks()] == solved


def test_no_votes_and_one_candidate():
    puzzles = {"a": {"test": [pair([[1]], [[2]])]}, "b": {"test": [pair([[1]], [[2]]), pair([[3]], [[4]])]}}
    votes = ArcVotes(puzzles, ["<blank>", "b"])
    votes.merge([[], []])
    assert votes.result() == {POOLED: 0, **{f"pass@{k}": 0 for k in PASS_K}}
    inputs, preds = (arc.encode(np.array([[colour]]))[None].repeat(2, 0) for colour in (3, 4))
    votes.add(inputs, preds, np.zeros(2), np.ones(2, int), np.arange(10, 12))
    assert [example for example, *_ in votes.votes] == [10, 11]
    votes.merge([votes.votes])
    assert votes.result()["pass@1"] == 0.25
    assert [ranks.tolist() for ranks in votes.ranks()] == [[np.inf], [np.inf, 0]]
    assert votes.submission() == {"a": [NOTHING], "b": [NOTHING, FOUR]}
    votes = ArcVotes(puzzles, ["<blank>", "b"])  # a prediction without any colour
    votes.add(inputs[:1], np.zeros((1, 900)), np.zeros(1), np.array([1]), np.arange(1))
    votes.merge([votes.votes])
    assert votes.submission()["b"][1] == {"attempt_1": [], "attempt_2": []}


def voted(puzzles, partial=False):
    """ArcVotes with one vote, [[3]] -> [[4]] of puzzle b."""
    votes = ArcVotes(puzzles, ["<blank>", "b"], partial)
    rows = [arc.encode(np.array([[colour]]))[None] for colour in (3, 4)]
    votes.add(*rows, np.zeros(1), np.array([1]), np.arange(1))
    votes.merge([votes.votes])
    return votes


def test_in_a_part_only_test_inputs_with_votes_count():
    puzzles = {"a": {"test": [pair([[1]], [[2]])]}, "b": {"test": [pair([[1]], [[2]]), pair([[3]], [[4]])]}}
    assert voted(puzzles).result()["pass@1"] == 0.25
    partial = voted(puzzles, partial=True)
    assert partial.result()["pass@1"] == partial.result()[POOLED] == 1
    assert [ranks.tolist() for ranks in partial.ranks()] == [[0]]
    assert list(partial.submission()) == ["a", "b"]


def test_hidden_outputs_are_submitted_but_not_scored():
    hidden = {"a": {"test": [{"input": [[1]]}]}, "b": {"test": [{"input": [[1]]}, {"input": [[3]]}]}}
    votes = voted(hidden)
    assert votes.result() == {} and votes.ranks() == []
    assert votes.submission() == {"a": [NOTHING], "b": [NOTHING, FOUR]}
    # known outputs of other test inputs are scored alone
    mixed = {"a": hidden["a"], "b": {"test": [{"input": [[1]]}, pair([[3]], [[4]])]}}
    assert voted(mixed).result()["pass@1"] == 1 and voted(mixed).submission() == votes.submission()


def test_equal_inputs_of_a_puzzle_share_their_votes():
    votes = voted({"b": {"test": [pair([[3]], [[4]]), pair([[3]], [[5]])]}})
    assert votes.submission()["b"] == [FOUR] * 2
    assert votes.result()["pass@1"] == 0.5


def test_an_unknown_test_input_is_refused():
    votes = ArcVotes({"a": {"test": [pair([[1]], [[2]])]}}, ["<blank>", "a"])
    row = arc.encode(np.array([[5]]))[None]
    with pytest.raises(UserError, match="lacks a test input of a; rebuild it with prepare/arc.py"):
        votes.add(row, row, np.zeros(1), np.array([1]), np.arange(1))


def test_grids_and_their_keys():
    for grid in ([[1, 2, 3]], [[1], [2], [3]], [[0, 9], [5, 5]], [[7] * 30] * 30):
        assert scoring.key_grid(scoring.grid_key(grid)) == grid
    assert scoring.grid_key([[1, 2]]) != scoring.grid_key([[1], [2]])
    assert scoring.grid_key([]) == b"\0" and scoring.key_grid(b"\0") == []


def test_unaugmented_inverts_every_augmentation():
    rng = np.random.RandomState(0)
    tokens, names, expected = [], [], []
    for t in [*range(8)] * 3:
        grid = rng.randint(0, 10, (rng.randint(1, 31), rng.randint(1, 31)))
        colours = bytes([0, *rng.permutation(np.arange(1, 10))])
        tokens.append(arc.encode(arc.augment(grid, t, colours)))
        names.append(("name", t, colours))
        expected.append(scoring.grid_key(grid))
    assert scoring.unaugmented(np.array(tokens, np.uint8), names) == expected
