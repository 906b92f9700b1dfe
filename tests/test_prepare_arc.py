"""prepare/arc.py: the published bytes, naive loops, all file layouts, hidden test sets, refusals."""

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

import prepare
from data import Split
from prepare import arc
from tools.common import UserError, cli, sha256_of_file

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "arc"  # 10 MB, not in git
needs_real_files = pytest.mark.skipif(not REAL.exists(), reason="needs the ARC files in ../shared/arc")
TINY_FLAGS = ["--subsets", "training", "evaluation", "--num-aug", "30", "--seed", "5"]
HIDDEN_FLAGS = ["--subsets", "training", "test", "--test-set-name", "test", "--num-aug", "30", "--seed", "5"]


def files_of(folder):
    """{name: bytes} of all files but recipe.json."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in files.items() if name != "recipe.json"}


def build(source, folder, *flags):
    """Build a dataset in `folder`; return its files."""
    arc.main(["--source", str(source), *(flags or TINY_FLAGS), "--output-dir", str(folder)])
    return files_of(folder)


def refused(tmp_path, capsys, *flags):
    """The line that a refused build prints. It must leave nothing but the source."""
    with pytest.raises(SystemExit) as e:
        cli(lambda: build(tmp_path / "source", tmp_path / "deep/d", *flags))
    err = capsys.readouterr().err
    assert (e.value.code, err.count("\n")) == (2, 1) and err.startswith("error: "), err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    return err


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source", tiny_subsets())


@pytest.fixture
def hidden(tmp_path):
    """A source whose subset "test" has no solutions, and its subsets as the files contain them."""
    subsets = tiny_subsets()
    subsets["test"] = subsets.pop("evaluation")
    source = write_source(tmp_path / "source", subsets)
    (source / "arc-agi_test_solutions.json").unlink()
    subsets = json.loads(json.dumps(subsets))  # one example is in two subsets
    for puzzle in subsets["test"].values():
        for example in puzzle["test"]:
            del example["output"]
    return source, subsets


# ---------------------------------------------------------------------------------------------
# SPEC section 8 again, slowly, with numpy's own generator

TRANSFORMS = [
    lambda a: a,
    lambda a: np.rot90(a, 1),
    lambda a: np.rot90(a, 2),
    lambda a: np.rot90(a, 3),
    np.fliplr,
    np.flipud,
    np.transpose,
    lambda a: np.fliplr(np.rot90(a)),
]


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


def as_multiset(version):
    return sorted(repr((a.tolist(), b.tolist())) for key in version for a, b in version[key])


def naive_augment(name, puzzle, num_aug, rng):
    """[(identifier, {key: [(input, output)]})], the original first."""
    arrays = {}
    for key, examples in puzzle.items():
        pairs = [(e["input"], e.get("output", [[0]])) for e in examples]
        arrays[key] = [(np.array(a, np.uint8), np.array(b, np.uint8)) for a, b in pairs]
    kept = [(name, arrays)]
    for _ in range(5 * num_aug):
        if len(kept) == num_aug + 1:
            break
        t = rng.randint(0, 8)
        colours = np.array([0, *rng.permutation(np.arange(1, 10, dtype=np.uint8))], np.uint8)
        version = {}
        for key, pairs in arrays.items():
            version[key] = [(TRANSFORMS[t](colours[a]), TRANSFORMS[t](colours[b])) for a, b in pairs]
        if all(as_multiset(version) != as_multiset(other) for _, other in kept):
            kept.append((f"{name}|||t{t}|||{''.join(map(str, colours))}", version))
    return kept


def naive_build(subsets, test_set, num_aug=30, seed=5, hidden=False):
    """{file: bytes} of the whole dataset but recipe.json. hidden: the test outputs are unknown."""
    rng = np.random.RandomState(seed)
    groups, test_puzzles, ids = {"train": [], "test": []}, {}, {}
    for subset, puzzles in subsets.items():
        puzzles = list(puzzles.items())
        rng.shuffle(puzzles)
        for name, puzzle in puzzles:
            kept = naive_augment(name, puzzle, num_aug, rng)
            if subset == test_set:
                for split in groups:
                    groups[split].append([(n, v[split]) for n, v in kept])
                test_puzzles[name] = puzzle
            else:
                groups["train"].append([(n, [e for key in v for e in v[key]]) for n, v in kept])
    for group in groups["train"] + groups["test"]:
        for name, _ in group:
            ids.setdefault(name, len(ids) + 1)
    files = {"identifiers.json": json.dumps(["<blank>", *ids]), "test_puzzles.json": json.dumps(test_puzzles)}
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
        arrays = {
            "inputs": np.array(inputs, np.uint8),
            "labels": np.array(labels, np.uint8),
            "puzzle_identifiers": np.array(identifiers, np.int32),
            "puzzle_indices": np.array(puzzle_indices, np.int32),
            "group_indices": np.array(group_indices, np.int32),
        }
        for name, array in arrays.items():
            file = io.BytesIO()
            np.save(file, array)
            files[f"{split}/all__{name}.npy"] = file.getvalue()
        meta = {"pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": 12, "seq_len": 900}
        meta |= {"num_puzzle_identifiers": len(ids) + 1, "total_groups": len(groups[split])}
        meta |= {"mean_puzzle_examples": len(inputs) / len(identifiers), "total_puzzles": len(identifiers)}
        files[f"{split}/dataset.json"] = json.dumps(meta | {"sets": ["all"]})
    return {
        name: content.encode() if isinstance(content, str) else content for name, content in files.items()
    }


def test_tiny_source_equals_naive_builder(source, tmp_path):
    """As a script, in a process with another hash seed."""
    argv = ["--source", source, *TINY_FLAGS, "--output-dir", tmp_path / "d"]
    command = [sys.executable, ROOT / "prepare/arc.py", *argv]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    expected, got = naive_build(tiny_subsets(), "evaluation"), files_of(tmp_path / "d")
    assert sorted(got) == sorted(expected)
    assert [name for name in expected if got[name] != expected[name]] == []
    assert done.stderr.startswith("warning: 1 of 4 test pairs are also in the training split")
    for line in ("train: 5 groups", "test: 2 groups", "rows in the puzzle table"):
        assert line in done.stdout
    assert got["identifiers.json"].count(b'"symmetric') == 9  # colour 1 alone: 9 versions, whatever t is
    recipe = json.loads((tmp_path / "d/recipe.json").read_text())
    assert recipe["builder"] == "arc"
    assert recipe["command"] == f"python prepare/arc.py --source {source} {' '.join(TINY_FLAGS)}"


@needs_real_files
def test_arc1_with_8_augmentations_is_the_published_dataset(tmp_path):
    build(REAL, tmp_path / "d", "--num-aug", "8")
    golden = json.loads((ROOT / "tests/golden/arc1_aug8.json").read_text())
    expected = {name: facts["sha256"] for name, facts in golden.items()}
    assert {name: sha256_of_file(tmp_path / "d" / name) for name in golden} == expected


# ---------------------------------------------------------------------------------------------
# A part of the tasks


def small_only(subsets, side):
    small = {}
    for subset, puzzles in subsets.items():
        small[subset] = {}
        for name, puzzle in puzzles.items():
            shapes = [np.shape(e[part]) for key in puzzle for e in puzzle[key] for part in e]
            if max(map(max, shapes)) <= side:
                small[subset][name] = puzzle
    return small


@pytest.mark.parametrize(
    "side, left", [(2, ["symmetric", "swapped"]), (4, ["symmetric", "swapped", "cross"])]
)
def test_max_side_equals_naive_builder_on_small_tasks(side, left, source, tmp_path):
    flags = [*TINY_FLAGS, "--test-set-name", "training", "--max-side", str(side)]
    got = build(source, tmp_path / "d", *flags)
    assert got == naive_build(small_only(tiny_subsets(), side), "training")
    assert {n for n in json.loads(got["identifiers.json"])[1:] if "|||" not in n} == set(left)


def test_unknown_outputs_have_no_size(hidden, tmp_path):
    source, subsets = hidden
    for example in (pair([[1]], [[2]] * 9), pair([[1]], [[2] * 9]), pair([[1] * 9], [[2]])):
        assert arc.side_of({"train": [example], "test": [{"input": [[1]]}]}) == 9
        assert arc.side_of({"train": [pair([[1]], [[1]])], "test": [example]}) == 9
    assert arc.side_of({"train": [], "test": [{"input": [[1, 2, 3]]}]}) == 3
    got = build(source, tmp_path / "d", *HIDDEN_FLAGS, "--max-side", "4")
    assert got == naive_build(small_only(subsets, 4), "test", hidden=True)
    assert list(json.loads(got["test_puzzles.json"])) == ["cross"]


def test_halves_divide_the_test_set_and_nothing_else(source, tmp_path, capsys):
    """Together the halves are the whole test split; the rest is equal to the byte."""
    parts = {half: build(source, tmp_path / half, *TINY_FLAGS, "--half", half) for half in arc.HALVES}
    assert capsys.readouterr().err.count("1 of 3 test pairs are also in the training split") == 1
    whole = build(source, tmp_path / "whole")
    for half, files in parts.items():
        for name in whole:
            same = name.startswith("train/") or name == "identifiers.json"
            assert (files[name] == whole[name]) == same, (half, name)
    puzzles = {half: json.loads(files["test_puzzles.json"]) for half, files in parts.items()}
    assert {half: list(p) for half, p in puzzles.items()} == {"tune": ["cross"], "report": ["two tests"]}
    assert puzzles["tune"] | puzzles["report"] == json.loads(whole["test_puzzles.json"])
    splits = [Split(tmp_path / name, "test") for name in ("whole", *arc.HALVES)]
    rows = []
    for split in splits:
        rows.append(
            [row.tobytes() for row in np.concatenate(split.gather(np.arange(len(split)))[:2], axis=1)]
        )
    assert sorted(rows[0]) == sorted(rows[1] + rows[2]) and all(rows)
    assert len({split.puzzle_ids_sha256 for split in splits}) == 1  # one model can be scored on both


def test_half_of_a_task_is_one_bit_of_a_hash():
    names = [f"{i:08x}" for i in range(1000)]
    for name in names[:20]:
        byte = hashlib.sha256(f"0:{name}".encode()).digest()[0]
        assert arc.half_of(name) == ("report" if byte % 2 else "tune")
    assert 440 < sum(arc.half_of(name) == "tune" for name in names) < 560


def test_known_dataset_is_built_from_a_source(tmp_path, monkeypatch, capsys):
    """python -m prepare NAME --source DIR: no network, the known folder, and nothing twice."""
    monkeypatch.chdir(tmp_path)
    subsets = tiny_subsets()
    write_source(tmp_path / "source", {**subsets, "concept": subsets["evaluation"]})
    prepare.main(["mini-arc", "--source", "source"])
    flags = "--test-set-name training --max-side 6 --num-aug 24 --half report"
    command = f"python prepare/arc.py {flags} --source {tmp_path}/source"
    assert f"+ {command} --output-dir data/arc-6x6-mini\n" in capsys.readouterr().out
    first = files_of(Path("data/arc-6x6-mini"))
    assert json.loads(Path("data/arc-6x6-mini/recipe.json").read_text())["command"] == command
    shutil.rmtree("source")
    prepare.main(["mini-arc"])
    assert capsys.readouterr().out == "dataset mini-arc is in data/arc-6x6-mini\n"
    assert files_of(Path("data/arc-6x6-mini")) == first
    with pytest.raises(UserError, match="invalid choice: 'arc3'"):
        prepare.main(["mini-arc-tune", "arc3"])


@needs_real_files
@pytest.mark.parametrize("name, tasks, inputs", [("mini-arc", 26, 29), ("mini-arc-tune", 20, 24)])
def test_mini_arc_has_the_known_shape(name, tasks, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare.main([name, "--source", str(REAL)])
    dataset = prepare.KNOWN[name]
    meta = json.loads(Path(dataset.folder, "train/dataset.json").read_text())
    assert {key: pytest.approx(meta[key], abs=1e-4) for key in dataset.shape} == dataset.shape
    puzzles = json.loads(Path(dataset.folder, "test_puzzles.json").read_text())
    assert (len(puzzles), sum(len(puzzle["test"]) for puzzle in puzzles.values())) == (tasks, inputs)


# ---------------------------------------------------------------------------------------------
# Hidden test sets and one file per task


def test_hidden_test_set_equals_naive_builder(hidden, tmp_path, capsys):
    source, subsets = hidden
    got = build(source, tmp_path / "d", *HIDDEN_FLAGS)
    expected = naive_build(subsets, "test", hidden=True)
    assert [name for name in expected if got[name] != expected[name]] == []
    inputs, labels = (np.load(tmp_path / f"d/test/all__{name}.npy") for name in ("inputs", "labels"))
    assert inputs.any(1).all() and not labels.any()
    out, err = capsys.readouterr()
    assert "test is a hidden test set" in out and err == ""


def test_only_the_test_set_can_be_hidden(hidden, tmp_path, capsys):
    err = refused(tmp_path, capsys, *HIDDEN_FLAGS, "--test-set-name", "training")
    assert "test has no outputs for its test examples; add arc-agi_test_solutions.json or make it" in err


def one_file_per_task(folder, subsets, place="{subset}/{name}.json"):
    for subset, puzzles in subsets.items():
        for name, puzzle in puzzles.items():
            path = folder / place.format(subset=subset, name=name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(puzzle))
    return folder


@pytest.mark.parametrize("place", ["{subset}/{name}.json", "data/{subset}/{name}.json"])
def test_one_file_per_task_equals_kaggle_files(place, tmp_path):
    """The layout of fchollet/ARC-AGI gives the bytes of Kaggle's with the tasks sorted by name."""
    subsets = {subset: dict(sorted(puzzles.items())) for subset, puzzles in tiny_subsets().items()}
    one_file_per_task(tmp_path / "source", subsets, place)
    kaggle = write_source(tmp_path / "kaggle", subsets)
    assert build(tmp_path / "source", tmp_path / "b") == build(kaggle, tmp_path / "a")


