"""Weights in the published format: read them from a file or the Hugging Face hub, export and push them.

    python -m tools.hub export RUN FILE       write FILE and its configuration, FILE.config.json
    python -m tools.hub push RUN OWNER/NAME   upload weights, configuration, results.json and a model card

A published file is the state dict of the published training module. Its tensor shapes determine most of
Config. The rest comes from a configuration beside the file, from the table PUBLISHED, or from flags.
"""

import importlib.util
import json
import re
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
import yaml  # a dependency of huggingface_hub

import prepare
from model import Config, check_field, config_from_dict
from tools.common import (
    Parser,
    cli,
    one_line,
    replacing,
    require,
    sha256_of_file,
    user_error,
    write_json,
)
from tools.run_folder import find_checkpoint, load_file, save_file

# published weights: (T, n, name of the dataset in prepare.KNOWN)
PUBLISHED = {
    "alphaXiv/trm-model-sudoku": (3, 6, "sudoku"),
    "alphaXiv/trm-model-maze": (3, 4, "maze"),
    "alphaXiv/trm-model-arc-agi-1": (3, 4, "arc1"),
    "arcprize/trm_arc_prize_verification/arc_v1_public": (3, 4, "arc1"),
    "arcprize/trm_arc_prize_verification/arc_v2_public": (3, 4, "arc2"),
    "Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-mlp": (3, 6, "sudoku"),
    "Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-att": (3, 6, "sudoku"),
    "Sanjin2024/TinyRecursiveModel-Maze-Hard": (3, 4, "maze"),
    "Sanjin2024/TinyRecursiveModels-ARC-AGI-1": (3, 4, "arc1"),
    "Sanjin2024/TinyRecursiveModels-ARC-AGI-2": (3, 4, "arc2"),
}
# Shapes do not determine these two; all of PUBLISHED use them.
DEFAULTS = {"num_heads": 8, "puzzle_emb_len": 16}
FIELDS = {f.name: f for f in fields(Config)}


