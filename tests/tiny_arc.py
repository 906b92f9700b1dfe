"""A tiny ARC: symmetric grids, few colours, swapped examples, full canvases, "test" before "train"."""

import json

import numpy as np


def pair(a, b):
    return {"input": np.asarray(a).tolist(), "output": np.asarray(b).tolist()}


def tiny_subsets():
    """{subset: {id: puzzle with outputs}}, five puzzles."""
    rng = np.random.RandomState(7)
    square, wide = rng.randint(0, 10, (3, 3)), rng.randint(0, 10, (2, 30))
    one = np.ones((2, 2), int)
    shared = pair(rng.randint(0, 10, (4, 2)), rng.randint(0, 10, (1, 5)))
    symmetric = {  # has 9 different augmentations, the original included
        "train": [pair(one, 0 * one), pair(one, one)],
        "test": [pair(0 * one, one)],
    }
    swapped = {  # exchanging the colours 1 and 2 exchanges the examples
        "test": [pair([[0, 0]], [[0]])],
        "train": [pair([[1, 0]], [[1]]), pair([[2, 0]], [[2]])],
    }
    full = {
        "train": [pair(rng.randint(0, 10, (30, 30)), wide), pair(wide, square), shared],
        "test": [pair(square, rng.randint(0, 10, (29, 29)))],
    }
    two_tests = {
        "train": [pair(square, square.T), pair(wide, wide[:, ::-1])],
        "test": [pair(square[:2], square), pair([[5]], rng.randint(0, 10, (7, 30))), shared],
    }
    cross = {
        "test": [pair([[0, 3, 0], [3, 3, 3], [0, 3, 0]], [[3, 4]])],
        "train": [pair([[3, 0, 3], [0, 4, 0], [3, 0, 3]], [[4]])],
    }
    return {
        "training": {"symmetric": symmetric, "swapped": swapped, "full": full},
        "evaluation": {"two tests": two_tests, "cross": cross},
    }


def write_source(folder, subsets):
    """Write Kaggle's two files of every subset; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for subset, puzzles in subsets.items():
        challenges, solutions = {}, {}
        for name, puzzle in puzzles.items():
            challenges[name] = dict(puzzle)
            challenges[name]["test"] = [{"input": example["input"]} for example in puzzle["test"]]
            solutions[name] = [example["output"] for example in puzzle["test"]]
        (folder / f"arc-agi_{subset}_challenges.json").write_text(json.dumps(challenges))
        (folder / f"arc-agi_{subset}_solutions.json").write_text(json.dumps(solutions))
    return folder
