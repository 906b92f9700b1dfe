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
BIG = [*ALL, "sudoku-fast", "arc1-fast", "arc2-fast", "maze-gen"]
SMALL = ["mini", "mini-maze", "mini-arc", "sudoku-9x9"]
ONE_GPU = "--global-batch-size 768 --lr 1e-4"
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=8"

# The Python of the environment: it reports $N_GPUS GPUs and torch $TORCH, and appends every script it is
# given to the file $CALLS. A call fails if it contains $FAILS, and hangs if it contains $HANGS.
PYTHON = """#!/bin/sh
case "$1 $2" in
  *torch.cuda*) echo ${N_GPUS:-0}; exit ;;
  *version*) echo ${TORCH:-2.13.0+cpu}; exit ;;
  -c*) exit ;;
esac
echo "$@" >>"$CALLS"
case "$*" in *${FAILS:-nothing}*) exit 3 ;; *${HANGS:-nothing}*) exec sleep 60 ;; esac
"""
# uv, where `uv venv ... DIR` creates a folder with the stub Python.
UV = """#!/bin/sh
[ "$1" = --version ] && exit
echo "uv $* links=$UV_FIND_LINKS" | tee -a "$CALLS"
case "$*" in *${FAILS:-nothing}*) exit 1 ;; esac
for last; do :; done
case "$1" in venv) mkdir -p "$last/bin" && cp "$STUB" "$last/bin/python" ;; esac
"""
# An externally managed system Python (PEP 668): its pip installs into folders only.
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
    """A copy of the scripts. Call it with a command to get (exit code, output); it also sets `calls`."""

    def __init__(self, folder):
        self.folder, self.bin, self.file = folder / "repo", folder / "bin", folder / "calls"
        self.venv = self.folder / ".venv"
        for name in (*SCRIPTS, "requirements.txt"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        self.python = executable(folder / "python", PYTHON)
        executable(self.bin / "uv", UV)
        self.env = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(folder), "CALLS": str(self.file)}
        self.env |= {"TRM_PYTHON": str(self.python), "STUB": str(self.python)}

    def start(self, *command, **env):
        """In a process group of its own, so that Ctrl-C reaches it wherever these tests were started."""
        self.file.write_text("")
        options = {"cwd": self.folder, "env": {**self.env, **env}, "text": True, "start_new_session": True}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, **options)

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


WRONG = {
    "speedrun.sh nonsense": "unknown job 'nonsense'",
    "speedrun.sh --lr 1": "unknown job '--lr'",
    "speedrun.sh minis --run-dir a": "--run-dir is a folder for one run",
    "speedrun.sh all --run-dir=a": "--run-dir is a folder for one run",
    "speedrun-inference.sh": "unknown job ''",
    "speedrun-inference.sh arc2": "unknown job 'arc2'",
    "speedrun-inference.sh all --output=a": "--output is a folder for one job",
}


def test_help_and_wrong_commands(copy):
    for script in SCRIPTS[:2]:
        code, out = copy(f"./{script}", "-h")
        lines = out.splitlines()
        assert code == 0 and 5 < len(lines) <= 40 and max(map(len, lines)) <= 80 and copy.calls == [], out
    for command, message in WRONG.items():
        code, out = copy("bash", *command.split())
        assert code == 2 and out.startswith(f"error: {message}") and out.count("\n") == 1, out
        assert copy.calls == []


