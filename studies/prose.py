"""Prose with numbers from records in it: `{arm.metric}`, `{arm.metric - other.metric:.1f}`, `{CLAIM/arm.metric}`; `{{` is a brace."""

from __future__ import annotations

import re

from studies.checks import NUMBER_FORMAT, wrong
from studies.claims import Claim, check_arm
from studies.evidence import Evidence
from studies.numbers import DEFAULT, spread

MISSING = "(not run yet)"
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_VALUE = r"((?:[A-Z]+\d*/)?[A-Za-z0-9_-]+)\.([^\s:{}]+)"
_PLACEHOLDER = re.compile(rf"{_VALUE}(?:\s+-\s+{_VALUE})?\s*(?::({NUMBER_FORMAT.pattern}))?")
_ALLOWED = "allowed are {arm.metric}, {arm.metric - other.metric}, with a format as {arm.metric:.1f}, and {{ for a brace"


def filled(claim: Claim, evidence: Evidence, field: str = "why") -> str:
    """The `why` of a claim, or its `readme`; a number that no run has given yet says so.

    Raises:
        UsageError: a placeholder is none, or names an arm or a metric that does not exist.
    """
    return _BRACES.sub(lambda found: _filled(claim, evidence, field, found), getattr(claim, field))


def _filled(claim: Claim, evidence: Evidence, field: str, found: re.Match[str]) -> str:
    if found[0] in {"{{", "}}"}:
        return found[0][0]
    parts = _PLACEHOLDER.fullmatch(found[1].strip()) if found[1] is not None else None
    if parts is None:
        raise wrong(claim.file, field, found[0], _ALLOWED)
    arm, metric, other, subtracted, spec = parts.groups()
    named = [(arm, metric)] if other is None else [(arm, metric), (other, subtracted)]
    for name, of in named:
        check_arm(claim, evidence.claims, field, name)
        evidence.check_metric(claim, field, name, of)
    if other is None:
        values = list(evidence.values(claim, arm, metric).values())
    else:
        values = [left - right for left, right in evidence.pairs(claim, (arm, metric), (other, subtracted))]
        spec = f"+{(spec or DEFAULT).removeprefix('+')}"
    return spread(values, spec or DEFAULT) if values else MISSING
