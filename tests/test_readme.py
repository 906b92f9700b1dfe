"""The commands of README.md and REPORT.md: their scripts understand them, and run them at a tiny size."""

import importlib
import json
import re
import shlex
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
import eval as scoring
import hub
import prepare
import solve
import train
from model import TRM, Batch, Config
from runs import ROOT, arc_dir, arc_model, go, save_run, sudoku_dir, without_curves

DOCUMENTS = ("README.md", "REPORT.md")
SCRIPTS = (
    "train.py",
    "eval.py",
    "solve.py",
    "draw.py",
    "hub.py",
    "bench.py",
    "results.py",
    "baselines.py",
    "prepare/sudoku.py",
    "prepare/maze.py",
    "prepare/arc.py",
)
OTHERS = {"uv", "source", "pip", "git", "cd", "wandb"}  # commands that are not ours
FOREIGN = {"--torch-backend", "--compile-bytecode", "--max-restarts", "--nproc_per_node", "--slow"}


def module_of(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def shown_commands():
    """[(document, command)]: every line of their bash blocks, split at &&."""
    found = []
    for name in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split(" #")[0].strip()
                if line and not line.startswith("#"):
                    found += [(name, part.strip()) for part in line.split("&&")]
    return found


def words_of(command):
    """Its words without the environment in front."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


def script_of(command):
    """(script, its arguments) of a command that runs one of ours, else (None, [])."""
    words = words_of(command)
    at = next((i for i, word in enumerate(words) if word in SCRIPTS), None)
    return (None, []) if at is None else (words[at], words[at + 1 :])


def jobs_of(script):
    """Those that a shell script takes: a list in its text, and "all" of them."""
    return {*re.search(r'(?:jobs|presets)="([^"]*)"', (ROOT / script).read_text())[1].split(), "all"}


COMMANDS = shown_commands()


@pytest.mark.parametrize("document, command", COMMANDS, ids=lambda v: v[:70])
def test_command_is_understood(document, command):
    words, (script, arguments) = words_of(command), script_of(command)
    if words[0] in ("./speedrun.sh", "./speedrun-inference.sh"):
        inference, job = "inference" in words[0], [*words, "mini"][1]
        assert job in jobs_of(words[0]), f"{document}: {command}"
        if job not in ("test", "setup"):
            module_of("eval.py" if inference else "train.py").flags().parse_args(words[2:])
    elif script:
        assert words[0] in ("python", "torchrun"), f"{document}: {command}"
        module_of(script).flags().parse_args(arguments)
    elif words[:3] == ["python", "-m", "prepare"]:
        names = prepare.flags().parse_args(words[3:]).names
        assert set(names) <= set(prepare.KNOWN), f"{document}: {command}"
    else:
        files = [word for word in words if word.endswith(".py")]
        assert words[0] in OTHERS or words[0] == "python" and files, f"{document}: who parses {command!r}?"
        assert all((ROOT / file).exists() for file in files), f"{document}: {command}"


# ---------------------------------------------------------------------------------------------
# Each command once more, at a tiny size

TINY_RUN = (
    "--hidden-size 32 --puzzle-emb-ndim 32 --num-layers 1 --H-cycles 1 --L-cycles 1 "
    "--halt-max-steps 2 --global-batch-size 8 --epochs 1 --eval-interval 1 --dtype float32"
).split()
HERE = ["--device", "cpu", "--no-compile"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folders of a run that was stopped half-way, and of one on ARC, both scored."""
    place = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        without_curves(patch)
        boards = sudoku_dir(place / "boards")
        half = ["--epochs", 2, "--max-steps", 1]
        go("--data", boards, "--run-dir", place / "run", *TINY_RUN, *half, *HERE)
        split = data.Split(arc_dir(place), "test")
        save_run(place / "arc", split, arc_model(split))
        for run in ("run", "arc"):
            scoring.main(["--checkpoint", str(place / run), "--batch-size", "16", *HERE])
    return {"sudoku": place / "run", "arc": place / "arc", "boards": boards}


@pytest.fixture
def place(tmp_path, monkeypatch, trained):
    """A working directory with a run of mini in it. Presets are tiny; no network, no measuring of peaks."""

    def fetch(name, world):
        assert name in hub.KNOWN, f"the hub has no {name}"
        return trained["sudoku"] / "step_00000001.ckpt", {}, None

    monkeypatch.chdir(tmp_path)
    without_curves(monkeypatch)
    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(common, "matmul_peak", lambda *args: 1e12)
    for name, preset in train.PRESETS.items():
        tiny = dict(hidden_size=32, num_heads=1, puzzle_emb_ndim=32, num_layers=1, H_cycles=1, L_cycles=1)
        monkeypatch.setitem(train.PRESETS, name, {**preset, **tiny})
    shutil.copytree(trained["sudoku"], "runs/mini-20260101-000000")
    return tmp_path


def make_data(folder, boards):
    """A dataset of the kind that its name says."""
    rng = np.random.default_rng(0)
    if "numbers" in folder:
        inputs, targets = rng.standard_normal((2, 16, 5, 3))
        arrays = inputs, targets, np.ones((16, 5), bool)
        data.write_dataset(folder, {"train": arrays, "test": arrays})
    elif "latents" in folder:
        for split in ("train", "test"):
            latents = Path(folder, split, "latents")
            latents.mkdir(parents=True)
            for i in range(8):
                np.savez(latents / f"episode_{i:03}.npz", latents=rng.standard_normal((70, 2)))
    else:
        shutil.copytree(boards.parent / "built" if "arc" in folder else boards, folder)


def arguments_here(script, arguments, trained):
    """The arguments, shrunk; what they name is made in the working directory."""
    args = module_of(script).flags().parse_args(arguments)
    if script == "train.py":
        return train_here(args, arguments, trained)
    if script == "bench.py" and not args.votes:
        return [*arguments, "--rows", "1", "--steps", "1", *HERE]
    if script == "bench.py":
        shutil.copytree(trained["arc"].parent / "built", args.votes)
        return arguments
    if script == "baselines.py":
        for folder in args.data:
            shutil.copytree(trained["arc"].parent / "built", folder)
    if script in ("draw.py", "results.py"):
        runs = args.runs
    elif script == "hub.py":
        runs = [args.run]
    elif script == "eval.py" and args.compare:
        runs = [Path(results).parent for results in args.compare]
    else:
        runs = [args.checkpoint] if args.checkpoint else []
    arc = "arc" in str(runs) or script == "solve.py" and args.puzzle.endswith(".json")
    for run in set(runs):
        shutil.copytree(trained["arc" if arc else "sudoku"], run)
    if script == "solve.py":
        return solve_here(args, arguments, arc)
    if script == "eval.py" and not args.compare:
        return [*arguments, "--limit", "2", "--batch-size", "2", *HERE]
    return arguments


def train_here(args, arguments, trained):
    args = train.flags(**train.PRESETS[args.preset]).parse_args(arguments)
    for folder in {*args.data, *(args.data_test or [])}:
        make_data(folder, trained["boards"])
    if args.init:  # weights of a run of the same preset
        go(
            "--preset",
            args.preset,
            "--data",
            *args.data,
            "--run-dir",
            args.init,
            "--max-steps",
            1,
            *TINY_RUN,
            "--allow-cpu",
            *HERE,
        )
    if args.resume and args.resume != "newest":
        shutil.copytree(trained["sudoku"], args.resume)
    begins = not args.resume or args.run_dir
    few = ["--epochs", "8", "--eval-interval", "8"] if any("arc" in folder for folder in args.data) else []
    return [*arguments, *([*TINY_RUN, *few] if begins else []), "--allow-cpu", *HERE]


def solve_here(args, arguments, arc):
    """A task of one cell, or a 4x4 Sudoku, in place of the puzzle."""
    puzzle = "1.3...........2."
    if arc:
        pair = {"input": [[1]], "output": [[2]]}
        puzzle = args.puzzle
        Path(puzzle).write_text(json.dumps({"train": [pair, pair], "test": [pair]}))
    swapped = [puzzle if word == args.puzzle else word for word in arguments]
    return [*swapped, *(["--adapt", "1"] if args.adapt else []), "--device", "cpu"]


def runnable(command):
    """Neither a builder, which needs its sources, nor an upload."""
    script, arguments = script_of(command)
    return script and "prepare/" not in script and arguments[:1] != ["push"]


@pytest.mark.parametrize(
    "command", [*filter(runnable, dict.fromkeys(c for _, c in COMMANDS))], ids=lambda v: v[:70]
)
def test_command_runs(command, place, trained, monkeypatch):
    restarts = re.search(r"--max-restarts[= ](\d+)", command)
    if restarts:  # torchrun tells its processes
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts[1])
    script, arguments = script_of(command)
    before = set(place.rglob("*"))
    code = module_of(script).main(arguments_here(script, arguments, trained))
    assert code in (0, None) or script == "solve.py" and code == 1, code  # 1: it was not solved
    assert set(place.rglob("*")) - before


