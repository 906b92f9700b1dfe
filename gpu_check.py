"""Is the GPU path right, and how fast is it here? At most ten minutes on one GPU.

    ./speedrun.sh gpu-check
    python gpu_check.py --output my-card.json

Every row is tried, whatever became of the others, and is in the JSON file as
soon as it is known. Exit code 1: a row FAILED.
"""
import gc
import importlib.metadata
import itertools
import json
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import common  # before torch, for a Ctrl-C while that is imported
import numpy as np
import torch

import prepare
import train
from bench import bench
from common import Parser, UserError, cli, one_line, progress, within, write_json
from hub import PREFIX, from_published, published_names
from model import Batch, act_loss, attend, build, compile_model, train_bytes
from rundir import read_log

HERE = Path(__file__).resolve().parent
GOLDEN = ("mlp", "attention", "learned_positions")      # tests/golden/model_NAME.npz
LIMITS = {  # of the columns of parity, the last two relative. bfloat16: three times what a CPU is off by;
    # without the mixer of one block step 16 would be off by 0.13 or more, and the gradient by 1
    "float32": (1e-4, 1e-4, 1e-3, 1e-3, 1e-4, 1e-4), "bfloat16": (0.04, 0.06, 0.13, 0.06, 4e-3, 0.02)}
# Relative. 50 steps that sum in another order (compiled, or in four parts) are off by 1e-7 on a CPU: rounding
# in float32 has no time to grow. 0.1% more learning rate is off by 4e-4, bfloat16 by 6e-4.
LOSS_LIMIT = 1e-4
ROWS = {"mini": 64, "sudoku": 768, "sudoku-fast": 768, "sudoku-att": 768, "maze": 192, "arc1": 192,
        "arc2": 192}    # of one GPU
CARDS = {   # published TFLOP/s of dense bfloat16 by the names of whole cards: a share of one (MIG) is none
    "H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, r"A100[- ][\w -]*\d+GB( PCIe)?": 312,
    "GeForce RTX 5090": 209.5, "GeForce RTX 4090": 165}
SPARE = "presets with --attention sdpa"       # where time is left
HIDDEN = ("part", "what", "seconds", "failed", "note", "detail")    # what of a row is in no column


# ---------------------------------------------------------------------------------------------
# Golden figures of the published code

def golden(name):
    """(figures, published settings, published state dict without prefix)"""
    figures = np.load(HERE / "tests" / "golden" / f"model_{name}.npz")
    c = json.loads(str(figures["config"]))
    r, state = np.random.RandomState(c["weight_seed"]), {}
    for entry in figures["keys"]:
        key, shape = str(entry).split(" ", 1)
        scale = 1.0 if key in ("H_init", "L_init") else c["weight_scale"]
        shape = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
        state[key] = torch.from_numpy((r.standard_normal(shape) * scale).astype(np.float32))
    return figures, c, state


def golden_settings(c, dtype="float32"):
    """What shapes do not tell, from published settings."""
    told = ("seq_len", "puzzle_emb_len", "num_heads", "H_cycles", "L_cycles")
    return {**{name: c[name] for name in told}, "dtype": dtype}


def golden_model(c, state, dtype="float32"):
    """A TRM on the CPU."""
    prefixed = {f"_orig_mod.{PREFIX}{k}": v.clone() for k, v in state.items()}
    return build(*from_published(prefixed, golden_settings(c, dtype)))


def golden_batch(figures, i):
    """Batch number i, on the CPU."""
    names = ("inputs", "labels", "puzzle_identifiers")
    arrays = [torch.from_numpy(figures[f"batch{i}/{name}"].astype(np.int32)) for name in names]
    return Batch(*arrays, torch.zeros(len(arrays[0]), dtype=torch.int32))


# ---------------------------------------------------------------------------------------------
# Rows: {column: figure}, and what stands beside the columns, see HIDDEN

def about(device):
    """What runs here."""
    facts = {"git": common.git_hash(), "torch": torch.__version__, "CUDA": torch.version.cuda}
    with suppress(importlib.metadata.PackageNotFoundError):
        facts["triton"] = importlib.metadata.version("triton")
    with suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {"GiB": round(card.total_memory / 2 ** 30, 1), "capability": f"{card.major}.{card.minor}",
                  "GPUs": torch.cuda.device_count()}
    row, lacks = {"note": ", ".join(f"{k} {v}" for k, v in facts.items())}, common.compiler_lacks(device)
    return {**row, "detail": facts, **failed(lacks, f"torch.compile lacks {lacks}")}


def failed(when, why):
    """What is added to a row."""
    return {"failed": why} if when else {}


