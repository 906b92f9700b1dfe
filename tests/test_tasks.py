"""Other tasks: a grid task of your own, numbers instead of tokens, latent episodes, joined folders."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import own_task
import pytest
from runs import ROOT, go, log_of, without_curves, write_boards

import data
import eval as scoring
from data import SamplerState, Split
from prepare import INDEX_FILES, write_dataset
from tools import draw
from tools.common import UserError, cli, write_json

TINY = (
    "--hidden-size 32 --puzzle-emb-ndim 32 --H-cycles 1 --L-cycles 2 --halt-max-steps 2 --ema 0.95 "
    "--lr-warmup-steps 10 --weight-decay 0.1 --eval-interval 1000 --dtype float32 --no-compile --device cpu"
).split()
ONE_LAYER = [*TINY, "--mixer", "attn", "--num-heads", "2", "--num-layers", "1"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take a second each, and other tests draw them."""
    without_curves(monkeypatch)
    monkeypatch.setattr(draw, "draw_steps", lambda *args: None)


def linear(rng, n):
    """inputs, targets, mask. Targets are a linear map with noise of variance 0.0025; 3/4 are scored."""
    x, w = rng.standard_normal((n, 4, 3)), np.random.default_rng(5).standard_normal((3, 2))
    return x, x @ w + 0.05 * rng.standard_normal((n, 4, 2)), rng.random((n, 4)) < 0.75


def write_linear(folder, n=640):
    rng = np.random.default_rng(0)
    write_dataset(folder, {"train": linear(rng, n), "test": linear(rng, n // 6)})


def write_episodes(folder, train=60, test=10, metadata=None):
    """Points that rotate by one radian per step, 5 to 14 latents each. metadata: {number of file: content}"""
    rng, rotation = np.random.default_rng(0), np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]])
    for split, n in (("train", train), ("test", test)):
        for name in ("latents", "metadata"):
            (folder / split / name).mkdir(parents=True)
        for i in range(n):
            points = [rng.standard_normal(2)]
            for _ in range(rng.integers(4, 14)):
                points.append(rotation @ points[-1])
            np.savez(folder / split / "latents" / f"episode_{i:03}.npz", latents=np.array(points, np.float32))
            if i in (metadata or {}):
                write_json(folder / split / "metadata" / f"episode_{i:03}.json", metadata[i])


def amend(folder, **more):
    """Add to both dataset.json, or change them."""
    for path in Path(folder).glob("*/dataset.json"):
        write_json(path, {**json.loads(path.read_text()), **more})


def fit(folder, run, *flags):
    """Train with a break and a resume, then score: the metrics of eval.py, which are those of train.py."""
    flags = ["--data", str(folder), "--run-dir", str(run), *flags]
    assert go(*flags, "--max-steps", "20", "--eval-limit", "8") == 0
    assert go("--resume", run, "--eval-limit", 1000) == 0
    assert len(log_of(run, "val")) == 2 and log_of(run, "val")[0]["step"] == 20
    assert (run / "best.ckpt").exists()
    assert scoring.main(["--checkpoint", str(run), "--device", "cpu"]) == 0
    measured, seen = json.loads((run / "results.json").read_text())["metrics"], log_of(run, "val")[-1]
    assert all(abs(seen[f"val/{k}"] - value) < 1e-4 for k, value in measured.items()), (seen, measured)
    return measured


# ---------------------------------------------------------------------------------------------
# Each kind of task, from nothing to a stated error


def test_own_task(tmp_path, capsys):
    """Flooding, where each step wets the neighbours: a rule of four steps gets 56% of the boards."""
    own_task.main([str(tmp_path / "flood")])
    split = Split(tmp_path / "flood", "train")
    inputs, labels, _ = (np.sort(a) for a in split.gather(np.arange(8)))
    assert split.meta["total_groups"] == 1000
    assert (inputs == inputs[0]).all() and (labels == labels[0]).all(), "8 symmetries of a board"
    sizes = ["--L-cycles", "1", "--global-batch-size", "32", "--width-multiple", "256"]
    metrics = fit(tmp_path / "flood", tmp_path / "run", *TINY, "--epochs", "8", "--lr", "6e-3", *sizes)
    assert metrics["exact_acc"] > 0.62 and metrics["cell_acc"] > 0.94, metrics  # 0.66 and 0.95 or more
    assert "checked train: 8,000 examples, " in capsys.readouterr().out


