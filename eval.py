"""Score a checkpoint on a test split.

    python eval.py --checkpoint runs/mini-...     a run folder or a file
    python eval.py --hf alphaXiv/trm-model-maze   published weights
    torchrun --nproc_per_node=8 eval.py ...       the same scores, faster

The scores are written to results.json and, for ARC, the answers to
submission.json. With --limit or --max-aug, the names of these files begin
with part-, so that they never replace a complete result.
"""

import argparse
import math
import sys
import time
from dataclasses import asdict
from itertools import chain
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import prepare
from data import Split, assign_canvases, paste_top_left
from model import TRM, Batch, build_model, compile_model, metric_names, score_rows
from prepare import DIHEDRAL_INVERSE, dihedral
from prepare.arc import ORIGINAL, SIDE, TO_TOKEN, crop, parse_name
from prepare.maze import FREE, GOAL, PATH, START
from tools import draw, hub
from tools.common import IGNORE_LABEL, Parser, bounded, cli, missing_compiler, progress, read_json
from tools.common import replacing, require, start_world, write_file, write_json
from tools.run_folder import find_checkpoint

# ---------------------------------------------------------------------------------------------
# Supervision steps


def supervision_steps(model, inputs, puzzle_ids, steps, noise=0.0, seeds=()):
    """Yield (logits (B, S, V), q (B, 2)) after each of `steps` supervision steps; all rows run all of them.

    noise: standard deviation of normal noise that is added to y and z before each step.
    seeds: ints, one per row, so that the noise of a row does not depend on its batch; no noise without them.
    """
    generators = [torch.Generator(inputs.device).manual_seed(seed) for seed in seeds]
    # no_grad, not inference_mode: then torch.compile can reuse the graphs of training
    with torch.no_grad():
        # x (B, L, D) is the same in all steps
        x = model.embed(inputs, model.puzzle_emb[puzzle_ids])
        # contiguous, as in later steps: other strides would compile one more graph
        y, z = (h.to(x.dtype).expand_as(x).contiguous() for h in (model.y0, model.z0))
    for _ in range(steps):
        # no_grad ends before the yield, so that the caller keeps its own gradient mode
        with torch.no_grad():
            for i, generator in enumerate(generators):
                for h in (y[i], z[i]):
                    h += torch.empty_like(h).normal_(std=noise, generator=generator)
            y, z = model.deep_recursion(x, y, z)
            heads = model.heads(y)
        yield heads


def predictions(cfg, logits):
    """Tokens (B, S) from logits; in regression, the predicted numbers (B, S, target_dim) as float32."""
    if cfg.regression:
        return logits.float()
    # argmax returns int64; small integers save memory and time on the way to the host
    small = torch.uint8 if cfg.vocab_size < 256 else torch.int32
    return logits.argmax(-1).to(small)


def trajectory(model, inputs, puzzle_ids, steps):
    """Answers (steps, B, ...) and q_halt (steps, B) after every supervision step, as numpy arrays."""
    tensors = [torch.as_tensor(array, device=model.y0.device) for array in (inputs, puzzle_ids)]
    answers, q_halt = [], []
    for logits, q in supervision_steps(model, *tensors, steps):
        answers.append(predictions(model.cfg, logits).cpu())
        q_halt.append(q[:, 0].cpu())
    return np.stack(answers), np.stack(q_halt)


def hardest_solved_puzzle(model, split, batch_size):
    """draw.Trajectory of one puzzle of the first batch: of those solved in the end, the one that had wrong
    cells for the most steps."""
    inputs, labels, puzzle_ids = split.gather(
        np.arange(len(split))[:batch_size],
        size=batch_size,
        # all on the largest canvas, because a batch has one shape
        canvas=int(split.canvases.max()),
    )
    answers, q_halt = trajectory(model, inputs, puzzle_ids, model.cfg.halt_max_steps)
    wrong = draw.wrong_cells(model.cfg, answers, labels)  # (steps, B, S)
    has_errors = wrong.any(-1)  # (steps, B)
    solved = ~has_errors[-1]
    i = int((has_errors.sum(0) * solved).argmax())
    return draw.Trajectory(inputs[i], answers[:, i], wrong[:, i], q_halt[:, i], labels[i])


# ---------------------------------------------------------------------------------------------
# Scoring


