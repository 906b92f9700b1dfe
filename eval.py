"""Score a checkpoint.

    python eval.py --checkpoint runs/mini-...     a run folder, or a file
    python eval.py --hf alphaXiv/trm-model-maze   published weights
    torchrun --nproc_per_node=8 eval.py ...       the same figures, faster
    python eval.py --compare A/results.json B/results.json

Figures go to results.json, on ARC the answers to submission.json; of a part of
the test split (--limit, --max-aug) to part-results.json and so on, which never
replace those of all of it.
"""
import argparse
import hashlib
import sys
import time
from dataclasses import replace
from io import BytesIO
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import common  # noqa: F401  before torch, for a Ctrl-C while that is imported
import numpy as np
import torch

import draw
import hub
import prepare
from common import Parser, UserError, cli, compiler_lacks, one_line, progress, start_world, \
    within, write, write_json
from data import Split, dihedral, on_the_board, prefetch, put_on_canvases
from model import IGNORE, TRM, Batch, build, compile_model, metric_names, row_scores
from prepare import sudoku
from results import compare, intervals, table
from rundir import find_file
from vote import ArcVotes, test_puzzles


class Effort(NamedTuple):
    """Compute at test time. Only one of halt, rollouts and augment at once."""
    steps: int | None = None        # supervision steps, halt_max_steps by default
    halt: float | None = None       # a row stops when its q_halt is above this
    rollouts: int = 1               # tries; all but the first with noise
    noise: float = 0.0              # standard deviation, of what is added to the states before every step
    augment: int = 0                # copies under symmetries beside the original

    def of(self, cfg):
        return self.steps or cfg.halt_max_steps


PLAIN = Effort()        # all steps, once

# ---------------------------------------------------------------------------------------------
# Thinking

def think(model, inputs, puzzle_ids, steps, noise=0.0, generator=None):
    """Yield (logits (B, S, V), q (B, 2)) after each of `steps` supervision steps; x is embedded once."""
    def blur(h):
        if not noise:
            return h
        return h + noise * torch.randn(h.shape, generator=generator, device=h.device, dtype=h.dtype)

    with torch.no_grad():  # not inference_mode: training's compiled graphs are used again
        x = model.embed(inputs, model.puzzle_emb[puzzle_ids])                        # (B, L, D)
        # contiguous, as all that follow: a compiled net would else be compiled once more
        y, z = (start.to(model.dtype).expand_as(x).contiguous() for start in (model.y0, model.z0))
    for _ in range(steps):
        with torch.no_grad():  # left before every yield, for what runs meanwhile
            y, z = model.improve(x, blur(y), blur(z))
            heads = model.heads(y)
        yield heads


def last_thought(*args, **kwargs):
    """(logits, q) after the last step of think(...)."""
    for heads in think(*args, **kwargs):
        last = heads
    return last


def answer(cfg, logits):
    """Tokens (B, S) that the logits stand for; in regression the numbers (B, S, target_dim) as they are."""
    small = torch.uint8 if cfg.vocab_size < 256 else torch.int32
    return logits.float() if cfg.regression else logits.argmax(-1).to(small)


def thoughts(model, inputs, puzzle_ids, steps):
    """Boards (steps, B, ...) and q_halt (steps, B) after every supervision step, as numpy; inputs are
    arrays."""
    device = model.y0.device
    inputs, puzzle_ids = (torch.as_tensor(a, device=device) for a in (inputs, puzzle_ids))
    seen = [(answer(model.cfg, logits).cpu().numpy(), q[:, 0].cpu().numpy())
            for logits, q in think(model, inputs, puzzle_ids, steps)]
    return np.stack([board for board, _ in seen]), np.stack([q for _, q in seen])


def slow_puzzle(model, split, batch_size):
    """draw.Thoughts of the puzzle of the first batch that was wrong the longest, and right in the end."""
    rows = np.arange(min(batch_size, len(split)))
    sides = split.side_of(rows)
    rows = rows[sides == sides[0]]
    inputs, labels, ids = split.gather(rows, size=batch_size, side=int(sides[0]))
    boards, q = thoughts(model, inputs, ids, model.cfg.halt_max_steps)
    wrong = draw.wrong_cells(model.cfg, boards, labels)                              # (steps, B, S)
    wrong_ever = wrong.any(-1)[:, :len(rows)]                                        # (steps, rows)
    i = int(np.where(wrong_ever[-1], -1, wrong_ever.sum(0)).argmax())
    return draw.Thoughts(inputs[i], boards[:, i], wrong[:, i], q[:, i], labels[i])


