"""prepare/arc.py and ARC voting: the published bytes and figures, naive loops, what is refused."""
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

import data
import eval as scoring
from eval import ArcVotes
from prepare import arc

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
REAL = ROOT.parent / "shared" / "arc"            # 10 MB, not in git


# ---------------------------------------------------------------------------------------------
# A tiny ARC: symmetric grids, few colours, swapped examples, full canvases, "test" before "train"

def pair(a, b):
    return {"input": np.asarray(a).tolist(), "output": np.asarray(b).tolist()}


def tiny_subsets():
    """{subset: {id: puzzle with outputs}}, five puzzles."""
    rng = np.random.RandomState(7)
    square, wide = rng.randint(0, 10, (3, 3)), rng.randint(0, 10, (2, 30))
    one = np.ones((2, 2), int)
    shared = pair(rng.randint(0, 10, (4, 2)), rng.randint(0, 10, (1, 5)))
    return {
        "training": {
            "symmetric": {"train": [pair(one, 0 * one), pair(one, one)], "test": [pair(0 * one, one)]},  # 9 versions
            "swapped": {"test": [pair([[0, 0]], [[0]])],                     # turning 1 and 2 round gives it again
                        "train": [pair([[1, 0]], [[1]]), pair([[2, 0]], [[2]])]},
            "full": {"train": [pair(rng.randint(0, 10, (30, 30)), wide), pair(wide, square), shared],
                     "test": [pair(square, rng.randint(0, 10, (29, 29)))]}},
        "evaluation": {
            "two tests": {"train": [pair(square, square.T), pair(wide, wide[:, ::-1])],
                          "test": [pair(square[:2], square), pair([[5]], rng.randint(0, 10, (7, 30))), shared]},
            "cross": {"test": [pair([[0, 3, 0], [3, 3, 3], [0, 3, 0]], [[3, 4]])],
                      "train": [pair([[3, 0, 3], [0, 4, 0], [3, 0, 3]], [[4]])]}},
    }


def write_source(folder, subsets):
    folder.mkdir(parents=True, exist_ok=True)
    for subset, puzzles in subsets.items():
        challenges = {name: {key: [{"input": e["input"]} for e in examples] if key == "test" else examples
                             for key, examples in puzzle.items()} for name, puzzle in puzzles.items()}
        solutions = {name: [e["output"] for e in puzzle["test"]] for name, puzzle in puzzles.items()}
        (folder / f"arc-agi_{subset}_challenges.json").write_text(json.dumps(challenges))
        (folder / f"arc-agi_{subset}_solutions.json").write_text(json.dumps(solutions))
    return folder


TINY_FLAGS = ["--subsets", "training", "evaluation", "--num-aug", "30", "--seed", "5"]


def run(args, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "prepare" / "arc.py"), *map(str, args)], capture_output=True,
                          text=True, cwd=kwargs.pop("cwd", ROOT), **kwargs)


# ---------------------------------------------------------------------------------------------
# SPEC section 8 once more, slowly, with numpy's own generator

TURN = [lambda a: a, lambda a: np.rot90(a, 1), lambda a: np.rot90(a, 2), lambda a: np.rot90(a, 3), np.fliplr, np.flipud,
        np.transpose, lambda a: np.fliplr(np.rot90(a))]


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


