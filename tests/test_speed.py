"""What makes a step fast on a GPU, checked without one: static shapes, few graphs, no waiting."""

import gc
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import ALONE, boards, write_boards
from torch.utils._python_dispatch import TorchDispatchMode

import eval as scoring
import model as models
import prepare
import train
from data import Split, min_halt_steps
from model import TRM, Batch, Config, attend, compile_model, flops
from tools import common

META = torch.device("meta")
REGRESSION = dict(vocab_size=0, input_dim=3, target_dim=2)
MLP = dict(mixer="mlp", pos_encodings="none")


def make_run(*flags, world=ALONE, canvas_sizes=None, **config):
    args = train.settings(["--preset", "sudoku", "--global-batch-size", "8", *flags], ALONE)[0]
    sizes = dict(vocab_size=6, seq_len=16, num_puzzles=5, hidden_size=32, num_heads=2, puzzle_emb_len=1)
    sizes |= dict(puzzle_emb_ndim=32, num_layers=1, H_cycles=2, L_cycles=1, halt_max_steps=4)
    run = train.Run(args, Config(**(sizes | config)), world, canvas_sizes=canvas_sizes)
    with torch.no_grad():
        # rows halt at random from the start
        run.model.q_bias.zero_()
        run.model.q_head[0] = torch.linspace(-1, 1, 32)
    return run


def random_batch(cfg, i=0, rows=8):
    g = torch.Generator().manual_seed(i)
    if cfg.regression:
        inputs = torch.randn(rows, cfg.seq_len, cfg.input_dim, generator=g)
        labels = torch.randn(rows, cfg.seq_len, cfg.target_dim, generator=g)
    else:
        shape = (2, rows, cfg.seq_len)
        inputs, labels = torch.randint(1, cfg.vocab_size, shape, dtype=torch.int32, generator=g)
    ids = torch.randint(cfg.num_puzzles, (rows,), dtype=torch.int32, generator=g)
    return Batch(inputs, labels, ids, torch.from_numpy(min_halt_steps(0, i, rows, 0.5, 4)))


def take_steps(run, n, canvases=(0,)):
    """n training steps on each canvas; returns how many rows halted in each."""
    halted = []
    for i in range(n):
        for canvas in canvases:
            cfg = replace(run.cfg, seq_len=canvas**2) if canvas else run.cfg
            train.forward_backward(run, random_batch(cfg, i), canvas)
            train.update(run, 1.0, canvas)
            halted.append(run.carries[canvas].halted.sum())
    return halted


# ---------------------------------------------------------------------------------------------
# Compiling


@pytest.fixture
def counters():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


@pytest.mark.parametrize("config, canvases", [(MLP, (0,)), ({}, (0,)), ({}, (2, 4))])
def test_two_graphs_per_length_and_no_graph_break(counters, config, canvases):
    """One graph without gradient and one with it; more steps and evaluations compile no others."""
    run = make_run(canvas_sizes=dict.fromkeys(canvases, 1), **config)
    compile_model(run.model, backend="eager")
    take_steps(run, 2, canvases)
    n_graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        halted = set(map(int, take_steps(run, 6, canvases)))
        for canvas in canvases:
            batch = random_batch(replace(run.cfg, seq_len=canvas**2 or 16))
            list(scoring.supervision_steps(run.model.eval(), batch.inputs, batch.puzzle_ids, 2))
    assert counters["stats"]["unique_graphs"] == n_graphs == 2 * len(canvases), counters["stats"]
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert len(halted) > 1, f"the number of halted rows must change between steps, but is {halted}"


