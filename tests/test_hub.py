"""--hf and --push with the real huggingface_hub client against a server on loopback that answers as the hub does."""
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
from data import Split, UserError, write_dataset
from model import to_published
from test_eval import ALONE, TINY, boards, model_of, save_run

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "1234567890abcdef1234567890abcdef12345678"


class Hub(ThreadingHTTPServer):
    """files: {repo: {path: bytes}}. cut: number of downloads of weights that break off half way; 1000: one, and no more
    is given after it."""

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
                "id": m[1], "sha": COMMIT, "siblings": [{"rfilename": p} for p in files], "private": False, "tags": [], "downloads": 0,
                "likes": 0})
        if m := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            body = hub.files.get(m[1], {}).get(m[2])
            if body is None:
                return self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return self.send_file(body)
        self.reply(404, {"error": f"no {path}"})

    do_HEAD = do_GET

    def send_file(self, body):
        hub, headers = self.server, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "Accept-Ranges": "bytes"}
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
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]]})
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[m[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[m[1]][value["path"]] = hub.blobs[value["oid"]]
            return self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.url}/{m[1]}/commit/{COMMIT}"})
        self.reply(404, {"error": f"no {path}"})

    def do_PUT(self):
        self.server.blobs[self.path.rsplit("/", 1)[1]] = self.body()
        self.reply(200)


WORKER = """
import json, os, sys
import eval, huggingface_hub
from data import cli
print("ready", flush=True)
for line in sys.stdin:
    cwd, flags = json.loads(line)
    if not os.fork():
        os.chdir(cwd)
        for name, fd in (("out", 1), ("err", 2)):
            os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), fd)
        cli(lambda: eval.main(flags))
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """A process that runs eval.py's command lines in children: the client reads HF_ENDPOINT when it is imported, and
    importing torch takes longer than all the rest. Nobody answers at its endpoint but while there is a `hub`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path_factory.mktemp("home")),
           "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test", "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
    process = subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.port = port
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def hub(worker):
    server = Hub(worker.port)
    yield server
    server.close()


CFG = replace(TINY, puzzle_emb_len=16, halt_max_steps=16)
FLAGS = ["--device", "cpu", "--dtype", "float32", "--steps", "2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A dataset of 4x4 boards, a model of seeded weights and its published file."""
    folder = tmp_path_factory.mktemp("hub")
    write_dataset(folder / "boards", {"train": boards(8), "test": boards(8, seed=1)}, 6, {})
    model = model_of(CFG)
    torch.save(to_published(CFG, model.state_dict()), folder / "step_10")
    return folder / "boards", model, (folder / "step_10").read_bytes()


def run_eval(worker, cwd, *flags, code=0):
    """What eval.py printed, or its error line when it must fail."""
    worker.stdin.write(json.dumps([str(cwd), [*FLAGS, *flags]]) + "\n")
    worker.stdin.flush()
    found = int(worker.stdout.readline())
    out, err = (cwd / "out").read_text(), (cwd / "err").read_text()
    assert found == code, out + err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code == 2) and "Traceback" not in err, err
    return errors[0] if errors else out


def test_download_finds_the_file_and_never_uses_half_of_it(tmp_path, worker, hub, weights):
    data, model, content = weights
    config = b"arch:\n  H_cycles: 1\n  L_cycles: 1\n  num_heads: 2\n"
    hub.files["me/net"] = {"README.md": b"#", ".gitattributes": b"", "all_config.yaml": config, "step_32550_sudoku": content}
    flags = ["--hf", "me/net", "--data", str(data)]
    hub.cut = 1000      # breaks off and is refused when it is resumed
    error = run_eval(worker, tmp_path, *flags, code=2)
    assert "cannot download from me/net" in error and "put it at data/weights/me/net/step_32550_sudoku" in error
    assert not (tmp_path / "data/weights/me/net/step_32550_sudoku").exists()
    hub.cut, hub.log = 1, []
    out = run_eval(worker, tmp_path, *flags)
    assert sum(line.startswith("GET /me/net/resolve/") and "step_32550" in line for line in hub.log) >= 2, hub.log
    results = json.loads((tmp_path / "runs/eval-net/results.json").read_text())
    expected = scoring.evaluate(model, Split(data, "test"), ALONE, 8, steps=2, progress=False)
    assert results["metrics"] == pytest.approx(expected, rel=1e-5) and "step_32550_sudoku" in out
    hub.close()
    assert "exact_acc" in run_eval(worker, tmp_path, *flags)      # without the network: the file is there


