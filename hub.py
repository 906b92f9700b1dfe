"""Weights of others and for others: the published format, the hub.

    python hub.py export RUN FILE         published format, STEM.config.json
    python hub.py push RUN OWNER/NAME     upload weights, results and a card

The published format is the state dict of the published training module. Its
shapes tell most of Config, a configuration beside the file (CONFIGS) what is
UNSAID. A checkpoint of train.py holds its own Config.
"""
import argparse
import glob
import json
import re
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
import yaml  # huggingface_hub brings it

from common import Parser, UserError, cli, one_line, read_json, within, write_json
from model import Config, read_config, swiglu_width
from rundir import WRAPPERS, find_file, load_file, save_file

KNOWN = {   # published weights: T, n, and the dataset by its name in prepare.KNOWN
    "alphaXiv/trm-model-sudoku": (3, 6, "sudoku"), "alphaXiv/trm-model-maze": (3, 4, "maze"),
    "alphaXiv/trm-model-arc-agi-1": (3, 4, "arc1"),
    "arcprize/trm_arc_prize_verification/arc_v1_public": (3, 4, "arc1"),
    "arcprize/trm_arc_prize_verification/arc_v2_public": (3, 4, "arc2"),
    "Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-mlp": (3, 6, "sudoku"),
    "Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-att": (3, 6, "sudoku"),
    "Sanjin2024/TinyRecursiveModel-Maze-Hard": (3, 4, "maze"),
    "Sanjin2024/TinyRecursiveModels-ARC-AGI-1": (3, 4, "arc1"),
    "Sanjin2024/TinyRecursiveModels-ARC-AGI-2": (3, 4, "arc2"),
}
USUAL = {"num_heads": 8, "puzzle_emb_len": 16}      # all of these have them
UNSAID = ("H_cycles", "L_cycles", "num_heads", "puzzle_emb_len")    # each is a flag of eval.py, too
FIXED = ("vocab_size", "input_dim", "mixer", "hidden_size", "num_layers", "puzzle_emb_ndim", "puzzle_emb_len")

# ---------------------------------------------------------------------------------------------
# The published format

PREFIX = "model.inner."
WRAPPING = re.compile(r"((module|_orig_mod|model|inner)\.)*")   # of DDP, torch.compile, loss head, its model
NAMES = {"embed_tokens": "embed_tokens.embedding_weight", "embed_pos": "embed_pos.embedding_weight",
         "puzzle_emb": "puzzle_emb.weights", "lm_head": "lm_head.weight", "q_head": "q_head.weight",
         "q_bias": "q_head.bias", "y0": "H_init", "z0": "L_init"}
MIXERS = {"attn": {"mix_in": "self_attn.qkv_proj", "mix_out": "self_attn.o_proj"},
          "mlp": {"mix_in": "mlp_t.gate_up_proj", "mix_out": "mlp_t.down_proj"}}
MLP = {"mlp_in": "mlp.gate_up_proj", "mlp_out": "mlp.down_proj"}
MLP_POSITIONS = "L_level.layers.0.mlp_t.down_proj.weight"       # (P + S, ...)


def published_names(cfg):
    """{our key: published key without prefix} of all that a state dict of this model holds."""
    names = {k: v for k, v in NAMES.items() if k != "embed_pos" or cfg.pos_encodings == "learned"}
    for i in range(cfg.num_layers):
        for ours, theirs in {**MIXERS[cfg.mixer], **MLP}.items():
            names[f"blocks.{i}.{ours}"] = f"L_level.layers.{i}.{theirs}.weight"
    return names


def to_published(cfg, state):
    """Our state dict to a published one, as the compiled training module would save it."""
    names = published_names(cfg)
    return {f"_orig_mod.{PREFIX}{theirs}": state[ours].clone() for ours, theirs in names.items()}


def from_published(state, settings):
    """(Config, our float32 state dict) from a published state dict, its keys with or without prefixes.

    settings: fields of Config that shapes do not tell, and seq_len where a dataset is known; what is assumed
    instead is said on stderr. Raises UserError for missing and unknown keys and settings that do not fit."""
    state = bare(state)
    try:
        cfg = config_of(state, settings)
    except KeyError as e:
        found = ", ".join(sorted(state)[:4]) or "no tensors"
        raise UserError(f"not a published TRM checkpoint: it has no {e.args[0]}, but {found}") from None
    names = published_names(cfg)
    missing, unknown = set(names.values()) - state.keys(), state.keys() - set(names.values())
    for what, keys in (("lacks", missing), ("has unknown", unknown)):
        if keys:
            raise UserError(f"the published checkpoint {what} {', '.join(sorted(keys)[:4])}")
    return cfg, {ours: state[theirs].float() for ours, theirs in names.items()}


