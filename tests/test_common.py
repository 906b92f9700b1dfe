"""tools/common.py and tools/run_folder.py: errors, flags, processes, files, checkpoints, logs."""

import argparse
import os

import pytest
import torch

from tools import common, run_folder
from tools.common import UserError


def raises(error):
    def main():
        raise error

    return main


def failing_compiler():
    def backend(graph, inputs):
        raise OSError(28, "No space left on device")

    torch.compile(torch.sin, backend=backend)(torch.ones(3))


ENDS = [
    (lambda: None, 0, ""),
    (lambda: 1, 1, ""),
    (raises(KeyboardInterrupt()), 130, ""),
    (raises(UserError("lr is -1")), 2, "error: lr is -1"),
    (raises(OSError(28, "No space left on device", "a.txt")), 2, "error: a.txt: No space left on device"),
    (
        raises(torch.OutOfMemoryError("2 GiB.\nmore")),
        2,
        "error: out of GPU memory; use train.py --grad-accum",
    ),
    (
        failing_compiler,
        2,
        "error: torch.compile failed ([Errno 28] No space left on device); use --no-compile",
    ),
]


@pytest.mark.parametrize("main, code, message", ENDS)
def test_a_script_ends_with_one_line(main, code, message, capsys):
    with pytest.raises(SystemExit) as e:
        common.cli(main)
    error = capsys.readouterr().err
    assert e.value.code == code and error.startswith(message) and error.count("\n") == bool(message), error


def test_a_bug_keeps_its_traceback():
    with pytest.raises(OSError):  # it names no file of the user
        common.cli(raises(OSError(5, "Input/output error")))


def test_numbers_in_a_range():
    assert common.bounded(int, 0, 7)("7") == 7 and common.bounded(float, -1)("1e300") == 1e300
    for kind, high, text in ((int, 9, "10"), (float, 1, "nan"), (float, float("inf"), "inf")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is out of range; it must be "):
            common.bounded(kind, 0, high)(text)


NOT_SET = "MASTER_ADDR and MASTER_PORT not set; start several ranks with torchrun"
LAUNCHES = {
    "RANK=0": f"WORLD_SIZE and {NOT_SET}",
    "WORLD_SIZE=2": f"RANK and {NOT_SET}",
    "RANK=0 WORLD_SIZE=2": NOT_SET,
    "SLURM_STEP_NUM_TASKS=2": "Slurm started several tasks; start one per node and run torchrun in it",
    "LOCAL_RANK=2": "more processes than GPUs: use torchrun --nproc_per_node=2",
}


@pytest.mark.parametrize("variables", LAUNCHES)
def test_a_wrong_launch_is_one_line(variables, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(UserError, match=f"^{LAUNCHES[variables]}"):
        common.start_world("cuda")


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path, link = tmp_path / "folder" / "file", tmp_path / "link"
    link.symlink_to(path)
    common.write_file(link, b"old")
    with pytest.raises(ZeroDivisionError), common.replacing(link) as tmp:
        tmp.write_bytes(b"half of the n")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path] and link.is_symlink()
    with pytest.raises(UserError, match=f"^cannot write {path.parent}: .*directory"):
        common.write_file(path.parent, b"")


def test_json_files(tmp_path):
    path = tmp_path / "file.json"
    common.write_json(path, [1, float("nan"), {"a": (float("inf"), 2)}])
    assert common.read_json(path, list) == [1, None, {"a": [None, 2]}]
    for text, message in (("[1]", " does not hold a dict"), ("", ": Expecting value"), ("[" * 100_000, ": ")):
        path.write_text(text)
        with pytest.raises(UserError, match=f"^{path}{message}"):
            common.read_json(path)


def test_checkpoints_to_keep(tmp_path):
    """The user's files stay, and --keep-last 0 keeps all."""
    for name in ("notes.tmp", "step_00000000.ckpt.tmp"):
        (tmp_path / name).touch()
    for step in range(5):
        run_folder.save_checkpoint(tmp_path, step, {"step": step}, keep_last=0 if step < 4 else 2)
        assert len(run_folder.checkpoints(tmp_path)) == (step + 1 if step < 4 else 2)
    assert [p.name for p in tmp_path.glob("*.tmp")] == ["notes.tmp"]
    assert run_folder.load_file(run_folder.find_checkpoint(tmp_path)) == {"step": 4}
    (tmp_path / "latest.txt").write_text("step_00000003.ckpt\n")
    assert run_folder.find_checkpoint(tmp_path).name == "step_00000003.ckpt"


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "a.ckpt"
    run_folder.save_file(path, {"a": torch.ones(1000)})
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for content in (flipped, flipped[:2000], b"", b"text", b"hello", b"<html>404", b"a,b\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path} (is damaged|cannot be read as a checkpoint)"):
            run_folder.load_file(path)


def test_newest_run(tmp_path, monkeypatch):
    """Of any preset or of one, whose name another preset's name may begin with."""
    monkeypatch.chdir(tmp_path)
    for mtime, preset in enumerate(["maze", "mini", "mini-arc"]):
        folder = run_folder.new_run_dir(preset)
        log = run_folder.Log(folder)
        log.write("start", 0, settings={"preset": preset})
        log.close()
        run_folder.save_checkpoint(folder, 1, {}, 1)
        os.utime(f"{folder}/log.jsonl", (mtime, mtime))
    assert run_folder.newest_run().name.startswith("mini-arc-")
    assert run_folder.newest_run("mini").name.startswith("mini-2")
    with pytest.raises(UserError, match="no run of preset arc1 with a checkpoint"):
        run_folder.newest_run("arc1")


def test_the_log_of_a_resumed_run(tmp_path):
    log = run_folder.Log(tmp_path)
    for step in range(4):
        log.write("val", step, **{"val/exact_acc": step / 10, "val/n": 10})
    with pytest.raises(UserError, match=f"in use by pid {os.getpid()}"):
        run_folder.Log(tmp_path)
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('[1]\n{"event": "result", "step": 2}\n{"event": "tr')
    log = run_folder.Log(tmp_path, keep_until_step=2)
    assert [r["step"] for r in log.records] == [0, 1, 2] and run_folder.read_log(log.file.name) == log.records
    log.close()


@pytest.mark.parametrize(
    "version, accepted", [("2.9.1", False), ("1.13.0+cpu", False), ("2.10.0", True), ("3.0", True)]
)
def test_an_old_torch_is_one_line(version, accepted, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    if accepted:
        assert common.start_world("cpu").size == 1
    else:
        with pytest.raises(common.UserError, match=f"torch {version.split('+')[0]}.*torch>=2.10"):
            common.start_world("cpu")