# ---------------------------------------------------------------------------------------------
# Scoring

class Scores(NamedTuple):
    """Scored rows of a split in its order."""
    examples: np.ndarray        # (N,) which example of the split
    preds: np.ndarray           # (N, S) tokens or (N, S, target_dim), after the last step, as the next five
    loss: np.ndarray            # (N,)
    cell: np.ndarray            # (N,) share of right cells; regression: mean absolute error
    right: np.ndarray           # (N,) bool
    fits: np.ndarray            # (N,) bool, the answer fits its canvas
    n: np.ndarray               # (N,) cells asked; 0: nobody knows the answer
    q: np.ndarray               # (N,) logit of halting
    steps: np.ndarray           # (N,) supervision steps taken
    history: np.ndarray         # (N, steps) bool, right after each step; (N, 0) with halting


def joined(parts):
    """One Scores of several, in the order of the split."""
    columns = Scores(*map(np.concatenate, zip(*parts)))
    order = columns.examples.argsort(kind="stable")
    return Scores(*(c[order] for c in columns))


def to_host(cfg, rows, logits, labels, q, steps, history):
    """The Scores of one batch; the one place that waits for the device. rows: (b,), what lies behind is
    padding."""
    loss, cell, right, n = row_scores(cfg, logits, labels)
    columns = [answer(cfg, logits), loss, cell, right, torch.ones_like(right), n, q[:, 0],
               torch.full_like(n, 0) + steps, history]
    return Scores(rows, *(c.cpu().numpy()[:len(rows)] for c in columns))


def all_right(cfg, logits, labels):
    """(B,) bool: RowScores.right without the cost of the loss."""
    if cfg.regression:
        return row_scores(cfg, logits, labels).right
    return ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(-1)


def score(model, split, world, batch_size, examples, effort=PLAIN, quiet=False):
    """Scores of this rank's share of the examples. Every batch has batch_size rows, the last one is
    padded."""
    work, parts, sides = [], [], split.side_of(examples)
    for side in np.unique(sides):       # canvas by canvas, as a batch has one shape
        some = examples[sides == side]
        starts = range(world.rank * batch_size, len(some), world.size * batch_size)
        mine = [some[i:i + batch_size] for i in starts]
        work.append((int(side), mine or [some[:0]]))    # a rank without rows runs padding
    total = sum(len(rows) for _, batches in work for rows in batches)
    run = score_all_steps if effort.halt is None else score_halting
    with progress(quiet=quiet or world.rank > 0, total=total, desc="evaluating", unit="row") as bar:
        for side, batches in work:
            for part in run(model, split, side, batches, batch_size, effort):
                parts.append(whole_scores(split, side, part))
                bar.update(len(part.examples))
    return joined(parts)


def whole_scores(split, side, part):
    """The Scores of windows as those of whole boards: a prediction stands in the upper left corner of an
    empty one, and an answer that its window cuts is wrong."""
    cells = split.meta["seq_len"]
    if side in (0, isqrt(cells)):
        return part
    (_, whole, _), (_, window, _) = split.gather(part.examples), split.gather(part.examples, side=side)
    fits = (whole > 1).sum(1) == (window > 1).sum(1)        # all its colours are there
    return part._replace(preds=on_the_board(part.preds, isqrt(cells)), fits=fits, right=part.right & fits,
                         history=part.history & fits[:, None])


def score_all_steps(model, split, side, batches, batch_size, effort):
    """Yield the Scores of every batch of example numbers, after all steps."""
    cfg, device = model.cfg, model.y0.device
    read = ((rows, split.gather(rows, size=batch_size, side=side)) for rows in batches)
    for rows, arrays in prefetch(read):
        inputs, labels, ids = (torch.from_numpy(a).to(device) for a in arrays)
        history = []
        for logits, q in think(model, inputs, ids, effort.of(cfg)):     # noqa: B007
            history.append(all_right(cfg, logits, labels))
        logits, q = with_effort(model, split.kind, inputs, ids, effort, int(rows[:1].sum()), logits, q)
        yield to_host(cfg, rows, logits, labels, q, effort.of(cfg), torch.stack(history, 1))


