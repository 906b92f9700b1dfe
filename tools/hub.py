"""Weights in the published format: read them from a file or the Hugging Face
hub, export and push them.

    python -m tools.hub export RUN FILE       also writes FILE.config.json
    python -m tools.hub push RUN OWNER/NAME   with results.json and a model card

A published file is the state dict of the published training module. Its tensor
shapes determine most of Config. The rest comes from a configuration beside the
file, from the table PUBLISHED, or from flags.
"""

import importlib.util
import json
import re
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
import yaml  # a dependency of huggingface_hub

import prepare
from model import Config, check_field, config_from_dict
from tools.common import Parser, cli, one_line, read_json, replacing, require
from tools.common import sha256_of_file, user_error, write_json
from tools.run_folder import find_checkpoint, load_file, save_file

# published weights: name of the dataset in prepare.KNOWN. T is 3, n is 6 for Sudoku and 4 for the others.
PUBLISHED = {
    "alphaXiv/trm-model-sudoku": "sudoku",
    "alphaXiv/trm-model-maze": "maze",
    "alphaXiv/trm-model-arc-agi-1": "arc1",
    "arcprize/trm_arc_prize_verification/arc_v1_public": "arc1",
    "arcprize/trm_arc_prize_verification/arc_v2_public": "arc2",
    "Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-mlp": "sudoku",
    "Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-att": "sudoku",
    "Sanjin2024/TinyRecursiveModel-Maze-Hard": "maze",
    "Sanjin2024/TinyRecursiveModels-ARC-AGI-1": "arc1",
    "Sanjin2024/TinyRecursiveModels-ARC-AGI-2": "arc2",
}
# Shapes do not determine these two; all of PUBLISHED use them.
DEFAULTS = {"num_heads": 8, "puzzle_emb_len": 16}
FIELDS = {f.name: f for f in fields(Config)}


# ---------------------------------------------------------------------------------------------
# The published format

PREFIX = "model.inner."
# our name: published name
NAMES = {
    "embed_tokens": "embed_tokens.embedding_weight",
    "embed_pos": "embed_pos.embedding_weight",
    "puzzle_emb": "puzzle_emb.weights",
    "y0": "H_init",
    "z0": "L_init",
    "lm_head": "lm_head.weight",
    "q_head": "q_head.weight",
    "q_bias": "q_head.bias",
}
# names within a block, by mixer
BLOCK_NAMES = {
    "attn": {
        "mix_in": "self_attn.qkv_proj",
        "mix_out": "self_attn.o_proj",
        "mlp_in": "mlp.gate_up_proj",
        "mlp_out": "mlp.down_proj",
    },
    "mlp": {
        "mix_in": "mlp_t.gate_up_proj",
        "mix_out": "mlp_t.down_proj",
        "mlp_in": "mlp.gate_up_proj",
        "mlp_out": "mlp.down_proj",
    },
}


def published_names(cfg):
    """{our name: published name without prefix} of every tensor in the state dict of a model."""
    names = dict(NAMES)
    if cfg.pos_encodings != "learned":
        del names["embed_pos"]
    for i in range(cfg.num_layers):
        for ours, published in BLOCK_NAMES[cfg.mixer].items():
            names[f"blocks.{i}.{ours}"] = f"L_level.layers.{i}.{published}.weight"
    return names


def to_published(cfg, state):
    """Our state dict as the compiled published training module would save it."""
    names = published_names(cfg)
    return {f"_orig_mod.{PREFIX}{published}": state[ours].clone() for ours, published in names.items()}


def from_published(state, settings):
    """(Config, our state dict) of a published state dict, with any wrapper or prefix.

    settings: the fields of Config that shapes do not determine, and seq_len if a dataset is known.
    Raises UserError for missing or unknown tensors and for settings that do not fit."""
    remaining = unwrap(state)[0]
    with user_error("not a published TRM checkpoint, it lacks", KeyError):
        cfg = published_config(remaining, settings)
        ours = {name: remaining.pop(published) for name, published in published_names(cfg).items()}
    require(not remaining, f"the checkpoint has unknown tensors: {sorted(remaining)[:4]}")
    return cfg, ours


