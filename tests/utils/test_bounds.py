"""What strangers wrote is read within bounds. Oracle: counts by hand."""

import pytest
import torch
from torch import nn

from qat.utils.bounds import MOST_DEPTH, about_as_large_as, check_bounds


def nested(depth):
    return [nested(depth - 1)] if depth else 1


def test_depth():
    check_bounds(nested(MOST_DEPTH - 1))
    with pytest.raises(ValueError, match=f"nested more than {MOST_DEPTH} deep"):
        check_bounds(nested(MOST_DEPTH))
    with pytest.raises(ValueError, match=f"nested more than {MOST_DEPTH} deep"):
        check_bounds({"a": nested(10**3 - 100)})


def test_values_are_counted_at_each_use():
    row = [1] * 10**5
    check_bounds({"a": row, "b": row})
    with pytest.raises(ValueError, match="holds more than 1000000 values"):
        check_bounds([row] * 11)


def test_a_net_may_be_as_large_as_its_weights_and_hooks_go():
    state = nn.Linear(2000, 2000).state_dict()
    hooks = nn.modules.module._global_parameter_registration_hooks
    with about_as_large_as(state):
        assert len(nn.Linear(2000, 2000).weight) == 2000
    assert not hooks
    with pytest.raises(ValueError, match="much larger than the weights of the file, at its weight"), about_as_large_as(state):
        torch.nn.Linear(10**5, 10**3)
    with pytest.raises(ValueError, match="much larger"), about_as_large_as(state):
        nn.Sequential(*(nn.BatchNorm1d(1) for _ in range(10**4)))
    assert not hooks
