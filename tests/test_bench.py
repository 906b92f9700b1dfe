"""bench.py: every preset without its data, what the figures mean, ARC voting."""
import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import prepare
import train
from common import UserError
from runs import ALONE, arc_dir, write_boards

SMALL = {"hidden_size": 32, "puzzle_emb_ndim": 32, "num_heads": 2, "H_cycles": 1, "L_cycles": 1,
         "halt_max_steps": 2, "dtype": "float32"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Where no data are; all presets are small, and the peak is quick to measure."""
    monkeypatch.chdir(tmp_path)
    for name, preset in train.PRESETS.items():
        monkeypatch.setitem(train.PRESETS, name, {**preset, **SMALL})
    peak = bench.common.matmul_peak
    monkeypatch.setattr(bench.common, "matmul_peak", lambda device, dtype: peak(device, dtype, 256, 2))


def lines():
    with open("bench.jsonl") as f:
        return [json.loads(line) for line in f]


def args_of(*flags):
    return bench.flags().parse_args(["--device", "cpu", "--no-compile", "--steps", "1", *flags])


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_runs_without_its_data(preset, monkeypatch):
    shape = prepare.known(train.PRESETS[preset]["data"][0]).shape
    monkeypatch.setitem(shape, "num_puzzle_identifiers", 5)     # ARC's tables take gigabytes
    training, evaluation = bench.bench(args_of("--preset", preset, "--rows", "2"), ALONE)
    assert training["preset"] == evaluation["preset"] == preset and training["rows of a rank"] == 2
    assert training["data_ms"] is None and evaluation["data_ms"] is None
    for column in (training, evaluation):
        assert column["ms"] > 0 and column["rows_per_s"] == pytest.approx(2000 / column["ms"])
        share = column["gflop"] / column["ms"] / column["peak_tflops"]
        assert column["share_of_peak"] == pytest.approx(share) and column["peak_memory_gib"] > 0.01
    parts = training["forward_ms"] + training["backward_ms"] + training["optimizer_ms"]
    assert parts == pytest.approx(training["ms"]) and training["first_step_s"] > 0


@pytest.mark.parametrize("preset", ["mini", "sudoku-att"])
def test_the_flops_are_those_that_torch_counts(preset):
    args = args_of("--preset", preset, "--rows", "3")
    run, splits = bench.open_run(args, ALONE)
    calls = bench.calls_of(run, bench.some_batch(run, splits))
    columns = dict(zip(("step", "evaluation"), bench.bench(args, ALONE)))
    for name, column in columns.items():
        with FlopCounterMode(display=False) as counter:
            calls[name]()
        assert column["gflop"] == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-9), name


def test_with_the_data_there_its_time_is_measured_too(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "mini", {**train.PRESETS["mini"], "data": [write_boards("boards")]})
    training, evaluation = bench.bench(args_of("--rows", "4"), ALONE)
    assert training["data_ms"] > 0 and evaluation["data_ms"] > 0
    run, splits = bench.open_run(args_of("--rows", "4"), ALONE)
    batch = bench.some_batch(run, splits)
    assert np.array_equal(batch.inputs, splits[1].gather(np.arange(4))[0]), "puzzles where there are some"


def test_the_default_batch_fits(monkeypatch):
    """The preset's own, or as many rows as a CPU steps through in seconds."""
    shape = prepare.KNOWN["arc1"].shape
    monkeypatch.setitem(shape, "num_puzzle_identifiers", 5)
    rows = {preset: bench.open_run(args_of("--preset", preset), ALONE)[0].rows
            for preset in ("mini", "sudoku", "arc1")}
    assert rows["mini"] == train.PRESETS["mini"]["global_batch_size"]
    assert rows["arc1"] == 4 and 4 < rows["sudoku"] < 100


def test_the_table_is_printed_and_appended(capsys):
    flags = ["--device", "cpu", "--no-compile", "--rows", "2"]
    assert not bench.main([*flags, "--steps", "1"]) and not bench.main([*flags, "--steps", "2"])
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80
    assert printed[0].split() == ["what", "training", "step", "evaluation,", "2", "steps"]
    names = {line[:22].strip() for line in printed}
    assert {"ms", "share_of_peak", "forward_ms", "of it communication_ms", "data_ms", "first_step_s"} <= names
    assert [(row["what"], row["n"]) for row in lines()] == [
        ("training step", 1), ("evaluation, 2 steps", 1), ("training step", 2), ("evaluation, 2 steps", 2)]
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
    assert row["what"] == "ARC voting" and row["rows"] == n
    assert row["rows_per_s"] == pytest.approx(n / row["seconds"])
    assert row["pass@2"] >= 0.5, "two cells are spoiled, and only in half of the copies"
    assert "rows_per_s" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--steps", "0"], "--steps: 0 is out of range; give 1 or more"),
    (["--rows", "0"], "--rows: 0 is out of range"), (["--preset", "nope"], "invalid choice: 'nope'"),
    (["--votes", "nowhere"], "--votes nowhere: there is no test_puzzles.json; name the folder of an ARC"),
    (["--votes", "x/arc1concept-aug-1000"], "x/arc1concept-aug-1000 not found; build it: python "),
    (["--votes", "x", "--steps", "2"], "--steps does nothing with --votes"),
    (["--votes", "x", "--preset", "arc1"], "--preset does nothing with --votes"),
    (["--votes", "x", "--no-compile"], "--compile does nothing with --votes")])
def test_bad_flags_are_one_line(flags, message):
    with pytest.raises(UserError) as error:
        bench.main(flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_preset_without_a_known_dataset_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "own", {**train.PRESETS["mini"], "data": ["data/own"]})
    with pytest.raises(UserError, match="data/own not found; "):
        bench.main(["--preset", "own", "--device", "cpu"])
