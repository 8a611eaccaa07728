"""A progress bar on terminals only."""

import sys

import pytest
from lightning.pytorch.callbacks import Callback, ProgressBar

from qat.callbacks import terminal_progress


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_where_somebody_looks(monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    found = terminal_progress(refresh_rate=3)
    assert isinstance(found, Callback)
    assert isinstance(found, ProgressBar) == terminal


def test_refresh_rate(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert terminal_progress(refresh_rate=3).refresh_rate == 3
