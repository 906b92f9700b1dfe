"""tools/hub.py: checkpoint files of any origin, configurations beside them, and the published format."""

import json
import sys
from dataclasses import asdict, replace

import pytest
import torch
from runs import TINY, model_of, save_run, sudoku_dir

from data import Split
from model import build_model
from tools import hub
from tools.common import UserError
from tools.run_folder import save_file

CYCLES = {"H_cycles": 1, "L_cycles": 1}
SETTINGS = {**CYCLES, "num_heads": 2, "puzzle_emb_len": 1}
ATTENTION = replace(TINY, mixer="attn", pos_encodings="rope", puzzle_emb_len=3)
LEARNED = replace(ATTENTION, pos_encodings="learned", num_layers=2)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return Split(sudoku_dir(tmp_path_factory.mktemp("weights") / "boards"), "test")


def published(cfg=TINY, seed=0):
    return hub.to_published(cfg, model_of(cfg, seed).state_dict())


def prefixed(prefix, state):
    return {prefix + key.removeprefix("_orig_mod.model.inner."): value for key, value in state.items()}


def load(path, seq_len=16, ema=True, **settings):
    return hub.read_model(hub.load_weights(path), settings, seq_len, ema)


def is_model(state, cfg=TINY, seed=0):
    expected = model_of(cfg, seed).state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())


def export(folder, split, name, cfg=TINY, seed=0):
    run = save_run(folder / f"run{seed}", split, model_of(cfg, seed))
    hub.main(["export", str(run), str(folder / name)])
    return folder / name


# ---------------------------------------------------------------------------------------------
# Export


EXPORTED = [
    TINY,
    replace(LEARNED, expansion=30.0, width_multiple=24, halt_tolerance=1e-5),
    replace(ATTENTION, pos_encodings="none", score_mod="grid", num_heads=4, num_puzzles=7, dtype="bfloat16"),
    replace(ATTENTION, vocab_size=0, input_dim=3, target_dim=2, halt_tolerance=0.5),
]


@pytest.mark.parametrize("cfg", EXPORTED)
def test_exported_weights_load_back(tmp_path, split, capsys, cfg):
    """With their configuration: the same Config, weights and dataset, and nothing is assumed."""
    out = export(tmp_path, split, "out.pt", cfg)
    assert "out.pt.config.json; keep them together" in capsys.readouterr().out
    for seq_len in (16, None):
        found, state = load(out, seq_len)
        assert found == cfg and is_model(state, cfg) and not capsys.readouterr().err
    content = hub.load_weights(out)
    assert content["puzzle_ids_sha256"] == split.puzzle_ids_sha256 and content["recipe"] == split.recipe
    assert content["data"] == content["data_test"] == [str(split.dirs[0])]
    keys = torch.load(out).keys()
    assert all(key.startswith("_orig_mod.model.inner.") for key in keys)


def test_export_keeps_the_canvases_and_takes_the_average(tmp_path, split):
    model, averaged = model_of(), dict(model_of(seed=1).named_parameters())
    averaged = {name: tensor.detach() for name, tensor in averaged.items()}
    settings = {"canvases": [4], "run_dir": "runs/of-alice"}
    run = save_run(tmp_path / "run", split, model, ema=averaged, settings=settings)
    for flags, expected in ([], averaged["lm_head"]), (["--no-ema"], model.lm_head):
        hub.main(["export", str(run), str(tmp_path / "w.pt"), *flags])
        content = hub.load_weights(tmp_path / "w.pt")
        assert torch.equal(content["state_dict"]["lm_head.weight"], expected) and not content["ema"]
        assert content["settings"] == {"canvases": [4]}