def published_config(state, settings):
    """The Config of published weights: DEFAULTS with a note, overridden by settings, overridden by shapes."""
    require(
        {"H_cycles", "L_cycles"} <= settings.keys(),
        "T and n are not stored with these weights; pass --H-cycles 3 --L-cycles 6 (sudoku) or 4 (maze, ARC)",
    )
    config = DEFAULTS | settings
    if config != settings:  # only a low score would reveal that they are wrong
        print(f"note: settings are missing beside the weights; assuming {DEFAULTS}", file=sys.stderr)
    V, D = state[NAMES["embed_tokens"]].shape
    n_puzzles, ndim = state[NAMES["puzzle_emb"]].shape
    P = config["puzzle_emb_len"] or -(-ndim // D)  # 0 in published settings: as many as ndim needs
    mixer_out = state.get("L_level.layers.0.mlp_t.down_proj.weight")  # (L, I), only with mixer "mlp"
    positions = state.get(NAMES["embed_pos"], mixer_out)  # (L, ...)
    S = config.get("seq_len") or {11: 81}.get(V, 900)  # RoPE fits any length
    if positions is not None:
        S = len(positions) - P
    layers = {name.split(".")[2] for name in state if name.startswith("L_level.")}
    shapes = {
        "input_dim" if config.get("input_dim") else "vocab_size": V,
        "seq_len": S,
        "num_puzzles": n_puzzles,
        "mixer": "attn" if mixer_out is None else "mlp",
        "hidden_size": D,
        "num_layers": len(layers),
        "puzzle_emb_len": P,
        "puzzle_emb_ndim": ndim,
    }
    if NAMES["embed_pos"] in state:
        shapes["pos_encodings"] = "learned"
    return Config(**config | shapes)


# ---------------------------------------------------------------------------------------------
# Checkpoint files of any origin

# published files have names such as step_32550
WEIGHTS = re.compile(r"step[^./]*$|\.(pt|pth|bin|ckpt|safetensors)$")
# keys of a checkpoint that describe its data
TRAINED_ON = ("puzzle_ids_sha256", "recipe", "data", "data_test")


def unwrap(content):
    """(last, averaged): two {published name: tensor} of a checkpoint, however it is wrapped; {} if absent."""
    last, averaged, wrapped = {}, {}, {}
    for key, value in content.items():
        if isinstance(value, torch.Tensor) and value.ndim:  # numbers, such as counts of steps, are no weights
            # without the prefixes of DDP, torch.compile, the loss head and its model
            last[re.sub(r"^((module|_orig_mod|model|inner)\.)*", "", str(key))] = value
        elif isinstance(value, dict):
            inner, inner_averaged = unwrap(value)
            if re.search(r"(?i)(^|_)(ema|swa)(_|$)|shadow|averag", str(key)):
                averaged |= inner | inner_averaged
            elif key in ("state_dict", "model_state_dict", "model", "module"):
                wrapped |= inner
                averaged |= inner_averaged
    return wrapped or last, averaged


def load_weights(path, verify=True):
    """Content of a checkpoint file, for read_model. That of train.py is returned as it is. Others become
    {"state_dict": last weights, "ema": averaged weights, "config": ...}, with the configuration beside them.

    verify: compare the checksums of a torch file. Raises UserError."""
    path = Path(path)
    if path.suffix == ".safetensors":
        with user_error(f"{path} cannot be read with the package safetensors", Exception):
            from safetensors.torch import load_file as load_safetensors

            content = load_safetensors(path)
    else:
        content = load_file(path, verify)
    require(isinstance(content, dict), f"{path} does not contain a state dict")
    by_train_py = "config" in content and "y0" in (content.get("model") or ())
    if not by_train_py:
        last, averaged = unwrap(content)
        config, origin = sidecar_config(path)
        content = {**origin, "state_dict": last, "ema": averaged, "config": config}
    if "identity" in content:  # its name before 2026-12
        content["puzzle_ids_sha256"] = content.pop("identity")
    return content


def sidecar_config(path):
    """(fields of Config, TRAINED_ON) from the configuration beside a weights file; {} and {} without one."""
    names = [
        f"{path.name}.config.json",
        f"{path.stem}.config.json",  # of earlier exports
        f"{path.stem}.json",
        f"{path.stem}.yaml",
        "config.json",
        "all_config.yaml",
    ]
    file = next(filter(Path.is_file, map(path.with_name, names)), None)
    if file is None:
        return {}, {}
    parse = json.loads if file.suffix == ".json" else yaml.safe_load
    with user_error(file, Exception):
        saved = dict(parse(file.read_text()))
        origin = saved.get("trained_on", {})
        saved |= saved.get("arch", {})  # a section of published configurations
    config = {}
    for name in FIELDS.keys() & saved.keys():
        if isinstance(saved[name], (int, float, str)):
            check_field(FIELDS[name], saved[name], file)
            config[name] = saved[name]
    if "weights_sha256" in saved:
        same = saved["weights_sha256"] == sha256_of_file(path)
        require(same, f"{file} was written for other weights than {path}; export these again")
    return config, origin


def read_model(content, settings, seq_len, ema):
    """(Config, float32 state dict) of what load_weights returned. Raises UserError.

    settings: fields of Config that override those of the file. seq_len: of the dataset, or None.
    ema: take the averaged weights if there are any."""
    config = content["config"]
    for name in ("num_heads", "puzzle_emb_len", "pos_encodings"):  # no shape would reveal a wrong one
        value = config.get(name)
        same = settings.get(name, value) == value or name not in config
        require(same, f"the weights were trained with {name} {value}; use the same")
    averaged = (ema and content.get("ema")) or {}
    if "state_dict" in content:
        known = {"seq_len": seq_len, **config, **settings}
        cfg, state = from_published(content["state_dict"] | averaged, known)
    else:
        cfg = config_from_dict(config, **settings)
        state = content["model"] | averaged
    for name, tensor in state.items():
        state[name] = tensor.float()
        require(tensor.isfinite().all(), f"{name} contains NaN or infinity; use an earlier checkpoint")
    return cfg, state


def initial_weights(path, cfg, puzzle_ids_sha256):
    """The state dict for train.py --init. The puzzle table of other puzzles is replaced by its mean row."""
    content = load_weights(find_checkpoint(path))
    state = read_model(content, asdict(cfg), cfg.seq_len, ema=True)[1]
    same_puzzles = content.get("puzzle_ids_sha256") in (None, puzzle_ids_sha256)
    if not same_puzzles or len(state["puzzle_emb"]) != cfg.num_puzzles:
        state["puzzle_emb"] = state["puzzle_emb"].mean(0).repeat(cfg.num_puzzles, 1)
    return state


# ---------------------------------------------------------------------------------------------
# The hub


def fetch(name, world):
    """(path, settings, folder) of OWNER/REPO[/FILE], in the cache of the hub's client.

    settings: fields of Config from PUBLISHED. folder: of the dataset in PUBLISHED, else None."""
    match = re.fullmatch("([^/]+/[^/]+)/?(.*)", name)
    require(match, f"--hf {name} is not OWNER/REPO or OWNER/REPO/FILE; try alphaXiv/trm-model-maze")
    path, name = world.broadcast_object(download(*match.groups()) if world.rank == 0 else None)
    for key, dataset in PUBLISHED.items():
        if name.startswith(f"{key}/"):
            n = 6 if dataset == "sudoku" else 4
            return path, {"H_cycles": 3, "L_cycles": n, **DEFAULTS}, prepare.KNOWN[dataset].folder
    return path, {}, None


def download(repo, wanted):
    """(path, OWNER/REPO/FILE) of a weights file, from the hub or, without a connection, from the cache."""
    from huggingface_hub import HfApi, snapshot_download

    folder = None
    try:
        files = HfApi().list_repo_files(repo)
    except Exception as e:  # which errors the client raises depends on its version
        print(f"note: cannot reach {repo} ({one_line(e)}); looking into the cache", file=sys.stderr)
        with user_error(f"{repo} is not in the cache; pass a file with --checkpoint", Exception):
            # no patterns: the client would miss the files of the repository that are not downloaded
            folder = snapshot_download(repo, allow_patterns=[], local_files_only=True)
        files = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")]
    found = [file for file in files if file == wanted or (not wanted and WEIGHTS.search(file))]
    require(len(found) == 1, f"choose one file of {repo} and pass --hf {repo}/FILE: {files}")
    if folder is None:
        with user_error(f"cannot download {repo}", Exception):
            folder = snapshot_download(repo, allow_patterns=[*found, "*.json", "*.yaml"])
    return Path(folder, *found), f"{repo}/{found[0]}"


def export(file, content, cfg, state):
    """Write published weights and, beside them, the configuration that load_weights finds.

    Returns the path of that configuration."""
    published = to_published(cfg, state)
    if file.suffix == ".safetensors":
        hint = f"cannot write {file} (pip install safetensors)"
        with replacing(file) as tmp, user_error(hint, ImportError):
            from safetensors.torch import save_file as save_safetensors

            save_safetensors(published, tmp)
    else:
        save_file(file, published)
    origin = {key: content.get(key) for key in TRAINED_ON}
    # the other settings are not needed, and some are private paths
    origin["settings"] = {"canvases": content.get("settings", {}).get("canvases")}
    config = file.with_name(f"{file.name}.config.json")
    write_json(config, {**asdict(cfg), "weights_sha256": sha256_of_file(file), "trained_on": origin})
    return config


# eval.TestTimeCompute of an evaluation without flags
ALL_STEPS_ONCE = {"steps": None, "halt_threshold": None, "rollouts": 1, "noise": 0.3}


def push(repo, path, content, cfg, state):
    """Upload published weights with their configuration, results.json of eval.py and a model card."""
    from huggingface_hub import EvalResult, HfApi, ModelCardData

    file = path.with_name("results.json")
    results = read_json(file) if file.exists() else {}
    expected = {
        "checkpoint": str(path),
        "averaged weights": bool(content.get("ema")),
        "test_time_compute": ALL_STEPS_ONCE,
        "config": asdict(cfg),
    }
    hint = f"{file} is not an evaluation without flags; run python eval.py --checkpoint {path}"
    require(results | expected == results, hint)

    # the model card: its metadata contain the metrics as a model-index
    dataset = Path(results["data"]).name
    task = ("other", dataset, dataset)
    measured = [EvalResult(*task, *metric) for metric in results["metrics"].items()]
    metadata = ModelCardData(model_name=repo, eval_results=measured).to_yaml()
    card = (
        f"---\n{metadata}\n---\nWeights of a Tiny Recursive Model (arXiv 2510.04871). results.json has the "
        f"scores on the test split of {dataset}. To reproduce them: `python eval.py --hf {repo}`\n"
    )
    with tempfile.TemporaryDirectory() as folder, user_error(f"cannot push to {repo}", Exception):
        has_safetensors = importlib.util.find_spec("safetensors") is not None
        name = "model.safetensors" if has_safetensors else "model.pt"
        config = export(Path(folder, name), content, cfg, state)
        config.rename(Path(folder, "config.json"))
        write_json(Path(folder, "results.json"), results)
        Path(folder, "README.md").write_text(card)
        HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder)
    print(f"pushed to {repo}")


def main(argv=None):
    parser = Parser(__doc__, usage="%(prog)s export|push RUN FILE|OWNER/NAME [flags]")
    add = parser.add_argument
    add("command", choices=["export", "push"], help="write a file or upload to the Hugging Face hub")
    add("run", help="run folder (its newest checkpoint) or checkpoint file")
    add("target", help="file to write or repository to upload to")
    add("--no-ema", action="store_true", help="use the last weights, not the averaged (EMA) ones")
    args = parser.parse_args(argv)
    path = find_checkpoint(args.run)
    content = load_weights(path)
    if args.no_ema:
        content["ema"] = None
    cfg, state = read_model(content, {}, None, ema=True)
    if args.command == "push":
        push(args.target, path, content, cfg, state)
    else:
        config = export(Path(args.target), content, cfg, state)
        print(f"wrote the weights and {config}; keep them together")


if __name__ == "__main__":
    cli(main)
