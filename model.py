"""Tiny Recursive Model (TRM, arXiv 2510.04871): a network of two blocks that is applied again and again
to a latent z and an answer y, improving the answer a little each time.

    paper                          here                    published code and checkpoints
    x, the question                x                       input_embeddings
    y, the answer                  y                       z_H
    z, the latent                  z                       z_L
    T, rounds per improvement      H_cycles                H_cycles
    n, latent updates per round    L_cycles                L_cycles
    N_sup, supervision steps       halt_max_steps          halt_max_steps
    net                            TRM.net                 L_level
    carry between training steps   Carry                   carry, inner_carry

Shapes: B batch, S cells of a puzzle, P puzzle-embedding positions, L = P + S, D hidden, H heads, V vocabulary.
Nothing here reads arguments, the environment, a device or a rank; importing it does nothing.
"""
import hashlib
import math
import os
import pickle
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from data import UserError, sha256

IGNORE = -100  # a label that is neither trained on nor scored


@dataclass
class Config:
    """Architecture of one model. Sizes of the data (first line) come from dataset.json."""
    vocab_size: int = 11            # 0 in a regression task
    seq_len: int = 81               # S
    num_puzzles: int = 1            # rows of the puzzle table, row 0 is blank
    input_dim: int = 0              # regression only: numbers per input cell
    target_dim: int = 0             # regression only: numbers per target cell
    hidden_size: int = 512          # D
    num_heads: int = 8
    num_layers: int = 2
    expansion: float = 4.0
    mixer: str = "attn"             # what mixes the positions: "attn" or "mlp"
    pos_encodings: str = "rope"     # "rope", "learned" or "none"
    puzzle_emb_len: int = 16        # P
    puzzle_emb_ndim: int = 512      # width of a row of the puzzle table, at most P * D
    H_cycles: int = 3               # T
    L_cycles: int = 6               # n
    halt_max_steps: int = 16        # N_sup
    q_continue: bool = False        # also train q_continue, and halt when q_halt > q_continue
    loss: str = "stablemax"         # or "softmax"
    halt_tolerance: float = 0.01    # regression: a row is right when its mean squared error is below
    score_mod: str = "none"         # "sudoku": attention that knows rows, columns and boxes
    dtype: str = "bfloat16"         # of all activations

    @property
    def length(self):
        return self.puzzle_emb_len + self.seq_len

    @property
    def regression(self):
        return self.target_dim > 0


class Carry(NamedTuple):
    """What lives from one supervision step to the next, one row per slot of the batch."""
    y: torch.Tensor             # (B, L, D) answer state, detached
    z: torch.Tensor             # (B, L, D) latent state, detached
    steps: torch.Tensor         # (B,) int32, supervision steps done on this puzzle
    halted: torch.Tensor        # (B,) bool, the row takes a new puzzle at the next step
    inputs: torch.Tensor        # (B, S) int32 tokens, or (B, S, input_dim) float32
    labels: torch.Tensor        # (B, S) int32, IGNORE where nothing is asked; or (B, S, target_dim) float32, NaN there
    puzzle_ids: torch.Tensor    # (B,) int32 rows of the puzzle table


class Batch(NamedTuple):
    """New puzzles, and for every slot the least number of steps that exploration demands (0: none)."""
    inputs: torch.Tensor
    labels: torch.Tensor
    puzzle_ids: torch.Tensor
    min_steps: torch.Tensor


# ---------------------------------------------------------------------------------------------
# Pieces of a block

def trunc_normal(shape, std, generator):
    """float32 tensor of a normal cut at two standard deviations, rescaled so that its true std is `std`
    (torch's own trunc_normal_ leaves it at 0.88 of what is asked)."""
    scale = std / 0.8796256610342398  # std of a unit normal cut at -2 and 2
    return nn.init.trunc_normal_(torch.empty(shape), std=scale, a=-2 * scale, b=2 * scale, generator=generator)


