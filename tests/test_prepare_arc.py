"""prepare/arc.py: the published bytes, naive loops, both layouts, hidden test sets, what is refused."""
import hashlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from tiny_arc import pair, tiny_subsets, write_source

import eval as scoring
import prepare
from common import UserError, cli, sha256
from data import Split
from prepare import arc
from runs import ALONE, arc_model, save_run

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
REAL = ROOT.parent / "shared" / "arc"            # 10 MB, not in git
TINY_FLAGS = ["--subsets", "training", "evaluation", "--num-aug", "30", "--seed", "5"]


def files_of(folder):
    """{name: bytes} of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def build(source, folder, *flags):
    """{name: bytes} of the files of the dataset that is built of `source` in `folder`."""
    arc.main(["--source", str(source), *(flags or TINY_FLAGS), "--output-dir", str(folder)])
    return files_of(folder)


def refused(tmp_path, capsys, *flags):
    """Run main as a script does; the line it prints. Nothing but the source may be there afterwards."""
    with pytest.raises(SystemExit) as e:
        cli(lambda: build(tmp_path / "source", tmp_path / "d", *flags))
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
    assert (recipe["subsets"], recipe["source"]) == (["training", "evaluation"], str(source))
    assert done.stderr == (
        "warning: 1 of 4 test pairs also stand in the training split: their score is memory\n")
    for line in ("train: 5 groups", "test: 2 groups", "rows in the puzzle table"):
        assert line in done.stdout
    # colour 1 alone: 9 images, whatever the turn
    assert got["identifiers.json"].count(b'"symmetric') == 9


def test_recipe_rebuilds_the_dataset(tmp_path):
    first = build(write_source(tmp_path / "source", tiny_subsets()), tmp_path / "a")
    builder, flags = prepare.recipe_flags(json.loads(first["recipe.json"]))
    arc.main([*flags, "--output-dir", str(tmp_path / "b")])
    assert builder == "arc" and files_of(tmp_path / "b") == first


@pytest.mark.skipif(not REAL.exists(), reason="the real ARC files (../shared/arc) are not here")
def test_arc1_with_8_augmentations_is_the_published_dataset(tmp_path):
    arc.main(["--source", str(REAL), "--num-aug", "8", "--output-dir", str(tmp_path / "d")])
    golden = json.loads((GOLDEN / "arc1_aug8.json").read_text())
    expected = {name: facts["sha256"] for name, facts in golden.items()}
    assert {name: sha256(tmp_path / "d" / name) for name in golden} == expected


# ---------------------------------------------------------------------------------------------
# A part of the tasks

def naive_fits(puzzle, side):
    shapes = [np.shape(e[part]) for key in puzzle for e in puzzle[key] for part in e]
    return max(map(max, shapes)) <= side


@pytest.mark.parametrize("side, left", [
    (2, ["symmetric", "swapped"]), (4, ["symmetric", "swapped", "cross"])])
def test_max_side_equals_naive_builder_on_small_tasks(side, left, tmp_path):
    """As if the files held no others, in all subsets, a subset of which nothing is left included."""
    small = {subset: {name: puzzle for name, puzzle in puzzles.items() if naive_fits(puzzle, side)}
             for subset, puzzles in tiny_subsets().items()}
    source = write_source(tmp_path / "source", tiny_subsets())
    got = build(source, tmp_path / "d", *TINY_FLAGS, "--test-set-name", "training", "--max-side", str(side))
    expected = naive_build(small, "training", 30, 5)
    assert json.loads(got.pop("recipe.json"))["max_side"] == side
    assert got == expected
    assert {n for n in json.loads(got["identifiers.json"])[1:] if "|||" not in n} == set(left)


def test_unknown_outputs_have_no_size(hidden, tmp_path):
    source, subsets = hidden
    for example in (pair([[1]], [[2]] * 9), pair([[1]], [[2] * 9]), pair([[1] * 9], [[2]])):
        assert arc.side_of({"train": [example], "test": [{"input": [[1]]}]}) == 9
        assert arc.side_of({"train": [pair([[1]], [[1]])], "test": [example]}) == 9
    assert arc.side_of({"train": [], "test": [{"input": [[1, 2, 3]]}]}) == 3
    got = build(source, tmp_path / "d", *HIDDEN_FLAGS, "--max-side", "4")
    small = {subset: {name: puzzle for name, puzzle in puzzles.items() if naive_fits(puzzle, 4)}
             for subset, puzzles in subsets.items()}
    assert json.loads(got.pop("recipe.json"))["hidden_test_set"] is True
    assert got == naive_build(small, "test", 30, 5, hidden=True) and list(small["test"]) == ["cross"]


def test_halves_part_the_test_set_and_nothing_else(tmp_path, capsys):
    """Both halves, one after the other, are the whole test split; the rest is the same to the byte."""
    source = write_source(tmp_path / "source", tiny_subsets())
    parts = {half: build(source, tmp_path / half, *TINY_FLAGS, "--half", half) for half in arc.HALVES}
    assert capsys.readouterr().err.count("1 of 3 test pairs also stand in the training split") == 1
    whole = build(source, tmp_path / "whole")
    for half, files in parts.items():
        assert json.loads(files["recipe.json"])["half"] == half
        for name in whole:
            same = name.startswith("train/") or name == "identifiers.json"
            assert (files[name] == whole[name]) == same, (half, name)
    puzzles = {half: json.loads(files["test_puzzles.json"]) for half, files in parts.items()}
    assert {half: list(p) for half, p in puzzles.items()} == {"tune": ["cross"], "report": ["two tests"]}
    assert puzzles["tune"] | puzzles["report"] == json.loads(whole["test_puzzles.json"])
    splits = [Split(tmp_path / name, "test") for name in ("whole", *arc.HALVES)]
    rows = [list(zip(*(a.tolist() for a in split.gather(np.arange(len(split)))))) for split in splits]
    assert sorted(rows[0]) == sorted(rows[1] + rows[2]) and all(rows)
    assert len({split.identity for split in splits}) == 1


def test_half_of_a_task_is_one_bit_of_a_hash():
    names = [f"{i:08x}" for i in range(1000)]
    for name in names[:20]:
        byte = hashlib.sha256(f"0:{name}".encode()).digest()[0]
        assert arc.half_of(name) == ("report" if byte % 2 else "tune")
    assert 440 < sum(arc.half_of(name) == "tune" for name in names) < 560


def test_one_model_is_scored_on_both_halves(tmp_path):
    """eval.py --data takes the other half, whose puzzles are those of the checkpoint, by the same rows."""
    source = write_source(tmp_path / "source", tiny_subsets())
    for half in arc.HALVES:
        build(source, tmp_path / half, *TINY_FLAGS, "--half", half)
    split = Split(tmp_path / "report", "test")
    run = save_run(tmp_path / "run", split, arc_model(split))
    args = scoring.flags().parse_args(["--checkpoint", str(run), "--data", str(tmp_path / "tune")])
    opened = scoring.open_model(args, ALONE)
    alone = Split(tmp_path / "tune", "test")
    assert opened.split.dirs == [tmp_path / "tune"] and opened.split.names == alone.names
    rows = np.arange(len(alone))
    for a, b in zip(opened.split.gather(rows), alone.gather(rows)):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("flags, folder", [
    ([], "arc1concept-aug-30"), (["--max-side", "30"], "arc1concept-aug-30"),
    (["--max-side", "4"], "arc1concept-aug-30-side-4"), (["--half", "tune"], "arc1concept-aug-30-tune"),
    (["--max-side", "4", "--test-set-name", "training", "--half", "report"],
     "arc1concept-aug-30-side-4-report")])
def test_part_of_the_tasks_has_a_folder_of_its_own(flags, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arc.main(["--source", str(write_source(tmp_path / "source", tiny_subsets())), *TINY_FLAGS, *flags])
    assert [p.name for p in Path("data").iterdir()] == [folder]


@pytest.mark.parametrize("flags, expected", [
    (["--max-side", "2"], "--max-side 2: no puzzle of evaluation is that small; give 3 or more"),
    (["--max-side", "0"], "--max-side: 0 is out of range; give 1 .. 30"),
    (["--half", "both"], "--half: invalid choice: 'both'"),
    (["--max-side", "4", "--half", "report"],
     "--half report: none of the 1 puzzles of evaluation is in it; give tune, or leave --half out"),
    (["--test-set-name", "training", "--half", "tune"], "--half tune: none of the 3 puzzles of training")])
def test_nothing_left_is_refused(flags, expected, tmp_path, capsys):
    write_source(tmp_path / "source", tiny_subsets())
    assert expected in refused(tmp_path, capsys, *TINY_FLAGS, *flags)


def test_known_dataset_is_built_from_a_source(tmp_path, monkeypatch, capsys):
    """python -m prepare NAME --source DIR: no network, and its own folder."""
    monkeypatch.chdir(tmp_path)
    subsets = tiny_subsets()
    source = write_source(tmp_path / "source", {**subsets, "concept": subsets["evaluation"]})
    prepare.main(["mini-arc", "--source", str(source)])
    flags = "--test-set-name training --max-side 6 --num-aug 24 --half report"
    said = f"prepare/arc.py {flags} --source {source} --output-dir data/arc-6x6-mini\n"
    assert capsys.readouterr().out.split("train:")[0].endswith(said)
    recipe = json.loads(Path("data/arc-6x6-mini/recipe.json").read_text())
    assert (recipe["source"], recipe["max_side"], recipe["half"]) == (str(source), 6, "report")
    builder, rebuilt = prepare.recipe_flags(recipe)
    first = files_of(tmp_path / "data/arc-6x6-mini")
    arc.main([*rebuilt, "--output-dir", "again"])
    assert files_of(tmp_path / "again") == first
    prepare.main(["mini-arc"])
    assert "data/arc-6x6-mini is there" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown dataset 'arc3'; one of: mini sudoku"):
        prepare.main(["mini-arc-tune", "arc3"])


@pytest.mark.skipif(not REAL.exists(), reason="the real ARC files (../shared/arc) are not here")
@pytest.mark.parametrize("name, tasks, inputs", [("mini-arc", 26, 29), ("mini-arc-tune", 20, 24)])
def test_mini_arc_has_the_shape_that_is_known(name, tasks, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare.main([name, "--source", str(REAL)])
    dataset = prepare.KNOWN[name]
    meta = json.loads(Path(dataset.folder, "train/dataset.json").read_text())
    assert {**dataset.shape, "mean_puzzle_examples": None} == {
        **{key: meta[key] for key in dataset.shape}, "mean_puzzle_examples": None}
    assert abs(dataset.shape["mean_puzzle_examples"] - meta["mean_puzzle_examples"]) < 1e-4
    puzzles = json.loads(Path(dataset.folder, "test_puzzles.json").read_text())
    assert (len(puzzles), sum(len(puzzle["test"]) for puzzle in puzzles.values())) == (tasks, inputs)


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
    got = build(source, tmp_path / "d", *HIDDEN_FLAGS)
    expected = naive_build(subsets, "test", 30, 5, hidden=True)
    recipe = json.loads(got["recipe.json"])
    assert recipe["hidden_test_set"] is True and "arc-agi_test_challenges.json" in recipe["source_sha256"]
    assert [name for name in expected if got[name] != expected[name]] == []
    test = {name: np.load(tmp_path / f"d/test/all__{name}.npy") for name in ("inputs", "labels")}
    assert test["labels"].shape == test["inputs"].shape
    assert not test["labels"].any() and test["inputs"].any(1).all()
    out, err = capsys.readouterr()
    assert "test is a hidden test set, without outputs: it is answered, but not scored" in out and err == ""


def test_hidden_subset_can_only_be_the_test_set(hidden, tmp_path, capsys):
    err = refused(tmp_path, capsys, *HIDDEN_FLAGS, "--test-set-name", "training")
    assert "source has no outputs of the test examples of test; add arc-agi_test_solutions.json, leave" in err


def one_file_a_task(folder, subsets):
    for subset, puzzles in subsets.items():
        (folder / subset).mkdir(parents=True)
        for name, puzzle in puzzles.items():
            (folder / subset / f"{name}.json").write_text(json.dumps(puzzle))
    return folder


@pytest.mark.parametrize("inside", ["", "data"])
def test_folders_of_tasks_equal_kaggle_files(inside, tmp_path):
    """The layout of fchollet/ARC-AGI gives the bytes of Kaggle's with the tasks sorted by name."""
    subsets = {subset: dict(sorted(puzzles.items())) for subset, puzzles in tiny_subsets().items()}
    one_file_a_task(tmp_path / "source" / inside, subsets)
    a = build(write_source(tmp_path / "kaggle", subsets), tmp_path / "a")
    b = build(tmp_path / "source", tmp_path / "b")
    recipe = json.loads(b["recipe.json"])
    assert len(recipe["source_sha256"]) == 5 and recipe["hidden_test_set"] is False
    assert sorted(a) == sorted(b) and [n for n in a if a[n] != b[n]] == ["recipe.json"]


