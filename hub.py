"""Weights of others and for others: the published format, the hub.

    python hub.py export RUN FILE         published format, and STEM.config.json
    python hub.py push RUN OWNER/NAME     upload weights, results and a card

A published file is the state dict of the published training module. Its shapes
tell most of Config, a configuration beside it (CONFIGS) or flags the rest.
"""
import argparse
import glob
import json
import re
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import common  # noqa: F401  before torch, for a Ctrl-C while that is imported
import torch
import torch.distributed as dist
import yaml  # huggingface_hub brings it

from common import Parser, UserError, cli, one_line, read_json, write_json
from model import Config, read_config
from rundir import find_file, load_file, save_file

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
FIELDS = {f.name: f for f in fields(Config)}

# ---------------------------------------------------------------------------------------------
# The published format

PREFIX = "model.inner."
# keys under which others save their weights, the surest first
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "shadow")
NAMES = {   # ours: theirs
    "embed_tokens": "embed_tokens.embedding_weight", "embed_pos": "embed_pos.embedding_weight",
    "puzzle_emb": "puzzle_emb.weights", "y0": "H_init", "z0": "L_init", "lm_head": "lm_head.weight",
    "q_head": "q_head.weight", "q_bias": "q_head.bias"}
BLOCK_NAMES = {     # of the blocks: by the mixer, and those that all have
    "attn": {"mix_in": "self_attn.qkv_proj", "mix_out": "self_attn.o_proj"},
    "mlp": {"mix_in": "mlp_t.gate_up_proj", "mix_out": "mlp_t.down_proj"},
    "all": {"mlp_in": "mlp.gate_up_proj", "mlp_out": "mlp.down_proj"}}


def published_names(cfg):
    """{our key: published key without prefix} of all that a state dict of this model holds."""
    names = {k: v for k, v in NAMES.items() if k != "embed_pos" or cfg.pos_encodings == "learned"}
    for i in range(cfg.num_layers):
        for ours, theirs in {**BLOCK_NAMES[cfg.mixer], **BLOCK_NAMES["all"]}.items():
            names[f"blocks.{i}.{ours}"] = f"L_level.layers.{i}.{theirs}.weight"
    return names


def to_published(cfg, state):
    """Our state dict to a published one, as the compiled training module would save it."""
    names = published_names(cfg)
    return {f"_orig_mod.{PREFIX}{theirs}": state[ours].clone() for ours, theirs in names.items()}


def from_published(state, settings):
    """(Config, our float32 state dict) from a published state dict, however it is wrapped.

    settings: fields of Config that shapes do not tell, and seq_len where a dataset is known; what is assumed
    instead is said on stderr. Raises UserError for missing and unknown keys and settings that do not fit."""
    state = unwrap(state)
    try:
        cfg = config_of(state, settings)
        ours = {name: state.pop(theirs).float() for name, theirs in published_names(cfg).items()}
    except KeyError as e:
        found = ", ".join(sorted(state)[:4]) or "no tensors"
        raise UserError(f"not a published TRM checkpoint: it has no {e.args[0]}, but {found}") from None
    if state:
        raise UserError(f"the published checkpoint has unknown {', '.join(sorted(state)[:4])}")
    return cfg, ours


def unwrap(content):
    """{published key: tensor} of {"model": {"state_dict": ...}} and the like, without the prefixes of DDP,
    torch.compile, the loss head and its model."""
    while inner := next((content[k] for k in WRAPPERS if isinstance(content.get(k), dict)), None):
        content = inner
    return {re.sub(r"^((module|_orig_mod|model|inner)\.)*", "", str(key)): value
            for key, value in content.items() if isinstance(value, torch.Tensor)}