class TestTimeCompute(NamedTuple):
    """How much to compute per puzzle."""

    # supervision steps; None: halt_max_steps of the model
    steps: int | None = None
    # a row leaves its batch when its q_halt is above this; None: all rows run all steps
    halt_threshold: float | None = None
    # tries per puzzle; the one with the highest q_halt wins
    rollouts: int = 1
    # standard deviation of the noise in all tries but the first
    noise: float = 0.3


ALL_STEPS_ONCE = TestTimeCompute()


class Scores(NamedTuple):
    """N scored examples, in the order of the split; all fields are (N, ...)."""

    # example numbers
    examples: np.ndarray
    # tokens (N, S) or numbers (N, S, target_dim) after the last step
    preds: np.ndarray
    # the next four as in model.RowScores
    loss: np.ndarray
    cell_acc: np.ndarray
    exact: np.ndarray
    n_labels: np.ndarray
    # bool: optimal_paths() of mazes; in other tasks the same as exact
    optimal_path: np.ndarray
    # logit
    q_halt: np.ndarray
    # supervision steps taken
    steps: np.ndarray
    # bool: exact after each step, (N, steps); with halting after the last one only, (N, 1)
    exact_by_step: np.ndarray
    # bool: the target fits into the canvas that the model saw
    fits_canvas: np.ndarray


def joined(parts):
    """One Scores from several, in the order of the split. Of several tries of an example, it has the one with
    the highest q_halt."""
    scores = Scores(*(np.concatenate(column) for column in zip(*parts)))
    best_first = np.lexsort((-scores.q_halt, scores.examples))
    _, first = np.unique(scores.examples[best_first], return_index=True)
    return Scores(*(column[best_first[first]] for column in scores))


def score(model, split, world, batch_size, examples, compute=ALL_STEPS_ONCE):
    """Scores of this rank's share of the examples. Every batch has batch_size rows, padded if necessary."""
    run_batches = run_all_steps if compute.halt_threshold is None else run_until_halt
    canvases = split.canvas_of(examples)
    parts = []
    with progress(
        total=compute.rollouts * len(examples) // world.size,
        desc="evaluating",
        unit="row",
        # None: shown on a terminal only
        disable=world.rank > 0 or None,
    ) as bar:
        for rollout in range(compute.rollouts):
            # canvas by canvas, because a batch has one shape
            for canvas in np.unique(canvases).tolist():
                share = examples[canvases == canvas][world.rank :: world.size]
                for results in run_batches(model, split, canvas, share, batch_size, compute, rollout):
                    parts.append(scores_of(model.cfg, split, canvas, *results))
                    bar.update(len(parts[-1].examples))
            # only the best tries so far are kept in memory
            parts = [joined(parts)]
    return parts[0]


def load_batch(model, split, canvas, examples, batch_size):
    """A Batch on the model's device: the examples and, up to batch_size rows, padding."""
    arrays = split.gather(examples, size=batch_size, canvas=canvas)
    tensors = (torch.from_numpy(array).to(model.y0.device) for array in arrays)
    return Batch(*tensors, min_halt_steps=None)


def run_all_steps(model, split, canvas, examples, batch_size, compute, rollout):
    """Yield the arguments of scores_of for every batch, without waiting for the device."""
    n_steps = compute.steps or model.cfg.halt_max_steps
    # without examples, one batch of padding, which gives empty Scores
    for start in range(0, max(1, len(examples)), batch_size):
        part = examples[start : start + batch_size]
        batch = load_batch(model, split, canvas, part, batch_size)
        # the first try has no noise; a seed depends on the example and the try, not on the batch
        seeds = []
        if rollout:
            seeds = (rollout * len(split) + np.resize(part, batch_size)).tolist()
        exact = []
        for heads in supervision_steps(
            model,
            batch.inputs,
            batch.puzzle_ids,
            n_steps,
            compute.noise,
            seeds,
        ):
            exact.append(all_exact(model.cfg, heads[0], batch.labels))
        steps = torch.full((batch_size,), n_steps)
        yield part, slice(len(part)), batch, heads, steps, exact


