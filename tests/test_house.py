"""Layout and style of the code: files, imports, density, comments, phrases, nothing of one machine."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOUR = ["model.py", "data.py", "train.py", "eval.py"]
TOP_LEVEL = {
    *FOUR,
    *"README.md REPORT.md LICENSE requirements.txt ruff.toml .gitignore .gitattributes".split(),
    *"speedrun.sh speedrun-inference.sh prepare tools tests assets .ci .github".split(),
}
# From the ground up: a module may import those of lower floors. The package prepare is on one floor.
FLOORS = [
    {"tools", "tools.common"},
    {"prepare"},
    {"model", "data", "tools.run_folder"},
    {"tools.hub", "tools.draw"},
    {"eval"},
    {"train"},
    {"tools.solve", "tools.bench", "tools.page"},
]
FILES = [p for folder in (".", "prepare", "tools") for p in sorted((ROOT / folder).glob("*.py"))]
LONG = {"train.py:flags"}  # FILE:FUNCTION of at most three functions that may have more than 60 lines
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
HOSTS = {
    *"127.0.0.1 localhost arxiv.org astral.sh docs.astral.sh github.com raw.githubusercontent.com".split(),
    *"huggingface.co pypi.org pytorch.org download.pytorch.org".split(),
}
ODD_PHRASES = [
    r"help=\"(of |likewise|to run on|stop (there|then))",
    r"\b(mend|lies|likewise|goes on|think on)\b",
    r"\bstands? (in|on|at|beside|there|for itself)\b",
]


def relative(path):
    return path.relative_to(ROOT).as_posix()


def name_of(path):
    """prepare/sudoku.py -> prepare.sudoku, model.py -> model, prepare/__init__.py -> prepare."""
    return ".".join(Path(relative(path)).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}
TREES = {relative(path): ast.parse(path.read_text(), filename=str(path)) for path in FILES}


def tracked_files():
    """Paths of the files that git tracks, or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for path in map(ROOT.joinpath, listing.splitlines()) if path.exists()]


def report(offenders):
    assert not offenders, f"{len(offenders)} offenders:\n" + "\n".join(offenders)


def test_the_top_level_is_what_the_readme_lists():
    found = {Path(relative(path)).parts[0] for path in tracked_files()}
    assert found == TOP_LEVEL, (
        f"unexpected: {found - TOP_LEVEL or 'none'}; missing: {TOP_LEVEL - found or 'none'}"
    )


# ---------------------------------------------------------------------------------------------
# Imports


def imports(module):
    """{module of ours: line} that a module imports, inside functions too."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = {}
    for node in ast.walk(TREES[relative(MODULES[module])]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            # `from prepare import sudoku` imports a module, `from prepare import KNOWN` does not
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            names = [base] + [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            found.setdefault(name, node.lineno)
    return {name: line for name, line in found.items() if name in MODULES and name != module}


def floor_of(module):
    name = "prepare" if module.startswith("prepare.") else module
    return next((i for i, floor in enumerate(FLOORS) if name in floor), None)


def test_every_module_has_a_floor():
    assert [module for module in MODULES if floor_of(module) is None] == []


def test_imports_go_down():
    """Only the modules of prepare may import each other."""
    offenders = []
    for source, path in MODULES.items():
        for target, line in imports(source).items():
            here, there = floor_of(source), floor_of(target)
            if there > here or (there == here and not target.startswith("prepare")):
                offenders.append(f"{relative(path)}:{line} (floor {here}) imports {target} (floor {there})")
    report(offenders)


def test_imports_have_no_cycle():
    try:
        TopologicalSorter({module: imports(module).keys() for module in MODULES}).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_importing_has_no_side_effect(tmp_path):
    """It prints nothing, and writes nothing into the current folder."""
    names = [name for name in MODULES if name != "prepare.__main__"]  # a command
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import " + ", ".join(names)
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# Density and length


def measure(name):
    """(lines, code lines, comment lines, syntax nodes) of a file."""
    text = (ROOT / name).read_text()
    lines = text.splitlines()
    comments = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            comments.add(token.start[0])
    docstrings = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    written = {i for i, line in enumerate(lines, 1) if line.strip()}
    nodes = sum(1 for _ in ast.walk(TREES[name]))
    return len(lines), len(written - comments - docstrings), len(comments), nodes


@pytest.mark.parametrize("name", FOUR)
def test_one_idea_per_line(name):
    """nanochat has 7 to 10 syntax nodes per line of code, nanoGPT 8 to 11."""
    _, code, _, nodes = measure(name)
    assert nodes <= 11 * code, f"{name}: {nodes} nodes on {code} lines of code, {nodes / code:.2f} per line"


def test_comments_of_the_four():
    """Lines that are a comment: nanochat and nanoGPT have 11 to 18% of them."""
    measured = {name: measure(name) for name in FOUR}
    total, comments = sum(m[0] for m in measured.values()), sum(m[2] for m in measured.values())
    shares = [f"{name} {m[2]} of {m[0]}" for name, m in measured.items()]
    assert comments >= 0.08 * total, f"{comments / total:.1%} of {total} lines: {', '.join(shares)}"


def test_functions_have_at_most_60_lines():
    long = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long[f"{name}:{node.name}"] = node.end_lineno - node.lineno + 1
    report([f"{name}: {n} lines" for name, n in long.items() if name not in LONG])
    assert len(LONG) <= 3 and LONG <= set(long), f"no longer exceptions: {LONG - set(long)}"


def depth(node):
    """How many comprehensions are nested in a node, itself included."""
    inner = max(map(depth, ast.iter_child_nodes(node)), default=0)
    return inner + isinstance(node, COMPREHENSIONS)


def test_comprehensions_are_not_nested():
    """Never in the four, and at most one in another elsewhere."""
    offenders = []
    for name, tree in TREES.items():
        limit = 1 if name in FOUR else 2
        for node in ast.walk(tree):
            if isinstance(node, COMPREHENSIONS) and depth(node) > limit:
                offenders.append(f"{name}:{node.lineno}: {depth(node)} levels, at most {limit}")
    report(offenders)


# ---------------------------------------------------------------------------------------------
# Text


def test_phrases_are_plain_english():
    offenders = []
    for path in tracked_files():
        if path.suffix in (".py", ".sh", ".md") and "tests" not in path.parts:
            for i, line in enumerate(path.read_text().splitlines(), 1):
                found = [match[0] for odd in ODD_PHRASES if (match := re.search(odd, line))]
                offenders += [f"{relative(path)}:{i}: {phrase!r} in {line.strip()[:80]}" for phrase in found]
    report(offenders)


def test_nothing_of_one_machine_is_committed():
    """No path of its folders, no host of a private package index."""
    offenders = []
    for path in tracked_files():
        if path.suffix not in (".npz", ".png", ".gif"):
            text = path.read_text(errors="replace")
            folders = re.findall(r"(?<![\w.$])/(?:root|work|home|opt|farm)/[a-z]\w*", text)
            hosts = set(re.findall(r"https?://([\w.-]+)", text)) - HOSTS
            offenders += [f"{relative(path)} contains {found}" for found in [*folders, *sorted(hosts)]]
    report(offenders)