def score_halting(model, split, side, batches, batch_size, effort):
    """As score_all_steps, but a row ends when its q_halt is above effort.halt, and the next one takes its
    slot: batches keep their shape and are full until no rows are left. Waits for the device once a step."""
    device, queue = model.y0.device, np.concatenate(batches)
    owner = np.full(batch_size, -1)                             # which example sits in a slot
    arrays = split.gather(queue[:0], size=batch_size, side=side)        # of padding
    carry, free = None, np.arange(batch_size)
    while carry is None or (owner >= 0).any() or len(queue):
        new, queue = queue[:len(free)], queue[len(free):]
        owner[free[:len(new)]] = new
        for array, rows in zip(arrays, split.gather(new, side=side)):
            array[free[:len(new)]] = rows
        batch = Batch(*(torch.from_numpy(a).to(device) for a in (*arrays, np.zeros(batch_size, np.int32))))
        with torch.no_grad():
            carry, logits, q = model.step(carry or model.empty_carry(batch), batch)
        carry = carry._replace(halted=(q[:, 0] > effort.halt) | (carry.steps >= effort.of(model.cfg)))
        free = np.flatnonzero(carry.halted.cpu().numpy())
        ended = free[owner[free] >= 0]
        done = torch.from_numpy(ended).to(device)
        no_history = torch.zeros(len(ended), 0, dtype=torch.bool)
        yield to_host(model.cfg, owner[ended], logits[done], carry.labels[done], q[done], carry.steps[done],
                      no_history)
        owner[ended] = -1


# ---------------------------------------------------------------------------------------------
# Tries and copies

def with_effort(model, kind, inputs, ids, effort, seed, logits, q):
    """(logits, q) of a plain pass to those of effort.rollouts tries or effort.augment copies. seed: of the
    noise."""
    if effort.augment:
        return vote_over_symmetries(model, kind, inputs, ids, effort, np.random.RandomState(seed), logits, q)
    generator = torch.Generator(q.device).manual_seed(seed)
    for _ in range(effort.rollouts - 1):    # the try with the highest q_halt wins; the first had no noise
        other, other_q = last_thought(model, inputs, ids, effort.of(model.cfg), effort.noise, generator)
        better = other_q[:, 0] > q[:, 0]
        logits = torch.where(better[:, None, None], other, logits)
        q = torch.where(better[:, None], other_q, q)
    return logits, q


def symmetries(kind, cfg, rng, n, k):
    """Symmetry number k > 0 for n boards: relabel (n, V) of tokens and cells (n, S), new =
    relabel[old[cells]]."""
    side = isqrt(cfg.seq_len)
    if kind == "sudoku":
        return sudoku.draw_symmetries(rng, n, side)
    cells = dihedral(np.arange(cfg.seq_len).reshape(side, side), k).ravel()
    return np.tile(np.arange(cfg.vocab_size), (n, 1)), np.tile(cells, (n, 1))


def vote_over_symmetries(model, kind, inputs, ids, effort, rng, logits, q):
    """Logits and q of the answer that most symmetric copies agree on (then: the most confident), copies
    undone."""
    tries, halts = [logits], [q]
    for k in range(1, effort.augment + 1):
        relabel, cells = (torch.as_tensor(a, dtype=torch.int64, device=q.device)
                          for a in symmetries(kind, model.cfg, rng, len(inputs), k))
        copies = relabel.gather(1, inputs.long().gather(1, cells)).to(inputs.dtype)
        other, other_q = last_thought(model, copies, ids, effort.of(model.cfg))
        back = cells.argsort(1)[..., None].expand_as(other)
        tries.append(other.gather(1, back).gather(2, relabel[:, None].expand_as(other)))
        halts.append(other_q)
    tries, halts = torch.stack(tries), torch.stack(halts)                            # (K, B, S, V), (K, B, 2)
    boards, sure, rank = tries.argmax(-1), halts[..., 0].sigmoid(), []
    for board in boards:
        same = (boards == board).all(-1)                                             # (K, B)
        votes = same.sum(0)
        rank.append(votes + 0.5 * (same * sure).sum(0) / votes)
    best = torch.stack(rank).argmax(0)                                      # (B,), the first of equals
    each = torch.arange(len(best), device=best.device)
    return tries[best, each], halts[best, each]


