"""The model against naive loops, and what must hold whatever the weights are."""
import copy
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import train
from common import UserError
from data import exploration
from model import IGNORE, OVER_ALL_ROWS, TRM, Batch, Config, act_loss, attend, build, log_stablemax, \
    grid_score_mod, metric_names, read_config, row_scores, sudoku_score_mod, trunc_normal
from optim import AdamATan2, schedule, sign_sgd
from runs import ALONE


def tiny(**changes):
    settings = dict(vocab_size=6, seq_len=16, num_puzzles=5, hidden_size=32, num_heads=4, puzzle_emb_len=2,
                    puzzle_emb_ndim=32, H_cycles=2, L_cycles=2, dtype="float32")
    return Config(**{**settings, **changes})


def make(cfg, seed=0):
    return TRM(cfg, torch.Generator().manual_seed(seed))


def random_batch(cfg, rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, cfg.vocab_size, (2, rows, cfg.seq_len), generator=g, dtype=torch.int32)
    ids = torch.randint(cfg.num_puzzles, (rows,), generator=g, dtype=torch.int32)
    return Batch(tokens[0], tokens[1], ids, torch.zeros(rows, dtype=torch.int32))


def settings(*flags):
    return train.settings(["--preset", "sudoku", *flags], ALONE)[0]


def one_step(cfg, seed=0, rows=3):
    """(model, delta, loss, sums of the metrics) after a forward and a backward."""
    model, batch = make(cfg, seed).train(), random_batch(cfg, rows)
    delta = torch.zeros(rows, cfg.puzzle_emb_ndim, requires_grad=True)
    carry, logits, q = model.step(model.empty_carry(batch), batch, delta)
    target = model.continue_target(carry) if cfg.q_continue else None
    loss, sums = act_loss(cfg, carry, logits, q, target)
    loss.backward()
    return model, delta, loss, sums


def rms(row):
    return row / math.sqrt(sum(v * v for v in row) / len(row) + 1e-5)


def naive_swiglu(v, gate_up, down):
    half = len(gate_up) // 2
    gate, up = gate_up[:half] @ v, gate_up[half:] @ v
    return down @ (gate / (1 + np.exp(-gate)) * up)