def test_noisy_linear_map(tmp_path, capsys):
    """The metric of best.ckpt becomes the loss."""
    write_linear(tmp_path / "linear")
    flags = ["--epochs", "20", "--halt-tolerance", "0.02"]
    metrics = fit(tmp_path / "linear", tmp_path / "run", *ONE_LAYER, *flags)
    assert metrics["regression_loss"] < 0.03 and metrics["mae"] < 0.15, metrics  # 0.008; a constant: 3.5
    assert 0.5 < metrics["within_tolerance"] <= 1
    out = capsys.readouterr().out
    assert "checked train: 640 examples, " in out and "RESULT preset=mini regression_loss=" in out


def test_rotating_latent(tmp_path, capsys):
    """In windows of four, three targets are also inputs; copying those and guessing one would leave 0.23."""
    write_episodes(tmp_path / "spin")
    flags = "--pos-encodings rope --seq-len 4 --epochs 60 --puzzle-emb-lr 0".split()
    metrics = fit(tmp_path / "spin", tmp_path / "run", *ONE_LAYER, *flags)
    assert metrics["regression_loss"] < 0.05, metrics  # 0.011 when this was written
    assert "checked train: " in capsys.readouterr().out


@pytest.mark.parametrize("ignored", [-100, -1, 255, 0, None])
def test_any_ignore_label_trains(tmp_path, ignored):
    """dataset.json decides which label is ignored: it passes the checks, and only the others are scored."""
    rng = np.random.default_rng(0)
    folder = Path(write_boards(tmp_path / "d", 3))
    amend(folder, ignore_label_id=ignored)
    n_labels = 0
    for split in ("train", "test"):
        path = folder / split / "all__labels.npy"
        labels = np.load(path).astype(np.int64)
        hidden = rng.random(labels.shape) < 0.3 if ignored is not None else labels < 0
        np.save(path, np.where(hidden, ignored or 0, labels))
        n_labels = int((~hidden).sum())
    assert go(*flags_for(tmp_path, folder), "--max-steps", 2) == 0
    split = Split(folder, "test")
    assert split.check() == n_labels and (split.gather(np.arange(6))[1] != -100).sum() == n_labels
    assert log_of(tmp_path / "run")[-1]["n"] == 6


# ---------------------------------------------------------------------------------------------
# Regression data


def test_npz_beside_npy_and_padding(tmp_path):
    """An .npz replaces an absent .npy, with one array of the field's name or an unnamed one; .npy wins."""
    write_linear(tmp_path / "d", 30)
    amend(tmp_path / "d", input_pad_value=-7.5)
    expected, folder = Split(tmp_path / "d", "train").gather(np.arange(30), size=33), tmp_path / "d" / "train"
    inputs, targets, mask = (folder / f"all__{name}.npy" for name in ("inputs", "targets", "target_mask"))
    np.savez(inputs.with_suffix(".npz"), other=0)  # not read
    np.savez_compressed(targets.with_suffix(".npz"), np.load(targets))
    np.savez(mask.with_suffix(".npz"), target_mask=np.load(mask), notes=1)
    label_mask = np.load(mask)
    targets.unlink()
    mask.unlink()
    for a, b in zip(Split(tmp_path / "d", "train").gather(np.arange(30), size=33), expected):
        np.testing.assert_array_equal(a, b)
    inputs, labels, ids = expected
    assert [(a.dtype, a.shape) for a in (inputs, labels)] == [(np.float32, (33, 4, n)) for n in (3, 2)]
    assert (np.isnan(labels[:30]).any(-1) == ~label_mask).all() and np.isnan(labels[30:]).all()
    assert (inputs[30:] == -7.5).all() and ids.dtype == np.int32 and not ids.any()


def test_index_files_may_be_left_out(tmp_path):
    write_linear(tmp_path / "d", 30)
    for name in INDEX_FILES:
        (tmp_path / "d" / "train" / f"all__{name}.npy").unlink()
    (tmp_path / "d" / "identifiers.json").unlink()
    split = Split(tmp_path / "d", "train")
    assert split.names == ["<blank>"] and not split.puzzle_identifiers.any()
    assert split.meta["total_groups"] == 30 and split.task == "regression"


# ---------------------------------------------------------------------------------------------
# What is wrong with a dataset is one line


def changed(field, edit):
    """Damage: edit the array of a field of the training split."""

    def damage(d):
        path = d / "train" / f"all__{field}.npy"
        np.save(path, edit(np.load(path)))

    return damage


