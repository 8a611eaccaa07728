"""Settings of averaged weights; the averages are in tests/tasks/test_ingredients.py."""

import pytest

from qat.callbacks import EMAWeightAveraging
from tests.errors import usage_error


@pytest.mark.parametrize(
    ("name", "value"), [("decay", 1), ("decay", "x"), ("update_every_n_steps", 0)]
)
def test_an_average_that_would_not_follow_is_refused(name, value):
    with usage_error(rf"^callbacks\.ema\.{name}={value!r}: must be "):
        EMAWeightAveraging(**{name: value})
