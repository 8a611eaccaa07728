"""What the package promises of itself: import directions, sizes, names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qat
from tests.conftest import ROOT

PACKAGE = ROOT / "qat"
FILES = sorted(PACKAGE.rglob("*.py"))
# Where a library may be imported, the closest to the root that may.
LIBRARIES = {
    "hydra": ("tasks",),
    "omegaconf": ("tasks",),
    "lightning": ("lit", "callbacks", "data", "tasks"),
    "timm": ("nn", "data", "lit", "model", "interop", "tasks"),
    "sklearn": ("data",),
    "matplotlib": ("analysis", "report"),
    "pyarrow": ("data",),
    "triton": ("kernels",),
}


def place(path):
    return path.relative_to(PACKAGE).parts[0]


def imported(path):
    """Top-level names of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_stay_in_their_place(library):
    users = {str(path.relative_to(PACKAGE)) for path in FILES if library in imported(path)}
    assert users, "nobody imports it: the rule is out of date"
    assert {user for user in users if Path(user).parts[0] not in LIBRARIES[library]} == set()


def test_layers():
    done = subprocess.run(
        [f"{Path(sys.executable).parent}/lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_every_public_function_is_exported_under_its_name():
    promised = [
        "QuantRecipe",
        "Site",
        "UsageError",
        "convert",
        "functional",
        "initialize_scales",
        "iter_quantizers",
        "load",
        "recipe",
        "save",
    ]
    assert set(promised) <= set(qat.__all__)
    for name in qat.__all__:
        assert getattr(qat, name) is not None
        assert name in dir(qat)
    functions = [
        "statsq",
        "statsq_scale",
        "statsq_codes",
        "lsq",
        "lsq_init_scale",
        "fold_qk",
        "distillation_loss",
        "affine_scale",
        "fake_quantize_affine",
    ]
    assert set(functions) <= set(qat.functional.__all__)
    assert all(callable(getattr(qat.functional, name)) for name in qat.functional.__all__)
    with pytest.raises(AttributeError, match="module 'qat' has no attribute 'nope'"):
        _ = qat.nope


@pytest.mark.parametrize("statement", ["import qat", "from qat.tasks import cli"])
def test_torch_is_loaded_on_first_use(statement):
    code = f"import sys; {statement}; sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'lightning')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_help_is_answered_without_the_heavy_libraries():
    done = subprocess.run([sys.executable, "-X", "importtime", "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python train.py" in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "hydra" in loaded
    assert loaded & {"torch", "timm", "lightning", "torchvision", "torchmetrics", "matplotlib", "pyarrow", "sklearn", "wandb"} == set()


@pytest.mark.long
def test_the_core_works_without_hydra_and_lightning():
    names = ["qat.convert", "qat.save", "qat.load", "qat.recipe", "qat.initialize_scales", "qat.functional.lsq"]
    code = f"import sys, qat; {'; '.join(names)}; sys.exit(any(m in sys.modules for m in ('hydra', 'omegaconf', 'lightning')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


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
    found = [str(path.relative_to(ROOT)) for path in scripts if re.search(pattern, path.read_text())]
    assert found == [], reason


def test_no_file_is_longer_than_400_lines():
    long = {str(path.relative_to(ROOT)): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}


def test_no_function_is_longer_than_60_lines():
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.name}:{node.lineno} {node.name}")
    assert long == []


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("*.py")))
def test_root_scripts_are_thin(script):
    assert len((ROOT / script).read_text().splitlines()) <= 25
    assert set(imported(ROOT / script)) <= {"hydra", "omegaconf", "qat", "__future__"}
