"""Tiny Recursive Model (TRM, arXiv 2510.04871): a two-block network (7M parameters) applied recursively to
its own answer y and a latent state z.

    paper                           here                     published code and checkpoints
    question x                      x                        input_embeddings
    answer y                        y                        z_H
    latent z                        z                        z_L
    T recursions per step           H_cycles                 H_cycles
    n latent updates per recursion  L_cycles                 L_cycles
    N_sup supervision steps         halt_max_steps           halt_max_steps
    net                             TRM.net                  L_level
    latent_recursion                TRM.latent_recursion     -
    deep_recursion                  TRM.deep_recursion       inner model
    state carried between steps     Carry                    carry, inner_carry

Shapes: B batch, S cells of a puzzle, P prefix positions of the puzzle embedding, L = P + S, D hidden size,
H heads, V vocabulary. This module never reads arguments, the environment, a device or a rank.
"""

import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from tools.common import IGNORE_LABEL, bounded, require, user_error

COUNT = bounded(int, 1)
COUNT_OR_ZERO = bounded(int, 0)

# ---------------------------------------------------------------------------------------------
# Configuration


def option(default, help, **argparse_options):
    """A field of Config that is also a flag of train.py."""
    return field(default=default, metadata={"help": help, **argparse_options})


@dataclass
class Config:
    """Architecture of one model. The first five fields are sizes of the dataset; every other field is a flag
    of train.py, so a new setting takes one line here. Raises UserError for contradictory values."""

    # V; 0 for a regression task
    vocab_size: int = 11
    # S
    seq_len: int = 81
    # rows of the puzzle table; row 0 is the blank puzzle
    num_puzzles: int = 1
    # regression only: numbers per input cell
    input_dim: int = 0
    # regression only: numbers per target cell
    target_dim: int = 0
    mixer: str = option("attn", "layer that mixes positions", choices=["attn", "mlp"])
    attention: str = option("flex", "attention kernel on a GPU", choices=["flex", "sdpa"])
    pos_encodings: str = option(
        "rope",
        "position encoding (rope needs --mixer attn)",
        choices=["rope", "learned", "none"],
    )
    score_mod: str = option(
        "none",
        "change of the attention scores, see SCORE_MODS in model.py",
        choices=["none", "grid"],
    )
    hidden_size: int = option(512, "hidden size D", type=COUNT)
    num_heads: int = option(8, "number of attention heads", type=COUNT)
    num_layers: int = option(2, "number of blocks in the network", type=COUNT)
    expansion: float = option(4.0, "expansion factor of the SwiGLU", type=bounded(float, 0.01, 1000))
    width_multiple: int = option(256, "round SwiGLU widths up to a multiple of this", type=COUNT)
    puzzle_emb_len: int = option(16, "prefix positions P of the puzzle embedding", type=COUNT_OR_ZERO)
    puzzle_emb_ndim: int = option(512, "width of the puzzle table, at most P x D", type=COUNT_OR_ZERO)
    H_cycles: int = option(3, "recursions T per supervision step", type=COUNT)
    L_cycles: int = option(6, "latent updates n per recursion", type=COUNT)
    halt_max_steps: int = option(16, "maximum number of supervision steps N_sup", type=COUNT)
    loss: str = option("stablemax", "token loss", choices=["stablemax", "softmax"])
    halt_tolerance: float = option(
        0.01,
        "regression: a row counts as exact when its mean squared error is below this",
        type=bounded(float, 0),
    )
    dtype: str = option(
        "bfloat16",
        "dtype of the activations (auto: the faster one on this device)",
        choices=["bfloat16", "float32", "auto"],
    )

    def __post_init__(self):
        even_heads = self.hidden_size % (2 * self.num_heads) == 0
        require(
            self.mixer == "mlp" or even_heads,
            f"--hidden-size {self.hidden_size} is not a multiple of 2 x --num-heads {self.num_heads}",
        )
        prefix_size = self.puzzle_emb_len * self.hidden_size
        require(
            self.puzzle_emb_ndim <= prefix_size,
            f"--puzzle-emb-ndim {self.puzzle_emb_ndim} exceeds the prefix of {prefix_size} numbers "
            f"(--puzzle-emb-len x --hidden-size)",
        )
        is_square = math.isqrt(self.seq_len) ** 2 == self.seq_len
        require(
            self.score_mod == "none" or (self.mixer == "attn" and is_square),
            f"--score-mod {self.score_mod} needs --mixer attn and square grids",
        )

    @property
    def length(self):
        """L, the number of positions."""
        return self.puzzle_emb_len + self.seq_len

    @property
    def regression(self):
        return self.target_dim > 0

    @property
    def rope(self):
        return self.mixer == "attn" and self.pos_encodings == "rope"

    def inner_width(self, n):
        """Inner width of a SwiGLU over n features: 2/3 of expansion * n, rounded up."""
        width = max(1, round(self.expansion * n * 2 / 3))
        return math.ceil(width / self.width_multiple) * self.width_multiple


