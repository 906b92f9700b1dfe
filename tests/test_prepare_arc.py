"""prepare/arc.py: the published bytes, naive loops, both layouts, hidden test sets, what is refused."""
import hashlib
import io
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from tiny_arc import pair, tiny_subsets, write_source

import prepare
from common import UserError, cli, sha256
from prepare import arc

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
REAL = ROOT.parent / "shared" / "arc"            # 10 MB, not in git
TINY_FLAGS = ["--subsets", "training", "evaluation", "--num-aug", "30", "--seed", "5"]


def files_of(folder):
    """{name: bytes} of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(argv, tmp_path, capsys):
    """Run main as a script does; the line it prints. Nothing but the source may be there afterwards."""
    with pytest.raises(SystemExit) as e:
        cli(lambda: arc.main([*map(str, argv)]))
    err = capsys.readouterr().err
    assert (e.value.code, err.count("\n")) == (2, 1) and err.startswith("error: "), err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    return err


# ---------------------------------------------------------------------------------------------
# SPEC section 8 once more, slowly, with numpy's own generator

TURN = [lambda a: a, lambda a: np.rot90(a, 1), lambda a: np.rot90(a, 2), lambda a: np.rot90(a, 3), np.fliplr,
        np.flipud, np.transpose, lambda a: np.fliplr(np.rot90(a))]


def naive_canvas(grid, down=0, right=0):
    canvas = np.zeros((30, 30), np.uint8)
    rows, columns = grid.shape
    for r in range(rows):
        for c in range(columns):
            canvas[down + r, right + c] = grid[r, c] + 2
    for r in range(rows):
        if right + columns < 30:
            canvas[down + r, right + columns] = 1
    for c in range(columns):
        if down + rows < 30:
            canvas[down + rows, right + c] = 1
    return canvas.ravel()


def naive_build(subsets, test_set, num_aug, seed, hidden=False):
    """-> {file: bytes} of the whole dataset but recipe.json. hidden: the test outputs are unknown."""
    rng = np.random.RandomState(seed)
    groups, test_puzzles = {"train": [], "test": []}, {}
    for subset, puzzles in subsets.items():
        puzzles = list(puzzles.items())
        rng.shuffle(puzzles)
        for name, puzzle in puzzles:
            arrays = {key: [(np.array(e["input"], np.uint8), np.array(e.get("output", [[0]]), np.uint8))
                            for e in examples] for key, examples in puzzle.items()}

            def look(version):
                return sorted(repr((a.tolist(), b.tolist())) for key in version for a, b in version[key])

            kept = [(name, arrays)]
            for _ in range(5 * num_aug):
                if len(kept) == num_aug + 1:
                    break
                t = rng.randint(0, 8)
                colours = np.array([0, *rng.permutation(np.arange(1, 10, dtype=np.uint8))], np.uint8)
                version = {key: [(TURN[t](colours[a]), TURN[t](colours[b])) for a, b in arrays[key]]
                           for key in arrays}
                if all(look(version) != look(other) for _, other in kept):
                    kept.append((f"{name}|||t{t}|||{''.join(map(str, colours))}", version))
            if subset == test_set:
                for split in groups:
                    groups[split].append([(n, v[split]) for n, v in kept])
                test_puzzles[name] = puzzle
            else:
                groups["train"].append([(n, [e for key in v for e in v[key]]) for n, v in kept])
    ids = {}
    for split in groups:
        for group in groups[split]:
            for name, _ in group:
                if name not in ids:
                    ids[name] = len(ids) + 1
    files = {"identifiers.json": json.dumps(["<blank>", *ids]).encode(),
             "test_puzzles.json": json.dumps(test_puzzles).encode()}
    for split in groups:
        inputs, labels, identifiers, puzzle_indices, group_indices = [], [], [], [0], [0]
        for group in groups[split]:
            for name, examples in group:
                fixed = rng.randint(0, len(examples))
                for i, (a, b) in enumerate(examples):
                    down = right = 0
                    if split == "train" and i != fixed:
                        down = rng.randint(0, 30 - max(a.shape[0], b.shape[0]) + 1)
                        right = rng.randint(0, 30 - max(a.shape[1], b.shape[1]) + 1)
                    inputs.append(naive_canvas(a, down, right))
                    labels.append(naive_canvas(b, down, right) * (not hidden or split == "train"))
                identifiers.append(ids[name])
                puzzle_indices.append(len(inputs))
            group_indices.append(len(identifiers))
        for name, rows in (("inputs", inputs), ("labels", labels), ("puzzle_identifiers", identifiers),
                           ("puzzle_indices", puzzle_indices), ("group_indices", group_indices)):
            file = io.BytesIO()
            np.save(file, np.array(rows, np.uint8 if name in ("inputs", "labels") else np.int32))
            files[f"{split}/all__{name}.npy"] = file.getvalue()
        files[f"{split}/dataset.json"] = json.dumps({
            "pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": 12, "seq_len": 900,
            "num_puzzle_identifiers": len(ids) + 1, "total_groups": len(groups[split]),
            "mean_puzzle_examples": len(inputs) / len(identifiers), "total_puzzles": len(identifiers),
            "sets": ["all"]}).encode()
    return files


def test_tiny_source_equals_naive_builder(tmp_path):
    """Run as a script, in a process whose sets and dicts of strings have an order of their own."""
    source = write_source(tmp_path / "source", tiny_subsets())
    argv = ["--source", source, *TINY_FLAGS, "--output-dir", tmp_path / "d"]
    done = subprocess.run([sys.executable, ROOT / "prepare/arc.py", *argv], capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": "1"})
    assert done.returncode == 0, done.stderr
    expected, got = naive_build(tiny_subsets(), "evaluation", 30, 5), files_of(tmp_path / "d")
    recipe = json.loads(got.pop("recipe.json"))
    assert sorted(got) == sorted(expected)
    assert [name for name in expected if got[name] != expected[name]] == []
    file = "arc-agi_training_challenges.json"
    assert recipe["source_sha256"][file] == hashlib.sha256((source / file).read_bytes()).hexdigest()
    assert (recipe["subsets"], recipe["test_set_name"], recipe["num_aug"], recipe["seed"]) == (
        ["training", "evaluation"], "evaluation", 30, 5)
    assert (recipe["source"], recipe["hidden_test_set"]) == (str(source), False)
    assert done.stderr == ("warning: 1 of 4 test pairs (of two tests ...) also stand in the training split: "
                           "their score is memory\n")
    for line in ("train: 5 groups", "test: 2 groups", "rows in the puzzle table"):
        assert line in done.stdout
    names = json.loads(got["identifiers.json"])
    # colour 1 alone: 9 images, whatever the turn
    assert sum(name.startswith("symmetric") for name in names) == 9


def test_recipe_rebuilds_the_dataset(tmp_path):
    source = write_source(tmp_path / "source", tiny_subsets())
    arc.main(["--source", str(source), *TINY_FLAGS, "--output-dir", str(tmp_path / "a")])
    builder, flags = prepare.recipe_flags(json.loads((tmp_path / "a/recipe.json").read_text()))
    assert builder == "arc"
    arc.main([*flags, "--output-dir", str(tmp_path / "b")])
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.skipif(not REAL.exists(), reason="the real ARC files (../shared/arc) are not here")
def test_arc1_with_8_augmentations_is_the_published_dataset(tmp_path):
    arc.main(["--source", str(REAL), "--num-aug", "8", "--output-dir", str(tmp_path / "d")])
    golden = json.loads((GOLDEN / "arc1_aug8.json").read_text())
    expected = {name: facts["sha256"] for name, facts in golden.items()}
    assert {name: sha256(tmp_path / "d" / name) for name in golden} == expected


# ---------------------------------------------------------------------------------------------
# Hidden test sets, and the layout of fchollet/ARC-AGI

HIDDEN_FLAGS = ["--subsets", "training", "test", "--test-set-name", "test", "--num-aug", "30", "--seed", "5"]


@pytest.fixture
def hidden(tmp_path):
    """A source whose subset "test" has no solutions, and its subsets as the files have them."""
    subsets = tiny_subsets()
    subsets["test"] = subsets.pop("evaluation")
    source = write_source(tmp_path / "source", subsets)
    (source / "arc-agi_test_solutions.json").unlink()
    subsets = json.loads(json.dumps(subsets))       # one example stands in two subsets
    for puzzle in subsets["test"].values():
        for example in puzzle["test"]:
            del example["output"]
    return source, subsets


def test_hidden_test_set_equals_naive_builder(hidden, tmp_path, capsys):
    source, subsets = hidden
    arc.main(["--source", str(source), *HIDDEN_FLAGS, "--output-dir", str(tmp_path / "d")])
    got, expected = files_of(tmp_path / "d"), naive_build(subsets, "test", 30, 5, hidden=True)
    recipe = json.loads(got.pop("recipe.json"))
    assert recipe["hidden_test_set"] is True and "arc-agi_test_challenges.json" in recipe["source_sha256"]
    assert [name for name in expected if got[name] != expected[name]] == []
    test = {name: np.load(tmp_path / f"d/test/all__{name}.npy") for name in ("inputs", "labels")}
    assert test["labels"].shape == test["inputs"].shape
    assert not test["labels"].any() and test["inputs"].any(1).all()
    assert np.load(tmp_path / "d/train/all__labels.npy").any(1).all()
    for puzzle in json.loads(got["test_puzzles.json"]).values():
        assert all("output" not in example for example in puzzle["test"])
        assert all("output" in example for example in puzzle["train"])
    out, err = capsys.readouterr()
    assert "test is a hidden test set, without outputs: it is answered, but not scored" in out and err == ""


def test_outputs_that_are_null_are_unknown(hidden, tmp_path):
    source, _ = hidden
    arc.main(["--source", str(source), *HIDDEN_FLAGS, "--output-dir", str(tmp_path / "a")])
    path = source / "arc-agi_test_challenges.json"
    puzzles = json.loads(path.read_text())
    for puzzle in puzzles.values():
        puzzle["test"] = [{**example, "output": None} for example in puzzle["test"]]
    path.write_text(json.dumps(puzzles))
    arc.main(["--source", str(source), *HIDDEN_FLAGS, "--output-dir", str(tmp_path / "b")])
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert all(a[name] == b[name] for name in a if name != "recipe.json")


def test_hidden_subset_can_only_be_the_test_set(hidden, tmp_path, capsys):
    """The line names the command that works."""
    source, _ = hidden
    argv = ["--source", source, *HIDDEN_FLAGS, "--test-set-name", "training", "--output-dir", tmp_path / "d"]
    err = refused(argv, tmp_path, capsys)
    assert "arc-agi_test_solutions.json not found; add it, leave test out (test training there), or" in err
    python, script, *argv = shlex.split(err.split("hidden test set: ")[1])
    assert python == "python" and script.endswith("prepare/arc.py")
    arc.main(argv)
    assert json.loads((tmp_path / "d/recipe.json").read_text())["test_set_name"] == "test"


def one_file_a_task(folder, subsets, hidden=()):
    for subset, puzzles in subsets.items():
        (folder / subset).mkdir(parents=True)
        for name, puzzle in puzzles.items():
            if subset in hidden:
                puzzle = {**puzzle, "test": [{"input": example["input"]} for example in puzzle["test"]]}
            (folder / subset / f"{name}.json").write_text(json.dumps(puzzle))
    return folder


@pytest.mark.parametrize("inside", ["", "data"])
def test_folders_of_tasks_equal_kaggle_files(inside, tmp_path):
    """The layout of fchollet/ARC-AGI gives the bytes of Kaggle's with the tasks sorted by name."""
    subsets = {subset: dict(sorted(puzzles.items())) for subset, puzzles in tiny_subsets().items()}
    kaggle = write_source(tmp_path / "kaggle", subsets)
    one_file_a_task(tmp_path / "source" / inside, subsets)
    arc.main(["--source", str(kaggle), *TINY_FLAGS, "--output-dir", str(tmp_path / "a")])
    arc.main(["--source", str(tmp_path / "source"), *TINY_FLAGS, "--output-dir", str(tmp_path / "b")])
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    recipe = json.loads(b["recipe.json"])
    assert len(recipe["source_sha256"]) == 5 and recipe["hidden_test_set"] is False
    assert sorted(a) == sorted(b) and [n for n in a if a[n] != b[n] and n != "recipe.json"] == []