def run_until_halt(model, split, canvas, examples, batch_size, compute, rollout):
    """Yield the arguments of scores_of for the rows that end at a step, because q_halt is above the threshold
    or all steps are done. Waiting examples take their slots: batches stay full and keep their shape. Without
    noise."""
    waiting = iter(examples.tolist())
    # the example in each row of the batch; -1: none
    slots = np.full(batch_size, -1)
    ended = np.arange(batch_size)
    carry = None
    while True:
        # ---- waiting examples take the rows that ended
        slots[ended] = [next(waiting, -1) for _ in ended]
        if carry and slots.max() < 0:
            return
        # rows without an example run example 0, and their answers are not used
        batch = load_batch(model, split, canvas, slots.clip(0), batch_size)

        # ---- one supervision step, in which the halted rows of the carry take the rows of the batch
        with torch.no_grad():
            carry = carry or model.initial_carry(batch)
            carry, logits, q = model.step(carry, batch, max_steps=compute.steps)
        halted = carry.halted | (q[:, 0] > compute.halt_threshold)
        carry = carry._replace(halted=halted)

        # ---- the halted rows leave; this waits for the device, once per step
        ended = np.flatnonzero(halted.cpu().numpy() & (slots >= 0))
        exact = all_exact(model.cfg, logits, carry.labels)
        yield slots[ended], ended, carry, (logits, q), carry.steps, [exact]


def scores_of(cfg, split, canvas, examples, rows, batch, heads, steps, exact_by_step):
    """Scores of the examples in the given rows (slice or numbers) of a batch; the other rows are not used.

    batch: a Batch or Carry. heads: logits and q after the last step. exact_by_step: tensors (B,).
    The only place that waits for the device when all rows run all steps."""
    logits, q = heads
    scored = score_rows(cfg, logits, batch.labels)
    preds = predictions(cfg, logits)
    optimal_path = scored.exact
    if split.task == "maze":
        optimal_path = optimal_paths(batch.inputs, batch.labels, preds)
    exact_by_step = torch.stack(exact_by_step, 1)
    # to the host, in the order of Scores
    columns = (preds, *scored, optimal_path, q[:, 0], steps, exact_by_step)
    arrays = [column[rows].cpu().numpy() for column in columns]
    scores = Scores(examples, *arrays, fits_canvas=np.ones(len(examples), bool))
    if canvas:
        # an answer is wrong if its target was cut, that is, if colours (tokens above 1) are missing
        n_colours = [(split.gather(examples, canvas=side)[1] > 1).sum(1) for side in (0, canvas)]
        fits_canvas = n_colours[0] == n_colours[1]
        scores = scores._replace(
            preds=paste_top_left(scores.preds, SIDE),
            exact=scores.exact & fits_canvas,
            exact_by_step=scores.exact_by_step & fits_canvas[:, None],
            fits_canvas=fits_canvas,
        )
    return scores


class Evaluation(NamedTuple):
    """The same on every rank, and for any number of ranks."""

    # exact_acc, cell_acc, lm_loss, ... (model.metric_names) and, for ARC, pass@K
    metrics: dict
    # without preds, unless they are asked for
    scores: Scores
    # ArcVotes for ARC, else None
    votes: object


def evaluate(
    model,
    split,
    world,
    batch_size,
    limit=None,
    max_aug=None,
    compute=ALL_STEPS_ONCE,
    keep_preds=False,
):
    """Evaluation of the model with its current weights.

    limit: score the first examples only. max_aug: score the originals and so many of their augmentations."""
    examples = np.arange(len(split))
    if max_aug is not None:
        # the first puzzle of a group is the original, the others are its augmentations
        originals = split.group_indices[split.group_of(examples)]
        examples = examples[split.puzzle_of(examples) - originals <= max_aug]
    examples = examples[:limit]
    scores = score(model, split, world, batch_size, examples, compute)

    # ---- ARC: the answers to all augmented copies of a puzzle vote
    votes, metrics = None, {}
    puzzles = load_test_puzzles(split)
    if puzzles:
        votes = ArcVotes(puzzles, split.names, partial=len(examples) < len(split))
        # inputs are read again in parts, because all of them may not fit into memory
        for start in range(0, len(scores.examples), 4096):
            part = slice(start, start + 4096)
            inputs, _, puzzle_ids = split.gather(scores.examples[part])
            votes.add(inputs, scores.preds[part], scores.q_halt[part], puzzle_ids, scores.examples[part])
        votes.merge(world.all_gather_object(votes.votes))
        metrics = votes.result()

    # ---- the scores of all ranks; preds are large
    if not keep_preds:
        scores = scores._replace(preds=scores.preds[:, :0])
    scores = joined(world.all_gather_object(scores))
    metrics |= summary(model.cfg, scores, split.task)
    if split.canvases.any():
        metrics["cut_answers"] = int((~scores.fits_canvas).sum())
    return Evaluation(metrics, scores, votes)


