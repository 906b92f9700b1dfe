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
    return {
        "training": {
            # 9 versions
            "symmetric": {"train": [pair(one, 0 * one), pair(one, one)], "test": [pair(0 * one, one)]},
            "swapped": {"test": [pair([[0, 0]], [[0]])],        # turning 1 and 2 round gives it again
                        "train": [pair([[1, 0]], [[1]]), pair([[2, 0]], [[2]])]},
            "full": {"train": [pair(rng.randint(0, 10, (30, 30)), wide), pair(wide, square), shared],
                     "test": [pair(square, rng.randint(0, 10, (29, 29)))]}},
        "evaluation": {
            "two tests": {"train": [pair(square, square.T), pair(wide, wide[:, ::-1])],
                          "test": [pair(square[:2], square), pair([[5]], rng.randint(0, 10, (7, 30))),
                                   shared]},
            "cross": {"test": [pair([[0, 3, 0], [3, 3, 3], [0, 3, 0]], [[3, 4]])],
                      "train": [pair([[3, 0, 3], [0, 4, 0], [3, 0, 3]], [[4]])]}},
    }


def write_source(folder, subsets):
    folder.mkdir(parents=True, exist_ok=True)
    for subset, puzzles in subsets.items():
        challenges = {name: {key: [{"input": e["input"]} for e in examples] if key == "test" else examples
                             for key, examples in puzzle.items()} for name, puzzle in puzzles.items()}
        solutions = {name: [e["output"] for e in puzzle["test"]] for name, puzzle in puzzles.items()}
        (folder / f"arc-agi_{subset}_challenges.json").write_text(json.dumps(challenges))
        (folder / f"arc-agi_{subset}_solutions.json").write_text(json.dumps(solutions))
    return folder
