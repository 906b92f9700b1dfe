"""hub.py: checkpoint files of all makers, what lies beside them, and the published format both ways."""
import argparse
import json
import re
import sys
from dataclasses import asdict, replace

import pytest
import torch

import hub
from common import UserError
from data import Split, write_dataset
from model import build
from rundir import save_file
from runs import TINY, boards, model_of, save_run

CFG = replace(TINY, puzzle_emb_len=16, halt_max_steps=16)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_dataset(folder, {"train": boards(8), "test": boards(8, seed=1)}, 6, {"builder": "sudoku"})
    return Split(folder, "test")


# ---------------------------------------------------------------------------------------------
# Export, and what a file does not say

ATTENTION = replace(TINY, mixer="attn", pos_encodings="rope", puzzle_emb_len=3)
KINDS = [CFG, TINY, ATTENTION, replace(ATTENTION, pos_encodings="learned", num_layers=2, expansion=30.0),
         replace(ATTENTION, pos_encodings="none", q_continue=True, score_mod="sudoku", num_heads=4),
         replace(TINY, loss="softmax", num_puzzles=7, dtype="bfloat16"),
         replace(ATTENTION, vocab_size=0, input_dim=3, target_dim=2, halt_tolerance=0.5)]


def same(state, model):
    expected = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())


def load(path, seq_len=16, ema=True, **settings):
    return hub.read_model(hub.load_weights(path), settings, seq_len, ema)


@pytest.mark.parametrize("cfg", KINDS)
@pytest.mark.parametrize("seq_len", [16, None])
def test_exported_weights_load_back(tmp_path, split, capsys, cfg, seq_len):
    """By the configuration beside them: the same Config, weights and dataset, and nothing is assumed."""
    model = model_of(cfg)
    hub.main(["export", str(save_run(tmp_path / "run", split, model)), str(tmp_path / "out.pt")])
    printed = capsys.readouterr().out
    found, state = load(tmp_path / "out.pt", seq_len)
    assert found == cfg and same(state, model) and capsys.readouterr().err == ""
    content = hub.load_weights(tmp_path / "out.pt")
    assert (content["identity"], content["recipe"]) == (split.identity, split.recipe)
    assert content["data"] == content["data_test"] == [str(split.dirs[0])]

    (tmp_path / "out.config.json").unlink()     # alone, with what the message asks for
    named = {k.replace("-", "_"): int(v) for k, v in re.findall(r"--([\w-]+) (\d+)", printed)}
    if cfg.regression or cfg.score_mod != "none" or cfg.pos_encodings == "none" and cfg.mixer == "attn":
        return      # these it cannot be told by flags: keep them together, it says
    with pytest.raises(UserError, match="does not say --H-cycles and --L-cycles"):
        load(tmp_path / "out.pt", seq_len)
    found, state = load(tmp_path / "out.pt", 16, **named)
    for name in ("mixer", "pos_encodings", "puzzle_emb_len", "seq_len", "H_cycles", "L_cycles", "num_layers"):
        assert getattr(found, name) == getattr(cfg, name), name
    assert same(state, model) and same(build(found, state).state_dict(), model)
    assert capsys.readouterr().err == ""
    assert found.num_heads == cfg.num_heads or cfg.mixer == "mlp"


def write(folder, cfg, name="step_10", config=""):
    """A published file of seeded weights, and a configuration beside it."""
    torch.save(hub.to_published(cfg, model_of(cfg).state_dict()), folder / name)
    (folder / "all_config.yaml").write_text(config)
    return folder / name


def test_what_is_assumed_is_said_in_one_line(tmp_path, capsys):
    cycles = {"H_cycles": 1, "L_cycles": 1}

    def said(cfg, seq_len, **settings):
        found = load(write(tmp_path, cfg), seq_len, **cycles, **settings)[0]
        err = capsys.readouterr().err
        assert err.count("\n") == bool(err)
        return found, err
    wide = replace(ATTENTION, hidden_size=64, puzzle_emb_len=16, num_heads=8)
    assert said(wide, 16)[1] == "assumed, as neither the weights nor a configuration beside them say it: " \
                                "16 prefix positions (--puzzle-emb-len), 8 heads (--num-heads)\n"
    found, err = said(wide, 16, num_heads=4)
    assert found.num_heads == 4 and "16 prefix positions" in err and "heads" not in err
    assert said(wide, 16, puzzle_emb_len=16)[1].endswith("say it: 8 heads (--num-heads)\n")
    found, err = said(wide, 16, num_heads=4, puzzle_emb_len=2)
    assert (found.num_heads, found.puzzle_emb_len, err) == (4, 2, "")
    found, err = said(CFG, 16)
    assert (found.puzzle_emb_len, found.seq_len, err) == (16, 16, ""), "L and the dataset tell P"
    found, err = said(TINY, 16)
    assert (found.puzzle_emb_len, found.seq_len) == (1, 16) and "1 prefix positions (by the dataset)" in err
    found, err = said(replace(ATTENTION, pos_encodings="learned"), 16, num_heads=2)
    assert (found.puzzle_emb_len, found.seq_len) == (3, 16) and "3 prefix positions (by the dataset)" in err
    found, err = said(CFG, None)
    assert (found.puzzle_emb_len, found.seq_len) == (16, 16)
    assert "16 prefix positions (--puzzle-emb-len)" in err


