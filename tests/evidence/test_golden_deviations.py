"""The listing of `make golden-deviations`. Oracle: tolerances of the golden tests that it runs."""

import pytest

from evidence.golden_deviations import FAMILIES, largest


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_compared_and_agrees(family):
    count, deviation = largest(*FAMILIES[family])
    assert count > 0
    assert deviation < 1e-4
