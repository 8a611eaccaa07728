"""Numbers as text. Oracle: written out."""

import pytest

from studies.numbers import shown, spread


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (1.005, ".1f", "1.0"),
        (-0.001, ".2f", "0.00"),
        (-0.001, "+.2f", "+0.00"),
        (620848, ",.0f", "620,848"),
        (0.612, ".1%", "61.2%"),
        (3e-7, ".1e", "3.0e-07"),
    ],
)
def test_one_number(value, spec, text):
    assert shown(value, spec) == text


@pytest.mark.parametrize(
    ("values", "spec", "text"),
    [((), ".2f", "–"), ((61.2,), ".2f", "61.20"), ((60, 62), ".1f", "61.0 ± 1.4"), ((1.0, 2.0, 3.0), "+.2f", "+2.00 ± 1.00")],
)
def test_mean_and_sample_deviation(values, spec, text):
    assert spread(values, spec) == text
