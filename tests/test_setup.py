"""speedrun.sh and speedrun-inference.sh, run in a copy of the repository whose Python, uv and GPUs are stubs."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIG = ["sudoku", "sudoku-att", "maze", "arc1", "arc2"]
SYSTEM = "/usr/bin:/bin"
DATASETS = ["sudoku-extreme-1k-aug-1000", "maze-30x30-hard-1k", "arc1concept-aug-1000", "arc2concept-aug-1000"]

# Stands for the Python of the environment: says how many GPUs there are and what it lacks, runs the small programs in
# speedrun.sh for real, and writes every script that it is given to the file `calls`.
PYTHON = """#!/bin/sh
case "$1 $2" in
  *torch.cuda*) echo ${N_GPUS:-0} ;;
  *metadata*) printf '%s' "$LACKS" ;;
  -c*) exec REAL "$@" ;;
  *) echo "$@" >>"$CALLS"; exit ${EXIT:-0} ;;
esac
"""
# Stands for uv: `uv venv ... DIR` makes a folder with the stub Python, `uv pip install` fails where $UV_FAILS says so.
UV = """#!/bin/sh
echo "uv $* links=$UV_FIND_LINKS" >>"$CALLS"
case "$*" in *${UV_FAILS:-nothing}*) exit 1 ;; esac
for last; do :; done
case "$1" in venv) mkdir -p "$last/bin" && cp "$STUB" "$last/bin/python" ;; esac
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("REAL", sys.executable))
    path.chmod(0o755)
    return path


class Copy:
    """A copy of the scripts. Called with a command line it returns (exit code, stdout + stderr), and sets `calls`."""

    def __init__(self, folder):
        self.folder, self.bin = folder / "repo", folder / "bin"
        self.folder.mkdir()
        for name in ("speedrun.sh", "speedrun-inference.sh", "requirements.txt"):
            shutil.copy(ROOT / name, self.folder)
        self.python = executable(folder / "stub" / "python", PYTHON)
        for name in DATASETS:
            self.write(f"data/{name}/recipe.json", "{}")

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def __call__(self, *command, **env):
        calls = self.folder / "calls"
        calls.write_text("")
        env = {"PATH": f"{self.bin}:{SYSTEM}", "HOME": str(self.folder), "CALLS": str(calls), "STUB": str(self.python),
               "TRM_PYTHON": str(self.python), **env}
        r = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=60)
        self.calls = calls.read_text().splitlines()
        return r.returncode, r.stdout + r.stderr


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


@pytest.mark.parametrize("script", ["speedrun.sh", "speedrun-inference.sh", ".ci/run"])
def test_parses_and_may_be_run(script):
    assert os.access(ROOT / script, os.X_OK), f"{script} has no run bit"
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", ["./speedrun.sh", "./speedrun-inference.sh"])
def test_help_is_one_screen(copy, script):
    code, out = copy(script, "--help")
    lines = out.splitlines()
    assert code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 80, out
    assert copy.calls == []


@pytest.mark.parametrize("command", [["./speedrun.sh", "nonsense"], ["./speedrun.sh", "--lr", "1"],
                                     ["./speedrun-inference.sh", "arc2"], ["./speedrun-inference.sh"]])
def test_unknown_job(copy, command):
    code, out = copy(*command)
    assert code == 2 and out.startswith("error: unknown job") and out.count("\n") == 1, out


def test_jobs_are_the_presets_of_train():
    from train import PRESETS
    assert set(PRESETS) == {"mini", *BIG}


# ---------------------------------------------------------------------------------------------
# Setup

def test_own_environment_is_used_as_it_is(copy):
    """The very Python that runs this test: nothing is installed, and requirements.txt is met by its metadata."""
    code, out = copy("./speedrun.sh", "setup", TRM_PYTHON=sys.executable)
    assert code == 0 and f"using {sys.executable}" in out and "== setup: " in out, out
    assert not (copy.folder / ".venv").exists()


def test_active_environment(copy):
    copy.bin.mkdir()
    env = {"TRM_PYTHON": "", "VIRTUAL_ENV": str(copy.bin.parent / "active")}
    executable(copy.bin.parent / "active" / "bin" / "python", PYTHON)
    code, out = copy("./speedrun.sh", "setup", **env)
    assert code == 0 and "active/bin/python" in out and copy.calls == [], out
    code, out = copy("./speedrun.sh", "setup", LACKS="numpy tqdm ", **env)
    assert code == 2 and "lacks numpy tqdm; run:" in out and copy.calls == [], out
    executable(copy.bin / "uv", UV)
    code, out = copy("./speedrun.sh", "setup", LACKS="torch tqdm ", **env)
    assert code == 0 and "not using the active" in out and any("--torch-backend=auto" in c for c in copy.calls), out


def test_trm_python_that_cannot_be_used(copy):
    for env in ({"LACKS": "torch numpy "}, {"TRM_PYTHON": "/nowhere/python"}):
        code, out = copy("./speedrun.sh", "setup", **env)
        assert code == 2 and out.startswith("error: TRM_PYTHON=") and out.count("error") == 1, out