def config_of(state, settings):
    """Config of published weights: what shapes tell, then settings, then what is usual; of that, P and heads
    are said on stderr, as only a score would show that they are wrong. Raises UserError, KeyError."""
    V, D = state["embed_tokens.embedding_weight"].shape
    rows, ndim = state["puzzle_emb.weights"].shape
    mlp = state.get("L_level.layers.0.mlp_t.down_proj.weight")      # (P + S, ...)
    learned = state.get(NAMES["embed_pos"])                         # (P + S, D)
    told = {"hidden_size": D, "puzzle_emb_ndim": ndim, "mixer": "attn" if mlp is None else "mlp",
            "num_layers": len({k.split(".")[2] for k in state if k.startswith("L_level.layers.")}),
            "input_dim" if settings.get("input_dim") else "vocab_size": V}
    must_agree(told, settings)
    if not {"H_cycles", "L_cycles"} <= settings.keys():
        raise UserError("this published checkpoint does not say --H-cycles and --L-cycles; give them (3 and "
                        "6 for sudoku, 3 and 4 for maze and ARC)")
    length = next((len(table) for table in (mlp, learned) if table is not None), None)
    P, S, assumed = settings.get("puzzle_emb_len"), settings.get("seq_len"), []
    if P is None:
        P = length - S if length and S else USUAL["puzzle_emb_len"]
        if not (length and S) or P != USUAL["puzzle_emb_len"]:      # such a P may come from a wrong dataset
            assumed.append(f"{P} prefix positions (--puzzle-emb-len)")
    P = P or -(-ndim // D)      # the published code writes 0 for as many as a row of the table fills
    S = S or (length - P if length else {11: 81}.get(V, 900))
    if length not in (None, P + S) or P * D < ndim:
        raise UserError(f"{P} prefix positions and {S} cells do not fit the weights, which have "
                        f"{length or 'any'} positions and {ndim / D:g} or more of prefix; give "
                        f"--puzzle-emb-len, or their own dataset with --data")
    if mlp is None and "num_heads" not in settings:
        assumed.append(f"{USUAL['num_heads']} heads (--num-heads)")
    if assumed and not (dist.is_initialized() and dist.get_rank()):
        print(f"assumed, as neither the weights nor a configuration beside them say it: {', '.join(assumed)}",
              file=sys.stderr)
    encodings = "learned" if learned is not None else "rope" if mlp is None else "none"
    sizes = {"num_puzzles": rows, "puzzle_emb_len": P, "seq_len": S}
    return Config(**{**USUAL, "pos_encodings": encodings, **settings, **told, **sizes})


def must_agree(known, asked):
    """Refuse settings with which weights would silently be another model than the one that was trained."""
    for name in ("vocab_size", "input_dim", "mixer", "hidden_size", "num_layers", "puzzle_emb_ndim",
                 "puzzle_emb_len", "num_heads", "pos_encodings"):
        if name in known and asked.get(name, known[name]) != known[name]:
            raise UserError(f"the weights are of {name} {known[name]}, not {asked[name]}: leave that out, or "
                            f"correct the configuration beside them")


# ---------------------------------------------------------------------------------------------
# Checkpoint files of any maker

NO_WEIGHTS = {  # how files begin that are taken for weights, and what they are
    rb"$": "empty; download or save it again", rb"version .*git-lfs": "a git-lfs pointer; run `git lfs pull`",
    rb"<": "a web page; download the file itself, on the hub from /resolve/, not from /blob/"}
CONFIGS = (".hydra/config.yaml", "config.yaml", "config.yml", "config.json", "all_config.yaml",
           "{}.yaml", "{}.yml", "{}.json", "{}.config.yaml", "{}.config.json")  # {}: the file's stem


def load_weights(path):
    """Content of a checkpoint file, for read_model: of train.py as it is; of others {"state_dict": all of it,
    "config": fields of Config that lie beside it, and "trained_on" if that does}. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} not found")
    with open(path, "rb") as f:
        head = f.read(256)
    for start, what in NO_WEIGHTS.items():
        if re.match(start, head.strip()):
            raise UserError(f"{path} is no checkpoint, it is {what}")
    json_header = head[8:9] == b"{"     # after its length: a safetensors file, whatever its ending
    content = load_safetensors(path) if json_header else load_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not names and their tensors; where it is "
                        f"from, torch.save(model.state_dict(), FILE)")
    if "config" in content and "y0" in (content.get("model") or ()):
        return content
    said = beside(path)
    return {"state_dict": content, "config": settings_of(said), **said.get("trained_on", {})}


def load_safetensors(path):
    """{name: tensor}. Raises UserError."""
    try:
        from safetensors.torch import load_file as load
        return load(path)
    except Exception as e:      # of the file, or without the package
        raise UserError(f"{path} is a safetensors file (pip install safetensors), and cannot be read: "
                        f"{one_line(e)}") from None


def beside(path):
    """All that the configurations beside a checkpoint file say. Raises UserError."""
    said = {}
    for file in [path.parent / name.format(path.stem) for name in CONFIGS]:
        if file.is_file() and file != path:
            try:
                said |= (json.loads if file.suffix == ".json" else yaml.safe_load)(file.read_text()) or {}
            except (ValueError, TypeError, yaml.YAMLError) as e:
                raise UserError(f"{file} is no configuration ({one_line(e)}); move it away") from None
    return said


def settings_of(said):
    """Fields of Config in a configuration, ours or published, at any depth. Raises UserError."""
    found = {}
    for key, value in said.items():
        if isinstance(value, dict):
            found |= settings_of(value)
        elif key in FIELDS and value is not None and "${" not in str(value):    # Hydra's "as that other key"
            choices = FIELDS[key].metadata.get("choices", [value])
            if value not in choices or isinstance(value, str) != isinstance(FIELDS[key].default, str):
                raise UserError(f"the configuration beside the weights says {key} {value!r}; correct it to "
                                f"{'a number' if value in choices else ' or '.join(choices)}")
            found[key] = value
    return found


def read_model(content, settings, seq_len, ema):
    """(Config, float32 state dict) of what load_weights returned.

    settings: fields of Config that are given, over what the file and a configuration beside it say.
    seq_len: of the dataset, or None. ema: the averaged weights. Raises UserError, for NaN in weights, too."""
    said = content.get("config", {})
    must_agree(said, settings)
    if "state_dict" in content:
        cfg, state = from_published(content, {"seq_len": seq_len, **said, **settings})
    else:
        cfg = read_config(said, **settings)
        state = content["model"] | ((ema and content.get("ema")) or {})
        state = {k: v.float() for k, v in state.items()}
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{key} holds NaN or infinity; use an earlier checkpoint")
    return cfg, state


def first_weights(path, cfg, identity):
    """State dict of --init, of our checkpoints (average) or a published one. A table of other puzzles is
    replaced by its mean row. Raises UserError."""
    content = load_weights(find_file(path))
    for name in ("H_cycles", "L_cycles", "score_mod", "halt_max_steps"):    # no shape tells these
        trained = content.get("config", {}).get(name, getattr(cfg, name))
        if trained != getattr(cfg, name):
            print(f"note: {path} was trained with {name} {trained}, not {getattr(cfg, name)}",
                  file=sys.stderr)
    state = read_model(content, asdict(cfg), cfg.seq_len, ema=True)[1]
    if content.get("identity", identity) != identity or len(state["puzzle_emb"]) != cfg.num_puzzles:
        state["puzzle_emb"] = state["puzzle_emb"].mean(0).repeat(cfg.num_puzzles, 1)
    return state


# ---------------------------------------------------------------------------------------------
# The hub

WEIGHTS = re.compile(   # step_32550 has no ending
    r"(?!(readme|licen[cs]e|notice|makefile|dockerfile|optimizer|scheduler|rng_state|training_args)\b)"
    r"([^.]+|[^.].*\.(pt|pth|bin|ckpt|safetensors))", re.I)


def fetch(name, world):
    """(path, settings, dataset in prepare.KNOWN or None) of `owner/repo[/file]`; settings: what the table and
    configurations say. The files are in the cache of the hub's client. Raises UserError."""
    owner, repo, wanted = (name.split("/", 2) + ["", ""])[:3]
    if not owner or not repo:
        raise UserError(f"--hf {name} is no owner/repo or owner/repo/file; try alphaXiv/trm-model-maze")
    found = download(f"{owner}/{repo}", wanted) if world.rank == 0 else None
    folder, file = world.gather_objects(found)[0]
    key = next((k for k in KNOWN if f"{owner}/{repo}/{file}".startswith(k + "/")), None)
    T, n, dataset = KNOWN.get(key, (None, None, None))
    table = {"H_cycles": T, "L_cycles": n, **USUAL} if key else {}
    return folder / file, table | settings_of(beside(folder / file)), dataset


def download(repo, wanted):
    """(folder with files of a repository, the checkpoint file in it). Raises UserError."""
    from huggingface_hub import HfApi, snapshot_download
    try:
        files = [f.rfilename for f in HfApi().model_info(repo).siblings]    # list_repo_files retries for 23 s
        wanted = pick_file(repo, files, wanted)
        configs = [name.format(Path(wanted).stem) for name in CONFIGS]
        needed = [glob.escape(wanted), *("*" + glob.escape(name) for name in configs)]
        return Path(snapshot_download(repo, allow_patterns=needed)), wanted
    except UserError:
        raise
    except Exception as e:      # the client raises its own errors, httpx's or requests', by its version
        reason = f"cannot download from {repo} ({one_line(e)})"
    try:    # [], as we never ask for the whole repository, which the client would miss in its cache
        folder = Path(snapshot_download(repo, allow_patterns=[], local_files_only=True))
        files = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
        wanted = pick_file(repo, files, wanted)
    except Exception as e:
        raise UserError(f"{reason}, nor use the cache ({one_line(e)}); fetch the file from "
                        f"https://huggingface.co/{repo} and give it with --checkpoint") from None
    print(f"{reason}: using {folder / wanted}", file=sys.stderr)
    return folder, wanted


def pick_file(repo, files, wanted):
    """The checkpoint among the files of a repository. Raises UserError when there is not one."""
    found = [f for f in files if WEIGHTS.fullmatch(Path(f).name) and not f.startswith(".")]
    if wanted in files or len(found) == 1 and not wanted:
        return wanted or found[0]
    what = f"no file {wanted}" if wanted else f"{len(found)} checkpoint files"
    raise UserError(f"{repo} has {what}; choose one: {', '.join(f'--hf {repo}/{f}' for f in found or files)}")


# ---------------------------------------------------------------------------------------------
# Out into the world

def export(file, content, cfg, state):
    """Write published weights, and beside them what load_weights finds. Returns that file. Raises OSError."""
    config = file.with_suffix(".config.json")
    save_file(file, to_published(cfg, state))
    origin = {k: content[k] for k in ("identity", "recipe", "data", "data_test") if k in content}
    write_json(config, {**asdict(cfg), "trained_on": origin})
    return config


def push(name, path, content, cfg, state, averaged):
    """Upload published weights, their configuration, and what eval.py measured. Raises UserError."""
    from huggingface_hub import HfApi
    file, cure = path.with_name("results.json"), f"score it first: python eval.py --checkpoint {path}"
    results = read_json(file, cure, dict)
    scored, effort = results.get("about", {}).get("checkpoint", "an unknown file"), results.get("effort", {})
    if {**effort, "steps": None} != {"steps": None, "halt": None, "rollouts": 1, "noise": 0.0, "augment": 0}:
        raise UserError(f"{file} is not of a plain evaluation, which pushed weights are known by; {cure}")
    steps = f" --steps {effort['steps']}" if effort["steps"] else ""
    if not scored.endswith(f"{path.name}, {'averaged' if averaged else 'last'} weights"):
        raise UserError(f"{file} is of {scored}, not of {path.name}; {cure}")
    measured = json.dumps({k: results[k] for k in ("metrics", "intervals")}, indent=1)
    card = (f"# {name}\n\nWeights of a Tiny Recursive Model (arXiv 2510.04871), measured by `python eval.py "
            f"--hf {name} --data {results['about']['data']}{steps}`:\n\n```json\n{measured}\n```\n")
    try:
        with tempfile.TemporaryDirectory() as tmp:
            export(Path(tmp, path.stem), content, cfg, state)
            write_json(Path(tmp, "results.json"), results)
            Path(tmp, "README.md").write_text(card)
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
    for name in ("H_cycles", "L_cycles", "num_heads", "puzzle_emb_len"):
        kind = FIELDS[name].metadata["type"]
        add(f"--{name.replace('_', '-')}", type=kind, metavar="N", help="of weights that do not say it")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    path = find_file(args.run)
    content = load_weights(path)
    given = {k: v for k, v in vars(args).items() if k in FIELDS and v is not None}
    cfg, state = read_model(content, given, None, args.ema)
    if args.job == "push":
        return push(args.target, path, content, cfg, state, args.ema and content.get("ema"))
    config = export(Path(args.target), content, cfg, state)
    print(f"wrote {args.target} and {config}; keep them together, as the weights do not say all of it")
    if cfg.width_multiple % 256:
        print("only this code loads them: the published one rounds SwiGLUs up to a multiple of 256")


if __name__ == "__main__":
    cli(main)