# ---------------------------------------------------------------------------------------------
# Metrics


def all_exact(cfg, logits, labels):
    """(B,) bool: RowScores.exact, without the cost of the loss."""
    if cfg.regression:
        return score_rows(cfg, logits, labels).exact
    correct = logits.argmax(-1) == labels
    ignored = labels == IGNORE_LABEL
    return (correct | ignored).all(-1)


def optimal_paths(inputs, labels, preds):
    """(B,) bool: the answer to a maze is a shortest path from S to G. Mazes have many, and exact_acc accepts
    only the one of the label. All arguments are (B, S) tokens of square mazes.

    No search is needed, because the label is a shortest path. An answer is one, too, if
    (a) every cell equals the question's, or is PATH where the question is FREE;
    (b) it has as many path cells as the label;
    (c) among the path cells, S and G, each path cell has exactly two neighbours, S and G exactly one.
    By (c), the cells connected to S are a simple path that can only end in G. It has at least as many cells
    as a shortest path, so by (b) there are no others. Conversely, (c) holds for every shortest path: if two
    of its cells were neighbours without being consecutive, it could be shortened."""
    path = preds == PATH
    on_free_cell = path & (inputs == FREE)
    allowed = on_free_cell | (preds == inputs)
    same_length = path.sum(1) == (labels == PATH).sum(1)
    ends = (inputs == START) | (inputs == GOAL)
    cells = path | ends
    # the number of neighbours, as a convolution over the grid
    side = isqrt(inputs.shape[1])
    grid = cells.view(-1, 1, side, side).float()
    cross = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]], device=grid.device)
    neighbours = F.conv2d(grid, cross[None, None], padding=1).flatten(1)  # (B, S)
    expected = torch.where(ends, 1, 2)
    unbroken = ~cells | (neighbours == expected)
    return allowed.all(1) & same_length & unbroken.all(1)


def summary(cfg, scores, task):
    """{metric: mean over the examples whose answer is known}, and n, the number of these examples."""
    known = Scores(*(column[scores.n_labels > 0] for column in scores))
    if not len(known.examples):
        return {"n": 0}
    names = metric_names(cfg)
    # binary cross-entropy of a logit, as in model.act_loss
    wrong_way = np.where(known.exact, -known.q_halt, known.q_halt)
    columns = {
        names.exact: known.exact,
        names.cell_acc: known.cell_acc,
        names.loss: known.loss,
        "q_halt_acc": (known.q_halt >= 0) == known.exact,
        "q_halt_loss": np.logaddexp(0, wrong_way),
        "steps": known.steps,
    }
    if task == "maze":
        columns["optimal_path_acc"] = known.optimal_path
    metrics = {name: float(np.mean(column)) for name, column in columns.items()}
    metrics["n"] = len(known.examples)
    return metrics


# ---------------------------------------------------------------------------------------------
# ARC voting

PASS_K = (1, 2, 5, 10, 100, 1000)
# share of all test inputs that are solved within two attempts, whichever puzzle they belong to
POOLED = "pass@2 of test inputs"


def load_test_puzzles(split):
    """{puzzle id: {"train": ..., "test": [{input, output}]}} from test_puzzles.json of the split's folders;
    {} if the split is not ARC. Outputs are missing in hidden test sets."""
    puzzles = {}
    for folder in split.dirs:
        file = folder / "test_puzzles.json"
        if file.exists():
            puzzles |= read_json(file)
    return puzzles


def grid_key(grid):
    """A grid as bytes, which can be compared and hashed: its number of columns, then its cells."""
    grid = np.asarray(grid, np.uint8)
    return bytes([grid.shape[-1]]) + grid.tobytes()


def key_grid(key):
    """The grid of a key as a list of rows."""
    columns = key[0]
    if columns == 0:
        return []
    return np.frombuffer(key, np.uint8, offset=1).reshape(-1, columns).tolist()


