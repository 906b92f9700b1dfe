"""tests/arc_baselines.py: hand-made tasks, the control, the table."""

import arc_baselines as baselines
import numpy as np
import pytest
from runs import arc_dir, arc_model, save_run

from data import Split
from prepare import dihedral

A = np.array([[1, 2, 0], [3, 0, 4]], np.uint8)  # all eight transforms of it differ


def demos_of(*pairs):
    return [tuple(np.array(grid, np.uint8) for grid in pair) for pair in pairs]


def lists(grids):
    return [grid.tolist() for grid in grids]


def test_frequent_and_nearest_outputs():
    demos = demos_of(([[1, 2]], [[7]]), ([[9, 9]], [[8]]), ([[1, 2], [0, 0]], [[8]]), ([[1, 9]], [[4]]))
    assert lists(baselines.most_frequent(demos, A)) == [[[8]], [[7]], [[4]]]
    # the same size first, then the fewest cells that differ
    assert lists(baselines.nearest(demos, np.array([[1, 2]], np.uint8))) == [[[7]], [[4]], [[8]], [[8]]]


@pytest.mark.parametrize("t", range(8))
def test_a_transform_is_found_alone_and_with_a_colour_map(t):
    given = np.array([[5, 1], [2, 3], [6, 6]], np.uint8)
    swap = np.array([0, 2, 1, 7, 4, 5, 6, 7, 8, 9], np.uint8)
    demos = demos_of((A, dihedral(A, t)), (A[:1], dihedral(A[:1], t)))
    for recolour in (False, True):
        assert lists(baselines.transform(demos, given, recolour)) == [dihedral(given, t).tolist()]
    recoloured = demos_of((A, swap[dihedral(A, t)]))
    assert baselines.transform(recoloured, given, False) == []
    assert lists(baselines.transform(recoloured, given, True)) == [swap[dihedral(given, t)].tolist()]


def test_the_table_and_the_control(tmp_path, capsys):
    split = Split(arc_dir(tmp_path), "test")  # three tasks: grids upside down
    run, folder = save_run(tmp_path / "run", split, arc_model(split)), str(split.dirs[0])
    rows = baselines.rows_of_other_tasks(split)
    tasks = [name.split("|||")[0] for name in split.names]
    moved = [(tasks[i], tasks[j]) for i, j in enumerate(rows)]
    assert all((own == other) == (own == "<blank>") for own, other in moved)
    capsys.readouterr()
    baselines.main([folder, "--checkpoint", str(run)])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 9 and out[0] == f"{folder}: 3 tasks, 4 test inputs"
    solved = ["1.0000", "1.0000", "3", "of", "3", "0.4385", "..", "1.0000"]
    assert out[5].split()[2:] == solved and out[6].split()[6:] == solved
    assert out[7].startswith("the model ") and out[8].startswith("with another task's embedding ")
