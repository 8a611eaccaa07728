"""Settings of averaged weights; the averages are in tests/tasks/test_ingredients.py."""

import pytest

import qat
from qat.callbacks import EMAWeightAveraging


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1}, "callbacks.ema.decay=1: must be a number from 0 to below 1"),
        ({"decay": "x"}, "callbacks.ema.decay='x': must be a number from 0 to below 1"),
        (
            {"update_every_n_steps": 0},
            "callbacks.ema.update_every_n_steps=0: must be an integer of at least 1",
        ),
    ],
)
def test_an_average_that_would_not_follow_is_refused(settings, message):
    with pytest.raises(qat.UsageError) as error:
        EMAWeightAveraging(**settings)
    assert str(error.value) == message
