"""Agreement with the published code: the figures in tests/golden/model_*.npz were made by running it."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as scoring
import train
from model import Batch, CheckpointError, act_loss, from_published, build, metric_names, published_names, \
    to_published, PREFIX

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["mlp", "attention", "learned_positions"]
OURS = {"accuracy": "cell_acc", "exact_accuracy": "exact_acc", "q_halt_accuracy": "q_halt_acc"}


def load(name):
    """(figures, published settings, published state dict without prefix)"""
    d = np.load(GOLDEN / f"model_{name}.npz")
    c = json.loads(str(d["config"]))
    r, state = np.random.RandomState(c["weight_seed"]), {}
    for entry in d["keys"]:
        key, shape = str(entry).split(" ", 1)
        scale = 1.0 if key in ("H_init", "L_init") else c["weight_scale"]
        shape = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
        state[key] = torch.from_numpy((r.standard_normal(shape) * scale).astype(np.float32))
    return d, c, state


def overrides(c):
    return dict(seq_len=c["seq_len"], puzzle_emb_len=c["puzzle_emb_len"], num_heads=c["num_heads"],
                H_cycles=c["H_cycles"], L_cycles=c["L_cycles"], dtype="float32")


def model_of(c, state):
    return build(*from_published({f"_orig_mod.{PREFIX}{k}": v.clone() for k, v in state.items()}, overrides(c)))


def batch_of(d, i):
    arrays = [torch.from_numpy(d[f"batch{i}/{k}"].astype(np.int32)) for k in ("inputs", "labels", "puzzle_identifiers")]
    return Batch(*arrays, torch.zeros(len(arrays[0]), dtype=torch.int32))


def golden_metrics(d, key, cfg):
    values = dict(zip((OURS.get(str(n), str(n)) for n in d[f"{key}/metric_names"]), np.atleast_2d(d[f"{key}/metrics"]).T))
    return np.stack([values[n] if n in values else np.zeros_like(values["count"]) for n in metric_names(cfg)], axis=-1)


def report(what, measured, limit):
    print(f"{what}: largest difference {measured:.2e}, limit {limit:.0e}")
    assert measured <= limit, f"{what}: difference {measured:.3e} is over {limit:.0e}"


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_agrees_over_16_steps(name):
    d, c, state = load(name)
    model = model_of(c, state).eval()
    batch = batch_of(d, 0)
    carry, losses, q_halt = model.empty_carry(batch), [], []
    with torch.no_grad():
        for step in range(1, 17):
            carry, logits, q = model.step(carry, batch)
            loss, sums = act_loss(model.cfg, carry, logits, q)
            losses.append(loss.item())
            q_halt.append(q[:, 0].numpy())
            if step in (1, 2, 16):
                worst = np.abs(logits.numpy() - d[f"eval/logits_step{step}"]).max()
                report(f"{name} logits at step {step}", worst, 1e-3 if step == 16 else 1e-4)
    report(f"{name} q_halt", np.abs(np.array(q_halt) - d["eval/q_halt"]).max(), 1e-3)
    report(f"{name} loss", np.abs(np.array(losses) / d["eval/loss"] - 1).max(), 1e-4)
    report(f"{name} metrics", np.abs(sums.numpy() - golden_metrics(d, "eval", model.cfg)[0]).max(), 1e-3)
    assert carry.halted.all() and (carry.steps == 16).all()


def run_of(c, state, model):
    """A train.Run with the golden settings around the golden weights."""
    args = train.settings(["--preset", "sudoku"])[0]
    vars(args).update(global_batch_size=c["batch_size"], lr=c["lr"], puzzle_emb_lr=c["plr"], weight_decay=c["wd"],
                      puzzle_emb_weight_decay=c["pwd"], halt_exploration_prob=0.0)
    run = train.Run(args, model.cfg, scoring.World(0, 1, torch.device("cpu")),
                    {"model": {k: v.clone() for k, v in model.state_dict().items()}})
    return run


@pytest.mark.parametrize("name", NAMES)
def test_three_training_steps_agree(name):
    d, c, state = load(name)
    run = run_of(c, state, model_of(c, state))
    names = published_names(run.cfg)
    params = dict(run.model.named_parameters())
    previous = torch.zeros_like(run.sums)
    for i in range(3):
        train.backward(run, batch_of(d, i))
        if i == 0:
            for key, p in params.items():
                golden = float(d[f"grad_norm/{names[key]}"])
                report(f"{name} gradient of {key}", abs(p.grad.norm().item() - golden) / max(golden, 1e-12), 1e-4)
        sums = (run.sums - previous).numpy()
        previous = run.sums.clone()
        report(f"{name} loss at step {i}", abs((sums[5] + 0.5 * sums[6]) / d["train/loss"][i] - 1), 1e-4)
        wanted = golden_metrics(d, "train", run.cfg)[i]
        report(f"{name} metrics at step {i}", np.abs(sums - wanted).max(), 1e-4 * max(1, np.abs(wanted).max()))
        carry = run.carries[0]
        assert (carry.halted.numpy() == d[f"train/halted{i}"]).all(), (i, carry.halted, d[f"train/halted{i}"])
        assert (carry.steps.numpy() == d[f"train/steps{i}"]).all(), (i, carry.steps, d[f"train/steps{i}"])
        train.update(run, 1.0)
    after = run.model.state_dict()
    for key, theirs in names.items():
        got, wanted = after[key].flatten()[:8].numpy(), d[f"after/{theirs}"]
        close = np.abs(got - wanted) <= 1e-5
        allowed = 2 * (c["plr"] if key == "puzzle_emb" else c["lr"])
        assert close.mean() >= 0.99 or np.abs(got - wanted)[~close].max() <= allowed and (~close).sum() <= 1, (key, got, wanted)
    for key, view in run.flat.views(run.ema).items():
        got, wanted = view.flatten()[:8].numpy(), d[f"ema/{names[key]}"]
        report(f"{name} EMA of {key}", np.abs(got - wanted).max(), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_published_format_round_trip(name):
    d, c, state = load(name)
    model = model_of(c, state)
    exported = to_published(model.cfg, model.state_dict())
    assert {k.removeprefix("_orig_mod." + PREFIX) for k in exported} == state.keys()
    assert all(torch.equal(exported[f"_orig_mod.{PREFIX}{k}"], v) for k, v in state.items())
    plain = {k.removeprefix("_orig_mod."): v for k, v in exported.items()}
    again, batch = build(*from_published(plain, overrides(c))), batch_of(d, 0)
    with torch.no_grad():
        logits = [m.eval().step(m.empty_carry(batch), batch)[1] for m in (model, again)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("change, named", [
    (lambda s: s.pop("lm_head.weight"), "lm_head.weight"),
    (lambda s: s.update({"surplus.weight": torch.zeros(1)}), "surplus.weight"),
    (lambda s: s.update({"q_head.bias": torch.zeros(3)}), "q_bias"),
    (lambda s: s.pop("embed_tokens.embedding_weight"), "embed_tokens.embedding_weight")])
def test_wrong_keys_are_named(change, named):
    _, c, state = load("attention")
    change(state)
    with pytest.raises(CheckpointError, match=named):
        model_of(c, state)
    with pytest.raises(CheckpointError, match="nonsense"):
        from_published({"nonsense": torch.zeros(1)}, overrides(c))
