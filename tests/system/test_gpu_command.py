"""`python -m tests.gpu` where neither Hydra nor Lightning is installed. Oracle: finders that refuse to import them."""

import textwrap

import pytest

from tests.commands import run_python

BLOCKED = """
    import runpy, sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {"hydra", "omegaconf", "lightning", "lightning_fabric", "pytorch_lightning"}:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Refuse())
    sys.argv[1:] = ["-k", "declined or goes_from_device", "--maxfail=1"]
    runpy.run_module("tests.gpu", run_name="__main__")
"""


@pytest.mark.long
def test_it_runs_without_hydra_and_lightning():
    done = run_python("-c", textwrap.dedent(BLOCKED), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_, last = done.stdout.strip().splitlines()
    assert first.startswith("torch 2.")
    assert "1 on the CPU" in done.stdout or "on the device" in done.stdout
    assert "passed" in last