# ---------------------------------------------------------------------------------------------
# Evaluating

class Evaluation(NamedTuple):
    """The same on every rank and for every number of ranks, but for `mine`."""
    metrics: dict               # exact_acc, cell_acc, lm_loss, ..., on ARC pass@K; see model.metric_names
    scores: Scores              # of all ranks, without preds
    votes: ArcVotes | None      # on ARC
    mine: Scores                # of this rank, with preds


def evaluate(model, split, world, batch_size, limit=None, effort=PLAIN, examples=None, quiet=False):
    """Evaluation of the model, in its present weights, on the given rows of a split; by default the first
    `limit`."""
    examples = np.arange(len(split))[:limit] if examples is None else examples
    mine = score(model, split, world, batch_size, examples, effort, quiet)
    scores = joined(world.gather_objects(mine._replace(preds=mine.preds[:, :0])))
    metrics, votes, puzzles = summary(model.cfg, scores), None, test_puzzles(split)
    if puzzles is not None:
        votes = ArcVotes(puzzles, split.names, partial=len(examples) < len(split))
        for i in range(0, len(mine.examples), 4096):    # inputs are read again: not all fit into memory
            part = slice(i, i + 4096)
            inputs, _, ids = split.gather(mine.examples[part])
            votes.add(inputs, mine.preds[part], mine.q[part], ids, mine.examples[part])
        votes.merge(world.gather_objects(votes.payload()))
        metrics = votes.result() | metrics
    if split.sides.any():
        metrics["cut_answers"] = int((~scores.fits).sum())      # too large for their canvas
    return Evaluation(metrics, scores, votes, mine)


def summary(cfg, scores):
    """{metric: mean over the rows whose answer is known}; n is how many these are."""
    s, names = Scores(*(column[scores.n > 0] for column in scores)), metric_names(cfg)
    if not len(s.n):
        return {"n": 0}
    q_loss = np.logaddexp(0, s.q.astype(np.float64)) - s.q * s.right
    columns = {names.right: s.right, names.cell: s.cell, names.loss: s.loss,
               "q_halt_acc": (s.q >= 0) == s.right, "q_halt_loss": q_loss, "steps": s.steps}
    return {**{name: float(c.mean(dtype=np.float64)) for name, c in columns.items()}, "n": len(s.n)}


# ---------------------------------------------------------------------------------------------
# A checkpoint and its data

class Opened(NamedTuple):
    """A model that is ready to answer, and where it came from."""
    model: TRM
    path: Path
    content: dict           # of the file; see train.Run.checkpoint for ours
    split: Split | None     # the test split
    kind: str | None        # of the boards: "sudoku", "maze", "arc", "numbers", "tokens"; None: nobody knows


def checkpoint_flags(add):
    """The flags that say which model; shared with solve.py."""
    count = within(int, 1)
    add("--checkpoint", metavar="PATH", help="run folder (its newest) or checkpoint file")
    add("--hf", metavar="OWNER/REPO[/FILE]", help="published weights from the hub")
    add("--data", nargs="+", metavar="DIR", help="dataset folders; default: the checkpoint's")
    add("--canvases", nargs="+", type=count, metavar="N", help="ARC; default: the checkpoint's")
    add("--H-cycles", type=count, metavar="T", help="overrides the checkpoint")
    add("--L-cycles", type=count, metavar="n", help="likewise")
    add("--num-heads", type=count, metavar="N", help="likewise")
    add("--puzzle-emb-len", type=within(int, 0), metavar="P", help="likewise")
    add("--dtype", choices=["bfloat16", "float32"], help="likewise")
    add("--ema", action=argparse.BooleanOptionalAction, default=True, help="averaged weights, not the last")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="to run on")


