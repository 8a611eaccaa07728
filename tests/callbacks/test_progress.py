"""A progress bar on terminals only. Oracle: the log's way of counting, and the characters that a terminal of 80 columns would get."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback, ProgressBar

from qat.callbacks import terminal_progress
from qat.callbacks.progress import EpochBar
from tests.callbacks.fitting import fit, module
from tests.tiny import quantized


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_where_somebody_looks(monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    found = terminal_progress(refresh_rate=3)
    assert isinstance(found, Callback)
    assert isinstance(found, ProgressBar) == terminal


def test_refresh_rate(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert terminal_progress(refresh_rate=3).refresh_rate == 3


@pytest.mark.parametrize(("epochs", "shown"), [(12, "epoch 1/12"), (-1, "epoch 1"), (None, "epoch 1")])
def test_epochs_count_from_1_as_in_the_log(epochs, shown):
    bar = EpochBar()
    bar._trainer = SimpleNamespace(max_epochs=epochs)
    assert bar._get_train_description(0).rstrip() == shown


def test_a_line_fits_into_80_columns():
    written = io.StringIO()
    bar = EpochBar(refresh_rate=1, leave=True, console_kwargs={"file": written, "width": 80, "force_terminal": True})
    fit(module(quantized()), bar, enable_progress_bar=True)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()))
    drawn = [line for line in lines if line.strip()]
    assert all(line.startswith(("epoch 1/2", "epoch 2/2", "Validation")) for line in drawn), "no line is wrapped"
    assert re.search(r"4/4 .* loss: \d", drawn[-1])
