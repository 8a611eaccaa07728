"""Run the root scripts and `qat` in this process, because imports take most of their time."""

import contextlib
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
from unittest import mock

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from qat.cli import commands, sweep
from tests.conftest import ROOT


def typed(script, *arguments, cwd):
    """Run `python SCRIPT ARGUMENTS`, or `qat ARGUMENTS`, in the folder `cwd`.

    Returns:
        The exit code and the output.
    """
    out = io.StringIO()
    root = logging.getLogger()
    handlers = root.handlers[:]
    level = root.level
    environment = dict(os.environ)
    interrupt = signal.getsignal(signal.SIGINT)
    argv = ["qat" if script == "qat" else str(ROOT / script), *map(str, arguments)]
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            mock.patch.object(sys, "argv", argv),
            mock.patch.object(sys, "path", sys.path[:]),
            mock.patch.object(sweep, "failures", []),
        ):
            if script == "qat":
                return commands.main(), out.getvalue()
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0, out.getvalue()
    finally:
        signal.signal(signal.SIGINT, interrupt)
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.level = level
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        os.environ.clear()
        os.environ.update(environment)
    return 0, out.getvalue()


def run_python(*arguments, cwd=ROOT, timeout=600, **environment):
    """Run `python ARGUMENTS` in another process; return the result of `subprocess.run`.

    An environment variable that is None is unset.
    """
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