def parity(device, name, dtype, compiled):
    """Largest differences from the golden figures: logits, q_halt and loss over 16 supervision steps, norms
    of the gradients of the first training step."""
    figures, c, state = golden(name)
    model = golden_model(c, state, dtype).to(device).eval()
    if compiled:
        compile_model(model)
    batch = Batch(*(t.to(device) for t in golden_batch(figures, 0)))
    carry, seen = model.empty_carry(batch), []
    with torch.no_grad():
        for _ in range(16):
            carry, logits, q = model.step(carry, batch)
            loss, _ = act_loss(model.cfg, carry, logits, q)
            seen.append([t.double().cpu().numpy() for t in (logits, q[:, 0], loss)])
    logits, q_halt, loss = map(np.stack, zip(*seen))
    off = {f"step {n}": np.abs(logits[n - 1] - figures[f"eval/logits_step{n}"]).max() for n in (1, 2, 16)}
    off["q_halt"] = np.abs(q_halt - figures["eval/q_halt"]).max()
    off["loss"] = np.abs(loss / figures["eval/loss"] - 1).max()
    carry, logits, q = model.train().step(model.empty_carry(batch), batch)
    (act_loss(model.cfg, carry, logits, q)[0] / len(q)).backward()
    params, names = dict(model.named_parameters()), published_names(model.cfg)
    norms = np.array([(p.grad.norm().item(), figures[f"grad_norm/{names[k]}"]) for k, p in params.items()])
    off["gradient"] = np.abs(norms[:, 0] - norms[:, 1]) / norms[:, 1].clip(1e-12)
    row = {column: float(np.max(value)) for column, value in off.items()}
    over = [f"{column} over {limit:.0e}" for column, limit in zip(row, LIMITS[dtype])
            if not row[column] <= limit]
    return {**row, **failed(over, ", ".join(over))}


def attention(device, rows, length, backward, compiled=True, calls=20, heads=8, head_dim=64):
    """FlexAttention, as the model calls it, against SDPA, in bfloat16."""
    generator, row, out = torch.Generator(device).manual_seed(0), {}, {}
    q, k, v, grad = torch.randn(4, rows, length, heads, head_dim, generator=generator, device=device,
                                dtype=torch.bfloat16).transpose(2, 3)
    qkv = [t.clone().requires_grad_(backward) for t in (q, k, v)]
    flop = 4 * rows * heads * length ** 2 * head_dim * (3.5 if backward else 1)     # 2 products, 5 backward

    def many(function):     # between two waits, so that Python launches one while another is computed
        for _ in range(calls):
            result = function(*qkv)
            if backward:
                torch.autograd.grad(result, qkv, grad)
    for kind in ("flex", "sdpa"):
        function = partial(attend, flex=kind == "flex")
        if compiled:
            function = torch.compile(function, fullgraph=True, dynamic=False)
        out[kind] = function(*qkv).detach().float()
        seconds = min(common.seconds_of(partial(many, function), 4, device)) / calls
        row |= {f"{kind}_ms": 1000 * seconds, f"{kind}_tflops": flop / seconds / 1e12}
    gain, differ = row["sdpa_ms"] / row["flex_ms"], (out["flex"] - out["sdpa"]).abs().max().item()
    row |= {"faster": f"flex {gain:.2f}x" if gain > 1 else f"sdpa {1 / gain:.2f}x", "differ": differ}
    return {**row, **failed(not differ <= 0.02, "differ over 0.02")}    # bfloat16 rounds 1 by 0.004


def preset(device, name, rows, attention="flex", compiled=True, rounds=3):
    """A training step of a preset, its rows halved until they fit, beside the matrix product measured here,
    the card's published peak, and the memory that model.train_bytes foresees."""
    args = train.flags(**{**train.PRESETS[name], "attention": attention}).parse_args([])
    cfg = train.config_of(args, prepare.known(args.data[0]).shape)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
    while rows > 1 and 1.05 * train_bytes(cfg, rows, rows) > free:
        rows //= 2
    found = bench(name, common.World(0, 1, device), rows, compiled, rounds, attention=attention)
    card = found["device"].removeprefix("NVIDIA ")
    peak = next((peak for pattern, peak in CARDS.items() if re.fullmatch(pattern, card)), None)
    return {"rows": rows, "ms": found["ms"], "tflops": found["tflops"], "of_product": found["share_of_peak"],
            "of_card": peak and found["tflops"] / peak, "peak_gib": found["peak_memory_gib"],
            "formula_gib": train_bytes(cfg, rows, rows) / 2 ** 30, "detail": found}