def test_safetensors(tmp_path, split, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(UserError, match="cannot write .*model.safetensors.*pip install safetensors"):
            export(tmp_path, split, "model.safetensors")
        (tmp_path / "other.safetensors").write_bytes(b"")
        with pytest.raises(
            UserError, match="other.safetensors cannot be read with the package safetensors: "
        ):
            load(tmp_path / "other.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
    load_file = pytest.importorskip("safetensors.torch", reason="needs safetensors").load_file
    out = export(tmp_path, split, "model.safetensors")
    assert load_file(out).keys() == published().keys()
    assert is_model(load(out)[1]) and load(out)[0] == TINY
    out.write_bytes(out.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load(out)


# ---------------------------------------------------------------------------------------------
# Configurations beside a file


def test_a_configuration_belongs_to_one_file(tmp_path, split):
    """Neither an export with the same stem nor a replaced file is scored with another's configuration."""
    first = export(tmp_path, split, "w.pt")
    second = export(tmp_path, split, "w.bin", replace(TINY, H_cycles=2), seed=1)
    assert load(first)[0].H_cycles == 1 and load(second)[0].H_cycles == 2
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="w.pt.config.json was written for other weights than .*w.pt"):
        load(first)


def test_configuration_of_earlier_exports(tmp_path):
    """w.config.json, without a checksum, describes the file with its stem."""
    torch.save(published(), tmp_path / "w.pt")
    saved = {**asdict(TINY), "q_continue": False, "trained_on": {"identity": "1" * 64, "data": ["x"]}}
    (tmp_path / "w.config.json").write_text(json.dumps(saved))
    assert load(tmp_path / "w.pt")[0] == TINY
    assert hub.load_weights(tmp_path / "w.pt")["puzzle_ids_sha256"] == "1" * 64


HYDRA = "arch:\n  name: trm@TRM\n  H_cycles: 3\n  num_heads: 4\n  L_cycles: 4\n  loss: {type: x}\nlr: 1e-4\n"
FLAT = json.dumps({"H_cycles": 3, "L_cycles": 4, "num_heads": 4, "data_paths": ["a"], "dtype": None})


@pytest.mark.parametrize("name", ["all_config.yaml", "config.json", "w.yaml", "w.json", "w.pt.config.json"])
def test_configuration_beside_a_file(tmp_path, capsys, name):
    torch.save(published(ATTENTION), tmp_path / "w.pt")
    (tmp_path / name).write_text(FLAT if name.endswith("json") else HYDRA)
    found = load(tmp_path / "w.pt", puzzle_emb_len=3)[0]
    assert (found.H_cycles, found.L_cycles, found.num_heads) == (3, 4, 4) and not capsys.readouterr().err
    assert load(tmp_path / "w.pt", puzzle_emb_len=3, H_cycles=2)[0].H_cycles == 2
    with pytest.raises(UserError, match="trained with num_heads 4; use the same"):
        load(tmp_path / "w.pt", puzzle_emb_len=3, num_heads=2)


INVALID = ["arch: [", "- 1\n- 2\n", "arch: 3", "!!python/object:omegaconf.Dict {}", ""]
WRONG = ["H_cycles: three", "H_cycles: 1.0", "H_cycles: 0", "L_cycles: true", "halt_max_steps: -3"]
WRONG += ["pos_encodings: 2d", "num_heads: '2'"]


@pytest.mark.parametrize("text", INVALID + WRONG)
def test_wrong_configurations_are_refused(tmp_path, text):
    """In one line with the file and the key."""
    torch.save(published(), tmp_path / "w.pt")
    (tmp_path / "all_config.yaml").write_text(text)
    name = text.split(":")[0]
    message = f"all_config.yaml: {name} is" if text in WRONG else "all_config.yaml: "
    settings = {key: value for key, value in SETTINGS.items() if key != name}
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "w.pt", **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cfg", [TINY, ATTENTION, LEARNED])
def test_published_weights_without_a_configuration(tmp_path, capsys, cfg):
    path = tmp_path / "step_10"
    torch.save(published(cfg), path)
    with pytest.raises(UserError, match="T and n are not stored .*--H-cycles 3 --L-cycles 6"):
        load(path)
    found, state = load(path, puzzle_emb_len=cfg.puzzle_emb_len, num_heads=2, **CYCLES)
    assert is_model(state, cfg) and build_model(found, state)
    for name in ("mixer", "puzzle_emb_len", "seq_len", "num_layers", "num_heads"):
        assert getattr(found, name) == getattr(cfg, name), name
    assert not capsys.readouterr().err
    if cfg != ATTENTION:  # the positions of the weights decide, and eval.py compares them with the dataset
        assert load(path, 20, puzzle_emb_len=5, num_heads=2, **CYCLES)[0].seq_len == cfg.length - 5


def test_default_heads_and_prefix_are_noted(tmp_path, capsys):
    wide = replace(ATTENTION, hidden_size=64, num_heads=8, puzzle_emb_len=16)
    torch.save(published(wide), tmp_path / "w.pt")
    for given in {}, {"num_heads": 4}:
        found = load(tmp_path / "w.pt", **CYCLES, **given)[0]
        assert (found.num_heads, found.puzzle_emb_len) == (given.get("num_heads", 8), 16)
        error = capsys.readouterr().err
        assert "assuming {'num_heads': 8, 'puzzle_emb_len': 16}" in error and error.count("\n") == 1
    torch.save(published(replace(LEARNED, puzzle_emb_ndim=96)), tmp_path / "w.pt")
    assert load(tmp_path / "w.pt", **CYCLES, num_heads=2, puzzle_emb_len=0)[0].puzzle_emb_len == 3


# ---------------------------------------------------------------------------------------------
# Files of other makers

WRAPPED = {
    "plain": lambda s: s,
    "no prefix": lambda s: prefixed("", s),
    "DDP": lambda s: prefixed("module._orig_mod.model.inner.", s),
    "state_dict": lambda s: {"state_dict": prefixed("module.", s), "rng": torch.zeros(3)},
    "model_state_dict": lambda s: {"model_state_dict": s, "step": 5, "optimizer": {"state": {}}},
    "nested": lambda s: {"model": {"state_dict": s}, "config": {"num_heads": 2}},
    "half": lambda s: {key: value.half() for key, value in s.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_weights_are_unwrapped(tmp_path, name):
    torch.save(WRAPPED[name](published()), tmp_path / "a.pt")
    state = load(tmp_path / "a.pt", **SETTINGS)[1]
    dtype = torch.half if name == "half" else torch.float32
    for key, value in model_of().state_dict().items():
        assert torch.equal(state[key], value.to(dtype).float()), key


@pytest.mark.parametrize(
    "key", ["ema", "ema_model", "ema_state_dict", "model_ema", "shadow", "averaged_model"]
)
def test_averaged_weights_of_other_makers(tmp_path, key):
    """They are the default and the last weights take --no-ema. An average may lack buffers."""
    last, averaged = published(), published(seed=1)
    parameters = {k: v for k, v in averaged.items() if "init" not in k and "puzzle_emb" not in k}
    n_averaged = {"n_averaged": torch.tensor(5)}
    files = [
        {"state_dict": last, key: {**prefixed("module.", averaged), **n_averaged}},
        {"model": {"state_dict": last, key: {"shadow": averaged, "decay": 0.9}}},
        {"model": last, key: parameters},
    ]
    for content in files:
        torch.save(content, tmp_path / "both.pt")
        state = load(tmp_path / "both.pt", **SETTINGS)[1]
        assert torch.equal(state["lm_head"], model_of(seed=1).lm_head)
        assert is_model(load(tmp_path / "both.pt", ema=False, **SETTINGS)[1])
    assert torch.equal(state["y0"], model_of().y0)
    torch.save({key: averaged}, tmp_path / "only.pt")
    assert is_model(load(tmp_path / "only.pt", **SETTINGS)[1], seed=1)
    with pytest.raises(UserError, match="lacks"):
        load(tmp_path / "only.pt", ema=False, **SETTINGS)


def test_a_part_of_a_checkpoint_is_refused(tmp_path):
    part = dict(list(published().items())[:6])
    torch.save(part, tmp_path / "pytorch_model-1-of-2.bin")
    with pytest.raises(UserError, match="not a published TRM checkpoint, it lacks: '"):
        load(tmp_path / "pytorch_model-1-of-2.bin", **SETTINGS)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "model.safetensors.index.json")


OTHER = [
    (b"", "cannot be read"),
    (b"<!doctype html><html>Not found</html>", "cannot be read"),
    ([torch.zeros(2)], "does not contain a state dict"),
    ({"epoch": 3}, "lacks: 'embed_tokens.embedding_weight'"),
    ({"model": {"fc.weight": torch.zeros(2, 2)}, "config": {}}, "lacks: 'embed_tokens"),
    ({"model": model_of().state_dict()}, "lacks: 'embed_tokens"),
    ({**published(), "fc.weight": torch.zeros(2)}, "unknown tensors: .'fc.weight'"),
]


@pytest.mark.parametrize("content, message", OTHER)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=message) as error:
        load(path, **SETTINGS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, split, value):
    model = model_of()
    model.blocks[0].mlp_in.data[3, 4] = value
    torch.save(hub.to_published(TINY, model.state_dict()), tmp_path / "w.pt")
    run = save_run(tmp_path / "run", split, model)
    for path in (tmp_path / "w.pt", run / "step_00000010.ckpt"):
        with pytest.raises(UserError, match="blocks.0.mlp_in contains NaN or infinity"):
            load(path, **SETTINGS)


# ---------------------------------------------------------------------------------------------
# Checkpoints of train.py


def test_our_checkpoints_contain_their_configuration(tmp_path, split):
    """Cycles and precision can be overridden; heads, prefix and positions cannot."""
    path = save_run(tmp_path, split, model_of(ATTENTION)) / "step_00000010.ckpt"
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4, "H_cycles": 9}))
    found, state = load(path)
    assert found == ATTENTION and is_model(state, ATTENTION)
    changed = {"H_cycles": 5, "dtype": "bfloat16", "num_heads": 2}
    assert load(path, **changed)[0] == replace(ATTENTION, **changed)
    for name, value in (("num_heads", 4), ("puzzle_emb_len", 4), ("pos_encodings", "none")):
        with pytest.raises(UserError, match=f"trained with {name} .*; use the same"):
            load(path, **{name: value})


