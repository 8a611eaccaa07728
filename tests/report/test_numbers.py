"""Numbers for people. Oracle: written down by hand."""

import pytest

from qat.report.numbers import bits_of, number, percent, shown, signed, times
from qat.utils.text import duration, scaled


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (190236, "190,236"),
        ("190236", "190236"),
        (100.0, "100"),
        (0.000123456, "0.00012346"),
        (1234.567, "1,234.57"),
        ("-3.5", "-3.5"),
        ("fc1", "fc1"),
        (None, "–"),
        ("", ""),
        (float("nan"), "nan"),
        (True, "True"),
        (1e30, "1e+30"),
    ],
)
def test_shown(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (190236, "190 kB"), (5_700_000, "5.7 MB"), (1.26e12, "1.26 TB"), (None, "–")]
)
def test_scaled(value, text):
    assert scaled(value, "B") == text


def test_other_forms():
    assert [number(value) for value in ("1e-3", True, None, "x", 4)] == [0.001, None, None, None, 4.0]
    assert [percent(None), percent(88.888)] == ["–", "88.89"]
    assert [signed(-1.111), signed(2.0)] == ["−1.11", "+2.00"]
    assert [times(9.53), times(1234.5)] == ["9.5×", "1,234×"]
    assert [duration(s) for s in (2.14, 34, 600, 7200)] == ["2.1 s", "34 s", "10 min", "2.0 h"]
    assert [bits_of(recipe) for recipe in (None, {"name": "fp"}, {"name": "ofq", "bits": 2, "act_bits": 3})] == [None, None, "W2 A3"]
