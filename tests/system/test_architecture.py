"""Rules of the package: import directions, sizes, names."""

import ast
import collections
import functools
import graphlib
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import grimp
import pytest

import qat
from tests.commands import run_python
from tests.conftest import ROOT

PACKAGE = ROOT / "qat"
FILES = sorted(PACKAGE.rglob("*.py"))
# Where a library may be imported, the closest to the root that may.
LIBRARIES = {
    "hydra": ("cli", "tasks"),
    "omegaconf": ("cli", "tasks"),
    "lightning": ("lit", "callbacks", "data", "launch", "cli", "tasks"),
    "timm": ("nn", "data", "lit", "model", "interop.py", "cli", "tasks"),
    "sklearn": ("data",),
    "transformers": ("transformers.py",),
    "matplotlib": ("analysis", "report"),
    "pyarrow": ("data",),
    "triton": ("kernels",),
}


def place(path):
    return path.relative_to(PACKAGE).parts[0]


def nodes(path):
    """The syntax of a file."""
    return ast.walk(ast.parse(path.read_text()))


def imported(path):
    """Top-level names of every import of a file, those inside functions too."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_libraries_stay_in_their_place():
    places = {library: set() for library in LIBRARIES}
    for path in FILES:
        for library in LIBRARIES.keys() & set(imported(path)):
            places[library].add(place(path))
    assert all(places.values()), "nobody imports it: the rule is out of date"
    assert {name: found - {*LIBRARIES[name]} for name, found in places.items()} == dict.fromkeys(
        LIBRARIES, set()
    )


def test_layers():
    done = subprocess.run(
        [f"{Path(sys.executable).parent}/lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_no_folder_is_a_drawer():
    """Nobody reads a list of more than twenty files."""
    sizes = collections.Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in sizes.items() if count > 20} == {}


def import_graph():
    """Every import of a module by another one, those inside functions too."""
    graph = grimp.build_graph("qat", cache_dir=None)
    modules = {name for name in graph.modules if not graph.find_children(name)}
    return {name: graph.find_modules_directly_imported_by(name) & modules for name in graph.modules}


def test_no_module_imports_itself_through_others():
    graph = import_graph()
    assert sum(map(len, graph.values())) > 500
    graphlib.TopologicalSorter(graph).prepare()  # an error that names the circle


def test_a_class_name_means_one_thing():
    found = collections.Counter(
        node.name for path in FILES for node in nodes(path) if isinstance(node, ast.ClassDef)
    )
    assert {
        name: count for name, count in found.items() if count > 1 and not name.startswith("_")
    } == {}


def test_every_public_function_is_exported_under_its_name():
    for name in qat.__all__:
        assert getattr(qat, name) is not None
        assert name in dir(qat)
    assert all(callable(getattr(qat.functional, name)) for name in qat.functional.__all__)
    with pytest.raises(AttributeError, match="module 'qat' has no attribute 'nope'"):
        _ = qat.nope


HEAVY = {
    "torch",
    "timm",
    "lightning",
    "torchvision",
    "torchmetrics",
    "matplotlib",
    "pyarrow",
    "sklearn",
    "wandb",
}
HELP = "sys.argv = ['qat', 'train', '--help']; from qat.cli import commands; commands.main()"


@pytest.mark.parametrize(
    "statement",
    [
        "import qat",
        "from qat.cli import commands",
        pytest.param(HELP, marks=pytest.mark.long, id="help"),
    ],
)
def test_heavy_libraries_are_loaded_on_first_use(statement):
    at_exit = "import atexit, sys; atexit.register(lambda: print(*sys.modules))"
    done = run_python("-c", f"{at_exit}; {statement}")
    assert done.returncode == 0
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


@pytest.mark.long
def test_the_core_works_without_hydra_and_lightning(tmp_path):
    page = (ROOT / "docs" / "architecture.md").read_text()
    example = page.partition("without Hydra or Lightning:")[2].partition("```python\n")[2]
    example = example.partition("```")[0].replace('_224")', '_224", depth=1)')
    assert "qat.convert" in example
    code = f"import sys, torch\nbatches = [torch.randn(2, 3, 224, 224)]\n{example}\n"
    code += "sys.exit(any(m in sys.modules for m in ('hydra', 'omegaconf', 'lightning')))"
    assert run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT)).returncode == 0


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"\.cuda\(", "device follows the input"),
        (r"""\.to\(["']cuda""", "device follows the input"),
        (r"(?<!\.)\bprint\(", "logging only"),
        (r"weights_only\s*=\s*False", "checkpoints run no code"),
        (r"pickle\.load", "checkpoints run no code"),
    ],
)
def test_forbidden_phrases(pattern, reason):
    scripts = [*FILES, *ROOT.glob("*.py")]
    found = [
        str(path.relative_to(ROOT)) for path in scripts if re.search(pattern, path.read_text())
    ]
    assert found == [], reason