def config_from_dict(saved, source="the checkpoint", **changes):
    """A Config from a dict read from a file; `changes` override it. Fields it lacks keep their defaults.

    Raises UserError naming the source for an unknown field, a wrong type or a value out of range."""
    known = {f.name: f for f in fields(Config)}
    saved = dict(saved)
    # earlier versions had this setting; only its default is supported
    if saved.get("q_continue") is False:
        del saved["q_continue"]
    for name, value in saved.items():
        require(name in known, f"{source} has the unknown setting {name}; it was written by other code")
        check_field(known[name], value, source)
    return Config(**{**saved, **changes})


def check_field(f, value, source):
    """Refuse a value that does not fit a field of Config."""
    choices = f.metadata.get("choices")
    if choices:
        require(value in choices, f"{source}: {f.name} is {value!r}, but must be one of {', '.join(choices)}")
        return
    limits = f.metadata.get("type", COUNT_OR_ZERO)
    # bool is a subclass of int, so compare types exactly
    allowed_types = (int, float) if limits.kind is float else (int,)
    require(
        type(value) in allowed_types and limits.low <= value <= limits.high,
        f"{source}: {f.name} is {value!r}, but must be {limits.kind.__name__} and at least {limits.low}",
    )


class Carry(NamedTuple):
    """State between supervision steps, one row per slot of the batch."""

    # (B, L, D) answer state, detached
    y: torch.Tensor
    # (B, L, D) latent state, detached
    z: torch.Tensor
    # (B,) int32, supervision steps done on this puzzle
    steps: torch.Tensor
    # (B,) bool, the row takes a new puzzle at the next step
    halted: torch.Tensor
    # (B, S) int32 tokens, or (B, S, input_dim) float32
    inputs: torch.Tensor
    # (B, S) int32 with IGNORE_LABEL, or (B, S, target_dim) float32 with NaN
    labels: torch.Tensor
    # (B,) int32 rows of the puzzle table
    puzzle_ids: torch.Tensor


class Batch(NamedTuple):
    """New puzzles for the halted rows."""

    inputs: torch.Tensor
    labels: torch.Tensor
    puzzle_ids: torch.Tensor
    # (B,) int32, fewest supervision steps before a row may halt; 0: any
    min_halt_steps: torch.Tensor


# ---------------------------------------------------------------------------------------------
# Layers


def trunc_normal(shape, std, generator):
    """float32 tensor from a normal distribution truncated at two standard deviations, with true std `std`.

    nn.init.trunc_normal_ alone would leave 0.88 of the requested std."""
    std_of_unit_normal_cut_at_2 = 0.8796256610342398
    scale = std / std_of_unit_normal_cut_at_2
    return nn.init.trunc_normal_(
        torch.empty(shape),
        std=scale,
        a=-2 * scale,
        b=2 * scale,
        generator=generator,
    )