def test_folders_of_folders_of_tasks(tmp_path):
    """ConceptARC and 1D-ARC: corpus/CONCEPT/TASK.json. Equal file names are different tasks."""
    tasks = tiny_subsets()["evaluation"]
    for concept in ("Above", "Below"):
        one_file_per_task(tmp_path / "source/corpus", {concept: tasks})
    flags = ["--subsets", "corpus", "--test-set-name", "corpus", "--num-aug", "0"]
    got = build(tmp_path / "source", tmp_path / "d", *flags)
    expected = {f"{concept}/{name}" for concept in ("Above", "Below") for name in tasks}
    assert (
        set(json.loads(got["identifiers.json"])[1:]) == set(json.loads(got["test_puzzles.json"])) == expected
    )


def test_one_file_per_task_can_be_hidden(hidden, tmp_path):
    build(one_file_per_task(tmp_path / "tasks", hidden[1]), tmp_path / "d", *HIDDEN_FLAGS)
    assert not np.load(tmp_path / "d/test/all__labels.npy").any()


# ---------------------------------------------------------------------------------------------
# One grid


def test_grids_round_trip():
    rng = np.random.RandomState(0)
    for t in range(8):
        grid = rng.randint(0, 10, (rng.randint(1, 31), rng.randint(1, 31))).astype(np.uint8)
        colours = bytes([0, *rng.permutation(np.arange(1, 10))])
        augmented = arc.augment(grid, t, colours)
        assert np.array_equal(augmented, TRANSFORMS[t](np.array(list(colours))[grid]))
        assert np.array_equal(arc.invert_augmentation(augmented, t, colours), grid)
        assert np.array_equal(arc.encode(grid), naive_canvas(grid))
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
    for share in (0, 0.001, 0.01, 0.05, 0.3):
        for _ in range(60):
            row = arc.encode(rng.randint(0, 10, (rng.randint(1, 31), rng.randint(1, 31))))
            rows.append(np.where(rng.rand(900) < share, rng.randint(0, 12, 900), row))
    tokens = np.array(rows)
    expected = [naive_crop(row) for row in tokens]
    for dtype in (np.uint8, np.int32, np.int64):
        heights, widths = arc.crop(tokens.astype(dtype))
        assert list(zip(heights.tolist(), widths.tolist())) == expected