def test_what_an_environment_lacks_is_told_by_name(copy):
    """requirements.txt with another pin and with an unknown package, read with this Python's real metadata."""
    text = (ROOT / "requirements.txt").read_text()
    copy.write("requirements.txt", text + "no_such_package_here>=1\n")
    code, out = copy("./speedrun.sh", "setup", TRM_PYTHON=sys.executable)
    assert code == 2 and "has the right torch but lacks no_such_package_here; run:" in out, out
    copy.write("requirements.txt", text.replace("torch==2", "torch==1"))
    code, out = copy("./speedrun.sh", "setup", TRM_PYTHON=sys.executable)
    assert code == 2 and "lacks the pinned torch" in out, out


def test_venv_by_uv(copy):
    """PyTorch's index, then the plain one; a second start does nothing; a new requirements.txt is installed over it; a
    half-made .venv is made anew, one that the user made is not."""
    executable(copy.bin / "uv", UV)
    env = {"TRM_PYTHON": "", "PIP_FIND_LINKS": "/a /b", "UV_FAILS": "--torch-backend"}
    code, out = copy("./speedrun.sh", "setup", **env)
    assert code == 0 and "now without it" in out, out
    venv, first, second = copy.calls[1:]  # after uv --version
    assert "uv venv" in venv and "--torch-backend=auto" in first and "--torch-backend" not in second, copy.calls
    assert all("-r requirements.txt" in c and c.endswith("links=/a,/b") for c in (first, second)), copy.calls

    code, out = copy("./speedrun.sh", "setup", **env)
    assert code == 0 and "using .venv" in out and copy.calls == [], out

    extra = copy.folder / ".venv" / "extra"
    extra.touch()
    copy.write("requirements.txt", "torch==2.13.0\n")
    code, out = copy("./speedrun.sh", "setup", **env)
    assert code == 0 and extra.exists() and not any("uv venv" in c for c in copy.calls), out

    stamp = copy.folder / ".venv" / ".requirements"
    stamp.unlink()
    assert copy("./speedrun.sh", "setup", **env)[0] == 0 and extra.exists() and stamp.exists(), "the user's .venv"
    stamp.write_text("")
    code, out = copy("./speedrun.sh", "setup", **env)
    assert code == 0 and "half made" in out and not extra.exists() and any("uv venv" in c for c in copy.calls), out


def test_install_that_fails_is_not_taken_for_done(copy):
    executable(copy.bin / "uv", UV)
    executable(copy.bin / "python3", '#!/bin/sh\necho "python3 $*" >>"$CALLS"\n[ "$1" != -c ] || echo python3\n')
    code, out = copy("./speedrun.sh", "setup", TRM_PYTHON="", UV_FAILS="install", EXIT="1")
    assert code == 2 and "error: no way worked" in out, out
    assert "python3 -m venv .venv" in copy.calls, "pip is the last way"
    code, out = copy("./speedrun.sh", "setup", TRM_PYTHON="")
    assert code == 0 and "half made" in out, out


def test_pip_is_the_last_way(copy):
    """No uv to be had: python3 -m venv, then pip."""
    executable(copy.bin / "python3", """#!/bin/sh
case "$*" in
  -c*) echo "$0" ;;
  *uv*) exit 1 ;;
  "-m venv .venv") echo "python3 $*" >>"$CALLS"; mkdir -p .venv/bin && cp "$STUB" .venv/bin/python ;;
esac
""")
    for name in ("uv", "curl"):
        executable(copy.bin / name, "#!/bin/sh\nexit 1\n")
    code, out = copy("./speedrun.sh", "setup", TRM_PYTHON="")
    assert code == 0 and "uv cannot be installed" in out, out
    assert copy.calls == ["python3 -m venv .venv", "-m pip install -r requirements.txt"]
    assert ("CUDA, 3 GB" in out) == (not shutil.which("nvidia-smi", path=SYSTEM)), "no GPU and no local wheel is told"
    assert "using .venv" in copy("./speedrun.sh", "setup", TRM_PYTHON="")[1]


# ---------------------------------------------------------------------------------------------
# Jobs

def test_mini_is_the_default_and_flags_are_passed_on(copy):
    assert copy("./speedrun.sh")[0] == 0 and copy.calls == ["train.py --preset mini"]
    assert copy("./speedrun.sh", "mini", "--seed", "3")[0] == 0 and copy.calls == ["train.py --preset mini --seed 3"]
    assert copy("./speedrun.sh", "test", "-x")[0] == 0 and copy.calls == ["-m pytest -q tests -x"]
    code, out = copy("./speedrun.sh", "setup", "--seed", "3")
    assert code == 0 and copy.calls == []