def note(text):
    """Print a line to stderr, on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"note: {text}", file=sys.stderr)


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
# names within a block: of its mixer, and of the rest
MIXER_NAMES = {
    "attn": {"mix_in": "self_attn.qkv_proj", "mix_out": "self_attn.o_proj"},
    "mlp": {"mix_in": "mlp_t.gate_up_proj", "mix_out": "mlp_t.down_proj"},
}
BLOCK_NAMES = {"mlp_in": "mlp.gate_up_proj", "mlp_out": "mlp.down_proj"}


def published_names(cfg):
    """{our name: published name without prefix} of every tensor in the state dict of a model."""
    names = dict(NAMES)
    if cfg.pos_encodings != "learned":
        del names["embed_pos"]
    for i in range(cfg.num_layers):
        for ours, published in (MIXER_NAMES[cfg.mixer] | BLOCK_NAMES).items():
            names[f"blocks.{i}.{ours}"] = f"L_level.layers.{i}.{published}.weight"
    return names


def to_published(cfg, state):
    """Our state dict as the compiled published training module would save it."""
    names = published_names(cfg)
    return {f"_orig_mod.{PREFIX}{published}": state[ours].clone() for ours, published in names.items()}


def from_published(state, settings):
    """(Config, our float32 state dict) of a published state dict, with any wrapper or prefix.

    settings: the fields of Config that shapes do not determine, and seq_len if a dataset is known.
    Raises UserError for missing or unknown tensors and for settings that do not fit."""
    remaining = unwrap(state)[0]
    ours = {}
    with user_error("not a published TRM checkpoint, it lacks", KeyError):
        cfg = published_config(remaining, settings)
        for name, published in published_names(cfg).items():
            ours[name] = remaining.pop(published).float()
    require(not remaining, f"the checkpoint has unknown tensors: {', '.join(sorted(remaining)[:4])}")
    return cfg, ours


def published_config(state, settings):
    """The Config of published weights: DEFAULTS with a note, overridden by settings, overridden by shapes."""
    require(
        {"H_cycles", "L_cycles"} <= settings.keys(),
        "T and n are not stored with these weights; pass --H-cycles 3 --L-cycles 6 (sudoku) or 4 (maze, ARC)",
    )
    assumed = {name: value for name, value in DEFAULTS.items() if name not in settings}
    if assumed:  # only a low score would reveal that they are wrong
        note(f"assuming {assumed}, because the weights come without these settings")
    V, D = state[NAMES["embed_tokens"]].shape
    n_puzzles, ndim = state[NAMES["puzzle_emb"]].shape
    config = {**assumed, **settings}
    P = config["puzzle_emb_len"] or -(-ndim // D)  # 0 in published settings: as many as ndim needs
    S = config.get("seq_len")
    mixer_out = state.get("L_level.layers.0.mlp_t.down_proj.weight")  # (L, I), only with mixer "mlp"
    positions = state.get(NAMES["embed_pos"], mixer_out)  # (L, ...)
    if positions is None:  # RoPE fits any length
        L = P + (S or {11: 81}.get(V, 900))
    else:
        L = len(positions)
    fits = S in (None, L - P)
    require(fits, f"{P} + {S} positions do not fit weights for {L}; pass --puzzle-emb-len or --data")
    config |= {"hidden_size": D, "num_puzzles": n_puzzles, "puzzle_emb_ndim": ndim}
    config |= {"puzzle_emb_len": P, "seq_len": L - P, "mixer": "attn" if mixer_out is None else "mlp"}
    config["num_layers"] = len({key.split(".")[2] for key in state if key.startswith("L_level.")})
    config["input_dim" if config.get("input_dim") else "vocab_size"] = V
    if NAMES["embed_pos"] in state:
        config["pos_encodings"] = "learned"
    return Config(**config)


# ---------------------------------------------------------------------------------------------
# Checkpoint files of any origin

# published files have names such as step_32550
WEIGHTS = re.compile(r"step[^./]*$|\.(pt|pth|bin|ckpt|safetensors)$")
# keys of a checkpoint that describe its data; "identity" was the name of puzzle_ids_sha256
TRAINED_ON = ("puzzle_ids_sha256", "identity", "recipe", "data", "data_test", "settings")


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
    require(
        not re.search(r"-\d+-of-\d+\.|\.index\.json$", path.name),
        f"{path} is only a part of a checkpoint; load all parts and torch.save the union of their dicts",
    )
    if path.suffix == ".safetensors":
        with user_error(f"{path} cannot be read with the package safetensors", Exception):
            from safetensors.torch import load_file as load_safetensors

            content = load_safetensors(path)
    else:
        content = load_file(path, verify)
    require(isinstance(content, dict), f"{path} contains a {type(content).__name__}, not a state dict")
    by_train_py = "config" in content and "y0" in (content.get("model") or ())
    if not by_train_py:
        last, averaged = unwrap(content)
        config, origin = sidecar_config(path)
        content = {**origin, "state_dict": last, "ema": averaged, "config": config}
    if "identity" in content:
        content["puzzle_ids_sha256"] = content.pop("identity")
    return content


def sidecar_config(path):
    """(fields of Config, TRAINED_ON) from the configuration beside a weights file; {} and {} without one."""
    names = [f"{path.name}.config.json", "config.json", "all_config.yaml"]
    same_stem = [p for p in path.parent.iterdir() if p.stem == path.stem and WEIGHTS.search(p.name)]
    if len(same_stem) == 1:  # otherwise w.json may describe w.pt or w.bin
        names[1:1] = [path.stem + end for end in (".config.json", ".json", ".yaml")]
    for name in names:
        file = path.with_name(name)
        if file.is_file():
            break
    else:
        return {}, {}
    parse = json.loads if file.suffix == ".json" else yaml.safe_load
    with user_error(file, OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        saved = dict(parse(file.read_text()))
        origin = dict(saved.get("trained_on", {}))
        saved |= saved.get("arch", {})  # a section of published configurations
    config = {}
    for name in FIELDS.keys() & saved.keys():
        if isinstance(saved[name], (int, float, str)):
            check_field(FIELDS[name], saved[name], file)
            config[name] = saved[name]
    if "weights_sha256" in saved and file.name != "config.json":
        same = saved["weights_sha256"] == sha256_of_file(path)
        require(same, f"{file} was written for other weights than {path}; export these again")
    return config, origin


def read_model(content, settings, seq_len, ema):
    """(Config, float32 state dict) of what load_weights returned. Raises UserError.

    settings: fields of Config that override those of the file. seq_len: of the dataset, or None.
    ema: take the averaged weights if there are any."""
    config = content["config"]
    for name in ("num_heads", "puzzle_emb_len", "pos_encodings"):  # no shape would reveal a wrong one
        value = settings.get(name, config.get(name))
        same = config.get(name, value) == value
        require(same, f"the weights were trained with {name} {config.get(name)}, not {value}")
    averaged = (ema and content.get("ema")) or {}
    if "state_dict" in content:
        if averaged:
            note("using the averaged (EMA) weights of the checkpoint; --no-ema takes the last ones")
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
    same_puzzles = content.get("puzzle_ids_sha256", puzzle_ids_sha256) == puzzle_ids_sha256
    if not same_puzzles or len(state["puzzle_emb"]) != cfg.num_puzzles:
        state["puzzle_emb"] = state["puzzle_emb"].mean(0).repeat(cfg.num_puzzles, 1)
    return state


# ---------------------------------------------------------------------------------------------
# The hub


def fetch(name, world):
    """(path, settings, prepare.Dataset or None) of OWNER/REPO[/FILE], in the cache of the hub's client.

    settings: fields of Config from PUBLISHED."""
    match = re.fullmatch("([^/]+/[^/]+)/?(.*)", name)
    require(match, f"--hf {name} is not OWNER/REPO or OWNER/REPO/FILE; try alphaXiv/trm-model-maze")
    path, name = world.broadcast_object(download(*match.groups()) if world.rank == 0 else None)
    for key, (T, n, dataset) in PUBLISHED.items():
        if name.startswith(f"{key}/"):
            return path, {"H_cycles": T, "L_cycles": n, **DEFAULTS}, prepare.KNOWN[dataset]
    test_dirs = sidecar_config(path)[1].get("data_test", [""])
    return path, {}, prepare.known_dataset(test_dirs[0])


def download(repo, wanted):
    """(path, OWNER/REPO/FILE) of a weights file, from the hub or, without a connection, from the cache."""
    from huggingface_hub import HfApi, snapshot_download

    folder = None
    try:
        files = [sibling.rfilename for sibling in HfApi().model_info(repo).siblings]
    except Exception as e:  # which errors the client raises depends on its version
        reason = f"cannot reach {repo} ({one_line(e)})"
        hint = f"fetch the file from https://huggingface.co/{repo} and pass it with --checkpoint"
        with user_error(f"{reason} and it is not in the cache; {hint}", Exception):
            # no patterns: the client would miss the files of the repository that are not downloaded
            folder = snapshot_download(repo, allow_patterns=[], local_files_only=True)
        note(f"{reason}; using the cached {folder}")
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        files = [path.relative_to(folder).as_posix() for path in paths]
    found = [file for file in files if file == wanted or (not wanted and WEIGHTS.search(file))]
    require(len(found) == 1, f"{repo} has several files; pass --hf {repo}/FILE: {', '.join(files)}")
    if folder is None:
        with user_error(f"cannot download {repo}", Exception):
            folder = snapshot_download(repo, allow_patterns=[*found, "*.json", "*.yaml"])
    return Path(folder, *found), f"{repo}/{found[0]}"


def export(file, content, cfg, state):
    """Write published weights and, beside them, the configuration that load_weights finds.

    Returns the path of that configuration."""
    published = to_published(cfg, state)
    if file.suffix == ".safetensors":
        with (
            replacing(file) as tmp,
            user_error(f"cannot write {file} (pip install safetensors)", ImportError),
        ):
            from safetensors.torch import save_file as save_safetensors

            save_safetensors(published, tmp, metadata={"format": "pt"})
    else:
        save_file(file, published)
    origin = {key: content[key] for key in TRAINED_ON if key in content}
    config = file.with_name(f"{file.name}.config.json")
    write_json(config, {**asdict(cfg), "weights_sha256": sha256_of_file(file), "trained_on": origin})
    return config


# eval.TestTimeCompute of an evaluation without flags
ALL_STEPS_ONCE = {"steps": None, "halt_threshold": None, "rollouts": 1, "noise": 0.0}


def push(repo, path, content, cfg, state, averaged):
    """Upload published weights with their configuration, results.json of eval.py and a model card."""
    from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

    file = path.with_name("results.json")
    weights = f"{path.name}, {'averaged' if averaged else 'last'} weights"
    hint = f"{file} is not an evaluation of {weights} without flags; run python eval.py --checkpoint {path}"
    with user_error(hint, OSError, ValueError, TypeError, KeyError):
        results = json.loads(file.read_text())
        same_weights = results["about"]["checkpoint"].endswith(weights)
        same_config = results["config"] == asdict(cfg)
        plain = results["test_time_compute"] == ALL_STEPS_ONCE
    require(same_weights and same_config and plain, hint)

    # the model card: its metadata contain the metrics as a model-index
    dataset = Path(results["about"]["data"]).name
    measured = []
    for metric, value in results["metrics"].items():
        measured.append(EvalResult("other", dataset, dataset, metric, value, dataset_split="test"))
    data = ModelCardData(model_name=Path(repo).name, eval_results=measured, tags=["tiny-recursive-model"])
    command = f"python eval.py --hf {repo}"
    card = ModelCard(
        f"---\n{data.to_yaml()}\n---\n# {repo}\n\nWeights of a Tiny Recursive Model (arXiv 2510.04871). "
        f"results.json has the scores on the test split of {dataset}. To reproduce them: `{command}`\n"
    )
    name = "model.safetensors" if importlib.util.find_spec("safetensors") else "model.pt"
    with tempfile.TemporaryDirectory() as folder, user_error(f"cannot push to {repo}", Exception):
        export(Path(folder, name), content, cfg, state).rename(Path(folder, "config.json"))
        write_json(Path(folder, "results.json"), results)
        card.save(Path(folder, "README.md"))
        HfApi().create_repo(repo, exist_ok=True)
        other_format = ["model.safetensors", "model.pt"]  # of an earlier push
        HfApi().upload_folder(repo_id=repo, folder_path=folder, delete_patterns=other_format)
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
    cfg, state = read_model(content, {}, None, not args.no_ema)
    if args.command == "push":
        push(args.target, path, content, cfg, state, content.get("ema") and not args.no_ema)
    else:
        config = export(Path(args.target), content, cfg, state)
        print(f"wrote {args.target} and {config}; keep them together, the weights need their configuration")


if __name__ == "__main__":
    cli(main)
