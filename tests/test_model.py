"""model.py against naive loops, and properties that hold for all weights.

The figures of the published code are in test_published.py."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import ALONE
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

import train
from data import min_halt_steps
from model import IGNORE_LABEL, MEAN_OVER_ALL_ROWS, TRM, Batch, Config, Flops, act_loss, attend, build_model
from model import config_from_dict, flops, grid_score_mod, log_stablemax, metric_names, score_rows
from model import trunc_normal
from tools.common import UserError

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
MLP = dict(mixer="mlp", pos_encodings="none")
REGRESSION = dict(vocab_size=0, input_dim=3, target_dim=2)


def tiny(**changes):
    sizes = dict(vocab_size=6, seq_len=16, num_puzzles=5, hidden_size=32, num_heads=4, puzzle_emb_len=2)
    sizes |= dict(puzzle_emb_ndim=32, H_cycles=2, L_cycles=2, dtype="float32")
    return Config(**(sizes | changes))


def make_model(cfg, seed=0):
    return TRM(cfg, generator(seed)).train()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_batch(cfg, rows, seed=0):
    g = generator(seed)
    if cfg.regression:
        inputs = torch.randn(rows, cfg.seq_len, cfg.input_dim, generator=g)
        labels = torch.randn(rows, cfg.seq_len, cfg.target_dim, generator=g)
        labels[:, 3:5] = math.nan  # masked out
    else:
        shape = (2, rows, cfg.seq_len)
        inputs, labels = torch.randint(1, cfg.vocab_size, shape, generator=g, dtype=torch.int32)
    ids = torch.randint(cfg.num_puzzles, (rows,), generator=g, dtype=torch.int32)
    return Batch(inputs, labels, ids, torch.zeros(rows, dtype=torch.int32))


def settings(*flags):
    return train.settings(["--preset", "sudoku", *flags], ALONE)[0]


def check_difference(what, measured, limit):
    assert measured <= limit, f"{what}: the largest difference is {measured:.3e}, the limit {limit:.0e}"


# ---------------------------------------------------------------------------------------------
# Layers


def rms(row):
    return row / math.sqrt(sum(v * v for v in row) / len(row) + 1e-5)


def naive_swiglu(v, gate_up, down):
    gate, up = np.split(gate_up @ v, 2)
    return down @ (gate / (1 + np.exp(-gate)) * up)


def test_mlp_block_equals_a_naive_loop():
    """The norm of the mixer is over positions, the other over features."""
    cfg = tiny(num_layers=1, **MLP)
    model = make_model(cfg)
    h, x = torch.randn(2, cfg.length, 3, cfg.hidden_size, generator=generator())  # (L, B, D) each
    with torch.no_grad():
        found = model.net(h, x).numpy()
    mix_in, mix_out, mlp_in, mlp_out = (p.detach().double().numpy() for p in model.blocks[0].parameters())
    for b in range(3):
        a = (h + x)[:, b].double().numpy()
        mixed = np.stack([rms(column + naive_swiglu(column, mix_in, mix_out)) for column in a.T], axis=1)
        expected = np.stack([rms(row + naive_swiglu(row, mlp_in, mlp_out)) for row in mixed])
        check_difference(f"row {b}", np.abs(found[:, b] - expected).max(), 1e-5)


def test_attention_block_equals_a_naive_loop():
    cfg = tiny(num_layers=1)
    model = make_model(cfg)
    L, D, H = cfg.length, cfg.hidden_size, cfg.num_heads
    head_dim = D // H
    h = torch.randn(1, L, D, generator=generator())
    with torch.no_grad():
        found = model.net(h, torch.zeros_like(h))[0].numpy()
    mix_in, mix_out, mlp_in, mlp_out = (p.detach().double().numpy() for p in model.blocks[0].parameters())
    a = h[0].double().numpy()
    q, k, v = (a @ mix_in.T).reshape(L, 3, H, head_dim).transpose(1, 2, 0, 3)  # (H, L, head_dim) each
    for i in range(L):  # RoPE rotates feature j with feature j + head_dim / 2
        for j in range(head_dim // 2):
            rotation = np.exp(1j * i * 10000.0 ** (-2 * j / head_dim))
            for t in (q, k):
                rotated = (t[:, i, j] + 1j * t[:, i, j + head_dim // 2]) * rotation
                t[:, i, j], t[:, i, j + head_dim // 2] = rotated.real, rotated.imag
    out = np.zeros((L, H, head_dim))
    for i in range(L):
        for head in range(H):
            weight = np.exp(k[head] @ q[head, i] / math.sqrt(head_dim))
            out[i, head] = weight / weight.sum() @ v[head]
    mixed = [rms(a[i] + mix_out @ out[i].ravel()) for i in range(L)]
    expected = np.stack([rms(row + naive_swiglu(row, mlp_in, mlp_out)) for row in mixed])
    check_difference("output", np.abs(found - expected).max(), 1e-5)


def random_qkv(heads=4, length=20, head_dim=8):
    return torch.randn(3, 2, heads, length, head_dim, generator=generator(), requires_grad=True)


def test_plain_attention_equals_the_fused_kernel():
    q, k, v = random_qkv()
    fused = F.scaled_dot_product_attention(q, k, v)
    plain = attend(q, k, v)
    check_difference("attend", (fused - plain).abs().max().item(), 1e-5)
    assert torch.equal(plain, attend(q, k, v, lambda score, b, h, i, j: score))
    causal = attend(q, k, v, lambda score, b, h, i, j: torch.where(j <= i, score, -math.inf))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    check_difference("causal mask", (causal - expected).abs().max().item(), 1e-5)


def test_a_row_that_sees_nothing_gives_zeros():
    """A mask of -inf over a whole row: no NaN, and the other rows and their gradients are unchanged."""
    blind = 3

    def score_mod(score, b, h, i, j):
        return torch.where((i != blind) & (j != 5), score, -math.inf)

    qkv, other = random_qkv(), torch.arange(20) != blind
    out = attend(*qkv, score_mod)
    visible = (torch.arange(20) != 5).expand(20, 20)
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=visible) * other[:, None]
    assert (out[:, :, blind] == 0).all(), out[:, :, blind]
    check_difference("output", (out - expected).abs().max().item(), 1e-5)
    flex = flex_attention(*qkv.detach(), score_mod=score_mod)
    check_difference("FlexAttention", (out - flex).abs().max().item(), 1e-5)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv)
    (expected,) = torch.autograd.grad(expected.square().sum(), qkv)
    assert not gradient.isnan().any() and (gradient[0, :, :, blind] == 0).all()
    check_difference("gradient", (gradient - expected).abs().max().item(), 1e-5)


def test_grid_score_mod_shows_one_neighbour():
    """Four of five heads take the value of one neighbour, at an edge their own; the fifth head and the
    prefix see everything."""
    cfg = tiny(seq_len=9, num_heads=5, hidden_size=80, score_mod="grid")
    q, k, v = random_qkv(heads=5, length=11, head_dim=16)
    score_mod = grid_score_mod(cfg)
    found, free = attend(q, k, v, score_mod), attend(q, k, v)
    for h, (down, right) in enumerate([(-1, 0), (1, 0), (0, -1), (0, 1)]):
        for cell in range(9):
            row = min(max(cell // 3 + down, 0), 2)
            col = min(max(cell % 3 + right, 0), 2)
            difference = found[:, h, 2 + cell] - v[:, h, 2 + 3 * row + col]
            check_difference(f"head {h}, cell {cell}", difference.abs().max().item(), 1e-5)
    assert torch.allclose(found[:, 4], free[:, 4], atol=1e-5)
    assert torch.allclose(found[:, :, :2], free[:, :, :2], atol=1e-5)
    flex = flex_attention(q.detach(), k.detach(), v.detach(), score_mod=score_mod)
    check_difference("FlexAttention", (found - flex).abs().max().item(), 1e-5)


def test_initial_weights_have_the_requested_std():
    for fan_in in (64, 512):
        w = trunc_normal((2000, fan_in), fan_in**-0.5, generator()) * fan_in**0.5
        assert abs(w.std().item() - 1) < 0.01, w.std()
        assert w.abs().max().item() <= 2 / 0.8796 + 1e-6, w.abs().max()


def test_inner_widths_are_rounded_up():
    narrow = Config(expansion=2.0, width_multiple=64)
    assert [Config().inner_width(n) for n in (512, 97, 64)] == [1536, 512, 256]  # as published
    assert [narrow.inner_width(n) for n in (512, 97, 64)] == [704, 192, 128]
    assert Config(expansion=0.01, width_multiple=8).inner_width(64) == 8


# ---------------------------------------------------------------------------------------------
# Recursion and halting


def test_early_recursions_get_no_gradient():
    """The gradient is that of the last recursion alone, from the states that the others left."""
    cfg = tiny(H_cycles=3)
    model = make_model(cfg)
    x, y, z = torch.randn(3, 2, cfg.length, 32, generator=generator(), requires_grad=True)
    x, y, z = x.detach(), y.detach().requires_grad_(), z.detach().requires_grad_()
    model.deep_recursion(x, y, z)[0].square().sum().backward()
    assert y.grad is None and z.grad is None
    found = [p.grad.clone() for p in model.blocks.parameters()]
    model.zero_grad()
    with torch.no_grad():
        for _ in range(2):
            y, z = model.latent_recursion(x, y, z)
    model.latent_recursion(x, y, z)[0].square().sum().backward()
    for gradient, p in zip(found, model.blocks.parameters()):
        assert p.grad.any() and torch.allclose(gradient, p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixer", ["attn", "mlp"])
def test_gradients_of_all_uses_are_summed_in_float32(mixer):
    """The bfloat16 weights are used n + 1 times; a sum of their gradients in bfloat16 would lose bits."""
    cfg = tiny(mixer=mixer, pos_encodings="none", L_cycles=6, dtype="bfloat16")
    model = make_model(cfg)
    x, y, z = torch.randn(3, 3, cfg.length, 32, generator=generator()).bfloat16()
    model.deep_recursion(x, y, z)[0].float().square().sum().backward()
    for name, p in model.blocks.named_parameters():
        in_bfloat16 = (p.grad == p.grad.bfloat16()).float().mean().item()
        assert in_bfloat16 < 0.5, f"{name}: {in_bfloat16:.0%} of the sums have only the bits of bfloat16"


def test_only_halted_rows_take_new_puzzles():
    cfg = tiny(pos_encodings="learned")
    model = make_model(cfg)
    old, new = random_batch(cfg, 4, seed=1), random_batch(cfg, 4, seed=2)
    carry, _, _ = model.step(model.initial_carry(old), old)
    assert torch.equal(carry.inputs, old.inputs) and carry.steps.tolist() == [1] * 4
    halted = torch.tensor([True, False, False, True])
    found = model.reset_halted(carry._replace(halted=halted), new)
    assert found.steps.tolist() == [0, 1, 1, 0]
    for i in range(4):
        source = new if halted[i] else old
        for name in ("inputs", "labels", "puzzle_ids"):
            assert torch.equal(getattr(found, name)[i], getattr(source, name)[i]), (i, name)
        for state, initial, before in (found.y, model.y0, carry.y), (found.z, model.z0, carry.z):
            expected = initial.expand(cfg.length, -1) if halted[i] else before[i]
            assert torch.equal(state[i], expected), i


def steps_until_halt(model, batch, max_steps=None):
    """Supervision steps after which every row halts."""
    carry, steps = model.initial_carry(batch), [0] * len(batch.inputs)
    for step in range(1, 6):
        carry = carry._replace(halted=torch.tensor([step == 1] * len(steps)))
        with torch.no_grad():
            carry = model.step(carry, batch, max_steps=max_steps)[0]
        for i, halted in enumerate(carry.halted.tolist()):
            steps[i] = steps[i] or step * halted
    return steps


def test_rows_halt():
    """At the last step, or in training when q_halt > 0, but not before the minimum that was drawn."""
    model = make_model(tiny(halt_max_steps=4))
    batch = random_batch(model.cfg, 4)._replace(min_halt_steps=torch.tensor([0, 2, 3, 5]))
    assert steps_until_halt(model, batch) == [4, 4, 4, 5]
    assert steps_until_halt(model, batch, torch.tensor(2)) == [2, 2, 3, 5]
    with torch.no_grad():
        model.q_bias[0] = 5.0
    assert steps_until_halt(model, batch) == [1, 2, 3, 5]
    model.eval()
    assert steps_until_halt(model, batch) == [4, 4, 4, 4]
    batch = batch._replace(min_halt_steps=torch.from_numpy(min_halt_steps(0, 0, 4, 1.0, 1)))
    assert steps_until_halt(make_model(tiny(halt_max_steps=1)), batch) == [1, 1, 1, 1]


def test_the_maximum_of_training_steps_rises():
    args = settings("--train-max-steps", "2", "5")
    assert [train.train_max_steps(args, i / 8) for i in range(9)] == [2, 2, 3, 3, 4, 4, 5, 5, 5]
    assert train.train_max_steps(settings(), 0.1) == 16


OPTIONS = [{}, MLP, REGRESSION, dict(pos_encodings="learned"), dict(pos_encodings="none"), dict(num_layers=3)]
OPTIONS += [dict(loss="softmax"), dict(score_mod="grid", num_heads=8), dict(puzzle_emb_ndim=48)]
OPTIONS += [dict(puzzle_emb_len=0, puzzle_emb_ndim=0), dict(H_cycles=1), dict(dtype="bfloat16")]


@pytest.mark.parametrize("change", OPTIONS, ids=str)
def test_every_option_trains(change):
    cfg = tiny(**change)
    model, batch = make_model(cfg), random_batch(cfg, 3)
    delta = torch.zeros(3, cfg.puzzle_emb_ndim, requires_grad=True)
    carry, logits, q = model.step(model.initial_carry(batch), batch, delta)
    loss, sums = act_loss(cfg, carry, logits, q)
    loss.backward()
    assert loss.isfinite() and all(value.isfinite() for value in sums.values()), sums
    assert sums.keys() == {"count", "steps", "q_halt_acc", "q_halt_loss", *metric_names(cfg)}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if cfg.puzzle_emb_ndim:
        gradients["delta"] = delta.grad
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and gradient.any(), f"{name} has no gradient"


# ---------------------------------------------------------------------------------------------
# Scores and losses


def test_stablemax_equals_its_formula():
    s = np.array([3.0, 0.5, 1.0])
    found = log_stablemax(torch.tensor([2.0, -1.0, 0.0]))
    assert found.dtype == torch.float64
    check_difference("log_stablemax", np.abs(found.numpy() - np.log(s / s.sum())).max(), 1e-12)


@pytest.mark.parametrize("loss", ["softmax", "stablemax"])
def test_token_scores_equal_a_naive_loop(loss):
    g = generator()
    logits, labels = torch.randn(4, 16, 6, generator=g), torch.randint(0, 6, (4, 16), generator=g)
    labels[0], labels[1, 3:9], labels[3] = logits[0].argmax(-1), IGNORE_LABEL, IGNORE_LABEL
    found = score_rows(tiny(loss=loss), logits, labels)
    for i in range(4):
        cells = [j for j in range(16) if labels[i, j] != IGNORE_LABEL]
        correct = [int(logits[i, j].argmax() == labels[i, j]) for j in cells]
        losses = [0.0]
        for j in cells:
            log_probs = logits[i, j].log_softmax(-1) if loss == "softmax" else log_stablemax(logits[i, j])
            losses.append(-log_probs[labels[i, j]].item())
        n = max(1, len(cells))
        assert (found.n_labels[i], found.exact[i]) == (len(cells), all(correct))
        assert math.isclose(found.cell_acc[i], sum(correct) / n, abs_tol=1e-6)
        assert math.isclose(found.loss[i], sum(losses) / n, abs_tol=1e-5)
    assert found.exact[0] and found.n_labels.tolist() == [16, 10, 16, 0]


def test_number_scores_equal_a_naive_loop():
    g = generator()
    cfg = tiny(halt_tolerance=0.5, **REGRESSION)
    targets = torch.randn(4, 16, 2, generator=g)
    std = torch.tensor([0.1, 1.0, 0.1, 1.0])[:, None, None]
    predictions = targets + std * torch.randn(4, 16, 2, generator=g)
    targets[1, 2:7], targets[2, 5, 1], targets[3] = math.nan, math.nan, math.nan
    found = score_rows(cfg, predictions, targets)
    for i in range(4):
        cells = [j for j in range(16) if not targets[i, j].isnan().any()]
        difference = (predictions - targets)[i, cells].flatten().tolist()
        n = max(1, len(difference))
        assert math.isclose(found.loss[i], sum(d * d for d in difference) / n, rel_tol=1e-5)
        assert math.isclose(found.cell_acc[i], sum(map(abs, difference)) / n, rel_tol=1e-5)
    assert found.exact.tolist() == [True, False, True, True]
    assert found.n_labels.tolist() == [16, 11, 15, 0]


def test_metric_sums_count_halted_rows_and_losses_all_rows():
    cfg = tiny()
    batch = random_batch(cfg, 4)
    batch.labels[3] = IGNORE_LABEL
    logits = F.one_hot(batch.labels.clamp(min=0).long(), 6).float() * 9
    logits[0, 0] = logits[0, 0].roll(1)  # one wrong cell
    q = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
    halted, steps = torch.tensor([True, False, True, True]), torch.tensor([3, 5, 7, 9])
    carry = make_model(cfg).initial_carry(batch)._replace(labels=batch.labels, halted=halted, steps=steps)
    loss, sums = act_loss(cfg, carry, logits, q)
    found = {name: round(value.item(), 4) for name, value in sums.items()}
    lm_loss = score_rows(cfg, logits, batch.labels).loss.sum().item()
    q_halt_loss = 0
    for q_halt, exact in zip(q[:, 0].tolist(), [False, True, True, True]):  # without labels nothing is wrong
        q_halt_loss += math.log1p(math.exp(-q_halt if exact else q_halt))
    # rows 0 and 2 count: row 1 has not halted, row 3 has no labels
    expected = {"count": 2, "steps": 10, "exact_acc": 1, "cell_acc": 1 + 15 / 16, "q_halt_acc": 0}
    expected |= {"lm_loss": round(lm_loss, 4), "q_halt_loss": round(q_halt_loss, 4)}
    assert found == pytest.approx(expected, abs=1e-4)
    assert math.isclose(loss.item(), lm_loss + 0.5 * q_halt_loss, rel_tol=1e-6)
    assert MEAN_OVER_ALL_ROWS >= {"lm_loss", "q_halt_loss"} and "steps" not in MEAN_OVER_ALL_ROWS


# ---------------------------------------------------------------------------------------------
# Optimizers


def test_adam_atan2_equals_a_float64_loop():
    """The bias correction of the first moment is outside the atan2: inside, step 1 would be pi / 4 * lr."""
    rng = np.random.RandomState(0)
    lr, decay, beta1, beta2 = 0.01, 0.1, 0.9, 0.95
    expected, m, v = rng.randn(7), np.zeros(7), np.zeros(7)
    weights = torch.tensor(expected, dtype=torch.float32)
    adam = train.AdamATan2(weights, beta1, beta2, decay)
    for t in range(1, 6):
        grad = rng.randn(7)
        adam.step(weights, torch.tensor(grad, dtype=torch.float32), lr, t)
        m += (1 - beta1) * (grad - m)
        v += (1 - beta2) * (grad**2 - v)
        step = np.arctan2(m, np.sqrt(v / (1 - beta2**t))) / (1 - beta1**t)
        expected = expected * (1 - lr * decay) - lr * step
        check_difference(f"weights after step {t}", np.abs(weights.numpy() - expected).max(), 1e-6)
        assert t > 1 or np.allclose(np.abs(step), math.atan(1 - beta1) / (1 - beta1), atol=1e-4), step


def test_learning_rates_warm_up_and_follow_a_cosine():
    assert [train.schedule(t, 100, 4, 1.0) for t in (1, 2, 4, 100)] == [0.25, 0.5, 1.0, 1.0]
    assert [train.schedule(t, 100, 4, 0.2) for t in (52, 100)] == pytest.approx([0.6, 0.2])


def test_a_tiny_model_learns_eight_puzzles():
    cfg = tiny(**MLP)
    args = settings("--global-batch-size", "8", "--lr", "2e-3", "--weight-decay", "0", "--ema", "0.9")
    run = train.Run(args, cfg, ALONE)
    batch = random_batch(cfg, 8)
    for step in range(1, 301):
        train.forward_backward(run, batch)
        train.update(run, 1.0)
        if step % 20 == 0:
            carry = run.model.initial_carry(batch)
            with torch.no_grad():
                for _ in range(4):
                    carry, logits, _ = run.model.step(carry._replace(halted=carry.steps < 1), batch)
            exact = score_rows(cfg, logits, batch.labels).exact
            if exact.all():
                return
    raise AssertionError(f"after 300 steps {int(exact.sum())} of 8 puzzles are solved")


# ---------------------------------------------------------------------------------------------
# Config


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=3), "--hidden-size 32 is not a multiple of 2 x --num-heads 3"),
        (dict(num_heads=32), "--hidden-size 32 is not a multiple of 2 x --num-heads 32"),
        (dict(puzzle_emb_ndim=65), "--puzzle-emb-ndim 65 exceeds the prefix of 64 numbers"),
        (dict(puzzle_emb_len=0), "--puzzle-emb-ndim 32 exceeds the prefix of 0 numbers"),
        (dict(score_mod="grid", seq_len=10), "--score-mod grid needs --mixer attn and square grids"),
        (dict(score_mod="grid", **MLP), "--score-mod grid needs --mixer attn and square grids"),
    ],
)
def test_contradictory_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        tiny(**change)
    with pytest.raises(UserError, match=message):
        config_from_dict(asdict(tiny()), **change)
    assert tiny(num_heads=3, **MLP).num_heads == 3  # unused with this mixer
    assert tiny(puzzle_emb_ndim=64).puzzle_emb_ndim == 64


def test_a_config_is_read_from_a_dict():
    """Also of a checkpoint that lacks newer settings, and with q_continue of earlier versions."""
    cfg = tiny(loss="softmax", halt_max_steps=4)
    saved = asdict(cfg)
    assert config_from_dict(saved) == cfg
    assert config_from_dict({**saved, "q_continue": False}) == cfg
    assert config_from_dict(saved, L_cycles=5) == tiny(loss="softmax", halt_max_steps=4, L_cycles=5)
    assert config_from_dict({**saved, "expansion": 4}) == cfg  # a float may be a whole number
    del saved["loss"], saved["dtype"]
    assert config_from_dict(saved) == tiny(halt_max_steps=4, dtype="bfloat16")


WRONG_VALUES = [("H_cycles", 1.0), ("num_heads", 1.0), ("halt_max_steps", -3), ("H_cycles", 0)]
WRONG_VALUES += [("L_cycles", True), ("vocab_size", "6"), ("seq_len", None), ("num_puzzles", -1)]
WRONG_VALUES += [("expansion", True), ("expansion", "4"), ("expansion", math.nan), ("expansion", 0)]
WRONG_VALUES += [("mixer", "attention"), ("dtype", ["float32"]), ("score_mod", "sudoku"), ("loss", None)]
WRONG_VALUES += [("twist", 2), ("q_continue", True)]


@pytest.mark.parametrize("name, value", WRONG_VALUES)
def test_wrong_values_in_a_dict_are_refused(name, value):
    with pytest.raises(UserError) as e:
        config_from_dict({**asdict(tiny()), name: value}, "w.json")
    unknown = f"w.json has the unknown setting {name}"
    assert str(e.value).startswith((f"w.json: {name} is {value!r}, but must be", unknown)), e.value


def test_weights_that_do_not_fit_are_refused():
    cfg = tiny()
    state = make_model(cfg).state_dict()
    model = build_model(cfg, state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.cos, make_model(cfg).cos) and all(p.requires_grad for p in model.parameters())
    wrong = {**state, "surplus": torch.zeros(1), "q_bias": torch.zeros(3)}
    del wrong["lm_head"]
    with pytest.raises(UserError, match="do not fit the configuration.*lm_head.*surplus.*q_bias"):
        build_model(cfg, wrong)


# ---------------------------------------------------------------------------------------------
# FLOPs


def counted_flops(cfg):
    """model.Flops from torch's own counter, on the meta device, where nothing is computed."""
    batch = Batch(*(tensor.to("meta") for tensor in random_batch(cfg, 1)))
    with torch.device("meta"):
        model = TRM(cfg, None).train()
        with FlopCounterMode(display=False) as forward:
            _, logits, q = model.step(model.initial_carry(batch), batch)
        with FlopCounterMode(display=False) as backward:
            (logits.sum() + q.sum()).backward()
        with FlopCounterMode(display=False) as embed, torch.no_grad():
            model.embed(batch.inputs, model.puzzle_emb[batch.puzzle_ids])
    forward = forward.get_total_flops()
    return Flops(forward, forward + backward.get_total_flops(), embed.get_total_flops())


@pytest.mark.parametrize("change", [{}, MLP, dict(seq_len=900, vocab_size=12), REGRESSION], ids=str)
def test_flops_formula_equals_the_count_of_torch(change):
    for more in ({}, dict(H_cycles=1, num_layers=3, expansion=2.5, width_multiple=8)):
        cfg = Config(num_puzzles=5, L_cycles=2, **change | more)
        assert flops(cfg) == counted_flops(cfg), cfg
