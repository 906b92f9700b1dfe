"""The shell scripts, run in a copy of the repository whose Python, uv and GPUs are stubs."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["speedrun.sh", "speedrun-inference.sh", ".ci/run"]
ALL = ["sudoku", "sudoku-att", "maze", "arc1", "arc2"]
BIG = [*ALL, "sudoku-fast", "arc1-fast", "arc2-fast"]

# Stands for the Python of the environment: says how many GPUs there are, lacks nothing, and writes every
# script that it is given to the file `calls`. A call fails when $FAILS is a part of it, or hangs with $HANGS.
PYTHON = """#!/bin/sh
case "$1 $2" in *torch.cuda*) echo ${N_GPUS:-0}; exit ;; -c*) exit ;; esac
echo "$@" >>"$CALLS"
case "$*" in *${FAILS:-nothing}*) exit 3 ;; *${HANGS:-nothing}*) exec sleep 60 ;; esac
"""
# Stands for uv: `uv venv ... DIR` makes a folder with the stub Python.
UV = """#!/bin/sh
[ "$1" = --version ] && exit
echo "uv $* links=$UV_FIND_LINKS" >>"$CALLS"
case "$*" in *${FAILS:-nothing}*) exit 1 ;; esac
for last; do :; done
case "$1" in venv) mkdir -p "$last/bin" && cp "$STUB" "$last/bin/python" ;; esac
"""
# Stands for a system's Python that is externally managed (PEP 668): its pip may only fill folders.
MANAGED = """#!/bin/sh
[ "$*" = "-m pip install --target .uv uv" ] && mkdir -p .uv/bin && cp "$UV_STUB" .uv/bin/uv
"""
CURL = """#!/bin/sh
echo 'mkdir -p "$UV_INSTALL_DIR" && cp "$UV_STUB" "$UV_INSTALL_DIR/uv"'
"""


def executable(path, text="#!/bin/sh\nexit 1\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Copy:
    """A copy of the scripts. Called with a command it returns (exit code, output), and sets `calls`."""

    def __init__(self, folder):
        self.folder, self.bin, self.file = folder / "repo", folder / "bin", folder / "calls"
        self.venv = self.folder / ".venv"
        for name in (*SCRIPTS, "requirements.txt"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        self.python = executable(folder / "python", PYTHON)
        executable(self.bin / "uv", UV)
        self.env = dict(PATH=f"{self.bin}:/usr/bin:/bin", HOME=str(folder), TRM_PYTHON=str(self.python),
                        CALLS=str(self.file), STUB=str(self.python))

    def start(self, *command, **env):
        """In a process group of its own, which Ctrl-C reaches, whatever started these tests."""
        self.file.write_text("")
        return subprocess.Popen(command, cwd=self.folder, env={**self.env, **env}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def __call__(self, *command, **env):
        process = self.start(*command, **env)
        out = process.communicate(timeout=60)[0]
        self.calls = self.file.read_text().splitlines()
        return process.returncode, out

    def setup(self, **env):
        return self("./speedrun.sh", "setup", **{"TRM_PYTHON": "", **env})


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def test_scripts_parse_and_may_be_run():
    for script in SCRIPTS:
        assert os.access(ROOT / script, os.X_OK), f"{script} has no run bit"
        subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_help_is_one_screen(copy, script):
    code, out = copy("bash", script, "-h")
    lines = out.splitlines()
    assert code == 0 and 5 < len(lines) <= 40 and max(map(len, lines)) <= 80 and copy.calls == [], out


@pytest.mark.parametrize("command", ["speedrun.sh nonsense", "speedrun.sh --lr 1",
                                     "speedrun-inference.sh arc2", "speedrun-inference.sh"])
def test_unknown_job(copy, command):
    code, out = copy("bash", *command.split())
    assert code == 2 and out.startswith("error: unknown job") and out.count("\n") == 1, out


def test_jobs_are_presets_with_a_dataset():
    from prepare import KNOWN
    from train import PRESETS
    assert set(PRESETS) == {"mini", "mini-maze", "mini-arc", *BIG}
    assert {job.rpartition("-")[0] or job for job in BIG} <= set(KNOWN)


# ---------------------------------------------------------------------------------------------
# Setup

def test_trm_python(copy):
    """A Python that has torch is used as it is."""
    assert copy.setup(TRM_PYTHON=sys.executable)[0] == 0 and copy.calls == [] and not copy.venv.exists()
    code, out = copy("./speedrun.sh", TRM_PYTHON="/nowhere/python")
    assert code == 2 and out.startswith("error: TRM_PYTHON=/nowhere/python does not run"), out


def test_venv_by_uv(copy):
    """PyTorch's index, else the plain one; a second start does nothing; new requirements go over the old."""
    env = {"PIP_FIND_LINKS": "/a /b", "FAILS": "--torch-backend"}
    code, out = copy.setup(**env)
    venv, first, second = copy.calls
    assert code == 0 and venv.startswith("uv venv ") and "now without it" in out, out
    assert "--torch-backend=auto" in first and "--torch-backend" not in second, copy.calls
    assert all("-r requirements.txt" in c and c.endswith("links=/a,/b") for c in (first, second)), copy.calls
    assert copy.setup(**env)[0] == 0 and copy.calls == []
    (copy.folder / "requirements.txt").write_text("torch==2.13.0\n")
    assert copy.setup()[0] == 0 and len(copy.calls) == 1 and "install" in copy.calls[0], copy.calls