def test_folder_of_tasks_can_be_hidden(tmp_path, capsys):
    source = one_file_a_task(tmp_path / "source", tiny_subsets(), hidden=("evaluation",))
    argv = ["--source", source, *TINY_FLAGS, "--output-dir", tmp_path / "d"]
    err = refused([*argv, "--test-set-name", "training"], tmp_path, capsys)
    assert "source/evaluation has no outputs of test examples; add it, leave evaluation out" in err
    arc.main([*map(str, argv)])
    assert not np.load(tmp_path / "d/test/all__labels.npy").any()


def test_bad_task_file_is_named(tmp_path, capsys):
    source = one_file_a_task(tmp_path / "source", tiny_subsets())
    path = source / "training/full.json"
    path.write_text(json.dumps({"train": [pair([[1]], [[12]])], "test": [pair([[1]], [[1]])]}))
    argv = ["--source", source, *TINY_FLAGS, "--output-dir", tmp_path / "d"]
    assert "training/full.json: puzzle full: output of train example 0 is [[12]], not a grid" in (
        refused(argv, tmp_path, capsys))
    path.write_text("<html>")
    assert "training/full.json is not valid JSON" in refused(argv, tmp_path, capsys)
    path.write_text("[]")
    assert "full.json: puzzle full has null as train examples" in refused(argv, tmp_path, capsys)


