"""What only a GPU can show. Every test is skipped without CUDA; `./speedrun.sh gpu-check` runs them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import flags, go, last, unlike, without_curves
from test_published import GOLDEN, golden, golden_batch, golden_model
from test_speed import MLP, make_run, random_batch

import train
from model import Batch, Config, act_loss, attend, compile_model, grid_score_mod
from tools.common import World
from tools.hub import published_names

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def check_difference(what, found, expected, limit):
    difference = (found.double().cpu() - torch.as_tensor(expected).double().cpu()).abs().max().item()
    assert difference <= limit, f"{what}: the largest difference is {difference:.3e}, the limit {limit:.0e}"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", GOLDEN)
def test_the_published_figures(name, compiled):
    """Logits, q_halt and losses of 16 supervision steps, then gradients, in float32."""
    figures, config, state = golden(name)
    model = golden_model(config, state).to(CUDA).eval()
    if compiled:
        compile_model(model)
    batch = Batch(*(tensor.to(CUDA) for tensor in golden_batch(figures, 0)))
    carry = model.initial_carry(batch)
    for step in range(1, 17):
        with torch.no_grad():
            carry, logits, q = model.step(carry, batch)
            loss, _ = act_loss(model.cfg, carry, logits, q)
        if step in (1, 2, 16):
            limit = 1e-3 if step == 16 else 1e-4
            check_difference(f"logits {step}", logits, figures[f"eval/logits_step{step}"], limit)
        check_difference("q_halt", q[:, 0], figures["eval/q_halt"][step - 1], 1e-3)
        check_difference("loss", loss / figures["eval/loss"][step - 1], 1.0, 1e-4)
    carry, logits, q = model.train().step(model.initial_carry(batch), batch)
    loss, _ = act_loss(model.cfg, carry, logits, q)
    (loss / len(q)).backward()
    names = published_names(model.cfg)
    for key, p in model.named_parameters():
        expected = float(figures[f"grad_norm/{names[key]}"])
        check_difference(f"gradient of {key}", p.grad.norm() / max(expected, 1e-12), 1.0, 1e-4)


BLIND = 3  # a row that sees nothing


def blind_row(score, b, h, i, j):
    return torch.where(i != BLIND, score, -math.inf)


def unchanged(score, b, h, i, j):
    return score


@pytest.mark.parametrize("seq_len, length", [(81, 97), (900, 916)])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("mask", ["none", "grid", "blind row"])
def test_flex_attention_equals_plain_products(mask, head_dim, seq_len, length):
    """Compiled FlexAttention, forward and backward in float32; without a mask also SDPA."""
    cfg = Config(seq_len=seq_len, hidden_size=5 * head_dim, num_heads=5, puzzle_emb_ndim=0)
    score_mod = {"none": None, "grid": grid_score_mod(cfg), "blind row": blind_row}[mask]
    generator = torch.Generator(CUDA).manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 5, length, head_dim, generator=generator, device=CUDA)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    flex = torch.compile(lambda q, k, v: attend(q, k, v, score_mod), fullgraph=True, dynamic=False)
    ways = {"plain": attend(q, k, v, score_mod or unchanged), "flex": flex(q, k, v)}
    if mask == "none":
        ways["sdpa"] = F.scaled_dot_product_attention(q, k, v)
    gradients = {way: torch.autograd.grad(out, inputs, grad) for way, out in ways.items()}
    if mask == "blind row":
        assert not ways["flex"][:, :, BLIND].any(), ways["flex"][:, :, BLIND].abs().max()
    for way, out in ways.items():
        check_difference(f"output of {way}", out, ways["plain"], 1e-4)
        for name, found, expected in zip("qkv", gradients[way], gradients["plain"]):
            check_difference(f"gradient of {name}, {way}", found, expected, 1e-3)


@pytest.mark.parametrize("config", [{}, MLP, dict(score_mod="grid", num_heads=2)], ids=str)
def test_training_losses_equal_those_of_a_cpu(config):
    """20 steps in float32, compiled on the GPU. 0.1% more learning rate would differ by 4e-4."""
    losses = []
    for device in (CUDA, torch.device("cpu")):
        run = make_run(world=World(0, 1, device), dtype="float32", **config)
        if device == CUDA:
            compile_model(run.model)
        losses.append([])
        for i in range(20):
            run.metric_sums = {}
            train.forward_backward(run, random_batch(run.cfg, i))
            train.update(run, 1.0)
            losses[-1].append(run.metric_sums["lm_loss"].item())
    ratios = np.divide(*losses)
    assert np.abs(ratios - 1).max() < 1e-4, ratios


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("more", [[], ["--grad-accum", "2", "--grad-clip", "1"]], ids=str)
def test_a_training_step_never_waits(more, compiled):
    """CUDA itself reports every synchronisation as an error."""
    run = make_run(*more, world=World(0, 1, CUDA))
    if compiled:
        compile_model(run.model)
    batches = [Batch(*(tensor.pin_memory() for tensor in random_batch(run.cfg, i))) for i in range(4)]

    def take_steps(batches):
        for batch in batches:
            train.forward_backward(run, batch)
            train.update(run, 1.0)

    take_steps(batches[:2])  # compiles and allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_steps(batches[2:])
        with pytest.raises(RuntimeError, match="synchroniz"):
            run.finite_check.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_resumes_bit_for_bit(boards, tmp_path, monkeypatch):
    without_curves(monkeypatch)
    more = ["--device", "cuda", "--compile"]
    assert go(*flags(boards, tmp_path / "whole", *more)) == 0
    assert go(*flags(boards, tmp_path / "resumed", *more, "--max-steps", 3)) == 0
    assert go("--resume", tmp_path / "resumed", "--device", "cuda") == 0
    whole, resumed = last(tmp_path / "whole"), last(tmp_path / "resumed")
    assert whole["step"] > 6 and not unlike(whole, resumed)


def test_out_of_memory_splits_the_batch(boards, tmp_path, monkeypatch, capsys):
    without_curves(monkeypatch)
    more = ["--device", "cuda", "--hidden-size", 512, "--L-cycles", 6, "--global-batch-size", 512]
    more += ["--epochs", 40, "--eval-interval", 40, "--max-steps", 1]
    torch.cuda.reset_peak_memory_stats()
    assert go(*flags(boards, tmp_path / "whole", *more)) == 0
    assert "out of memory" not in capsys.readouterr().out
    fraction = 0.7 * torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        assert go(*flags(boards, tmp_path / "split", *more)) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: continuing with --grad-accum" in capsys.readouterr().out
