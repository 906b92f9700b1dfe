"""hub.py: checkpoint files of all makers, what lies beside them, and the published format both ways."""
import argparse
import json
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

CYCLES = {"H_cycles": 1, "L_cycles": 1}
CFG = replace(TINY, puzzle_emb_len=16, halt_max_steps=16)
ATTENTION = replace(TINY, mixer="attn", pos_encodings="rope", puzzle_emb_len=3)
LEARNED = replace(ATTENTION, pos_encodings="learned")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_dataset(folder, {"train": boards(8), "test": boards(8, seed=1)}, 6, {"builder": "sudoku"})
    return Split(folder, "test")


def same(state, model):
    expected = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())


def load(path, seq_len=16, ema=True, **settings):
    return hub.read_model(hub.load_weights(path), settings, seq_len, ema)


def write(folder, cfg, config=""):
    """A published file of seeded weights, and a configuration beside it."""
    torch.save(hub.to_published(cfg, model_of(cfg).state_dict()), folder / "step_10")
    (folder / "all_config.yaml").write_text(config)
    return folder / "step_10"


# ---------------------------------------------------------------------------------------------
# Export, and what a file does not say

@pytest.mark.parametrize("cfg", [
    CFG, TINY, ATTENTION, replace(LEARNED, num_layers=2, expansion=30.0, width_multiple=24),
    replace(ATTENTION, pos_encodings="none", q_continue=True, score_mod="sudoku", num_heads=4),
    replace(TINY, loss="softmax", num_puzzles=7, dtype="bfloat16"),
    replace(ATTENTION, vocab_size=0, input_dim=3, target_dim=2, halt_tolerance=0.5)])
def test_exported_weights_load_back(tmp_path, split, capsys, cfg):
    """By the configuration beside them: the same Config, weights and dataset, and nothing is assumed."""
    model, out = model_of(cfg), tmp_path / "out.pt"
    hub.main(["export", str(save_run(tmp_path / "run", split, model)), str(out)])
    assert "out.config.json; keep them together" in capsys.readouterr().out
    for seq_len in (16, None):
        found, state = load(out, seq_len)
        assert found == cfg and same(state, model) and capsys.readouterr().err == ""
    content = hub.load_weights(out)
    assert (content["identity"], content["recipe"]) == (split.identity, split.recipe)
    assert content["data"] == content["data_test"] == [str(split.dirs[0])]


def test_narrow_weights_say_who_can_load_them(tmp_path, split, capsys):
    """Exported with their configuration only this code loads them, and without it nobody."""
    cfg, out = replace(TINY, expansion=2.0, width_multiple=64), tmp_path / "out.pt"
    hub.main(["export", str(save_run(tmp_path / "run", split, model_of(cfg))), str(out)])
    assert "only this code loads them" in capsys.readouterr().out
    (tmp_path / "out.config.json").unlink()
    with pytest.raises(UserError, match="do not fit: .*mlp_in.* follow from expansion and width_multiple"):
        build(*load(out, puzzle_emb_len=TINY.puzzle_emb_len, num_heads=TINY.num_heads, **CYCLES))


@pytest.mark.parametrize("cfg", [CFG, ATTENTION, replace(LEARNED, num_layers=2)])
def test_exported_weights_without_their_configuration(tmp_path, capsys, cfg):
    """The same model by what messages ask for."""
    model, path = model_of(cfg), write(tmp_path, cfg)
    with pytest.raises(UserError, match="does not say --H-cycles and --L-cycles"):
        load(path)
    capsys.readouterr()
    found, state = load(path, puzzle_emb_len=cfg.puzzle_emb_len, num_heads=2, **CYCLES)
    for name in ("mixer", "pos_encodings", "puzzle_emb_len", "seq_len", "num_layers", "num_heads"):
        assert getattr(found, name) == getattr(cfg, name), name
    assert same(state, model) and same(build(found, state).state_dict(), model)
    assert capsys.readouterr().err == ""


WIDE = replace(ATTENTION, hidden_size=64, num_heads=8, puzzle_emb_len=16)
P16, H8 = "16 prefix positions (--puzzle-emb-len)", "8 heads (--num-heads)"


