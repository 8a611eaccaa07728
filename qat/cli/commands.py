"""The commands as they are typed: `qat train ...` where the package is installed, `python train.py ...` in a clone."""

from __future__ import annotations

from qat.launch import startup  # noqa: F401  (first: Ctrl-C)

# isort: split
import importlib.metadata
import os
import sys

import hydra
from omegaconf import DictConfig

import qat
from qat.cli import entry
from qat.cli.repeat import CONF, TYPED

# The task in `qat.tasks` of each command, and what the command is for.
TASKS = {
    "train": ("train", "train, quantization-aware or in float"),
    "eval": ("evaluate", "accuracy of a checkpoint, or its predictions"),
    "ptq": ("ptq", "quantize a float net without training"),
    "analyze": ("analyze", "what a checkpoint is like"),
    "export": ("export", "a file to deploy"),
}
VERSION = "version"
DISTRIBUTION, NAMESAKE = "vit-qat", "qat"


def run(name: str, *, typed: str | None = None) -> int:
    """Do what the command line says.

    Args:
        name: of the command, a key of `TASKS`.
        typed: how a person calls it; None = as a script of a clone.

    Returns:
        The exit code.
    """

    def task(cfg: DictConfig) -> float | None:
        return entry.run(TASKS[name][0], cfg)

    os.environ[TYPED] = typed or f"python {name}.py"
    if (warning := namesake()) is not None:
        sys.stderr.write(f"{warning}\n")
    task.__module__ = name  # Hydra calls the job so
    return entry.command(hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task))


def main() -> int:
    """The console script `qat`.

    Returns:
        The exit code.
    """
    given = sys.argv[1:]
    sys.path.append(os.getcwd())  # modules beside the run, as `python -m` finds them
    if given[:1] == ["-sc"]:
        return _completion(given)
    name = given[0] if given else "--help"
    if name in TASKS:
        del sys.argv[1]
        return run(name, typed=f"qat {name}")
    if name in {"--help", "-h"}:
        sys.stdout.write(usage())
    elif name in {VERSION, "--version"}:
        sys.stdout.write(versions())
    else:
        sys.stderr.write(f"error: qat {name}: must be one of {', '.join([*TASKS, VERSION])}\n")
        return 1
    return 0


def usage() -> str:
    """What `qat --help` says."""
    rows = [*((name, said) for name, (_, said) in TASKS.items()), (VERSION, "versions of what is installed")]
    lines = [f"  qat {name:<9}{said}" for name, said in rows]
    return "\n".join(["qat COMMAND [group=choice ...] [key=value ...]", *lines, "qat COMMAND --help lists groups and settings.", ""])


def versions() -> str:
    """One line: this distribution, and the libraries that results depend on."""
    found = [f"{DISTRIBUTION} {qat.__version__}", *(f"{one} {importlib.metadata.version(one)}" for one in ("torch", "timm", "lightning"))]
    return ", ".join(found) + "\n"


def namesake() -> str | None:
    """A line about another project's package `qat` in the folder of ours; None where there is none."""
    # What lists its files is installed; a clone of ours that was once installed under that name left a list of sources, no more.
    for other in importlib.metadata.distributions(name=NAMESAKE):
        if any(line.startswith("qat/") for line in (other.read_text("RECORD") or "").splitlines()):
            both = f"pip uninstall {NAMESAKE} {DISTRIBUTION} && pip install {DISTRIBUTION}"
            where = f"the same folder 'qat' as {DISTRIBUTION}"
            return f"warning: another project, {NAMESAKE} {other.version}, is installed into {where}; {both}"
    return None


def _completion(given: list[str]) -> int:
    """Answer the shell: Hydra's own plugin reads a line of one program, without the command's name in it."""
    program, _, rest = os.environ.get("COMP_LINE", "").partition(" ")
    name, blank, typed = rest.lstrip().partition(" ")
    if not given[1:2] or not given[1].startswith("query="):
        return run("train", typed="qat train")
    if name in TASKS and blank:
        os.environ["COMP_LINE"] = f"{program} {typed}"
        return run(name, typed=f"qat {name}")
    sys.stdout.write(" ".join(one for one in (*TASKS, VERSION) if one.startswith(name)) + "\n")
    return 0
