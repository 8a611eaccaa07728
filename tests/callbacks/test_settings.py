"""Invalid settings of callbacks. Oracle: the table of messages."""

import re

import pytest

from qat.callbacks import CGA, EMAWeightAveraging, LastCheckpoint, Oscillation
from tests.errors import usage_error


@pytest.mark.parametrize(
    ("callback", "setting", "value"),
    [
        (CGA, "callbacks.cga.boundary_range", 0.5),
        (CGA, "callbacks.cga.epochs", 0),
        (CGA, "callbacks.cga.qk", "both"),
        (EMAWeightAveraging, "callbacks.ema.decay", 1),
        (EMAWeightAveraging, "callbacks.ema.decay", "x"),
        (EMAWeightAveraging, "callbacks.ema.update_every_n_steps", 0),
        *((LastCheckpoint, "checkpoint.every_n_steps", every) for every in (0, -1, 1.5, True, "2")),
        *((Oscillation, "callbacks.oscillation.max_bits", bits) for bits in (1, 32)),
    ],
)
def test_a_value_that_cannot_work_is_named(callback, setting, value):
    with usage_error(f"^{re.escape(setting)}={value!r}: must be "):
        callback(**{setting.rpartition(".")[2]: value})
