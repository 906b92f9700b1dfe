"""A task of your own: python tests/own_task.py data/flood && python train.py --data data/flood"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prepare import dihedral, write_dataset
from tools.common import cli

SIZE = 4
PAD, WALL, DRY, WET = range(4)  # a vocabulary of 4; 0 is padding, and a label of 0 is not scored
RECIPE = {"builder": "flood", "command": "python tests/own_task.py"}


def draw_boards(rng, n):
    """Inputs (n, S): walls and one wet cell. Labels (n, S): all cells that the water reaches are wet."""
    inputs = np.where(rng.random((n, SIZE, SIZE)) < 0.35, WALL, DRY).astype(np.uint8)
    inputs[np.arange(n), rng.integers(SIZE, size=n), rng.integers(SIZE, size=n)] = WET
    labels = inputs.copy()
    for _ in range(SIZE * SIZE):
        wet = np.pad(labels == WET, ((0, 0), (1, 1), (1, 1)))
        near = wet[:, 2:, 1:-1] | wet[:, :-2, 1:-1] | wet[:, 1:-1, 2:] | wet[:, 1:-1, :-2]
        labels[near & (labels == DRY)] = WET
    return inputs.reshape(n, -1), labels.reshape(n, -1)


def augment(rng, *arrays):
    """The boards rotated or reflected, all in the same way."""
    t = rng.integers(1, 8)
    return [dihedral(a.reshape(-1, SIZE, SIZE), t).reshape(len(a), -1) for a in arrays]


def main(argv=None):
    folder = (argv or sys.argv[1:] or ["data/flood"])[0]
    rng = np.random.default_rng(0)
    splits = {"train": draw_boards(rng, 1000), "test": draw_boards(rng, 500)}
    write_dataset(folder, splits, vocab_size=4, recipe=RECIPE, augment=augment, num_aug=7)


if __name__ == "__main__":
    cli(main)