def losses(device, run_dir, steps, ranks, more):
    """train/loss of mini's first steps in float32, by train.py in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), HERE / "train.py", "--preset", "mini",
               "--dtype", "float32", "--device", device, "--max-steps", steps, "--log-interval", 1,
               "--run-dir", run_dir, *more]
    r = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
    if r.returncode:
        said = [line for line in r.stderr.splitlines() if line.strip()] or [f"exit code {r.returncode}"]
        raise UserError(next((line for line in said if line.startswith("error: ")), said[-1]))
    return np.array([r["train/loss"] for r in read_log(run_dir / "log.jsonl") if r["event"] == "train"])


def same_losses(device, other, steps, ranks=1, more=()):
    """Of one rank on `device` and `ranks` on `other`, names of types."""
    if other == "cuda" and torch.cuda.device_count() < ranks:
        return {"note": "one GPU: not tried"}
    with tempfile.TemporaryDirectory() as folder:
        a = losses(device, Path(folder, "a"), steps, 1, more)
        b = losses(other, Path(folder, "b"), steps, ranks, more)
    row = {"steps": len(a), "first": a[0], "last": a[-1], "differ": np.abs(b / a - 1).max()}
    return {**row, **failed(not row["differ"] <= LOSS_LIMIT, f"differ over {LOSS_LIMIT:.0e}")}


# ---------------------------------------------------------------------------------------------
# The table

def plan(device):
    """[(part, what, function that returns a row)]"""
    ways, shapes = [("float32", False), ("float32", True), ("bfloat16", True)], [(768, 97), (192, 916)]
    return [
        ("device", common.device_name(device), partial(about, device)),
        *(("parity", f"{name.split('_')[0]} {dtype.replace('loat', '')}{' compiled' * compiled}",
           partial(parity, device, name, dtype, compiled)) for name in GOLDEN for dtype, compiled in ways),
        ("losses", "GPU and CPU", partial(same_losses, "cuda", "cpu", 50)),
        ("losses", "one rank and two", partial(same_losses, "cuda", "cuda", 20, ranks=2)),
        *(("attention", f"L {length} fwd{'+bwd' * backward}",
           partial(attention, device, rows, length, backward))
          for rows, length in shapes for backward in (False, True)),
        *(("presets", name, partial(preset, device, name, rows)) for name, rows in ROWS.items()),
        ("presets", "mini eager", partial(preset, device, "mini", ROWS["mini"], compiled=False)),
        *((SPARE, name, partial(preset, device, name, ROWS[name], "sdpa"))
          for name in ("sudoku-att", "maze", "arc1", "arc2"))]


def tried(function):
    """Its row, whatever happens; on a device that no row before it has left anything on."""
    began = time.monotonic()
    torch.compiler.reset()      # at most eight variants of a function are compiled
    gc.collect()
    torch.cuda.empty_cache()
    try:
        row = function()
    except Exception as e:      # whatever it is: the other rows are tried
        row = {"failed": one_line(f"{type(e).__name__}: {' '.join(str(e).split())}")}
    return {**row, "seconds": time.monotonic() - began}


def text(value):
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows):
    """The lines of one part, of at most 80 columns."""
    columns = dict.fromkeys(name for row in rows for name in row if name not in HIDDEN)
    cells = [["", *columns], *([row["what"], *(text(row.get(name, "")) for name in columns)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row, (what, *figures) in zip([{}, *rows], cells):
        lines.append("  ".join([what.ljust(widths[0]), *map(str.rjust, figures, widths[1:])]).rstrip())
        for said in (row.get("note", ""), "failed" in row and f"FAILED: {row['failed']}"):
            lines += textwrap.wrap(said or "", 76, initial_indent="    ", subsequent_indent="    ")
    return lines if columns else lines[1:]


def check(tasks, output, minutes=10):
    """Run a plan, print it part by part and keep it in the JSON file `output`; returns the exit code. No row
    begins in the last of the minutes."""
    began, rows = time.monotonic(), []
    for part, group in itertools.groupby(tasks, lambda task: task[0]):
        for _, what, function in progress(list(group), desc=part):
            late = time.monotonic() - began > 60 * (minutes - 1)
            row = {"note" if part == SPARE else "failed": f"not tried: {minutes - 1:g} minutes are over"}
            rows.append({"part": part, "what": what, **(row if late else tried(function))})
            write_json(output, {"seconds": time.monotonic() - began, "rows": rows})
        print(f"{part}:", *table([row for row in rows if row["part"] == part]), "", sep="\n", flush=True)
    n_failed = sum("failed" in row for row in rows)
    print(f"{len(rows)} rows, {n_failed} FAILED, {time.monotonic() - began:.0f} s; {output}")
    return int(n_failed > 0)


def flags():
    parser = Parser(__doc__)
    parser.add_argument("--output", default="gpu-check.json", metavar="FILE", help="all that was measured")
    parser.add_argument("--minutes", type=within(float, 1), default=10, metavar="M", help="to take at most")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("gpu-check needs a CUDA GPU; this machine has none")
    return check(plan(torch.device("cuda", 0)), args.output, args.minutes)


if __name__ == "__main__":
    cli(main)