def test_folder_of_tasks_can_be_hidden(hidden, tmp_path):
    build(one_file_a_task(tmp_path / "tasks", hidden[1]), tmp_path / "d", *HIDDEN_FLAGS)
    assert not np.load(tmp_path / "d/test/all__labels.npy").any()


@pytest.mark.parametrize("content, expected", [
    ('{"train": [{"input": [[1]], "output": [[12]]}], "test": [{"input": [[1]], "output": [[1]]}]}',
     "puzzle full of training: output of train example 0 is [[12]], not a grid"),
    ("<html>", "training/full.json is not valid JSON"),
    ("[]", "puzzle full of training has null as train examples")])
def test_bad_task_file_is_named(content, expected, tmp_path, capsys):
    source = one_file_a_task(tmp_path / "source", tiny_subsets())
    (source / "training/full.json").write_text(content)
    assert expected in refused(tmp_path, capsys)


def test_absent_subset_is_refused_with_those_there(tmp_path, capsys):
    """A clone of fchollet/ARC-AGI has no "concept", which is a default."""
    one_file_a_task(tmp_path / "source/data", tiny_subsets())
    err = refused(tmp_path, capsys, "--num-aug", "2")
    assert "source has neither arc-agi_concept_challenges.json nor concept/*.json; choose --subsets" in err
    assert "--subsets from evaluation training there, or name another --source" in err
    shutil.rmtree(tmp_path / "source/data")
    assert "choose --subsets from nothing there" in refused(tmp_path, capsys)


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

