"""Settings of analyses. Oracle: the names and values written out here."""

import re

import pytest

from qat.analysis.landscape import Landscape
from qat.analysis.robustness import Robustness
from qat.analysis.sensitivity import Sensitivity
from tests.errors import usage_error


@pytest.mark.parametrize(
    ("analysis", "name", "value"),
    [
        (Landscape, "loss", "mse"),
        (Landscape, "points", 4),
        (Landscape, "points", 1),
        (Landscape, "radius", 0.5),
        (Landscape, "targets", []),
        (Sensitivity, "bits", []),
        (Sensitivity, "budget_mb", 0),
        (Robustness, "parts", "steps"),
        (Robustness, "bits", 4),
        (Robustness, "low", 0),
        (Robustness, "high", 0.5),
        (Robustness, "ratios", 1),
        (Robustness, "steps_from", "max"),
        (Robustness, "float_bits", 32),
        (Robustness, "float_scales", "row"),
    ],
)
def test_settings_that_cannot_work(analysis, name, value):
    with usage_error(rf"^analysis\.{name}={re.escape(repr(value))}: must be "):
        analysis(**{name: value})


@pytest.mark.parametrize(
    ("analysis", "name", "value"),
    [(Sensitivity, "bits", 1), (Robustness, "bits", 16), (Robustness, "parts", "step")],
)
def test_a_wrong_entry_of_a_list_is_named(analysis, name, value):
    with usage_error(rf"^analysis\.{name}={value!r}: must be "):
        analysis(**{name: [value]})
