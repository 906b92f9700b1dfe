"""What a GPU asks for, checked without one: memory, parts of a batch, determinism, attention, evaluations."""
import itertools

import pytest
import torch

import common
import model
import optim
import prepare
import runs
import state
import train
from common import UserError
from model import Config, attend, flops, parts_that_fit, train_bytes

GIB = 2 ** 30
MLP, ATT = Config(mixer="mlp", pos_encodings="none"), Config()
MAZE = Config(seq_len=900, vocab_size=6, L_cycles=4)
ARC1 = Config(seq_len=900, vocab_size=12, num_puzzles=876_406)


@pytest.mark.parametrize("cfg, rows, part, reserved", [
    (MLP, 768, 768, 31.0), (ATT, 768, 768, 21.0), (ARC1, 192, 192, 50.0), (MAZE, 768, 384, 73.4)],
    ids=["sudoku", "sudoku-att", "arc1", "maze"])
def test_memory_is_what_a_make_believe_device_counted(cfg, rows, part, reserved):
    """GiB that torch's allocator reserved there, with compiled nets."""
    assert train_bytes(cfg, rows, part) / GIB == pytest.approx(reserved, rel=0.02)


@pytest.mark.parametrize("gib, expected", [     # of 1, 2, 4 and 8 GPUs; 768 rows on one, 1,536 on several
    (24, {"sudoku": [2, 2, 1, 1], "sudoku-att": [1, 1, 1, 1], "maze": [8, 8, 4, 2], "arc1": [12, 12, 6, 3]}),
    (32, {"sudoku": [2, 2, 1, 1], "sudoku-att": [1, 1, 1, 1], "maze": [6, 6, 3, 2], "arc1": [8, 8, 4, 2]}),
    (40, {"sudoku": [1, 1, 1, 1], "sudoku-att": [1, 1, 1, 1], "maze": [6, 6, 2, 1], "arc1": [6, 6, 3, 2]}),
    (80, {"sudoku": [1, 1, 1, 1], "sudoku-att": [1, 1, 1, 1], "maze": [2, 2, 1, 1], "arc1": [3, 3, 2, 1]})])
