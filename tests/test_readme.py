"""README.md and REPORT.md: every command is valid and runs at a tiny size, and every name exists."""

import importlib
import re
import shlex
import shutil
import sys
import types
from functools import reduce
from math import isqrt
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from runs import ROOT, TINY, arc_model, go, save_run, sudoku_dir, without_curves, write_source_of_sizes
from torch.distributed.run import get_args_parser

import eval as scoring
import prepare
import train
from data import Split
from model import Batch, Config
from prepare import arc
from tools import bench, hub, solve
from tools.common import Parser

DOCUMENTS = ("README.md", "REPORT.md")
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}
PROSE = {name: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for name, text in TEXTS.items()}
WITH_FLAGS = "train eval prepare prepare.sudoku prepare.maze prepare.arc arc_baselines".split()
WITH_FLAGS += "tools.draw tools.solve tools.bench tools.hub tools.page".split()
MODULES = {*WITH_FLAGS, "own_task"}
OTHER_PROGRAMS = {"uv", "source", "pip", "git", "cd"}
OTHER_FLAGS = {"--torch-backend", "--compile-bytecode", "--max-restarts", "--nproc_per_node", "--slow"}


def find_commands():
    """[(document, command)] of bash blocks, split at &&, and of inline code; 0 replaces placeholders."""
    found = []
    for name, text in TEXTS.items():
        lines = re.findall(r"`((?:python|torchrun|\./speedrun[\w-]*\.sh) [^`]+)`", PROSE[name])
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            lines += block.replace("\\\n", " ").splitlines()
        for line in lines:
            code = re.sub(r"\b(TARGET|S)\b", "0", line.split(" #")[0].strip())
            found += [(name, command.strip()) for command in code.split("&&") if command]
    return list(dict.fromkeys(found))


COMMANDS = find_commands()


def script_of(command):
    """(one of MODULES, its arguments) of a command, or (None, []) for another program."""
    program, *words = shlex.split(command)
    if program == "torchrun":
        args = get_args_parser().parse_args(words)
        words = [*["-m"] * args.module, args.training_script, *args.training_script_args]
    elif program != "python":
        return None, []
    if words[0] == "-m":
        words.pop(0)
    module = words[0].removesuffix(".py").removeprefix("tests/").replace("/", ".")
    return (module, words[1:]) if module in MODULES else (None, [])


def parser_of(module):
    """The Parser that the main function of a module makes."""
    stop = patch.object(Parser, "parse_args", autospec=True, side_effect=SystemExit)
    with stop as parse_args, pytest.raises(SystemExit):
        importlib.import_module(module).main([])
    return parse_args.call_args.args[0]


def jobs_of(shell_script):
    """The jobs of a shell script: a list in its text, and "all"."""
    jobs = re.search(r'(?:jobs|presets)="([^"]*)"', (ROOT / shell_script).read_text())[1]
    return {*jobs.split(), "all"}


@pytest.mark.parametrize("document, command", COMMANDS, ids=lambda value: value[:70])
def test_command_is_valid(document, command):
    program, *words = shlex.split(command)
    module, arguments = script_of(command)
    if program.startswith("./speedrun"):
        job, *arguments = words or ["mini"]
        assert job in jobs_of(program)
        module = "eval" if "inference" in program else "train"
        module = {"gpu-check": "tools.bench", "test": None}.get(job, module)
    elif not module:
        files = [word for word in words if word.endswith(".py")]
        assert program in OTHER_PROGRAMS or files, "nothing checks this command"
        assert all((ROOT / file).exists() for file in files)
    if module in WITH_FLAGS:
        parser_of(module).parse_args(arguments)


# ---------------------------------------------------------------------------------------------
# Every command at a tiny size