@pytest.mark.parametrize("grid", [
    "a", None, [1], [], [[], []], [[1, 2], [3]], [[0]] * 31, [[0] * 31], [[10]], [[-1]], [[1.5]], [[True]]])
def test_bad_grid_is_refused(grid):
    shown = re.escape(json.dumps(grid)[:60])
    message = f"here is {shown}, not a grid; give 1..30 equally long rows of 1..30 colours"
    with pytest.raises(UserError, match=message):
        arc.check_grid(grid, "here")


BAD = [
    ("training_challenges", lambda v: v["full"]["train"][1].pop("output"),
     "puzzle full of training: output of train example 1 is null, not a grid"),
    ("training_challenges", lambda v: v["full"]["test"][0].update(input="abc"),
     'puzzle full of training: input of test example 0 is "abc", not a grid'),
    ("training_challenges", lambda v: v["full"].update(train=[]), "training has [] as train examples"),
    ("training_challenges", lambda v: v["full"].pop("test"), "training has null as test examples"),
    ("training_solutions", lambda v: v.update(full=[[[10]]]),
     "puzzle full of training: output of test example 0 is [[10]], not a grid"),
    ("training_solutions", lambda v: v.pop("full"),
     "puzzle full of training: output of test example 0 is null, not a grid"),
    ("evaluation_solutions", lambda v: v["two tests"].pop(),
     "puzzle two tests of evaluation: output of test example 2 is null, not a grid"),
    ("training_challenges", "[1]", "training_challenges.json holds a list, not a dict; fetch it again"),
    ("training_challenges", '{"full": ', "arc-agi_training_challenges.json is not valid JSON"),
    ("training_solutions", None,
     "no outputs of the test examples of training; add arc-agi_training_solutions.json, leave training out"),
    ("training_challenges", None,
     "neither arc-agi_training_challenges.json nor training/*.json; choose --subsets from evaluation there"),
]