def test_venv_that_is_half_made_is_filled_and_a_broken_one_made_anew(copy):
    assert copy.setup(FAILS="venv")[0] != 0
    code, out = copy.setup(FAILS="install")
    assert code == 2 and "error: requirements.txt cannot be installed" in out, out
    (copy.venv / "extra").touch()
    assert copy.setup()[0] == 0 and len(copy.calls) == 1 and "install" in copy.calls[0], copy.calls
    assert copy.setup()[0] == 0 and copy.calls == []
    executable(copy.venv / "bin" / "python")
    assert copy.setup()[0] == 0 and "uv venv" in copy.calls[0] and not (copy.venv / "extra").exists()


def test_no_uv(copy):
    """It comes by pip into the folder .uv, as an externally managed Python allows; else from its makers."""
    copy.env["UV_STUB"] = str((copy.bin / "uv").rename(copy.bin / "working-uv"))
    for name in ("uv", "curl", "python3"):  # none of this machine's own is found
        executable(copy.bin / name)
    code, out = copy.setup()
    assert code == 2 and "error: uv cannot be installed" in out, out
    for name, text in (("curl", CURL), ("python3", MANAGED)):
        shutil.rmtree(copy.folder / ".uv")
        shutil.rmtree(copy.venv, ignore_errors=True)
        executable(copy.bin / "curl")
        executable(copy.bin / name, text)
        code, out = copy.setup()
        assert code == 0 and "installing uv into .uv" in out and "uv pip install" in copy.calls[-1], out


# ---------------------------------------------------------------------------------------------
# Jobs

RUN = r"runs/\S+-\d{8}-\d{6}"


BASELINES = f"baselines.py data/arc-6x6-mini data/arc-6x6-mini-tune --checkpoint {RUN}"


def trains(preset, flags=""):
    return f"train.py --preset {preset} --run-dir {RUN}{flags}"


@pytest.mark.parametrize("words, calls", [
    ([], [trains("mini")]),
    (["mini", "--seed", "3"], [trains("mini", " --seed 3")]),
    (["mini-maze", "--run-dir", "runs/a"],
     ["train.py --preset mini-maze --run-dir runs/a", "solve.py --checkpoint runs/a"]),
    (["mini-arc", "--source", "arc", "--seed", "1"],
     ["-m prepare mini-arc mini-arc-tune --source=arc", trains("mini-arc", " --seed 1"),
      BASELINES]),
    (["minis", "--source", "arc", "--seed", "1"],
     [trains("mini", " --seed 1"), trains("mini-maze", " --seed 1"),
      f"solve.py --checkpoint {RUN}", "-m prepare mini-arc mini-arc-tune --source=arc",
      trains("mini-arc", " --seed 1"),
      BASELINES,
      f"results.py {RUN} {RUN} {RUN}"]),
    (["test", "-x"], ["-m pytest -q tests -x"])], ids=str)
