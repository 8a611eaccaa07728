"""Errors that a user reads."""

import pytest

import qat


def usage_error(match):
    """A context that must end in a `UsageError` whose message fits the pattern."""
    return pytest.raises(qat.UsageError, match=match)
