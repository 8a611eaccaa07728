"""Commands killed with SIGKILL, three kinds of `make stress`. Oracle: the same commands, not killed."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

KINDS = ("last.ckpt", "cga", "evolq")


@pytest.mark.long
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/stress.py"), "--kills=3", "--seed=1", "--kinds", *KINDS]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    seed, *lines, total = done.stdout.splitlines()
    assert (seed, total) == ("seed 1", "3 kills: 0 differences")
    assert [line.split()[0] for line in lines] == list(KINDS)
    assert all("; resumed at " in line for line in lines)
    compared = [line.split("  ")[-1].split() for line in lines]
    assert all(int(words[2]) > 200 and int(words[5]) > 50 for words in compared)  # values and rows