def open_model(args, world, needs_data=True, reset=False):
    """Opened, by the flags of checkpoint_flags. needs_data: False opens the test split only if it is there.
    reset: replace the puzzle table by its mean row. Raises UserError."""
    if bool(args.checkpoint) == bool(args.hf):
        raise UserError("give one of --checkpoint and --hf")
    path, settings, known = hub.fetch(args.hf, world) if args.hf else (find_file(args.checkpoint), {}, None)
    settings |= {k: v for k, v in vars(args).items() if k in hub.FIELDS and v is not None}
    content = hub.load_weights(path)
    dataset = prepare.KNOWN.get(known)
    dirs = args.data or content.get("data_test") or ([dataset.folder] if dataset else [])
    if not dirs and needs_data:
        raise UserError("--data is missing: this checkpoint does not say which dataset it is for")
    split = None
    if needs_data or dirs and all(Path(d).exists() for d in dirs):
        if dataset and dirs == [dataset.folder]:
            prepare.ensure(dataset.folder, world)
        split = open_split(dirs, content, args.canvases)
    cfg, state = hub.read_model(content, settings, split.meta["seq_len"] if split else None, args.ema)
    if split and reset:
        cfg = replace(cfg, num_puzzles=split.meta["num_puzzle_identifiers"])
        state["puzzle_emb"] = state["puzzle_emb"].mean(0).repeat(cfg.num_puzzles, 1)
    if split:
        must_fit(content, cfg, split, reset)
    recipes = [{"builder": dataset.builder}] if dataset else content.get("recipe", [])
    kind = split.kind if split else "numbers" if cfg.regression else prepare.board_kind(recipes)
    return Opened(build(cfg, state).to(world.device).eval(), path, content, split, kind)


def open_split(dirs, content, canvases=None):
    """The test split in `dirs`, its puzzles numbered as in training, as far as the data of that are there.
    canvases: by default those of the training."""
    recipes = dict(zip(content.get("data", []), content.get("recipe", [])))
    prepare.must_exist(dirs, recipes)
    trained = [d for d in content.get("data", []) if Path(d).exists()]
    trained = trained if len(trained) == len(content.get("data", [])) else []
    length = content.get("config", {}).get("seq_len")
    split = Split(trained or dirs, "test", dirs, length)
    canvases = canvases or content.get("settings", {}).get("canvases")
    if canvases:
        put_on_canvases(Split(trained or dirs, "train", dirs, length), split, canvases)
    return split


def must_fit(content, cfg, split, reset):
    """Refuse a dataset that the checkpoint was not made for. Raises UserError."""
    dirs, rows = " ".join(map(str, split.dirs)), split.meta["num_puzzle_identifiers"]
    for name in ("seq_len", "vocab_size", "input_dim", "target_dim"):
        found, asked = split.meta.get(name, 0), getattr(cfg, name)
        if found != asked:
            raise UserError(f"{dirs} has {name} {found}, the checkpoint {asked}; give its own dataset with "
                            f"--data")
    if reset:
        return
    cure = "give its dataset with --data, or --reset-puzzle-emb to replace every row by the mean row"
    if content.get("identity", split.identity) != split.identity:
        sums = f"its identifiers.json has sha256 {split.identity[:12]}, not {content['identity'][:12]}"
        raise UserError(f"the puzzles of {dirs} are not those the checkpoint was trained on, "
                        f"{' '.join(content['data'])} ({sums}); {cure}")
    if cfg.num_puzzles != rows:
        raise UserError(f"the checkpoint's table has {cfg.num_puzzles:,} rows, {dirs} has {rows:,} "
                        f"identifiers; {cure}")


def choose_examples(split, limit, max_aug):
    """The rows to score (n,), and what to call them when they are not all (else None)."""
    examples, part = np.arange(len(split)), []
    if max_aug is not None:
        number = split.puzzle_of(examples) - split.group_indices[split.group_of(examples)]
        examples = examples[number <= max_aug]
        part.append(f"{max_aug} augmentations a puzzle")
    if limit is not None and limit < len(examples):
        part.append(f"the first {limit:,} of {len(examples):,} rows")
        examples = examples[:limit]
    return examples, ", ".join(part) or None


# ---------------------------------------------------------------------------------------------
# The command line

