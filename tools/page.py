"""Write a web page that solves puzzles with the model of a run.

    python -m tools.page RUN page.html

The page is a single file: weights in float16, 20 test puzzles and the forward
pass in JavaScript. It needs no server and no network.
"""

import base64
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from eval import load_model, trajectory
from tools.common import Parser, cli, git_hash, require, start_world, write_file

TEMPLATE = Path(__file__).with_name("page.html")
N_PUZZLES = 20


def check_supported(cfg, task):
    """Raise UserError for a model that the JavaScript of the page cannot compute or show."""
    require(task in ("sudoku", "maze"), f"a page shows Sudokus and mazes, but the task is {task}")
    require(not cfg.rope, "a page cannot compute rope; train with --pos-encodings learned or none")
    known = cfg.score_mod in ("none", "grid")
    require(known, f"a page cannot compute the score_mod {cfg.score_mod}; train with grid or none")


def encode_weights(model):
    """{name: float16 numbers in base64} of all weights and buffers."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "puzzle_emb":
            tensor = tensor[0]  # the blank puzzle
        content = tensor.numpy().astype("<f2").tobytes()
        weights[name] = base64.b64encode(content).decode()
    return weights


def main(argv=None):
    parser = Parser(__doc__, "%(prog)s [flags] RUN PAGE")
    add = parser.add_argument
    add("checkpoint", metavar="RUN", help="run folder (its newest checkpoint) or checkpoint file")
    add("page", metavar="PAGE", help="HTML file to write")
    add("--data", nargs="+", metavar="DIR", help="dataset folders (default: those of the run)")
    # the other flags that load_model reads
    parser.set_defaults(hf=None, canvases=None, ema=True, dtype="float32")
    args = parser.parse_args(argv)
    loaded = load_model(args, start_world("cpu"))
    split = loaded.split
    check_supported(loaded.model.cfg, split.task)

    model = loaded.model.half().float()  # with the weights of the page
    n = min(N_PUZZLES, len(split))
    questions = split.gather(np.arange(n))[0]
    _, q_halt = trajectory(model, questions, np.zeros(n, np.int32), steps=1)
    data = {
        "task": split.task,
        "made": f"python -m tools.page {args.checkpoint} {args.page} (commit {git_hash()})",
        "config": asdict(model.cfg),
        "puzzles": questions.tolist(),
        # after one step, so that the page notices that its JavaScript and model.py differ
        "q_halt": q_halt[0].tolist(),
        "weights": encode_weights(model),
    }
    # a name with "</script>" in it must not end the script that holds the data
    text = json.dumps(data).replace("<", "\\u003c")
    html = TEMPLATE.read_text(encoding="utf-8").replace("PAGE_DATA", text)
    write_file(args.page, html.encode())
    print(f"wrote {args.page} ({len(html) // 1000} KB): open it in a browser")


if __name__ == "__main__":
    cli(main)