def with_value(position, value):
    def edit(array):
        array[position] = value
        return array

    return edit


def meta(**values):
    return lambda d: amend(d, **values)


def written(name, content):
    return lambda d: (d / name).write_bytes(content)


def cut(name):
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[:-7])


def latents(*unnamed, **named):
    return lambda d: np.savez(d / "train/latents/episode_002.npz", *unnamed, **named)


POINTS, METADATA = np.zeros((5, 2)), "train/metadata/episode_002.json"
BAD_BOARDS = [
    (written("recipe.json", b"{"), "d/recipe.json: Expecting property name"),
    (written("train/dataset.json", b"[]"), "d/train/dataset.json does not hold a dict"),
    (written("train/dataset.json", b'{"vocab'), "d/train/dataset.json: Unterminated string"),
    (lambda d: (d / "identifiers.json").unlink(), "d/identifiers.json: No such file"),
    (lambda d: (d / "train/all__labels.npy").unlink(), "train/all__labels.npy: No such file"),
    (cut("train/all__inputs.npy"), "train/all__inputs.npy: "),
    (written("test/all__inputs.npy", b""), "test/all__inputs.npy: "),
    (meta(pad_id=None), "d/train/dataset.json: pad_id is None, but must be"),
    (
        meta(vocab_size="6"),
        "d/train/dataset.json: vocab_size is '6', but must be a whole number of at least 1",
    ),
    (meta(vocab_size=True), "vocab_size is True"),
    (meta(ignore_label_id="none"), "ignore_label_id is 'none', but must be a whole number or null"),
    (meta(seq_len=9), r"d/train: an array is uint8 \(10, 16\), not .*9\)"),
    (changed("inputs", with_value(-1, 6)), "d/train.* 6, but vocab_size is 6"),
    (changed("labels", with_value(-1, 6)), "d/train.* 6, but vocab_size is 6"),
    (changed("labels", np.zeros_like), "d/train: all labels are ignored"),
    (changed("puzzle_indices", lambda a: a[::-1]), "all__puzzle_indices.npy does not rise from 0"),
    (
        changed("puzzle_identifiers", lambda a: a + 9),
        "puzzle identifier 15, but identifiers.json has 7 names",
    ),
]
BAD_NUMBERS = [
    (changed("target_mask", lambda a: a[:, :3]), r"an array is bool \(30, 3\), not .*\(30, 4\)"),
    (changed("target_mask", lambda a: a & False), "all labels are ignored"),
    (changed("targets", with_value(17, np.inf)), "d/train.* row 0.*: NaN or infinity"),
    (changed("inputs", with_value(5, np.nan)), "d/train.* row 0.*: NaN or infinity"),
    (changed("targets", lambda a: a.astype(int)), "an array is int64"),
    (changed("group_indices", lambda a: a[None]), "all__group_indices.npy does not rise from 0 to 30"),
    (written("train/all__inputs.npy", b"\x93NUMPY"), "all__inputs.npy: "),
    (meta(input_dim=None), "input_dim is None, but must be a whole number"),
]
BAD_EPISODES = [
    (latents(latents=np.zeros((5, 3))), r"episode_002.npz: latents have shape \(5, 3\), but need at least 2"),
    (latents(latents=1.0), r"shape \(\), but need at least 2 rows"),
    (latents(POINTS, POINTS), "episode_002.npz: no readable array latents"),
    (latents(latents=POINTS * np.nan), "d/train.*: NaN or infinity"),
    (written("train/latents/episode_002.npz", b"PK\3\4"), "episode_002.npz: no readable array latents: "),
    (lambda d: shutil.rmtree(d / "train/latents"), "train/dataset.json: No such file"),
    (lambda d: [f.unlink() for f in d.glob("train/latents/*")], "train/latents has no episode_XXX.npz"),
    (written(METADATA, b"{"), "episode_002.json: "),
    (lambda d: shutil.rmtree(d / "test"), "test/dataset.json: No such file"),
]


def flags_for(tmp_path, *folders):
    flags = [*ONE_LAYER, "--run-dir", str(tmp_path / "run"), "--global-batch-size", "2", "--data"]
    return flags + [str(folder) for folder in folders]