def flags():
    parser = Parser(__doc__)
    onoff, count = argparse.BooleanOptionalAction, within(int, 1)
    add = parser.add_argument_group("what").add_argument
    checkpoint_flags(add)
    add("--output", metavar="DIR", help="default: beside the checkpoint, or runs/eval-REPO")
    add("--reset-puzzle-emb", action="store_true", help="every row of the puzzle table = their mean")
    add = parser.add_argument_group("score").add_argument
    add("--limit", type=count, metavar="N", help="the first N rows only")
    add("--max-aug", type=within(int, 0), metavar="N", help="ARC: N augmentations a puzzle")
    add("--min-exact", type=within(float, 0, 1), metavar="X", help="exit 1 when exact_acc is below")
    add("--save-preds", action="store_true", help="write predictions.npz")
    add("--show", type=count, metavar="N", help="draw N test puzzles: show.png")
    add("--compare", nargs=2, metavar=("A", "B"), help="two results.json: is B better?")
    add = parser.add_argument_group("compute at test time").add_argument
    add("--steps", type=count, metavar="N", help="supervision steps")
    add("--halt", action="store_true", help="stop a row when it is sure, fill its slot")
    add("--halt-threshold", type=within(float, -1e9, 1e9), default=0.0, metavar="Q",
        help="of --halt: q_halt above it is sure")
    add("--rollouts", type=count, default=1, metavar="K", help="tries; the surest wins")
    add("--noise", type=within(float, 0), default=0.0, help="on the states of tries 2 .. K")
    add("--augment", type=within(int, 0), default=0, metavar="K", help="vote with K symmetric copies")
    add = parser.add_argument_group("run").add_argument
    add("--batch-size", type=count, metavar="N", help="of one rank; default: by device")
    add("--compile", action=onoff, help="torch.compile; default: on a GPU")
    return parser


def effort_of(args):
    """The Effort that the flags ask for. Raises UserError for flags that do nothing, or not together."""
    if args.halt + (args.rollouts > 1) + (args.augment > 0) > 1:
        raise UserError("--halt, --rollouts and --augment: only one of them at once; leave the others out")
    if args.halt_threshold and not args.halt:
        raise UserError("--halt-threshold does nothing without --halt; add it")
    if (args.rollouts > 1) != (args.noise > 0):
        raise UserError(f"--rollouts {args.rollouts} --noise {args.noise}: tries differ by noise only; give "
                        f"both, for instance --rollouts 10 --noise 0.3")
    halt = args.halt_threshold if args.halt else None
    return Effort(args.steps, halt, args.rollouts, args.noise, args.augment)


def check_task(args, opened):
    """Flags that do something for some tasks only. Raises UserError."""
    arc = test_puzzles(opened.split) is not None
    for name, there in (("max_aug", arc), ("augment", opened.kind in ("sudoku", "maze"))):
        if getattr(args, name) and not there:
            raise UserError(f"--{name.replace('_', '-')} does nothing for {opened.split.dirs[0]}; leave it "
                            f"out")
    if args.augment > 7 and opened.kind == "maze":
        raise UserError(f"--augment {args.augment}: a maze has 7 symmetric copies; lower it")