@pytest.mark.parametrize("cfg, seq_len, settings, message", [
    (TINY, 16, {"puzzle_emb_len": 2}, "2 prefix positions and 16 cells do not fit the weights, .* have 17"),
    (TINY, 17, {}, "1 prefix positions and 17 cells do not fit"),
    (TINY, 36, {}, "-19 prefix positions and 36 cells do not fit .* their own dataset with --data"),
    (replace(ATTENTION, puzzle_emb_ndim=96), 16, {"puzzle_emb_len": 2}, "2 prefix .* 3 or more of"),
    (ATTENTION, 16, {"num_heads": 5}, "32 .* 5 heads"),
    (TINY, 16, {"hidden_size": 64}, "hidden_size 32, not 64"),
    (TINY, 16, {"mixer": "attn"}, "mixer mlp, not attn"),
    (ATTENTION, 16, {"pos_encodings": "learned"}, "lacks embed_pos.embedding_weight"),
    (replace(ATTENTION, pos_encodings="learned"), 16, {"pos_encodings": "rope"}, "unknown embed_pos")])
def test_settings_that_do_not_fit_the_weights_are_refused(tmp_path, cfg, seq_len, settings, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, cfg), seq_len, H_cycles=1, L_cycles=1, **settings)


HYDRA = """
arch:
  name: trm@TRM
  H_cycles: 3
  L_cycles: 4
  num_heads: 4
  pos_encodings: rope
lr: 1e-4
"""
FLAT = json.dumps({"H_cycles": 3, "L_cycles": 4, "num_heads": 4})


@pytest.mark.parametrize("name", [
    "all_config.yaml", "config.yaml", "config.yml", "config.json", ".hydra/config.yaml", "step_10.yaml",
    "step_10.yml", "step_10.json", "step_10.config.json"])
def test_configuration_beside_a_file(tmp_path, name, capsys):
    path = write(tmp_path, ATTENTION)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / name).write_text(FLAT if name.endswith("json") else HYDRA)
    found = load(path, puzzle_emb_len=3)[0]
    assert (found.H_cycles, found.L_cycles, found.num_heads) == (3, 4, 4) and not capsys.readouterr().err
    assert load(path, puzzle_emb_len=3, H_cycles=2)[0].H_cycles == 2, "flags win over cycles"
    with pytest.raises(UserError, match="num_heads 4, not 2: leave that out"):
        load(path, puzzle_emb_len=3, num_heads=2)
    torch.save(torch.load(path), tmp_path / "step_20")
    if "step_10" in name:
        with pytest.raises(UserError, match="does not say --H-cycles"):
            load(tmp_path / "step_20")
    else:
        (tmp_path / "step_20.config.json").write_text(json.dumps({"H_cycles": 1}))
        assert load(tmp_path / "step_20")[0].H_cycles == 1, "its own configuration counts more"


@pytest.mark.parametrize("text, found", [
    (HYDRA, {"H_cycles": 3, "L_cycles": 4, "num_heads": 4, "pos_encodings": "rope"}),
    (json.dumps({"arch": {"H_cycles": 3, "x": [1, 2]}, "num_heads": "8"}), {"H_cycles": 3, "num_heads": 8}),
    ("arch: {mlp_t: true, L_layers: 2, puzzle_emb_ndim: '${.hidden_size}', no_ACT_continue: false,\n"
     "  loss: {name: losses@ACTLossHead, loss_type: softmax_cross_entropy}, forward_dtype: float32}",
     {"mixer": "mlp", "num_layers": 2, "q_continue": True, "loss": "softmax", "dtype": "float32"}),
    ("# num_heads: 3\nmodel:\n  net:\n    num_heads: 2 # of 4\n", {"num_heads": 2}), ("", {})])
def test_what_a_configuration_says(tmp_path, text, found):
    (tmp_path / "all_config.yaml").write_text(text)
    assert hub.settings_of(hub.beside(tmp_path / "step_1")) == found


