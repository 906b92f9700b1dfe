"""What every script leans on: how it ends, flags with a range, files that are all or nothing."""
import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
from common import UserError

ROOT = Path(__file__).resolve().parent.parent


def interrupted():
    raise KeyboardInterrupt


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB.")


def full_disk():
    raise OSError(28, "No space left on device", "runs/a/log.jsonl")


def full_tmp():
    def compiler(graph, inputs):
        raise OSError(28, "No space left on device")
    torch.compile(torch.sin, backend=compiler)(torch.ones(3))


@pytest.mark.parametrize("main, code, words", [
    (lambda: None, 0, []), (lambda: 1, 1, []), (interrupted, 130, ["interrupted"]),
    (out_of_memory, 2, ["error: out of memory", "--grad-accum N", "--batch-size N"]),
    (full_disk, 2, ["error: No space left on device: runs/a/log.jsonl"]),
    (full_tmp, 2, ["error: torch.compile failed ([Errno 28] No", "--no-compile", "TORCHINDUCTOR_CACHE_DIR"])])
def test_a_script_ends_with_one_line(main, code, words, capsys):
    with pytest.raises(SystemExit) as e:
        common.cli(main)
    error = capsys.readouterr().err.strip()
    assert e.value.code == code and "\n" not in error and all(w in error for w in words), error


def test_out_of_memory_is_no_dead_rank():
    with pytest.raises(torch.OutOfMemoryError), common.peers():
        out_of_memory()
    with pytest.raises(UserError, match=r"^another rank died or hangs \(Connection closed\); look .*"):
        with common.peers():
            raise RuntimeError("Connection closed\nException raised from ...")


def test_numbers_in_a_range():
    assert common.within(int, 0, 7)("7") == 7 and common.within(float, -1)("1e300") == 1e300
    for kind, high, text, message in (
            (int, 9, "2.5", "'2.5' is no whole number"), (float, 1, "", "'' is no number"),
            (int, 9, "10", "10 is out of range; give 0 .. 9"), (float, 1, "nan", "nan is out of range"),
            (float, float("inf"), "inf", "inf is out of range; give 0 or more")):
        with pytest.raises(argparse.ArgumentTypeError) as e:
            common.within(kind, 0, high)(text)
        assert str(e.value).startswith(message)


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "folder" / "file"
    common.write(path, b"old")
    with pytest.raises(ZeroDivisionError), common.replacing(path) as tmp:
        tmp.write_bytes(b"half of the n")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text, kind, message", [
    (None, object, "not found"), ("", object, "is not valid JSON .*"),
    ("[" * 100_000, list, "is not valid JSON .*"), ("[1]", dict, "holds a list, not a dict"),
    ("null", list, "holds a NoneType, not a list")])
def test_json_of_the_wrong_kind(tmp_path, text, kind, message):
    path = tmp_path / "file.json"
    path.write_text("[1]")
    assert common.read_json(path, "the cure", list) == [1]
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=f"^{path} {message}; the cure$"):
        common.read_json(path, "the cure", kind)


@pytest.mark.parametrize("script", ["train.py", "eval.py", "solve.py", "bench.py", "hub.py", "draw.py",
                                    "gpu_check.py", "prepare/arc.py", "prepare/maze.py", "prepare/sudoku.py"])
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path, script):
    """A torch.py whose import is interrupted stands for it."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    # Python then ends by the signal itself, which is 130 to a shell
    assert done.returncode in (-signal.SIGINT, 130) and done.stderr.split() == ["interrupted"], done.stderr
