"""tools/page.py: the page computes in JavaScript what PyTorch computes; and the notebook in assets/."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import fields, replace

import numpy as np
import pytest
from runs import FLAGS, ROOT, TINY, model_of, save_run, sudoku_dir

import prepare
from data import Split
from eval import flags, trajectory
from model import Config
from prepare import maze, sudoku
from tools import page
from tools.common import UserError
from train import PRESETS

N_STEPS = 4
N_PUZZLES = page.N_PUZZLES
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
NODE = shutil.which("node")

# [answer, qHalt] of all puzzles after every step
RESULTS = """
const results = (model, page, nSteps) => page.puzzles.map(puzzle => {
  let state = model.start(puzzle);
  return Array.from(Array(nSteps), () => {
    const result = model.step(state);
    state = result.state;
    return [result.answer, result.qHalt];
  });
});
"""


# ---------------------------------------------------------------------------------------------
# Pages


def maze_dir(folder, size=7):
    mazes = maze.draw_mazes(np.random.RandomState(0), size, min_path=8)
    pairs = np.array([next(mazes)[:2] for _ in range(24)]).swapaxes(0, 1)
    recipe = {"builder": "maze", "command": "python prepare/maze.py --source generate"}
    prepare.write_dataset(folder, {"train": pairs[:, :2], "test": pairs[:, 2:]}, 6, recipe)
    return folder


ATTENTION = replace(TINY, mixer="attn", hidden_size=40, num_heads=5, puzzle_emb_len=2, num_layers=2)
CONFIGS = {
    "sudoku, mlp": replace(TINY, H_cycles=2, L_cycles=2),
    "sudoku, attention": replace(ATTENTION, pos_encodings="learned", puzzle_emb_len=0, puzzle_emb_ndim=0),
    "maze, grid": replace(ATTENTION, score_mod="grid", vocab_size=6, seq_len=49),
}


class Page:
    """The page of a model with random weights."""

    def __init__(self, folder, name):
        make = maze_dir if name.startswith("maze") else sudoku_dir
        self.split = Split(make(folder / "data"), "test")
        self.model = model_of(CONFIGS[name])
        run = folder / "run"
        run.mkdir()
        save_run(run, self.split, self.model)
        self.path = folder / "page.html"
        page.main([str(run), str(self.path)])
        self.html = self.path.read_text(encoding="utf-8")
        self.data = re.search('<script id="data".*?>(.*?)</script>', self.html)[1]
        self.script = re.search('<script id="model">(.*?)</script>', self.html, re.DOTALL)[1]

    def check(self, output):
        """Compare the JSON of RESULTS with PyTorch in float32, which uses the same float16 weights."""
        rounded = {name: tensor.half().float() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(rounded)
        questions = self.split.gather(np.arange(N_PUZZLES))[0]
        answers, q_halt = trajectory(self.model, questions, np.zeros(N_PUZZLES, np.int32), N_STEPS)
        assert len(np.unique(answers[-1], axis=0)) > 10, "the answers hardly depend on the puzzles"
        assert q_halt[-1].std() > 0.1
        results = json.loads(output)
        assert len(results) == N_PUZZLES
        for i, steps in enumerate(results):
            for step, (answer, q) in enumerate(steps):
                assert answer == answers[step, i].tolist(), f"puzzle {i}, step {step}"
                assert abs(q - q_halt[step, i]) < 1e-2, f"puzzle {i}, step {step}: {q}, {q_halt[step, i]}"

    def in_browser(self, script):
        """The value that the script returns in the page."""
        if not BROWSER:
            pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
        harness = f"""<script>
        const value = (() => {{ {script} }})();
        document.body.textContent = "VALUE " + JSON.stringify(value) + " END";
        </script></body>"""
        copy = self.path.with_name("copy.html")
        copy.write_text(self.html.replace("</body>", harness), encoding="utf-8")
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command.append(f"--user-data-dir={self.path.parent / 'profile'}")
        done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120)
        found = re.search("VALUE (.*) END", done.stdout.split("<body")[1])
        assert found, done.stdout[-2000:]
        return json.loads(found[1])


# ---------------------------------------------------------------------------------------------
# The forward pass


@pytest.mark.skipif(not NODE, reason="node is not installed")
@pytest.mark.parametrize("name", CONFIGS)
def test_node_computes_what_pytorch_computes(tmp_path, name):
    p = Page(tmp_path, name)
    script = f"""{p.script} {RESULTS}
    const page = JSON.parse(require("fs").readFileSync(0));
    console.log(JSON.stringify(results(loadModel(page), page, {N_STEPS})));
    """
    done = subprocess.run([NODE, "-e", script], input=p.data, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    p.check(done.stdout)


@pytest.mark.parametrize("name", ["sudoku, mlp", "maze, grid"])
def test_browser_computes_what_pytorch_computes(tmp_path, name):
    p = Page(tmp_path, name)
    results = p.in_browser(f"{RESULTS} return results(model, page, {N_STEPS});")
    p.check(json.dumps(results))


# ---------------------------------------------------------------------------------------------
# The rules, the buttons, keys and mouse


@pytest.mark.parametrize("name", ["sudoku, mlp", "maze, grid"])
def test_the_page_judges_answers_as_python_does(tmp_path, name):
    p = Page(tmp_path, name)
    questions, labels, _ = p.split.gather(np.arange(N_PUZZLES))
    size = int(questions.shape[1] ** 0.5)
    # the label, the question, a label with one token changed, a maze whose path has a branch
    changed = labels.copy()
    changed[:, 5] = np.where(changed[:, 5] == 2, 3, 2)
    branched = labels.copy()
    for row in branched:
        row[(row == 2).argmax()] = 5
    boards = np.stack([labels, questions, changed, branched], axis=1)  # (20, 4, S)
    check = maze.check if name.startswith("maze") else sudoku.check
    expected = check(np.repeat(questions[:, None], 4, axis=1), boards, size)
    assert expected[:, 0].all() and not expected[:, 1:].any()
    script = f"""return {json.dumps(boards.tolist())}.map((boards, i) => {{
      setQuestion(page.puzzles[i]);
      return boards.map(board => judge(board, true));
    }});"""
    for i, verdicts in enumerate(p.in_browser(script)):
        for k, verdict in enumerate(verdicts):
            assert verdict["solved"] == expected[i, k], (i, k)
            assert verdict["solved"] == verdict["text"].startswith("Solved")
            assert verdict["text"], (i, k)
            if k == 2 and name.startswith("sudoku"):
                assert any(verdict["wrong"]), i


USE = """
const seen = [];
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const shown = () => cells.map(cell => cell.textContent).join("");
const count = name => document.querySelectorAll("#board ." + name).length;
const touch = (type, cell, buttons = 1) => {
  const { x, y, width, height } = cells[cell].getBoundingClientRect();
  const where = { clientX: x + width / 2, clientY: y + height / 2, buttons, bubbles: true };
  cells[cell].dispatchEvent(new PointerEvent(type, where));
};
const text = id => $(id).textContent;
const see = () => seen.push([shown(), text("count"), text("verdict"), text("think")]);
"""


def test_sudoku_board(tmp_path):
    p = Page(tmp_path, "sudoku, mlp")
    script = """
    see();
    press(" "); press(" "); see();                              // two steps
    seen.push([count("changed") > 0, count("given")]);
    press("Enter"); see(); press("Enter"); see();               // think, pause
    while (steps.length < 4) step();
    see();
    while (steps.length < 64) step();
    see(); seen.push([$("think").disabled, document.querySelectorAll("#history i").length]);
    $("clear").click(); see();                                  // the answer, then the board
    $("clear").click(); see();
    touch("pointerdown", 0); press("1"); press("ArrowRight"); press("1"); press("9"); see();
    seen.push(count("wrong"));
    press("Backspace"); see();
    document.querySelectorAll("#pad button")[3].click(); see();
    $("new").click(); seen.push([number, $("number").textContent]);
    step(); const before = $("about").textContent;
    page.q_halt[2] += 1; $("new").click(); step();
    seen.push([before, $("about").textContent]);
    return seen;"""
    start, stepped, classes, thinking, paused, rest, end, limits, cleared, empty, typed, wrong, erased, pad, \
        new, about = p.in_browser(USE + script)  # fmt: skip
    question = p.split.gather(np.zeros(1, int))[0][0]
    digits = "".join(str(token - 1) for token in question if token > 1)
    assert start == [digits, "Step 0 of 4", "Press Think.", "Think"]
    assert len(stepped[0]) == 16 and stepped[1] == "Step 2 of 4"
    assert classes == [True, len(digits)]
    assert thinking[1:] == ["Step 3 of 4", thinking[2], "Pause"]
    assert paused[1:] == ["Step 3 of 4", thinking[2], "Think"]
    assert rest[1] == "Step 4 of 4" and rest[3] == "Think to 64"
    assert end[1] == "Step 64 of 64" and limits == [True, 64]
    assert cleared == start
    assert empty[0] == "" and empty[1] == "Step 0 of 4"
    assert typed[0] == "11" and typed[2] == "2 cells break a rule." and wrong == 2
    assert erased[0] == "1" and pad[0] == "14"
    assert new == [1, "puzzle 2 of 20"]
    assert about[0].startswith("A Tiny Recursive Model with") and "not compute" in about[1]


def test_maze_board(tmp_path):
    p = Page(tmp_path, "maze, grid")
    script = """
    $("clear").click(); see();                                  // S and G in the corners
    touch("pointerdown", 8); touch("pointermove", 9); touch("pointermove", 10); touch("pointermove", 11, 0);
    touch("pointerup", 10, 0); touch("pointermove", 12); seen.push(question.slice(7, 14));
    touch("pointerdown", 9); touch("pointerup", 9); seen.push(question.slice(7, 14));
    touch("pointerdown", 0); touch("pointermove", 1); touch("pointermove", 8); touch("pointermove", 9);
    touch("pointerup", 9); seen.push(question.slice(0, 14));    // S does not cross a wall
    press("ArrowDown"); press("g"); seen.push([question[0], question[48]]);
    press("w"); press("ArrowRight"); press("w"); seen.push(question.slice(0, 3));
    press("Backspace"); seen.push(question.slice(0, 3));
    step(); see(); touch("pointerdown", 30); see();
    setQuestion([3, 1, ...Array(5).fill(2), 1, 1, ...Array(39).fill(2), 4]); see();
    return seen;"""
    empty, drawn, erased, dragged, moved, walled, freed, stepped, edited, separate = p.in_browser(
        USE + script
    )
    assert empty[0] == "SG" and empty[1] == "Step 0 of 4"
    assert drawn == [2, 1, 1, 1, 2, 2, 2] and erased == [2, 1, 2, 1, 2, 2, 2]
    assert dragged == [2] * 7 + [2, 1, 3, 1, 2, 2, 2]
    assert moved == [4, 2]
    assert walled == [4, 1, 2] and freed == [4, 2, 2]
    assert stepped[1] == "Step 1 of 4" and edited[1] == "Step 0 of 4"
    assert separate[2] == "Walls separate S and G."


# ---------------------------------------------------------------------------------------------
# The file


def test_mini_page_is_small_and_self_contained(tmp_path, capsys):
    rng = np.random.RandomState(0)
    boards = np.array([sudoku.make_puzzle(rng, 6)[:2] for _ in range(20)]).swapaxes(0, 1)
    recipe = {"builder": "sudoku", "command": "python prepare/sudoku.py"}
    prepare.write_dataset(tmp_path / "data", {"train": boards, "test": boards}, 8, recipe)
    split = Split(tmp_path / "data", "test")
    names = {f.name for f in fields(Config)} - {"dtype"}
    settings = {name: value for name, value in PRESETS["mini"].items() if name in names}
    save_run(tmp_path, split, model_of(Config(vocab_size=8, seq_len=36, **settings)))
    path = tmp_path / "page.html"
    page.main([str(tmp_path), str(path)])
    assert path.stat().st_size < 300_000
    size = len(path.read_text()) // 1000
    assert capsys.readouterr().out.endswith(f"wrote {path} ({size} KB): open it in a browser\n")
    data, rest = re.search("(<script id=.data.*)(<script id=.model.*)", path.read_text(), re.DOTALL).groups()
    assert f"python -m tools.page {tmp_path} {path} (commit " in data
    template = page.TEMPLATE.read_text()
    for text in (template, rest):
        assert not re.search(r"https?:|//\w|\bsrc=|@import|url\(|fetch\(|XMLHttpRequest", text)
    assert re.findall('href="(.*?)"', template) == ["data:,"], (
        "no icon: a browser would ask the server for one"
    )


def test_a_name_cannot_end_the_script_of_the_data(tmp_path):
    folder = tmp_path / "<" / "script>"
    folder.mkdir(parents=True)
    p = Page(folder, "sudoku, mlp")
    assert "</script>" in json.loads(p.data)["made"]


def test_refusals(tmp_path, capsys):
    attention = CONFIGS["sudoku, attention"]
    rope = replace(attention, pos_encodings="rope")
    with pytest.raises(UserError, match="cannot compute rope; train with --pos-encodings learned or none"):
        page.check_supported(rope, "sudoku")
    page.check_supported(replace(TINY, pos_encodings="rope"), "sudoku")  # --mixer mlp ignores it
    with pytest.raises(UserError, match="score_mod mine; train with grid or none"):
        page.check_supported(replace(attention, score_mod="mine"), "maze")
    for task in ("arc", "regression", "tokens"):
        with pytest.raises(UserError, match=f"the task is {task}"):
            page.check_supported(TINY, task)

    split = Split(sudoku_dir(tmp_path / "data"), "test")
    save_run(tmp_path, split, model_of(rope))
    with pytest.raises(UserError, match="rope"):
        page.main([str(tmp_path), str(tmp_path / "page.html")])
    save_run(tmp_path, split, model_of())
    with pytest.raises(UserError, match="cannot write"):
        page.main([str(tmp_path), str(tmp_path)])
    assert not (tmp_path / "page.html").exists()


# ---------------------------------------------------------------------------------------------
# The notebook

NOTEBOOK = ROOT / "assets" / "trm.ipynb"


def test_notebook_is_valid():
    """The parts of nbformat 4 that Colab and Jupyter require; without outputs."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert cell["metadata"] == {} and all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown" and cell.keys() == {"cell_type", "metadata", "source"}
    assert text.count("github.com") == 1, "the repository is named in one place"


