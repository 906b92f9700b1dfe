"""The model against naive loops, and what must hold whatever the weights are."""
import math

import numpy as np
import pytest
import torch

import train
from model import IGNORE, TRM, Batch, CastOnce, Config, act_loss, attend, compiler_lacks, log_stablemax, \
    sudoku_score_mod, swiglu_width, trunc_normal


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


def one_step(cfg, seed=0, rows=3):
    """(model, delta, loss) after a forward and a backward."""
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
    """One application of net in float64, element by element: the mixer's rms runs over L, the other over D."""
    cfg = tiny(mixer="mlp", pos_encodings="none", num_layers=1)
    model = make(cfg)
    L, D = cfg.length, cfg.hidden_size
    h = torch.randn(2, L, D, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, L, D, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        first = (t.transpose(0, 1).contiguous() for t in (h, x))      # net takes (L, B, D) with this mixer
        got = model.net(*first, model.cast_weights(1)[0]).transpose(0, 1).numpy()
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
        got = model.net(h, torch.zeros_like(h), model.cast_weights(1)[0])[0].numpy()
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
    p, adam = torch.tensor(p0, dtype=torch.float32), train.AdamATan2(7, "cpu", b1, b2, wd)
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
    for i in range(4):                                    # all rows were halted at the start: all took the batch
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
    """Rows halt at the last step, when q_halt > 0 in training, and never below the minimum that exploration drew."""
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
        assert not model.eval().step(model.empty_carry(batch), batch)[0].halted.any()   # evaluation goes all the way


def test_train_max_steps():
    """Rises in even stretches; exploration may hold a row beyond it."""
    args = train.settings(["--preset", "sudoku", "--train-max-steps", "2", "5"])[0]
    assert [train.train_max_steps(args, i / 8) for i in range(9)] == [2, 2, 3, 3, 4, 4, 5, 5, 5]
    assert train.train_max_steps(train.settings(["--preset", "sudoku"])[0], 0.1) == 16
    cfg = tiny(halt_max_steps=4)
    model, batch = make(cfg).train(), random_batch(tiny(), 3)
    batch = batch._replace(min_steps=torch.tensor([0, 3, 4], dtype=torch.int32))
    for limit, ends in ((torch.tensor(2), [2, 3, 4]), (None, [4, 4, 4])):
        carry, halted_at = model.empty_carry(batch), [0, 0, 0]
        with torch.no_grad():
            for step in range(1, 5):
                carry = model.step(carry._replace(halted=carry.halted & (carry.steps == 0)), batch, max_steps=limit)[0]
                halted_at = [at or step * int(h) for at, h in zip(halted_at, carry.halted.tolist())]
        assert halted_at == ends, (limit, halted_at)


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
    weights = model.cast_weights(cfg.L_cycles + 1)
    with torch.no_grad():
        for _ in range(2):
            y, z = model.cycle(x, y, z, weights)
    model.cycle(x, y, z, weights)[0].sum().backward()
    for a, p in zip(whole, model.blocks.parameters()):
        assert torch.allclose(a, p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("change", [
    dict(), dict(mixer="mlp", pos_encodings="none"), dict(pos_encodings="learned"), dict(pos_encodings="none"),
    dict(loss="softmax"), dict(q_continue=True), dict(score_mod="sudoku"), dict(puzzle_emb_len=0, puzzle_emb_ndim=0),
    dict(puzzle_emb_ndim=48), dict(H_cycles=1), dict(num_layers=3), dict(dtype="bfloat16"), dict(halt_max_steps=1),
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
        assert math.isclose(sums[5].item(), wanted.item(), rel_tol=1e-5)
    else:
        model, delta, loss, sums = one_step(cfg, rows=rows)
        if cfg.puzzle_emb_ndim:
            assert delta.grad.abs().sum() > 0
    assert loss.isfinite() and sums.isfinite().all()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if not name.startswith("q_"):
            assert p.grad.abs().sum() > 0, name


def test_stablemax_and_the_row_mean():
    logits, labels = torch.tensor([[[2.0, -1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 1.0, 1.0]]]), torch.tensor([[1, IGNORE, 0]])
    s = np.array([3.0, 0.5, 1.0])
    assert np.allclose(log_stablemax(logits)[0, 0].numpy(), np.log(s / s.sum()), atol=1e-12)
    assert log_stablemax(logits).dtype == torch.float64
    cfg = tiny(vocab_size=3, seq_len=3)
    carry = make(cfg).empty_carry(Batch(labels.int(), labels.int(), torch.zeros(1, dtype=torch.int32), None))
    q = torch.zeros(1, 2)
    loss, sums = act_loss(cfg, carry._replace(labels=labels), logits, q)
    wanted = (-math.log(0.5 / 4.5) - math.log(1 / 3)) / 2
    assert math.isclose(loss.item(), wanted + 0.5 * math.log(2), rel_tol=1e-6)
    assert sums.tolist()[:4] == [1, 0.5, 0, 0]            # cell 2 ties: argmax takes the first, which is its label


def test_initial_weights_have_the_stated_std():
    for fan_in in (64, 512):
        w = trunc_normal((2000, fan_in), fan_in ** -0.5, torch.Generator().manual_seed(0))
        assert abs(w.std().item() * fan_in ** 0.5 - 1) < 0.01
        assert w.abs().max().item() <= 2 * fan_in ** -0.5 / 0.8796 + 1e-6
    assert swiglu_width(512, 4.0) == 1536 and swiglu_width(97, 4.0) == 512 and swiglu_width(64, 4.0) == 256


@pytest.mark.parametrize("seq_len", [16, 36, 81])
def test_score_mod_equals_a_naive_loop_and_trains(seq_len):
    cfg = tiny(seq_len=seq_len, score_mod="sudoku")
    size, P, H = math.isqrt(seq_len), cfg.puzzle_emb_len, cfg.num_heads
    box_rows, box_cols = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    q, k, v = torch.randn(3, 1, H, cfg.length, 8, generator=torch.Generator().manual_seed(0), requires_grad=True).unbind(0)
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
    from torch.nn.attention.flex_attention import flex_attention
    cfg = tiny(seq_len=36, score_mod="sudoku")
    q, k, v = torch.randn(3, 1, 4, cfg.length, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    mod = sudoku_score_mod(cfg)
    with torch.no_grad():
        got = flex_attention(q, k, v, score_mod=mod)
        assert (got - attend(q, k, v, mod)).abs().max() < 1e-5


def test_weights_are_cast_once_and_summed_in_float32():
    """Gradients of 7 uses, each rounded to bfloat16, are added in float32: nearer to the truth than bfloat16 sums."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    xs = torch.randn(7, 32, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    uses = CastOnce.apply(w, torch.bfloat16, 7)
    assert len({u.data_ptr() for u in uses}) == 1        # one cast, seven aliases
    sum((x @ u).float().square().sum() for x, u in zip(xs, uses)).backward()
    once = w.grad.clone()
    w.grad = None
    sum((x @ w.to(torch.bfloat16)).float().square().sum() for x in xs).backward()   # a cast per use, as published
    assert torch.equal(once, w.grad)


@pytest.mark.parametrize("ids", [[3, 1, 3, 3, 0, 1], [2, 2, 2, 2, 2, 2], [0, 1, 2, 3, 4, 5]])
def test_sign_sgd_against_a_loop(ids):
    g = torch.Generator().manual_seed(0)
    table, grads = torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g)
    wanted = table.clone()
    for puzzle in set(ids):
        total = sum(grads[i] for i in range(6) if ids[i] == puzzle)
        wanted[puzzle] = wanted[puzzle] * (1 - 0.1 * 0.5) - 0.1 * total.sign()
    train.sign_sgd(table, torch.tensor(ids, dtype=torch.int32), grads, 0.1, 0.5)
    assert torch.allclose(table, wanted, atol=1e-6), (table - wanted).abs().max()


def test_schedule():
    assert [train.schedule(t, 100, 4, 1.0) for t in (1, 2, 4, 100)] == [0.25, 0.5, 1.0, 1.0]
    assert math.isclose(train.schedule(52, 100, 4, 0.2), 0.6) and math.isclose(train.schedule(100, 100, 4, 0.2), 0.2)


def test_tiny_model_learns_eight_puzzles():
    cfg = tiny(mixer="mlp", pos_encodings="none")
    args = train.settings(["--global-batch-size", "8", "--lr", "2e-3", "--puzzle-emb-lr", "1e-2", "--weight-decay", "0"])[0]
    import eval as scoring
    args.ema = 0.9
    run = train.Run(args, cfg, scoring.World(0, 1, torch.device("cpu")))
    batch = random_batch(cfg, 8)
    for step in range(300):
        train.backward(run, batch)
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


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "C++ compiler" in compiler_lacks(cpu) and compiler_lacks(torch.device("cuda")) == ""
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "Python.h" in compiler_lacks(cpu)
    (tmp_path / "Python.h").touch()
    assert compiler_lacks(cpu) == ""