def swiglu_width(n, expansion):
    """Inner width of a SwiGLU over n features: 2/3 of expansion * n, rounded up to a multiple of 256."""
    return -(-round(expansion * n * 2 / 3) // 256) * 256


def rms_norm(h, dim=-1):
    """Over one axis, in float32, without a weight; eps 1e-5."""
    h32 = h.float()
    return (h32 * torch.rsqrt(h32.square().mean(dim, keepdim=True) + 1e-5)).to(h.dtype)


def swiglu(h, w_gate_up, w_down):
    gate, up = F.linear(h, w_gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_down)


def swiglu_over_positions(h, w_gate_up, w_down):
    """The SwiGLU over the first axis of h (L, B, D): one product for the whole batch, and nothing is transposed."""
    gate, up = (w_gate_up @ h.flatten(1)).chunk(2)                                        # (I, B * D) each
    return (w_down @ (F.silu(gate) * up)).view_as(h)


def rope_tables(length, head_dim):
    """cos and sin, each (L, head_dim) float32, base 10000; the first half rotates with the second, and so has the
    sine negated."""
    freq = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), freq)
    return angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)


def rotate(q, cos, sin):
    """Rotate q (B, L, H, head_dim) in float32; returns q's dtype."""
    q32 = q.float()
    halves_swapped = q32.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (q32 * cos[:, None] + halves_swapped * sin[:, None]).to(q.dtype)