def test_notebook_runs(tmp_path, monkeypatch):
    """All code cells, in a copy of the repository and with tiny runs."""
    data = sudoku_dir(tmp_path / "data")
    tiny = [*FLAGS[2:], "--mixer", "mlp", "--pos-encodings", "none", "--data", str(data)]
    shown = []
    pictures = types.SimpleNamespace(
        Image=lambda path: (tmp_path / "repo" / path).read_bytes(), display=shown.append
    )
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=pictures))
    monkeypatch.setitem(sys.modules, "IPython.display", pictures)
    monkeypatch.setenv("TRM_PYTHON", sys.executable)
    monkeypatch.chdir(tmp_path)
    namespace = {}

    def shell(command):
        words = command.split()
        if command == "git clone --depth 1 {REPOSITORY} trm-speedrun":
            ignored = shutil.ignore_patterns(".*", "data", "runs", "tests", "__pycache__")
            shutil.copytree(ROOT, tmp_path / "repo", ignore=ignored)
        elif words[:2] == [".venv/bin/python", "eval.py"]:
            flags().parse_args(words[2:])
        elif command != "git diff":
            words = [sys.executable if word == ".venv/bin/python" else word for word in words]
            if words[0] == "./speedrun.sh" and words[1] == "mini" or "train.py" in words:
                words += tiny
            done = subprocess.run(words, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr

    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            python = ""
            for line in cell["source"]:
                if line.startswith("%cd "):
                    line = 'chdir("repo")\n'
                elif line.startswith("!"):
                    line = f"shell({line[1:].strip()!r})\n"
                python += line
            exec(python, {"shell": shell, "chdir": os.chdir, **namespace}, namespace)
    assert len(shown) == 3 and all(image.startswith(b"\x89PNG") for image in shown)
    assert (tmp_path / "repo" / "model.py").read_text() == (ROOT / "model.py").read_text()
    assert len(list((tmp_path / "repo" / "runs").glob("*/step_*.ckpt"))) >= 2
