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


def started(code, **settings):
    """What a fresh process prints after the first import of each command."""
    done = subprocess.run(
        [sys.executable, "-c", f"import qat.launch.startup, os, resource\n{code}"],
        **{
            "cwd": ROOT,
            "env": dict(os.environ),
            "capture_output": True,
            "text": True,
            "timeout": 60,
            "check": False,
        }
        | settings,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_as_many_files_as_the_system_allows():
    code = "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    assert (
        started(code, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 900)))
        == "900"
    )


@pytest.mark.parametrize(
    ("said", "count"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_spin_for_as_long_as_was_said_or_briefly(said, count):
    environment = {
        k: v for k, v in os.environ.items() if k not in {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    } | said
    assert started("print(os.environ.get('GOMP_SPINCOUNT'))", env=environment) == count


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
@pytest.mark.parametrize(("said", "number"), [({}, "0"), ({"TORCHELASTIC_RUN_ID": "1"}, "9")])
def test_a_rank_ends_with_its_launcher(said, number):
    assert (
        started(
            PDEATHSIG,
            env={k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"} | said,
        )
        == number
    )


@pytest.mark.parametrize(("lives", "code"), [(True, 0), (False, 1)])
def test_a_rank_whose_launcher_is_gone_does_not_begin(lives, code):
    said = {"TORCHELASTIC_RUN_ID": "1", "QAT_LAUNCHER": str(os.getpid() if lives else 1)}
    command = [sys.executable, "-c", "import qat.launch.startup"]
    assert (
        subprocess.run(command, cwd=ROOT, env=os.environ | said, check=False, timeout=60).returncode
        == code
    )
