"""Properties that make the step fast on a GPU, checked where there is none."""
import gc
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import eval as scoring
import model as M
import train
from runs import ALONE, boards, write_boards

META = torch.device("meta")
REGRESSION = dict(vocab_size=0, input_dim=3, target_dim=2)
MLP = dict(mixer="mlp", pos_encodings="none")


def make_run(*flags, world=ALONE, parts=None, **config):
    args = train.settings(["--preset", "sudoku", "--global-batch-size", "8", *flags], ALONE)[0]
    sizes = dict(vocab_size=6, seq_len=16, num_puzzles=5, hidden_size=32, num_heads=2, puzzle_emb_len=1,
                 puzzle_emb_ndim=32, H_cycles=2, L_cycles=2, halt_max_steps=4)
    run = train.Run(args, M.Config(**{**sizes, **config}), world, parts=parts)
    with torch.no_grad():
        run.model.q_bias.fill_(0)   # so that rows halt at random from the start
    return run


def random_batches(cfg, n, rows=8):
    g = torch.Generator().manual_seed(1)
    for i in range(n):
        if cfg.regression:
            widths = cfg.input_dim, cfg.target_dim
            puzzles = [torch.randn(rows, cfg.seq_len, width, generator=g) for width in widths]
        else:
            puzzles = torch.randint(1, cfg.vocab_size, (2, rows, cfg.seq_len), dtype=torch.int32, generator=g)
        ids = torch.randint(cfg.num_puzzles, (rows,), dtype=torch.int32, generator=g)
        yield M.Batch(*puzzles, ids, torch.from_numpy(data.exploration(0, i, rows, 0.5, 4)))


def step(run, *parts):
    train.backward(run, parts)
    train.update(run, 1.0)


# of a board of 4 x 4: five rows on windows of 2 x 2, three on the whole
CANVASES = [data.Part(2, None, 5), data.Part(4, None, 3)]


def canvas_batches(run, n):
    return list(zip(*(random_batches(run.config_of(part), n, part.rows) for part in run.parts)))


# ---------------------------------------------------------------------------------------------
# Compiling

@pytest.mark.parametrize("config, steps", [(MLP, 40), ({}, 10)], ids=["mlp", "attn"])
def test_no_graph_break_and_no_recompilation(config, steps):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    run = make_run(**config)
    M.compile_model(run.model, backend="aot_eager")
    batches, halted = list(random_batches(run.cfg, steps + 3)), set()
    for batch in batches[:3]:
        step(run, batch)
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches[3:]:
            step(run, batch)
            halted.add(int(run.carries[0].halted.sum()))
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == graphs == 2, counters["stats"]  # without and with gradient
    assert len(halted) > 1, f"the test must see changing numbers of halted rows, saw {halted}"


def test_evaluation_uses_the_graphs_of_training(tmp_path):
    """Of the same batch size; a score_mod and every number of parts, too."""
    split = data.Split(write_boards(tmp_path / "boards", groups=11), "test")
    for config in (MLP, dict(score_mod="sudoku")):
        torch._dynamo.reset()
        run = make_run("--grad-accum", "2", num_puzzles=split.meta["num_puzzle_identifiers"], **config)
        M.compile_model(run.model, backend="aot_eager")
        for batch in random_batches(run.cfg, 2):
            step(run, batch)
        with torch._dynamo.config.patch(error_on_recompile=True):
            metrics = train.evaluate(run, split, None)
        assert metrics["val/n"] == len(split) and len(split) % max(run.at_once)


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    """A CPU needs a C++ compiler, a GPU one of C, both need Python's headers, and MPS needs nothing."""
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    for found, lacks in ((["c++", "cc"], ("", "")), (["gcc"], ("a C++ compiler", "")),
                         (["clang++"], ("", "a C compiler")), ([], ("a C++ compiler", "a C compiler"))):
        monkeypatch.setattr("shutil.which", {name: name for name in found}.get)
        assert (common.compiler_lacks(cpu), common.compiler_lacks(cuda)) == lacks, found
    (tmp_path / "Python.h").unlink()
    assert common.compiler_lacks(cpu) == "a C++ compiler and Python.h (Debian: python3-dev)"
    assert common.compiler_lacks(mps) == ""


# ---------------------------------------------------------------------------------------------
# The host never waits for the device