def test_every_preset_is_a_job_with_a_dataset():
    from prepare import KNOWN
    from train import PRESETS

    assert set(PRESETS) == {*SMALL, *BIG}
    assert {job.removesuffix("-att").removesuffix("-fast") for job in BIG} | set(SMALL) <= set(KNOWN)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_a_windows_checkout_keeps_lf():
    """Git for Windows checks text out with CRLF unless told otherwise, and WSL2 cannot run such a script."""
    names = [*SCRIPTS, "train.py", "README.md", "requirements.txt"]
    done = subprocess.run(["git", "check-attr", "eol", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name}: eol: lf" for name in names]


def test_trm_python(copy):
    """Used as it is if its torch is new enough. The script and requirements.txt agree on the version."""
    assert copy.setup(TRM_PYTHON=sys.executable)[0] == 0 and copy.calls == [] and not copy.venv.exists()
    code, out = copy("./speedrun.sh", TRM_PYTHON="/nowhere/python")
    assert code == 2 and out.startswith("error: TRM_PYTHON=/nowhere/python does not run or has no torch"), out
    for version in ("1.13.1", "2.1.2", "2.9.1+cu128"):
        code, out = copy("./speedrun.sh", TORCH=version)
        message = f"error: TRM_PYTHON={copy.python} has torch {version}; it needs torch>=2.10,<2.14\n"
        assert code == 2 and out.startswith(message) and copy.calls == [], out
    for version in ("2.10.0", "2.13.0+cpu", "2.14.0a0+git1", "3.0.0"):
        assert copy("./speedrun.sh", "setup", TORCH=version)[0] == 0


def test_venv_by_uv(copy):
    """PyTorch's index comes first, then the default one. What exists is kept unless it is broken."""
    assert copy.setup(FAILS="venv")[0] != 0
    code, out = copy.setup(FAILS="install")
    assert code == 2 and "error: requirements.txt cannot be installed" in out, out
    (copy.venv / "extra").touch()
    code, out = copy.setup(FAILS="--torch-backend", PIP_FIND_LINKS="/a /b")
    assert code == 0 and len(copy.calls) == 2 and "trying again without it" in out, out
    for call, backend in zip(copy.calls, (" --torch-backend=auto", "")):
        assert call.startswith("uv pip install") and call.endswith(f".txt{backend} links=/a,/b"), call
    assert copy.setup()[0] == 0 and copy.calls == []
    (copy.folder / "requirements.txt").write_text("torch==2.13.0\n")
    assert copy.setup()[0] == 0 and len(copy.calls) == 1 and "install" in copy.calls[0], copy.calls
    executable(copy.venv / "bin" / "python")
    assert (copy.venv / "extra").exists() and copy.setup()[0] == 0
    assert "uv venv" in copy.calls[0] and not (copy.venv / "extra").exists()


def test_3_gb_of_cuda_are_announced_before_they_are_downloaded(copy):
    executable(copy.bin / "uname", "#!/bin/sh\necho $SYSTEM\n")
    assert "CUDA" not in copy.setup(SYSTEM="Darwin", FAILS="install")[1], "there is no CUDA on macOS"
    before, _, after = copy.setup(SYSTEM="Linux", FAILS="--torch-backend")[1].partition("uv pip install")
    assert "3 GB of CUDA" in before and "CUDA" not in after, before
    executable(copy.bin / "nvidia-smi")
    (copy.venv / ".requirements").unlink()
    assert "CUDA" not in copy.setup(SYSTEM="Linux")[1], "a machine with a GPU needs it"


def test_no_uv(copy):
    """pip installs it into the folder .uv, as an externally managed Python allows; else its own installer."""
    copy.env["UV_STUB"] = str((copy.bin / "uv").rename(copy.bin / "working-uv"))
    for name in ("uv", "curl", "python3"):  # hide this machine's own
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


RUN = r"runs/\S+-\d{8}-\d{6}"
SOLVE = "-m tools.solve --checkpoint"


def trains(preset, flags="", folder=RUN):
    return f"train.py --preset {preset} --run-dir {folder}{flags}"


ARC = "-m prepare mini-arc mini-arc-tune --source arc"
REPORT_HALF = rf"eval.py --checkpoint {RUN} --data data/arc-6x6-mini --output {RUN}/report"


def page(folder=RUN):
    return f"-m tools.page {folder} {folder}/page.html"


JOBS = {
    "": [trains("mini"), page()],
    "sudoku-9x9": [trains("sudoku-9x9"), page()],
    "mini-maze": [trains("mini-maze"), f"{SOLVE} {RUN}", page()],
    "mini-maze --run-dir X": [trains("mini-maze", " --run-dir X", "X"), f"{SOLVE} X", page("X")],
    "mini-maze --seed 3 --run-dir=X": [
        trains("mini-maze", " --seed 3 --run-dir=X", "X"),
        f"{SOLVE} X",
        page("X"),
    ],
    "mini-maze --run-dir=Y --run-dir X": [
        trains("mini-maze", " --run-dir=Y --run-dir X", "X"),
        f"{SOLVE} X",
        page("X"),
    ],
    "mini-arc --source=arc --seed 1": [ARC, trains("mini-arc", " --seed 1"), REPORT_HALF],
    "minis --source arc": [trains("mini"), page(), trains("mini-maze"), f"{SOLVE} {RUN}", page(), ARC]
    + [trains("mini-arc"), REPORT_HALF, f"-m tools.draw {RUN} {RUN} {RUN}"],
    "test -x": ["-m pytest -q tests -x"],
    "gpu-check --steps 9": ["-m pytest -q tests/test_cuda.py", "-m tools.bench --preset sudoku --steps 9"]
    + ["-m tools.bench --preset arc1 --steps 9"],
}


@pytest.mark.parametrize("words", JOBS)
def test_small_jobs_and_their_flags(copy, words):
    code, out = copy("./speedrun.sh", *words.split())
    assert code == 0 and len(copy.calls) == len(JOBS[words]), (out, copy.calls)
    for actual, expected in zip(copy.calls, JOBS[words]):
        assert re.fullmatch(expected, actual) and f"+ {copy.python} {actual}\n" in out, (actual, expected)


@pytest.mark.parametrize("preset", BIG)
def test_big_job(copy, preset):
    build = f"-m prepare {preset.removesuffix('-att').removesuffix('-fast')}"
    build += " maze" if preset == "maze-gen" else ""
    train = f"train.py --preset {preset} --resume --run-dir runs/speedrun-{preset}"
    copy("./speedrun.sh", preset)
    assert copy.calls == [f"{train} {ONE_GPU}"], "no GPU: train.py prints a time estimate before any download"
    copy("./speedrun.sh", preset, "--allow-cpu")
    assert copy.calls == [build, f"{train} {ONE_GPU} --allow-cpu"]
    copy("./speedrun.sh", preset, "--lr", "3e-4", N_GPUS="1")
    assert copy.calls == [build, f"{train} {ONE_GPU} --lr 3e-4"], "the user's flags come last"
    copy("./speedrun.sh", preset, N_GPUS="8")
    assert copy.calls == [build, f"{TORCHRUN} {train}"]


@pytest.mark.parametrize("n_gpus", ["0", "1", "8"])
def test_a_resumed_run_keeps_its_settings_on_any_number_of_gpus(copy, n_gpus):
    """train.py refuses another batch size on resume, so only a new run gets the settings for one GPU."""
    folder = "runs/speedrun-sudoku"
    (copy.folder / folder).mkdir(parents=True)  # without a checkpoint it is a new run
    new = "" if n_gpus == "8" else f" {ONE_GPU}"

    def check(flags, settings):
        copy("./speedrun.sh", "sudoku", "--allow-cpu", *flags.split(), N_GPUS=n_gpus)
        expected = f"--preset sudoku --resume --run-dir {folder}{settings} --allow-cpu {flags}"
        assert copy.calls[-1].split("train.py ")[1].split() == expected.split()

    check("", new)
    check("--resume --seed 3", new)
    check("--resume runs/a", "")
    check("--resume=runs/a", "")
    (copy.folder / folder / "step_00000100.ckpt").touch()
    check("", "")
    (copy.folder / folder).rename(copy.folder / "X")
    check("", new)
    folder = "X"
    check("--run-dir X", "")
    check("--seed 3 --run-dir=X", "")


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
        expected += [f"-m prepare {job}", f"{TORCHRUN} {score}"]
    code, out = copy("./speedrun-inference.sh", "all", "--limit", "64", N_GPUS="8")
    assert code == 0 and copy.calls == expected, out
    copy("./speedrun-inference.sh", "maze")
    assert copy.calls[1:] == ["eval.py --hf alphaXiv/trm-model-maze --output runs/inference-maze"]


def test_ctrl_c_ends_the_script(copy):
    """It ends the whole script, not only the current stage."""
    process = copy.start("./speedrun.sh", "all", N_GPUS="8", HANGS="preset maze")
    deadline = time.monotonic() + 30
    while "preset maze" not in copy.file.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130 and "arc1" not in copy.file.read_text()


def test_ci(copy):
    """Style, tests, mini; eval.py decides whether mini has learned. GitHub runs the README's commands."""
    calls = ["-m ruff check .", "-m ruff format --check .", "-m pytest -q tests"]
    calls += [
        trains("mini", " --run-dir runs/ci", "runs/ci"),
        page("runs/ci"),
        "eval.py --checkpoint runs/ci --min-exact 0.97",
    ]
    code, out = copy(".ci/run")
    assert code == 0 and copy.calls == calls, out
    for n, call in enumerate(calls):
        assert copy(".ci/run", FAILS=call)[0] == 3 and copy.calls == calls[: n + 1]
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"- run: (.*)", (ROOT / ".github/workflows/test.yml").read_text())
    assert len(commands) == 2 and all(f"\n{command} " in readme for command in commands)
