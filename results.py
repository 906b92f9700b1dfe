"""What evaluations measured: intervals, tables, whether one is better.

    python results.py runs/mini-*    what finished runs gave; mean and spread

The last is what a record needs: several seeds of one preset.
"""
import math
import statistics
from pathlib import Path

import common  # noqa: F401  before torch, for a Ctrl-C while that is imported
import numpy as np
from common import Parser, UserError, cli, read_json
from model import metric_names
from rundir import read_log


def wilson(p, n, z=1.96):
    """95% Wilson interval of a share p of n."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def intervals(cfg, metrics, votes):
    """{metric: [low, high, n, unit]}. On ARC of test inputs alone: augmented rows are no sample of anything,
    and the official pass@2 is a mean over tasks of shares, which Wilson's interval is not made for."""
    if votes and votes.places():
        pooled = np.concatenate(votes.places()) < 2
        return {"pass@2 of test inputs": [*wilson(pooled.mean(), len(pooled)), len(pooled), "test inputs"]}
    name = metric_names(cfg).right
    return {name: [*wilson(metrics[name], metrics["n"]), metrics["n"], "puzzles"]} if metrics["n"] else {}


def table(results):
    """The rows (name, text) of what is printed of results.json."""
    rows, part = [], f"   (a part: {results['part']})" if results["part"] else ""
    for name, value in results["metrics"].items():
        note = part if name == "n" else ""
        if name in results["intervals"]:
            low, high, n, unit = results["intervals"][name]
            note = f"   95% interval {low:.4f} .. {high:.4f} of {n:,} {unit}{part}"
        rows.append((name, (f"{value:.4f}" if isinstance(value, float) else f"{value:,}") + note))
    curve = results["exact_acc_by_step"]
    steps = [s for s in (1 << i for i in range(20)) if s < len(curve)] + [len(curve)]
    rows += [("right by step", "  ".join(f"{s}: {curve[s - 1]:.4f}" for s in steps))] if curve else []
    for name, value in results["about"].items():
        shape = {float: ",.1f", int: ","}.get(type(value), "")
        rows.append((name, format(value, shape)))
    return rows


def compare(*paths):
    """Print whether the second results.json is better: one-sided z-test, and McNemar over the rows that both
    kept. Raises UserError."""
    found, cure = [], "--compare takes results.json of eval.py, two of one task"
    for path in paths:
        results = read_json(path, cure, dict)
        for name, (_, _, n, _) in results.get("intervals", {}).items():
            found.append((name, results["metrics"][name], n))
    if len(found) != 2 or found[0][0] != found[1][0]:
        raise UserError(f"{paths[0]} and {paths[1]} measure {[name for name, *_ in found]}; {cure}")
    (name, p, n), (_, p2, n2) = found
    pooled = (p * n + p2 * n2) / (n + n2)
    z = (p2 - p) / max(1e-12, math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / n2)))
    tail = 0.5 * math.erfc(z / math.sqrt(2))
    print(f"{name}: A {p:.4f} of {n:,}, B {p2:.4f} of {n2:,}: B - A = {p2 - p:+.4f}\n"
          f"two proportions: z = {z:.3f}, one-sided p = {tail:.4g} that B is no better")
    prefixes = ["part-" if Path(path).name.startswith("part-") else "" for path in paths]
    files = [Path(path).with_name(f"{prefix}right.npz") for path, prefix in zip(paths, prefixes)]
    a, b = (np.load(f) if f.exists() else {"row": None, "data": None} for f in files)
    if a["data"] is None or a["data"] != b["data"] or not np.array_equal(a["row"], b["row"]):
        print("McNemar: needs right.npz of the same rows of the same data beside both")
        return
    only_a, only_b = int((a["right"] > b["right"]).sum()), int((b["right"] > a["right"]).sum())
    n = only_a + only_b     # the tail of n throws of a fair coin, in whole numbers
    tail = sum(math.comb(n, k) for k in range(only_b, n + 1)) / 2 ** n
    print(f"McNemar: only A right {only_a}, only B right {only_b}; exact one-sided p = {tail:.4g}")


def result_line(preset, results, steps, step_flops, train_s, device):
    """The last line of a run: `RESULT preset=mini exact_acc=0.9980 ...`. train_pflop: of all its steps."""
    names = ("pass@1", "pass@2", "exact_acc", "cell_acc", "regression_loss", "mae", "within_tolerance", "n")
    shown = {name: results[name] for name in names if name in results}
    pflop = format(steps * step_flops / 1e15, ".4g")
    shown |= {"steps": steps, "train_pflop": pflop, "train_s": f"{train_s:.1f}", "device": device}
    return f"RESULT preset={preset} " + " ".join(
        f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())


def ended(folder):
    """{name: text} of the RESULT line of a run, its seed and folder. Raises UserError when it has none."""
    records = read_log(Path(folder) / "log.jsonl")
    lines = [r["line"] for r in records if r["event"] == "result"]
    if not lines:
        raise UserError(f"{folder} has no RESULT in its log.jsonl: it has not ended, or is no run")
    seed = next((r["settings"]["seed"] for r in records if r["event"] == "start"), "?")
    return {"run": Path(folder).name, "seed": seed, **dict(word.split("=") for word in lines[-1].split()[1:])}


def flags():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    return parser


def main(argv=None):
    found = [ended(folder) for folder in flags().parse_args(argv).runs]
    form = "{:<28} {:<4} {:<16} {:>6} {:>7} {:>7} {:>6}"
    print(form.format("run", "seed", "score", "", "steps", "pflop", "s"))
    scores = {}
    for run in found:
        name = next(name for name in ("pass@2", "exact_acc", "within_tolerance") if name in run)
        scores.setdefault((run["preset"], name), []).append(float(run[name]))
        print(form.format(run["run"], run["seed"], name, run[name], run["steps"], run["train_pflop"],
                          f"{float(run['train_s']):.0f}"))
    for (preset, name), values in scores.items():
        if len(values) > 1:
            print(f"{preset}: {name} {statistics.mean(values):.4f}, standard deviation "
                  f"{statistics.stdev(values):.4f}, {len(values)} runs")


if __name__ == "__main__":
    cli(main)
