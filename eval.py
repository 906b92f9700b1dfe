"""Score a checkpoint: exact accuracy, and pass@k by voting on ARC.

    python eval.py --checkpoint runs/mini-...            a run folder, or one file of it
    torchrun --nproc_per_node=8 eval.py --checkpoint ... the same figures, faster
    python eval.py --hf alphaXiv/trm-model-maze          published weights
"""
import os
from dataclasses import dataclass
from datetime import timedelta
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import UserError, cli, prefetch, test_batches
from model import IGNORE, metric_names, regression_rows, token_rows


@dataclass
class World:
    """The processes of a run. Every collective is a no-op in a world of one."""
    rank: int
    size: int
    device: torch.device

    def sum(self, tensor):
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor):
        """(B, ...) of every rank, concatenated in rank order to (size * B, ...)."""
        if self.size == 1:
            return tensor
        out = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        dist.all_gather_into_tensor(out, tensor.contiguous())
        return out

    def gather_objects(self, value):
        """List of every rank's picklable value, in rank order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def choose_device(name, local_rank=0):
    """torch.device of "auto", "cuda", "mps" or "cpu". Raises UserError when it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(d for d, there in present.items() if there)
    if not present[name]:
        raise UserError(f"--device {name} is not available here; use {' or '.join(d for d, t in present.items() if t)}")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def start_world(device, timeout_s):
    """Join the other processes when torchrun started this one (it sets RANK, WORLD_SIZE and LOCAL_RANK)."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    return World(rank, size, device)


# ---------------------------------------------------------------------------------------------
# Scoring

def think(model, inputs, puzzle_ids, steps):
    """Yield (logits (B, S, V), q (B, 2)) after each of `steps` supervision steps; x is embedded once."""
    with torch.no_grad():
        x = model.embed(inputs, model.puzzle_emb[puzzle_ids])                             # (B, L, D)
        y, z = (start.to(model.dtype).expand_as(x).contiguous() for start in (model.y0, model.z0))
        for _ in range(steps):
            y, z = model.improve(x, y, z)
            yield model.heads(y)


def answer(cfg, logits):
    """Tokens (B, S) that the logits stand for; in regression the numbers (B, S, target_dim) as they are."""
    return logits.float() if cfg.regression else logits.argmax(-1).to(torch.int32)


def score_rows(cfg, logits, labels):
    """(B,) each: loss, share of right cells (regression: mean absolute error), all right, number of labelled cells."""
    return (regression_rows if cfg.regression else token_rows)(cfg, logits, labels)


def all_right(cfg, logits, labels):
    """(B,) bool: the third of score_rows, without the cost of the loss."""
    if cfg.regression:
        return score_rows(cfg, logits, labels)[2]
    return ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(-1)


class Scores(NamedTuple):
    """The scored rows of a split in its order, the same on every rank; rows without any label are left out."""
    examples: np.ndarray        # (N,) which example of the split
    loss: np.ndarray            # (N,) after the last step, as are the next three
    cell: np.ndarray            # (N,) share of right cells; regression: mean absolute error
    right: np.ndarray           # (N,) bool
    q: np.ndarray               # (N,) logit of halting
    history: np.ndarray         # (N, steps) bool, right after each step
    preds: np.ndarray           # (N, S) tokens or (N, S, target_dim); (N, 0) where not kept


def score(model, split, world, batch_size, limit=None, steps=None, progress=True, keep_preds=False):
    """Scores after `steps` supervision steps (halt_max_steps by default). Every batch has batch_size rows, the last
    one padded; results are read from the device once a batch."""
    cfg, parts = model.cfg, []
    n_batches = -(-min(len(split), limit or len(split)) // batch_size)
    bar = tqdm(total=n_batches, desc="evaluating", unit="batch", leave=False, disable=not progress or world.rank > 0)
    for examples, batch in prefetch(test_batches(split, batch_size, world.rank, world.size, limit)):
        inputs, labels, ids = (torch.from_numpy(a).to(world.device) for a in batch)
        history = []
        for logits, q in think(model, inputs, ids, steps or cfg.halt_max_steps):
            history.append(all_right(cfg, logits, labels))
        loss, cell, right, n = score_rows(cfg, logits, labels)
        rows = torch.stack([a.float() for a in (n, loss, cell, right, q[:, 0], *history)], 1).cpu().numpy()
        preds = answer(cfg, logits).cpu().numpy() if keep_preds else np.zeros((batch_size, 0), np.int32)
        asked = np.flatnonzero(rows[:len(examples), 0])
        parts.append((examples[asked], rows[asked], preds[asked]))
        bar.update(world.size)
    bar.close()
    parts = [part for rank_parts in world.gather_objects(parts) for part in rank_parts]
    examples, rows, preds = (np.concatenate(p) for p in zip(*parts))
    order = examples.argsort()
    _, loss, cell, right, q = rows[order, :5].T.astype(np.float64)
    return Scores(examples[order], loss, cell, right > 0, q, rows[order, 5:] > 0, preds[order])


def summary(cfg, scores):
    """Flattened metrics of Scores, under the names of model.metric_names."""
    _, cell, right, q_acc, _, loss, *_ = metric_names(cfg)
    return {right: float(scores.right.mean()), cell: float(scores.cell.mean()), loss: float(scores.loss.mean()),
            q_acc: float(((scores.q >= 0) == scores.right).mean()),
            "q_halt_loss": float((np.logaddexp(0, scores.q) - scores.q * scores.right).mean()), "n": len(scores.right)}


def evaluate(model, split, world, batch_size, limit=None, steps=None, progress=True):
    """Metrics of the model (in its present weights) on a split, the same on every rank and for every number of ranks.

    limit: only the first rows. steps: supervision steps, cfg.halt_max_steps by default.
    Returns {"exact_acc", "cell_acc", "lm_loss", "q_halt_acc", "q_halt_loss", "n"} (regression: within_tolerance,
    mae, regression_loss instead of the first three), on ARC also "pass@1" .. "pass@1000".
    """
    return summary(model.cfg, score(model, split, world, batch_size, limit, steps, progress))


def result_line(preset, results, steps, train_s, device):
    """The last line of a run: `RESULT preset=mini exact_acc=0.9980 ...`."""
    names = ("pass@1", "pass@2", "exact_acc", "cell_acc", "regression_loss", "mae", "within_tolerance", "n")
    shown = {name: results[name] for name in names if name in results}
    shown |= {"steps": steps, "train_s": f"{train_s:.1f}", "device": device}
    return f"RESULT preset={preset} " + " ".join(
        f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())


# ---------------------------------------------------------------------------------------------
# Pictures

ARC_COLOURS = ("#FFFFFF", "#D9D9D9",    # outside of the grid, end line
               "#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00", "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25")
MAZE_COLOURS = ("#FFFFFF", "#37474F", "#FFFFFF", "#2ECC40", "#FF851B", "#64B5F6")   # pad, wall, open, S, G, path
WRONG = "#D50000"


def board_kind(cfg):
    """"sudoku", "maze", "arc", "numbers" (regression) or "tokens", from the shapes of the data."""
    side = isqrt(cfg.seq_len)
    if cfg.regression:
        return "numbers"
    if side in (4, 6, 9) and (cfg.seq_len, cfg.vocab_size) == (side * side, side + 2):
        return "sudoku"
    return {6: "maze", 12: "arc"}.get(cfg.vocab_size, "tokens") if side * side == cfg.seq_len else "tokens"


def draw_board(ax, cfg, board, question=None, wrong=None):
    """Draw one board (S,) of tokens, or (S, d) of numbers. `question` tells the givens of a Sudoku; the cells where
    `wrong` (S,) is true are marked."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle
    kind, side = board_kind(cfg), isqrt(cfg.seq_len)
    width = side if side * side == cfg.seq_len else cfg.seq_len
    ax.set_xticks([])
    ax.set_yticks([])
    marks = np.flatnonzero(wrong) if wrong is not None else []
    if kind == "numbers":
        ax.imshow(np.asarray(board, np.float32).T, aspect="auto", cmap="viridis")
        for i in marks:
            ax.axvspan(i - 0.5, i + 0.5, color=WRONG, alpha=0.3)
        return
    grid = np.asarray(board).reshape(-1, width)
    if kind == "sudoku":
        from prepare.sudoku import BOX
        ax.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5), aspect="equal")
        rows, cols = BOX[side]
        for i in range(side + 1):
            ax.axhline(i - 0.5, color="black", lw=1.6 if i % rows == 0 else 0.4)
            ax.axvline(i - 0.5, color="black", lw=1.6 if i % cols == 0 else 0.4)
        for (r, c), token in np.ndenumerate(grid):
            given = question is not None and question[r * side + c] > 1
            bad = wrong is not None and wrong[r * side + c]
            if bad or given:
                ax.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, color="#FFCDD2" if bad else "#E6E6E6", lw=0))
            if token > 1:
                ax.text(c, r + 0.03, str(token - 1), ha="center", va="center", fontsize=120 / (side + 2),
                        color=WRONG if bad else "black" if given else "#0D47A1", weight="bold" if given else "normal")
        return
    colours = {"arc": ARC_COLOURS, "maze": MAZE_COLOURS}.get(kind)
    ax.imshow(grid, cmap=ListedColormap(colours) if colours else "tab20", vmin=0, vmax=cfg.vocab_size - 1)
    if kind == "arc":
        ax.set_xticks(np.arange(0.5, width - 1), minor=True)
        ax.set_yticks(np.arange(0.5, len(grid) - 1), minor=True)
        ax.grid(which="minor", color="#888888", lw=0.2)
        ax.tick_params(which="minor", length=0)
    ax.scatter([i % width for i in marks], [i // width for i in marks], marker="x", color=WRONG, s=max(8, 900 / width))


def legend_handles(cfg):
    """Patches and marks that explain draw_board."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    cross = Line2D([], [], color=WRONG, marker="x", ls="", label="wrong cell")
    return {"sudoku": [Patch(color="#E6E6E6", label="given"), Patch(color="#0D47A1", label="answer"),
                       Patch(color="#FFCDD2", label="wrong cell")],
            "maze": [Patch(facecolor=c, edgecolor="grey", label=name) for c, name in
                     zip(MAZE_COLOURS[1:], ("wall", "open", "start", "goal", "path"))] + [cross],
            "numbers": [Patch(color=WRONG, alpha=0.3, label="outside the tolerance")]}.get(board_kind(cfg), [cross])


def wrong_cells(cfg, board, label):
    """(S,) bool of one predicted board against its label; None without a label."""
    if label is None:
        return None
    if cfg.regression:
        return (np.square(board - label).mean(-1) >= cfg.halt_tolerance) & ~np.isnan(label).any(-1)
    return (board != label) & (label != IGNORE)


def thoughts(model, inputs, puzzle_ids, steps):
    """Boards (steps, B, ...) and q_halt (steps, B) after every supervision step, as numpy; inputs are arrays."""
    device = model.y0.device
    seen = [(answer(model.cfg, logits).cpu().numpy(), q[:, 0].cpu().numpy()) for logits, q in
            think(model, torch.as_tensor(inputs, device=device), torch.as_tensor(puzzle_ids, device=device), steps)]
    return tuple(map(np.stack, zip(*seen)))


def canvas(n, columns):
    """A figure 1200 pixels wide with n axes in rows of `columns`, and room for a title and a legend."""
    from matplotlib.figure import Figure
    rows = -(-n // columns)
    height = rows * (12 / columns + 0.25) + 1.0
    figure = Figure(figsize=(12, height), dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.6 / height, top=1 - 0.8 / height, wspace=0.08, hspace=0.16)
    for ax in axes[n:]:
        ax.set_axis_off()
    return figure, axes


def puzzle_picture(model, split, path, batch_size, steps=(1, 2, 4, 8, 16)):
    """PNG of one hard test puzzle at the given supervision steps, wrong cells marked: of the batch_size puzzles with
    the most blanks (not Sudoku: the first ones) the one that was wrong the longest and right in the end."""
    cfg, pool = model.cfg, np.arange(min(len(split), 10_000))
    if board_kind(cfg) == "sudoku":
        pool = pool[np.argsort(-(split.gather(pool)[0] == 1).sum(-1), kind="stable")]
    pool = pool[:batch_size]
    inputs, labels, ids = split.gather(pool, size=batch_size)
    boards, q = thoughts(model, inputs, ids, max(steps))
    wrong = np.array([[wrong_cells(cfg, b, l).any() for b, l in zip(step, labels)] for step in boards])
    chosen = max(range(len(pool)), key=lambda i: (not wrong[-1, i], wrong[:, i].sum(), -i))
    figure, axes = canvas(len(steps) + 1, 3)
    draw_board(axes[0], cfg, inputs[chosen], inputs[chosen])
    axes[0].set_title("question")
    for ax, step in zip(axes[1:], steps):
        board = boards[step - 1, chosen]
        marks = wrong_cells(cfg, board, labels[chosen])
        draw_board(ax, cfg, board, inputs[chosen], marks)
        ax.set_title(f"step {step}: {f'{marks.sum()} wrong' if marks.any() else 'all right'}, q_halt {q[step - 1, chosen]:+.1f}")
    return save_picture(figure, cfg, path, f"Test puzzle {pool[chosen]}: the answer after each supervision step")


def save_picture(figure, cfg, path, title):
    figure.suptitle(title, fontsize=14)
    figure.legend(handles=legend_handles(cfg), loc="lower center", ncols=6, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
