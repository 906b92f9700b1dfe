"""Properties that make the step fast on a GPU, checked where there is none."""
import gc
import json

import pytest
import runs
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as scoring
import model as M
import train

SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "item"}


class CountOps(TorchDispatchMode):
    """Counts operators, and refuses those that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in SYNCS:
            raise AssertionError(f"{func} waits for the device inside a training step")
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def make_run(*flags, **config):
    args = train.settings(["--global-batch-size", "8", "--hidden-size", "32", "--puzzle-emb-ndim", "32",
                           "--halt-max-steps", "4", *flags])[0]
    cfg = M.Config(**{**dict(vocab_size=6, seq_len=16, num_puzzles=5, hidden_size=32, num_heads=2, puzzle_emb_len=1,
                             puzzle_emb_ndim=32, H_cycles=2, L_cycles=2, halt_max_steps=4, dtype="bfloat16"), **config})
    run = train.Run(args, cfg, scoring.World(0, 1, torch.device("cpu")))
    with torch.no_grad():
        run.model.q_bias.fill_(0)   # so that rows halt at random from the start
    return run


def random_batches(cfg, n):
    g = torch.Generator().manual_seed(1)
    for i in range(n):
        tokens = torch.randint(1, cfg.vocab_size, (2, 8, cfg.seq_len), dtype=torch.int32, generator=g)
        ids = torch.randint(cfg.num_puzzles, (8,), dtype=torch.int32, generator=g)
        yield M.Batch(*tokens, ids, torch.from_numpy(train.exploration(0, i, 8, 0.5, 4)))


def step(run, batch):
    train.backward(run, batch)
    train.update(run, 1.0)


@pytest.mark.parametrize("unit, mixer, steps", [("net", "mlp", 200), ("net", "attn", 10), ("cycle", "mlp", 10), ("step", "attn", 10)])
def test_no_graph_break_and_no_recompilation(unit, mixer, steps):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    run = make_run(mixer=mixer, pos_encodings="rope" if mixer == "attn" else "none")
    M.compile_model(run.model, unit, backend="aot_eager")
    batches, halted = list(random_batches(run.cfg, steps + 3)), set()
    for batch in batches[:3]:
        step(run, batch)
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches[3:]:
            step(run, batch)
            halted.add(int(run.carries[0].halted.sum()))
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == graphs <= 2, (graphs, counters["stats"])   # without and with gradient
    assert len(halted) > 1, f"the test must see changing numbers of halted rows, saw {halted}"


@pytest.mark.parametrize("flags, config", [((), {}), (("--grad-clip", "1"), {}),
                                           (("--grad-accum", "2"), dict(q_continue=True, loss="softmax")),
                                           ((), dict(mixer="mlp", pos_encodings="none")),
                                           ((), dict(vocab_size=0, input_dim=3, target_dim=2))], ids=str)
def test_no_host_synchronisation_in_a_step(flags, config):
    run = make_run(*flags, **config)
    if run.cfg.regression:
        batches = [M.Batch(torch.randn(8, 16, 3), torch.randn(8, 16, 2), torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32))] * 3
    else:
        batches = list(random_batches(run.cfg, 3))
    step(run, batches[0])
    with CountOps() as ops:
        for batch in batches[1:]:
            step(run, batch)
    assert sum(ops.counts.values()) > 100   # the mode saw the step, backward included
    with pytest.raises(AssertionError, match="waits"), CountOps():
        run.sums.sum().item()               # and it would have seen a synchronisation


@pytest.mark.parametrize("rounds", [1, 3])
def test_weights_are_cast_once_per_step(rounds):
    """The casts of a step do not grow with the cycles: 4 matrices of 2 blocks, the embedding, the heads."""
    counts = []
    for L_cycles in (1, 4):
        run = make_run(H_cycles=rounds, L_cycles=L_cycles)
        batch = next(random_batches(run.cfg, 1))
        shapes = {tuple(p.shape) for p in run.model.blocks.parameters()}

        class CountCasts(TorchDispatchMode):
            seen = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.overloadpacket.__name__ == "_to_copy" and kwargs.get("dtype") == torch.bfloat16 and tuple(args[0].shape) in shapes:
                    self.seen += 1
                return func(*args, **(kwargs or {}))
        with CountCasts() as casts:
            run.model.step(run.model.empty_carry(batch), batch, run.deltas[0])
        counts.append(casts.seen)
    assert counts == [8, 8], counts


def test_steps_do_not_accumulate_memory():
    run = make_run(num_layers=1, H_cycles=1, L_cycles=1)
    batches, sizes = list(random_batches(run.cfg, 10)), []
    for i in range(500):
        step(run, batches[i % 10])
        if i in (10, 499):
            gc.collect()
            sizes.append(sum(t.untyped_storage().nbytes() for t in gc.get_objects() if isinstance(t, torch.Tensor)))
    assert sizes[0] == sizes[1], f"bytes of live tensors: {sizes[0]} after 11 steps, {sizes[1]} after 500"


@pytest.mark.parametrize("mixer", ["attn", "mlp"])
def test_nothing_outlives_a_step_in_the_memory_of_a_graph(monkeypatch, tmp_path, mixer):
    """CUDA graphs write over what a compiled function returned as soon as the next step begins. Here NaN does."""
    split, outcomes = data.Split(runs.write_boards(tmp_path), "test"), []
    for overwrite in (False, True):
        returned, marks = [], []

        def mark():
            marks.append(len(returned))
            for t in returned:
                t.detach().fill_(float("nan"))
            returned.clear()
        run = make_run(mixer=mixer, pos_encodings="none", num_puzzles=41)
        if overwrite:
            monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", mark)
            net = run.model.net
            run.model.net = lambda *args: returned.append(net(*args)) or returned[-1]
        for batch in random_batches(run.cfg, 3):
            step(run, batch)
        metrics = train.evaluate(run, split, None)
        outcomes.append((run.flat.data, run.model.puzzle_emb, *run.carries[0], metrics))
    assert len(marks) > 4 and max(marks) >= 6          # it was called every step, and there was something to write over
    *tensors, metrics = zip(*outcomes)
    assert metrics[0] == metrics[1] and all(torch.equal(a, b) and a.isfinite().all() for a, b in tensors)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_finds_everything_at_the_same_addresses(parts):
    """What CUDA graphs need: batch, carry, weights, gradients, optimizer state and metrics stay where they are."""
    run, seen = make_run("--grad-accum", str(parts)), []
    for batch in random_batches(run.cfg, 4):
        step(run, batch)
        tensors = [*sum(map(list, run.batches + run.carries), []), *run.deltas, *(d.grad for d in run.deltas), *run.model.buffers(),
                   *run.model.parameters(), *(p.grad for p in run.model.parameters()), run.flat.data, run.flat.grad,
                   run.adam.m, run.adam.v, run.ema, run.sums, run.nan_step]
        seen.append([t.data_ptr() for t in tensors])
        assert torch.equal(torch.cat([b.inputs for b in run.batches]), batch.inputs)
    assert all(pointers == seen[0] for pointers in seen[1:]), [sum(a != b for a, b in zip(p, seen[0])) for p in seen]


def test_a_split_on_the_device_gives_the_same_batches(tmp_path):
    folders = [runs.write_boards(tmp_path / name, groups, seed, shift=100 * seed) for name, groups, seed in (("a", 20, 0), ("b", 7, 1))]
    split = data.Split(folders, "train")
    args = train.settings(runs.flags(folders[0], tmp_path, "--epochs", "3"))[0]
    world, resident = scoring.World(0, 1, torch.device("cpu")), train.Resident(split, torch.device("cpu"))
    host = [M.Batch(*t) for t, _ in train.stream(split, args, world, data.Cursor(), 0)]
    device = [resident.batch(*t) for t, _ in train.stream(split, args, world, data.Cursor(), 0, resident)]
    assert len(host) == len(device) > 5
    for a, b in zip(host, device):
        for x, y in zip(a, b):
            assert x.dtype == y.dtype and torch.equal(x, y)
    assert not train.Resident.fits(split, torch.device("cpu"))


def test_both_benches_print_and_append_their_figures(tmp_path, monkeypatch, capsys):
    """Without a dataset, and with one (then the time of the data is there); the FLOPs by formula are those counted."""
    monkeypatch.chdir(tmp_path)
    boards = runs.write_boards(tmp_path / "boards")
    assert train.main(["--bench", "2", "--global-batch-size", "4", "--no-compile"]) == 0
    assert train.main(["--bench", "1", "--global-batch-size", "4", "--no-compile", "--data", boards, "--dtype", "float32"]) == 0
    assert scoring.main(["--bench", "1", "--preset", "sudoku-att", "--batch-size", "1", "--steps", "2", "--no-compile"]) == 0
    rows = [json.loads(line) for line in open("bench.jsonl")]
    assert [(r["preset"], r["n"], r["data_ms"] is None) for r in rows] == [("mini", 2, True), ("mini", 1, False), ("sudoku-att", 1, True)]
    for row in rows:
        assert row["gflop"] == pytest.approx(row["gflop by torch's counter"], rel=1e-9), row
        assert row["share_of_peak"] == pytest.approx(row["gflop"] / row["ms"] / row["peak_tflops"], rel=1e-6) and row["share_of_peak"] > 0
    assert "share_of_peak" in capsys.readouterr().out


def test_one_all_reduce_and_one_gather_of_each_kind(monkeypatch):
    """The gradient of all tensors crosses in one flat buffer; the puzzle rows in one gather (ids and gradients)."""
    run, calls = make_run(), []
    monkeypatch.setattr(scoring.World, "sum", lambda self, t: calls.append(("sum", t.numel())) or t)
    monkeypatch.setattr(scoring.World, "gather", lambda self, t: calls.append(("gather", tuple(t.shape))) or t)
    step(run, next(random_batches(run.cfg, 1)))
    assert calls == [("sum", run.flat.grad.numel()), ("gather", (8, run.cfg.puzzle_emb_ndim + 1))], calls


@pytest.mark.parametrize("cfg", [M.Config(), M.Config(mixer="mlp", pos_encodings="none"),
                                 M.Config(seq_len=900, L_cycles=4, vocab_size=12)], ids=["attn", "mlp", "arc"])
def test_flops_formula_equals_torch_counter(cfg):
    assert train.step_flops(cfg) == train.counted_flops(cfg)