def naive_build(subsets, test_set, num_aug, seed):
    """-> {file: bytes} of the whole dataset but recipe.json."""
    rng = np.random.RandomState(seed)
    groups, test_puzzles = {"train": [], "test": []}, {}
    for subset, puzzles in subsets.items():
        puzzles = list(puzzles.items())
        rng.shuffle(puzzles)
        for name, puzzle in puzzles:
            arrays = {key: [(np.array(e["input"], np.uint8), np.array(e["output"], np.uint8)) for e in examples]
                      for key, examples in puzzle.items()}

            def look(version):
                return sorted(repr((a.tolist(), b.tolist())) for key in version for a, b in version[key])

            kept = [(name, arrays)]
            for _ in range(5 * num_aug):
                if len(kept) == num_aug + 1:
                    break
                t = rng.randint(0, 8)
                colours = np.concatenate([[0], rng.permutation(np.arange(1, 10, dtype=np.uint8))]).astype(np.uint8)
                version = {key: [(TURN[t](colours[a]), TURN[t](colours[b])) for a, b in arrays[key]] for key in arrays}
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
                    labels.append(naive_canvas(b, down, right))
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


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_tiny_source_equals_naive_builder(tmp_path, hash_seed):
    source = write_source(tmp_path / "source", tiny_subsets())
    done = run(["--source", source, *TINY_FLAGS, "--output-dir", tmp_path / "d"],
               env={**os.environ, "PYTHONHASHSEED": hash_seed})
    assert done.returncode == 0, done.stderr
    expected = naive_build(tiny_subsets(), "evaluation", 30, 5)
    got = {str(p.relative_to(tmp_path / "d")): p.read_bytes() for p in (tmp_path / "d").rglob("*") if p.is_file()}
    recipe = json.loads(got.pop("recipe.json"))
    assert sorted(got) == sorted(expected)
    assert [name for name in expected if got[name] != expected[name]] == []
    source_file = "arc-agi_training_challenges.json"
    assert recipe["source_sha256"][source_file] == hashlib.sha256((source / source_file).read_bytes()).hexdigest()
    assert (recipe["subsets"], recipe["test_set_name"], recipe["num_aug"], recipe["seed"]) == (
        ["training", "evaluation"], "evaluation", 30, 5)
    assert "warning: 1 of 4 test pairs (of two tests ...) also stand in the training split" in done.stderr
    for line in ("train: 5 groups", "test: 2 groups", "rows in the puzzle table"):
        assert line in done.stdout
    names = json.loads(got["identifiers.json"])
    assert sum(name.startswith("symmetric") for name in names) == 9      # colour 1 alone: 9 images, whatever the turn


def test_words_are_those_of_numpy():
    word, rng = arc.words(3).__next__, np.random.RandomState(3)
    for n in (1, 2, 3, 8, 9, 31, 400, 70000):
        assert [arc.below(n, word) for _ in range(20)] == [rng.randint(0, n) for _ in range(20)]
        a, b = list(range(n % 1000)), list(range(n % 1000))
        arc.shuffle(a, word)
        rng.shuffle(b)
        assert a == b
    colours = list(range(1, 10))
    arc.shuffle(colours, word)
    assert colours == rng.permutation(np.arange(1, 10, dtype=np.uint8)).tolist()