def ends_with_2(argv, capsys, words):
    """train.py as a script: exit code 2 and one line on stderr, in which the pattern is."""
    with pytest.raises(SystemExit) as stop:
        cli(lambda: go(*argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(words, err), err


KINDS = ((write_boards, 3, BAD_BOARDS), (write_linear, 30, BAD_NUMBERS), (write_episodes, 6, BAD_EPISODES))
BAD = [(write, size, *bad) for write, size, all_bad in KINDS for bad in all_bad]


@pytest.mark.parametrize("write, size, damage, words", BAD)
def test_bad_data_is_one_line(tmp_path, capsys, write, size, damage, words):
    write(tmp_path / "d", size)
    damage(tmp_path / "d")
    ends_with_2(flags_for(tmp_path, tmp_path / "d"), capsys, words)
    assert not list(tmp_path.rglob("*.ckpt*"))


# ---------------------------------------------------------------------------------------------
# Episodes


def test_episodes_as_examples(tmp_path):
    """Against a plain loop: every window of every episode, its targets one step on, and its metadata."""
    a, b = {"group": "a"}, {"group": ["b"]}
    metadata = {0: {**a, "puzzle_identifier": 9}, 1: {**b, "set": "x"}, 2: a, 3: {}, 4: b}
    write_episodes(tmp_path / "d", train=6, test=2, metadata=metadata)
    order = [0, 2, 1, 3, 4, 5]  # group a, then (x, b), and the others are groups of their own
    files = [tmp_path / "d" / "train" / "latents" / f"episode_{i:03}.npz" for i in order]
    episodes = [np.load(file)["latents"] for file in files]
    longest = max(len(np.load(f)["latents"]) - 1 for f in (tmp_path / "d").rglob("*.npz"))
    for seq_len in (None, 3):
        split, S = Split(tmp_path / "d", "train", seq_len=seq_len), seq_len or longest
        assert [split.meta[name] for name in ("seq_len", "input_dim", "target_dim")] == [S, 2, 2]
        assert split.puzzle_identifiers.tolist() == [9, 2, 1, 3, 4, 5] and len(split.names) == 10
        assert split.group_indices.tolist() == [0, 2, 3, 4, 5, 6], "two sets have two groups b"
        windows = []
        for number, x in enumerate(episodes):
            for i in range(0, len(x) - 1, S):
                windows.append((x[i : i + S], x[i + 1 : i + S + 1], number))
        assert len(split) == len(windows) and split.check() == 2 * sum(len(x) - 1 for x in episodes)
        shuffled = np.random.default_rng(0).permutation(len(windows))
        rows = zip(shuffled, *split.gather(shuffled)[:2], split.puzzle_of(shuffled))
        for example, inputs, labels, puzzle in rows:
            question, answer, number = windows[example]
            n = len(answer)
            np.testing.assert_array_equal(inputs[:n], question[:n])
            np.testing.assert_array_equal(labels[:n], answer)
            assert np.isnan(labels[n:]).all() and (inputs[n:] == 0).all() and puzzle == number
    assert Split(tmp_path / "d", "test").puzzle_identifiers.tolist() == [9, 6], "the count continues"


def test_a_thousand_episodes(tmp_path):
    """320 MB of latents: opening, checking and gathering take less than 150 MiB, and leave no file open."""
    program = """
import io, resource, sys
from pathlib import Path
import numpy as np
import data
folder, blobs = Path(sys.argv[1]) / "train" / "latents", []
folder.mkdir(parents=True)
for T in (84, 128, 172):
    f = io.BytesIO()
    np.savez_compressed(f, latents=np.full((T, 640), T, np.float32))
    blobs.append(f.getvalue())
for i in range(1_000):
    (folder / f"episode_{i:02}.npz").write_bytes(blobs[i % 3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
split = data.Split(sys.argv[1], "train")
inputs, labels, ids = split.gather(np.arange(975, 1_000))
in_order = (inputs[0, 0] == 84).all() and (labels[2, 170] == 172).all()
assert len(split) == 1_000 and in_order, "by number: episode_100 comes after episode_99"
assert split.check() > 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    command = [sys.executable, "-c", program, tmp_path / "d"]
    r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0 and float(r.stdout) < 150, r.stdout + r.stderr


# ---------------------------------------------------------------------------------------------
# Several folders


def test_joined_folders(tmp_path):
    """Identifiers are shifted past those of folders before, blank stays 0, both splits agree on the rows."""
    sizes = {"a": 3, "b": 4, "c": 2}
    a, b, c = (write_boards(tmp_path / name, n, seed=n, shift=100 * n) for name, n in sizes.items())
    path = Path(b) / "train" / "all__puzzle_identifiers.npy"
    np.save(path, np.where(np.load(path) == 2, 0, np.load(path)))
    alone, split = [Split(d, "train") for d in (a, b, c)], Split([a, b, c], "train")
    assert split.names == ["<blank>", *(name for s in alone for name in s.names[1:])]
    assert split.meta["num_puzzle_identifiers"] == len(split.names) and split.meta["total_groups"] == 9
    assert len(split) == sum(map(len, alone)) and split.check() == sum(s.check() for s in alone)

    pick = np.random.default_rng(0).permutation(len(split))
    inputs, labels, ids = split.gather(pick)
    whole = [np.concatenate(x) for x in zip(*(s.gather(np.arange(len(s))) for s in alone))]
    assert (inputs == whole[0][pick]).all() and (labels == whole[1][pick]).all()
    names = [s.names[i] for s in alone for i in s.gather(np.arange(len(s)))[2]]
    assert [split.names[i] for i in ids] == [names[i] for i in pick] and "<blank>" in names
    examples, puzzles, _ = next(data.batch_order(split, 0, 4, 4, 16, SamplerState()))
    assert (split.puzzle_of(examples) == puzzles).all()

    test, alone = Split([a, b, c], "test", [c, b]), [Split(d, "test") for d in (c, b)]
    assert test.puzzle_ids_sha256 == split.puzzle_ids_sha256 and test.dirs == [Path(c), Path(b)]
    names = [s.names[i] for s in alone for i in s.puzzle_identifiers]
    assert [test.names[i] for i in test.puzzle_identifiers] == names


def test_folders_that_are_only_tested_on(tmp_path):
    """Both splits have rows for them at the end, unless their identifiers.json is that of a trained one."""
    folders = (("a", 0, 0), ("b", 1, 50), ("c", 2, 0))
    a, b, c = (write_boards(tmp_path / name, 3, seed, shift=shift) for name, seed, shift in folders)
    trained, test = (Split([a], split, [a, b]) for split in ("train", "test"))
    assert trained.puzzle_ids_sha256 == test.puzzle_ids_sha256 and len(trained.names) == 13
    assert trained.puzzle_identifiers.max() == 6
    assert test.puzzle_identifiers.tolist() == list(range(1, 13))
    same = Split([a], "test", [c])
    assert same.puzzle_identifiers.tolist() == list(range(1, 7)) and len(same.names) == 7
    assert Split([a, a], "train").puzzle_identifiers.max() == 6, "twice the same folder"


def test_train_and_eval_on_joined_folders(tmp_path):
    a, b, c = (write_boards(tmp_path / name, 6, seed, shift=100 * seed) for seed, name in enumerate("abc"))
    run = tmp_path / "run"
    assert go(*flags_for(tmp_path, a, b), "--data-test", c, "--epochs", 4) == 0
    assert log_of(run, "start")[0]["config"]["num_puzzles"] == 37
    assert scoring.main(["--checkpoint", str(run), "--device", "cpu"]) == 0, "on c: its rows are in the table"
    assert log_of(run, "val")[-1]["val/n"] == 12
    foreign = write_boards(tmp_path / "d", 5, 3, shift=300)
    with pytest.raises(UserError, match="d has other puzzles than the checkpoint"):
        scoring.main(["--checkpoint", str(run), "--data", foreign, "--device", "cpu"])


def test_folders_that_do_not_fit_together(tmp_path, capsys):
    a, words, padding = (write_boards(tmp_path / name, 6) for name in ("a", "words", "padding"))
    linear, spin = tmp_path / "linear", tmp_path / "spin"
    amend(words, vocab_size=8)
    amend(padding, pad_id=5)
    write_linear(linear, 30)
    write_episodes(spin, 3, 2)
    nines = (np.ones((9, 9), np.uint8),) * 2
    write_dataset(tmp_path / "short", {"train": nines, "test": nines}, 6)
    for folder, message in (
        (words, "has vocab_size 8, but .*a has 6"),
        (padding, "has pad_id 5, but .* has 0"),
        (tmp_path / "short", "has seq_len 9, but .* has 16"),
        (linear, "has vocab_size 0, but .* has 6"),
    ):
        ends_with_2(flags_for(tmp_path, a, folder), capsys, f"{folder}/train {message}")
        argv = [*flags_for(tmp_path, a), "--data-test", str(folder)]
        ends_with_2(argv, capsys, f"{folder}/test {message}")
    argv = [*flags_for(tmp_path, linear, spin), "--seq-len", "4"]
    ends_with_2(argv, capsys, "spin/train has input_dim 2, but .* has 3")


def test_task_of_recipes(tmp_path):
    """The builders in recipe.json of all folders decide; a task of your own has no known symmetries."""
    folders = {name: Path(write_boards(tmp_path / name, 3)) for name in ("sudoku", "maze", "mine", "other")}
    for name, folder in folders.items():
        write_json(folder / "recipe.json", {"builder": "sudoku" if name == "other" else name})
    (folders["mine"] / "recipe.json").unlink()
    for names, task in (
        ("sudoku", "sudoku"),
        ("maze", "maze"),
        ("mine", "tokens"),
        ("sudoku maze", "tokens"),
    ):
        assert Split([folders[name] for name in names.split()], "test").task == task, names
    assert Split([folders["sudoku"], folders["other"]], "test").task == "sudoku"


def test_hidden_answers(tmp_path, capsys):
    """Those of ARC's test set may be unknown, as on Kaggle; other splits without labels are a mistake."""
    folder = Path(write_boards(tmp_path / "d", 3))
    labels = folder / "test" / "all__labels.npy"
    np.save(labels, np.load(labels) * 0)
    ends_with_2(flags_for(tmp_path, folder), capsys, "d/test: all labels are ignored")
    write_json(folder / "test_puzzles.json", {})
    shutil.rmtree(tmp_path / "run")
    assert go(*flags_for(tmp_path, folder), "--max-steps", 1) == 0
    assert " n=0 " in log_of(tmp_path / "run")[-1]["line"]


# ---------------------------------------------------------------------------------------------
# The order of training


@pytest.mark.parametrize("sizes", [[1] * 24, [1, 3, 2, 1] * 6], ids=["one example each", "mixed"])
def test_batch_order_is_that_of_a_loop(sizes):
    """SPEC section 8, drawn one by one; resumed in the middle it continues as if nothing had happened."""
    split = Split.__new__(Split)
    split.puzzle_indices, split.group_indices = data.boundaries(sizes), data.boundaries([3, 1, 5, 2, 4, 3, 6])
    split.canvases = np.zeros(7, int)
    rng = np.random.Generator(np.random.Philox(7 + 2))
    order = np.concatenate([rng.permutation(7) for _ in range(5)])
    expected, batch = [], []
    for group in order:
        puzzle = int(rng.integers(split.group_indices[group], split.group_indices[group + 1]))
        take = min(sizes[puzzle], 4 - len(batch))
        chosen = [0] if sizes[puzzle] == 1 else rng.choice(sizes[puzzle], take, replace=False)
        batch += [(int(split.puzzle_indices[puzzle] + i), puzzle) for i in chosen]
        if len(batch) == 4:
            expected.append(batch)
            batch = []
    drawn = list(data.batch_order(split, 7, 10, 5, 4, SamplerState(iteration=2)))
    assert [list(zip(e.tolist(), p.tolist())) for e, p, _ in drawn] == expected
    assert drawn[-1][2] == SamplerState(iteration=3)
    saved = SamplerState(*json.loads(json.dumps(drawn[2][2])))  # plain numbers, up to 2^64
    again = list(data.batch_order(split, 7, 10, 5, 4, saved))
    for (examples, _, state), (expected, _, expected_state) in zip(again, drawn[3:], strict=True):
        assert examples.tolist() == expected.tolist() and state == expected_state


def test_min_halt_steps():
    """Drawn from (seed, step) alone. With at most one step there is nothing to explore."""
    rng = np.random.Generator(np.random.Philox(key=[5, 70]))
    explores, steps = rng.random(1000) < 0.3, rng.integers(2, 17, 1000)
    drawn = data.min_halt_steps(5, 70, 1000, 0.3, 16)
    assert (drawn == explores * steps).all() and drawn.dtype == np.int32 and 200 < (drawn > 0).sum() < 400
    assert set(data.min_halt_steps(5, 70, 1000, 1.0, 2)) == {2}
    single = data.min_halt_steps(5, 70, 1000, 1.0, 1)
    assert single.shape == (1000,) and single.dtype == np.int32 and not single.any()