def test_absent_subset_names_the_command_for_those_there(tmp_path, capsys):
    """A clone of fchollet/ARC-AGI has no "concept", which is a default."""
    source = one_file_a_task(tmp_path / "source" / "data", tiny_subsets()).parent
    argv = ["--source", source, "--num-aug", "2", "--output-dir", tmp_path / "d"]
    err = refused(argv, tmp_path, capsys)
    assert "arc-agi_concept_challenges.json not found; add it, or choose --subsets from evaluation" in err
    arc.main(shlex.split(err.split("there: ")[1])[2:])
    recipe = json.loads((tmp_path / "d/recipe.json").read_text())
    assert (recipe["subsets"], recipe["num_aug"]) == (["training", "evaluation"], 2)
    shutil.rmtree(tmp_path / "d")
    shutil.rmtree(source / "data")
    capsys.readouterr()
    err = refused(argv, tmp_path, capsys)
    assert "holds nothing in the layouts of --help; name another folder with --source" in err


# ---------------------------------------------------------------------------------------------
# One grid

def test_grids_round_trip():
    rng = np.random.RandomState(0)
    for t in range(8):
        grid = rng.randint(0, 10, (rng.randint(1, 31), rng.randint(1, 31))).astype(np.uint8)
        colours = bytes([0, *rng.permutation(np.arange(1, 10))])
        turned = arc.augment(grid, t, colours)
        assert np.array_equal(turned, TURN[t](np.array(list(colours))[grid]))
        assert np.array_equal(arc.undo(turned, t, colours), grid)
        assert np.array_equal(arc.encode(grid), naive_canvas(grid))
        assert np.array_equal(arc.decode(arc.encode(grid)), grid)
        assert arc.parse_name(arc.make_name("a|||b", t, colours)) == ("a|||b", t, colours)
    assert arc.parse_name("007bbfb7") == ("007bbfb7", 0, bytes(range(10)))
    swapped = bytes([0, 2, 1, 3, 4, 5, 6, 7, 8, 9])
    assert arc.parse_name("007bbfb7|||t6|||0213456789") == ("007bbfb7", 6, swapped)