def rms_norm(h, dim=-1):
    """RMS norm over one axis, computed in float32, without a weight; eps 1e-5."""
    h32 = h.float()
    mean_square = h32.square().mean(dim, keepdim=True)
    return (h32 * torch.rsqrt(mean_square + 1e-5)).to(h.dtype)


def swiglu(h, w_gate_up, w_down):
    """SwiGLU over features: (..., D) to (..., D)."""
    gate, up = F.linear(h, w_gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_down)


def swiglu_over_positions(h, w_gate_up, w_down):
    """SwiGLU over the first axis of h (L, B, D): one product for the whole batch, without a transpose."""
    gate, up = (w_gate_up @ h.flatten(1)).chunk(2)  # (I, B * D) each
    return (w_down @ (F.silu(gate) * up)).view_as(h)


def rope_tables(length, head_dim):
    """cos and sin, each (length, head_dim) float32, base 10000. The first half of the features is rotated
    with the second half, so the sine of the first half is negated."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    positions = torch.arange(length, dtype=torch.float32)
    angle = torch.outer(positions, 10000.0**-exponents)  # (length, head_dim / 2)
    cos = angle.cos().repeat(1, 2)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=1)
    return cos, sin


def rotate(q, cos, sin):
    """Apply RoPE to q (B, L, H, head_dim) in float32; returns q's dtype."""
    q32 = q.float()
    halves = q32.unflatten(-1, (2, -1))  # (B, L, H, 2, head_dim / 2)
    swapped = halves.flip(-2).flatten(-2)
    cos, sin = cos[:, None], sin[:, None]  # broadcast over heads
    rotated = q32 * cos + swapped * sin
    return rotated.to(q.dtype)


def grid_score_mod(cfg):
    """Four of every five heads see a single cell: the one above, below, left or right (at an edge, the cell
    itself). The fifth head and the prefix positions see everything."""
    size = math.isqrt(cfg.seq_len)
    P = cfg.puzzle_emb_len

    def score_mod(score, b, h, i, j):
        row = (i - P) // size
        col = (i - P) % size
        direction = h % 5
        # move to the neighbour of query i, unless that would leave the grid
        row = row - ((direction == 0) & (row > 0)).int()
        row = row + ((direction == 1) & (row < size - 1)).int()
        col = col - ((direction == 2) & (col > 0)).int()
        col = col + ((direction == 3) & (col < size - 1)).int()
        is_neighbour = j == P + row * size + col
        visible = is_neighbour | (direction == 4) | (i < P)
        return torch.where(visible, score, -1e4)

    return score_mod


def no_score_mod(cfg):
    return None


# Add your own function here and its name to the choices of Config.score_mod.
SCORE_MODS = {"none": no_score_mod, "grid": grid_score_mod}


def attend(
    q,
    k,
    v,
    score_mod=None,
    use_flex=True,
):
    """softmax(score_mod(q k / sqrt(head_dim))) v for q, k, v of shape (B, H, L, head_dim).

    A mask is a score_mod that returns -inf; a row that sees nothing gives zeros, as in FlexAttention."""
    compiled = torch.compiler.is_compiling()
    if q.is_cuda and compiled and use_flex and q.shape[-1] >= 16:
        # Without BACKEND, lengths below 128 would use flex decoding, whose kernel spills registers.
        return flex_attention(q, k, v, score_mod=score_mod, kernel_options={"BACKEND": "TRITON"})
    if score_mod is None and q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    # Plain products on a CPU: FlexAttention has no CPU backward (torch 2.13), and at these lengths the
    # flash kernel is slower.
    B, H, L, head_dim = q.shape
    scores = (q / math.sqrt(head_dim) @ k.mT).float()  # (B, H, L, L)
    if score_mod is not None:
        # indices that broadcast to (B, H, L, L), as FlexAttention would pass them one by one
        b = torch.arange(B, device=q.device).view(B, 1, 1, 1)
        h = torch.arange(H, device=q.device).view(H, 1, 1)
        i = torch.arange(L, device=q.device).view(L, 1)
        j = torch.arange(L, device=q.device)
        scores = score_mod(scores, b, h, i, j)
    # softmax; the clamps keep a row that is all -inf finite
    row_max = scores.detach().amax(-1, keepdim=True).clamp(min=-1e30)
    # exp2 is faster than exp, and dividing after the product with v saves a pass over (L, L)
    weight = ((scores - row_max) * math.log2(math.e)).exp2()
    total = weight.sum(-1, keepdim=True).clamp(min=1)
    out = weight.to(q.dtype) @ v / total
    return out.to(q.dtype)


