"""What a command finds when it starts. Oracle: the system's own answers, in a process of its own."""

import os
import resource
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PDEATHSIG = (
    "import ctypes; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n)); print(n.value)"
)


SET = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TORCHELASTIC_RUN_ID", "QAT_LAUNCHER"}


def start(code, **settings):
    """A fresh process that has run the first import of each command, then the code."""
    variables = {name: value for name, value in os.environ.items() if name not in SET}
    return subprocess.run(
        [sys.executable, "-c", f"import qat.launch.startup, os, resource\n{code}"],
        cwd=ROOT,
        env=variables | settings.pop("env", {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **settings,
    )


def started(code, **settings):
    """What such a process prints."""
    process = start(code, **settings)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_as_many_files_as_the_system_allows():
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 900))

    code = "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    assert started(code, preexec_fn=limit) == "900"


@pytest.mark.parametrize(
    ("said", "count"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_spin_for_as_long_as_was_said_or_briefly(said, count):
    assert started("print(os.environ.get('GOMP_SPINCOUNT'))", env=said) == count


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
@pytest.mark.parametrize(("said", "number"), [({}, "0"), ({"TORCHELASTIC_RUN_ID": "1"}, "9")])
def test_a_rank_ends_with_its_launcher(said, number):
    assert started(PDEATHSIG, env=said) == number


@pytest.mark.parametrize(("lives", "code"), [(True, 0), (False, 1)])
def test_a_rank_whose_launcher_is_gone_does_not_begin(lives, code):
    launcher = str(os.getpid() if lives else 1)
    said = {"TORCHELASTIC_RUN_ID": "1", "QAT_LAUNCHER": launcher}
    assert start("", env=said).returncode == code
