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

Shapes: B batch, S cells of a puzzle, P puzzle-embedding positions, L = P + S, D hidden, H heads, V
vocabulary. Nothing here reads arguments, the environment, a device or a rank; importing it does nothing.
"""
import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from common import UserError, within

IGNORE = -100  # a label that is neither trained on nor scored


def option(default, help, **how):
    """A field of Config that train.py makes a flag of: its help, and what else argparse's add_argument
    takes."""
    return field(default=default, metadata={"help": help, **how})


@dataclass
class Config:
    """Architecture of one model. The sizes of the data come from dataset.json; every other field IS a flag of
    train.py: a new one needs no more than a line here. Raises UserError for values that contradict each
    other."""
    vocab_size: int = 11            # 0 in a regression task
    seq_len: int = 81               # S
    num_puzzles: int = 1            # rows of the puzzle table, row 0 is blank
    input_dim: int = 0              # regression only: numbers per input cell
    target_dim: int = 0             # regression only: numbers per target cell
    mixer: str = option("attn", "what mixes the positions", choices=["attn", "mlp"])
    attention: str = option("flex", "on a GPU: FlexAttention or SDPA", choices=["flex", "sdpa"])
    pos_encodings: str = option("rope", "of positions; rope needs attn", choices=["rope", "learned", "none"])
    score_mod: str = option("none", "of attention scores, see SCORE_MODS",
                            choices=["none", "sudoku", "grid"])
    hidden_size: int = option(512, "D", type=within(int, 1))
    num_heads: int = option(8, "of attention", type=within(int, 1))
    num_layers: int = option(2, "blocks of the net", type=within(int, 1))
    expansion: float = option(4.0, "of the SwiGLU", type=within(float, 0.01, 1000))
    width_multiple: int = option(256, "what the SwiGLU's inner width is rounded up to a multiple of",
                                 type=within(int, 1))
    puzzle_emb_len: int = option(16, "P, prefix positions of the puzzle embedding", type=within(int, 0))
    puzzle_emb_ndim: int = option(512, "width of the puzzle table, at most P x D", type=within(int, 0))
    H_cycles: int = option(3, "T, rounds per supervision step", type=within(int, 1))
    L_cycles: int = option(6, "n, latent updates per round", type=within(int, 1))
    halt_max_steps: int = option(16, "N_sup, supervision steps", type=within(int, 1))
    q_continue: bool = option(False, "Q-learning halting as in HRM: also train q_continue, halt above it")
    loss: str = option("stablemax", "of the tokens", choices=["stablemax", "softmax"])
    halt_tolerance: float = option(0.01, "regression: a row is right when its squared error is below",
                                   type=within(float, 0))
    dtype: str = option("bfloat16", "of activations; auto: the faster here",
                        choices=["bfloat16", "float32", "auto"])

    def __post_init__(self):
        if self.mixer == "attn" and self.hidden_size % (2 * self.num_heads):
            raise UserError(f"--hidden-size {self.hidden_size} does not give {self.num_heads} heads of even "
                            f"width; use a multiple of {2 * self.num_heads}")
        if self.puzzle_emb_ndim > self.puzzle_emb_len * self.hidden_size:
            raise UserError(f"--puzzle-emb-ndim {self.puzzle_emb_ndim} is wider than --puzzle-emb-len "
                            f"{self.puzzle_emb_len} x --hidden-size {self.hidden_size}; lower it to "
                            f"{self.puzzle_emb_len * self.hidden_size}")
        square = math.isqrt(self.seq_len) ** 2 == self.seq_len
        fits = {"none": True, "sudoku": self.seq_len in (16, 36, 81), "grid": square}
        if not fits[self.score_mod] or self.score_mod != "none" and self.mixer != "attn":
            raise UserError(f"--score-mod {self.score_mod} needs --mixer attn and boards of 4x4, 6x6 or 9x9 "
                            f"(sudoku) or squares (grid); this is {self.mixer} with {self.seq_len} cells: "
                            f"leave it out")

    @property
    def length(self):
        return self.puzzle_emb_len + self.seq_len

    @property
    def regression(self):
        return self.target_dim > 0

    @property
    def rope(self):
        return self.mixer == "attn" and self.pos_encodings == "rope"

    def inner_width(self, n):
        """Of a SwiGLU over n features: 2/3 of expansion * n, rounded up to a multiple of width_multiple."""
        return -(-max(1, round(self.expansion * n * 2 / 3)) // self.width_multiple) * self.width_multiple


def read_config(saved, **changes):
    """The Config that a checkpoint holds as a dict, with changes. What an older one did not know has its
    default. Raises UserError for what this code does not know."""
    unknown = sorted(saved.keys() - {f.name for f in fields(Config)})
    if unknown:
        raise UserError(f"the checkpoint has {', '.join(unknown)}, which this model.py does not know: it was "
                        f"written by other code; use that, or add the field to Config")
    return Config(**{**saved, **changes})


class Carry(NamedTuple):
    """What lives from one supervision step to the next, one row per slot of the batch."""
    y: torch.Tensor             # (B, L, D) answer state, detached
    z: torch.Tensor             # (B, L, D) latent state, detached
    steps: torch.Tensor         # (B,) int32, supervision steps done on this puzzle
    halted: torch.Tensor        # (B,) bool, the row takes a new puzzle at the next step
    inputs: torch.Tensor        # (B, S) int32 tokens, or (B, S, input_dim) float32
    labels: torch.Tensor        # (B, S) int32, IGNORE where not asked; or (B, S, target_dim) float32, NaN
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
    scale, empty = std / 0.8796256610342398, torch.empty(shape)     # std of a unit normal cut at -2 and 2
    return nn.init.trunc_normal_(empty, std=scale, a=-2 * scale, b=2 * scale, generator=generator)


def rms_norm(h, dim=-1):
    """Over one axis, in float32, without a weight; eps 1e-5."""
    h32 = h.float()
    return (h32 * torch.rsqrt(h32.square().mean(dim, keepdim=True) + 1e-5)).to(h.dtype)


def swiglu(h, w_gate_up, w_down):
    gate, up = F.linear(h, w_gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_down)


def swiglu_over_positions(h, w_gate_up, w_down):
    """The SwiGLU over the first axis of h (L, B, D): one product for the whole batch, and nothing is
    transposed."""
    gate, up = (w_gate_up @ h.flatten(1)).chunk(2)                                   # (I, B * D) each
    return (w_down @ (F.silu(gate) * up)).view_as(h)


def rope_tables(length, head_dim):
    """cos and sin, each (L, head_dim) float32, base 10000; the first half rotates with the second, and so has
    the sine negated."""
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
    same column or of the same box by +1 before the softmax, as ALiBi does with distance. Boxes are those of
    prepare/sudoku.py (2x2, 2x3, 3x3). The puzzle positions are left alone."""
    size = math.isqrt(cfg.seq_len)
    box_rows, P = math.isqrt(size), cfg.puzzle_emb_len
    box_cols = size // box_rows

    def score_mod(score, b, h, i, j):
        row_i, col_i = (i - P) // size, (i - P) % size
        row_j, col_j = (j - P) // size, (j - P) % size
        same_box = (row_i // box_rows == row_j // box_rows) & (col_i // box_cols == col_j // box_cols)
        kind = h % 4
        near = (kind == 1) & (row_i == row_j) | (kind == 2) & (col_i == col_j) | (kind == 3) & same_box
        return score + torch.where(near & (i >= P) & (j >= P), 1.0, 0.0)
    return score_mod


def grid_score_mod(cfg):
    """Four of every five heads see one cell only: the one above, below, left or right (at an edge: itself);
    the fifth sees all, and so do the puzzle positions."""
    size, P = math.isqrt(cfg.seq_len), cfg.puzzle_emb_len

    def score_mod(score, b, h, i, j):
        row, col, kind = (i - P) // size, (i - P) % size, h % 5
        row = row - ((kind == 0) & (row > 0)).int() + ((kind == 1) & (row < size - 1)).int()
        col = col - ((kind == 2) & (col > 0)).int() + ((kind == 3) & (col < size - 1)).int()
        seen = (kind == 4) | (i < P) | (j == P + row * size + col)
        return torch.where(seen, score, -1e4)
    return score_mod


# your own: here and in Config's choices
SCORE_MODS = {"none": lambda cfg: None, "sudoku": sudoku_score_mod, "grid": grid_score_mod}


def attend(q, k, v, score_mod=None, flex=True):
    """softmax(score_mod(q k / sqrt(head_dim))) v for q, k, v of (B, H, L, head_dim).

    FlexAttention where it is fused and can train: compiled on CUDA with heads of 16 or more (on a CPU it has
    no backward in torch 2.13); not with flex False. Elsewhere scaled_dot_product_attention, or plain products
    when a score_mod must see the scores. A mask is a score_mod that returns -inf.
    """
    if q.is_cuda and torch.compiler.is_compiling() and flex and q.shape[-1] >= 16:
        # unforced, it would turn into flex decoding below 128 queries, which spills registers
        return flex_attention(q, k, v, score_mod=score_mod, kernel_options={"FORCE_USE_FLEX_ATTENTION": True})
    if score_mod is None and q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    # Plain products on a CPU: at these lengths its flash kernel is slower, above all backward.
    B, H, L, head_dim = q.shape
    scores = (q / math.sqrt(head_dim) @ k.mT).float()                                # (B, H, L, L)
    if score_mod is not None:
        b, h, i, j = (torch.arange(n, device=q.device) for n in (B, H, L, L))
        scores = score_mod(scores, b[:, None, None, None], h[:, None, None], i[:, None], j)
    # exp2 is faster than exp, and dividing after the product with v spares a pass over (L, L)
    weight = ((scores - scores.detach().amax(-1, keepdim=True)) * math.log2(math.e)).exp2()
    return (weight.to(q.dtype) @ v / weight.sum(-1, keepdim=True)).to(q.dtype)


def attention(h, w_qkv, w_out, num_heads, rope, score_mod, flex=True):
    B, L, D = h.shape
    q, k, v = F.linear(h, w_qkv).view(B, L, 3, num_heads, D // num_heads).unbind(2)  # each (B, L, H, D/H)
    if rope is not None:
        q, k = rotate(q, *rope), rotate(k, *rope)
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), score_mod, flex)
    return F.linear(out.transpose(1, 2).reshape(B, L, D), w_out)


