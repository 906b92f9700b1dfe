"""Your own task: python tests/own_task.py data/flood && python train.py --data data/flood"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import cli  # noqa: E402
from data import dihedral, write_dataset  # noqa: E402

SIZE, (PAD, WALL, DRY, WET) = 4, range(4)    # vocabulary 4; 0 is padding, and a label of 0 is not asked


def boards(rng, n):
    """Inputs (n, S): walls and one wet cell. Labels (n, S): wet is all that the water reaches."""
    inputs = np.where(rng.random((n, SIZE, SIZE)) < 0.35, WALL, DRY).astype(np.uint8)
    inputs[np.arange(n), rng.integers(SIZE, size=n), rng.integers(SIZE, size=n)] = WET
    labels = inputs.copy()
    for _ in range(SIZE * SIZE):
        wet = np.pad(labels == WET, ((0, 0), (1, 1), (1, 1)))
        near = wet[:, 2:, 1:-1] | wet[:, :-2, 1:-1] | wet[:, 1:-1, 2:] | wet[:, 1:-1, :-2]
        labels[near & (labels == DRY)] = WET
    return inputs.reshape(n, -1), labels.reshape(n, -1)


def turn(rng, *arrays):
    """The boards in another of the eight ways that a square can lie."""
    t = rng.integers(1, 8)
    return [dihedral(a.reshape(-1, SIZE, SIZE), t).reshape(len(a), -1) for a in arrays]


def main(argv=None):
    rng = np.random.default_rng(0)
    splits = {"train": boards(rng, 1000), "test": boards(rng, 500)}
    write_dataset((argv or sys.argv[1:] or ["data/flood"])[0], splits, vocab_size=4, augment=turn, num_aug=7)


if __name__ == "__main__":
    cli(main)