def test_an_evaluation_uses_the_graphs_of_training(counters, tmp_path):
    """Also with micro-batches and a last batch that is not full."""
    split = Split(write_boards(tmp_path / "boards", groups=11), "test")
    run = make_run("--grad-accum", "2", num_puzzles=split.meta["num_puzzle_identifiers"])
    compile_model(run.model, backend="eager")
    take_steps(run, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        metrics = train.evaluate(run, split, None)
    assert metrics["val/n"] == len(split) and len(split) % 4


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    """A CPU needs a C++ compiler, a GPU a C compiler, both need Python's headers, and MPS needs nothing."""
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    for found, cpu_lacks, cuda_lacks in ("gcc", "a C++ compiler", ""), ("clang++", "", "a C compiler"):
        monkeypatch.setattr("shutil.which", {found: found}.get)
        assert common.missing_compiler(cpu) == cpu_lacks and common.missing_compiler(cuda) == cuda_lacks
    monkeypatch.setattr("shutil.which", str)  # finds everything
    assert common.missing_compiler(cpu) == common.missing_compiler(cuda) == ""
    (tmp_path / "Python.h").unlink()
    assert common.missing_compiler(cpu) == "Python.h (Debian: python3-dev)"
    assert common.missing_compiler(mps) == ""


class CudaTensor:
    """The part of a tensor on a GPU that `attend` looks at."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, *shape):
        self.shape = shape


KERNELS = [(64, True, "flex"), (8, True, "sdpa"), (64, False, "sdpa")]


@pytest.mark.parametrize("head_dim, use_flex, kernel", KERNELS)
def test_attention_kernel_of_a_gpu(monkeypatch, head_dim, use_flex, kernel):
    """FlexAttention's Triton kernel; SDPA for narrow heads and with --attention sdpa."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(models, "flex_attention", lambda *qkv, kernel_options, **kw: ("flex", kernel_options))
    monkeypatch.setattr(models.F, "scaled_dot_product_attention", lambda q, k, v: ("sdpa", {}))
    q = CudaTensor(2, 8, 97, head_dim)
    options = {"BACKEND": "TRITON"} if kernel == "flex" else {}
    assert attend(q, q, q, None, use_flex) == (kernel, options)


# ---------------------------------------------------------------------------------------------
# The host never waits for the device
#
# Everything runs on the meta device, whose tensors have shapes but no values: whatever reads a value fails.

READS = """t.cpu()  t.tolist()  t.numpy()  np.asarray(t)  t.to("cpu")  t.to(torch.ones(1))  str(t)  t.unique()
float(t.sum())  int(t.sum())  bool(t.any())  t.sum().item()  math.isfinite(t.sum())  max(t.flatten())
t[:t.argmax()]  t[t > 0]  t.nonzero()  torch.where(t > 0)  t.masked_select(t > 0)  torch.equal(t, t)
torch.allclose(t, t)  torch.ones(t.shape).copy_(t)  t.clone().index_put_((t > 0,), t.flatten()[:1])
t.to(torch.device("cpu"), torch.float64, non_blocking=True)  torch.repeat_interleave(t, t.long())
t.flatten().long().bincount()  common.synchronize(t.device)  1 if t.sum() > 0 else 0  f"{t.sum():.3f}"
1.0 in t"""
READ_ERRORS = (NotImplementedError, RuntimeError, TypeError, AttributeError, AssertionError)


class OnDevice(TorchDispatchMode):
    """Refuses what the meta device allows, lists the operators and counts the tensors that the host sends."""

    def __init__(self):
        super().__init__()
        self.operators, self.n_sent = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if "index_put" in name:  # with a mask, the device would have to count its elements
            for index in args[1]:
                assert index is None or index.dtype != torch.bool, f"{func} waits for the device"
        if name == "_to_copy" and kwargs.get("device") == META and args[0].device.type == "cpu":
            self.n_sent += 1
        self.operators.append(name)
        return func(*args, **kwargs)


@pytest.fixture
def on_device(monkeypatch):
    """A world on the meta device. Printing a tensor fails; random numbers come from the CPU's generator."""

    def no_values(self, *args, **kwargs):
        raise RuntimeError("printing waits for the device")

    monkeypatch.setattr(torch.Tensor, "__repr__", no_values)
    monkeypatch.setattr(torch.Tensor, "__format__", no_values)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    return common.World(0, 1, META)


WAYS_TO_TRAIN = [
    ((), {}, (0,)),
    (("--grad-clip", "1"), MLP, (0,)),
    (("--ema-warmup", "--freeze-weights"), {}, (0,)),
    (("--grad-accum", "2"), dict(loss="softmax", score_mod="grid"), (0,)),
    ((), dict(halt_max_steps=1, pos_encodings="learned"), (0,)),
    ((), REGRESSION, (0,)),
    ((), {}, (2, 4)),
]


@pytest.mark.parametrize("flags, config, canvases", WAYS_TO_TRAIN, ids=str)
def test_a_training_step_never_waits(on_device, flags, config, canvases):
    run = make_run(*flags, world=on_device, canvas_sizes=dict.fromkeys(canvases, 1), **config)
    with OnDevice() as seen:
        take_steps(run, 2, canvases)
    assert run.step == 2 * len(canvases) and run.weights.device == META
    assert all(carry.y.device == META for carry in run.carries.values())
    assert seen.operators.count("silu_backward") >= run.step, "the backward was not seen"
    assert seen.n_sent == 4 * run.step, f"{seen.n_sent} tensors were sent, not only the 4 of every batch"


def test_only_the_log_line_waits(on_device, monkeypatch):
    run = make_run(world=on_device)
    take_steps(run, 1)
    with pytest.raises(AttributeError, match="meta"):  # synchronize, which meta lacks
        train.log_step(run, None, 0.1, 0.0)
    monkeypatch.setattr(train, "synchronize", lambda device: None)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        train.log_step(run, None, 0.1, 0.0)


@pytest.mark.parametrize("rollout", [0, 1])
def test_an_evaluation_waits_once_per_batch(on_device, tmp_path, rollout):
    """In scores_of, after all supervision steps; with noise, too."""
    prepare.write_dataset(tmp_path / "d", {"train": boards(4), "test": boards(7)}, 6, {"builder": "sudoku"})
    split = Split(tmp_path / "d", "test")
    model = make_run(world=on_device).model.eval()
    compute = scoring.TestTimeCompute(steps=3, rollouts=2, noise=0.3)
    with OnDevice() as seen:
        found = list(scoring.run_all_steps(model, split, 0, np.arange(7), 4, compute, rollout))
    assert [len(results[0]) for results in found] == [4, 3]
    assert seen.operators.count("silu") >= 2 * 3 and seen.n_sent == 2 * 3, seen.n_sent
    for results in found:
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            scoring.scores_of(model.cfg, split, 0, *results)


@pytest.mark.parametrize("read", READS.replace("\n", "  ").split("  "))
def test_a_read_would_be_found(on_device, monkeypatch, read):
    """Planted in the heads, in training and in evaluation."""
    run = make_run(world=on_device)
    batch = random_batch(run.cfg)
    heads = TRM.heads

    def heads_that_read(self, y):
        logits, q = heads(self, y)
        eval(read, {"t": logits.detach(), "torch": torch, "np": np, "math": math, "common": common})
        return logits, q

    monkeypatch.setattr(TRM, "heads", heads_that_read)
    with OnDevice(), pytest.raises(READ_ERRORS):
        take_steps(run, 1)
    with OnDevice(), pytest.raises(READ_ERRORS):
        list(scoring.supervision_steps(run.model, batch.inputs.to(META), batch.puzzle_ids.to(META), 1))


# ---------------------------------------------------------------------------------------------
# Memory, collectives, SignSGD, evaluations


def bytes_of_tensors():
    """Of all that are alive. Those of a compiler are subclasses, whose sizes may be symbols."""
    gc.collect()
    total = 0
    for value in gc.get_objects():
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            total += value.untyped_storage().nbytes()
    return total


def test_steps_do_not_accumulate_memory():
    run = make_run()
    take_steps(run, 10)
    before = bytes_of_tensors()
    take_steps(run, 50)
    assert bytes_of_tensors() == before, f"{before:,} bytes after 10 steps, {bytes_of_tensors():,} after 60"


@pytest.mark.parametrize("grad_accum", ["1", "4"])
def test_a_step_has_one_all_reduce_and_one_all_gather(monkeypatch, grad_accum):
    """All weight gradients travel in one vector, puzzle ids and their gradients in one matrix."""
    run = make_run("--grad-accum", grad_accum)
    shapes = []
    for name in ("all_reduce", "all_gather"):
        monkeypatch.setattr(common.World, name, lambda self, tensor: shapes.append(tensor.shape) or tensor)
    take_steps(run, 1)
    n_weights = sum(p.numel() for p in run.model.parameters())
    assert shapes == [(n_weights,), (8, run.cfg.puzzle_emb_ndim + 1)], shapes


@pytest.mark.parametrize("n_puzzles", [1, 5])
def test_sign_sgd_equals_a_loop_and_does_not_depend_on_the_order_of_rows(n_puzzles):
    """Bit for bit, although the sums of many rows are close to 0."""
    g = torch.Generator().manual_seed(n_puzzles)
    for trial in range(20):
        grads = torch.randn(768, 16, generator=g)
        grads[384:] = -grads[:384] * (1 + 1e-7)
        ids = torch.randint(n_puzzles, (768,), generator=g).sort().values
        table = torch.randn(n_puzzles + 1, 16, generator=g)  # no row has the last id
        expected = table.clone()
        for i in ids.unique():
            total = grads[ids == i].double().sum(0)
            expected[i] = table[i] * (1 - 0.01 * 0.1) - 0.01 * total.sign().float()
        for order in (torch.arange(768), torch.arange(768).flip(0), torch.randperm(768, generator=g)):
            found = table.clone()
            train.sign_sgd(found, ids[order].float(), grads[order], 0.01, 0.1)
            assert torch.equal(found, expected), f"trial {trial}: by {(found - expected).abs().max():.2e}"


@pytest.mark.parametrize("preset, test_rows", [("sudoku", 422_786), ("maze", 1000), ("arc1", 385_815)])
def test_evaluations_during_training_cost_little(preset, test_rows):
    """Below 5% of the FLOPs of the training. Only the last one scores all examples."""
    args = train.flags(**train.PRESETS[preset]).parse_args([])
    shape = prepare.known_dataset(args.data[0]).shape
    cost = flops(train.config_of(args, shape))
    training = train.total_training_steps(args, shape) * args.global_batch_size * cost.train_step
    n_evaluations = args.epochs // args.eval_interval - 1
    evaluations = n_evaluations * min(args.eval_limit, test_rows) * args.halt_max_steps * cost.forward
    assert evaluations < 0.05 * training, f"{evaluations / training:.1%} of the training"