def bare(state):
    """The tensors of a published state dict, without the prefixes of what was wrapped around the model."""
    return {k[WRAPPING.match(k).end():]: v for k, v in state.items() if isinstance(v, torch.Tensor)}


def config_of(state, settings):
    """Config of published weights: what shapes tell, then settings, then what has to be assumed."""
    V, D = state["embed_tokens.embedding_weight"].shape
    rows, ndim = state["puzzle_emb.weights"].shape
    mlp, learned = (state.get(name) for name in (MLP_POSITIONS, NAMES["embed_pos"]))
    told = {"hidden_size": D, "puzzle_emb_ndim": ndim, "mixer": "attn" if mlp is None else "mlp",
            "num_layers": len({k.split(".")[2] for k in state if k.startswith("L_level.layers.")}),
            "input_dim" if settings.get("input_dim") else "vocab_size": V}
    must_agree(told, settings)
    encodings = "learned" if learned is not None else "rope" if mlp is None else "none"
    assumed = {**USUAL, "pos_encodings": encodings}
    inner = state["L_level.layers.0.mlp.down_proj.weight"].shape[1]
    if swiglu_width(D, 4.0) != inner:       # widths are rounded up, so that several expansions give this one
        assumed["expansion"] = inner * 3 / (2 * D)
    length = next((len(table) for table in (mlp, learned) if table is not None), None)
    P, S, unsaid = positions(settings, length, -(-ndim // D))
    if mlp is None and "num_heads" not in settings:
        unsaid.append(f"{USUAL['num_heads']} heads (--num-heads)")
    if unsaid and not (dist.is_initialized() and dist.get_rank()):
        print(f"assumed, as neither the weights nor a configuration beside them say it: {', '.join(unsaid)}",
              file=sys.stderr)
    sizes = {"num_puzzles": rows, "puzzle_emb_len": P, "seq_len": S or {11: 81}.get(V, 900)}
    return Config(**{**assumed, **settings, **told, **sizes})


def positions(settings, length, least):
    """(P, S or None, what is assumed, in words). length: P + S of the weights, None where no shape tells it.
    least: prefix positions that a row of their table fills. Raises UserError when they do not fit."""
    P, S, assumed = settings.get("puzzle_emb_len"), settings.get("seq_len"), []
    if P is None:
        P = length - S if length and S else USUAL["puzzle_emb_len"]
        if not (length and S) or P != USUAL["puzzle_emb_len"]:      # such a P may come from a wrong dataset
            assumed = [f"{P} prefix positions ({'by the dataset' if length and S else '--puzzle-emb-len'})"]
    P = P or least      # the published code writes 0 for as many as a row of the table fills
    if length and not S:
        S = length - P
    if length and P + S != length or P < least:
        raise UserError(f"{P} prefix positions and {S} cells do not fit the weights, which have "
                        f"{length or 'any number of'} positions, {least} or more of them prefix; give "
                        f"--puzzle-emb-len, or their own dataset with --data")
    return P, S, assumed


def must_agree(known, asked):
    """Refuse settings with which weights would silently be another model than the one that was trained."""
    mlp = "mlp" in (known.get("mixer"), asked.get("mixer"))
    for name in FIXED + (() if mlp else ("num_heads", "pos_encodings")):
        if name in known and asked.get(name, known[name]) != known[name]:
            raise UserError(f"the weights are of {name} {known[name]}, not {asked[name]}: leave that out, or "
                            f"correct the configuration beside them")


# ---------------------------------------------------------------------------------------------
# Checkpoint files of any maker

NO_WEIGHTS = {  # how files begin that are taken for weights, and what they are; the first that matches
    rb"$": "empty; download or save it again", rb"version .*git-lfs": "a git-lfs pointer; run `git lfs pull`",
    rb"<": "a web page; download the file itself, on the hub from /resolve/, not from /blob/",
    rb"\x1f\x8b": "compressed; unpack it", rb"[\t\r\n -~]+$": "a text file"}
AVERAGES = ("ema", "ema_state_dict", "model_ema", "ema_model")
CONFIGS = (".hydra/config.yaml", "config.yaml", "config.yml", "config.json", "all_config.yaml",
           "{}.yaml", "{}.yml", "{}.json", "{}.config.yaml", "{}.config.json")  # {}: the file's stem
THEIR_NAMES = {"L_layers": "num_layers", "forward_dtype": "dtype", "loss_type": "loss"}
ORIGIN = ("identity", "recipe", "data", "data_test")    # what a checkpoint of train.py says of its data


def load_weights(path):
    """Content of a checkpoint file, for read_model: of train.py as it is; of others {"state_dict": all of it,
    "beside": what the configurations beside it say, ORIGIN if they say that}. Raises UserError, OSError."""
    if not Path(path).is_file():
        raise UserError(f"{path} not found")
    with open(path, "rb") as f:
        head = f.read(256)
    for start, what in NO_WEIGHTS.items():
        if re.match(start, head.strip()):
            raise UserError(f"{path} is no checkpoint, it is {what}")
    content = load_safetensors(path) if head[8:9] == b"{" else load_file(path)
    if is_ours(content):
        return content
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not names and their tensors; where it is "
                        f"from, torch.save(model.state_dict(), FILE)")
    said = beside(Path(path))
    return {"state_dict": content, "beside": said, **said.get("trained_on", {})}


def load_safetensors(path):
    """{name: tensor} of a file that begins with the length of a JSON header. Raises UserError."""
    try:
        from safetensors.torch import load_file as load
    except ImportError:
        raise UserError(f"{path} is a safetensors file; pip install safetensors") from None
    try:
        return load(path)
    except Exception as e:      # its own error is no ValueError
        raise UserError(f"{path} cannot be read as a checkpoint: {one_line(e)}") from None


def is_ours(content):
    """Whether this is of train.py, and not a {"config": ..., "model": ...} of others."""
    return isinstance(content, dict) and "config" in content and "y0" in (content.get("model") or ())


def beside(path):
    """All that the configurations beside a checkpoint file say. Raises UserError."""
    said = {}
    for file in (path.parent / name.format(path.stem) for name in CONFIGS):
        if file.is_file() and file != path:
            try:
                said |= (json.loads if file.suffix == ".json" else yaml.safe_load)(file.read_text()) or {}
            except (ValueError, TypeError, yaml.YAMLError) as e:
                raise UserError(f"{file} is no configuration ({one_line(e)}); move it away") from None
    return said


def settings_of(said):
    """Fields of Config in a configuration, ours or published, at any depth. Raises UserError."""
    found, known = {}, {f.name: f for f in fields(Config)}
    for key, value in said.items():
        name = THEIR_NAMES.get(key, key)
        if isinstance(value, dict):
            found |= settings_of(value)
        elif name == "mlp_t":
            found["mixer"] = "mlp" if value else "attn"
        elif name == "no_ACT_continue":
            found["q_continue"] = not value
        elif name in known and value is not None and "${" not in str(value):    # Hydra's "as that other key"
            kind, choices = type(known[name].default), known[name].metadata.get("choices")
            value = str(value).removesuffix("_cross_entropy") if kind is str else value
            try:
                found[name] = kind(value)
            except (ValueError, TypeError):
                raise UserError(f"the configuration says {key} {value!r}, no {kind.__name__}") from None
            if choices and value not in choices:
                raise UserError(f"the configuration says {key} {value}; known are {', '.join(choices)}")
    return found


def weights_of(content, ema):
    """(state dict, settings) in what others save, as {"model": {"state_dict": ...}, "ema": ...} and so on.
    ema: averaged weights take the place of the last ones."""
    levels, settings, averages = [content], {}, None
    while inner := next((levels[-1][k] for k in WRAPPERS if isinstance(levels[-1].get(k), dict)), None):
        levels.append(inner)
    for level in levels:
        settings |= settings_of(level["config"]) if isinstance(level.get("config"), dict) else {}
        averages = next((level[k] for k in AVERAGES if isinstance(level.get(k), dict)), averages)
    state = bare(levels[-1])
    return state | weights_of(averages, False)[0] if ema and averages else state, settings


def read_model(content, settings, seq_len, ema):
    """(Config, float32 state dict) of a checkpoint file's content, ours or of others.

    settings: fields of Config that are given, over what the file and a configuration beside it say.
    seq_len: of the dataset, or None. ema: the averaged weights. Raises UserError, for NaN in weights, too."""
    if is_ours(content):
        must_agree(content["config"], settings)
        cfg, names = read_config(content["config"], **settings), {}
        state = content["model"] | ((ema and content.get("ema")) or {})
        state = {k: v.float() for k, v in state.items()}
    else:
        state, said = weights_of(content, ema)
        said |= settings_of(content.get("beside", {}))
        must_agree(said, settings)
        settings = {"seq_len": seq_len, **said, **settings}
        lacking = [f"--{k.replace('_', '-')}" for k in ("H_cycles", "L_cycles") if k not in settings]
        if lacking:
            raise UserError(f"this published checkpoint does not say {' and '.join(lacking)}; give them "
                            f"(3 and 6 for sudoku, 3 and 4 for maze and ARC)")
        cfg, state = from_published(state, settings)
        names = published_names(cfg)
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{names.get(key, key)} holds NaN or infinity; use an earlier checkpoint")
    return cfg, state


# ---------------------------------------------------------------------------------------------
# The hub

WEIGHTS = re.compile(   # step_32550 has no ending
    r"(?!(readme|licen[cs]e|notice|makefile|dockerfile|optimizer|scheduler|rng_state|training_args)\b)"
    r"([^.]+|[^.].*\.(pt|pth|bin|ckpt|safetensors))", re.I)


def fetch(name, world):
    """(path, settings, dataset in prepare.KNOWN or None) of `owner/repo[/file]`; settings: what the table and
    configurations say. The file comes to data/weights/owner/repo; without a network it is taken from there,
    where it may be put by hand, or from the cache of the hub's client. Raises UserError."""
    owner, repo, wanted = (name.split("/", 2) + ["", ""])[:3]
    if not owner or not repo:
        raise UserError(f"--hf {name} is no owner/repo or owner/repo/file; try alphaXiv/trm-model-maze")
    found = download(f"{owner}/{repo}", wanted) if world.rank == 0 else None
    folder, wanted = world.gather_objects(found)[0]
    key = next((k for k in KNOWN if f"{owner}/{repo}/{wanted}/".startswith(k + "/")), None)
    T, n, dataset = KNOWN.get(key, (None, None, None))
    settings, path = {"H_cycles": T, "L_cycles": n, **USUAL} if key else {}, folder / wanted
    for parent in reversed([p for p in path.parents if p.is_relative_to(folder)]):      # the nearest wins
        settings |= settings_of(beside(parent / path.name))
    return path, settings, dataset


def download(repo, wanted):
    """(folder with files of a repository, the checkpoint file in it) on this machine. Raises UserError."""
    from huggingface_hub import HfApi, constants, snapshot_download
    folder = Path("data/weights", repo)
    cache = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots")
    try:
        files = [f.rfilename for f in HfApi().model_info(repo).siblings]    # list_repo_files retries for 23 s
        wanted = pick_file(repo, files, wanted)
        configs = [f for f in files if Path(f).name in [c.format(Path(wanted).stem) for c in CONFIGS]]
        snapshot_download(repo, local_dir=folder, allow_patterns=[glob.escape(f) for f in (wanted, *configs)])
        return folder, wanted
    except UserError:
        raise
    except Exception as e:      # the client raises its own errors, httpx's or requests', by its version
        reason = f"cannot download from {repo} ({one_line(e)})"
    for place in (folder, *sorted(cache.glob("*"), key=lambda commit: -commit.stat().st_mtime)):
        there = [f.relative_to(place).as_posix() for f in place.rglob("*") if f.is_file()]
        if wanted in there or not wanted and weights_among(there):
            wanted = pick_file(repo, there, wanted)
            print(f"{reason}: using {place / wanted}", file=sys.stderr)
            return place, wanted
    raise UserError(f"{reason}; fetch {wanted or 'its checkpoint file'} from https://huggingface.co/{repo} "
                    f"and put it at {folder / (wanted or 'FILE')}")


def weights_among(files):
    """Those that can be checkpoints: neither hidden, nor with the ending or the name of something else."""
    return [f for f in files if WEIGHTS.fullmatch(Path(f).name) and not f.startswith(".")]


def pick_file(repo, files, wanted):
    """The checkpoint among the files of a repository. Raises UserError when there is not one."""
    found = weights_among(files)
    if wanted in files or len(found) == 1 and not wanted:
        return wanted or found[0]
    what = f"no file {wanted}" if wanted else f"{len(found)} checkpoint files"
    choice = ", ".join(f"--hf {repo}/{f}" for f in found or files)
    raise UserError(f"{repo} has {what}; choose one: {choice}")


# ---------------------------------------------------------------------------------------------
# Out into the world

def write_published(file, config, content, cfg, state):
    """Write published weights, and the configuration that says what they do not. Raises OSError."""
    save_file(file, to_published(cfg, state))
    write_json(config, {**asdict(cfg), "trained_on": {k: content[k] for k in ORIGIN if k in content}})


def export(file, content, cfg, state):
    """Write published weights, and beside them the configuration that load_weights finds. Raises OSError."""
    config = file.with_suffix(".config.json")
    write_published(file, config, content, cfg, state)
    said = [k for k in UNSAID if cfg.mixer == "attn" or k != "num_heads"]
    print(f"wrote {file} and {config}; keep them together: the weights alone do not say "
          + " ".join(f"--{k.replace('_', '-')} {getattr(cfg, k)}" for k in said))


def card(name, results):
    """The text of a model card with what eval.py measured."""
    lines = ["---", "library_name: pytorch", "tags: [tiny-recursive-model]", "---", f"# {name}", "",
             "Weights of a Tiny Recursive Model (arXiv 2510.04871).", "", "| measured | |", "|---|---|"]
    for metric, value in results["metrics"].items():
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        if metric in results["intervals"]:
            low, high, n, unit = results["intervals"][metric]
            text += f" (95% interval {low:.4f} .. {high:.4f} of {n:,} {unit})"
        lines.append(f"| {metric} | {text} |")
    data = results["about"]["data"]
    return "\n".join([*lines, "", f"Measured by `python eval.py --hf {name} --data {data}`.", ""])


def push(name, path, content, cfg, state, averaged):
    """Upload published weights, their configuration, what eval.py measured and a card. Raises UserError."""
    from huggingface_hub import HfApi
    file, cure = path.with_name("results.json"), f"score it first: python eval.py --checkpoint {path.parent}"
    results = read_json(file, cure, dict)
    scored = results.get("about", {}).get("checkpoint", "nothing")
    if not scored.endswith(f"{path.name}, {'averaged' if averaged else 'last'} weights"):
        raise UserError(f"{file} is of {scored}, not of {path.name}; {cure}")
    try:
        with tempfile.TemporaryDirectory() as tmp:
            write_published(Path(tmp, path.stem), Path(tmp, "config.json"), content, cfg, state)
            write_json(Path(tmp, "results.json"), results)
            Path(tmp, "README.md").write_text(card(name, results))
            HfApi().create_repo(name, exist_ok=True)
            HfApi().upload_folder(repo_id=name, folder_path=tmp, commit_message="Weights and measured result")
    except Exception as e:
        raise UserError(f"cannot push to {name}: {one_line(e)}; log in with `hf auth login`") from None
    print(f"pushed to {name}")


def flags():
    parser = Parser(__doc__)
    parser.usage = "%(prog)s export|push RUN FILE|OWNER/NAME [flags]"
    add = parser.add_argument
    add("job", choices=("export", "push"), help="see above")
    add("run", metavar="RUN", help="run folder (its newest) or checkpoint file")
    add("target", metavar="FILE|OWNER/NAME", help="where to")
    add("--ema", action=argparse.BooleanOptionalAction, default=True, help="the averaged weights")
    for name in UNSAID:
        add(f"--{name.replace('_', '-')}", type=within(int, 0), metavar="N", help="of weights that lack it")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    path = find_file(args.run)
    content = load_weights(path)
    given = {k: v for k, v in vars(args).items() if k in UNSAID and v is not None}
    cfg, state = read_model(content, given, None, args.ema)
    if args.job == "export":
        export(Path(args.target), content, cfg, state)
    else:
        push(args.target, path, content, cfg, state, args.ema and content.get("ema"))


if __name__ == "__main__":
    cli(main)