def attention(h, w_qkv, w_out, num_heads, rope, score_mod, use_flex=True):
    """Multi-head self-attention: (B, L, D) to (B, L, D). rope: (cos, sin) or None."""
    B, L, D = h.shape
    qkv = F.linear(h, w_qkv).view(B, L, 3, num_heads, D // num_heads)
    q, k, v = qkv.unbind(2)  # (B, L, H, D/H) each
    if rope is not None:
        q = rotate(q, *rope)
        k = rotate(k, *rope)
    # heads before positions for the kernel, and back
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    out = attend(q, k, v, score_mod, use_flex)  # (B, H, L, D/H)
    out = out.transpose(1, 2).reshape(B, L, D)
    return F.linear(out, w_out)


class Block(nn.Module):
    """A mixer over positions, then a SwiGLU over features, each followed by a norm (post-norm)."""

    def __init__(self, cfg, generator):
        super().__init__()
        D = cfg.hidden_size
        L = cfg.length
        if cfg.mixer == "mlp":
            inner = cfg.inner_width(L)
            mix_in, mix_out = (2 * inner, L), (L, inner)
        else:
            mix_in, mix_out = (3 * D, D), (D, D)
        inner = cfg.inner_width(D)
        shapes = {
            "mix_in": mix_in,
            "mix_out": mix_out,
            "mlp_in": (2 * inner, D),
            "mlp_out": (D, inner),
        }
        for name, shape in shapes.items():
            fan_in = shape[1]
            self.register_parameter(name, nn.Parameter(trunc_normal(shape, fan_in**-0.5, generator)))
        self.mixer = cfg.mixer
        self.num_heads = cfg.num_heads
        self.use_flex = cfg.attention == "flex"

    def cast(self, dtype):
        """(mix_in, mix_out, mlp_in, mlp_out) in the compute dtype."""
        mix_in = self.mix_in.to(dtype)
        if self.mixer == "mlp" and mix_in.is_cuda:
            # Tensor cores want rows of a multiple of 16 bytes, and L is odd. A CPU would be 5% slower.
            L = mix_in.shape[1]
            mix_in = F.pad(mix_in, (0, -L % 8))[:, :L]
        mix_out = self.mix_out.to(dtype)
        return mix_in, mix_out, self.mlp_in.to(dtype), self.mlp_out.to(dtype)

    def forward(self, h, weights, rope, score_mod):
        """(B, L, D) to the same shape; (L, B, D) with mixer mlp. weights: what `cast` returned."""
        mix_in, mix_out, mlp_in, mlp_out = weights
        # mix positions
        if self.mixer == "mlp":
            mixed = swiglu_over_positions(h, mix_in, mix_out)
            h = rms_norm(h + mixed, dim=0)
        else:
            mixed = attention(
                h,
                mix_in,
                mix_out,
                self.num_heads,
                rope,
                score_mod,
                self.use_flex,
            )
            h = rms_norm(h + mixed)
        # mix features
        return rms_norm(h + swiglu(h, mlp_in, mlp_out))


# ---------------------------------------------------------------------------------------------
# The model


class TRM(nn.Module):
    """The model. `step` runs one supervision step on a carry; act_loss scores the result."""

    def __init__(self, cfg, generator):
        super().__init__()
        self.cfg = cfg
        self.dtype = getattr(torch, cfg.dtype)
        D = cfg.hidden_size
        in_rows = cfg.input_dim or cfg.vocab_size
        out_rows = cfg.target_dim or cfg.vocab_size
        # Parameters. x has unit variance for tokens, and for numbers of unit variance.
        input_std = (D * max(1, cfg.input_dim)) ** -0.5
        self.embed_tokens = nn.Parameter(trunc_normal((in_rows, D), input_std, generator))
        if cfg.pos_encodings == "learned":
            self.embed_pos = nn.Parameter(trunc_normal((cfg.length, D), D**-0.5, generator))
        self.blocks = nn.ModuleList(Block(cfg, generator) for _ in range(cfg.num_layers))
        self.lm_head = nn.Parameter(trunc_normal((out_rows, D), D**-0.5, generator))
        self.q_head = nn.Parameter(torch.zeros(2, D))
        self.q_bias = nn.Parameter(torch.full((2,), -5.0))
        # Initial states: fixed random vectors, saved with the model but never trained.
        self.register_buffer("y0", trunc_normal((D,), 1.0, generator))
        self.register_buffer("z0", trunc_normal((D,), 1.0, generator))
        # The puzzle table is a buffer, not a Parameter: a dense gradient would be as large as the table.
        # SignSGD (train.py) updates only the rows in use.
        self.register_buffer("puzzle_emb", torch.zeros(cfg.num_puzzles, cfg.puzzle_emb_ndim))
        self.score_mod = SCORE_MODS[cfg.score_mod](cfg)
        if cfg.rope:
            cos, sin = rope_tables(cfg.length, D // cfg.num_heads)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def positions(self, table, length):
        """The rows of a position table (L, ...) for a sequence of `length` positions.

        A shorter sequence is a square canvas: cell (r, c) keeps the position of cell (r, c) of the whole
        grid, so that one model serves all canvases."""
        P, S = self.cfg.puzzle_emb_len, self.cfg.seq_len
        if length == P + S:
            return table
        side = math.isqrt(S)
        canvas = math.isqrt(length - P)
        grid = table[P:].unflatten(0, (side, side))
        cells = grid[:canvas, :canvas].flatten(0, 1)
        return torch.cat((table[:P], cells))

    def embed(self, inputs, puzzle_rows):
        """x (B, L, D) from tokens (B, S) or numbers (B, S, input_dim), and rows of the puzzle table
        (B, puzzle_emb_ndim)."""
        cfg = self.cfg
        if not cfg.regression:
            # A product with one-hot rows: its gradient adds up in a fixed order, without atomics.
            tokens = torch.arange(cfg.vocab_size, device=inputs.device, dtype=inputs.dtype)
            inputs = inputs[..., None] == tokens  # (B, S, V)
        x = inputs.to(self.dtype) @ self.embed_tokens.to(self.dtype)  # (B, S, D)
        if cfg.puzzle_emb_len:
            P, D = cfg.puzzle_emb_len, cfg.hidden_size
            # zero-pad a row of the table to P * D numbers, then view it as P positions
            padded = F.pad(puzzle_rows, (0, P * D - cfg.puzzle_emb_ndim))
            prefix = padded.to(self.dtype).view(-1, P, D)
            x = torch.cat((prefix, x), dim=1)  # (B, L, D)
        if cfg.pos_encodings == "learned":
            pos = self.positions(self.embed_pos, x.shape[1])
            x = math.sqrt(0.5) * (x + pos.to(self.dtype))
        return math.sqrt(cfg.hidden_size) * x

    def net(self, h, injection, weights=None):
        """The network: (B, L, D) to (B, L, D). weights: the `cast` weights of every block; by default they
        are cast here, so that autograd sums the gradients of all uses in float32."""
        rope = None
        if self.cfg.rope:
            length = h.shape[1]
            rope = self.positions(self.cos, length), self.positions(self.sin, length)
        h = h + injection
        for i, block in enumerate(self.blocks):
            block_weights = weights[i] if weights else block.cast(self.dtype)
            h = block(h, block_weights, rope, self.score_mod)
        return h

    def latent_recursion(self, x, y, z, weights=None):
        """n times z = net(z, y + x), then y = net(y, z). Returns (y, z)."""
        injection = y + x
        for _ in range(self.cfg.L_cycles):
            z = self.net(z, injection, weights)
        return self.net(y, z, weights), z

    def deep_recursion(self, x, y, z):
        """T latent recursions, all but the last without gradient. Returns (y, z)."""
        with_grad = torch.is_grad_enabled()
        n_without_grad = self.cfg.H_cycles - int(with_grad)
        positions_first = self.cfg.mixer == "mlp"  # see swiglu_over_positions
        if positions_first:
            x = x.transpose(0, 1).contiguous()
            y = y.transpose(0, 1).contiguous()
            z = z.transpose(0, 1).contiguous()
        # all recursions but the last, without gradient
        with torch.no_grad():
            weights = None
            if n_without_grad:
                # cast once for all of them: casting at every use costs a CPU 5 to 10%
                weights = [block.cast(self.dtype) for block in self.blocks]
            for _ in range(n_without_grad):
                y, z = self.latent_recursion(x, y, z, weights)
        # the last recursion, with gradient
        if with_grad:
            if not torch.compiler.is_compiling():
                # every call of net in it then has the same signature and compiles once
                y = y.detach().requires_grad_()
                z = z.detach().requires_grad_()
            y, z = self.latent_recursion(x, y, z)
        if positions_first:
            y = y.transpose(0, 1)
            z = z.transpose(0, 1)
        return y, z

    def heads(self, y):
        """logits (B, S, V), or predictions (B, S, target_dim), and q (B, 2) float32: halt, continue."""
        # logits are read at the cells
        cells = y[:, self.cfg.puzzle_emb_len :]
        logits = F.linear(cells, self.lm_head.to(self.dtype))
        # q is read at the first position
        q_weight = self.q_head.to(self.dtype)
        q_bias = self.q_bias.to(self.dtype)
        q = F.linear(y[:, 0], q_weight, q_bias)
        return logits, q.float()

    def initial_carry(self, batch):
        """A carry whose rows are all halted, so that the first step fills them. Takes its shapes from
        `batch`."""
        B, S = batch.inputs.shape[:2]
        device = self.y0.device
        shape = (B, self.cfg.puzzle_emb_len + S, self.cfg.hidden_size)
        return Carry(
            y=torch.zeros(shape, dtype=self.dtype, device=device),
            z=torch.zeros(shape, dtype=self.dtype, device=device),
            steps=torch.zeros(B, dtype=torch.int32, device=device),
            halted=torch.ones(B, dtype=torch.bool, device=device),
            inputs=torch.zeros_like(batch.inputs),
            labels=torch.zeros_like(batch.labels),
            puzzle_ids=torch.zeros_like(batch.puzzle_ids),
        )

    def reset_halted(self, carry, batch):
        """Give halted rows the new puzzle in their slot, y0, z0 and 0 steps. The other rows keep their
        puzzle, and the new one in their slot is dropped."""

        def choose(new, old):
            halted = carry.halted.view(-1, *[1] * (old.ndim - 1))
            return torch.where(halted, new, old)

        return Carry(
            y=choose(self.y0.to(self.dtype), carry.y),
            z=choose(self.z0.to(self.dtype), carry.z),
            steps=choose(torch.zeros_like(carry.steps), carry.steps),
            halted=carry.halted,
            inputs=choose(batch.inputs, carry.inputs),
            labels=choose(batch.labels, carry.labels),
            puzzle_ids=choose(batch.puzzle_ids, carry.puzzle_ids),
        )

    def step(self, carry, batch, puzzle_emb_delta=None, max_steps=None):
        """One supervision step: (carry, batch) to (new carry, logits, q).

        puzzle_emb_delta: zeros (B, puzzle_emb_ndim), added to the puzzle rows to receive their gradient.
        max_steps: int or int tensor, the number of steps after which a row halts; halt_max_steps by
            default."""
        carry = self.reset_halted(carry, batch)
        puzzle_rows = self.puzzle_emb[carry.puzzle_ids]  # (B, puzzle_emb_ndim)
        if puzzle_emb_delta is not None:
            puzzle_rows = puzzle_rows + puzzle_emb_delta
        x = self.embed(carry.inputs, puzzle_rows)
        y, z = self.deep_recursion(x, carry.y, carry.z)
        logits, q = self.heads(y)
        steps = carry.steps + 1
        halted = steps >= (self.cfg.halt_max_steps if max_steps is None else max_steps)
        if self.training:
            # halt early when q_halt > 0, but explore: some rows must run a minimum number of steps
            q_halt = q[:, 0]
            may_halt = steps >= batch.min_halt_steps
            halted = (halted | (q_halt > 0)) & may_halt
        carry = carry._replace(
            y=y.detach(),
            z=z.detach(),
            steps=steps,
            halted=halted,
        )
        return carry, logits, q


# ---------------------------------------------------------------------------------------------
# Loss and metrics


def log_stablemax(logits):
    """Log of stablemax (arXiv 2501.04697) over the last axis: softmax with s(x) in place of exp(x), where
    s(x) = x + 1 for x >= 0 and 1 / (1 - x) otherwise. float64, or float32 on MPS, which lacks float64."""
    x = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    negative_branch = 1 / (1 - x + 1e-30)
    s = torch.where(x < 0, negative_branch, x + 1)
    return torch.log(s / s.sum(-1, keepdim=True))


class RowScores(NamedTuple):
    """Scores of every row of a batch, (B,) each."""

    # mean over the labelled cells
    loss: torch.Tensor
    # share of correct cells; regression: mean absolute error
    cell_acc: torch.Tensor
    # bool, the whole row is correct
    exact: torch.Tensor
    # number of labelled cells; 0 in a row of padding
    n_labels: torch.Tensor


class MetricNames(NamedTuple):
    """What the scores are called in logs and results."""

    loss: str
    cell_acc: str
    exact: str


MEAN_OVER_ALL_ROWS = {"lm_loss", "regression_loss", "q_halt_loss"}  # the others: rows that just halted


def metric_names(cfg):
    if cfg.regression:
        return MetricNames("regression_loss", "mae", "within_tolerance")
    return MetricNames("lm_loss", "cell_acc", "exact_acc")


def score_tokens(cfg, logits, labels):
    """RowScores of logits (B, S, V) against labels (B, S)."""
    label_mask = labels != IGNORE_LABEL  # (B, S)
    n_labels = label_mask.sum(-1)
    # loss: mean negative log-likelihood of the labelled cells
    if cfg.loss == "stablemax":
        log_probs = log_stablemax(logits)
    else:
        log_probs = logits.float().log_softmax(-1)
    targets = torch.where(label_mask, labels, 0).long()
    nll = -log_probs.gather(-1, targets[..., None])[..., 0]  # (B, S)
    nll = torch.where(label_mask, nll, 0)
    # accuracy
    correct = label_mask & (logits.argmax(-1) == labels)  # (B, S)
    n_correct = correct.sum(-1)
    at_least_one = n_labels.clamp(min=1)  # rows of padding have no labels
    return RowScores(
        loss=nll.sum(-1) / at_least_one,
        cell_acc=n_correct / at_least_one,
        exact=n_correct == n_labels,
        n_labels=n_labels,
    )


def score_numbers(cfg, predictions, targets):
    """RowScores of predictions against targets, both (B, S, target_dim); targets are NaN where masked."""
    label_mask = ~targets.isnan().any(-1)  # (B, S)
    n_labels = label_mask.sum(-1)
    difference = predictions.float() - targets.nan_to_num()
    difference = torch.where(label_mask[..., None], difference, 0)
    n_numbers = n_labels.clamp(min=1) * targets.shape[-1]
    mse = difference.square().sum((-1, -2)) / n_numbers
    return RowScores(
        loss=mse,
        cell_acc=difference.abs().sum((-1, -2)) / n_numbers,
        exact=mse.detach() < cfg.halt_tolerance,
        n_labels=n_labels,
    )


def score_rows(cfg, logits, labels):
    """RowScores of a batch, for tokens or for numbers."""
    score = score_numbers if cfg.regression else score_tokens
    return score(cfg, logits, labels)


def act_loss(cfg, carry, logits, q):
    """Loss summed over rows (divide it by the global batch size), and sums for the metrics.

    Returns (loss, {name: 0-D tensor}). `count` is the number of labelled rows that halted in this step; sums
    named in MEAN_OVER_ALL_ROWS run over all rows, the others over those counted."""
    rows = score_rows(cfg, logits, carry.labels)
    q_halt = q[:, 0]
    q_halt_loss = F.binary_cross_entropy_with_logits(q_halt, rows.exact.float(), reduction="sum")
    loss = rows.loss.sum() + 0.5 * q_halt_loss
    names = metric_names(cfg)
    # metrics, without gradient
    with torch.no_grad():
        counted = carry.halted & (rows.n_labels > 0)
        sums = {
            "count": counted.sum(),
            names.cell_acc: (rows.cell_acc * counted).sum(),
            names.exact: (rows.exact * counted).sum(),
            "q_halt_acc": (((q_halt >= 0) == rows.exact) * counted).sum(),
            "steps": (carry.steps * counted).sum(),
            names.loss: rows.loss.sum(),
            "q_halt_loss": q_halt_loss,
        }
        sums = {name: value.detach().float() for name, value in sums.items()}
    return loss, sums


# ---------------------------------------------------------------------------------------------
# FLOPs, loading, compiling


class Flops(NamedTuple):
    """FLOPs of one row and supervision step, matrix products only; a multiply-add counts as 2."""

    forward: int
    # forward and backward
    train_step: int
    # part of forward that evaluation runs once per puzzle instead of once per step
    embed: int


def flops(cfg):
    """Flops of a Config, counted from the shapes of its matrix products."""
    D = cfg.hidden_size
    L = cfg.length
    S = cfg.seq_len
    if cfg.mixer == "attn":
        projections = 4 * L * D * D
        mixer = projections + 2 * L * L * D
    else:
        mixer = 3 * D * L * cfg.inner_width(L)
    mlp = 3 * L * D * cfg.inner_width(D)
    net = 2 * cfg.num_layers * (mixer + mlp)
    embed = 2 * S * D * (cfg.input_dim or cfg.vocab_size)
    lm_head = 2 * S * D * (cfg.target_dim or cfg.vocab_size)
    q_head = 4 * D
    heads = lm_head + q_head
    nets_per_recursion = cfg.L_cycles + 1
    forward = cfg.H_cycles * nets_per_recursion * net + embed + heads
    # Backward costs twice the forward of the last recursion. The one-hot input needs no gradient.
    backward = 2 * nets_per_recursion * net + 2 * (embed + heads) - embed
    return Flops(forward, forward + backward, embed)


def build_model(cfg, state):
    """A TRM with the given state dict, whose tensors it takes over. Raises UserError if they do not fit."""
    with torch.device("meta"):  # allocates nothing
        model = TRM(cfg, None)
    with user_error("the weights do not fit the configuration", RuntimeError):
        model.load_state_dict(state, assign=True)
    if cfg.rope:  # not part of a state dict
        model.cos, model.sin = rope_tables(cfg.length, cfg.hidden_size // cfg.num_heads)
    return model.requires_grad_()


def compile_model(model, backend="inductor"):
    """Compile `net` in place: the part that repeats, so one small graph with gradient and one without for
    every sequence length."""
    torch._dynamo.config.recompile_limit = 64  # the default of 8 is too few for four canvases
    model.net = torch.compile(model.net, fullgraph=True, dynamic=False, backend=backend)
