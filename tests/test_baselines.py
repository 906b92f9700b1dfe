"""baselines.py: hand-made tasks, the control against a naive loop, the table, what is refused."""
import json
import re

import numpy as np
import pytest
import torch
from tiny_arc import pair, write_source

import baselines
import eval as scoring
from common import UserError
from data import Split
from prepare import arc
from results import wilson
from runs import ALONE, arc_dir, arc_model, save_run, write_boards
from vote import ArcVotes, key_grid
from vote import test_puzzles as puzzles_of

A = np.array([[1, 2, 0], [3, 0, 4]], np.uint8)      # differs from itself in all eight ways that it can lie
TURNS = [lambda a: a, np.rot90, lambda a: np.rot90(a, 2), lambda a: np.rot90(a, 3), np.fliplr, np.flipud,
         np.transpose, lambda a: np.fliplr(np.rot90(a))]


def lists(grids):
    return [np.asarray(grid).tolist() for grid in grids]


def made(*demos):
    return [tuple(np.array(grid, np.uint8) for grid in demo) for demo in demos]


def test_copy_and_most_frequent():
    demos = made(([[1]], [[7, 7]]), ([[2]], [[8]]), ([[3]], [[8]]), ([[4]], [[7], [7]]))
    assert lists(baselines.copy(demos, A)) == [A.tolist()]
    # equal cells in another shape are another grid; of equally frequent ones the first
    assert lists(baselines.most_frequent(demos, A)) == [[[8]], [[7, 7]], [[7], [7]]]


def test_nearest_has_the_same_size_first_and_then_fewest_cells_that_differ():
    demos = made(([[1, 2]], [[1]]), ([[9, 9]], [[2]]), ([[1, 2], [0, 0]], [[3]]), ([[1, 9]], [[4]]))
    assert lists(baselines.nearest(demos, np.array([[1, 2]], np.uint8))) == [[[1]], [[4]], [[2]], [[3]]]
    assert lists(baselines.nearest(demos, np.array([[1, 2], [0, 5]], np.uint8)))[0] == [[3]]


@pytest.mark.parametrize("t", range(8))
def test_transform_is_found_alone_and_with_a_colour_map(t):
    given = np.array([[5, 1], [2, 3], [6, 6]], np.uint8)
    demos = made((A, TURNS[t](A)), (A[:1], TURNS[t](A[:1])))
    for recolour in (False, True):
        assert lists(baselines.transform(demos, given, recolour)) == lists([TURNS[t](given)])
    swap = np.array([0, 2, 1, 7, 4, 5, 6, 7, 8, 9], np.uint8)     # two colours may become one; 5 is not seen
    demos = made((A, swap[TURNS[t](A)]))
    assert baselines.transform(demos, given, False) == []
    assert lists(baselines.transform(demos, given, True)) == lists([swap[TURNS[t](given)]])


def test_transform_must_fit_all_demonstrations():
    fits = (A, np.fliplr(A))
    for other in [(A, A), (A, [[1]]), ([[1, 1]], [[1, 2]])]:      # one colour cannot become two
        for recolour in (False, True):
            assert baselines.transform(made(fits, other), A, recolour) == []


def test_transform_prefers_colours_as_they_are():
    """The identity fits with 1 and 2 exchanged, the flip as it is."""
    demos = made(([[1, 2]], [[2, 1]]))
    given = np.array([[1, 1, 3]], np.uint8)
    assert lists(baselines.transform(demos, given, True))[:2] == [[[3, 1, 1]], [[3, 1, 1]]]
    assert [[2, 2, 3]] in lists(baselines.transform(demos, given, True))


# ---------------------------------------------------------------------------------------------
# The table

def tasks():
    """{id: puzzle}: one is a flip, one has a single answer, which half of its test inputs want."""
    return {
        "flip": {"train": [pair(A, A[::-1]), pair(A[:, :2], A[::-1, :2])],
                 "test": [pair([[1, 2], [3, 4]], [[3, 4], [1, 2]])]},
        "one answer": {"train": [pair([[1]], [[5]]), pair([[2]], [[6]]), pair([[3]], [[5]])],
                       "test": [pair([[4, 4]], [[6]]), pair([[8, 4]], [[7]])]}}


def build(folder, puzzles, *flags):
    write_source(folder / "source", {"evaluation": puzzles})
    arc.main(["--source", str(folder / "source"), "--subsets", "evaluation", "--num-aug", "3", *flags,
              "--output-dir", str(folder / "built")])
    return str(folder / "built")


def test_table_has_the_official_mean_and_the_interval_of_solved_tasks(tmp_path, capsys):
    folder = build(tmp_path, tasks())
    capsys.readouterr()
    baselines.main([folder, folder])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 * 7 and out[:7] == out[7:] and out[0] == f"{folder}: 2 tasks, 3 test inputs"
    figures = {line[:30].strip(): line[30:].split() for line in out[2:7]}
    none, half = ([f"{bound:.4f}" for bound in wilson(share, 2)] for share in (0, 0.5))
    lost = ["0.0000", "0.0000", "0", "of", "2", none[0], "..", none[1]]
    flip = ["0.5000", "0.5000", "1", "of", "2", half[0], "..", half[1]]
    # of one task's two inputs one is answered by the second try: 0.5 of that task, which is not solved
    frequent = ["0.0000", "0.2500", *lost[2:]]
    assert figures == {"copy of the input": lost, "most frequent outputs": frequent,
                       "output of the nearest input": frequent, "dihedral transform": flip,
                       "the same with a colour map": flip}


