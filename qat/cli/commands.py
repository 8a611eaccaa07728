"""The commands `qat train ...`, or `python train.py ...` in a clone.

Hydra composes the config and calls the job of each command. Nothing heavy is imported here, so
that `--help` is fast.
"""

from __future__ import annotations

from qat.launch import startup  # noqa: F401  (first, to handle Ctrl-C during imports)

# isort: split
import importlib.metadata
import inspect
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import qat
from qat.cli import catalog, sweep
from qat.cli.arguments import to_hydra
from qat.cli.corrections import parse_arguments, suggest_correction
from qat.cli.job import FULL_ERROR, run_task
from qat.cli.mistakes import error_line
from qat.tasks import settings
from qat.tasks.conf import CONF, command_words
from qat.utils.text import printable

log = logging.getLogger(__name__)
# Hide a message about the font cache that matplotlib builds on a new machine.
logging.getLogger("matplotlib").setLevel(logging.WARNING)

COMMANDS = {
    "train": "train, quantization-aware or in float",
    "eval": "accuracy of a model, or its predictions",
    "ptq": "quantize a float model without training",
    "analyze": "analyse a model",
    "export": "a file to deploy",
    "models": "the choices of model=",
    "recipes": "the choices of quant= and ptq=",
    "version": "versions of qat, torch, timm and lightning",
}


def main() -> int:
    """The console script `qat`.

    Returns:
        The exit code.
    """
    sys.path.append(os.getcwd())  # so that modules of the user are found, as with `python -m`
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in settings.COMMANDS:
        del sys.argv[1]
        return run(name)
    if name in {"--help", "-h"}:
        sys.stdout.write("qat COMMAND [group=choice ...] [key=value ...]\n")
        for command, description in COMMANDS.items():
            sys.stdout.write(f"  qat {command:<9}{description}\n")
        sys.stdout.write("qat COMMAND --help lists groups and settings.\n")
    elif name in {"models", "recipes"}:
        lines = catalog.model_lines() if name == "models" else catalog.recipe_lines()
        sys.stdout.write("\n".join(lines) + "\n")
    elif name in {"version", "--version"}:
        versions = [f"vit-qat {qat.__version__}"]
        for library in ("torch", "timm", "lightning"):
            versions.append(f"{library} {importlib.metadata.version(library)}")
        sys.stdout.write(", ".join(versions) + "\n")
    else:
        sys.stderr.write(f"error: qat {name}: must be one of {', '.join(COMMANDS)}\n")
        return 1
    return 0


def run(name: str) -> int:
    """Run a command with the arguments of the command line.

    Args:
        name: a key of `settings.COMMANDS`.

    Returns:
        The exit code: 1 after a printed error or a failed job of a sweep, else 0.

    Raises:
        Exception: any other error.
    """
    with_traceback = os.environ.get(FULL_ERROR) == "1"
    has_begun = False

    def job(cfg: DictConfig) -> float | None:
        nonlocal with_traceback, has_begun
        has_begun = True
        with_traceback = with_traceback or bool(HydraConfig.get().runtime.choices.get("debug"))
        return run_task(cfg, with_traceback=with_traceback, command=command)

    job.__module__ = name  # Hydra's name for the job
    os.environ[FULL_ERROR] = "1"  # lets Hydra raise errors instead of printing them
    arguments = sys.argv[1:]
    try:
        parsed = parse_arguments(arguments, name)
        # Put settings last, so that more can be added to the end of the command.
        if parsed.info is None:  # the value of --info may be left out
            options = [word for word in arguments if word not in parsed.overrides]
            arguments = options + parsed.overrides
        command = [*_program(name), *arguments]
        sys.argv[1:] = to_hydra(arguments)
        try:
            hydra.main(config_path=str(CONF), config_name=name, **_hydra_arguments())(job)()
        finally:
            sweep.summarize()
    except Exception as error:
        message = None if has_begun else suggest_correction(arguments, name)
        message = message or error_line(error)
        if message is None and not has_begun:
            message = " ".join(str(error).split())
        if message is None or with_traceback:
            raise
        sys.stderr.write(f"error: {message}\n")
        return 1
    return 1 if sweep.failures else 0


def _hydra_arguments() -> dict[str, Any]:
    """Arguments of `hydra.main`: Hydra 1.4 warns if `version_base` is set, 1.3 if it is not."""
    if "execution_whitelist" in inspect.signature(hydra.main).parameters:
        return {"execution_whitelist": "qat.*"}  # for qat's log handlers and sweep callbacks
    return {"version_base": "1.3"}


def _program(name: str) -> list[str]:
    """Words of the command line before the arguments, as typed if this is known.

    Examples are `qat train`, `.venv/bin/python train.py` and `python -m train`.
    """
    script, *arguments = sys.argv
    if Path(script).name == "qat":
        is_on_path = shutil.which("qat") == script
        return ["qat" if is_on_path else script, name]
    words = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    is_python_command = [*words, *arguments] == sys.orig_argv
    return words if is_python_command else command_words(name).split()


class TerminalHandler(logging.StreamHandler):
    """Writes to the current `sys.stdout`, which a progress bar replaces to print above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    def format(self, record: logging.LogRecord) -> str:
        """Format the line as `printable` text, because names may contain control characters."""
        return printable(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore errors: the reader may be gone (`| head`), and the log file contains the line."""

    @property
    def stream(self) -> TextIO:
        """The current standard output."""
        return sys.stdout