class Block(nn.Module):
    """A mixer over positions, then a SwiGLU over features, each followed by a norm (post-norm)."""

    def __init__(self, cfg, generator):
        super().__init__()
        D, L = cfg.hidden_size, cfg.length
        inner, inner_t = cfg.inner_width(D), cfg.inner_width(L)
        mix_in, mix_out = ((2 * inner_t, L), (L, inner_t)) if cfg.mixer == "mlp" else ((3 * D, D), (D, D))
        shapes = {"mix_in": mix_in, "mix_out": mix_out, "mlp_in": (2 * inner, D), "mlp_out": (D, inner)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(trunc_normal(shape, shape[1] ** -0.5, generator)))
        self.mixer, self.num_heads, self.flex = cfg.mixer, cfg.num_heads, cfg.attention == "flex"

    def cast(self, dtype):
        """(mix_in, mix_out, mlp_in, mlp_out) in the compute dtype."""
        mix_in, *others = (w.to(dtype) for w in (self.mix_in, self.mix_out, self.mlp_in, self.mlp_out))
        if self.mixer == "mlp" and mix_in.is_cuda:
            # rows at a pitch of a multiple of 8: tensor cores want 16 bytes, L is odd; a CPU is 5% slower so
            mix_in = F.pad(mix_in, (0, -mix_in.shape[1] % 8))[:, :mix_in.shape[1]]
        return mix_in, *others

    def forward(self, h, weights, rope, score_mod):
        """(B, L, D) to the same, weights of `cast`; with mixer mlp (L, B, D), see swiglu_over_positions."""
        mix_in, mix_out, mlp_in, mlp_out = weights
        if self.mixer == "mlp":
            h = rms_norm(h + swiglu_over_positions(h, mix_in, mix_out), dim=0)
        else:
            h = rms_norm(h + attention(h, mix_in, mix_out, self.num_heads, rope, score_mod, self.flex))
        return rms_norm(h + swiglu(h, mlp_in, mlp_out))