# Everything runs on the meta device, where tensors have shapes but no values: what asks for a value there
# fails, in whatever way it asks, while what the host holds already can be read and sent as on a GPU.
REFUSED = (NotImplementedError, RuntimeError, TypeError, AttributeError, AssertionError)
WAITS = {
    "cpu": lambda t: t.cpu(),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "np.asarray": lambda t: np.asarray(t),
    "to": lambda t: t.to("cpu"),
    "to, not blocking": lambda t: t.to(torch.device("cpu"), torch.float64, non_blocking=True),
    "to a tensor of the host": lambda t: t.to(torch.ones(1)),
    "copy": lambda t: torch.ones(t.shape).copy_(t),
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t.sum()),
    "int": lambda t: int(t.sum()),
    "bool": lambda t: bool(t.any()),
    "if": lambda t: 1 if t.sum() > 0 else 0,
    "in": lambda t: 1.0 in t,
    "isfinite": lambda t: math.isfinite(t.sum()),
    "max": lambda t: max(t.flatten()),
    "slice": lambda t: t[:t.argmax()],
    "format": lambda t: f"{t.sum():.3f}",
    "print": lambda t: str(t),
    "nonzero": lambda t: t.nonzero(),
    "where": lambda t: torch.where(t > 0),
    "mask": lambda t: t[t > 0],
    "mask written to": lambda t: t.clone().index_put_((t > 0,), t.flatten()[:1]),
    "masked_select": lambda t: t.masked_select(t > 0),
    "equal": lambda t: torch.equal(t, t),
    "allclose": lambda t: torch.allclose(t, t),
    "unique": lambda t: t.unique(),
    "repeat_interleave": lambda t: torch.repeat_interleave(t, t.long()),
    "bincount": lambda t: t.flatten().long().bincount(),
    "synchronize": lambda t: common.wait(t.device),
}


class OnDevice(TorchDispatchMode):
    """Refuses what the meta device lets pass, and counts operators and what is sent from the host."""

    def __init__(self):
        super().__init__()
        self.operators, self.sent = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if "index_put" in name:     # an index by a mask has to count its elements
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} waits for the device"
        if name == "_to_copy" and kwargs.get("device") == META and args[0].device.type == "cpu":
            self.sent += 1
        self.operators += 1
        return func(*args, **kwargs)


@pytest.fixture
def on_device(monkeypatch):
    """A world on the meta device. Printing a tensor fails, and the CPU draws its random numbers."""
    def no_values(self, *args, **kwargs):
        raise RuntimeError("printing waits for the device")
    monkeypatch.setattr(torch.Tensor, "__repr__", no_values)
    monkeypatch.setattr(torch.Tensor, "__format__", no_values)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    return common.World(0, 1, META)


def plant(monkeypatch, wait):
    """Have every supervision step do this with its logits."""
    heads = M.TRM.heads

    def waiting(self, y):
        logits, q = heads(self, y)
        wait(logits.detach())
        return logits, q
    monkeypatch.setattr(M.TRM, "heads", waiting)


@pytest.mark.parametrize("flags, config", [
    ((), {}), (("--grad-clip", "1"), MLP), (("--ema-warmup", "--freeze-weights"), {}),
    (("--grad-accum", "2"), dict(q_continue=True, loss="softmax")), ((), dict(score_mod="sudoku")),
    ((), dict(halt_max_steps=1, pos_encodings="learned")), ((), REGRESSION)], ids=str)
def test_a_training_step_never_waits(on_device, flags, config):
    run = make_run(*flags, world=on_device, **config)
    with OnDevice() as seen:
        for batch in random_batches(run.cfg, 3):
            step(run, batch)
    assert run.step == 3 and run.flat.data.device == run.carries[0].y.device == META
    assert seen.operators > 900, seen.operators         # backward included
    assert seen.sent == 3 * len(batch), f"{seen.sent} tensors were sent, not those of the batches alone"


def test_a_step_on_canvases_never_waits(on_device):
    run = make_run(world=on_device, parts=CANVASES)
    with OnDevice() as seen:
        for parts in canvas_batches(run, 3):
            step(run, *parts)
    assert run.step == 3 and [len(c.y) for c in run.carries] == [5, 3] and seen.operators > 900
    assert seen.sent == 3 * sum(map(len, parts)), f"{seen.sent} tensors were sent"


