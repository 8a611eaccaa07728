"""Commands killed with SIGKILL by `make stress`. Oracle: the same commands, not killed."""

import re

import pytest

from tests.commands import run_python
from tests.conftest import ROOT

KINDS = ("annealed", "evolq")


@pytest.mark.long
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    arguments = ("--kills=2", "--seed=1", "--kinds", *KINDS)
    script = str(ROOT / "evidence/stress.py")
    done = run_python(script, *arguments, cwd=tmp_path, timeout=None, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    _, *lines, total = done.stdout.splitlines()
    assert re.fullmatch(r"\d+ kills: 0 differences", total)
    assert [line.split()[0] for line in lines] == list(KINDS)
    assert all(int(re.search(r"0 of (\d+) values differ", line)[1]) > 200 for line in lines)