@pytest.mark.parametrize("name, edit, expected", BAD)
def test_bad_source_is_refused(name, edit, expected, tmp_path, capsys):
    """edit: a change of the content, another content, or None for no file."""
    source = write_source(tmp_path / "source", tiny_subsets())
    path = source / f"arc-agi_{name}.json"
    if edit is None:
        path.unlink()
    elif isinstance(edit, str):
        path.write_text(edit)
    else:
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))
    assert expected in refused(tmp_path, capsys)


@pytest.mark.parametrize("flags, expected", [
    (["--subsets", "training", "evaluation", "extra"],
     "arc-agi_extra_challenges.json nor extra/*.json; choose --subsets from evaluation training there"),
    (["--subsets", "training"], "--test-set-name evaluation among them"),
    (["--subsets", "evaluation", "evaluation"], "must name each subset once"),
    (["--seed", str(2 ** 32)], "--seed: 4294967296 is out of range; give 0 .. 4294967295")])
def test_bad_flags_are_refused(flags, expected, tmp_path, capsys):
    write_source(tmp_path / "source", tiny_subsets())
    assert expected in refused(tmp_path, capsys, *TINY_FLAGS, *flags)


def test_full_disk_leaves_nothing(tmp_path, capsys):
    """A file size limit stands in for a full disk."""
    write_source(tmp_path / "source", tiny_subsets())
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        assert "d could not be written" in refused(tmp_path, capsys, "--subsets", "evaluation")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