def test_no_network_says_which_file_goes_where(tmp_path, worker, weights):
    data, model, content = weights
    error = run_eval(worker, tmp_path, "--hf", "alphaXiv/trm-model-maze/maze_hard_step_32550", code=2)
    assert "fetch maze_hard_step_32550 from https://huggingface.co/alphaXiv/trm-model-maze and put it at " \
           "data/weights/alphaXiv/trm-model-maze/maze_hard_step_32550" in error
    folder = tmp_path / "data/weights/me/net"
    folder.mkdir(parents=True)
    (folder / "step_10").write_bytes(content)       # put there by hand
    flags = ["--data", str(data), "--H-cycles", "1", "--L-cycles", "1", "--num-heads", "2"]
    assert "exact_acc" in run_eval(worker, tmp_path, "--hf", "me/net", *flags)
    (folder / "step_10").write_bytes(content[:1000])
    with pytest.raises(UserError, match="step_10 cannot be read as a checkpoint"):
        scoring.main(["--checkpoint", str(folder / "step_10"), *flags])


def test_several_files_are_listed(tmp_path, worker, hub, weights):
    hub.files["arcprize/verification"] = {"a/step_1": weights[2], "b/step_2": weights[2], "readme.txt": b""}
    error = run_eval(worker, tmp_path, "--hf", "arcprize/verification", code=2)
    assert "2 checkpoint files; choose one: --hf arcprize/verification/a/step_1, --hf arcprize/verification/b/step_2" in error
    assert scoring.pick_file("o/r", ["a/step_1", "b/step_2", "README.md"], "b/step_2") == "b/step_2"
    assert scoring.pick_file("o/r", ["README.md", "all_config.yaml", "LICENSE", ".gitattributes", "maze_hard_step_3"], "") \
        == "maze_hard_step_3"
    with pytest.raises(UserError, match="no file c; choose one: --hf o/r/step_1"):
        scoring.pick_file("o/r", ["step_1"], "c")


def test_push_and_back(tmp_path, worker, hub, weights):
    data, model, _ = weights
    run = save_run(tmp_path / "run", Split(data, "test"), model)
    out = run_eval(worker, tmp_path, "--checkpoint", str(run), "--push", "me/mini-trm")
    assert "pushed to me/mini-trm" in out
    files = hub.files["me/mini-trm"]
    assert files.keys() == {"step_00000010", "config.json", "results.json", "README.md"}
    exact = json.loads(files["results.json"])["metrics"]["exact_acc"]
    assert f"{exact:.4f}" in files["README.md"].decode() and "--hf me/mini-trm" in files["README.md"].decode()
    back = run_eval(worker, tmp_path, "--hf", "me/mini-trm", "--data", str(data))
    assert f"{exact:.4f}" in back
    theirs, mine = (json.loads((p / "results.json").read_text())["metrics"] for p in (tmp_path / "runs/eval-mini-trm", run))
    assert theirs == pytest.approx(mine, rel=1e-6)
    with pytest.raises(UserError, match="--push bad name: .* the result is kept in results.json"):
        scoring.push("bad name", run / "step_10.ckpt", CFG, model.state_dict(), json.loads((run / "results.json").read_text()))


# ---------------------------------------------------------------------------------------------
# What the table and a configuration say

def test_known_repositories():
    assert scoring.KNOWN["alphaXiv/trm-model-sudoku"] == (3, 6, "sudoku") and len(scoring.KNOWN) == 10
    assert {data for *_, data in scoring.KNOWN.values()} <= scoring.DATASETS.keys()


@pytest.mark.parametrize("text", [
    "arch:\n  name: trm@TRM\n  H_cycles: 3\n  L_cycles: 4\n  num_heads: 8\n  pos_encodings: rope\nlr: 1e-4\n",
    json.dumps({"arch": {"H_cycles": 3, "L_cycles": 4, "num_heads": 8, "pos_encodings": "rope", "x": [1, 2]}, "lr": 1e-4}),
    json.dumps({"arch": {"H_cycles": 3, "L_cycles": 4, "num_heads": 8, "pos_encodings": "rope"}}, indent=2)])
def test_configuration_of_a_repository(text):
    assert scoring.read_config(text) == {"H_cycles": 3, "L_cycles": 4, "num_heads": 8, "pos_encodings": "rope"}


def test_published_attention_takes_its_length_from_the_dataset():
    cfg = replace(CFG, mixer="attn", pos_encodings="rope")
    content = to_published(cfg, model_of(cfg).state_dict())
    found, _ = scoring.read_model(content, {"H_cycles": 1, "L_cycles": 1, "num_heads": 2, "dtype": "float32"}, 16, True)
    assert found == replace(cfg, halt_max_steps=16)


def test_dataset_of_a_known_repository_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(scoring.DATASETS, "sudoku", ("data/small", scoring.sudoku, ["--source", "generate", "--size", "4",
                                                                                   "--num-train", "3", "--num-test", "2"]))
    assert len(scoring.open_split(["data/small"], "sudoku", ALONE, {})) == 2 and Path("data/small/recipe.json").exists()