def test_mlp_mixer_normalises_over_positions():
    """One application of net in float64, element by element: the mixer's rms is over L, the other over D."""
    cfg = tiny(mixer="mlp", pos_encodings="none", num_layers=1)
    model = make(cfg)
    L, D = cfg.length, cfg.hidden_size
    h = torch.randn(2, L, D, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, L, D, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        first = (t.transpose(0, 1).contiguous() for t in (h, x))      # net takes (L, B, D) with this mixer
        got = model.net(*first).transpose(0, 1).numpy()
    mix_in, mix_out, mlp_in, mlp_out = (p.detach().double().numpy() for p in model.blocks[0].parameters())
    for b in range(2):
        a = (h[b] + x[b]).double().numpy()
        mixed = np.stack([rms(a[:, d] + naive_swiglu(a[:, d], mix_in, mix_out)) for d in range(D)], axis=1)
        wanted = np.stack([rms(mixed[i] + naive_swiglu(mixed[i], mlp_in, mlp_out)) for i in range(L)])
        worst = np.abs(got[b] - wanted).max()
        assert worst < 1e-5, f"row {b}: largest difference {worst:.2e}"


def test_attention_block_equals_a_naive_loop():
    cfg = tiny(num_layers=1)
    model = make(cfg)
    L, D, H = cfg.length, cfg.hidden_size, cfg.num_heads
    h = torch.randn(1, L, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = model.net(h, torch.zeros_like(h))[0].numpy()
    mix_in, mix_out, mlp_in, mlp_out = (p.detach().double().numpy() for p in model.blocks[0].parameters())
    a = h[0].double().numpy()
    q, k, v = (a @ mix_in.T).reshape(L, 3, H, D // H).transpose(1, 2, 0, 3)                # (H, L, D/H) each
    half = D // H // 2
    for t in (q, k):
        for i in range(L):
            for j in range(half):
                angle = i * 10000.0 ** (-2 * j / (D // H))
                first, second = t[:, i, j].copy(), t[:, i, j + half].copy()
                t[:, i, j] = first * math.cos(angle) - second * math.sin(angle)
                t[:, i, j + half] = second * math.cos(angle) + first * math.sin(angle)
    out = np.zeros((L, D))
    for head in range(H):
        for i in range(L):
            weight = np.exp([q[head, i] @ k[head, j] / math.sqrt(D // H) for j in range(L)])
            out[i, head * D // H:(head + 1) * D // H] = weight / weight.sum() @ v[head]
    mixed = np.stack([rms(a[i] + mix_out @ out[i]) for i in range(L)])
    wanted = np.stack([rms(mixed[i] + naive_swiglu(mixed[i], mlp_in, mlp_out)) for i in range(L)])
    assert np.abs(got - wanted).max() < 1e-5, np.abs(got - wanted).max()


def test_adam_atan2_against_a_float64_loop():
    """The first moment's bias correction stands outside the atan2: inside, step 1 would move pi / 4 * lr."""
    rng = np.random.RandomState(0)
    p0, grads = rng.randn(7), rng.randn(5, 7)
    lr, wd, b1, b2 = 0.01, 0.1, 0.9, 0.95
    p = torch.tensor(p0, dtype=torch.float32)
    adam = AdamATan2(p, b1, b2, wd)
    want, m, v = p0.copy(), np.zeros(7), np.zeros(7)
    for t, g in enumerate(grads, 1):
        adam.step(p, torch.tensor(g, dtype=torch.float32), lr, t)
        for i in range(7):
            want[i] *= 1 - lr * wd
            m[i] += (1 - b1) * (g[i] - m[i])
            v[i] += (1 - b2) * (g[i] ** 2 - v[i])
            want[i] -= lr / (1 - b1 ** t) * math.atan2(m[i], math.sqrt(v[i]) / math.sqrt(1 - b2 ** t))
        assert np.abs(p.numpy() - want).max() < 1e-6, (t, p, want)
        if t == 1:
            moved = np.abs(p.numpy() - p0 * (1 - lr * wd)) / lr
            assert np.allclose(moved, math.atan(1 - b1) / (1 - b1), atol=1e-4), moved


def test_halted_rows_alone_take_new_data():
    cfg = tiny(pos_encodings="learned")
    model = make(cfg).train()
    old, new = random_batch(cfg, 4, seed=1), random_batch(cfg, 4, seed=2)
    carry, _, _ = model.step(model.empty_carry(old), old)
    for i in range(4):      # all rows were halted at the start: all took the batch
        assert torch.equal(carry.inputs[i], old.inputs[i]) and carry.steps[i] == 1
    carry = carry._replace(halted=torch.tensor([True, False, False, True]))
    got = model.admit(carry, new)
    for i in range(4):
        fresh = bool(carry.halted[i])
        source = new if fresh else old
        assert torch.equal(got.inputs[i], source.inputs[i]) and torch.equal(got.labels[i], source.labels[i])
        assert got.puzzle_ids[i] == source.puzzle_ids[i]
        assert got.steps[i] == (0 if fresh else 1)
        for position in range(cfg.length):
            assert torch.equal(got.y[i, position], model.y0 if fresh else carry.y[i, position])
            assert torch.equal(got.z[i, position], model.z0 if fresh else carry.z[i, position])


def test_halting():
    """Rows halt at the last step, when q_halt > 0 in training, and never below what exploration drew."""
    cfg = tiny(halt_max_steps=3)
    model, batch = make(cfg).train(), random_batch(tiny(), 4)
    with torch.no_grad():
        carry = model.step(model.empty_carry(batch), batch)[0]
        assert not carry.halted.any()                     # q starts at -5
        carry = model.step(model.step(carry, batch)[0], batch)[0]
        assert carry.halted.all() and (carry.steps == 3).all()
        model.q_bias[0] = 5.0
        wants = batch._replace(min_steps=torch.tensor([0, 2, 3, 0], dtype=torch.int32))
        carry = model.step(model.empty_carry(wants), wants)[0]
        assert carry.halted.tolist() == [True, False, False, True]
        carry = model.step(carry, wants)[0]
        assert carry.halted.tolist() == [True, True, False, True]
        model.eval()        # evaluation goes all the way
        assert not model.step(model.empty_carry(batch), batch)[0].halted.any()


def test_train_max_steps():
    """Rises in even stretches; exploration may hold a row beyond it."""
    args = settings("--train-max-steps", "2", "5")
    assert [train.train_max_steps(args, i / 8) for i in range(9)] == [2, 2, 3, 3, 4, 4, 5, 5, 5]
    assert train.train_max_steps(settings(), 0.1) == 16
    cfg = tiny(halt_max_steps=4)
    model, batch = make(cfg).train(), random_batch(tiny(), 3)
    batch = batch._replace(min_steps=torch.tensor([0, 3, 4], dtype=torch.int32))
    for limit, ends in ((torch.tensor(2), [2, 3, 4]), (None, [4, 4, 4])):
        carry, halted_at = model.empty_carry(batch), [0, 0, 0]
        with torch.no_grad():
            for step in range(1, 5):
                carry = carry._replace(halted=carry.halted & (carry.steps == 0))
                carry = model.step(carry, batch, max_steps=limit)[0]
                halted_at = [at or step * int(h) for at, h in zip(halted_at, carry.halted.tolist())]
        assert halted_at == ends, (limit, halted_at)


def test_one_supervision_step_halts_every_row():
    """halt_max_steps 1: a row takes a new puzzle at every step, from y0 and z0; nothing is explored."""
    cfg = tiny(halt_max_steps=1)
    model, carry = make(cfg).train(), None
    for seed in range(3):
        min_steps = torch.from_numpy(exploration(0, seed, 4, 1.0, 1))
        batch = random_batch(cfg, 4, seed)._replace(min_steps=min_steps)
        assert not batch.min_steps.any()
        with torch.no_grad():
            carry, logits, _ = model.step(carry or model.empty_carry(batch), batch)
            _, alone, _ = model.step(model.empty_carry(batch), batch)
        assert carry.halted.all() and (carry.steps == 1).all() and torch.equal(carry.inputs, batch.inputs)
        assert torch.equal(logits, alone)


def test_early_cycles_get_no_gradient():
    """The gradient is that of the last round alone, started from the states that the earlier ones left."""
    cfg = tiny(H_cycles=3)
    model, batch = make(cfg), random_batch(tiny(), 2)
    x = model.embed(batch.inputs, model.puzzle_emb[batch.puzzle_ids]).detach()
    y = model.y0.expand(2, cfg.length, -1).clone().requires_grad_()
    z = model.z0.expand(2, cfg.length, -1).clone().requires_grad_()
    model.improve(x, y, z)[0].sum().backward()
    assert y.grad is None and z.grad is None
    whole = [p.grad.clone() for p in model.blocks.parameters()]
    model.zero_grad()
    with torch.no_grad():
        for _ in range(2):
            y, z = model.cycle(x, y, z)
    model.cycle(x, y, z)[0].sum().backward()
    for a, p in zip(whole, model.blocks.parameters()):
        assert torch.allclose(a, p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("change", [
    dict(), dict(mixer="mlp", pos_encodings="none"), dict(pos_encodings="learned"),
    dict(pos_encodings="none"), dict(loss="softmax"), dict(q_continue=True), dict(score_mod="sudoku"),
    dict(puzzle_emb_len=0, puzzle_emb_ndim=0), dict(puzzle_emb_ndim=48), dict(H_cycles=1),
    dict(num_layers=3), dict(dtype="bfloat16"), dict(halt_max_steps=1),
    dict(vocab_size=0, input_dim=3, target_dim=2)], ids=str)
def test_every_option_trains_for_a_step(change, rows):
    cfg = tiny(**change)
    if cfg.regression:
        model = make(cfg).train()
        g = torch.Generator().manual_seed(0)
        labels = torch.randn(rows, cfg.seq_len, 2, generator=g)
        labels[:, 3:5] = float("nan")                                   # masked out
        batch = Batch(torch.randn(rows, cfg.seq_len, 3, generator=g), labels, *random_batch(tiny(), rows)[2:])
        carry, out, q = model.step(model.empty_carry(batch), batch)
        loss, sums = act_loss(cfg, carry, out, q)
        loss.backward()
        asked = ~labels.isnan()
        wanted = sum(((out[i] - labels[i])[asked[i]] ** 2).mean() for i in range(rows))
        assert math.isclose(sums["regression_loss"].item(), wanted.item(), rel_tol=1e-5)
    else:
        model, delta, loss, sums = one_step(cfg, rows=rows)
        if cfg.puzzle_emb_ndim:
            assert delta.grad.abs().sum() > 0
    assert loss.isfinite() and all(value.isfinite() for value in sums.values()), sums
    names = {"count", "steps", "q_halt_acc", "q_halt_loss", "q_continue_loss", *metric_names(cfg)}
    assert sums.keys() == names
    assert (sums["q_continue_loss"] > 0) == cfg.q_continue
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if not name.startswith("q_"):
            assert p.grad.abs().sum() > 0, name


def test_stablemax_and_the_row_mean():
    logits = torch.tensor([[[2.0, -1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 1.0, 1.0]]])
    labels = torch.tensor([[1, IGNORE, 0]])
    s = np.array([3.0, 0.5, 1.0])
    assert np.allclose(log_stablemax(logits)[0, 0].numpy(), np.log(s / s.sum()), atol=1e-12)
    assert log_stablemax(logits).dtype == torch.float64
    cfg = tiny(vocab_size=3, seq_len=3)
    carry = make(cfg).empty_carry(Batch(labels.int(), labels.int(), torch.zeros(1, dtype=torch.int32), None))
    q = torch.zeros(1, 2)
    loss, sums = act_loss(cfg, carry._replace(labels=labels), logits, q)
    wanted = (-math.log(0.5 / 4.5) - math.log(1 / 3)) / 2
    assert math.isclose(loss.item(), wanted + 0.5 * math.log(2), rel_tol=1e-6)
    # cell 2 ties: argmax takes the first, which is its label
    assert {name: sums[name].item() for name in ("count", "cell_acc", "exact_acc", "q_halt_acc")} == {
        "count": 1, "cell_acc": 0.5, "exact_acc": 0, "q_halt_acc": 0}
    assert math.isclose(sums["lm_loss"].item(), wanted, rel_tol=1e-6)


def test_initial_weights_have_the_stated_std():
    for fan_in in (64, 512):
        w = trunc_normal((2000, fan_in), fan_in ** -0.5, torch.Generator().manual_seed(0))
        assert abs(w.std().item() * fan_in ** 0.5 - 1) < 0.01
        assert w.abs().max().item() <= 2 * fan_in ** -0.5 / 0.8796 + 1e-6


def test_inner_widths_are_rounded_up():
    cfg, narrow = Config(), Config(expansion=2.0, width_multiple=64)
    assert [cfg.inner_width(n) for n in (512, 97, 64)] == [1536, 512, 256]      # as published
    assert [narrow.inner_width(n) for n in (512, 97, 64)] == [704, 192, 128]
    assert Config(expansion=0.01, width_multiple=8).inner_width(64) == 8        # not 0


@pytest.mark.parametrize("seq_len", [16, 36, 81])
def test_score_mod_equals_a_naive_loop_and_trains(seq_len):
    cfg = tiny(seq_len=seq_len, score_mod="sudoku")
    size, P, H = math.isqrt(seq_len), cfg.puzzle_emb_len, cfg.num_heads
    box_rows, box_cols = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, H, cfg.length, 8, generator=g, requires_grad=True).unbind(0)
    got = attend(q, k, v, sudoku_score_mod(cfg))
    for head in range(H):
        for i in range(0, cfg.length, 7):
            scores = []
            for j in range(cfg.length):
                score = (q[0, head, i] @ k[0, head, j]).item() / math.sqrt(8)
                if i >= P and j >= P:
                    (ri, ci), (rj, cj) = divmod(i - P, size), divmod(j - P, size)
                    box = ri // box_rows == rj // box_rows and ci // box_cols == cj // box_cols
                    score += (False, ri == rj, ci == cj, box)[head % 4]
                scores.append(score)
            weight = torch.tensor(scores).softmax(0)
            assert torch.allclose(got[0, head, i], weight @ v[0, head], atol=1e-5)
    got.sum().backward()


def test_plain_and_fused_attention_agree():
    q, k, v = torch.randn(3, 2, 4, 20, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    plain = attend(q, k, v)
    assert torch.equal(plain, attend(q, k, v, lambda score, b, h, i, j: score))
    assert (fused - plain).abs().max() < 1e-5
    masked = attend(q, k, v, lambda score, b, h, i, j: torch.where(j <= i, score, -math.inf))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (masked - wanted).abs().max() < 1e-5


def test_flex_attention_gives_the_same_forward():
    """The CUDA path's operator, run where it can be without a GPU: compiled, forward only."""
    cfg = tiny(seq_len=36, score_mod="sudoku")
    q, k, v = torch.randn(3, 1, 4, cfg.length, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    mod = sudoku_score_mod(cfg)
    with torch.no_grad():
        got = flex_attention(q, k, v, score_mod=mod)
        assert (got - attend(q, k, v, mod)).abs().max() < 1e-5


def test_grid_score_mod_is_a_step_up_down_left_or_right():
    """Of five heads four take the value of one neighbour, at an edge their own; the fifth is free. The puzzle
    positions see all."""
    cfg = tiny(seq_len=9, num_heads=5, hidden_size=80, score_mod="grid", puzzle_emb_len=2)
    q, k, v = torch.randn(3, 1, 5, 11, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    got, free = attend(q, k, v, grid_score_mod(cfg)), attend(q, k, v)
    for h, (down, right) in enumerate([(-1, 0), (1, 0), (0, -1), (0, 1)]):
        for row in range(3):
            for col in range(3):
                near = min(max(row + down, 0), 2) * 3 + min(max(col + right, 0), 2)
                cell = 2 + 3 * row + col
                assert torch.allclose(got[0, h, cell], v[0, h, 2 + near], atol=1e-5), (h, row, col)
    assert torch.allclose(got[:, 4], free[:, 4], atol=1e-5)
    assert torch.allclose(got[:, :, :2], free[:, :, :2], atol=1e-5)
    for bad in (dict(seq_len=10), dict(seq_len=9, mixer="mlp", pos_encodings="none")):
        with pytest.raises(UserError, match="--score-mod grid needs --mixer attn and .* squares"):
            tiny(score_mod="grid", **bad)


@pytest.mark.parametrize("mixer", ["attn", "mlp"])
def test_gradients_of_the_uses_are_summed_in_float32(mixer):
    """The weights are used n + 1 times in a round, in bfloat16: every use has a gradient, and these
    are added up in float32, the last use first. Sums in bfloat16 lose bits of them."""
    cfg = tiny(mixer=mixer, pos_encodings="none", L_cycles=6, dtype="bfloat16")
    x, y, z = torch.randn(3, 3, cfg.length, 32, generator=torch.Generator().manual_seed(1)).bfloat16()

    def backward(model):
        model.improve(x, y, z)[0].float().square().sum().backward()
        return model
    whole, apart, n_used = backward(make(cfg)), make(cfg), 0
    copies = [copy.deepcopy(apart.blocks) for _ in range(cfg.L_cycles + 1)]

    def net(h, injection, weights):
        nonlocal n_used
        used = n_used % len(copies)     # the same copies in every round; only the last has a gradient
        apart.blocks, n_used = copies[used], n_used + 1
        return TRM.net(apart, h, injection, weights)
    apart.net = net
    backward(apart)
    assert n_used == cfg.H_cycles * len(copies)
    for name, p in whole.blocks.named_parameters():
        last, *others = [c.get_parameter(name).grad for c in reversed(copies)]
        total, rounded = last.clone(), last.bfloat16()
        for grad in others:     # each of a product in bfloat16
            assert torch.equal(grad, grad.bfloat16().float()) and grad.any(), name
            total, rounded = total + grad, rounded + grad.bfloat16()
        assert torch.equal(p.grad, total), f"{name} by {(p.grad - total).abs().max():.2e}"
        assert not torch.equal(p.grad, rounded.float()), name


@pytest.mark.parametrize("ids", [[3, 1, 3, 3, 0, 1], [2, 2, 2, 2, 2, 2], [0, 1, 2, 3, 4, 5]])
def test_sign_sgd_against_a_loop(ids):
    g = torch.Generator().manual_seed(0)
    table, grads = torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g)
    wanted = table.clone()
    for puzzle in set(ids):
        total = sum(grads[i] for i in range(6) if ids[i] == puzzle)
        wanted[puzzle] = wanted[puzzle] * (1 - 0.1 * 0.5) - 0.1 * total.sign()
    sign_sgd(table, torch.tensor(ids, dtype=torch.int32), grads, 0.1, 0.5)
    assert torch.allclose(table, wanted, atol=1e-6), (table - wanted).abs().max()


def test_schedule():
    assert [schedule(t, 100, 4, 1.0) for t in (1, 2, 4, 100)] == [0.25, 0.5, 1.0, 1.0]
    assert math.isclose(schedule(52, 100, 4, 0.2), 0.6) and math.isclose(schedule(100, 100, 4, 0.2), 0.2)


def test_tiny_model_learns_eight_puzzles():
    cfg = tiny(mixer="mlp", pos_encodings="none")
    args = settings("--global-batch-size", "8", "--lr", "2e-3", "--puzzle-emb-lr", "1e-2",
                    "--weight-decay", "0", "--ema", "0.9")
    run = train.Run(args, cfg, ALONE)
    batch = random_batch(cfg, 8)
    for step in range(300):
        train.backward(run, [batch])
        train.update(run, 1.0)
        if step % 20 == 19:
            model = run.model.eval()
            with torch.no_grad():
                carry = model.empty_carry(batch)
                for _ in range(4):
                    carry, logits, _ = model.step(carry, batch)
            model.train()
            right = (logits.argmax(-1) == batch.labels).all(-1).float().mean().item()
            if right == 1:
                return
    raise AssertionError(f"after 300 steps {right:.2f} of 8 puzzles are right")


# ---------------------------------------------------------------------------------------------
# Config

@pytest.mark.parametrize("change, message", [
    (dict(score_mod="sudoku", seq_len=10),
     "--score-mod sudoku needs --mixer attn and boards of 4x4, 6x6 or 9x9"),
    (dict(score_mod="sudoku", seq_len=25), "this is attn with 25 cells"),   # a square, but it has no boxes
    (dict(score_mod="sudoku", mixer="mlp", pos_encodings="none"), "this is mlp with 16 cells: leave it out"),
    (dict(num_heads=3), "--hidden-size 32 does not give 3 heads of even width; use a multiple of 6"),
    (dict(num_heads=32), "--hidden-size 32 does not give 32 heads of even width; use a multiple of 64"),
    (dict(puzzle_emb_ndim=65),
     "--puzzle-emb-ndim 65 is wider than --puzzle-emb-len 2 x --hidden-size 32; lower it to 64"),
    (dict(puzzle_emb_len=0),
     "--puzzle-emb-ndim 32 is wider than --puzzle-emb-len 0 x --hidden-size 32; lower it to 0"),
], ids=str)
def test_settings_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(UserError) as e:
        tiny(**change)
    assert message in str(e.value) and "\n" not in str(e.value), e.value


def test_what_a_mixer_does_not_use_is_not_checked():
    assert tiny(mixer="mlp", pos_encodings="none", num_heads=3).num_heads == 3
    assert tiny(puzzle_emb_ndim=64).puzzle_emb_ndim == 64


def test_a_config_of_older_and_of_other_code():
    """What an older checkpoint did not know has its default; what this code does not know is named."""
    cfg = tiny(loss="softmax", halt_max_steps=4)
    saved = asdict(cfg)
    assert read_config(saved) == cfg
    assert read_config(saved, L_cycles=5) == tiny(loss="softmax", halt_max_steps=4, L_cycles=5)
    older = {name: value for name, value in saved.items() if name not in ("loss", "halt_tolerance", "dtype")}
    assert read_config(older) == tiny(halt_max_steps=4, dtype="bfloat16")
    with pytest.raises(UserError) as e:
        read_config({**saved, "twist": 2, "depth": 3})
    assert str(e.value).startswith("the checkpoint has depth, twist, which this model.py does not know")
    with pytest.raises(UserError, match="--hidden-size 32 does not give 3 heads"):
        read_config(saved, num_heads=3)


def test_weights_that_do_not_fit_are_named_in_one_line():
    cfg = tiny()
    state = make(cfg).state_dict()
    wrong = {**state, "surplus": torch.zeros(1), "q_bias": torch.zeros(3)}
    del wrong["lm_head"]
    with pytest.raises(UserError) as e:
        build(cfg, wrong)
    assert [name for name in ("lm_head", "surplus", "q_bias", "\n") if name not in str(e.value)] == ["\n"]
    again = build(cfg, state)
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    assert torch.equal(again.cos, make(cfg).cos) and all(p.requires_grad for p in again.parameters())


# ---------------------------------------------------------------------------------------------
# Scores by name

def test_row_scores_equal_a_naive_loop():
    """Tokens and numbers, with cells and whole rows that nobody asks for; a row without any has n 0."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 16, 6, generator=g)
    labels = torch.randint(0, 6, (5, 16), generator=g)
    labels[0], labels[1, 3:9], labels[4] = logits[0].argmax(-1), IGNORE, IGNORE
    found = row_scores(tiny(loss="softmax"), logits, labels)
    for i in range(5):
        cells = [j for j in range(16) if labels[i, j] != IGNORE]
        right = [int(logits[i, j].argmax() == labels[i, j]) for j in cells]
        losses = [-logits[i, j].softmax(-1)[labels[i, j]].log().item() for j in cells]
        assert (found.n[i], found.right[i]) == (len(cells), all(right))
        assert math.isclose(found.cell[i], sum(right) / max(1, len(cells)), abs_tol=1e-6)
        assert math.isclose(found.loss[i], sum(losses) / max(1, len(cells)), abs_tol=1e-5)
    assert found.right[0] and found.n.tolist() == [16, 10, 16, 16, 0]

    cfg = tiny(vocab_size=0, input_dim=3, target_dim=2, halt_tolerance=0.5)
    targets = torch.randn(4, 16, 2, generator=g)
    noise = torch.tensor([0.1, 1.0, 0.1, 1.0])[:, None, None]
    predictions = targets + noise * torch.randn(4, 16, 2, generator=g)
    targets[1, 2:7], targets[2, 5, 1], targets[3] = math.nan, math.nan, math.nan
    found = row_scores(cfg, predictions, targets)
    for i in range(4):
        cells = [j for j in range(16) if not targets[i, j].isnan().any()]
        differences = [(predictions[i, j, d] - targets[i, j, d]).item() for j in cells for d in range(2)]
        mse = sum(d * d for d in differences) / max(1, len(differences))
        mae = sum(map(abs, differences)) / max(1, len(differences))
        assert (found.n[i], found.right[i]) == (len(cells), mse < 0.5)
        assert math.isclose(found.loss[i], mse, rel_tol=1e-5)
        assert math.isclose(found.cell[i], mae, rel_tol=1e-5)
    assert found.right.tolist() == [True, False, True, True] and found.n.tolist() == [16, 11, 15, 0]


def test_sums_count_halted_rows_with_labels_and_losses_all_rows():
    cfg = tiny()
    batch = random_batch(cfg, 4)
    batch.labels[3] = IGNORE
    carry = make(cfg).empty_carry(batch)._replace(
        labels=batch.labels, halted=torch.tensor([True, False, True, True]),
        steps=torch.tensor([3, 5, 7, 9], dtype=torch.int32))
    logits = torch.nn.functional.one_hot(batch.labels.clamp(min=0).long(), 6).float() * 9
    logits[0, 0] = logits[0, 0].roll(1)
    q = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [2.0, 0.0]])
    rows = row_scores(cfg, logits, batch.labels)
    sums = {name: value.item() for name, value in act_loss(cfg, carry, logits, q)[1].items()}
    assert OVER_ALL_ROWS >= {"lm_loss", "q_halt_loss", "q_continue_loss"}
    # rows 0 and 2 count: 1 has not halted, 3 has no labels
    assert sums["count"] == 2 and sums["steps"] == 3 + 7 and sums["exact_acc"] == 1
    assert math.isclose(sums["cell_acc"], 15 / 16 + 1) and sums["q_halt_acc"] == 0
    assert math.isclose(sums["lm_loss"], rows.loss.sum().item(), rel_tol=1e-6)
    right = [False, True, True, True]       # a row without labels has nothing wrong
    wanted = sum(math.log1p(math.exp(-v if r else v)) for v, r in zip(q[:, 0].tolist(), right))
    assert math.isclose(sums["q_halt_loss"], wanted, rel_tol=1e-6) and sums["q_continue_loss"] == 0
