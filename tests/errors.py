"""Errors that a user reads."""

import contextlib

import pytest

import qat


@contextlib.contextmanager
def usage_error(match):
    """A context that must end in a `UsageError` of one line that fits the pattern."""
    with pytest.raises(qat.UsageError, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)
