"""bench.py: every preset without its data, what the figures mean, ARC voting."""
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import prepare
import train
from common import UserError
from prepare import arc
from runs import ALONE, arc_dir, write_source_of_sizes

SMALL = {"hidden_size": 32, "puzzle_emb_ndim": 32, "num_heads": 2, "H_cycles": 1, "L_cycles": 1,
         "halt_max_steps": 2, "dtype": "float32"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Where no data are; all presets and tables are small, and the peak is quick to measure."""
    monkeypatch.chdir(tmp_path)
    for name, preset in train.PRESETS.items():
        monkeypatch.setitem(train.PRESETS, name, {**preset, **SMALL})
        monkeypatch.setitem(prepare.known(preset["data"][0]).shape, "num_puzzle_identifiers", 5)
    peak = bench.common.matmul_peak
    monkeypatch.setattr(bench.common, "matmul_peak", lambda device, dtype: peak(device, dtype, 256, 2))


def lines():
    with open("bench.jsonl") as f:
        return [json.loads(line) for line in f]


def agrees(row, preset, rows):
    """The figures agree with one another, and the FLOPs with those that torch counts."""
    run, batches = bench.open_run(preset, ALONE, rows)
    calls = {"": lambda: train.backward(run, batches),
             "evaluation_": bench.calls_of(run, batches)["evaluation"]}
    assert (row["preset"], row["rows"], row["dtype"], row["compiled"]) == (preset, rows, "float32", False)
    for prefix, call in calls.items():
        ms, tflops = row[prefix + "ms"], row[prefix + "tflops"]
        assert ms > 0 and row[prefix + "rows_per_s"] == pytest.approx(1000 * rows / ms)
        assert row[prefix + "share_of_peak"] == pytest.approx(tflops / row["peak_tflops"])
        with FlopCounterMode(display=False) as counter:
            call()
        assert tflops * ms * 1e9 == pytest.approx(counter.get_total_flops(), rel=1e-9), prefix
    parts = row["forward_ms"] + row["backward_ms"] + row["optimizer_ms"]
    assert parts == pytest.approx(row["ms"]) and row["first_step_s"] > 0


@pytest.mark.parametrize("preset", [name for name in train.PRESETS if "canvases" not in train.PRESETS[name]])
def test_every_preset_runs_without_its_data(preset):
    agrees(bench.bench(preset, ALONE, rows=2, compiled=False, rounds=1), preset, 2)


def test_canvases_need_the_data_which_say_how_many_rows_each_has(tmp_path):
    with pytest.raises(UserError, match="data/arc1concept-aug-1000 not found; build it: "):
        bench.bench("arc1-fast", ALONE)
    write_source_of_sizes(tmp_path, [5, 11, 16, 14, 21, 12, 11, 20])
    arc.main(["--source", str(tmp_path), "--subsets", "evaluation", "--num-aug", "1",
              "--output-dir", "data/arc1concept-aug-1000"])
    row = bench.bench("arc1-fast", ALONE, rows=40, compiled=False, rounds=1)
    agrees(row, "arc1-fast", 40)


def test_the_default_batch_fits():
    """The preset's own, or as many rows as a CPU steps through in seconds."""
    rows = {preset: bench.open_run(preset, ALONE)[0].rows for preset in ("mini", "sudoku", "arc1")}
    assert rows["mini"] == train.PRESETS["mini"]["global_batch_size"]
    assert rows["arc1"] == 4 and 4 < rows["sudoku"] < 100


def test_the_table_is_printed_and_appended(capsys):
    flags = ["--device", "cpu", "--no-compile", "--rows", "2"]
    assert not bench.main([*flags, "--steps", "1"]) and not bench.main([*flags, "--dtype", "bfloat16"])
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80 and printed[0].split() == ["preset", "mini"]
    assert [line.split()[0] for line in printed[:len(printed) // 2]] == list(lines()[0])[:-2]
    assert [row["dtype"] for row in lines()] == ["float32", "bfloat16"]
    assert all(row["torch"] == torch.__version__ for row in lines())


def test_medians_are_of_calls_in_turn(monkeypatch):
    order, clock = [], iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(bench.common, "matmul_peak", lambda *args: order.append("peak") or next(clock))
    monkeypatch.setattr(bench.common, "seconds_of", lambda call, n, device: [call()])
    seconds = {"a": iter([0.5, 0.1, 0.2]), "b": iter([1, 2, 9])}

    def call(name):
        return lambda: order.append(name) or next(seconds[name])
    ms, peak = bench.median_ms({name: call(name) for name in seconds}, 3, ALONE.device, torch.float32)
    assert (ms, peak) == ({"a": 200.0, "b": 2000.0}, 2.0) and order == ["peak", "a", "b"] * 3


def test_arc_voting(tmp_path, capsys):
    built = arc_dir(tmp_path)
    assert not bench.main(["--votes", str(built)])
    (row,), n = lines(), len(data.Split(built, "test"))
    assert row["rows"] == n and row["rows_per_s"] == pytest.approx(n / row["seconds"])
    assert row["pass@2"] >= 0.5, "two cells are spoiled, and only in half of the copies"
    assert "rows_per_s" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--steps", "0"], "--steps: 0 is out of range; give 1 or more"),
    (["--rows", "0"], "--rows: 0 is out of range"), (["--preset", "nope"], "invalid choice: 'nope'"),
    (["--votes", "nowhere"], "--votes nowhere: there is no test_puzzles.json; name the folder of an ARC"),
    (["--votes", "x", "--steps", "2"], "--steps does nothing with --votes"),
    (["--votes", "x", "--preset", "arc1"], "--preset does nothing with --votes"),
    (["--votes", "x", "--no-compile"], "--compile does nothing with --votes"),
    (["--preset", "own"], "--preset own: the shape of its data is not known")])
def test_bad_flags_are_one_line(flags, message, monkeypatch):
    monkeypatch.setitem(train.PRESETS, "own", {**train.PRESETS["mini"], "data": ["data/own"]})
    with pytest.raises(UserError) as error:
        bench.main(flags)
    assert message in str(error.value) and "\n" not in str(error.value)
