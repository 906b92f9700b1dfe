"""hub.py: fetch and push, with the real huggingface_hub client against a server on loopback."""
import argparse
import base64
import hashlib
import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, file_download

import eval as scoring
import hub
import prepare
from common import UserError, write_json
from data import Split, write_dataset
from runs import ALONE, TINY, boards, model_of, save_run

COMMIT = "1234567890abcdef1234567890abcdef12345678"
CFG = replace(TINY, puzzle_emb_len=16, halt_max_steps=16)
SETTINGS = {"H_cycles": 1, "L_cycles": 1, "num_heads": 2, "puzzle_emb_len": 16, "dtype": "float32"}
CONFIG = b"arch:\n  H_cycles: 1\n  L_cycles: 1\n  num_heads: 2\n  puzzle_emb_ndim: ${.hidden_size}\n"


class Answer(BaseHTTPRequestHandler):
    """Answers as the hub does, of server.files: {repo: {path: bytes}}."""
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
            return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if "/resolve/" in path:
            return self.reply(200, files[m[2]], ETag=f'"{hashlib.sha256(files[m[2]]).hexdigest()}"')
        tree = [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files.items()]
        siblings = [{"rfilename": p} for p in files]
        self.reply(200, tree if "/tree/" in path else {"id": m[1], "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET

    def do_POST(self):
        path, files = self.path.split("?")[0], self.server.files
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.reply(401, {"error": "Invalid credentials"})
        if path == "/api/validate-yaml":    # of the model card
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
        url = f"{constants.ENDPOINT}/{repo}/commit/{COMMIT}"
        self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """What the client takes for the hub. The working directory and its cache are empty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.files, url = {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for module in (constants, file_download):       # clients before 1.0 have a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", raising=False,
                            value=url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A dataset of 4x4 boards, a model of seeded weights and the bytes of its published file."""
    folder = tmp_path_factory.mktemp("hub")
    splits = {"train": boards(8), "test": boards(8, seed=1)}
    write_dataset(folder / "boards", splits, 6, {"builder": "sudoku"})
    model = model_of(CFG)
    torch.save(hub.to_published(CFG, model.state_dict()), folder / "step_10")
    return folder / "boards", model, (folder / "step_10").read_bytes()


def evaluate(*flags):
    scoring.main(["--device", "cpu", "--dtype", "float32", "--steps", "2", *map(str, flags)])


def metrics(folder):
    return json.loads(Path(folder, "results.json").read_text())["metrics"]


def test_download(server, weights, monkeypatch, capsys):
    data, model, content = weights
    server.files["me/net"] = {"README.md": b"#", ".gitattributes": b"", "results.json": b"[",
                              "optimizer.pt": b"", "all_config.yaml": CONFIG, "step_32550_sudoku": content}
    evaluate("--hf", "me/net", "--data", data)
    expected = scoring.evaluate(model, Split(data, "test"), ALONE, 8, effort=scoring.Effort(steps=2)).metrics
    assert metrics("runs/eval-net") == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")    # nobody there; it is in the cache
    path, settings, dataset = hub.fetch("me/net", ALONE)
    assert {f.name for f in path.parent.iterdir()} == {"all_config.yaml", "step_32550_sudoku"}
    assert settings == {"H_cycles": 1, "L_cycles": 1, "num_heads": 2} and dataset is None
    assert "cannot download from me/net" in capsys.readouterr().err, "not without a word"


def test_without_the_hub(server):
    """What another program put into the client's cache; else a line says what to do."""
    cache = Path("cache/models--me--cached").resolve()
    folder = cache / "snapshots" / COMMIT / "a"
    for path, content in ((cache / "refs/main", COMMIT), (folder / "config.yml", "num_heads: 2"),
                          (folder / "step_7", "")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    for name in ("me/cached", "me/cached/a/step_7"):
        path, settings, _ = hub.fetch(name, ALONE)
        assert path == folder / "step_7" and settings == {"num_heads": 2}
    with pytest.raises(UserError, match="no file b; choose one: --hf me/cached/a/step_7"):
        hub.fetch("me/cached/b", ALONE)
    with pytest.raises(UserError, match="cannot download from me/none .*, nor use the cache .*; fetch the "
                                        "file from https://huggingface.co/me/none and give it with --check"):
        hub.fetch("me/none", ALONE)


def test_known_repositories(server):
    assert hub.KNOWN["alphaXiv/trm-model-sudoku"] == (3, 6, "sudoku") and len(hub.KNOWN) == 10
    assert {data for *_, data in hub.KNOWN.values()} <= prepare.KNOWN.keys()
    name = "arcprize/trm_arc_prize_verification"
    server.files = {name: {"arc_v1_public/step_1": b"", "arc_v2_public/step_2": b""},
                    "alphaXiv/trm-model-sudoku": {"step_10": b"", "step_10.yaml": CONFIG}}
    with pytest.raises(UserError, match=f"2 checkpoint files; choose one: --hf {name}/arc_v1_public/step_1,"):
        hub.fetch(name, ALONE)
    path, settings, dataset = hub.fetch(f"{name}/arc_v2_public/step_2", ALONE)
    assert path.name == "step_2" and dataset == "arc2"
    assert settings == {"H_cycles": 3, "L_cycles": 4, "num_heads": 8, "puzzle_emb_len": 16}
    settings = hub.fetch("alphaXiv/trm-model-sudoku", ALONE)[1]
    assert settings["H_cycles"] == 1, "a configuration says more than the table"


@pytest.mark.parametrize("file", ["maze_step_32550", "a/model.safetensors", "net.v1.5.pt", "torch_model.bin"])
def test_only_what_can_be_weights_is_a_checkpoint(file):
    others = ["README.md", "README", "LICENSE", ".gitattributes", "all_config.yaml", "config.json", "x.zip",
              "results.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "a.ipynb",
              "predictions.npz", "events.out.tfevents.17.host.0", "model.bin.index.json", "net.onnx", "x.py",
              ".cache/huggingface/step_1", "vocab.txt", "steps.png", "card.pdf", "log.jsonl"]
    assert hub.pick_file("o/r", [*others, file], "") == file
    assert hub.pick_file("o/r", [*others, file, "step_1"], file) == file
    with pytest.raises(UserError, match=f"no file c; choose one: --hf o/r/{file}$"):
        hub.pick_file("o/r", [*others, file], "c")


def test_push_and_back(server, weights):
    data, model, _ = weights
    folder = save_run(Path("run"), Split(data, "test"), model)
    push = ["push", str(folder), "me/mini-trm"]
    with pytest.raises(UserError, match=f"score it first: python eval.py --checkpoint {folder}"):
        hub.main(push)
    evaluate("--checkpoint", folder)
    hub.main(push)
    files, results = server.files["me/mini-trm"], json.loads((folder / "results.json").read_text())
    assert files.keys() == {"step_00000010", "step_00000010.config.json", "results.json", "README.md"}
    card = files["README.md"].decode()
    assert "python eval.py --hf me/mini-trm" in card
    assert json.loads(card.split("```")[1].removeprefix("json"))["metrics"] == results["metrics"]
    evaluate("--hf", "me/mini-trm")
    assert metrics("runs/eval-mini-trm") == pytest.approx(metrics(folder), rel=1e-6)
    with pytest.raises(UserError, match="cannot push to bad name.*hf auth login"):
        hub.main(["push", str(folder), "bad name"])
    write_json(folder / "results.json", {**results, "effort": {**results["effort"], "halt": 0.0}})
    with pytest.raises(UserError, match="is not of a plain evaluation"):
        hub.main(push)
    results["about"]["checkpoint"] = results["about"]["checkpoint"].replace("step_00000010", "step_00000005")
    write_json(folder / "results.json", results)
    with pytest.raises(UserError, match="step_00000005.ckpt, last weights, not of step_00000010.ckpt; score"):
        hub.main(push)


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