SIZES = "hidden_size num_heads num_layers puzzle_emb_len puzzle_emb_ndim H_cycles L_cycles dtype".split()
TINY_PRESET = {"halt_max_steps": 2, **{name: getattr(TINY, name) for name in SIZES}}
SHORT = "--global-batch-size 2 --epochs 8 --eval-interval 8 --max-steps 2 --allow-cpu".split()
ON_CPU = ["--device", "cpu", "--no-compile"]
TINY_FLAGS = {
    "train": [*SHORT, *ON_CPU],
    "eval": ["--limit", "2", "--batch-size", "2", "--steps", "4", *ON_CPU],
    "tools.bench": ["--rows", "1", "--steps", "1", *ON_CPU],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of two datasets and of a run on each: boards and sudoku, grids and arc.

    Presets and batches are tiny, and nothing is downloaded, measured or plotted."""
    tmp_path = tmp_path_factory.mktemp("readme")
    folders = {name: tmp_path / name for name in ("boards", "sudoku", "grids", "arc")}
    evaluate = scoring.evaluate

    def fetch(name, world):
        assert name in hub.PUBLISHED
        return next(folders["arc" if "arc" in name else "sudoku"].glob("step_*.ckpt")), {}, None

    def evaluate_small_batches(model, split, world, batch_size, *args, **kwargs):
        return evaluate(model, split, world, min(batch_size, 2), *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        without_curves(monkeypatch)
        monkeypatch.setattr(hub, "fetch", fetch)
        monkeypatch.setattr(scoring, "evaluate", evaluate_small_batches)
        for module in (train, bench):
            monkeypatch.setattr(module, "matmul_flops", lambda *args: 1e12)
        for name, preset in train.PRESETS.items():
            monkeypatch.setitem(train.PRESETS, name, {**preset, **TINY_PRESET})
        sudoku_dir(folders["boards"])
        go("--data", folders["boards"], "--run-dir", folders["sudoku"], *SHORT, "--max-steps", 1, *ON_CPU)
        write_source_of_sizes(tmp_path, [3, 4])
        builder_flags = ["--source", str(tmp_path), "--subsets", "evaluation", "--num-aug", "0"]
        arc.main([*builder_flags, "--output-dir", str(folders["grids"])])
        split = Split(folders["grids"], "test")
        save_run(folders["arc"], split, arc_model(split))
        yield folders


def make_data(folder, trained):
    """Make a dataset of the task in the folder's name."""
    rng = np.random.default_rng(0)
    if "numbers" in folder:
        inputs, targets = rng.standard_normal((2, 16, 5, 3))
        arrays = inputs, targets, np.ones((16, 5), bool)
        prepare.write_dataset(folder, {"train": arrays, "test": arrays})
    elif "latents" in folder:
        for i in range(16):
            latents = Path(folder, "train" if i < 8 else "test", "latents")
            latents.mkdir(parents=True, exist_ok=True)
            np.savez(latents / f"episode_{i:03}.npz", latents=rng.standard_normal((70, 2)))
    else:
        shutil.copytree(trained["grids" if re.search("arc|kaggle", folder) else "boards"], folder)


def make_files(module, arguments, trained):
    """Make the datasets, runs and weights that the arguments name."""
    args = parser_of(module).parse_args(arguments)
    if module == "train" and (args.run_dir or not args.resume):
        args = train.flags(**train.PRESETS[args.preset or "mini"]).parse_args(arguments)
    for folder in [*(getattr(args, "data", None) or []), *(getattr(args, "data_test", None) or [])]:
        if not Path(folder).exists():
            make_data(folder, trained)
    is_arc = module != "train" and re.search("arc|kaggle", " ".join(arguments))
    folders = {getattr(args, name, None) for name in ("checkpoint", "resume", "run")}
    for folder in folders.union(getattr(args, "runs", [])) - {None, "newest"}:
        shutil.copytree(trained["arc" if is_arc else "sudoku"], folder)
    if getattr(args, "init", None):
        shutil.copy(trained["arc"] / "step_00000010.ckpt", args.init)


RUNNABLE = {}
for _, command in COMMANDS:
    module, arguments = script_of(command)
    # builders need their sources, and an upload needs a network
    if module and "prepare" not in module and "push" not in arguments:
        RUNNABLE[module, str(arguments)] = command


@pytest.mark.parametrize("command", RUNNABLE.values(), ids=lambda value: value[:70])
def test_command_runs(command, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained["sudoku"], "runs/mini-20260101-000000")
    module, arguments = script_of(command)
    if module in WITH_FLAGS:
        make_files(module, arguments, trained)
    arguments += TINY_FLAGS.get(module, [])
    if module == "tools.solve":  # a 4x4 Sudoku
        arguments = [re.sub(r"^[\d.]{16,}$", "1.3...........2.", word) for word in arguments]
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    restarts = re.search(r"--max-restarts[= ](\d+)", command)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts[1] if restarts else "0")  # as torchrun does
    code = importlib.import_module(module).main(arguments)
    assert not code or module == "tools.solve"  # 1: the answer is wrong
    assert capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# The text