def naive_crop(tokens):
    best, size, width = 0, (0, 0), 30
    grid = tokens.reshape(30, 30)
    for r in range(30):
        for c in range(width):
            if not 2 <= grid[r, c] <= 11:
                width = c
                break
        if (r + 1) * width > best:
            best, size = (r + 1) * width, (r + 1, width)
    return size


def test_crop_equals_naive_loop():
    rng = np.random.RandomState(1)
    rows = [np.full(900, 5), np.zeros(900), np.ones(900), np.r_[0, np.full(899, 5)]]
    for share in (0, .001, .01, .05, .3):
        for _ in range(60):
            row = arc.encode(rng.randint(0, 10, (rng.randint(1, 31), rng.randint(1, 31))))
            rows.append(np.where(rng.rand(900) < share, rng.randint(0, 12, 900), row))
    tokens = np.array(rows)
    expected = [naive_crop(row) for row in tokens]
    for dtype in (np.uint8, np.int32, np.int64):
        assert list(zip(*map(np.ndarray.tolist, arc.crop(tokens.astype(dtype))))) == expected
    assert arc.decode(tokens[1]).shape == (0, 0)


# ---------------------------------------------------------------------------------------------
# What is refused: one line, exit code 2, nothing left

def change(subset, kind, edit):
    def apply(folder):
        path = folder / f"arc-agi_{subset}_{kind}.json"
        value = json.loads(path.read_text())
        value = edit(value) or value
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return apply