# ---------------------------------------------------------------------------------------------
# Refusals: one line, exit code 2, nothing left behind

BAD_GRIDS = ["a", None, [1], [], [[], []], [[1, 2], [3]], [[0]] * 31, [[0] * 31], [[10]], [[-1]], [[1.5]]]


@pytest.mark.parametrize("grid", [*BAD_GRIDS, [[True]], [[10**30]], {}])
def test_bad_grid_is_refused(grid):
    message = f"here must be 1..30 equally long rows of 1..30 colours 0..9, not {json.dumps(grid)[:60]}"
    with pytest.raises(UserError, match=re.escape(message)):
        arc.check_grid(grid, "here")


def without_output(challenges):
    del challenges["full"]["train"][1]["output"]


def text_as_input(challenges):
    challenges["full"]["test"][0]["input"] = "abc"


BAD_FILES = [  # file, new content (None: no file) or an edit of it, message
    ("training_challenges", without_output, "puzzle full of training: output of train example 1 must be"),
    ("training_challenges", text_as_input, "puzzle full of training: input of test example 0 must be"),
    (
        "training_challenges",
        lambda v: v["full"].update(train=[]),
        "full of training: train must be a list of",
    ),
    ("training_challenges", lambda v: v["full"].pop("test"), "full of training: test must be a list of"),
    ("training_challenges", lambda v: v.update(full=[]), "full of training: train must be a list of"),
    ("training_challenges", "[1]", "training_challenges.json does not hold a dict"),
    ("training_challenges", '{"full": ', "training_challenges.json: Expecting value"),
    ("training_challenges", None, "contains neither arc-agi_training_challenges.json nor training/*.json"),
    ("training_solutions", lambda v: v.update(full=[[[10]]]), "output of test example 0 must be"),
    ("training_solutions", lambda v: v.pop("full"), "puzzle full of training: output of test example 0 must"),
    ("training_solutions", None, "training has no outputs for its test examples; add arc-agi_training_solu"),
    (
        "evaluation_solutions",
        lambda v: v["two tests"].pop(),
        "two tests of evaluation: output of test example 2",
    ),
]


