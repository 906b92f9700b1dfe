"""ARC without learning, and a model that is told another task: what to beat.

    python baselines.py data/arc-6x6-mini data/arc-6x6-mini-tune
    python baselines.py data/arc-6x6-mini --checkpoint runs/mini-arc-...

Each baseline sees what a solver of the task sees, its demonstrations and one
test input, and gives its answers in order. pass@K is the official mean over
tasks; a task is solved when two tries answer all its test inputs, and the
interval is Wilson's for that share of the tasks.

The control of the model: every row of the test split with the puzzle embedding
of another task. It looks at the same grids, and cannot know what is asked.
"""
from collections import Counter
from functools import partial

import common  # noqa: F401  before torch, for a Ctrl-C while that is imported
import numpy as np

import eval as scoring
from common import Parser, UserError, cli, start_world
from data import Split, dihedral
from prepare.arc import ORIGINAL, arrays, augment, encode
from results import wilson
from vote import ArcVotes, grid_key, key_grid, test_puzzles

# ---------------------------------------------------------------------------------------------
# Baselines: (demonstrations [(input, output)], test input), all uint8 arrays (rows, columns), -> answers,
# the best first

def copy(demos, given):
    return [given]


def most_frequent(demos, given):
    """The demonstrations' outputs; of equally frequent ones that of the first."""
    counts = Counter(grid_key(output) for _, output in demos)
    return [np.array(key_grid(key), np.uint8) for key, _ in counts.most_common()]


def nearest(demos, given):
    """The outputs of the demonstrations by their inputs: those of the size of `given` before all others, then
    by the number of tokens that differ on the canvas."""
    def distance(demo):
        return demo[0].shape != given.shape, (encode(demo[0]) != encode(given)).sum()
    return [output for _, output in sorted(demos, key=distance)]


def transform(demos, given, recolour):
    """`given` by each dihedral transform that makes every demonstration's input its output. recolour: colours
    may be mapped, too, each to one; answers without such a change come first, and a colour that no
    demonstration has stays as it is."""
    answers = []
    for t in range(8):
        turned = [(dihedral(a, t), b) for a, b in demos]
        if any(a.shape != b.shape for a, b in turned):
            continue
        seen = np.concatenate([np.stack([a, b], -1).reshape(-1, 2) for a, b in turned])      # (cells, 2)
        images = dict(seen.tolist())
        colours = bytes(images.get(colour, colour) for colour in range(10))
        mapped = np.frombuffer(colours, np.uint8)[seen[:, 0]]
        if (mapped == seen[:, 1]).all() and (recolour or colours == ORIGINAL):
            answers.append((colours != ORIGINAL, augment(given, t, colours)))
    return [answer for _, answer in sorted(answers, key=lambda pair: pair[0])]


BASELINES = {
    "copy of the input": copy,
    "most frequent outputs": most_frequent,
    "output of the nearest input": nearest,
    "dihedral transform": partial(transform, recolour=False),
    "the same with a colour map": partial(transform, recolour=True),
}


def answered(puzzles, baseline):
    """ArcVotes with the answers of a baseline as ranked candidates. puzzles: test_puzzles.json."""
    votes = ArcVotes(puzzles, [])
    votes.ranked = []
    for name, key in votes.tasks:       # in the order of their numbers
        demos = [arrays(example) for example in puzzles[name]["train"]]
        answers = baseline(demos, np.array(key_grid(key), np.uint8))
        votes.ranked.append(list(dict.fromkeys(map(grid_key, answers))))
    return votes


# ---------------------------------------------------------------------------------------------
# The model

def of_other_tasks(split):
    """(rows of the puzzle table,) int: for a row of a task of the test split one of the task behind it (of
    the last one: the first), for all others themselves. Raises UserError when there is one task only."""
    ids, bounds = split.puzzle_identifiers, split.group_indices
    tasks = [ids[start:end] for start, end in zip(bounds, bounds[1:])]
    if len(tasks) < 2:
        raise UserError(f"{split.dirs[0]} has {len(tasks)} task: there is no other one, whose embedding the "
                        f"control needs; leave --checkpoint out")
    rows = np.arange(len(split.names))
    for mine, others in zip(tasks, tasks[1:] + tasks[:1]):
        rows[mine] = np.resize(others, len(mine))       # tasks may differ in their number of augmentations
    return rows


def of_the_model(checkpoint, folder):
    """Yield (name, ArcVotes) of the model as it is, and with the embeddings of other tasks.

    Only the table is permuted: a vote still undoes the augmentation that its own row was made by."""
    args = scoring.flags().parse_args(["--checkpoint", checkpoint, "--data", folder, "--no-compile"])
    world = start_world(args.device, 7200)      # seconds
    opened = scoring.open_model(args, world)
    yield "the model", scoring.measure(args, world, opened, scoring.PLAIN)[1].votes
    table = opened.model.puzzle_emb
    table.copy_(table[of_other_tasks(opened.split)])
    yield "with another task's embedding", scoring.measure(args, world, opened, scoring.PLAIN)[1].votes


# ---------------------------------------------------------------------------------------------
# The table

def line(name, votes):
    """One row of the table."""
    places, result = votes.places(), votes.result()
    solved, n = sum(bool((own < 2).all()) for own in places), len(places)
    low, high = wilson(solved / n, n)
    return (f"{name:<30}  {result['pass@1']:.4f}  {result['pass@2']:.4f}  {solved:>4} of {n:<4}  "
            f"{low:.4f} .. {high:.4f}")


def report(folder, checkpoint):
    """Print the table of one dataset. Raises UserError when it is not ARC, or nobody knows the answers."""
    puzzles = test_puzzles(Split(folder, "test"))
    if puzzles is None:
        raise UserError(f"{folder} has no test_puzzles.json, so it is not ARC; name a dataset of "
                        f"prepare/arc.py")
    n_inputs = sum(len(puzzle["test"]) for puzzle in puzzles.values())
    print(f"{folder}: {len(puzzles)} tasks, {n_inputs} test inputs\n"
          f"{'':<30}  pass@1  pass@2  tasks solved  95% interval of these")
    for name, baseline in BASELINES.items():
        votes = answered(puzzles, baseline)
        if not votes.places():
            raise UserError(f"{folder} is a hidden test set, whose answers nobody knows; name another")
        print(line(name, votes))
    for name, votes in of_the_model(checkpoint, folder) if checkpoint else ():
        print(line(name, votes), flush=True)


def flags():
    parser = Parser(__doc__)
    parser.add_argument("data", nargs="+", metavar="DIR", help="ARC datasets, a table for each")
    parser.add_argument("--checkpoint", metavar="PATH", help="also this model: a run folder or a file")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    for folder in args.data:
        report(folder, args.checkpoint)


if __name__ == "__main__":
    cli(main)