def sudoku_score_mod(cfg):
    """The worked example of a score_mod: three of every four heads favour the cells of the same row, of the
    same column or of the same box by +1 before the softmax, as ALiBi does with distance. Boards are square;
    boxes are those of prepare/sudoku.py (2x2, 2x3, 3x3). The puzzle positions are left alone."""
    size = math.isqrt(cfg.seq_len)
    box_rows, P = math.isqrt(size), cfg.puzzle_emb_len
    box_cols = size // box_rows

    def score_mod(score, b, h, i, j):
        row_i, col_i = (i - P) // size, (i - P) % size
        row_j, col_j = (j - P) // size, (j - P) % size
        same_box = (row_i // box_rows == row_j // box_rows) & (col_i // box_cols == col_j // box_cols)
        near = (((h % 4 == 1) & (row_i == row_j)) | ((h % 4 == 2) & (col_i == col_j)) | ((h % 4 == 3) & same_box))
        return score + torch.where(near & (i >= P) & (j >= P), 1.0, 0.0)
    return score_mod


SCORE_MODS = {"none": lambda cfg: None, "sudoku": sudoku_score_mod}  # put your own here


def attend(q, k, v, score_mod=None):
    """softmax(score_mod(q k / sqrt(head_dim))) v for q, k, v of (B, H, L, head_dim).

    FlexAttention where it is fused and can train: compiled on CUDA (on a CPU it has no backward in torch 2.13).
    Elsewhere scaled_dot_product_attention, or plain products when a score_mod must see the scores. A mask is a
    score_mod that returns -inf.
    """
    if q.is_cuda and torch.compiler.is_compiling():
        return flex_attention(q, k, v, score_mod=score_mod)
    if score_mod is None and q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    B, H, L, head_dim = q.shape
    scores = (q / math.sqrt(head_dim) @ k.mT).float()                                     # (B, H, L, L)
    if score_mod is not None:
        b, h, i, j = (torch.arange(n, device=q.device) for n in (B, H, L, L))
        scores = score_mod(scores, b[:, None, None, None], h[:, None, None], i[:, None], j)
    weight = ((scores - scores.detach().amax(-1, keepdim=True)) * math.log2(math.e)).exp2()   # faster than exp
    return (weight.to(q.dtype) @ v / weight.sum(-1, keepdim=True)).to(q.dtype)


def attention(h, w_qkv, w_out, num_heads, rope, score_mod):
    B, L, D = h.shape
    q, k, v = F.linear(h, w_qkv).view(B, L, 3, num_heads, D // num_heads).unbind(2)   # each (B, L, H, D/H)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), score_mod)  # (B, H, L, D/H)
    return F.linear(out.transpose(1, 2).reshape(B, L, D), w_out)


class CastOnce(torch.autograd.Function):
    """Cast a float32 master weight to the compute dtype once and hand it out `uses` times.

    Autograd would add up the gradients of several uses in the compute dtype; here every use has its own,
    and they are summed in float32.
    """
    @staticmethod
    def forward(ctx, weight, dtype, uses):
        cast = weight.to(dtype)
        return tuple(cast.view_as(cast) for _ in range(uses))

    @staticmethod
    def backward(ctx, *grads):
        total = grads[0].float()
        for g in grads[1:]:
            total = total + g
        return total, None, None


class Block(nn.Module):
    """The four float32 matrices of one block. `TRM.net` applies them."""

    def __init__(self, cfg, generator):
        super().__init__()
        D, L = cfg.hidden_size, cfg.length
        inner, inner_t = swiglu_width(D, cfg.expansion), swiglu_width(L, cfg.expansion)
        mix_in, mix_out = ((2 * inner_t, L), (L, inner_t)) if cfg.mixer == "mlp" else ((3 * D, D), (D, D))
        shapes = {"mix_in": mix_in, "mix_out": mix_out, "mlp_in": (2 * inner, D), "mlp_out": (D, inner)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(trunc_normal(shape, shape[1] ** -0.5, generator)))


class TRM(nn.Module):
    """The model. `step` does one supervision step on a carry; `loss` scores what it gave."""

    def __init__(self, cfg, generator):
        super().__init__()
        D, V = cfg.hidden_size, cfg.target_dim or cfg.vocab_size
        self.cfg = cfg
        self.dtype = getattr(torch, cfg.dtype)
        rows = cfg.input_dim or V                 # x has unit variance for a token, and for numbers of unit variance
        self.embed_tokens = nn.Parameter(trunc_normal((rows, D), (D * max(1, cfg.input_dim)) ** -0.5, generator))
        if cfg.pos_encodings == "learned":
            self.embed_pos = nn.Parameter(trunc_normal((cfg.length, D), D ** -0.5, generator))
        self.blocks = nn.ModuleList(Block(cfg, generator) for _ in range(cfg.num_layers))
        self.lm_head = nn.Parameter(trunc_normal((V, D), D ** -0.5, generator))
        self.q_head = nn.Parameter(torch.zeros(2, D))
        self.q_bias = nn.Parameter(torch.full((2,), -5.0))
        self.register_buffer("y0", trunc_normal((D,), 1.0, generator))
        self.register_buffer("z0", trunc_normal((D,), 1.0, generator))
        self.register_buffer("puzzle_emb", torch.zeros(cfg.num_puzzles, cfg.puzzle_emb_ndim))
        self.score_mod = SCORE_MODS[cfg.score_mod](cfg)
        if cfg.pos_encodings == "rope":
            cos, sin = rope_tables(cfg.length, D // cfg.num_heads)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def empty_carry(self, batch):
        """A carry whose rows are all halted, so that the first step fills them. Takes shapes from `batch`."""
        B, cfg = len(batch.puzzle_ids), self.cfg
        state = torch.zeros(B, cfg.length, cfg.hidden_size, dtype=self.dtype, device=self.y0.device)
        steps = torch.zeros(B, dtype=torch.int32, device=state.device)
        return Carry(state, state.clone(), steps, torch.ones_like(steps, dtype=torch.bool),
                     torch.zeros_like(batch.inputs), torch.zeros_like(batch.labels), torch.zeros_like(batch.puzzle_ids))

    def admit(self, carry, batch):
        """Give the halted rows of the carry the rows of `batch`, y0, z0 and 0 steps; the others drop the new row."""
        def choose(new, old):
            return torch.where(carry.halted.view(-1, *[1] * (old.ndim - 1)), new, old)
        return Carry(choose(self.y0.to(self.dtype), carry.y), choose(self.z0.to(self.dtype), carry.z),
                     choose(torch.zeros_like(carry.steps), carry.steps), carry.halted,
                     choose(batch.inputs, carry.inputs), choose(batch.labels, carry.labels),
                     choose(batch.puzzle_ids, carry.puzzle_ids))

    def embed(self, inputs, rows):
        """x (B, L, D) from tokens (B, S) or numbers (B, S, input_dim) and puzzle rows (B, puzzle_emb_ndim)."""
        cfg, E = self.cfg, self.embed_tokens.to(self.dtype)
        if not cfg.regression:  # a product with one-hot rows: its gradient adds up in float32, without atomics
            inputs = inputs[..., None] == torch.arange(cfg.vocab_size, device=inputs.device, dtype=inputs.dtype)
        x = inputs.to(self.dtype) @ E                                                    # (B, S, D)
        if cfg.puzzle_emb_len:
            prefix = F.pad(rows, (0, cfg.puzzle_emb_len * cfg.hidden_size - cfg.puzzle_emb_ndim)).to(self.dtype)
            x = torch.cat((prefix.view(-1, cfg.puzzle_emb_len, cfg.hidden_size), x), dim=1)  # (B, L, D)
        if cfg.pos_encodings == "learned":
            x = math.sqrt(0.5) * (x + self.embed_pos.to(self.dtype))
        return math.sqrt(cfg.hidden_size) * x

    def cast_weights(self, uses):
        """`uses` lists of (mix_in, mix_out, mlp_in, mlp_out) per block, all of one cast to the compute dtype."""
        cast = [[CastOnce.apply(w, self.dtype, uses) for w in block.parameters()] for block in self.blocks]
        return [[[w[use] for w in block] for block in cast] for use in range(uses)]

    def net(self, h, injection, weights):
        """The network, (B, L, D) to (B, L, D): post-norm blocks of a mixer over positions and a SwiGLU."""
        cfg = self.cfg
        rope = (self.cos, self.sin) if cfg.pos_encodings == "rope" else None
        h = h + injection
        for mix_in, mix_out, mlp_in, mlp_out in weights:
            if cfg.mixer == "mlp":
                h = rms_norm(h + swiglu_over_positions(h, mix_in, mix_out), dim=0)       # h is (L, B, D)
            else:
                h = rms_norm(h + attention(h, mix_in, mix_out, cfg.num_heads, rope, self.score_mod))
            h = rms_norm(h + swiglu(h, mlp_in, mlp_out))
        return h

    def cycle(self, x, y, z, weights):
        """n times z = net(z, y + x), then y = net(y, z); `weights` holds those of each of the n + 1 uses."""
        injection = y + x
        for use in range(self.cfg.L_cycles):
            z = self.net(z, injection, weights[use])
        return self.net(y, z, weights[-1]), z

    def improve(self, x, y, z):
        """The recursion of one supervision step: T rounds, all but the last without gradient."""
        if self.cfg.mixer == "mlp":     # positions first: see swiglu_over_positions
            x, y, z = (h.transpose(0, 1).contiguous() for h in (x, y, z))
        weights = self.cast_weights(self.cfg.L_cycles + 1)
        with torch.no_grad():
            fixed = [[[w.detach() for w in block] for block in use] for use in weights]
            for _ in range(self.cfg.H_cycles - 1):
                y, z = self.cycle(x, y, z, fixed)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # every application of net below then has one signature, and compiles once
            y, z = y.detach().requires_grad_(), z.detach().requires_grad_()
        y, z = self.cycle(x, y, z, weights)
        return (y.transpose(0, 1), z.transpose(0, 1)) if self.cfg.mixer == "mlp" else (y, z)

    def heads(self, y):
        """logits (B, S, V) (or predictions (B, S, target_dim)) and q (B, 2) float32: halt, continue."""
        logits = F.linear(y[:, self.cfg.puzzle_emb_len:], self.lm_head.to(self.dtype))
        q = F.linear(y[:, 0], self.q_head.to(self.dtype), self.q_bias.to(self.dtype))
        return logits, q.float()

    def step(self, carry, batch, delta=None, max_steps=None):
        """One supervision step: (carry, batch) to (new carry, logits, q).

        delta: (B, puzzle_emb_ndim) zeros whose gradient is that of the puzzle rows in use (the table itself is
            no Parameter: a dense gradient would be as large as the table).
        max_steps: int tensor, the steps after which a row halts unless exploration holds it; halt_max_steps by default.
        """
        cfg = self.cfg
        carry = self.admit(carry, batch)
        rows = self.puzzle_emb[carry.puzzle_ids]                                          # (B, puzzle_emb_ndim)
        x = self.embed(carry.inputs, rows if delta is None else rows + delta)
        y, z = self.improve(x, carry.y, carry.z)
        logits, q = self.heads(y)
        steps = carry.steps + 1
        halted = steps >= (cfg.halt_max_steps if max_steps is None else max_steps)
        if self.training and cfg.halt_max_steps > 1:
            wants_to_halt = q[:, 0] > (q[:, 1] if cfg.q_continue else 0)
            halted = (halted | wants_to_halt) & (steps >= batch.min_steps)
        return carry._replace(y=y.detach(), z=z.detach(), steps=steps, halted=halted), logits, q

    def continue_target(self, carry):
        """Q-learning target of q_continue (HRM, arXiv 2506.21734, section 2): what the next step would promise."""
        with torch.no_grad():
            x = self.embed(carry.inputs, self.puzzle_emb[carry.puzzle_ids])
            q = self.heads(self.improve(x, carry.y, carry.z)[0])[1]
        last = carry.steps >= self.cfg.halt_max_steps
        return torch.sigmoid(torch.where(last, q[:, 0], q.max(-1).values))


# ---------------------------------------------------------------------------------------------
# Loss and metrics

def log_stablemax(logits):
    """log of stablemax (arXiv 2501.04697) over the last axis: exp is replaced by s(x) = x + 1 for x >= 0 and
    1 / (1 - x) below. float64, or float32 where the device has no float64 (Apple MPS)."""
    x = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    return torch.log(s / s.sum(-1, keepdim=True))


def log_softmax(logits):
    return logits.float().log_softmax(-1)


LOG_PROBS = {"stablemax": log_stablemax, "softmax": log_softmax}
TOKEN_METRICS = ("count", "cell_acc", "exact_acc", "q_halt_acc", "steps", "lm_loss", "q_halt_loss", "q_continue_loss")
REGRESSION_METRICS = ("count", "mae", "within_tolerance", "q_halt_acc", "steps", "regression_loss", "q_halt_loss",
                      "q_continue_loss")


def metric_names(cfg):
    return REGRESSION_METRICS if cfg.regression else TOKEN_METRICS


def token_rows(cfg, logits, labels):
    """Per row (B,): loss, fraction of right cells, all right, number of labelled cells."""
    asked = labels != IGNORE                                                              # (B, S)
    n = asked.sum(-1)
    log_p = LOG_PROBS[cfg.loss](logits)
    nll = -log_p.gather(-1, torch.where(asked, labels, 0).long()[..., None])[..., 0]
    right = asked & (logits.argmax(-1) == labels)
    return (torch.where(asked, nll, 0).sum(-1) / n.clamp(min=1), right.sum(-1) / n.clamp(min=1), right.sum(-1) == n, n)


def regression_rows(cfg, predictions, targets):
    """Per row (B,): mean squared error, mean absolute error, error under the tolerance, number of masked-in cells."""
    asked = ~targets.isnan().any(-1)                                                      # (B, S)
    n = asked.sum(-1)
    diff = torch.where(asked[..., None], predictions.float() - targets.nan_to_num(), 0)
    cells = n.clamp(min=1) * targets.shape[-1]
    mse = diff.square().sum((-1, -2)) / cells
    return mse, diff.abs().sum((-1, -2)) / cells, mse.detach() < cfg.halt_tolerance, n


def act_loss(cfg, carry, logits, q, continue_target=None):
    """Loss summed over rows (divide by the global batch size), and the sums behind the metrics.

    Returns (loss, sums): sums is a float32 vector in the order of metric_names(cfg); its first five entries
    count only rows that halted in this step and have labels, its last three are over all rows.
    """
    rows = regression_rows if cfg.regression else token_rows
    row_loss, cell_score, right, n = rows(cfg, logits, carry.labels)
    q_halt_loss = F.binary_cross_entropy_with_logits(q[:, 0], right.float(), reduction="sum")
    q_continue_loss = torch.zeros_like(q_halt_loss)
    if continue_target is not None:
        q_continue_loss = F.binary_cross_entropy_with_logits(q[:, 1], continue_target, reduction="sum")
    loss = row_loss.sum() + 0.5 * (q_halt_loss + q_continue_loss)
    with torch.no_grad():
        scored = (carry.halted & (n > 0)).float()
        q_right = (q[:, 0] >= 0) == right
        per_row = torch.stack((torch.ones_like(scored), cell_score.float(), right.float(), q_right.float(),
                               carry.steps.float()))
        sums = torch.cat((per_row @ scored, torch.stack((row_loss.sum(), q_halt_loss, q_continue_loss)).float()))
    return loss, sums


def compiler_lacks(device):
    """What torch.compile lacks for this device, in words, or "" when it lacks nothing: on a CPU it writes C++."""
    if device.type != "cpu":
        return ""
    lacks = [] if any(map(shutil.which, ("c++", "g++", "clang++", "cl"))) else ["a C++ compiler"]
    lacks += [] if Path(sysconfig.get_path("include"), "Python.h").exists() else ["Python.h (Debian: python3-dev)"]
    return " and ".join(lacks)


def compile_model(model, unit="net", mode="default", backend="inductor"):
    """Compile one piece of the recursion in place: "net" (the piece that repeats: one small graph, applied
    T * (n + 1) times), "cycle" (a whole round) or "step" (all rounds, the longest to compile). mode: torch.compile's."""
    name = {"net": "net", "cycle": "cycle", "step": "improve"}[unit]
    how = dict(mode=mode) if backend == "inductor" else {}
    setattr(model, name, torch.compile(getattr(model, name), fullgraph=True, dynamic=False, backend=backend, **how))


# ---------------------------------------------------------------------------------------------
# Checkpoint files

class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit; says which file and what to do."""


def save_file(path, content):
    """torch.save that is all or nothing: temporary file, fsync, rename. The sha256 of the bytes stands at the
    end as the comment of the zip archive, so that plain torch.load reads the file too. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(content, f)
        digest = sha256(tmp).encode()
        with open(tmp, "r+b") as f:
            f.seek(-2, os.SEEK_END)     # the last two bytes of a zip archive are the length of its comment
            f.write(len(digest).to_bytes(2, "little") + digest)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except RuntimeError as e:   # torch's zip writer trips over a full disk, and hides what it was
        raise e.__context__ if isinstance(e.__context__, OSError) else e
    finally:
        tmp.unlink(missing_ok=True)


def load_file(path):
    """What save_file wrote, or any plain torch file (those carry no checksum). Tensors come to the CPU;
    weights_only, so that a file can never run code. Raises CheckpointError for a damaged file."""
    path = Path(path)
    try:
        with open(path, "rb") as f:
            f.seek(-66, os.SEEK_END)
            tail = f.read()
            if tail[:2] == (64).to_bytes(2, "little"):
                f.seek(0)
                digest, left = hashlib.sha256(), path.stat().st_size - 66
                while left:
                    block = f.read(min(left, 1 << 22))
                    digest.update(block)
                    left -= len(block)
                digest.update(b"\0\0")
                if digest.hexdigest().encode() != tail[2:]:
                    raise CheckpointError(f"{path} is damaged: its sha256 is not the one it was saved with")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if "config" in content and tail[:2] != (64).to_bytes(2, "little"):
            raise CheckpointError(f"{path} is damaged: its sha256 is missing")
        return content
    except FileNotFoundError:
        raise CheckpointError(f"{path} not found") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason[:200]}") from None


# The published format: a plain state dict of the published training module

PREFIX = "model.inner."


def published_names(cfg):
    """{our key: published key without prefix} of all that a checkpoint holds."""
    names = {"embed_tokens": "embed_tokens.embedding_weight", "lm_head": "lm_head.weight",
             "q_head": "q_head.weight", "q_bias": "q_head.bias", "puzzle_emb": "puzzle_emb.weights",
             "y0": "H_init", "z0": "L_init"}
    if cfg.pos_encodings == "learned":
        names["embed_pos"] = "embed_pos.embedding_weight"
    mix_in, mix_out = {"mlp": ("mlp_t.gate_up_proj", "mlp_t.down_proj"),
                       "attn": ("self_attn.qkv_proj", "self_attn.o_proj")}[cfg.mixer]
    parts = {"mix_in": mix_in, "mix_out": mix_out, "mlp_in": "mlp.gate_up_proj", "mlp_out": "mlp.down_proj"}
    for i in range(cfg.num_layers):
        for ours, theirs in parts.items():
            names[f"blocks.{i}.{ours}"] = f"L_level.layers.{i}.{theirs}.weight"
    return names


def to_published(cfg, state):
    """Our state dict to a published one, as the compiled training module would save it."""
    return {f"_orig_mod.{PREFIX}{theirs}": state[ours].clone() for ours, theirs in published_names(cfg).items()}


def config_from_published(shapes, overrides):
    """Config from the shapes of a published state dict, keys without prefix. Shapes tell all but the cycles and,
    without rope tables, the heads: `overrides` gives those (and wins). Raises CheckpointError."""
    try:
        V, D = shapes["embed_tokens.embedding_weight"]
        rows, ndim = shapes["puzzle_emb.weights"]
        n_layers = len({k.split(".")[2] for k in shapes if k.startswith("L_level.layers.")})
        mlp = "L_level.layers.0.mlp_t.gate_up_proj.weight" in shapes
        expansion = shapes["L_level.layers.0.mlp.down_proj.weight"][1] * 3 / (2 * D)
        P = overrides.get("puzzle_emb_len", 16)
        length = shapes["L_level.layers.0.mlp_t.down_proj.weight"][0] if mlp else overrides["seq_len"] + P
    except KeyError as e:
        raise CheckpointError(f"not a published TRM checkpoint: it has no {e.args[0]}") from None
    settings = dict(vocab_size=V, hidden_size=D, num_puzzles=rows, puzzle_emb_ndim=ndim, num_layers=n_layers,
                    mixer="mlp" if mlp else "attn", seq_len=length - P, puzzle_emb_len=P,
                    pos_encodings="learned" if "embed_pos.embedding_weight" in shapes else "none" if mlp else "rope")
    inner = shapes["L_level.layers.0.mlp.down_proj.weight"][1]
    if swiglu_width(D, 4.0) != inner:
        settings["expansion"] = expansion
    return Config(**{**settings, **overrides})


def from_published(state, overrides):
    """(Config, our state dict) from a published state dict, with or without the `_orig_mod.` prefix. Strict:
    raises CheckpointError that names a missing, extra or misshapen key."""
    found = {}
    for key, tensor in state.items():
        name = key.removeprefix("_orig_mod.")
        if not name.startswith(PREFIX):
            raise CheckpointError(f"unexpected key {key}: published keys begin with {PREFIX}")
        found[name.removeprefix(PREFIX)] = tensor
    cfg = config_from_published({k: tuple(v.shape) for k, v in found.items()}, overrides)
    names = published_names(cfg)
    missing, extra = set(names.values()) - found.keys(), found.keys() - set(names.values())
    if missing or extra:
        raise CheckpointError("the published checkpoint " + "; ".join(
            f"{what} {', '.join(sorted(keys))}" for what, keys in (("lacks", missing), ("has unknown", extra)) if keys))
    return cfg, {ours: found[theirs].float() for ours, theirs in names.items()}


def build(cfg, state):
    """A TRM with the given state dict. Raises CheckpointError that names what does not fit."""
    with torch.device("meta"):
        model = TRM(cfg, None)
    expected = model.state_dict()
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    wrong = [f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}" for k, v in expected.items()
             if k in state and state[k].shape != v.shape]
    if missing or extra or wrong:
        raise CheckpointError("the weights do not fit: " + "; ".join(
            [f"missing {k}" for k in sorted(missing)] + [f"unknown {k}" for k in sorted(extra)] + wrong))
    model.load_state_dict(state, assign=True)
    if cfg.pos_encodings == "rope":
        model.cos, model.sin = rope_tables(cfg.length, cfg.hidden_size // cfg.num_heads)
    for p in model.parameters():
        p.requires_grad_()
    return model
