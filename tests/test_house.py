"""The layout of the code: floors of imports, sizes, silent imports, comments, nothing of one machine."""
import ast
import re
import subprocess
import sys
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [      # from the ground up; "prepare" is the table of known datasets, "builders" are its scripts
    {"common"}, {"prepare", "examples", "rundir", "model", "optim"}, {"data"}, {"builders"},
    {"draw", "hub", "vote", "results", "state"}, {"eval"}, {"sanity"}, {"train"},
    {"solve", "bench", "baselines"}, {"gpu_check"}]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("prepare/*.py")])
SHELL = [ROOT / "speedrun.sh", ROOT / "speedrun-inference.sh", ROOT / ".ci" / "run"]
LONG = {"train.py:run_preset"}    # FILE:FUNCTION of at most two functions that may have more than 40 lines
HOSTS = {"127.0.0.1", "localhost", "arxiv.org", "astral.sh", "docs.astral.sh", "github.com",
         "raw.githubusercontent.com", "huggingface.co", "pypi.org", "pytorch.org", "download.pytorch.org"}


def name_of(path):
    """prepare/sudoku.py -> prepare.sudoku, model.py -> model, prepare/__init__.py -> prepare."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def tree(path):
    return ast.parse(path.read_text(), filename=str(path))


MODULES = {name_of(path): path for path in FILES}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def imports(path):
    """{module of ours: line} that a file imports, inside of functions too."""
    found = {}
    for node in ast.walk(tree(path)):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            package = "prepare" if node.level else ""   # a relative import: there is but one package
            base = ".".join(filter(None, [package, node.module]))
            # `from prepare import sudoku` imports a module, `from prepare import ensure` does not
            names = [base, *(f"{base}.{name}" for name in names)]
        for name in names:
            found.setdefault(name, node.lineno)
    return {name: line for name, line in found.items() if name in MODULES}


def report(offenders):
    assert not offenders, f"{len(offenders)} offenders:\n" + "\n".join(offenders)


def floor_of(module):
    name = "builders" if module.startswith("prepare.") else module
    return next((i for i, floor in enumerate(FLOORS) if name in floor), None)


def test_every_module_has_a_floor():
    assert not [module for module in MODULES if floor_of(module) is None]
    alone = {name for name in MODULES if not name.startswith("prepare.")}
    assert set().union(*FLOORS) - {"builders"} == alone


def test_imports_go_down():
    """To a lower floor; sideways only from one builder to another, or from `python -m prepare` to its
    package."""
    offenders = []
    for source, path in MODULES.items():
        for target, line in imports(path).items():
            here, there = floor_of(source), floor_of(target)
            if there > here or there == here and not source.startswith("prepare."):
                where = f"{path.relative_to(ROOT)}:{line}"
                offenders.append(f"{where} (floor {here}) imports {target} (floor {there})")
    report(offenders)


def test_imports_have_no_circle():
    graph = {source: imports(path).keys() - {source} for source, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_files_have_at_most_600_lines():
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    report([f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > 600])


def test_lines_have_at_most_110_characters():
    offenders = []
    for path in [*FILES, *SHELL]:
        long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
        if long:
            offenders.append(f"{path.relative_to(ROOT)}: {len(long)} lines: {long}")
    report(offenders)


def test_functions_have_at_most_40_lines():
    long = {}
    for path in FILES:
        for node in ast.walk(tree(path)):
            n = node.end_lineno - node.lineno + 1 if isinstance(node, ast.FunctionDef) else 0
            if n > 40:
                long[f"{path.relative_to(ROOT)}:{node.name}"] = n
    report([f"{name}: {n} lines" for name, n in long.items() if name not in LONG])
    assert len(LONG) <= 2 and LONG <= set(long), "these are short now: " + " ".join(LONG - set(long))


def comprehension_depth(node):
    """How many comprehensions stand inside one another at most, in a node of the tree."""
    inner = max(map(comprehension_depth, ast.iter_child_nodes(node)), default=0)
    return inner + isinstance(node, COMPREHENSIONS)


def test_comprehensions_nest_two_deep_at_most():
    offenders = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, COMPREHENSIONS) and comprehension_depth(node) > 2:
                depth = comprehension_depth(node)
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}: {depth} levels")
    report(offenders)


def test_importing_has_no_side_effect(tmp_path):
    """It prints nothing and writes nothing where one stands."""
    names = [name for name in MODULES if name != "prepare.__main__"]    # that one is a command
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import " + ", ".join(names)
    r = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (r.returncode, r.stdout, r.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_comments_say_why_often_enough():
    """Lines with a comment, of all lines outside of tests: the models of this field have 6 to 18%."""
    shares = {}
    for path in FILES:
        with open(path, "rb") as f:
            tokens = list(tokenize.tokenize(f.readline))
        lines = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
        shares[str(path.relative_to(ROOT))] = len(lines), len(path.read_text().splitlines())
    commented, lines = map(sum, zip(*shares.values()))
    assert commented >= 0.05 * lines, f"{commented} of {lines} lines, {commented / lines:.1%}: {shares}"


def test_nothing_of_one_machine_is_committed():
    """No path of its folders, no host of a private package index."""
    r = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                       capture_output=True, text=True)
    if r.returncode:
        pytest.skip("not a git checkout")
    offenders = []
    for path in map(ROOT.joinpath, r.stdout.splitlines()):
        if not path.exists() or path.suffix in (".npz", ".png", ".gif"):
            continue
        text = path.read_text(errors="replace")
        offenders += [f"{path.relative_to(ROOT)} names {found}" for found in
                      re.findall(r"(?<![\w.$])/(?:root|work|home|opt|farm)/[a-z]\w*", text)]
        offenders += [f"{path.relative_to(ROOT)} names the host {host}" for host in
                      re.findall(r"\w+://([\w.-]+)", text) if host not in HOSTS]
    report(offenders)
