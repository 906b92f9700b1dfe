"""ARC without learning, and a model with the puzzle embeddings of other tasks:
scores to beat.

    python tests/arc_baselines.py data/arc-6x6-mini data/arc-6x6-mini-tune
    python tests/arc_baselines.py data/arc-6x6-mini --checkpoint RUN

A baseline sees the demonstrations of a task and one test input, and returns
ranked answers. pass@K is the official mean over tasks. A task is solved if two
attempts answer all its test inputs; the interval is Wilson's for the share of
solved tasks.

The control of the model scores every row with the puzzle embedding of another
task: the model sees the same grids, but cannot know which task it is.
"""

import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as scoring
from data import Split
from prepare import dihedral
from prepare.arc import ORIGINAL, augment, encode, example_arrays
from tools.common import Parser, cli, require, start_world

# ---------------------------------------------------------------------------------------------
# Baselines: (demonstrations [(input, output)], test input), all uint8 arrays (rows, columns) -> answers,
# the best first


def copy(demos, given):
    return [given]


def most_frequent(demos, given):
    """The demonstrations' outputs; of equally frequent ones, the first comes first."""
    counts = Counter(scoring.grid_key(output) for _, output in demos)
    return [np.array(scoring.key_grid(key), np.uint8) for key, _ in counts.most_common()]


def nearest(demos, given):
    """The demonstrations' outputs, by their inputs: first those of the size of `given`, then by the number of
    tokens that differ on the canvas."""

    def distance(demo):
        return demo[0].shape != given.shape, (encode(demo[0]) != encode(given)).sum()

    return [output for _, output in sorted(demos, key=distance)]


def transform(demos, given, recolour):
    """`given` by each dihedral transform that turns every demonstration's input into its output.

    recolour: also allow a map of the colours. Answers without one come first, and a colour that no
    demonstration has is kept."""
    answers = []
    for t in range(8):
        turned = [(dihedral(a, t), b) for a, b in demos]
        if any(a.shape != b.shape for a, b in turned):
            continue
        pairs = [np.stack([a, b], -1).reshape(-1, 2) for a, b in turned]
        cells = np.concatenate(pairs)  # (cells, 2): colours of input and output
        images = dict(cells.tolist())
        colours = bytes(images.get(colour, colour) for colour in range(10))
        mapped = np.frombuffer(colours, np.uint8)[cells[:, 0]]
        if (mapped == cells[:, 1]).all() and (recolour or colours == ORIGINAL):
            answers.append((colours != ORIGINAL, augment(given, t, colours)))
    return [answer for _, answer in sorted(answers, key=lambda pair: pair[0])]


BASELINES = {
    "copy of the input": copy,
    "most frequent outputs": most_frequent,
    "output of the nearest input": nearest,
    "dihedral transform": partial(transform, recolour=False),
    "the same with a colour map": partial(transform, recolour=True),
}


def answer_all(puzzles, baseline):
    """ArcVotes whose candidates are the answers of a baseline. puzzles: from load_test_puzzles."""
    votes = scoring.ArcVotes(puzzles, [])
    votes.candidates = []
    for name, key in votes.questions:  # in the order of their numbers
        given = np.array(scoring.key_grid(key), np.uint8)
        answers = baseline(example_arrays(puzzles[name]["train"]), given)
        votes.candidates.append(list(dict.fromkeys(map(scoring.grid_key, answers))))
    return votes


# ---------------------------------------------------------------------------------------------
# The model


def rows_of_other_tasks(split):
    """(rows of the puzzle table,) int: for a row of a task in the test split, a row of the next task; for all
    other rows, themselves."""
    ids, bounds = split.puzzle_identifiers, split.group_indices
    tasks = [ids[start:end] for start, end in zip(bounds, bounds[1:])]
    require(len(tasks) > 1, f"{split.dirs[0]} has one task, so there is no other; leave --checkpoint out")
    rows = np.arange(len(split.names))
    for own, others in zip(tasks, tasks[1:] + tasks[:1]):
        rows[own] = np.resize(others, len(own))  # tasks may have different numbers of augmentations
    return rows


def score_model(checkpoint, folder):
    """Yield (name, ArcVotes) of the model as it is, and with the embeddings of other tasks.

    Only the table is permuted: votes still undo the augmentation of their own row."""
    args = scoring.flags().parse_args(["--checkpoint", checkpoint, "--data", folder, "--no-compile"])
    world = start_world(args.device)
    loaded = scoring.load_model(args, world)
    model, split, batch_size = loaded.model, loaded.split, 64
    yield "the model", scoring.evaluate(model, split, world, batch_size).votes
    model.puzzle_emb.copy_(model.puzzle_emb[rows_of_other_tasks(split)])
    yield "with another task's embedding", scoring.evaluate(model, split, world, batch_size).votes


# ---------------------------------------------------------------------------------------------
# The table


def print_row(name, votes):
    ranks, result = votes.ranks(), votes.result()
    n_solved = sum(bool((own < 2).all()) for own in ranks)
    low, high = scoring.wilson_interval(n_solved / len(ranks), len(ranks))
    scores = f"{result['pass@1']:.4f}  {result['pass@2']:.4f}"
    print(f"{name:<30}  {scores}  {n_solved:>4} of {len(ranks):<4}  {low:.4f} .. {high:.4f}", flush=True)


def print_table(folder, checkpoint):
    """Print the table of one dataset. Raises UserError if it is not ARC, or if the outputs are unknown."""
    puzzles = scoring.load_test_puzzles(Split(folder, "test"))
    require(puzzles, f"{folder} has no test_puzzles.json; pass a dataset of prepare/arc.py")
    n_inputs = sum(len(puzzle["test"]) for puzzle in puzzles.values())
    print(f"{folder}: {len(puzzles)} tasks, {n_inputs} test inputs")
    print(f"{'':<30}  pass@1  pass@2  tasks solved  95% interval of these")
    for name, baseline in BASELINES.items():
        votes = answer_all(puzzles, baseline)
        require(votes.ranks(), f"{folder} is a hidden test set without outputs; pass another")
        print_row(name, votes)
    if checkpoint:
        for name, votes in score_model(checkpoint, folder):
            print_row(name, votes)


def main(argv=None):
    parser = Parser(__doc__, "%(prog)s [flags] DIR ...")
    parser.add_argument("data", nargs="+", metavar="DIR", help="ARC datasets, one table for each")
    parser.add_argument("--checkpoint", metavar="PATH", help="also score this run folder or checkpoint")
    args = parser.parse_args(argv)
    for folder in args.data:
        print_table(folder, args.checkpoint)


if __name__ == "__main__":
    cli(main)