@pytest.mark.skipif(not REAL.exists(), reason="the real ARC files (../shared/arc) are not here")
def test_arc1_with_8_augmentations_is_the_published_dataset(tmp_path):
    arc.main(["--source", str(REAL), "--num-aug", "8", "--output-dir", str(tmp_path / "d")])
    golden = json.loads((GOLDEN / "arc1_aug8.json").read_text())
    assert {name: data.sha256(tmp_path / "d" / name) for name in golden} == {n: g["sha256"] for n, g in golden.items()}


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
    assert arc.parse_name("007bbfb7|||t6|||0213456789") == ("007bbfb7", 6, bytes([0, 2, 1, 3, 4, 5, 6, 7, 8, 9]))


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
    for dtype in (np.uint8, np.int32, np.int64):
        assert list(zip(*map(np.ndarray.tolist, arc.crop(tokens.astype(dtype))))) == [naive_crop(row) for row in tokens]
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
    "not a grid": (grid_becomes("abc"), [CHALLENGES, "output of train example 1", '"abc", not a grid']),
    "flat": (grid_becomes([1, 2]), [CHALLENGES, "[1, 2], not a grid"]),
    "no output": (change("training", "challenges", lambda v: v["full"]["train"][1].pop("output") and None),
                  [CHALLENGES, "null, not a grid"]),
    "empty": (grid_becomes([]), [CHALLENGES, "[], an empty grid"]),
    "empty row": (grid_becomes([[], []]), [CHALLENGES, "[[], []], an empty grid"]),
    "ragged": (grid_becomes([[1, 2], [3]]), [CHALLENGES, "ragged", "rows of 1 and 2 cells"]),
    "tall": (grid_becomes([[0]] * 31), [CHALLENGES, "31 x 1, over 30 x 30"]),
    "wide": (grid_becomes([[0] * 40]), [CHALLENGES, "1 x 40, over 30 x 30"]),
    "colour": (grid_becomes([[0, 12]]), [CHALLENGES, "colour 12, outside 0..9"]),
    "negative": (grid_becomes([[0, -1]]), [CHALLENGES, "colour -1, outside 0..9"]),
    "real colour": (grid_becomes([[0, 1.5]]), [CHALLENGES, "colour 1.5, outside 0..9"]),
    "true": (grid_becomes([[True]]), [CHALLENGES, "colour true, outside 0..9"]),
    "bad solution": (change("training", "solutions", lambda v: v["full"].__setitem__(0, [[10]])),
                     [SOLUTIONS, "output of test example 0", "colour 10"]),
    "missing solution": (change("training", "solutions", lambda v: v.pop("full") and None),
                         [SOLUTIONS + " has no solutions for 1 test inputs"]),
    "too few solutions": (change("evaluation", "solutions", lambda v: v["two tests"].pop() and None),
                          ["evaluation_solutions.json: puzzle two tests has 2 solutions for 3 test inputs"]),
    "no examples": (change("training", "challenges", lambda v: v["full"].update(train=[])),
                    ["puzzle full has [] as train examples"]),
    "no test key": (change("training", "challenges", lambda v: v["full"].pop("test") and None),
                    ["puzzle full has null as test examples"]),
    "list": (change("training", "challenges", lambda v: [1]), ["training_challenges.json: holds [1], not {puzzle id"]),
    "not JSON": (change("training", "challenges", lambda v: json.dumps(v)[:99]), ["training_challenges.json: not JSON"]),
    "missing file": (lambda folder: (folder / "arc-agi_training_solutions.json").unlink(),
                     ["arc-agi_training_solutions.json not found", "evaluation training there"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_refused(tmp_path, case):
    edit, expected = BAD[case]
    source = write_source(tmp_path / "source", tiny_subsets())
    edit(source)
    with pytest.raises(data.UserError) as e:
        arc.main(["--source", str(source), *TINY_FLAGS, "--output-dir", str(tmp_path / "d")])
    assert "\n" not in str(e.value) and [part for part in expected if part not in str(e.value)] == [], str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("flags, expected", [
    (["--subsets", "training", "evaluation", "extra"], "arc-agi_extra_challenges.json not found; add it, or choose "
                                                       "--subsets from evaluation training there"),
    (["--subsets", "training"], "--test-set-name evaluation among them"),
    (["--subsets", "evaluation", "evaluation"], "must name each subset once"),
    (["--num-aug", "-1"], "--num-aug -1"), (["--seed", "-1"], "--seed -1"), (["--seed", str(2**32)], "below 2**32")])
def test_bad_flags_are_refused(tmp_path, flags, expected):
    source = write_source(tmp_path / "source", tiny_subsets())
    done = run(["--source", source, *TINY_FLAGS, "--output-dir", tmp_path / "d", *flags])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and expected in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_full_disk_leaves_nothing(tmp_path):
    source = write_source(tmp_path / "source", tiny_subsets())
    done = run(["--source", source, *TINY_FLAGS, "--output-dir", tmp_path / "d"],
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
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
    with pytest.raises(data.UserError, match="sha256 .* is not .*; fetch it another way"):
        arc.main(TINY_FLAGS)
    assert list((tmp_path / "data" / "arc-source").iterdir()) == []
    monkeypatch.setattr(arc, "SHA256", {p.name: data.sha256(p) for p in sorted(source.iterdir())})
    arc.main(TINY_FLAGS)
    assert (tmp_path / "data" / "arc1concept-aug-30" / "recipe.json").exists()
    assert arc.COMMIT in asked[-1] and arc.FOLDER in asked[-1]
    asked.clear()
    arc.main(TINY_FLAGS)                         # all there: nothing is fetched again
    assert asked == []
    name = next(iter(arc.SHA256))
    (tmp_path / "data" / "arc-source" / name).write_text("{}")
    with pytest.raises(data.UserError, match=f"{name}: sha256 .*delete it"):
        arc.main(TINY_FLAGS)
    with pytest.raises(data.UserError, match="there are evaluation training; your own need --source"):
        arc.main([*TINY_FLAGS, "--subsets", "evaluation", "extra"])


def test_no_network_says_what_to_put_where(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arc.urllib.request, "urlopen", urlopen)
    with pytest.raises(data.UserError) as e:
        arc.main([])
    for part in ("no network", "arc-agi_concept_challenges.json", "arc-agi_training_solutions.json", "data/arc-source",
                 arc.COMMIT, "--source DIR"):
        assert part in str(e.value)
    assert "training2" not in str(e.value) and "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------
# Voting

@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_voting_equals_published_figures(ranks):
    golden = json.loads((GOLDEN / "arc_voting" / "golden.json").read_text())
    rows = np.load(GOLDEN / "arc_voting" / "data.npz")
    rows = [rows[name] for name in ("inputs", "preds", "q_halt_logits", "puzzle_identifiers")]
    names = {int(i): name for i, name in golden["identifiers"].items()}
    unseen = {f"unseen {i}": {"test": [pair([[i % 10]], [[1]])] * 2}             # puzzles that the run has no rows of
              for i in range(golden["n_puzzles"] - len(golden["test_puzzles"]))}
    votes = [ArcVotes({**golden["test_puzzles"], **unseen}, names) for _ in range(ranks)]
    for start in range(0, len(rows[0]), 64):                                    # global batches of 64, a slice per rank
        for rank, part in enumerate(np.array_split(np.arange(start, start + 64), ranks)):
            votes[rank].add(*(a[part] for a in rows), part)
    payloads = [v.payload() for v in votes][::-1]
    assert sum(len(p["row"]) for p in payloads) == golden["n_rows"]
    votes[0].merge(payloads)
    result, submission = votes[0].result(), votes[0].submission()
    assert {f"ARC/pass@{k}": result[f"pass@{k}"] for k in scoring.PASS_K} == golden["result"]
    assert {name: submission[name] for name in golden["submission"]} == golden["submission"]
    assert submission["unseen 7"] == [{"attempt_1": [[0]], "attempt_2": [[0]]}] * 2
    assert (result["puzzles"], result["inputs"]) == (400, 43 + 2 * len(unseen))


def rows_of(puzzles, rng, n):
    """n test rows in random augmentations; predictions among few candidates, so that there are ties."""
    names, inputs, preds, true = ["<blank>"], [], [], []
    for _ in range(n):
        name = list(puzzles)[rng.randint(len(puzzles))]
        test = puzzles[name]["test"][rng.randint(len(puzzles[name]["test"]))]
        t, colours = rng.randint(8), bytes([0, *rng.permutation(np.arange(1, 10))])
        candidate = [test["output"], [[1, 2]], [[1], [2]], [[3]]][rng.randint(4)]
        names.append(arc.make_name(name, t, colours))
        for rows, grid in ((inputs, test["input"]), (preds, candidate)):
            rows.append(arc.encode(arc.augment(np.array(grid), t, colours)))
        true.append((name, str(test["input"]), str(candidate)))
    return names, np.array(inputs), np.array(preds), true


@pytest.mark.parametrize("seed, n", [*((seed, 60) for seed in range(10)), (10, 300)])
def test_votes_and_ties_equal_naive_loop(seed, n):
    rng = np.random.RandomState(seed)
    puzzles = tiny_subsets()["evaluation"]
    names, inputs, preds, true = rows_of(puzzles, rng, n)
    q = rng.randint(0, 2, n) * 0.5                                              # few values: many ties
    tally = {}
    for (name, given, candidate), logit in zip(true, q):
        tally.setdefault((name, given), {}).setdefault(candidate, []).append(1 / (1 + np.exp(-logit)))
    expected = {task: [c for _, c in sorted(enumerate(cs), key=lambda ic: (-len(cs[ic[1]]), -sum(cs[ic[1]]) /
                                                                            len(cs[ic[1]]), ic[0]))]
                for task, cs in tally.items()}
    payloads = []
    for part in (np.arange(rank, n, 5) for rank in (3, 0, 4, 2, 1)):
        votes = ArcVotes(puzzles, names)
        for i in part:
            votes.add(inputs[[i]], preds[[i]], q[[i]], np.array([i + 1]), np.array([i]))
        payloads.append(votes.payload())
    votes.merge(payloads)
    result, submission = votes.result(), votes.submission()
    for name, puzzle in puzzles.items():
        for test, attempt in zip(puzzle["test"], submission[name], strict=True):
            assert [str(g) for g in attempt.values()] == expected[name, str(test["input"])][:2]
    for k in (1, 2, 5):
        solved = [[str(test["output"]) in expected[name, str(test["input"])][:k] for test in puzzle["test"]]
                  for name, puzzle in puzzles.items()]
        assert result[f"pass@{k}"] == np.mean([np.mean(s) for s in solved])
        assert result[f"hits@{k}"] == sum(map(sum, solved))
    assert (result["puzzles"], result["inputs"]) == (2, 4)


def test_votes_of_batches_are_those_of_all_rows():
    names, inputs, preds, _ = rows_of(tiny_subsets()["evaluation"], np.random.RandomState(3), 50)
    payloads = []
    for size in (1, 7, 1000):
        votes = ArcVotes(tiny_subsets()["evaluation"], names)
        for i in range(0, 50, size):
            rows = np.arange(i, min(50, i + size))
            votes.add(inputs[rows], preds[rows], np.zeros(len(rows)), rows + 1, rows)
        payloads.append({name: list(value) for name, value in votes.payload().items()})
    assert payloads[0] == payloads[1] == payloads[2]


def test_no_votes_and_one_candidate():
    puzzles = {"a": {"test": [pair([[1]], [[2]])]}, "b": {"test": [pair([[1]], [[2]]), pair([[3]], [[4]])]}}
    votes = ArcVotes(puzzles, ["<blank>", "b"])
    empty = votes.payload()
    votes.merge([empty, empty])
    assert votes.result()["pass@1"] == 0
    given = arc.encode(np.array([[3]]))[None].repeat(4, 0)
    preds = np.stack([np.zeros(900)] + [arc.encode(np.array([[4]]))] * 3)
    votes.add(given, preds, np.zeros(4), np.array([0, 1, 0, 1]), np.arange(10, 14))  # two rows, two of padding
    assert votes.payload()["row"].tolist() == [11, 13]
    votes.merge([votes.payload()])
    assert votes.result()["pass@1"] == 0.25 and votes.result()["hits@1"] == 1
    nothing, one = {"attempt_1": [[0]], "attempt_2": [[0]]}, {"attempt_1": [[4]], "attempt_2": [[4]]}
    assert votes.submission() == {"a": [nothing], "b": [nothing, one]}
    votes = ArcVotes(puzzles, ["<blank>", "b"])                                 # a prediction without any colour
    votes.add(given[:1], np.zeros((1, 900)), np.zeros(1), np.array([1]), np.arange(1))
    votes.merge([votes.payload()])
    assert votes.submission()["b"][1] == {"attempt_1": [], "attempt_2": []}


def test_foreign_test_row_is_refused():
    votes = ArcVotes({"a": {"test": [pair([[1]], [[2]])]}}, ["<blank>", "a"])
    row = arc.encode(np.array([[5]]))[None]
    with pytest.raises(data.UserError, match="puzzle a in test_puzzles.json"):
        votes.add(row, row, np.zeros(1), np.array([1]), np.arange(1))