@pytest.mark.parametrize("cfg, seq_len, settings, sizes, assumed", [
    (WIDE, 16, {}, (16, 16, 8), f"{P16}, {H8}"), (WIDE, 16, {"num_heads": 4}, (16, 16, 4), P16),
    (WIDE, 16, {"puzzle_emb_len": 16}, (16, 16, 8), H8),
    (WIDE, 16, {"num_heads": 4, "puzzle_emb_len": 2}, (2, 16, 4), ""),
    (CFG, 16, {}, (16, 16, 8), ""), (CFG, None, {}, (16, 16, 8), P16),      # L and the dataset tell P
    (TINY, 16, {}, (1, 16, 8), P16.replace("16", "1")),         # so they do, if it is the right dataset
    (LEARNED, 16, {"num_heads": 2}, (3, 16, 2), P16.replace("16", "3")),
    (replace(ATTENTION, puzzle_emb_ndim=48), 16, {"num_heads": 2, "puzzle_emb_len": 0}, (2, 16, 2), "")])
def test_what_is_assumed_is_said_in_one_line(tmp_path, capsys, cfg, seq_len, settings, sizes, assumed):
    found = load(write(tmp_path, cfg), seq_len, **CYCLES, **settings)[0]
    assert (found.puzzle_emb_len, found.seq_len, found.num_heads) == sizes
    line = f"assumed, as neither the weights nor a configuration beside them say it: {assumed}\n"
    assert capsys.readouterr().err == (line if assumed else "")


@pytest.mark.parametrize("cfg, seq_len, settings, message", [
    (TINY, 16, {"puzzle_emb_len": 2}, "2 prefix positions and 16 cells do not fit the weights, .* have 17"),
    (TINY, 17, {}, "1 prefix positions and 17 cells do not fit"),
    (TINY, 36, {}, "-19 prefix positions and 36 cells do not fit .* their own dataset with --data"),
    (replace(ATTENTION, puzzle_emb_ndim=96), 16, {"puzzle_emb_len": 2}, "2 prefix .* 3 or more of prefix"),
    (ATTENTION, 16, {"num_heads": 5}, "32 .* 5 heads"), (TINY, 16, {"mixer": "attn"}, "mixer mlp, not attn"),
    (TINY, 16, {"hidden_size": 64}, "hidden_size 32, not 64"),
    (ATTENTION, 16, {"pos_encodings": "learned"}, "has no embed_pos.embedding_weight"),
    (LEARNED, 16, {"pos_encodings": "rope"}, "unknown embed_pos")])
def test_settings_that_do_not_fit_the_weights_are_refused(tmp_path, cfg, seq_len, settings, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, cfg), seq_len, **CYCLES, **settings)


HYDRA = """
arch:
  name: trm@TRM
  H_cycles: 3
  L_cycles: 4
  num_heads: 4
  puzzle_emb_ndim: ${.hidden_size}
  loss: {loss_type: stablemax_cross_entropy}
lr: 1e-4
"""
FLAT = json.dumps({"H_cycles": 3, "L_cycles": 4, "num_heads": 4, "data_paths": ["a"], "dtype": None})


@pytest.mark.parametrize("name", [
    "all_config.yaml", "config.yaml", "config.yml", "config.json", ".hydra/config.yaml", "step_10.yaml",
    "step_10.yml", "step_10.json", "step_10.config.json"])
def test_configuration_beside_a_file(tmp_path, name, capsys):
    path, other = write(tmp_path, ATTENTION), tmp_path / "step_20"
    (tmp_path / ".hydra").mkdir()
    (tmp_path / name).write_text(FLAT if name.endswith("json") else HYDRA)
    found = load(path, puzzle_emb_len=3)[0]
    assert (found.H_cycles, found.L_cycles, found.num_heads) == (3, 4, 4) and not capsys.readouterr().err
    assert load(path, puzzle_emb_len=3, H_cycles=2)[0].H_cycles == 2, "flags win over cycles"
    with pytest.raises(UserError, match="num_heads 4, not 2: leave that out"):
        load(path, puzzle_emb_len=3, num_heads=2)
    torch.save(torch.load(path), other)
    if "step_10" in name:
        with pytest.raises(UserError, match="does not say --H-cycles"):
            load(other)
    else:
        other.with_suffix(".config.json").write_text(json.dumps({"H_cycles": 1}))
        assert load(other)[0].H_cycles == 1, "its own configuration counts more"


@pytest.mark.parametrize("text, message", [
    ("arch: [", "all_config.yaml is no configuration"), ("- 1\n- 2\n", "all_config.yaml is no configuration"),
    ("!!python/object:omegaconf.Dict {}", "all_config.yaml is no configuration"),
    ("H_cycles: three", "says H_cycles 'three'; correct it to a number"),
    ("pos_encodings: 2d", "'2d'; correct it to rope or"), ("hidden_size: 64", "hidden_size 32, not 64"),
    ("puzzle_emb_len: 5", "5 prefix positions and 16 cells do"),
    ("seq_len: 81", "positions and 81 cells do not fit"), ("vocab_size: 12", "vocab_size 6, not 12")])