def unaugmented(tokens, names):
    """Keys of the grids in (N, 900) tokens, cropped and without their augmentations.

    names: N results of prepare.arc.parse_name, which contain the augmentations."""
    keys = []
    canvases = tokens.astype(np.uint8).reshape(-1, SIDE, SIDE)
    for canvas, height, width, (_, transform, colours) in zip(canvases, *crop(tokens), names):
        grid = dihedral(canvas[:height, :width], DIHEDRAL_INVERSE[transform])
        # from a token to the colour in the original puzzle: one lookup per cell
        original_colours = bytes.maketrans(colours.translate(TO_TOKEN), ORIGINAL)
        cells = grid.tobytes().translate(original_colours)
        keys.append(bytes([grid.shape[1]]) + cells)
    return keys


class ArcVotes:
    """Votes for the test outputs of ARC puzzles.

    Each answer to an augmented copy of a puzzle is one vote, for the test input that its own input is without
    the augmentation. Every rank adds its own examples, and merge() takes the votes of all ranks, so that the
    result is the same for any number of ranks.

    test_puzzles: from load_test_puzzles. identifiers: names of the rows of the puzzle table.
    partial: test inputs without any votes do not count."""

    def __init__(self, test_puzzles, identifiers, partial=False):
        self.identifiers = identifiers
        self.partial = partial
        # {(puzzle id, key of a test input): number}; equal inputs of a puzzle are one question
        self.questions = {}
        # {puzzle id: [(number of the question, key of the output or None)]}
        self.tests = {}
        for name, puzzle in test_puzzles.items():
            self.tests[name] = []
            for pair in puzzle["test"]:
                question = (name, grid_key(pair["input"]))
                number = self.questions.setdefault(question, len(self.questions))
                output = grid_key(pair["output"]) if "output" in pair else None
                self.tests[name].append((number, output))
        # (example, number of the question, key of the answer, probability of halting)
        self.votes = []

    def add(self, inputs, preds, q_halt, puzzle_ids, examples):
        """Add a batch: inputs and preds (B, 900) tokens, q_halt (B,) logits, puzzle_ids (B,), examples (B,)
        example numbers. Raises UserError for an unknown test input."""
        names = [parse_name(self.identifiers[i]) for i in puzzle_ids]
        questions = unaugmented(inputs, names)
        answers = unaugmented(preds, names)
        # sigmoid, in a form that cannot overflow
        p_halt = np.exp(-np.logaddexp(0, -q_halt.astype(np.float64)))
        rows = zip(examples.tolist(), names, questions, answers, p_halt.tolist())
        for example, (name, _, _), question, answer, p in rows:
            number = self.questions.get((name, question))
            message = f"test_puzzles.json lacks a test input of {name}; rebuild it with prepare/arc.py"
            require(number is not None, message)
            self.votes.append((example, number, answer, p))

    def merge(self, votes_of_ranks):
        """Rank the answers to every question by (number of votes, mean probability of halting); of equal
        answers, the one of the first example comes first."""
        # per question {answer: probabilities, one per vote}
        tallies = [{} for _ in self.questions]
        for _, number, answer, p in sorted(chain(*votes_of_ranks)):
            tallies[number].setdefault(answer, []).append(p)
        # per question its answers, best first
        self.candidates = []
        for tally in tallies:
            strength = {answer: (len(p), sum(p) / len(p)) for answer, p in tally.items()}
            self.candidates.append(sorted(strength, key=strength.get, reverse=True))

    def ranks(self):
        """One array per puzzle with known outputs: the rank of each output among the candidates, from 0;
        infinity if it is not one of them."""
        puzzles = []
        for tests in self.tests.values():
            ranks = []
            for number, output in tests:
                candidates = self.candidates[number]
                if output is not None and (candidates or not self.partial):
                    ranks.append(candidates.index(output) if output in candidates else np.inf)
            if ranks:
                puzzles.append(np.array(ranks))
        return puzzles

    def result(self):
        """{"pass@K": mean over puzzles of the share of test inputs that are solved within K attempts}, which
        is the official score, and POOLED. {} if no output is known."""
        puzzles = self.ranks()
        if not puzzles:
            return {}
        metrics = {}
        for k in PASS_K:
            solved = [np.mean(ranks < k) for ranks in puzzles]
            metrics[f"pass@{k}"] = float(np.mean(solved))
        metrics[POOLED] = float(np.mean(np.concatenate(puzzles) < 2))
        return metrics

    def submission(self):
        """{puzzle id: [{"attempt_1": grid, "attempt_2": grid}]} for every test input. A single candidate is
        both attempts; without candidates they are [[0]]."""
        answers = {}
        for name, tests in self.tests.items():
            answers[name] = []
            for number, _ in tests:
                best_two = self.candidates[number][:2]
                grids = [key_grid(key) for key in best_two] or [[[0]]]
                answers[name].append({"attempt_1": grids[0], "attempt_2": grids[-1]})
        return answers