def grid_becomes(grid):
    return change("training", "challenges", lambda v: v["full"]["train"][1].update(output=grid))


CHALLENGES = "arc-agi_training_challenges.json: puzzle full: "
SOLUTIONS = "arc-agi_training_solutions.json: puzzle full"
BAD = {
    "not a grid": (grid_becomes("abc"),
                   [CHALLENGES, 'output of train example 1 is "abc", not a grid; give 1..30']),
    "flat": (grid_becomes([1, 2]), [CHALLENGES, "[1, 2], not a grid"]),
    "no output": (change("training", "challenges", lambda v: v["full"]["train"][1].pop("output") and None),
                  [CHALLENGES, "null, not a grid"]),
    "empty": (grid_becomes([]), [CHALLENGES, "[], not a grid"]),
    "empty row": (grid_becomes([[], []]), [CHALLENGES, "[[], []], not a grid"]),
    "ragged": (grid_becomes([[1, 2], [3]]), [CHALLENGES, "[[1, 2], [3]], not a grid", "equally long rows"]),
    "tall": (grid_becomes([[0]] * 31), [CHALLENGES, "[[0], [0], ", "not a grid; give 1..30 equally long"]),
    "wide": (grid_becomes([[0] * 40]), [CHALLENGES, "[[0, 0, ", "rows of 1..30 colours"]),
    "colour": (grid_becomes([[0, 12]]), [CHALLENGES, "[[0, 12]], not a grid", "integers 0..9"]),
    "negative": (grid_becomes([[0, -1]]), [CHALLENGES, "[[0, -1]], not a grid"]),
    "real colour": (grid_becomes([[0, 1.5]]), [CHALLENGES, "[[0, 1.5]], not a grid"]),
    "true": (grid_becomes([[True]]), [CHALLENGES, "[[true]], not a grid"]),
    "bad solution": (change("training", "solutions", lambda v: v["full"].__setitem__(0, [[10]])),
                     [SOLUTIONS, "output of test example 0 is [[10]], not a grid"]),
    "missing solution": (change("training", "solutions", lambda v: v.pop("full") and None),
                         [SOLUTIONS + " has no solutions for 1 test inputs"]),
    "too few solutions": (change("evaluation", "solutions", lambda v: v["two tests"].pop() and None),
                          ["evaluation_solutions.json: puzzle two tests has 2 solutions for 3 test inputs"]),
    "no examples": (change("training", "challenges", lambda v: v["full"].update(train=[])),
                    ["puzzle full has [] as train examples"]),
    "no test key": (change("training", "challenges", lambda v: v["full"].pop("test") and None),
                    ["puzzle full has null as test examples"]),
    "list": (change("training", "challenges", lambda v: [1]),
             ["training_challenges.json: holds [1], not {puzzle id"]),
    "not JSON": (change("training", "challenges", lambda v: json.dumps(v)[:99]),
                 ["training_challenges.json is not valid JSON", "fetch it again"]),
    "missing solutions": (lambda folder: (folder / "arc-agi_training_solutions.json").unlink(),
                          ["arc-agi_training_solutions.json not found", "evaluation training there"]),
    "missing challenges": (lambda folder: (folder / "arc-agi_training_challenges.json").unlink(),
                           ["arc-agi_training_challenges.json not found", "from evaluation there: python "]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_refused(tmp_path, capsys, case):
    edit, expected = BAD[case]
    source = write_source(tmp_path / "source", tiny_subsets())
    edit(source)
    err = refused(["--source", source, *TINY_FLAGS, "--output-dir", tmp_path / "d"], tmp_path, capsys)
    assert [part for part in expected if part not in err] == [], err


@pytest.mark.parametrize("flags, expected", [
    (["--subsets", "training", "evaluation", "extra"],
     "arc-agi_extra_challenges.json not found; add it, or choose --subsets from evaluation training there"),
    (["--subsets", "training"], "--test-set-name evaluation among them"),
    (["--subsets", "evaluation", "evaluation"], "must name each subset once"),
    (["--num-aug", "-1"], "--num-aug: -1 is out of range; give 0 or more"),
    (["--seed", "-1"], "--seed: -1 is out of range"),
    (["--seed", str(2**32)], "--seed: 4294967296 is out of range; give 0 .. 4294967295")])
def test_bad_flags_are_refused(tmp_path, capsys, flags, expected):
    source = write_source(tmp_path / "source", tiny_subsets())
    argv = ["--source", source, *TINY_FLAGS, "--output-dir", tmp_path / "d", *flags]
    assert expected in refused(argv, tmp_path, capsys)


def test_full_disk_leaves_nothing(tmp_path, capsys):
    """A file size limit stands in for a full disk."""
    source = write_source(tmp_path / "source", tiny_subsets())
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        with pytest.raises(SystemExit) as e:
            cli(lambda: arc.main(["--source", str(source), *TINY_FLAGS, "--output-dir", str(tmp_path / "d")]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    last = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and last.startswith("error: ") and "could not be written" in last, last
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# ---------------------------------------------------------------------------------------------
# Download

class Reply(io.BytesIO):
    """What urlopen returns."""


def test_download_takes_only_the_pinned_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_source(tmp_path / "source", tiny_subsets())
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return Reply((source / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr(arc.urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match="sha256 .* is not .*; fetch it elsewhere"):
        arc.main(TINY_FLAGS)
    assert list((tmp_path / "data" / "arc-source").iterdir()) == []
    monkeypatch.setattr(arc, "SHA256", {p.name: sha256(p) for p in sorted(source.iterdir())})
    arc.main(TINY_FLAGS)
    assert (tmp_path / "data" / "arc1concept-aug-30" / "recipe.json").exists()
    assert arc.COMMIT in asked[-1] and arc.FOLDER in asked[-1]
    asked.clear()
    arc.main(TINY_FLAGS)                         # all there: nothing is fetched again
    assert asked == []
    name = next(iter(arc.SHA256))
    (tmp_path / "data" / "arc-source" / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name}: sha256 .*delete it"):
        arc.main(TINY_FLAGS)
    with pytest.raises(UserError, match="there are evaluation training; your own need --source"):
        arc.main([*TINY_FLAGS, "--subsets", "evaluation", "extra"])


def test_no_network_says_what_to_put_where(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arc.urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError) as e:
        arc.main([])
    for part in ("no network", "arc-agi_concept_challenges.json", "arc-agi_training_solutions.json",
                 "data/arc-source", arc.COMMIT, "then: python "):
        assert part in str(e.value)
    argv = shlex.split(str(e.value).split("then: python ")[1])
    assert argv[1:] == ["--source", "DIR", "--output-dir", "data/arc1concept-aug-1000"]
    assert Path(argv[0]) == ROOT / "prepare/arc.py"
    assert "training2" not in str(e.value) and "\n" not in str(e.value)