@pytest.mark.parametrize("text, message", [
    ("arch: [", "all_config.yaml is no configuration"), ("- 1\n- 2\n", "all_config.yaml is no configuration"),
    ("!!python/object:omegaconf.Dict {}", "all_config.yaml is no configuration"),
    ("H_cycles: three", "says H_cycles 'three', no int"), ("pos_encodings: 2d", "2d; known are rope"),
    ("hidden_size: 64", "hidden_size 32, not 64"), ("mlp_t: false", "mixer mlp, not attn"),
    ("L_layers: 4", "num_layers 1, not 4"), ("puzzle_emb_len: 5", "5 prefix positions and 16 cells do"),
    ("seq_len: 81", "positions and 81 cells do not fit"), ("vocab_size: 12", "vocab_size 6, not 12")])
def test_configuration_that_contradicts_the_weights_is_refused(tmp_path, text, message):
    path = write(tmp_path, TINY, config=text)
    with pytest.raises(UserError, match=message):
        load(path, **{k: v for k, v in {"H_cycles": 1, "L_cycles": 1}.items() if k not in text})


def test_zero_prefix_positions_mean_as_many_as_the_table_fills(tmp_path):
    cfg = replace(ATTENTION, puzzle_emb_ndim=48, puzzle_emb_len=2)
    path = write(tmp_path, cfg, config=HYDRA + "puzzle_emb_len: 0\n")
    assert load(path)[0].puzzle_emb_len == 2


# ---------------------------------------------------------------------------------------------
# Files of other makers

CYCLES = {"H_cycles": 1, "L_cycles": 1}


def prefixed(prefix, state):
    return {prefix + key.removeprefix("_orig_mod.model.inner."): value for key, value in state.items()}


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: prefixed("", s), lambda s: prefixed("module._orig_mod.model.inner.", s),
    lambda s: prefixed("_orig_mod.module.model.", s), lambda s: {"state_dict": prefixed("module.", s)},
    lambda s: {"model_state_dict": s, "step": 5, "optimizer_state_dict": {"state": {}, "param_groups": []}},
    lambda s: {"model": {"state_dict": s}, "config": {"num_heads": 2}},
    lambda s: {"module": s, "settings": {"lr": 1}}, lambda s: {k: v.bfloat16() for k, v in s.items()},
    lambda s: {k: v.double() for k, v in s.items()}, lambda s: {"ema_state_dict": s},
    lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": {"shadow": prefixed("module.", s)}}])
def test_wrapped_weights_are_unwrapped(tmp_path, wrap):
    """Also those of half precision, whose rounding is all that may differ."""
    model = model_of()
    torch.save(wrap(hub.to_published(TINY, model.state_dict())), tmp_path / "a.pt")
    cfg, state = load(tmp_path / "a.pt", **CYCLES)
    assert all(v.dtype == torch.float32 for v in state.values())
    for key, value in build(cfg, state).state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=2 ** -8, atol=1e-6)


def test_half_precision_and_averages(tmp_path):
    model = model_of()
    state = hub.to_published(TINY, model.state_dict())
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pt")
    found = load(tmp_path / "half.pt", **CYCLES)[1]
    assert all(torch.equal(found[k], v.half().float()) for k, v in model.state_dict().items())
    averages = {"_orig_mod.model.inner.lm_head.weight": torch.ones(6, 32)}      # of what is trained only
    torch.save({"model": state, "ema": averages}, tmp_path / "ema.pt")
    found = load(tmp_path / "ema.pt", **CYCLES)[1]
    assert (found["lm_head"] == 1).all() and torch.equal(found["q_head"], model.q_head)
    assert same(load(tmp_path / "ema.pt", ema=False, **CYCLES)[1], model)