# ---------------------------------------------------------------------------------------------
# The model

class TRM(nn.Module):
    """The model. `step` does one supervision step on a carry; act_loss scores what it gave."""

    def __init__(self, cfg, generator):
        super().__init__()
        D, V = cfg.hidden_size, cfg.target_dim or cfg.vocab_size
        self.cfg = cfg
        self.dtype = getattr(torch, cfg.dtype)
        # x has unit variance for a token, and for numbers of unit variance
        rows, std = cfg.input_dim or V, (D * max(1, cfg.input_dim)) ** -0.5
        self.embed_tokens = nn.Parameter(trunc_normal((rows, D), std, generator))
        if cfg.pos_encodings == "learned":
            self.embed_pos = nn.Parameter(trunc_normal((cfg.length, D), D ** -0.5, generator))
        self.blocks = nn.ModuleList(Block(cfg, generator) for _ in range(cfg.num_layers))
        self.lm_head = nn.Parameter(trunc_normal((V, D), D ** -0.5, generator))
        self.q_head = nn.Parameter(torch.zeros(2, D))
        self.q_bias = nn.Parameter(torch.full((2,), -5.0))
        self.register_buffer("y0", trunc_normal((D,), 1.0, generator))
        self.register_buffer("z0", trunc_normal((D,), 1.0, generator))
        # no Parameter: its own optimizer touches only the rows in use, and a dense gradient would be as large
        self.register_buffer("puzzle_emb", torch.zeros(cfg.num_puzzles, cfg.puzzle_emb_ndim))
        self.score_mod = SCORE_MODS[cfg.score_mod](cfg)
        if cfg.rope:
            cos, sin = rope_tables(cfg.length, D // cfg.num_heads)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def positions(self, table, length):
        """The rows of a table (L, ...) for states of `length` positions: fewer than L on a canvas, a square
        window of the board, whose cell in row r, column c keeps the place of row r, column c of the board."""
        P, S = self.cfg.puzzle_emb_len, self.cfg.seq_len
        if length == P + S:
            return table
        side, board = math.isqrt(length - P), math.isqrt(S)
        window = table[P:].unflatten(0, (board, board))[:side, :side].flatten(0, 1)
        return torch.cat((table[:P], window))

    def embed(self, inputs, rows):
        """x (B, L, D) from tokens (B, S) or numbers (B, S, input_dim) and puzzle rows (B,
        puzzle_emb_ndim)."""
        cfg, E = self.cfg, self.embed_tokens.to(self.dtype)
        if not cfg.regression:  # a product with one-hot rows: its gradient adds up in order, without atomics
            vocabulary = torch.arange(cfg.vocab_size, device=inputs.device, dtype=inputs.dtype)
            inputs = inputs[..., None] == vocabulary
        x = inputs.to(self.dtype) @ E                                                # (B, S, D)
        if cfg.puzzle_emb_len:
            P, D = cfg.puzzle_emb_len, cfg.hidden_size
            prefix = F.pad(rows, (0, P * D - cfg.puzzle_emb_ndim)).to(self.dtype)
            x = torch.cat((prefix.view(-1, P, D), x), dim=1)                         # (B, L, D)
        if cfg.pos_encodings == "learned":
            x = math.sqrt(0.5) * (x + self.positions(self.embed_pos, x.shape[1]).to(self.dtype))
        return math.sqrt(cfg.hidden_size) * x

    def net(self, h, injection, weights=None):
        """The one tiny network, (B, L, D) to (B, L, D). weights: of every block's `cast`; by default they are
        cast here, so that autograd adds up the gradients of all uses in float32."""
        h, rope = h + injection, None
        if self.cfg.rope:
            rope = self.positions(self.cos, h.shape[1]), self.positions(self.sin, h.shape[1])
        for i, block in enumerate(self.blocks):
            h = block(h, weights[i] if weights else block.cast(self.dtype), rope, self.score_mod)
        return h

    def cycle(self, x, y, z, weights=None):
        """One round: n times z = net(z, y + x), then y = net(y, z)."""
        injection = y + x
        for _ in range(self.cfg.L_cycles):
            z = self.net(z, injection, weights)
        return self.net(y, z, weights), z

    def improve(self, x, y, z):
        """The recursion of one supervision step: T rounds, all but the last without gradient."""
        grad = torch.is_grad_enabled()
        rounds = self.cfg.H_cycles - grad       # those without gradient
        if self.cfg.mixer == "mlp":     # positions first: see swiglu_over_positions
            x, y, z = (h.transpose(0, 1).contiguous() for h in (x, y, z))
        with torch.no_grad():           # cast once for all these rounds: at every use costs a CPU 5 to 10%
            weights = [block.cast(self.dtype) for block in self.blocks] if rounds else None
            for _ in range(rounds):
                y, z = self.cycle(x, y, z, weights)
        if grad and not torch.compiler.is_compiling():
            # every application of net below then has one signature, and compiles once
            y, z = y.detach().requires_grad_(), z.detach().requires_grad_()
        if grad:
            y, z = self.cycle(x, y, z)
        return (y.transpose(0, 1), z.transpose(0, 1)) if self.cfg.mixer == "mlp" else (y, z)

    def heads(self, y):
        """logits (B, S, V) (or predictions (B, S, target_dim)) and q (B, 2) float32: halt, continue."""
        logits = F.linear(y[:, self.cfg.puzzle_emb_len:], self.lm_head.to(self.dtype))
        q = F.linear(y[:, 0], self.q_head.to(self.dtype), self.q_bias.to(self.dtype))
        return logits, q.float()

    def empty_carry(self, batch):
        """A carry whose rows are all halted, so that the first step fills them. Takes shapes from `batch`."""
        B, cfg = len(batch.puzzle_ids), self.cfg
        length = cfg.puzzle_emb_len + batch.inputs.shape[1]
        state = torch.zeros(B, length, cfg.hidden_size, dtype=self.dtype, device=self.y0.device)
        steps = torch.zeros(B, dtype=torch.int32, device=state.device)
        return Carry(state, state.clone(), steps, torch.ones_like(steps, dtype=torch.bool),
                     torch.zeros_like(batch.inputs), torch.zeros_like(batch.labels),
                     torch.zeros_like(batch.puzzle_ids))

    def admit(self, carry, batch):
        """Give the halted rows of the carry the rows of `batch`, y0, z0 and 0 steps; the others drop the new
        row."""
        def choose(new, old):
            return torch.where(carry.halted.view(-1, *[1] * (old.ndim - 1)), new, old)
        return Carry(choose(self.y0.to(self.dtype), carry.y), choose(self.z0.to(self.dtype), carry.z),
                     choose(torch.zeros_like(carry.steps), carry.steps), carry.halted,
                     choose(batch.inputs, carry.inputs), choose(batch.labels, carry.labels),
                     choose(batch.puzzle_ids, carry.puzzle_ids))

    def step(self, carry, batch, delta=None, max_steps=None):
        """One supervision step: (carry, batch) to (new carry, logits, q).

        delta: (B, puzzle_emb_ndim) zeros whose gradient is that of the puzzle rows in use.
        max_steps: int or int tensor, the steps after which a row halts unless exploration holds it;
            halt_max_steps by default.
        """
        cfg = self.cfg
        carry = self.admit(carry, batch)
        rows = self.puzzle_emb[carry.puzzle_ids]                                     # (B, puzzle_emb_ndim)
        x = self.embed(carry.inputs, rows if delta is None else rows + delta)
        y, z = self.improve(x, carry.y, carry.z)
        logits, q = self.heads(y)
        steps = carry.steps + 1
        halted = steps >= (cfg.halt_max_steps if max_steps is None else max_steps)
        if self.training:
            wants_to_halt = q[:, 0] > (q[:, 1] if cfg.q_continue else 0)
            halted = (halted | wants_to_halt) & (steps >= batch.min_steps)
        return carry._replace(y=y.detach(), z=z.detach(), steps=steps, halted=halted), logits, q

    def continue_target(self, carry):
        """Q-learning target of q_continue (HRM, arXiv 2506.21734, section 2): what the next step would
        promise."""
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


class RowScores(NamedTuple):
    """How right every row of a batch is, (B,) each."""
    loss: torch.Tensor      # mean over the cells asked
    cell: torch.Tensor      # share of right cells; regression: mean absolute error
    right: torch.Tensor     # bool, the whole row
    n: torch.Tensor         # cells asked, 0 in a row of padding


class Names(NamedTuple):
    """What the fields of RowScores are called in logs and results."""
    loss: str = "lm_loss"
    cell: str = "cell_acc"
    right: str = "exact_acc"


OVER_ALL_ROWS = {"lm_loss", "regression_loss", "q_halt_loss", "q_continue_loss"}     # the others: halted ones


def metric_names(cfg):
    return Names("regression_loss", "mae", "within_tolerance") if cfg.regression else Names()


def token_rows(cfg, logits, labels):
    """RowScores of logits (B, S, V) against labels (B, S)."""
    asked = labels != IGNORE                                                         # (B, S)
    n = asked.sum(-1)
    log_p = LOG_PROBS[cfg.loss](logits)
    nll = -log_p.gather(-1, torch.where(asked, labels, 0).long()[..., None])[..., 0]
    right = (asked & (logits.argmax(-1) == labels)).sum(-1)
    some = n.clamp(min=1)
    return RowScores(torch.where(asked, nll, 0).sum(-1) / some, right / some, right == n, n)


def regression_rows(cfg, predictions, targets):
    """RowScores of predictions against targets, both (B, S, target_dim), NaN where nothing is asked."""
    asked = ~targets.isnan().any(-1)                                                 # (B, S)
    n = asked.sum(-1)
    diff = torch.where(asked[..., None], predictions.float() - targets.nan_to_num(), 0)
    cells = n.clamp(min=1) * targets.shape[-1]
    mse = diff.square().sum((-1, -2)) / cells
    return RowScores(mse, diff.abs().sum((-1, -2)) / cells, mse.detach() < cfg.halt_tolerance, n)


def row_scores(cfg, logits, labels):
    return (regression_rows if cfg.regression else token_rows)(cfg, logits, labels)


def act_loss(cfg, carry, logits, q, continue_target=None):
    """Loss summed over rows (divide by the global batch size), and the sums behind the metrics by name.

    Returns (loss, {name: 0-D tensor}): `count` is the number of rows that halted in this step and have
    labels; the sums of OVER_ALL_ROWS are over all rows, the others over those that count.
    """
    rows, names = row_scores(cfg, logits, carry.labels), metric_names(cfg)
    q_halt_loss = F.binary_cross_entropy_with_logits(q[:, 0], rows.right.float(), reduction="sum")
    q_continue_loss = torch.zeros_like(q_halt_loss)
    if continue_target is not None:
        q_continue_loss = F.binary_cross_entropy_with_logits(q[:, 1], continue_target, reduction="sum")
    loss = rows.loss.sum() + 0.5 * (q_halt_loss + q_continue_loss)
    with torch.no_grad():
        scored = carry.halted & (rows.n > 0)
        means = {names.cell: rows.cell, names.right: rows.right, "q_halt_acc": (q[:, 0] >= 0) == rows.right,
                 "steps": carry.steps}
        sums = {"count": scored.sum(), **{name: (value * scored).sum() for name, value in means.items()},
                names.loss: rows.loss.sum(), "q_halt_loss": q_halt_loss, "q_continue_loss": q_continue_loss}
        sums = {name: value.detach().float() for name, value in sums.items()}
    return loss, sums


# ---------------------------------------------------------------------------------------------
# Arithmetic, loading, compiling

class Flops(NamedTuple):
    """FLOPs of one row and supervision step; a multiply-add is 2, matrix products only."""
    forward: int
    step: int       # of training: forward and backward
    embed: int      # the part of forward that evaluation does once a puzzle, not once a step


def flops(cfg):
    """Flops of a Config. A net costs twice its multiply-adds; T (n + 1) nets go forward, and backward costs
    the last n + 1 twice more."""
    D, L, S = cfg.hidden_size, cfg.length, cfg.seq_len
    attn, mlp = 4 * L * D * D + 2 * L * L * D, 3 * D * L * cfg.inner_width(L)
    mixer = attn if cfg.mixer == "attn" else mlp
    net = 2 * cfg.num_layers * (mixer + 3 * L * D * cfg.inner_width(D))
    embed = 2 * S * D * (cfg.input_dim or cfg.vocab_size)
    ends = embed + 2 * S * D * (cfg.target_dim or cfg.vocab_size) + 4 * D
    forward = cfg.H_cycles * (cfg.L_cycles + 1) * net + ends
    # y and z enter the last round as leaves that want a gradient, and the one-hot input wants none
    return Flops(forward, forward + 2 * (cfg.L_cycles + 1) * net + 2 * ends - embed, embed)


def train_bytes(cfg, rows, part):
    """Peak memory of training `rows` rows of a GPU in parts of `part`: what (n + 1) nets keep for the
    backward pass, and some 16 tensors like y. Its constants were counted on torch's own allocator, with
    compiled nets in bfloat16."""
    D, L = cfg.hidden_size, cfg.length
    widths = 8 * D + 4 * cfg.inner_width(D)
    position = 1.956 * widths       # bytes that a block keeps of a position
    if cfg.mixer == "mlp":          # instead of attention's: gate, up and their product, over positions
        position = 1.352 * widths + 6 * D * cfg.inner_width(L) / L
    kept = (cfg.L_cycles + 1) * cfg.num_layers * position + 24 * D
    scale = 2 if cfg.dtype == "float32" else 1
    fixed = 4 * cfg.num_puzzles * cfg.puzzle_emb_ndim + 2 ** 29     # the table; weights, their optimizer ...
    return int(scale * L * (kept * part + 8 * D * rows)) + fixed


def parts_that_fit(cfg, rows, free):
    """The fewest equal parts of `rows` rows whose training needs at most `free` bytes, 5% for fragments
    included. Raises UserError when not even one row fits."""
    for parts in range(1, rows + 1):
        if rows % parts == 0 and 1.05 * train_bytes(cfg, rows, rows // parts) <= free:
            return parts
    gib = f"{free / 2 ** 30:.1f} GiB"
    raise UserError(f"{rows} rows do not fit the {gib} that this GPU has free, not even one at a time; lower "
                    f"--global-batch-size or --hidden-size, or take more GPUs")


def build(cfg, state):
    """A TRM with the given state dict. Raises UserError that names what does not fit."""
    with torch.device("meta"):
        model = TRM(cfg, None)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as e:
        report = " ".join(str(e).split()).removeprefix("Error(s) in loading state_dict for TRM: ")
        cure = "; the widths of mlp_in follow from expansion and width_multiple" if "mlp_in" in report else ""
        raise UserError(f"the weights do not fit: {report[:400]}{cure}") from None
    if cfg.rope:        # not part of a state dict
        model.cos, model.sin = rope_tables(cfg.length, cfg.hidden_size // cfg.num_heads)
    return model.requires_grad_()


def compile_model(model, backend="inductor"):
    """Compile `net` in place: the piece that repeats, one small graph with and one without gradient for
    every length of its states."""
    torch._dynamo.config.recompile_limit = 64   # 8 by default: four canvases in training and evaluation
    model.net = torch.compile(model.net, fullgraph=True, dynamic=False, backend=backend)