# ---------------------------------------------------------------------------------------------
# Intervals and the RESULT line

# the metrics in a RESULT line, in this order
RESULT_METRICS = (
    "pass@1",
    "pass@2",
    "exact_acc",
    "optimal_path_acc",
    "cell_acc",
    "regression_loss",
    "mae",
    "within_tolerance",
)


def wilson_interval(p, n):
    """95% Wilson score interval (low, high) of a proportion p of n."""
    # 1.96 standard deviations
    a = 1.96**2 / n
    centre = (p + a / 2) / (1 + a)
    half_width = math.sqrt(a * (p * (1 - p) + a / 4)) / (1 + a)
    return max(0.0, centre - half_width), centre + half_width


def intervals(cfg, metrics, votes):
    """{"95% interval of METRIC": [low, high]} of the metrics that are proportions.

    For ARC over test inputs: augmented copies of a puzzle are not independent, and the official pass@2 is a
    mean of shares, for which the Wilson interval is not made."""
    names = [metric_names(cfg).exact, "optimal_path_acc"]
    n = metrics["n"]
    if POOLED in metrics:
        names = [POOLED]
        n = len(np.concatenate(votes.ranks()))
    found = {}
    for name in names:
        if name in metrics:
            low, high = wilson_interval(metrics[name], n)
            found[f"95% interval of {name}"] = [round(low, 4), round(high, 4)]
    return found


def result_line(preset, results, steps, train_flops, train_s, device):
    """The last line of a run: `RESULT preset=mini exact_acc=0.9980 ... train_pflop=0.31 ...`.

    results: {metric: value}. train_flops: FLOPs of the whole run. train_s: seconds."""
    words = [f"RESULT preset={preset}"]
    for name in RESULT_METRICS:
        if name in results:
            words.append(f"{name}={results[name]:.4f}")
    words.append(f"n={results['n']} steps={steps} train_pflop={train_flops / 1e15:.4g}")
    words.append(f"train_s={train_s:.1f} device={device}")
    return " ".join(words)


# ---------------------------------------------------------------------------------------------
# Load a model and its data


class LoadedModel(NamedTuple):
    """A model in evaluation mode and where it comes from."""

    model: TRM
    path: Path
    # of the checkpoint file; see hub.load_weights
    content: dict
    # the test split; None if it is not needed
    split: Split | None


def checkpoint_flags(add):
    """Add the flags that choose a model and its data. tools/solve.py has them, too."""
    count = bounded(int, 1)
    add("--checkpoint", metavar="PATH", help="run folder (its newest checkpoint) or checkpoint file")
    add("--hf", metavar="OWNER/REPO[/FILE]", help="published weights on the Hugging Face hub")
    add("--data", nargs="+", metavar="DIR", help="dataset folders")
    add("--canvases", nargs="+", type=count, metavar="N", help="ARC: sides of the canvases")
    for name in ("H_cycles", "L_cycles", "num_heads", "puzzle_emb_len"):
        add("--" + name.replace("_", "-"), **hub.FIELDS[name].metadata)
    add("--dtype", choices=["bfloat16", "float32"], help="precision of the activations")
    add("--ema", action=argparse.BooleanOptionalAction, default=True, help="use the averaged (EMA) weights")
    add(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        default="auto",
        help="device (auto: cuda, then mps, then cpu)",
    )


