"""tools/hub.py: fetch and push, with the real huggingface_hub client and a server on loopback."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants, file_download
from runs import ALONE, TINY, model_of, save_run, sudoku_dir

import eval as scoring
import prepare
from data import Split
from tools import hub
from tools.common import UserError, write_json

COMMIT = "1234567890abcdef1234567890abcdef12345678"
CONFIG = b"arch:\n  H_cycles: 1\n  L_cycles: 1\n  num_heads: 2\n  puzzle_emb_len: 1\n"


class Hub(BaseHTTPRequestHandler):
    """Answers like the hub for the repositories in server.files: {repo: {path: bytes}}."""

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
        path = self.path.split("?")[0]
        m = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(?:tree|revision|resolve)/[^/]+)?/?(.*)", path)
        files = self.server.files.get(m[1])
        if files is None:
            self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif "/resolve/" in path:
            self.reply(200, files[m[2]], ETag=f'"{hashlib.sha256(files[m[2]]).hexdigest()}"')
        elif "/tree/" in path:
            tree = []
            for name, content in files.items():
                tree.append({"type": "file", "path": name, "size": len(content), "oid": "0" * 40})
            self.reply(200, tree)
        else:
            siblings = [{"rfilename": name} for name in files]
            self.reply(200, {"id": m[1], "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET

    def do_POST(self):
        path, files = self.path.split("?")[0], self.server.files
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.reply(401, {"error": "Invalid credentials"})
        if path == "/api/validate-yaml":  # of the model card
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            name = json.loads(body)
            repo = f"{name.get('organization', 'me')}/{name['name']}"
            files.setdefault(repo, {})
            return self.reply(200, {"url": f"{constants.ENDPOINT}/{repo}", "name": repo, "id": repo})
        if "/preupload/" in path:
            how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.reply(200, {"files": [{"path": f["path"], **how} for f in json.loads(body)["files"]]})
        repo = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path)[1]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[repo][line["value"]["path"]]
        url = f"{constants.ENDPOINT}/{repo}/commit/{COMMIT}"
        return self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """What the client takes for the hub. The working directory and the client's cache are empty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, url = {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # clients before 1.0 have a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return sudoku_dir(tmp_path_factory.mktemp("hub") / "boards")


def evaluate(*flags, output="out"):
    """The metrics of eval.py."""
    scoring.main(["--device", "cpu", "--output", str(output), *map(str, flags)])
    return json.loads(Path(output, "results.json").read_text())["metrics"]


def test_weights_of_others(server, data, tmp_path, monkeypatch, capsys):
    """They are downloaded with their configuration; later the cache suffices, which is noted."""
    torch.save(hub.to_published(TINY, model_of().state_dict()), tmp_path / "w")
    server.files["me/net"] = {
        "README.md": b"#",
        "all_config.yaml": CONFIG,
        "vocab.txt": b"",
        "step_32550_sudoku": Path("w").read_bytes(),
    }
    metrics = evaluate("--hf", "me/net", "--data", data, "--dtype", "float32", "--steps", 4)
    expected = scoring.evaluate(model_of(), Split(data, "test"), ALONE, 8).metrics
    assert metrics == pytest.approx(expected, rel=1e-5)
    capsys.readouterr()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # nobody there
    path, settings, folder = hub.fetch("me/net", ALONE)
    assert {f.name for f in path.parent.iterdir()} == {"all_config.yaml", "step_32550_sudoku"}
    assert settings == {} and folder is None
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("note: cannot reach me/net"), errors
    with pytest.raises(UserError, match="me/none is not in the cache; pass a file with --checkpoint"):
        hub.fetch("me/none", ALONE)
    assert capsys.readouterr().err.startswith("note: cannot reach me/none")


def test_published_repositories(server):
    """The table tells n and the dataset; the weights file is found by its name."""
    name = "arcprize/trm_arc_prize_verification"
    files = {"README": b"", "all_config.yaml": b"", "steps.png": b"", "arc_v1_public/step_1": b""}
    server.files = {
        name: {**files, "arc_v2_public/step_2": b""},
        "alphaXiv/trm-model-maze": {"README": b"", "LICENSE": b"", "maze_hard_step_32550": b""},
    }
    settings = {"H_cycles": 3, "L_cycles": 4, "num_heads": 8, "puzzle_emb_len": 16}
    path, *rest = hub.fetch("alphaXiv/trm-model-maze", ALONE)
    assert path.name == "maze_hard_step_32550" and rest == [settings, prepare.KNOWN["maze"].folder]
    path, *rest = hub.fetch(f"{name}/arc_v2_public/step_2", ALONE)
    assert path.name == "step_2" and rest == [settings, prepare.KNOWN["arc2"].folder]
    for wrong in (name, f"{name}/step_2", "alphaXiv"):
        with pytest.raises(UserError, match="choose one file .* 'arc_v1_public/step_1'|OWNER/REPO"):
            hub.fetch(wrong, ALONE)
    assert set(hub.PUBLISHED.values()) <= prepare.KNOWN.keys()


def test_push_and_back(server, data):
    """A pushed repository needs no flag, and its card contains the measured metrics."""
    server.files["me/mini"] = {"model.pt": b"old", "notes.txt": b""}
    private = {"canvases": None, "run_dir": "runs/of-alice"}
    run = save_run(Path("run"), Split(data, "test"), model_of(), settings=private)
    push = ["push", str(run), "me/mini"]
    with pytest.raises(UserError, match="results.json is not an evaluation .*eval.py --checkpoint run/step"):
        hub.main(push)
    metrics = evaluate("--checkpoint", run, output=run)
    hub.main(push)
    files = server.files["me/mini"]
    assert files.keys() == {"model.pt", "config.json", "results.json", "README.md", "notes.txt"}
    assert not any(b"alice" in content for content in files.values())
    card = ModelCard(files["README.md"].decode())
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == pytest.approx(metrics) and "python eval.py --hf me/mini`" in card.text
    origin = json.loads(files["config.json"])["trained_on"]
    assert origin["data"] == [str(data)] and {"recipe", "data_test", "puzzle_ids_sha256"} <= origin.keys()
    assert evaluate("--hf", "me/mini") == pytest.approx(metrics, rel=1e-6)
    with pytest.raises(UserError, match="cannot push to bad name"):
        hub.main(["push", str(run), "bad name"])

    results = json.loads((run / "results.json").read_text())
    halting = {"test_time_compute": {**results["test_time_compute"], "halt_threshold": 0.0}}
    earlier = {"checkpoint": "run/step_00000005.ckpt"}
    average = {"averaged weights": True}
    override = {"config": {**results["config"], "H_cycles": 2}}
    for change in (halting, earlier, average, override):
        write_json(run / "results.json", {**results, **change})
        with pytest.raises(
            UserError, match="results.json is not an evaluation without flags; .*step_00000010"
        ):
            hub.main(push)


def test_the_dataset_of_a_pushed_repository_is_built(server, data, monkeypatch):
    """Where the folder of a known dataset is missing."""
    small = ("--source", "generate", "--size", "4", "--num-train", "3", "--num-test", "2")
    monkeypatch.setitem(prepare.KNOWN, "sudoku", prepare.Dataset("data/small", "sudoku", small, {}))
    content = {"data": ["data/small"], "data_test": ["data/small"]}
    config = hub.export(Path("model.pt").resolve(), content, TINY, model_of().state_dict())
    files = {"model.pt": Path("model.pt").read_bytes(), "config.json": config.read_bytes()}
    server.files["me/net"] = files
    assert evaluate("--hf", "me/net")["n"] == 2 and Path("data/small/recipe.json").exists()