def test_small_jobs_and_flags_that_are_passed_on(copy, words, calls):
    code, out = copy("./speedrun.sh", *words)
    assert code == 0 and len(copy.calls) == len(calls), (out, copy.calls)
    for made, wanted in zip(copy.calls, calls):
        assert re.fullmatch(wanted, made) and f"+ {copy.python} {made}\n" in out, (made, wanted)


@pytest.mark.parametrize("preset", BIG)
def test_big_job(copy, preset):
    build, run = f"-m prepare {preset.partition('-')[0]}", f"--resume --run-dir runs/speedrun-{preset}"
    one_gpu = f"train.py --preset {preset} {run} --global-batch-size 768 --lr 1e-4"
    copy("./speedrun.sh", preset)
    assert copy.calls == [one_gpu], "no GPU: train.py says so before a dataset is built"
    copy("./speedrun.sh", preset, "--allow-cpu")
    assert copy.calls == [build, f"{one_gpu} --allow-cpu"]
    copy("./speedrun.sh", preset, "--lr", "3e-4", N_GPUS="1")
    assert copy.calls == [build, f"{one_gpu} --lr 3e-4"], "the user's flags come last"
    copy("./speedrun.sh", preset, "--seed", "3", N_GPUS="8")
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=8"
    assert copy.calls == [build, f"{torchrun} train.py --preset {preset} {run} --seed 3"]


def test_all_and_a_stage_that_fails(copy):
    assert copy("./speedrun.sh", "all", N_GPUS="8")[0] == 0
    assert [c.split("--preset ")[1].split()[0] for c in copy.calls if "train.py" in c] == ALL
    code, out = copy("./speedrun.sh", "all", N_GPUS="8", FAILS="train.py")
    assert code == 3 and len(copy.calls) == 2, out
    code, out = copy("./speedrun.sh", "arc1", N_GPUS="1", FAILS="prepare")
    assert code == 3 and copy.calls == ["-m prepare arc1"], out


def test_inference(copy):
    expected = []
    for job, repo in {"arc1": "arc-agi-1", "maze": "maze", "sudoku": "sudoku"}.items():
        score = f"eval.py --hf alphaXiv/trm-model-{repo} --output runs/inference-{job} --limit 64"
        expected += [f"-m prepare {job}", f"-m torch.distributed.run --standalone --nproc_per_node=2 {score}"]
    code, out = copy("./speedrun-inference.sh", "all", "--limit", "64", N_GPUS="2")
    assert code == 0 and copy.calls == expected, out
    code, out = copy("./speedrun-inference.sh", "maze")
    assert copy.calls[1:] == ["eval.py --hf alphaXiv/trm-model-maze --output runs/inference-maze"], out


def test_ctrl_c_ends_the_script(copy):
    """Not only the stage that runs."""
    process = copy.start("./speedrun.sh", "all", N_GPUS="8", HANGS="preset maze")
    deadline = time.monotonic() + 30
    while "preset maze" not in copy.file.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130 and "arc1" not in copy.file.read_text()


def test_ci(copy):
    """The style, the tests, mini; eval.py decides whether it has learned."""
    calls = ["-m ruff check .", "-m pytest -q tests", "train.py --preset mini --run-dir runs/ci",
             "eval.py --checkpoint runs/ci --min-exact 0.97"]
    code, out = copy(".ci/run")
    assert code == 0 and copy.calls == calls, out
    for n, call in enumerate(calls):
        assert copy(".ci/run", FAILS=call)[0] == 3 and copy.calls == calls[:n + 1]