def load_model(args, world, reset=False, needs_data=True):
    """LoadedModel for the flags of checkpoint_flags. Raises UserError.

    reset: replace every row of the puzzle table by the mean row.
    needs_data: if False, the test split is loaded only with --data."""
    require(bool(args.checkpoint) != bool(args.hf), "pass either --checkpoint or --hf")
    # ---- the file: every rank maps it into memory, and none reads m, v or the carry
    if args.hf:
        path, settings, folder = hub.fetch(args.hf, world)
    else:
        path, settings, folder = find_checkpoint(args.checkpoint), {}, None
    content = hub.load_weights(path, verify=world.rank == 0)
    for name, value in vars(args).items():
        if name in hub.FIELDS and value is not None:
            settings[name] = value

    # ---- the test split
    split, seq_len = None, None
    if needs_data or args.data:
        split = load_test_split(args, world, content, folder)
        seq_len = split.meta["seq_len"]

    # ---- the model
    cfg, state = hub.read_model(content, settings, seq_len, args.ema)
    if split:
        check_dataset(content, cfg, split, reset)
    model = build_model(cfg, state).to(world.device)
    if reset:
        model.puzzle_emb = model.puzzle_emb.mean(0).expand(len(split.names), -1)
    return LoadedModel(model.eval(), path, content, split)


def load_test_split(args, world, content, folder):
    """The test split of --data, by default that of the checkpoint or, for published weights, `folder`, which
    is built if it is missing."""
    dirs = args.data or content.get("data_test") or [folder]
    require(dirs[0], "the checkpoint does not name its dataset; pass --data DIR")
    known = prepare.known_dataset(dirs[0])
    if args.hf and known and known.folder == dirs[0]:
        prepare.build_if_missing(dirs[0], world)
    # The puzzle table begins with the puzzles of the training folders, so they number those of dirs, too.
    train_dirs = content.get("data") or dirs
    if not all(Path(folder).exists() for folder in train_dirs):
        train_dirs = dirs
    # for latent episodes; other datasets have one length
    seq_len = content["config"].get("seq_len")
    split = Split(train_dirs, "test", dirs, seq_len)
    canvases = args.canvases or content.get("settings", {}).get("canvases")
    if canvases:
        assign_canvases(Split(train_dirs, "train", dirs, seq_len), split, canvases)
    return split


def check_dataset(content, cfg, split, reset):
    """Raise UserError if the shapes of the dataset are not those of the model, or if the rows of the puzzle
    table mean other puzzles. reset: they are all equal."""
    folder = split.dirs[0]
    for name in ("seq_len", "vocab_size", "input_dim", "target_dim"):
        expected = getattr(cfg, name)
        same = split.meta.get(name, 0) == expected
        require(
            same,
            f"{folder} does not have the checkpoint's {name} {expected}; change --data or --puzzle-emb-len",
        )
    same_puzzles = content.get("puzzle_ids_sha256") in (None, split.puzzle_ids_sha256)
    require(
        reset or (same_puzzles and cfg.num_puzzles == len(split.names)),
        f"{folder} has other puzzles than the checkpoint's puzzle table; change --data, or use the table's "
        f"mean row for every puzzle with --reset-puzzle-emb",
    )


# ---------------------------------------------------------------------------------------------
# Command line


def flags():
    parser = Parser(__doc__)
    count = bounded(int, 1)
    add = parser.add_argument_group("model and data (default: as stored in the checkpoint)").add_argument
    checkpoint_flags(add)
    add("--reset-puzzle-emb", action="store_true", help="use the table's mean row for every puzzle")

    add = parser.add_argument
    add("--limit", type=count, metavar="N", help="score the first N examples only")
    add("--max-aug", type=bounded(int, 0), metavar="N", help="ARC: score at most N augmentations per puzzle")
    add(
        "--min-exact",
        type=bounded(float, 0, 1),
        default=0.0,
        metavar="X",
        help="exit with 1 if exact_acc is below X",
    )
    add("--output", metavar="DIR", help="folder for the results (default: beside the checkpoint)")
    add("--save-preds", action="store_true", help="write predictions.npz")
    add("--show", type=count, metavar="N", help="draw N test puzzles to show.png")
    add("--batch-size", type=count, metavar="N", help="rows per batch of a rank (default: by device)")
    add("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile (default: on a GPU)")

    group = parser.add_argument_group("test-time compute")
    add = group.add_argument
    add("--steps", type=count, metavar="N", help="supervision steps (default: N_sup of the checkpoint)")
    add("--noise", type=bounded(float, 0), default=0.3, metavar="X", help="noise in y and z of rollouts")
    add("--halt-threshold", type=float, default=0.0, metavar="Q", help="threshold of --halt")
    add = group.add_mutually_exclusive_group().add_argument
    add("--rollouts", type=count, default=1, metavar="K", help="try K times, keep the highest q_halt")
    add("--halt", action="store_true", help="stop a puzzle once q_halt is above the threshold")
    return parser


