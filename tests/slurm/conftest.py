"""The scheduler, started once for all tests that need it."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.scheduler import Scheduler, missing


@pytest.fixture(scope="session")
def scheduler():
    """SLURM, with this Python and this repository for its jobs."""
    reason = missing()
    if reason is None and "PYTEST_XDIST_WORKER" in os.environ:
        reason = "the tests share their jobs, so one process runs them all: make test-slurm"
    if reason is not None:
        pytest.skip(reason)
    # munged wants a folder that everybody may pass, which pytest's own are not.
    with tempfile.TemporaryDirectory(prefix="qat-slurm-") as folder:
        Path(folder).chmod(0o755)
        started = Scheduler(folder, Path(sys.executable).parent)
        started.env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        try:
            started.start()
            yield started
        finally:
            started.stop()
