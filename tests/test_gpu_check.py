"""gpu_check.py on a CPU: every part at a tiny size, rows that fail, the table and the JSON file."""
import json
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import gpu_check
import train
from gpu_check import GOLDEN, ROWS, attention, check, parity, plan, preset, same_losses, tried
from prepare import KNOWN
from runs import ROOT
from test_setup import Copy

CPU = torch.device("cpu")
SMALL = dict(hidden_size=32, puzzle_emb_ndim=32, num_heads=2, num_layers=1, H_cycles=1, L_cycles=1,
             halt_max_steps=2, dtype="float32")
COLUMNS = ["step 1", "step 2", "step 16", "q_halt", "loss", "gradient"]
TRAIN = f"""import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import common, train
train.draw.plot = train.draw.draw_steps = lambda *args: None    # pictures take seconds
common.cli(train.main)"""


@pytest.mark.parametrize("name, dtype, compiled", [
    *((name, dtype, False) for name in GOLDEN for dtype in ("float32", "bfloat16")),
    ("mlp", "float32", True), ("attention", "bfloat16", True)])
def test_parity(name, dtype, compiled, monkeypatch):
    monkeypatch.setattr(gpu_check, "compile_model", partial(gpu_check.compile_model, backend="eager"))
    row = parity(CPU, name, dtype, compiled)
    assert list(row) == COLUMNS and (dtype == "float32" or row["step 16"] > 1e-3), row


@pytest.mark.parametrize("dtype, factor", [("bfloat16", 0), ("float32", float("nan"))])
def test_parity_sees_a_block_without_its_mixer(monkeypatch, dtype, factor):
    found = gpu_check.golden("attention")
    found[2]["L_level.layers.0.self_attn.o_proj.weight"].mul_(factor)
    monkeypatch.setattr(gpu_check, "golden", lambda name: found)
    assert "gradient over" in parity(CPU, "attention", dtype, False)["failed"]


@pytest.mark.parametrize("backward", [False, True])
def test_attention(monkeypatch, backward):
    tiny = partial(attention, CPU, 2, 20, backward, compiled=False, calls=2, heads=2, head_dim=16)
    row, flop = tiny(), 4 * 2 * 2 * 20 * 20 * 16 * (3.5 if backward else 1)
    assert row["flex_tflops"] == pytest.approx(flop / row["flex_ms"] / 1e9) and "failed" not in row
    assert re.fullmatch(r"(flex|sdpa) \d+\.\d\dx", row["faster"])
    right = gpu_check.attend
    monkeypatch.setattr(gpu_check, "attend", lambda *qkv, flex: right(*qkv) + 0.1 * flex)
    assert tiny()["failed"] == "differ over 0.02"


@pytest.mark.parametrize("name", ROWS)
def test_preset(monkeypatch, name):
    monkeypatch.setitem(train.PRESETS, name, {**train.PRESETS[name], **SMALL})
    monkeypatch.setitem(KNOWN[re.sub("-(att|fast)$", "", name)].shape, "num_puzzle_identifiers", 5)
    monkeypatch.setattr(common, "matmul_peak", lambda *args: 1e12)
    monkeypatch.setattr(common, "device_name", lambda device: "NVIDIA H100 PCIe")
    before, seen, config_of = dict(train.PRESETS), [], train.config_of
    monkeypatch.setattr(train, "config_of", lambda *args: seen.append(config_of(*args)) or seen[-1])
    row = preset(CPU, name, 2, "sdpa", compiled=False, rounds=1)
    assert [cfg.attention for cfg in seen] == ["sdpa", "sdpa"] and train.PRESETS == before and name in ROWS
    assert row["rows"] == 2 and row["of_product"] == pytest.approx(row["tflops"]) and row["formula_gib"] > 0.5
    assert row["of_card"] == pytest.approx(row["tflops"] / 756)


def test_rows_are_halved_until_they_fit_and_cards_are_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 2 ** 30, 0))
    found = dict(ms=1, tflops=1, share_of_peak=1, peak_memory_gib=1)
    monkeypatch.setattr(gpu_check, "bench", lambda *args, **how: found)
    for (name, fit), (card, peak) in {("mini", 64): ("A100-SXM4-80GB", 312), ("arc1", 48): ("H200", 989),
                                      ("sudoku", 384): ("A100 80GB PCIe", 312), ("maze", 96): ("GH200", None),
                                      ("arc2", 48): ("H100 80GB HBM3 MIG 3g.40gb", None)}.items():
        found["device"] = f"NVIDIA {card}"
        row = preset(SimpleNamespace(type="cuda"), name, ROWS[name])
        assert row["rows"] == fit and row["formula_gib"] < 24 and row["of_card"] == (peak and 1 / peak), row


def test_losses_of_one_rank_and_of_two(boards, monkeypatch, tmp_path):
    (script := tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    more = ["--data", boards, "--no-compile", "--skip-sanity-checks", "--global-batch-size", "8"]
    row = same_losses("cpu", "cpu", 3, ranks=2, more=more)
    assert row["steps"] == 3 and row["first"] != row["last"] and "failed" not in row, row
    script.write_text("import sys; sys.exit('error: wrong')")
    assert tried(partial(same_losses, "cpu", "cpu", 3))["failed"] == "UserError: error: wrong"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert same_losses("cuda", "cuda", 3, ranks=2) == {"note": "one GPU: not tried"}
    monkeypatch.setattr(gpu_check, "losses", lambda device, folder, *how: np.array([1, ord(folder.name)]))
    assert same_losses("cpu", "cpu", 2)["failed"] == "differ over 1e-04"


def test_a_row_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    """The others are tried. The table has 80 columns with the widest figures. What is late is not tried."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_check.gc, "collect", int)       # it takes a third of a second
    speeds = ("rows", "ms", "tflops", "of_product", "of_card", "peak_gib", "formula_gib")
    both = dict(flex_ms=99.9, flex_tflops=99.9, sdpa_ms=99.9, sdpa_tflops=9, faster="flex 2.00x", differ=1e-7)
    wide = {"device": gpu_check.about(CPU), "losses": {"differ": 1e-7}, "attention": both,
            "presets": dict.fromkeys(speeds, 0.0123), "parity": dict.fromkeys(COLUMNS, 1e-7)}
    tasks = [(part, what, partial(wide.get, part.split()[0])) for part, what, _ in plan(CPU)]
    tasks[3:3], output = [("parity", "broken", lambda: 1 / 0)], "gpu-check.json"
    assert check(tasks, output) == 1
    lines, found = capsys.readouterr().out.splitlines(), json.load(open(output))["rows"]
    assert max(map(len, lines)) <= 80 and "    FAILED: ZeroDivisionError: division by zero" in lines, lines
    assert [row["what"] for row in found] == [what for _, what, _ in tasks]
    assert [row["what"] for row in found if "failed" in row] == ["broken"] and found[0]["detail"]["torch"]
    assert check(tasks[-1:], output, minutes=0) == 0 and check(tasks[:1], output, minutes=0) == 1


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        common.cli(lambda: gpu_check.main(["--minutes", "5"]))
    assert capsys.readouterr().err == "error: gpu-check needs a CUDA GPU; this machine has none\n"
    copy = Copy(tmp_path)
    assert copy("./speedrun.sh", "gpu-check", "-x")[0] == 0 and copy.calls == ["gpu_check.py -x"]