# ---------------------------------------------------------------------------------------------
# Download

def test_download_takes_only_the_pinned_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, asked = write_source(tmp_path / "source", tiny_subsets()), []

    def urlopen(url, timeout):
        asked.append(url)
        return (source / url.rsplit("/", 1)[1]).open("rb")

    monkeypatch.setattr(arc.urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match="sha256 .* is not .*; put https:.* there"):
        arc.main(TINY_FLAGS)
    assert list((tmp_path / "data/arc-source").iterdir()) == []
    monkeypatch.setattr(arc, "SHA256", {p.name: sha256(p) for p in sorted(source.iterdir())})
    arc.main(TINY_FLAGS)
    assert (tmp_path / "data/arc1concept-aug-30/recipe.json").exists()
    assert asked[-1].startswith(arc.URL) and arc.COMMIT in arc.URL
    asked.clear()
    arc.main(TINY_FLAGS)                         # all there: nothing is fetched again
    assert asked == []
    name = next(iter(arc.SHA256))
    (tmp_path / "data/arc-source" / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name}: sha256 .* is not"):
        arc.main(TINY_FLAGS)


def test_no_network_says_what_to_put_where(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arc.urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError) as e:
        arc.main([])
    said = str(e.value)
    assert said.startswith(f"cannot fetch {arc.URL}/arc-agi_concept_challenges.json (")
    assert "arc-agi_training_solutions.json of that folder into data/arc-source and start again" in said
    assert "training2" not in said and "\n" not in said
