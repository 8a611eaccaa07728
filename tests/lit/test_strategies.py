"""Which strategy a name stands for."""

import pytest

from qat.lit.strategies import strategy_of


@pytest.mark.parametrize(("name", "searches"), [("ddp", False), ("ddp_find_unused_parameters_true", True)])
def test_no_form_of_ddp_sends_buffers(name, searches):
    """Where one process has a batch more than another in a validation, a broadcast in each forward would wait for ever."""
    options = strategy_of(name, 2)._ddp_kwargs
    assert options["find_unused_parameters"] is searches
    assert [value for key, value in options.items() if key in {"broadcast_buffers", "forward_sync_buffers"}] == [False]