def safetensors(tensors):
    """The bytes of a safetensors file, by its specification."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        ends = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": ends}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_safetensors(tmp_path, monkeypatch):
    """Whatever its ending; the package is optional."""
    model = model_of()
    path = tmp_path / "model.bin"
    path.write_bytes(safetensors(hub.to_published(TINY, model.state_dict())))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(UserError, match="model.bin is a safetensors file; pip install safetensors"):
            hub.load_weights(path)
    pytest.importorskip("safetensors")
    assert same(load(path, **CYCLES)[1], model)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="model.bin cannot be read as a checkpoint"):
        hub.load_weights(path)


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b" \n", "is empty"),
    (b"version https:" b"//git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a git-lfs pointer"),
    (b"<!doctype html><html>Not found</html>", "web page"), (b"\n <HTML lang=\"de\">\xc3\xa4", "web page"),
    (b"<?xml version='1.0'?><Error/>", "web page"), (b"Entry not found", "is a text"),
    (b'{"H_cycles": 3}', "is a text"), (b"\x1f\x8b\x08\x00abc", "compressed"), (bytes(50), "cannot be read"),
    (b"PK\x03\x04" + b"\x00" * 90, "cannot be read"), ([torch.zeros(2)], "holds a list, not names"),
    (torch.zeros(3), "holds a Tensor, not names"), (3, "holds a int, not names"),
    ({}, "no embed_tokens.embedding_weight, but no tensors"), ({"epoch": 3}, "but no tensors"),
    ({"fc.weight": torch.zeros(2, 2)}, "no embed_tokens.embedding_weight, but fc.weight"),
    ({"model": {"fc.weight": torch.zeros(2, 2)}, "config": {}, "settings": {}}, "is damaged|but fc.weight"),
    ({"args": argparse.Namespace(lr=1)}, "a Python object .argparse.Namespace.* save the weights alone")])
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "file.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=message) as raised:
        load(path, **CYCLES)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="nowhere.pt not found"):
        hub.load_weights(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    model = model_of()
    model.blocks[0].mlp_in.data[3, 4] = value
    published = {"state_dict": hub.to_published(TINY, model.state_dict())}
    with pytest.raises(UserError, match="L_level.layers.0.mlp.gate_up_proj.weight holds NaN or infinity"):
        hub.read_model(published, CYCLES, 16, True)
    ours = {"config": asdict(TINY), "model": model.state_dict(), "ema": None}
    with pytest.raises(UserError, match="blocks.0.mlp_in holds NaN or infinity"):
        hub.read_model(ours, {}, 16, True)
    averages = {"blocks.0.mlp_in": torch.zeros_like(model.blocks[0].mlp_in)}
    assert not hub.read_model({**ours, "ema": averages}, {}, 16, True)[1]["blocks.0.mlp_in"].any()


# ---------------------------------------------------------------------------------------------
# Checkpoints of train.py

def test_our_checkpoints_hold_their_own_config(tmp_path, split):
    """Whatever lies beside them; cycles and precision may be others, what weights were trained as may not."""
    model = model_of(ATTENTION)
    folder = save_run(tmp_path, split, model)
    (folder / "config.json").write_text(json.dumps({"num_heads": 4, "H_cycles": 9}))
    path = folder / "step_00000010.ckpt"
    found, state = load(path)
    assert found == ATTENTION and same(state, model)
    changed = dict(H_cycles=5, dtype="bfloat16", num_heads=2)
    assert load(path, **changed)[0] == replace(ATTENTION, **changed)
    for name, value in (("num_heads", 4), ("puzzle_emb_len", 4), ("pos_encodings", "none"), ("mixer", "mlp")):
        with pytest.raises(UserError, match=f"{name} .*, not {value}: leave that out"):
            load(path, **{name: value})


def test_config_of_other_code(tmp_path):
    """One field less has its default; one more is refused in one line."""
    model, old = model_of(), asdict(TINY)
    del old["halt_tolerance"], old["score_mod"]
    content = {"config": old, "model": model.state_dict(), "ema": None, "settings": {}}
    save_file(tmp_path / "old.ckpt", content)
    assert load(tmp_path / "old.ckpt")[0] == TINY
    save_file(tmp_path / "new.ckpt", content | {"config": {**old, "experts": 4}})
    with pytest.raises(UserError, match="experts"):
        load(tmp_path / "new.ckpt")


def test_export_of_another_makers_file(tmp_path, capsys):
    """Wrapped weights in, plain published ones out."""
    model = model_of(ATTENTION)
    wrapped = {"state_dict": prefixed("module.", hub.to_published(ATTENTION, model.state_dict()))}
    torch.save(wrapped, tmp_path / "a.pt")
    argv = ["export", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    with pytest.raises(UserError, match="does not say --H-cycles and --L-cycles"):
        hub.main(argv)
    hub.main([*argv, "--H-cycles", "1", "--L-cycles", "1", "--num-heads", "2", "--puzzle-emb-len", "3"])
    assert same(load(tmp_path / "b.pt")[1], model) and load(tmp_path / "b.pt")[0].num_heads == 2
    assert next(iter(torch.load(tmp_path / "b.pt"))).startswith("_orig_mod.model.inner.")


def test_wrong_command_lines():
    for argv, message in (("import a b", "invalid choice"), ("export nowhere b", "nowhere not found"),
                          ("export a", "FILE"), ("push a b --H-cycles 0", "out of range")):
        with pytest.raises(UserError, match=message):
            hub.main(argv.split())