@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_is_short(document):
    assert len(TEXTS[document].splitlines()) <= 220


def test_commands_of_every_script_are_shown():
    assert MODULES - {script_of(command)[0] for _, command in COMMANDS} == set()


def test_jobs_in_the_readme_are_the_presets():
    tables = re.findall(r"^\| job .*\n\|[-:| ]+\n((?:\|.*\n)+)", TEXTS["README.md"], re.MULTILINE)
    jobs = re.findall(r"^\| `([\w-]+)` \|", "".join(tables), re.MULTILINE)
    assert sorted(jobs) == sorted(train.PRESETS)
    assert set(jobs) <= jobs_of("speedrun.sh")


@pytest.mark.parametrize("module", WITH_FLAGS)
def test_help_fits_80_columns(module):
    lines = parser_of(module).format_help().splitlines()
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_flags_in_the_prose_exist(document):
    files = re.findall(r"`([\w./-]+\.(?:py|sh|md))`|\]\(([\w./-]+)\)", PROSE[document])
    files = {code or link for code, link in files}
    assert {file for file in files if not (ROOT / file).exists()} == set()
    flags = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", PROSE[document])) - OTHER_FLAGS
    for module in WITH_FLAGS:
        flags -= parser_of(module)._option_string_actions.keys()
    assert flags == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_the_prose_exist(document):
    """`TRM.NAME`, and `NAME` in model.py: the module has the name."""
    found = [(name, "model") for name in re.findall(r"`((?:TRM|Block|Config)\.\w+)`", PROSE[document])]
    found += re.findall(r"`([\w.]+)`(?=(?: and `[\w.]+`)? in (\w+)\.py)", PROSE[document])
    for name, module in found:
        reduce(getattr, name.split("."), importlib.import_module(module))


def test_the_worked_ablations_change_the_model():
    """Replace `OLD` by `NEW`: model.py contains OLD once, and the change trains as another model."""
    code = (ROOT / "model.py").read_text()
    ablations = re.findall(r"replace\s+`([^`]+)`\s+by\s+`([^`]+)`", TEXTS["README.md"])
    assert ablations
    cfg = Config(vocab_size=6, seq_len=16, hidden_size=32, num_heads=2, puzzle_emb_ndim=32, dtype="float32")
    boards, zeros = torch.ones(2, 3, 16, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
    batch = Batch(*boards, *zeros)
    norms = []
    for old, new in [("import math", "import math"), *ablations]:
        assert code.count(old) == 1, old
        changed = types.ModuleType("changed")
        exec(compile(code.replace(old, new), "model.py", "exec"), vars(changed))
        model = changed.TRM(cfg, torch.Generator().manual_seed(0)).train()
        carry, logits, q = model.step(model.initial_carry(batch), batch)
        changed.act_loss(cfg, carry, logits, q)[0].backward()
        without_gradient = [name for name, p in model.named_parameters() if p.grad is None]
        assert not without_gradient, new
        norms.append(sum(p.grad.norm().item() for p in model.parameters()))
    assert len(set(norms)) == len(norms) and np.isfinite(norms).all()


def test_puzzles_can_be_pasted():
    """A Sudoku in a command has the size of those that its checkpoint was trained on."""
    pasted = re.findall(r'runs/([\w-]+?)-\d[\d-]* "([\d.]+)"', TEXTS["README.md"])
    assert pasted
    for preset, puzzle in pasted:
        solve.read_puzzle(puzzle, "sudoku", isqrt(prepare.KNOWN[preset].shape["seq_len"]))