def test_canvases_have_graphs_of_their_own_and_no_others(monkeypatch):
    """With and without gradient, of both lengths; steps and evaluations later there is none more."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = make_run(parts=CANVASES)
    M.compile_model(run.model, backend="aot_eager")
    for parts in canvas_batches(run, 6):
        step(run, *parts)
    first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for parts in canvas_batches(run, 4):
        step(run, *parts)
        for inputs, _, ids, _ in parts:
            scoring.last_thought(run.model.eval(), inputs, ids, 2)
        run.model.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == first == 4
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_log_line_is_where_training_waits(on_device, monkeypatch):
    run = make_run(world=on_device)
    step(run, next(random_batches(run.cfg, 1)))
    with pytest.raises(AttributeError):                 # synchronize, which meta does not have
        train.log_step(run, None, 0.1, 0.0)
    monkeypatch.setattr(train, "wait", lambda device: None)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        train.log_step(run, None, 0.1, 0.0)


@pytest.mark.parametrize("effort", [dict(), dict(rollouts=2, noise=0.3), dict(augment=1)], ids=str)
def test_evaluation_waits_once_a_batch(on_device, monkeypatch, tmp_path, effort):
    """Never within its supervision steps: only to_host, which is called once they are over, does."""
    data.write_dataset(tmp_path / "d", {"train": boards(4), "test": boards(8)}, 6, {"builder": "sudoku"})
    split, model = data.Split(tmp_path / "d", "test"), make_run(world=on_device, num_layers=1).model.eval()
    batches, effort = [np.arange(4), np.arange(4, 7)], scoring.Effort(steps=3, **effort)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        list(scoring.score_all_steps(model, split, 0, batches, 4, effort))
    monkeypatch.setattr(scoring, "to_host", lambda cfg, rows, *columns: (len(rows), columns[-1].shape))
    with OnDevice() as seen:
        found = list(scoring.score_all_steps(model, split, 0, batches, 4, effort))
    assert found == [(4, (4, 3)), (3, (4, 3))] and seen.operators > 300, (found, seen.operators)


def test_regression_waits_as_rarely(on_device):
    model = make_run(world=on_device, **REGRESSION).model.eval()
    inputs, labels, ids, _ = (t.to(META) for t in next(random_batches(model.cfg, 1)))
    with OnDevice():
        for predictions, _ in scoring.think(model, inputs, ids, 2):
            assert scoring.all_right(model.cfg, predictions, labels).shape == (8,)


@pytest.mark.parametrize("what", WAITS)
def test_waiting_would_be_seen(on_device, monkeypatch, what):
    """In training and in evaluation; what does not wait passes."""
    run = make_run(world=on_device, num_layers=1, H_cycles=1, L_cycles=1)
    batch = next(random_batches(run.cfg, 1))

    def evaluate():
        list(scoring.think(run.model, batch.inputs.to(META), batch.puzzle_ids.to(META), 1))
    for wait, outcome in ((lambda t: t.sum() * t[..., 0].amax(), None), (WAITS[what], REFUSED)):
        plant(monkeypatch, wait)
        for act in (lambda: step(run, batch), evaluate):
            with OnDevice():
                if outcome is None:
                    act()
                else:
                    with pytest.raises(outcome):
                        act()


# ---------------------------------------------------------------------------------------------
# Memory, communication, arithmetic

def bytes_of_tensors():
    """Of all that are alive. Those of a compiler are subclasses, whose sizes may be symbols."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)
    return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) in plain)


def test_steps_do_not_accumulate_memory():
    run = make_run(num_layers=1, H_cycles=1, L_cycles=1)
    batches, sizes = list(random_batches(run.cfg, 10)), []
    for i in range(200):
        step(run, batches[i % 10])
        if i in (10, 199):
            sizes.append(bytes_of_tensors())
    assert sizes[0] == sizes[1], f"bytes of live tensors: {sizes[0]} after 11 steps, {sizes[1]} after 200"


@pytest.mark.parametrize("parts", [1, 4])
def test_one_all_reduce_and_one_gather(monkeypatch, parts):
    """The gradients of all weights cross in one buffer; the puzzle rows in one gather, ids and gradients."""
    run, calls = make_run("--grad-accum", str(parts)), []
    for name in ("sum", "gather"):
        monkeypatch.setattr(common.World, name,
                            lambda self, t, name=name: calls.append((name, tuple(t.shape))) or t)
    step(run, next(random_batches(run.cfg, 1)))
    n_weights = sum(p.numel() for p in run.model.parameters())
    assert calls == [("sum", (n_weights,)), ("gather", (8, run.cfg.puzzle_emb_ndim + 1))], calls


def counted(cfg):
    """model.Flops by torch's own counter, on the meta device, where nothing is computed."""
    batch = M.Batch(*(t[:1].to(META) for t in next(random_batches(cfg, 1))))
    with META:
        model = M.TRM(cfg, None).train()
        with FlopCounterMode(display=False) as forward:
            _, logits, q = model.step(model.empty_carry(batch), batch)
        with FlopCounterMode(display=False) as backward:
            (logits.sum() + q.sum()).backward()
        with FlopCounterMode(display=False) as embed, torch.no_grad():
            model.embed(batch.inputs, model.puzzle_emb[batch.puzzle_ids])
    forward, backward, embed = (counter.get_total_flops() for counter in (forward, backward, embed))
    return M.Flops(forward, forward + backward, embed)


@pytest.mark.parametrize("change", [
    dict(), MLP, dict(seq_len=900, L_cycles=4, vocab_size=12), dict(L_cycles=1, **REGRESSION),
    dict(score_mod="sudoku", L_cycles=1),
    dict(H_cycles=1, num_layers=3, expansion=2.5, width_multiple=8)], ids=str)
def test_flops_formula_equals_torch_counter(change):
    cfg = M.Config(**change)
    assert M.flops(cfg) == counted(cfg)