def test_checkpoints_of_earlier_code(tmp_path):
    config = {**asdict(TINY), "q_continue": False}
    del config["halt_tolerance"]
    content = {"config": config, "model": model_of().state_dict(), "ema": None, "identity": "1" * 64}
    save_file(tmp_path / "old.ckpt", content)
    assert load(tmp_path / "old.ckpt")[0] == TINY
    assert hub.load_weights(tmp_path / "old.ckpt")["puzzle_ids_sha256"] == "1" * 64
    save_file(tmp_path / "new.ckpt", content | {"config": {**config, "experts": 4}})
    with pytest.raises(UserError, match="experts"):
        load(tmp_path / "new.ckpt")


def test_initial_weights(tmp_path, split):
    """The table is kept for the same puzzles and replaced by its mean row for others."""
    cfg = replace(TINY, num_puzzles=3)
    run = save_run(tmp_path / "run", split, model_of(cfg))
    torch.save(published(cfg), tmp_path / "published.pt")
    for path in (run, tmp_path / "published.pt"):
        assert is_model(hub.initial_weights(path, cfg, split.puzzle_ids_sha256), cfg)
    mean_row = model_of(cfg).puzzle_emb.mean(0)
    for new_cfg, ids in ((cfg, "other"), (replace(cfg, num_puzzles=5), split.puzzle_ids_sha256)):
        table = hub.initial_weights(run, new_cfg, ids)["puzzle_emb"]
        assert torch.equal(table, mean_row.repeat(new_cfg.num_puzzles, 1))


def test_wrong_command_lines():
    for argv in ("import a b", "export a", "export nowhere b", "push a b --epochs 3"):
        with pytest.raises(UserError):
            hub.main(argv.split())
