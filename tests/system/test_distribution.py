"""The wheel: what is in it, that its commands work where there is no clone, and which versions of libraries it takes."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT, TINY, results

RUN = (*TINY, "report=false")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves files beside what it builds from."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(
        ROOT / "qat", source / "qat", symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "conf", source / "conf")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools.build_meta import build_wheel; build_wheel('out')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (path,) = (source / "out").glob("*.whl")
    return path


def test_what_is_in_the_wheel(wheel):
    assert wheel.name.startswith("vit_qat-")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entries,) = [
            archive.read(name).decode()
            for name in archive.namelist()
            if name.endswith("entry_points.txt")
        ]
    package = {
        f"qat/{path.relative_to(ROOT / 'qat')}"
        for pattern in ("**/*.py", "report/templates/*", "kernels/*.cpp")
        for path in (ROOT / "qat").glob(pattern)
    }
    configs = {f"qat/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert names == package | configs | {"qat/py.typed"}
    assert entries.split() == ["[console_scripts]", "qat", "=", "qat.cli.commands:main"]


@pytest.fixture(scope="module")
def qat(wheel, tmp_path_factory):
    """Runs the installed `qat` in a folder; the environment has nothing of the clone. Its libraries are those of this one."""
    env = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (site,) = env.glob("lib/python3*/site-packages")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(env / "bin" / "python"),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
    ]
    subprocess.run([*install, str(wheel)], check=True)
    (site / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }

    def run(*arguments, cwd, program="qat"):
        command = [str(env / "bin" / program), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env=kept, capture_output=True, text=True, timeout=500, check=False
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        return said

    return run


@pytest.mark.long
def test_trains_and_evaluates_from_an_empty_folder(qat, tmp_path):
    where = qat(
        "-c",
        "import qat.tasks.conf as r; print(r.__file__, r.CONF)",
        cwd=tmp_path,
        program="python",
    ).split()
    assert all("site-packages/qat/" in path for path in where)
    assert not any(Path(path).is_relative_to(ROOT) for path in where)
    trained = qat("train", *RUN, "run_dir=run", cwd=tmp_path)
    evaluated = qat("eval", "ckpt=run/checkpoints/best.ckpt", "run_dir=eval", cwd=tmp_path)
    top1 = results(tmp_path / "run")["top1"]
    assert results(tmp_path / "eval")["top1"] == top1
    assert f"test top-1 {top1:.2f} %" in trained
    assert f"top-1  {top1:.2f} %" in evaluated
    assert "Warning" not in trained + evaluated


@pytest.mark.long
def test_two_processes_find_a_module_beside_the_run(qat, tmp_path):
    (tmp_path / "beside_the_run.py").write_text(
        "from qat.losses import CrossEntropy\n\n\nclass Mine(CrossEntropy):\n    pass\n"
    )
    several = (
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "loss.terms.ce._target_=beside_the_run.Mine",
    )
    out = qat("train", *RUN, *several, "run_dir=run", cwd=tmp_path)
    assert "CPUAccelerator x 2" in out
    alone = ("data.batch_size=128", "loss.terms.ce._target_=beside_the_run.Mine")
    qat("train", *RUN, *alone, "run_dir=alone", cwd=tmp_path)
    state = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("run", "alone")
    ]
    assert state[0]["global_step"] == state[1]["global_step"] == 2


def pinned(lines, signs):
    """Versions by name of the requirements that have a bound with one of these signs."""
    found = [
        (Requirement(line).name.lower().replace("_", "-"), spec)
        for line in lines
        for spec in Requirement(line).specifier
    ]
    return {name: Version(spec.version) for name, spec in found if spec.operator in signs}


def test_the_oldest_versions_are_the_bounds_of_pyproject():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    required, extras = (
        content["project"]["dependencies"],
        content["project"]["optional-dependencies"].values(),
    )
    assert len(pinned(required, (">=",))) == len(required), (
        "a library that is needed has an oldest version"
    )
    oldest = [
        line
        for line in (ROOT / "constraints-oldest.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    allowed = [
        *content["build-system"]["requires"],
        *required,
        *(line for lines in extras for line in lines),
    ]
    assert pinned(oldest, ("==",)) == pinned(allowed, (">=", "=="))


# Installed along with these requirements, which exchange objects with them.
INDIRECT = {
    "lightning-utilities": "lightning",
    "ml-dtypes": "onnx",
    "onnx-ir": "onnxscript",
    "triton": "torch",
}


def test_every_imported_library_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = list(project["dependencies"])
    for name in extras.keys() - {"dev", "docs"}:
        lines += extras[name]
    required = {Requirement(line).name.lower().replace("_", "-") for line in lines}
    imported = set()
    for path in (ROOT / "qat").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    libraries = imported - sys.stdlib_module_names - {"qat"}
    assert "torch" in libraries
    names = packages_distributions()
    for library in libraries:
        distributions = {name.lower().replace("_", "-") for name in names.get(library, [library])}
        distributions |= {INDIRECT.get(name, name) for name in distributions}
        assert distributions & required, library