# Tokens of code by folder, at most. A feature enters with an exit of the same size, or with a commit that says why it rises.
BUDGETS = {
    "evidence": 40300,
    "qat": 200800,
    "qat/analysis": 12600,
    "qat/callbacks": 7700,
    "qat/cli": 5350,
    "qat/data": 11650,
    "qat/export": 15700,
    "qat/functional": 12450,
    "qat/kernels": 20500,
    "qat/launch": 3800,
    "qat/lit": 8100,
    "qat/losses": 1970,
    "qat/model": 26600,
    "qat/nn": 14950,
    "qat/ptq": 9700,
    "qat/quantizers": 7750,
    "qat/report": 5400,
    "qat/tasks": 27100,
    "qat/utils": 5600,
    "tests": 262500,
}
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def tokens_of(text):
    """Tokens of a text; an f-string is one of them, although Python 3.12 and newer split it."""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        depth -= kind == "FSTRING_END"
        if not depth and kind != "FSTRING_END":
            yield token
        depth += kind == "FSTRING_START"


@functools.cache
def tokens(path):
    """Tokens of a file without comments, docstrings and layout."""
    text = path.read_text()
    first = [
        node.body[0]
        for node in nodes(path)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
    ]
    docs = {
        (one.lineno, one.col_offset)
        for one in first
        if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
    }
    return sum(
        token.type not in LAYOUT and not (token.type == tokenize.STRING and token.start in docs)
        for token in tokens_of(text)
    )


def test_a_folder_keeps_its_budget():
    sizes = {name: sum(map(tokens, (ROOT / name).rglob("*.py"))) for name in BUDGETS}
    assert {name: size for name, size in sizes.items() if size > BUDGETS[name]} == {}


def test_every_folder_has_a_budget():
    folders = {f"qat/{place(path)}" for path in FILES if len(path.relative_to(PACKAGE).parts) > 1}
    assert folders | {"qat", "tests", "evidence"} == set(BUDGETS)


def test_no_file_is_longer_than_500_lines():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: n for name, n in lines.items() if n > 500} == {}


# Local names that say nothing of what they hold.
VAGUE_TEXT = """found one made done place places known held shown given kept said what theirs now
rest put seen taken wanted there here these others again who where how told asked thing"""
VAGUE = set(re.findall(r"\w+", VAGUE_TEXT))
# Tokens a code line; tuples assigned to tuples, and conditional expressions, in 10,000 tokens;
# vague names among all local ones, in percent.
TOTAL_DENSITY = {"line": 9.0, "packed": 1, "conditional": 30, "vague": 0.3}
FOLDER_DENSITY = {"line": 10.2, "packed": 4, "conditional": 55, "vague": 1}


@functools.cache
def code_lines(path):
    """Lines of a file with tokens of code."""
    generated = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    rows = set()
    for token in generated:
        is_text = token.type == tokenize.STRING and token.line.lstrip().startswith('"""')
        if token.type not in LAYOUT and not is_text:
            rows.update(range(token.start[0], token.end[0] + 1))
    return len(rows)


def density(paths):
    """How packed and how vague code is, by the names of the limits."""
    counts = collections.Counter()
    for path in paths:
        counts["tokens"] += tokens(path)
        counts["lines"] += code_lines(path)
        for node in nodes(path):
            counts["conditional"] += isinstance(node, ast.IfExp)
            is_tuple = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
            counts["packed"] += is_tuple and isinstance(node.value, ast.Tuple)
            if isinstance(node, ast.FunctionDef):
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                counts["names"] += len(names)
                counts["vague"] += len(names & VAGUE)
    per_10k = 10_000 / counts["tokens"]
    return {
        "line": counts["tokens"] / counts["lines"],
        "packed": counts["packed"] * per_10k,
        "conditional": counts["conditional"] * per_10k,
        "vague": 100 * counts["vague"] / counts["names"],
    }


@pytest.mark.parametrize("folder", ["qat", *sorted(name for name in BUDGETS if "/" in name)])
def test_code_is_not_packed(folder):
    limits = TOTAL_DENSITY if folder == "qat" else FOLDER_DENSITY
    measured = density(sorted((ROOT / folder).rglob("*.py")))
    assert {name: value for name, value in measured.items() if value > limits[name]} == {}


def test_docstrings_open_with_a_noun_or_a_verb():
    openings = []
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if re.match(r"What\b|Whether\b", text):
                    openings.append(f"{path.name}: {text.splitlines()[0]}")
    assert openings == []


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("*.py")))
def test_root_scripts_are_thin(script):
    assert len((ROOT / script).read_text().splitlines()) <= 25
    assert set(imported(ROOT / script)) <= {"hydra", "omegaconf", "qat", "__future__"}
