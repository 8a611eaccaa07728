"""What a command finds when it starts. Oracle: the system's own answers, in a process of its own."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

CAPTURED = {"capture_output": True, "text": True, "timeout": 60, "check": False}


def started(code, **settings):
    """What a fresh process prints after the first import of each command."""
    done = subprocess.run(
        [sys.executable, "-c", f"import qat.launch.startup, os, resource\n{code}"],
        **{"cwd": ROOT, "env": dict(os.environ)} | CAPTURED | settings,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Another user may not be able to read this one's files: all that is needed is loaded before.
STRANGER = """
import getpass, os, pathlib, resource, tempfile, qat.launch.signals
source = pathlib.Path("qat/launch/startup.py").read_text()
os.setuid(54321)
exec(source)
home = pathlib.Path.home()
print(home, os.access(home, os.W_OK), oct(home.stat().st_mode)[-3:], getpass.getuser())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
@pytest.mark.parametrize("is_taken", [False, True])
def test_a_user_without_an_account_has_a_home_that_is_nobody_elses(is_taken):
    environment = {k: v for k, v in os.environ.items() if k not in {"HOME", "USER", "LOGNAME", "LNAME", "USERNAME"}}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        usual = Path(folder) / "qat-home-54321"
        if is_taken:
            usual.mkdir(mode=0o777)
        done = subprocess.run([sys.executable, "-c", STRANGER], cwd=ROOT, env=environment | {"TMPDIR": folder}, **CAPTURED)
    assert done.returncode == 0, done.stderr
    home, *rest = done.stdout.split()
    assert rest == ["True", "700", "54321"]
    assert Path(home).parent == Path(folder)
    assert (home == str(usual)) is not is_taken


def test_who_has_a_home_keeps_it(tmp_path):
    assert started("print(os.environ['HOME'])", env={**os.environ, "HOME": str(tmp_path)}) == str(tmp_path)


def test_as_many_files_as_the_system_allows():
    code = "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    assert started(code, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 900))) == "900"


@pytest.mark.parametrize(("said", "count"), [({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_spin_for_as_long_as_was_said_or_briefly(said, count):
    environment = {k: v for k, v in os.environ.items() if k not in {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}} | said
    assert started("print(os.environ.get('GOMP_SPINCOUNT'))", env=environment) == count


@pytest.mark.parametrize(("others", "kept"), [({}, "None"), ({"WORLD_SIZE": "2"}, "1"), ({"LOCAL_RANK": "1"}, "1")])
def test_a_rank_of_no_run_is_dropped(others, kept):
    environment = {name: value for name, value in os.environ.items() if name not in {"LOCAL_RANK", "WORLD_SIZE"}}
    assert started("print(os.environ.get('RANK'))", env={**environment, "RANK": "1", **others}) == kept
