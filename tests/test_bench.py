"""tools/bench.py: every preset without its data, and what the numbers mean."""

import pytest
from runs import ALONE, write_source_of_sizes
from torch.utils.flop_counter import FlopCounterMode

import prepare
import train
from prepare import arc
from tools import bench
from tools.common import UserError

SMALL = dict(hidden_size=32, puzzle_emb_ndim=32, num_heads=2, H_cycles=1, L_cycles=1, halt_max_steps=2)
PLAIN = [name for name, preset in train.PRESETS.items() if "canvases" not in preset]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder; small presets and puzzle tables; a quick measurement of the peak."""
    monkeypatch.chdir(tmp_path)
    for name, preset in train.PRESETS.items():
        monkeypatch.setitem(train.PRESETS, name, {**preset, **SMALL, "dtype": "float32"})
        monkeypatch.setitem(prepare.known_dataset(preset["data"][0]).shape, "num_puzzle_identifiers", 5)
    peak = bench.matmul_flops
    monkeypatch.setattr(bench, "matmul_flops", lambda device, dtype: peak(device, dtype, 256, 2))


def check(run, canvas=0):
    """The numbers agree with one another, and the FLOPs with those that torch counts."""
    values = bench.bench(run, canvas, rounds=1)
    with FlopCounterMode(display=False) as counter:
        bench.bench(run, canvas, rounds=1)
    counted = counter.get_total_flops() / 2  # everything ran twice, once to warm up
    total = 0
    for name in ("step", "evaluation"):
        tflops = values[f"{name}_tflops"]
        assert values[f"{name}_share_of_peak"] == pytest.approx(tflops / values["peak_tflops"])
        total += tflops * values[f"{name}_ms"] * 1e9
    assert values["optimizer_ms"] > 0
    peak = 2 * 256**3  # two products, once
    assert total + peak == pytest.approx(counted, rel=1e-4), "SignSGD's products are not counted"


@pytest.mark.parametrize("preset", PLAIN)
def test_every_preset_runs_without_its_data(preset):
    check(bench.new_run(preset, ALONE, rows=2))


def test_canvases_are_weighted_by_their_share(tmp_path, capsys):
    with pytest.raises(UserError, match="data/arc1concept-aug-1000 not found; build it: "):
        bench.new_run("arc1-fast", ALONE)
    write_source_of_sizes(tmp_path, [5, 11, 16, 14, 21, 12, 11, 20])
    argv = ["--source", str(tmp_path), "--subsets", "evaluation", "--num-aug", "1"]
    arc.main([*argv, "--output-dir", "data/arc1concept-aug-1000"])
    run = bench.new_run("arc1-fast", ALONE, rows=2)
    assert list(run.canvas_sizes) == [11, 16, 21, 30]
    for canvas in run.canvas_sizes:
        check(run, canvas)
    capsys.readouterr()
    bench.main(["--preset", "arc1-fast", "--device", "cpu", "--no-compile", "--rows", "2", "--steps", "1"])
    printed = capsys.readouterr().out.replace(",", "").splitlines()
    assert printed[0] == "arc1-fast: 1 x 2 rows cpu float32" and max(map(len, printed)) <= 80
    shares = [float(line.split(": ")[1].split("%")[0]) for line in printed if line.startswith("canvas")]
    steps = [float(line.split()[1]) for line in printed if line.startswith("  step_ms")]
    mean = sum(share / 100 * step for share, step in zip(shares, steps))
    assert float(printed[-1].split(": ")[1]) == pytest.approx(mean, rel=1e-2)


def test_the_default_batch_fits():
    """The preset's own, or as many rows as a CPU steps through in seconds."""
    rows = {preset: bench.new_run(preset, ALONE).rows_per_rank for preset in ("mini", "sudoku", "arc1")}
    assert rows["mini"] == train.PRESETS["mini"]["global_batch_size"]
    assert rows["arc1"] == 4 and 4 < rows["sudoku"] < 100