def measure(args, world, loaded):
    """(Evaluation, content of results.json) for the flags of main()."""
    model, split = loaded.model, loaded.split
    on_gpu = world.device.type == "cuda"
    if args.compile or (args.compile is None and on_gpu and not missing_compiler(world.device)):
        compile_model(model)
    # 768 as published; on a CPU so many rows that their states fit the caches
    n_cells = int(split.canvases.max()) ** 2 or model.cfg.seq_len
    cpu_size = 4096 // (model.cfg.puzzle_emb_len + n_cells)
    batch_size = args.batch_size or (768 if on_gpu else max(1, cpu_size))
    halt_threshold = args.halt_threshold if args.halt else None
    compute = TestTimeCompute(args.steps, halt_threshold, args.rollouts, args.noise)
    keep_preds = args.save_preds or args.show

    # ---- score
    start = time.perf_counter()
    evaluation = evaluate(model, split, world, batch_size, args.limit, args.max_aug, compute, keep_preds)
    metrics, scores, votes = evaluation

    # ---- the scores, and how they came about
    results = {
        "metrics": metrics,
        "checkpoint": str(loaded.path),
        "averaged weights": bool(args.ema and loaded.content.get("ema")),
        "data": " ".join(map(str, split.dirs)),
        "rows": f"{len(scores.examples)} of {len(split)}",
        "device": f"{world.size} x {world.device.type}",
        "batch size per rank": batch_size,
        "seconds": time.perf_counter() - start,
        "test_time_compute": compute._asdict(),
        "config": asdict(model.cfg),
    }
    if metrics["n"]:
        exact_acc = scores.exact_by_step[scores.n_labels > 0].mean(0)
        results["exact after each step"] = exact_acc.round(4).tolist()
    results |= intervals(model.cfg, metrics, votes)
    return evaluation, results


def run(args, world):
    """Score the checkpoint, write and print the results. Returns the exit code."""
    loaded = load_model(args, world, reset=args.reset_puzzle_emb)
    cfg, split = loaded.model.cfg, loaded.split

    # ---- find out now, not after hours, whether the files can be written
    folder = args.output or loaded.path.parent
    if args.hf and not args.output:
        # not into the cache of the hub
        folder = "runs/eval-" + args.hf.replace("/", "-")
    is_part = args.limit or args.max_aug is not None
    output = f"{folder}/part-" if is_part else f"{folder}/"
    if world.rank == 0:
        write_file(f"{output}test", b"")
        Path(f"{output}test").unlink()

    # ---- score
    (metrics, scores, votes), results = measure(args, world, loaded)
    if world.rank:
        return 0

    # ---- files first, because stdout may be closed; then print, even if the disk is full
    try:
        write_json(f"{output}results.json", results)
        if votes:
            write_json(f"{output}submission.json", votes.submission())
        if args.save_preds:
            with replacing(f"{output}predictions.npz") as tmp, open(tmp, "wb") as f:
                np.savez(f, **scores._asdict())
        if args.show:
            path = f"{output}show.png"
            draw.try_to_draw(print, draw.draw_examples, cfg, split.task, path, split, scores, args.show)
    finally:
        print_results(results)
    too_low = metrics.get(metric_names(cfg).exact, 0.0) < args.min_exact
    if too_low:
        print(f"exact_acc is below --min-exact {args.min_exact}", file=sys.stderr)
    return int(too_low)


def print_results(results):
    for name, value in (results["metrics"] | results).items():
        if not isinstance(value, dict):
            text = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{name:<37} {text}")


def main(argv=None):
    args = flags().parse_args(argv)
    # 2 hours: rank 0 may download weights and build a dataset while the others wait
    world = start_world(args.device, timeout_s=7200)
    try:
        return run(args, world)
    finally:
        world.close()


if __name__ == "__main__":
    cli(main)