def test_baselines_do_not_see_the_answers():
    blind = json.loads(json.dumps(tasks()))
    for puzzle in blind.values():
        for example in puzzle["test"]:
            del example["output"]
    for name, baseline in baselines.BASELINES.items():
        a, b = (baselines.answered(puzzles, baseline).ranked for puzzles in (tasks(), blind))
        assert a == b and any(a), name
    assert [key_grid(key) for key in baselines.answered(tasks(), baselines.copy).ranked[1]] == [[[4, 4]]]


# ---------------------------------------------------------------------------------------------
# The model

@pytest.fixture
def run(tmp_path):
    """(run folder of random weights, its test split)"""
    split = Split(arc_dir(tmp_path), "test")
    return save_run(tmp_path / "run", split, arc_model(split)), split


def test_control_has_the_embeddings_of_other_tasks_and_votes_by_its_own(run, capsys):
    folder, split = run
    plain, control = (votes for _, votes in baselines.of_the_model(str(folder), str(split.dirs[0])))
    model, rows = arc_model(split), np.arange(len(split))
    inputs, _, ids = split.gather(rows)
    names = [split.names[i].split("|||")[0] for i in range(len(split.names))]
    following = dict(zip(tests := list(puzzles_of(split)), tests[1:] + tests[:1]))
    other = np.array([names.index(following[names[i]]) + i - names.index(names[i]) for i in ids])
    for votes, seen in ((plain, ids), (control, other)):
        logits, q = scoring.last_thought(model, torch.from_numpy(inputs), torch.from_numpy(seen),
                                         model.cfg.halt_max_steps)
        naive = ArcVotes(puzzles_of(split), split.names)
        naive.add(inputs, logits.argmax(-1).numpy(), q[:, 0].numpy(), ids, rows)
        naive.merge([naive.payload()])
        assert [set(a) for a in votes.ranked] == [set(a) for a in naive.ranked]
    assert plain.ranked != control.ranked


def test_rows_of_the_table_go_to_another_task(tmp_path):
    """Also where tasks have different numbers of augmentations; what is trained on alone stays."""
    one = np.ones((1, 1), int)
    puzzles = {"few": {"train": [pair(0 * one, 0 * one)], "test": [pair(0 * one, 0 * one)]}, **tasks()}
    write_source(tmp_path / "source", {"training": {"other": tasks()["flip"]}, "evaluation": puzzles})
    arc.main(["--source", str(tmp_path / "source"), "--subsets", "training", "evaluation", "--num-aug", "3",
              "--output-dir", str(tmp_path / "built")])
    split = Split(tmp_path / "built", "test")
    rows = baselines.of_other_tasks(split)
    moved = [(split.names[i].split("|||")[0], split.names[j].split("|||")[0]) for i, j in enumerate(rows)]
    assert len(moved) == len(split.names) == 1 + 4 + 1 + 4 + 4
    for mine, other in moved:
        assert (mine == other) == (mine in ("<blank>", "other"))
    order = list(puzzles_of(split))
    assert {other for mine, other in moved if mine == order[-1]} == {order[0]}


def test_model_is_in_the_table(run, capsys):
    folder, split = run
    data, scored = str(split.dirs[0]), scoring.evaluate(arc_model(split), split, ALONE, 4).metrics
    capsys.readouterr()
    baselines.main([data, "--checkpoint", str(folder)])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 9 and out[5].split()[2:] == ["1.0000", "1.0000", "3", "of", "3", "0.4385", "..",
                                                    "1.0000"]
    assert re.fullmatch(rf"the model +{scored['pass@1']:.4f}  {scored['pass@2']:.4f} .* of 3 .*", out[7])
    assert out[8].startswith("with another task's embedding ")


# ---------------------------------------------------------------------------------------------
# What is refused

def test_what_has_no_answers_is_refused(tmp_path):
    with pytest.raises(UserError, match="arc-6x6-mini not found; build it: python .*arc.py .* --half"):
        baselines.main([str(tmp_path / "arc-6x6-mini")])
    with pytest.raises(UserError, match="has no test_puzzles.json, so it is not ARC; name a dataset"):
        baselines.main([str(write_boards(tmp_path / "boards"))])
    folder = build(tmp_path, tasks())
    hidden = json.loads((tmp_path / "built/test_puzzles.json").read_text())
    for example in [example for puzzle in hidden.values() for example in puzzle["test"]]:
        del example["output"]
    (tmp_path / "built/test_puzzles.json").write_text(json.dumps(hidden))
    with pytest.raises(UserError, match="is a hidden test set, whose answers nobody knows; name another"):
        baselines.main([folder])


def test_one_task_has_no_other(tmp_path):
    folder = build(tmp_path, {"flip": tasks()["flip"]})
    split = Split(folder, "test")
    run = save_run(tmp_path / "run", split, arc_model(split))
    with pytest.raises(UserError, match="built has 1 task: there is no other one"):
        baselines.main([folder, "--checkpoint", str(run)])