def test_parts_by_the_memory_of_the_card(gib, expected):
    """The fewest that fit: one part less would need more than is free."""
    configs, free = {"sudoku": MLP, "sudoku-att": ATT, "maze": MAZE, "arc1": ARC1}, 0.98 * gib * GIB
    for name, parts in expected.items():
        rows = [768, 768, 384, 192]
        assert [parts_that_fit(configs[name], n, free) for n in rows] == parts, name
        for n, p in zip(rows, parts):
            assert 1.05 * train_bytes(configs[name], n, n // p) <= free
            fewer = [q for q in range(1, p) if n % q == 0]
            assert not fewer or 1.05 * train_bytes(configs[name], n, n // fewer[-1]) > free


def test_a_row_that_does_not_fit_is_one_line():
    with pytest.raises(UserError, match="not even one at a time; lower --global-batch-size or --hidden-size"):
        parts_that_fit(ARC1, 192, 1.9 * GIB)


def test_parts_are_chosen_on_a_gpu_only_and_by_the_fullest_one(tmp_path, monkeypatch):
    """The choice of the rank with the least memory holds for all; a typed --grad-accum wins."""
    seen, made, world = [], [], common.World(0, 1, torch.device("cuda"))
    cpu = common.World(0, 1, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 ** 9, 10 ** 9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 24)
    monkeypatch.setattr(state, "parts_that_fit", lambda cfg, rows, free: seen.append((rows, free)) or 2)
    monkeypatch.setattr(common.World, "agree", lambda self, number: number * 2)

    class Chosen(Exception):
        pass

    def open_run(args, *others):
        cfg = Config(hidden_size=16, num_heads=1, puzzle_emb_len=1, puzzle_emb_ndim=16)
        made.append(state.Run(args, cfg, cpu))
        return made[-1]

    def log(*others):
        raise Chosen
    monkeypatch.setattr(train, "open_run", open_run)
    monkeypatch.setattr(train, "Log", log)
    flags = runs.flags(runs.write_boards(tmp_path / "boards"), tmp_path / "run", "--device", "auto")
    for more, parts in ([], 4), (["--grad-accum", "8"], 8):
        with pytest.raises(Chosen):
            train.run_preset([*flags, *more], world)
        assert made[-1].rows == parts * made[-1].at_once[0], parts
    assert seen == [(8, 10 ** 9 + 24)]


def test_sign_sgd_is_the_same_in_any_order_of_rows():
    """Bit for bit, though the sums of many rows are near 0: one puzzle row for all, and a few."""
    generator = torch.Generator().manual_seed(0)
    for n_puzzles, trial in itertools.product((1, 5), range(20)):
        grads = torch.randn(768, 16, generator=generator)
        grads[384:] = -grads[:384] * (1 + 1e-7)
        ids = torch.randint(n_puzzles, (768,), generator=generator).sort().values
        table, orders = torch.randn(n_puzzles, 16, generator=generator), []
        for order in (torch.arange(768), torch.randperm(768, generator=generator), torch.arange(768).flip(0)):
            orders.append(table.clone())
            optim.sign_sgd(orders[-1], ids[order].float(), grads[order], 0.01, 0.1)
        assert torch.equal(orders[0], orders[1]) and torch.equal(orders[0], orders[2]), (n_puzzles, trial)
        exact = torch.stack([grads[ids == i].double().sum(0).sign() for i in range(n_puzzles)]).float()
        used = [i for i in range(n_puzzles) if (ids == i).any()]
        assert torch.equal(orders[0][used], (table * (1 - 0.01 * 0.1) - 0.01 * exact)[used])


class OnCuda:
    """Stands for a tensor on CUDA of which only shape and device are asked."""
    is_cuda, device = True, torch.device("cuda")

    def __init__(self, *shape):
        self.shape = shape


@pytest.mark.parametrize("head_dim, length, flex, score_mod, expected", [
    (64, 97, True, None, "flex"), (64, 916, True, max, "flex"), (8, 97, True, None, "sdpa"),
    (64, 97, False, None, "sdpa")])
def test_which_attention_a_gpu_takes(monkeypatch, head_dim, length, flex, score_mod, expected):
    """FlexAttention, told not to turn into flex decoding; SDPA for narrow heads and with --attention sdpa."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(model, "flex_attention", lambda *qkv, kernel_options, **kw: ("flex", kernel_options))
    monkeypatch.setattr(model.F, "scaled_dot_product_attention", lambda q, k, v: ("sdpa", None))
    q = OnCuda(2, 8, length, head_dim)
    name, options = attend(q, q, q, score_mod, flex)
    assert name == expected and (name == "sdpa" or options == {"FORCE_USE_FLEX_ATTENTION": True})


def test_attention_flag_may_change_on_resume(tmp_path):
    argv = runs.flags(runs.write_boards(tmp_path / "boards"), tmp_path / "run", "--max-steps", 2)
    assert runs.go(*argv, "--mixer", "attn", "--num-heads", 2) == 0
    assert runs.go("--resume", tmp_path / "run", "--attention", "sdpa", "--max-steps", 3) == 0
    assert runs.last(tmp_path / "run")["config"]["attention"] == "sdpa"


TEST_ROWS = {"sudoku": 422_786, "sudoku-att": 422_786, "maze": 1_000, "arc1": 385_815, "arc2": 385_815}


@pytest.mark.parametrize("preset", TEST_ROWS)
def test_evaluations_in_between_cost_under_5_percent_of_the_training(preset):
    """In FLOPs, of a whole run; the one at the end is of all rows."""
    args = train.flags(**train.PRESETS[preset]).parse_args([])
    shape = prepare.known(args.data[0]).shape
    cost = flops(train.config_of(args, shape))
    training = train.total_training_steps(args, shape) * args.global_batch_size * cost.step
    rows = min(args.eval_limit, TEST_ROWS[preset])
    between = (args.epochs // args.eval_interval - 1) * rows * 16 * cost.forward
    assert between < 0.05 * training, between / training


SHARE = {"sudoku": 0.28, "sudoku-att": 0.28, "maze": 0.35, "arc1": 0.35, "arc2": 0.35}
ALL_ROWS = {**TEST_ROWS, "arc2": 385_815 * 172 / 419}      # estimated from its 172 test inputs


@pytest.mark.parametrize("preset", TEST_ROWS)
def test_the_table_of_report_is_what_the_code_gives(preset):
    text = (runs.ROOT / "REPORT.md").read_text().partition("## Scale")[2]
    row, = [line for line in text.splitlines() if line.startswith(f"| {preset} |")]
    args = train.flags(**train.PRESETS[preset]).parse_args([])
    shape = prepare.known(args.data[0]).shape
    cfg, steps = train.config_of(args, shape), train.total_training_steps(args, shape)
    cost, between = flops(cfg), min(args.eval_limit, ALL_ROWS[preset])
    training = steps * args.global_batch_size * cost.step
    evaluations = 10 if args.epochs == 50_000 else 20
    at_the_end = ALL_ROWS[preset] if ALL_ROWS[preset] > between else 0
    scoring = (evaluations * between + at_the_end) * 16 * cost.forward

    def hours(gpus):
        return [f"{f / (SHARE[preset] * 989e12 * gpus) / 3600:.1f}" for f in (training, scoring)]

    def memory(rows):
        parts = parts_that_fit(cfg, rows, 0.98 * 80e9)
        return f"{train_bytes(cfg, rows, rows // parts) / GIB:.1f} in {parts}"
    cells = [preset, f"{cost.step / 1e9:.1f}", f"{cost.step * 1536 / 1e12:.1f}", f"{steps:,}",
             f"{training:.2e}", memory(192), memory(768), f"{SHARE[preset]:.0%}", " + ".join(hours(1)),
             " + ".join(hours(8))]
    assert row == f"| {' | '.join(cells)} |"


def test_a_part_is_scored_in_between_and_all_of_it_at_the_end(tmp_path):
    argv = runs.flags(runs.write_boards(tmp_path / "boards"), tmp_path / "run", "--eval-limit", 5)
    assert runs.go(*argv) == 0
    assert [r["val/n"] for r in runs.log_of(tmp_path / "run", "val")] == [5, 5]
    assert " n=40 " in runs.log_of(tmp_path / "run")[-1]["line"]
