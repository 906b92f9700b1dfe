"""hub.py: fetch and push, with the real huggingface_hub client against a server on loopback."""
import argparse
import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import eval as scoring
import hub
import prepare
from common import UserError, write_json
from data import Split, write_dataset
from runs import ALONE, TINY, boards, model_of, save_run

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(ThreadingHTTPServer):
    """Answers as the hub does. files: {repo: {path: bytes}}. cut: number of downloads of weights that break
    off half way; 1000: one, and nothing is given after it."""

    def __init__(self, port):
        super().__init__(("127.0.0.1", port), Answer)
        self.files, self.blobs, self.log, self.cut = {}, {}, [], 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, code, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.log.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/(?:tree|revision)/.*)?", path):
            files = hub.files.get(m[1])
            if files is None:
                return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            tree = [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files.items()]
            return self.reply(200, tree if "/tree/" in path else {
                "id": m[1], "sha": COMMIT, "siblings": [{"rfilename": p} for p in files], "private": False,
                "tags": [], "downloads": 0, "likes": 0})
        if m := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            body = hub.files.get(m[1], {}).get(m[2])
            if body is None:
                return self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return self.send_file(body)
        self.reply(404, {"error": f"no {path}"})

    do_HEAD = do_GET

    def send_file(self, body):
        etag = hashlib.sha256(body).hexdigest()
        hub, headers = self.server, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if hub.cut < 0 and self.command == "GET" and len(body) > 10_000:
            return self.reply(403, {"error": "Forbidden"})
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if hub.cut and self.command == "GET" and len(body) > 10_000:
            hub.cut -= 1 if hub.cut < 1000 else 1001
            self.send_response(206 if start else 200)
            for name, value in {**headers, "Content-Length": len(body) - start}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body[start:(start + len(body)) // 2])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.reply(206 if start else 200, body[start:], **headers)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        hub, path, body = self.server, self.path.split("?")[0], self.body()
        hub.log.append(f"POST {path}")
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.reply(401, {"error": "Invalid credentials"})
        if path == "/api/validate-yaml":    # of the model card
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            name = json.loads(body)
            repo = f"{name.get('organization', 'me')}/{name['name']}"
            hub.files.setdefault(repo, {})
            return self.reply(200, {"url": f"{hub.url}/{repo}", "name": repo, "id": repo})
        if "/preupload/" in path:
            return self.reply(200, {"files": [{"path": f["path"], "shouldIgnore": False, "oid": None,
                                               "uploadMode": "lfs" if f["size"] > 10_000 else "regular"}
                                              for f in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self.reply(200, {"transfer": "basic", "objects": [
                {**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]]})
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[m[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[m[1]][value["path"]] = hub.blobs[value["oid"]]
            return self.reply(200, {"success": True, "commitOid": COMMIT,
                                    "commitUrl": f"{hub.url}/{m[1]}/commit/{COMMIT}"})
        self.reply(404, {"error": f"no {path}"})

    def do_PUT(self):
        self.server.blobs[self.path.rsplit("/", 1)[1]] = self.body()
        self.reply(200)


WORKER = """
import json, os, sys
import eval, hub, huggingface_hub
from common import World, cli
def fetch(argv):
    path, settings, dataset = hub.fetch(argv[0], World(0, 1, None))
    print(json.dumps([str(path), settings, dataset]))
print("ready", flush=True)
for line in sys.stdin:
    cwd, script, argv = json.loads(line)
    if not os.fork():
        os.chdir(cwd)
        for name, fd in (("out", 1), ("err", 2)):
            os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), fd)
        cli(lambda: {"eval": eval.main, "hub": hub.main, "fetch": fetch}[script](argv))
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """A process that runs command lines in children: the client reads HF_ENDPOINT when it is imported, and
    importing torch takes longer than all the rest. Nobody answers there but while there is a `server`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home),
           "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    process = subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, env=env, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    process.port, process.home = port, home
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def server(worker):
    server = Hub(worker.port)
    yield server
    server.close()


CFG = replace(TINY, puzzle_emb_len=16, halt_max_steps=16)
SETTINGS = {"H_cycles": 1, "L_cycles": 1, "num_heads": 2, "puzzle_emb_len": 16, "dtype": "float32"}
CONFIG = b"arch:\n  H_cycles: 1\n  L_cycles: 1\n  num_heads: 2\n  puzzle_emb_ndim: ${.hidden_size}\n"
FLAGS = ["--device", "cpu", "--dtype", "float32", "--steps", "2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A dataset of 4x4 boards, a model of seeded weights and the bytes of its published file."""
    folder = tmp_path_factory.mktemp("hub")
    splits = {"train": boards(8), "test": boards(8, seed=1)}
    write_dataset(folder / "boards", splits, 6, {"builder": "sudoku"})
    model = model_of(CFG)
    torch.save(hub.to_published(CFG, model.state_dict()), folder / "step_10")
    return folder / "boards", model, (folder / "step_10").read_bytes()


def run(worker, cwd, script, *argv, code=0):
    """What a script printed, or its error line when it must fail."""
    flags = FLAGS if script == "eval" else []
    worker.stdin.write(json.dumps([str(cwd), script, [*flags, *map(str, argv)]]) + "\n")
    worker.stdin.flush()
    found = int(worker.stdout.readline())
    out, err = (cwd / "out").read_text(), (cwd / "err").read_text()
    assert found == code, out + err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code == 2) and "Traceback" not in err, err
    return errors[0] if errors else out


def metrics(folder):
    return json.loads((folder / "results.json").read_text())["metrics"]


# ---------------------------------------------------------------------------------------------
# From the hub and to it

def test_download_finds_the_file_and_never_uses_half_of_it(tmp_path, worker, server, weights):
    data, model, content = weights
    server.files["me/net"] = {"README.md": b"#", ".gitattributes": b"", "results.json": b"[",
                              "optimizer.pt": b"", "all_config.yaml": CONFIG, "step_32550_sudoku": content}
    server.cut = 1000       # breaks off and is refused when it is resumed
    error, folder = run(worker, tmp_path, "fetch", "me/net", code=2), tmp_path / "data/weights/me/net"
    assert "cannot download from me/net" in error
    assert "put it at data/weights/me/net/step_32550_sudoku" in error
    assert not (folder / "step_32550_sudoku").exists()
    server.cut, server.log = 1, []
    out = run(worker, tmp_path, "eval", "--hf", "me/net", "--data", data)
    parts = [line for line in server.log if re.match("GET /me/net/resolve/.*step_32550", line)]
    assert len(parts) >= 2, server.log
    assert {f.name for f in folder.iterdir()} == {"all_config.yaml", "step_32550_sudoku", ".cache"}
    expected = scoring.evaluate(model, Split(data, "test"), ALONE, 8, effort=scoring.Effort(steps=2)).metrics
    assert metrics(tmp_path / "runs/eval-net") == pytest.approx(expected, rel=1e-5)
    assert "step_32550_sudoku" in out
    server.close()
    path, settings, dataset = json.loads(run(worker, tmp_path, "fetch", "me/net"))      # it is there
    assert path == "data/weights/me/net/step_32550_sudoku" and dataset is None
    assert settings == {"H_cycles": 1, "L_cycles": 1, "num_heads": 2}


def test_no_network_says_which_file_goes_where(tmp_path, worker, weights):
    error = run(worker, tmp_path, "fetch", "alphaXiv/trm-model-maze/maze_hard_step_32550", code=2)
    assert "fetch maze_hard_step_32550 from https://huggingface.co/alphaXiv/trm-model-maze and put it at " \
           "data/weights/alphaXiv/trm-model-maze/maze_hard_step_32550" in error
    folder = tmp_path / "data/weights/alphaXiv/trm-model-maze"
    folder.mkdir(parents=True)
    (folder / "step_10").write_bytes(weights[2])
    path, settings, dataset = json.loads(run(worker, tmp_path, "fetch", "alphaXiv/trm-model-maze"))
    assert Path(path) == folder.relative_to(tmp_path) / "step_10" and dataset == "maze"
    assert settings == {"H_cycles": 3, "L_cycles": 4, "num_heads": 8, "puzzle_emb_len": 16}
    (folder / "step_10.yaml").write_bytes(CONFIG)
    settings = json.loads(run(worker, tmp_path, "fetch", "alphaXiv/trm-model-maze"))[1]
    assert settings["H_cycles"] == 1, "a configuration says more than the table"


def test_without_a_network_the_client_s_cache_is_used(tmp_path, worker, weights):
    snapshot = worker.home / "hub/models--me--cached/snapshots" / COMMIT
    (snapshot / "a").mkdir(parents=True)
    (snapshot / "all_config.yaml").write_bytes(CONFIG)
    (snapshot / "a/step_7").write_bytes(weights[2])
    path, settings, _ = json.loads(run(worker, tmp_path, "fetch", "me/cached"))
    assert Path(path) == snapshot / "a/step_7"
    assert settings["num_heads"] == 2, "the configuration of the repository"
    assert json.loads(run(worker, tmp_path, "fetch", "me/cached/a/step_7"))[0] == path
    assert "fetch b from" in run(worker, tmp_path, "fetch", "me/cached/b", code=2)


def test_several_files_are_listed(tmp_path, worker, server, weights):
    server.files["arcprize/v1"] = {"a/step_1": weights[2], "b/step_2": weights[2], "readme.txt": b""}
    error = run(worker, tmp_path, "fetch", "arcprize/v1", code=2)
    assert "2 checkpoint files; choose one: --hf arcprize/v1/a/step_1, --hf arcprize/v1/b/step_2" in error
    assert hub.pick_file("o/r", ["a/step_1", "b/step_2", "README.md"], "b/step_2") == "b/step_2"
    with pytest.raises(UserError, match="no file c; choose one: --hf o/r/step_1"):
        hub.pick_file("o/r", ["step_1"], "c")


@pytest.mark.parametrize("file", ["maze_step_32550", "a/model.safetensors", "net.v1.5.pt", "torch_model.bin"])
def test_only_what_can_be_weights_is_a_checkpoint(file):
    others = ["README.md", "README", "LICENSE", ".gitattributes", "all_config.yaml", "config.json", "x.zip",
              "results.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "a.ipynb",
              "predictions.npz", "events.out.tfevents.17.host.0", "model.bin.index.json", "net.onnx", "x.py",
              ".cache/huggingface/step_1", "vocab.txt", "steps.png", "card.pdf", "log.jsonl"]
    assert hub.pick_file("o/r", [*others, file], "") == file


def test_push_and_back(tmp_path, worker, server, weights):
    data, model, _ = weights
    folder = save_run(tmp_path / "run", Split(data, "test"), model)
    assert f"score it first: python eval.py --checkpoint {folder}" in \
        run(worker, tmp_path, "hub", "push", folder, "me/mini-trm", code=2)
    run(worker, tmp_path, "eval", "--checkpoint", folder)
    assert "pushed to me/mini-trm" in run(worker, tmp_path, "hub", "push", folder, "me/mini-trm")
    files = server.files["me/mini-trm"]
    assert files.keys() == {"step_00000010", "config.json", "results.json", "README.md"}
    results = json.loads(files["results.json"])
    low, high, n, unit = results["intervals"]["exact_acc"]
    exact = f"{metrics(folder)['exact_acc']:.4f} (95% interval {low:.4f} .. {high:.4f} of {n} {unit})"
    card = files["README.md"].decode()
    assert f"exact_acc | {exact}" in card and "--hf me/mini-trm" in card
    run(worker, tmp_path, "eval", "--hf", "me/mini-trm")
    assert metrics(tmp_path / "runs/eval-mini-trm") == pytest.approx(metrics(folder), rel=1e-6)
    error = run(worker, tmp_path, "hub", "push", folder, "bad name", code=2)
    assert "cannot push to bad name" in error and "hf auth login" in error
    results["about"]["checkpoint"] = results["about"]["checkpoint"].replace("step_00000010", "step_00000005")
    write_json(folder / "results.json", results)
    assert "step_00000005.ckpt, last weights, not of step_00000010.ckpt; score it first" in \
        run(worker, tmp_path, "hub", "push", folder, "me/mini-trm", code=2)


def test_known_repositories():
    assert hub.KNOWN["alphaXiv/trm-model-sudoku"] == (3, 6, "sudoku") and len(hub.KNOWN) == 10
    assert {data for *_, data in hub.KNOWN.values()} <= prepare.KNOWN.keys()


def test_dataset_of_a_known_repository_is_built(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    small = ("--source", "generate", "--size", "4", "--num-train", "3", "--num-test", "2")
    monkeypatch.setitem(prepare.KNOWN, "sudoku", prepare.Dataset("data/small", "sudoku", small, {}))
    monkeypatch.setattr(prepare, "known", lambda folder: prepare.KNOWN["sudoku"])
    monkeypatch.setattr(hub, "fetch", lambda name, world: (Path("step_10"), SETTINGS, "sudoku"))
    Path("step_10").write_bytes(weights[2])
    parser = argparse.ArgumentParser()
    scoring.checkpoint_flags(parser.add_argument)
    opened = scoring.open_model(parser.parse_args(["--hf", "me/net"]), ALONE)
    assert len(opened.split) == 2 and opened.kind == "sudoku" and Path("data/small/recipe.json").exists()