# ---------------------------------------------------------------------------------------------
# What the text says


def test_there_are_commands_of_every_script():
    shown = {script_of(command)[0] for document, command in COMMANDS if document == "README.md"}
    assert shown >= set(SCRIPTS), f"README.md shows no command of {set(SCRIPTS) - shown}"


def test_jobs_in_the_readme_are_the_presets():
    tables = re.findall(r"^\| job .*\n\|[-:| ]+\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(), re.M)
    rows = [job for table in tables for job in re.findall(r"^\| `([\w-]+)` \|", table, re.M)]
    assert set(rows) == set(train.PRESETS), rows


@pytest.mark.parametrize("script", [*SCRIPTS, "prepare"])
def test_help_is_two_screens_of_80_columns(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = module_of(script).flags().format_help().splitlines()
    assert len(lines) <= 120, len(lines)
    assert not [line for line in lines if len(line) > 80]


def test_files_and_flags_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    named = re.findall(r"`([\w./-]+\.(?:py|sh|md))`", prose) + re.findall(r"\]\(([\w./-]+)\)", prose)
    assert [name for name in named if not (ROOT / name).exists()] == []
    known = set()
    for script in SCRIPTS:
        known.update(module_of(script).flags()._option_string_actions)
    unknown = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", prose)) - known - FOREIGN
    assert not unknown, unknown


def test_names_in_the_readme_exist():
    """What README.md sets in backticks as NAME of model.py must be there."""
    text = (ROOT / "README.md").read_text()
    for method in re.findall(r"`TRM\.(\w+)`", text):
        assert callable(getattr(TRM, method, None)), f"TRM.{method}"


def test_the_worked_ablations_change_the_model():
    """replace `OLD` by `NEW`: model.py holds OLD once, and then trains as another model."""
    code = (ROOT / "model.py").read_text()
    ablations = re.findall(r"replace\s+`([^`]+)`\s+by\s+`([^`]+)`", (ROOT / "README.md").read_text())
    assert ablations
    cfg = Config(vocab_size=6, seq_len=16, hidden_size=32, num_heads=2, puzzle_emb_ndim=32, dtype="float32")
    batch = Batch(*torch.ones(2, 3, 16, dtype=torch.int32), *torch.zeros(2, 3, dtype=torch.int32))
    norms = []
    for old, new in [("", ""), *ablations]:
        assert not old or code.count(old) == 1, old
        changed = types.ModuleType("changed")
        exec(compile(code.replace(old, new) if old else code, "model.py", "exec"), vars(changed))
        model = changed.TRM(cfg, torch.Generator().manual_seed(0)).train()
        carry, logits, q = model.step(model.empty_carry(batch), batch)
        changed.act_loss(cfg, carry, logits, q)[0].backward()
        norms.append(sum(p.grad.norm().item() for p in model.parameters()))
    assert len(set(norms)) == len(norms) and np.isfinite(norms).all(), norms


def test_puzzles_in_the_readme_can_be_pasted():
    """A puzzle that is no file has as many cells as a board of some preset."""
    sizes = {prepare.KNOWN[name].shape["seq_len"] for name in ("mini", "sudoku", "maze")}
    for document, command in COMMANDS:
        script, arguments = script_of(command)
        if script == "solve.py":
            puzzle = solve.flags().parse_args(arguments).puzzle
            is_file = puzzle == "-" or puzzle.endswith((".json", ".txt"))
            assert is_file or len("".join(puzzle.split())) in sizes, f"{document}: {command}"