@pytest.mark.parametrize("preset", BIG)
def test_big_job(copy, preset):
    shutil.rmtree(copy.folder / "data")
    code, out = copy("./speedrun.sh", preset)
    assert code == 0 and "train.py" in copy.calls[0], "no GPU: train.py says so before a dataset is built"
    code, out = copy("./speedrun.sh", preset, "--allow-cpu")
    assert code == 0 and copy.calls[0].startswith("prepare/"), out
    code, out = copy("./speedrun.sh", preset, "--lr", "3e-4", N_GPUS="8")
    build, train = copy.calls
    flags = f"train.py --preset {preset} --run-dir runs/speedrun-{preset} --lr 3e-4"
    assert code == 0 and train == f"-m torch.distributed.run --standalone --nproc_per_node=8 {flags}", out
    folder = build.split()[-1]
    assert folder in [f"data/{name}" for name in DATASETS], build
    r = subprocess.run([sys.executable, *build.split(), "--source", "no"], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 2 and "unrecognized" not in r.stderr, "the real script knows these flags: " + r.stderr
    copy.write(f"{folder}/recipe.json", "{}")
    code, out = copy("./speedrun.sh", preset, N_GPUS="1")
    one_gpu = f"train.py --preset {preset} --global-batch-size 768 --lr 1e-4"
    assert copy.calls == [f"{one_gpu} --run-dir runs/speedrun-{preset}"], "one GPU"
    copy("./speedrun.sh", preset, "--lr", "3e-4", "--run-dir", "runs/mine", N_GPUS="1")
    assert copy.calls == [f"{one_gpu} --lr 3e-4 --run-dir runs/mine"], "the user's flags come last"


def test_finished_is_skipped_and_stopped_is_resumed(copy):
    start = '{"event": "start", "step": 0}\n'
    result = '{"event": "result", "step": 9, "finished": %s, "line": "RESULT %s"}\n'
    for job, log in {"sudoku": start + result % ("true", "of sudoku"),
                     "sudoku-att": start + result % ("false", "of a part"),  # stopped by --max-steps
                     "maze": start + result % ("true", "of maze") + '{"torn',
                     "arc1": start}.items():
        copy.write(f"runs/speedrun-{job}/log.jsonl", log)
        if job != "arc1":  # it was stopped before its first checkpoint
            copy.write(f"runs/speedrun-{job}/latest.txt", "step_00000005.ckpt")
    code, out = copy("./speedrun.sh", "all", "--seed", "3", N_GPUS="8")
    assert code == 0 and [c.split("train.py --preset ")[1] for c in copy.calls] == [
        "sudoku-att --resume runs/speedrun-sudoku-att --seed 3", "maze --resume runs/speedrun-maze --seed 3",
        "arc1 --run-dir runs/speedrun-arc1 --seed 3", "arc2 --run-dir runs/speedrun-arc2 --seed 3"], copy.calls
    assert [line for line in out.splitlines() if "RESULT" in line] == [
        "RESULT of sudoku", "RESULT of sudoku", "RESULT of a part"], out  # the first in its turn, all at the end
    copy("./speedrun.sh", "maze", N_GPUS="1")
    assert copy.calls == ["train.py --preset maze --resume runs/speedrun-maze"], "a resumed run keeps its batch size"
    copy("./speedrun.sh", "sudoku", "--run-dir", "runs/again", N_GPUS="8")
    assert copy.calls[0].endswith("train.py --preset sudoku --run-dir runs/again"), "the user's own run folder"


def test_a_stage_that_fails_ends_the_script_with_its_code(copy):
    code, out = copy("./speedrun.sh", "all", EXIT="3")
    assert code == 3 and len(copy.calls) == 1, out
    shutil.rmtree(copy.folder / "data")
    code, out = copy("./speedrun.sh", "arc1", EXIT="2", N_GPUS="1")
    assert code == 2 and len(copy.calls) == 1 and copy.calls[0].startswith("prepare/arc.py"), out


def test_inference(copy):
    shutil.rmtree(copy.folder / "data" / "maze-30x30-hard-1k")
    code, out = copy("./speedrun-inference.sh", "all", "--limit", "64", N_GPUS="2")
    repos = {"arc1": "trm-model-arc-agi-1", "maze": "trm-model-maze", "sudoku": "trm-model-sudoku"}
    scores = [f"-m torch.distributed.run --standalone --nproc_per_node=2 eval.py --hf alphaXiv/{repo} "
              f"--output runs/inference-{job} --limit 64" for job, repo in repos.items()]
    build = "prepare/maze.py --output-dir data/maze-30x30-hard-1k"
    assert code == 0 and copy.calls == [scores[0], build, *scores[1:]], copy.calls
    assert [line for line in out.splitlines() if "results:" in line] == [f"results: runs/inference-{j}" for j in repos]
    assert copy("./speedrun-inference.sh", "maze")[0] == 0
    assert copy.calls[-1] == "eval.py --hf alphaXiv/trm-model-maze --output runs/inference-maze"


# ---------------------------------------------------------------------------------------------
# CI

@pytest.mark.parametrize("line, code", [("exact_acc=0.9700 cell_acc=0.99", 0), ("exact_acc=0.9699 cell_acc=0.99", 1),
                                        ("exact_acc=nan cell_acc=nan", 1), (None, 1)])
def test_ci_fails_when_mini_does_not_learn(tmp_path, line, code):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    result = f"RESULT preset=mini {line}" if line else "no result"
    executable(tmp_path / "speedrun.sh", f'#!/bin/sh\n[ "$1" = test ] || echo "{result}"\n')
    assert subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, timeout=60).returncode == code