def measure(args, world, opened, effort):
    """(results.json as a dict, Evaluation): everything that takes time."""
    model, split, cfg = opened.model, opened.split, opened.model.cfg
    examples, part = choose_examples(split, args.limit, args.max_aug)
    length = cfg.puzzle_emb_len + (int(split.sides.max()) ** 2 or cfg.seq_len)      # on the largest canvas
    size = args.batch_size or (768 if world.device.type == "cuda" else max(1, 2 ** 12 // length))
    on_gpu = world.device.type == "cuda"
    if args.compile or args.compile is None and on_gpu and not compiler_lacks(world.device):
        compile_model(model)
    n_params, curve = sum(p.numel() for p in model.parameters()), []
    averaged = args.ema and opened.content.get("ema")
    about = {"checkpoint": f"{opened.path}, {'averaged' if averaged else 'last'} weights",
             "data": " ".join(map(str, split.dirs)), "supervision steps": effort.of(cfg),
             "parameters": n_params, "with puzzle table": n_params + model.puzzle_emb.numel(),
             "device": f"{world.size} x {world.device.type}", "precision": cfg.dtype, "batch of a rank": size}
    of_each_side = examples[np.unique(split.side_of(examples), return_index=True)[1]]
    score(model, split, world, size, of_each_side, Effort(steps=1), quiet=True)     # compiles, allocates
    start = time.perf_counter()
    if args.halt:
        sample = examples[:10 * size * world.size]
        full = evaluate(model, split, world, size, None, Effort(args.steps), sample).metrics
        speed, right = len(sample) / (time.perf_counter() - start), metric_names(cfg).right
        known = f"{right} {full[right]:.4f}, " if right in full else ""
        about["without halting"] = f"{known}{speed:,.1f} rows/s, on the first {len(sample):,} rows"
        start = time.perf_counter()
    found = evaluate(model, split, world, size, None, effort, examples)
    about["seconds"] = time.perf_counter() - start
    about["rows/s"] = len(examples) / about["seconds"]
    if effort.rollouts == 1 and not effort.augment and effort.halt is None and found.metrics["n"]:
        curve = found.scores.history[found.scores.n > 0].mean(0).tolist()
    metrics = dict(found.metrics)
    if "pass@2" in metrics:
        metrics["pass@2 of test inputs"] = float((np.concatenate(found.votes.places()) < 2).mean())
    return {"metrics": metrics, "intervals": intervals(cfg, metrics, found.votes), "part": part,
            "exact_acc_by_step": curve, "about": about, "effort": effort._asdict(),
            "identity": split.identity}, found


def write_results(args, world, opened, results, found, output):
    """All files; True when each could be written. What is gathered here is gathered on every rank."""
    keep = args.save_preds or args.show
    mine = world.gather_objects(found.mine if keep else None)
    if world.rank:
        return True
    split, prefix = opened.split, "part-" if results["part"] else ""
    right, rows = found.scores.right, found.scores.examples
    if found.votes and found.votes.places():
        right = np.concatenate(found.votes.places()) < 2
        rows = np.arange(len(right))
    some = split.gather(found.scores.examples[:1000])[0]
    data = hashlib.sha256(some.tobytes()).hexdigest()       # tells --compare the same data
    files = {"results.json": lambda path: write_json(path, results),
             "right.npz": lambda path: write_npz(path, row=rows, right=right, data=data)}
    if found.votes:
        files["submission.json"] = lambda path: write_json(path, found.votes.submission())
    scores = joined(mine) if keep else None
    if args.save_preds:
        inputs, labels, ids = split.gather(scores.examples)
        arrays = dict(inputs=inputs, labels=labels, puzzle_identifiers=ids, preds=scores.preds,
                      q_halt_logits=scores.q)
        files["predictions.npz"] = lambda path: write_npz(path, **arrays)
    if args.show:
        cfg = opened.model.cfg
        files["show.png"] = lambda path: draw.draw_examples(cfg, opened.kind, path, split, scores, args.show)
    failed = []
    for name, write_file in files.items():
        try:
            write_file(output / f"{prefix}{name}")
        except OSError as e:
            failed.append(f"{prefix}{name} ({one_line(e.strerror or e)})")
    if failed:
        print(f"error: {output} did not take {', '.join(failed)}; the figures are above", file=sys.stderr)
    return not failed


def write_npz(path, **arrays):
    packed = BytesIO()
    np.savez(packed, **arrays)
    write(path, packed.getvalue())


def must_be_writable(output):
    """Try it before hours are spent. Raises UserError."""
    try:
        write(output / "test-of-writing", b"can be deleted")
        (output / "test-of-writing").unlink()
    except OSError as e:
        raise UserError(f"--output {output} cannot be written ({e.strerror or e}); name another "
                        f"folder") from None


def run(args, world):
    effort = effort_of(args)
    opened = open_model(args, world, reset=args.reset_puzzle_emb)
    check_task(args, opened)
    beside = "runs/eval-" + "-".join(args.hf.split("/")[1:]) if args.hf else opened.path.parent
    output = Path(args.output or beside)
    if world.rank == 0:
        must_be_writable(output)
    results, found = measure(args, world, opened, effort)
    if world.rank == 0:
        print(*(f"{name:<22} {text}" for name, text in table(results)), sep="\n", flush=True)
    written = write_results(args, world, opened, results, found, output)
    exact = results["metrics"].get(metric_names(opened.model.cfg).right, 0.0)
    if args.min_exact is not None and exact < args.min_exact:
        print(f"{exact:.4f} is below --min-exact {args.min_exact}", file=sys.stderr)
        return 1
    return 0 if written else 1


def main(argv=None):
    parser = flags()
    args = parser.parse_args(argv)
    if args.compare:
        parser.alone(args, "compare")
        return compare(*args.compare)
    world = start_world(args.device, 7200)  # seconds: rank 0 downloads and builds while the others wait
    try:
        return run(args, world)
    finally:
        world.close()


if __name__ == "__main__":
    cli(main)