@pytest.mark.parametrize("name, edit, message", BAD_FILES)
def test_bad_file_is_refused(name, edit, message, source, tmp_path, capsys):
    path = source / f"arc-agi_{name}.json"
    if edit is None:
        path.unlink()
    elif isinstance(edit, str):
        path.write_text(edit)
    else:
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))
    assert message in refused(tmp_path, capsys)


BAD_FLAGS = [
    (["--subsets", "training", "evaluation", "extra"], "nor extra/*.json; change --subsets"),
    (["--subsets", "training"], "with --test-set-name evaluation among them"),
    (["--subsets", "evaluation", "evaluation"], "must name every subset once"),
    (["--seed", str(2**32)], "--seed: 4294967296 is out of range"),
    (["--max-side", "2"], "--max-side and --half leave no puzzle of evaluation"),
    (["--max-side", "0"], "--max-side: 0 is out of range"),
    (["--half", "both"], "--half: invalid choice: 'both'"),
    (["--test-set-name", "training", "--half", "tune"], "--max-side and --half leave no puzzle of training"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flags_are_refused(flags, message, source, tmp_path, capsys):
    assert message in refused(tmp_path, capsys, *TINY_FLAGS, *flags)


def test_full_disk_leaves_nothing(source, tmp_path, capsys):
    """A limit of the file size acts as a full disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        assert "deep/d: File too large" in refused(tmp_path, capsys, "--subsets", "evaluation")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


# ---------------------------------------------------------------------------------------------
# Download


def test_download_accepts_only_the_pinned_bytes(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    requests = []

    def urlopen(url, timeout):
        requests.append(url)
        return (source / url.rsplit("/", 1)[1]).open("rb")

    argv = [*TINY_FLAGS, "--output-dir", "d"]
    monkeypatch.setattr(arc.urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match="evaluation_challenges.json differs from https:.*; replace it, or"):
        arc.main(argv)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    monkeypatch.setattr(arc, "SHA256", {p.name: sha256_of_file(p) for p in sorted(source.iterdir())})
    arc.main(argv)
    assert Path("d/recipe.json").exists()
    assert requests[-1].startswith(arc.URL) and arc.COMMIT in arc.URL
    requests.clear()
    arc.main(argv)  # the files exist, and the same recipe may be built again
    assert requests == []
    next(Path("data/arc-source").iterdir()).write_text("{}")
    with pytest.raises(UserError, match="differs from"):
        arc.main(argv)


def test_without_network_the_message_names_file_and_folder(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arc.urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError) as e:
        arc.main([])
    name = next(iter(arc.SHA256))
    message = f"cannot download {arc.URL}/{name}; put it into data/arc-source and retry: "
    assert str(e.value).startswith(message) and "no network" in str(e.value)
    assert not Path("data/arc1concept-aug-1000").exists()
