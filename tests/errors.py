"""Check the messages of errors."""

import contextlib

import pytest

import qat


@contextlib.contextmanager
def usage_error(match):
    """Context in which a `UsageError` must be raised whose message is one line and matches."""
    with pytest.raises(qat.UsageError, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)
