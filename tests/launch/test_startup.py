"""Settings of the process when a command starts. Oracle: a separate process."""

import os
import sys

import pytest

from tests.commands import run_python

PDEATHSIG = (
    "import ctypes; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n)); print(n.value)"
)


UNSET = dict.fromkeys(("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TORCHELASTIC_RUN_ID", "QAT_LAUNCHER"))


def start(code, **variables):
    """A fresh process that has run the first import of each command, then the code."""
    return run_python("-c", f"import qat.launch.startup, os\n{code}", **UNSET | variables)


def started(code, **variables):
    """What such a process prints."""
    process = start(code, **variables)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_as_many_files_as_the_system_allows():
    limit = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (100, 900))"
    code = f"{limit}; import qat.launch.startup; print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    assert run_python("-c", code).stdout == "900\n"


@pytest.mark.parametrize(
    ("said", "count"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_spin_for_as_long_as_was_said_or_briefly(said, count):
    assert started("print(os.environ.get('GOMP_SPINCOUNT'))", **said) == count


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
@pytest.mark.parametrize(("said", "number"), [({}, "0"), ({"TORCHELASTIC_RUN_ID": "1"}, "9")])
def test_a_rank_ends_with_its_launcher(said, number):
    assert started(PDEATHSIG, **said) == number


@pytest.mark.parametrize(("lives", "code"), [(True, 0), (False, 1)])
def test_a_rank_whose_launcher_is_gone_does_not_begin(lives, code):
    launcher = str(os.getpid() if lives else 1)
    said = {"TORCHELASTIC_RUN_ID": "1", "QAT_LAUNCHER": launcher}
    assert start("", **said).returncode == code
