"""Every command in README.md and REPORT.md is parsed by the parser that it will meet."""
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import eval as scoring
import train
from prepare import arc, maze, sudoku

ROOT = Path(__file__).resolve().parent.parent
PARSERS = {"train.py": train.parser, "eval.py": scoring.parser, "prepare/sudoku.py": sudoku.flags,
           "prepare/maze.py": maze.flags, "prepare/arc.py": arc.flags}
INFERENCE_JOBS = {"arc1", "maze", "sudoku", "all"}


def commands():
    found = []
    for name in ("README.md", "REPORT.md"):
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    found.append((name, line.split(" #")[0].strip()))
    return found


def speedrun_jobs():
    text = (ROOT / "speedrun.sh").read_text()
    return set(re.search(r'jobs="([^"]*setup)"', text).group(1).split()) | {"all"}


@pytest.mark.parametrize("name, command", commands(), ids=lambda v: v[:70])
def test_command_is_understood(name, command):
    for part in command.split("&&"):
        words = shlex.split(part)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        script = next((w for w in words if w.removeprefix("./") in PARSERS), None)
        if words[0] in ("./speedrun.sh", "./speedrun-inference.sh"):
            inference = "inference" in words[0]
            job = words[1] if len(words) > 1 else "mini"
            assert job in (INFERENCE_JOBS if inference else speedrun_jobs()), f"{name}: {command}"
            (scoring if inference else train).parser().parse_args(words[2:] if job != "test" else [])
        elif script is not None:
            assert words[0] in ("python", "torchrun"), f"{name}: {command}"
            PARSERS[script]().parse_args(words[words.index(script) + 1:])
        else:
            assert words[0] in ("uv", "source", "pip", "git", "cd", "wandb", "python", "OMP_NUM_THREADS=1"), f"{name}: who parses {command!r}?"


def test_there_are_commands_of_every_script():
    text = " ".join(c for _, c in commands())
    for script in PARSERS:
        assert script in text, f"README.md shows no command of {script}"


def test_presets_in_the_readme_are_the_real_ones():
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert set(rows) == set(train.PRESETS), rows


@pytest.mark.parametrize("make", PARSERS.values(), ids=PARSERS)
def test_help_is_one_screen_of_80_columns(make, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = make().format_help().splitlines()
    assert len(lines) <= 75 and max(map(len, lines)) <= 80, (len(lines), max(lines, key=len))


def test_names_in_the_readme_exist():
    """What README.md sets in backticks as NAME in model.py must be there."""
    text, code = (ROOT / "README.md").read_text(), (ROOT / "model.py").read_text()
    for cls, method in re.findall(r"`(TRM)\.(\w+)`", text):
        assert f"def {method}(" in code, f"{cls}.{method}"
    for line in re.findall(r"`(h = rms_norm[^`]*)`", text):
        assert line in code, line


def test_nothing_of_the_authors_machine_is_committed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.split():
        path = ROOT / name
        if path.exists() and path.suffix not in (".npz", ".png") and path.name != "test_readme.py":
            found = re.search(r"(?<![\w.$])/(root|work|home)/[a-z]", path.read_text())
            assert not found, f"{name} names {found.group()}"