def test_configuration_that_contradicts_the_weights_is_refused(tmp_path, text, message):
    path = write(tmp_path, TINY, text)
    with pytest.raises(UserError, match=message):
        load(path, **{k: v for k, v in CYCLES.items() if k not in text})


# ---------------------------------------------------------------------------------------------
# Files of other makers

def prefixed(prefix, state):
    return {prefix + key.removeprefix("_orig_mod.model.inner."): value for key, value in state.items()}


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: prefixed("", s), lambda s: prefixed("module._orig_mod.model.inner.", s),
    lambda s: prefixed("_orig_mod.module.model.", s), lambda s: {"state_dict": prefixed("module.", s)},
    lambda s: {"model_state_dict": s, "step": 5, "optimizer_state_dict": {"state": {}, "param_groups": []}},
    lambda s: {"model": {"state_dict": s}, "config": {"num_heads": 2}},
    lambda s: {"module": s, "settings": {"lr": 1}}, lambda s: {k: v.bfloat16() for k, v in s.items()},
    lambda s: {k: v.half() for k, v in s.items()}, lambda s: {k: v.double() for k, v in s.items()}])
def test_wrapped_weights_are_unwrapped(tmp_path, wrap):
    """Also those of half precision, whose rounding is all that may differ."""
    model, path = model_of(), tmp_path / "a.pt"
    wrapped = wrap(hub.to_published(TINY, model.state_dict()))
    torch.save(wrapped, path)
    dtype = next((v.dtype for v in wrapped.values() if isinstance(v, torch.Tensor)), torch.float32)
    state = load(path, **CYCLES)[1]
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value.to(dtype).float()), key


def safetensors(tensors):
    """The bytes of a safetensors file, by its specification."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        start, data = len(data), data + tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_safetensors(tmp_path, monkeypatch):
    """Whatever its ending; the package is optional."""
    model = model_of()
    path = tmp_path / "model.bin"
    path.write_bytes(safetensors(hub.to_published(TINY, model.state_dict())))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(UserError, match=r"model.bin is a safetensors file \(pip install safetensors\)"):
            hub.load_weights(path)
    pytest.importorskip("safetensors")
    assert same(load(path, **CYCLES)[1], model)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="model.bin is a safetensors file .* cannot be read"):
        hub.load_weights(path)


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b" \n", "is empty"),
    (b"version https:" b"//git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a git-lfs pointer"),
    (b"<!doctype html><html>Not found</html>", "web page"), (b"\n <HTML lang=\"de\">\xc3\xa4", "web page"),
    (b"<?xml version='1.0'?><Error/>", "web page"), (b"Entry not found", "cannot be read"),
    (b'{"H_cycles": 3}', "cannot be read"), (b"\x1f\x8b\x08\x00abc", "cannot be read"),
    (bytes(50), "cannot be read"), (b"PK\x03\x04" + b"\x00" * 90, "cannot be read"),
    ([torch.zeros(2)], "holds a list, not names"), (torch.zeros(3), "holds a Tensor, not names"),
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    model = model_of()
    model.blocks[0].mlp_in.data[3, 4] = value
    published = {"state_dict": hub.to_published(TINY, model.state_dict())}
    ours = {"config": asdict(TINY), "model": model.state_dict(), "ema": None}
    for content, settings in ((published, CYCLES), (ours, {})):
        with pytest.raises(UserError, match="blocks.0.mlp_in holds NaN or infinity"):
            hub.read_model(content, settings, 16, True)
    averages = {"blocks.0.mlp_in": torch.zeros_like(model.blocks[0].mlp_in)}
    assert not hub.read_model({**ours, "ema": averages}, {}, 16, True)[1]["blocks.0.mlp_in"].any()


# ---------------------------------------------------------------------------------------------
# Checkpoints of train.py

def test_our_checkpoints_hold_their_own_config(tmp_path, split):
    """Whatever lies beside them; cycles and precision may be others, what weights were trained as may not."""
    model = model_of(ATTENTION)
    path = save_run(tmp_path, split, model) / "step_00000010.ckpt"
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4, "H_cycles": 9}))
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


def test_export_of_another_makers_file(tmp_path):
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
