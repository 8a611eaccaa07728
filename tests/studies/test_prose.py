"""Numbers in prose. Oracle: means and deviations worked out by hand."""

import pytest

from qat.errors import UsageError
from studies.prose import filled
from tests.studies import made


@pytest.fixture
def folder(tmp_path):
    made.claim(tmp_path, "START", arms={"float": {"label": "float", "seeds": [0], "keep": True}})
    for seed, (new, old) in enumerate([(61.0, 60.0), (63.0, 61.0), (65.0, 62.0)]):
        made.record(tmp_path, arm="new", seed=seed, metrics={"top1": new, "w2.top-1": 1.23456})
        made.record(tmp_path, arm="old", seed=seed, metrics={"top1": old, "flips": 12345.6})
    made.record(tmp_path, claim="START", arm="float", metrics={"top1": 66.0})
    return tmp_path


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("New reaches {new.top1}.", "New reaches 63.00 ± 2.00."),
        ("{new.top1 - old.top1}", "+2.00 ± 1.00"),
        ("{old.top1 - new.top1:.1f}", "-2.0 ± 1.0"),
        ("{ new.top1 - START/float.top1 :+.1f}", "-3.0 ± 2.0"),
        ("{START/float.top1:.0f} and {START/float.top1 - START/float.top1}", "66 and +0.00"),
        ("{new.w2.top-1:.3f}", "1.235 ± 0.000"),
        ("{new.w2.top-1 - old.top1:.1f}", "-59.8 ± 1.0"),
        ("{old.flips:,.1f}", "12,345.6 ± 0.0"),
        ("{old.flips:,.0f}", "12,346"),
        ("`ofq_{{2,3}}bit`", "`ofq_{2,3}bit`"),
        ("nothing", "nothing"),
        ("{idle.top1}, {new.top1 - idle.top1}", "(not run yet), (not run yet)"),
    ],
)
def test_placeholders(folder, why, text):
    made.claim(folder, why=why, arms=made.ARMS | {"idle": {"label": "not run"}})
    found = made.evidence(folder)
    assert filled(found.claims["C1"], found) == text


@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("{newer.top1}", "why='newer': no such arm, allowed are new, old"),
        ("{C7/new.top1}", "why='C7/new': no such claim, allowed are START, C1"),
        ("{new.top5}", "why='new.top5': no such metric, allowed are top1, w2.top-1"),
        ("{new.top1 - old.top5}", "why='old.top5': no such metric, allowed are flips, top1"),
        (
            "{new}",
            "why='{new}': allowed are {arm.metric}, {arm.metric - other.metric}, with a format as {arm.metric:.1f}, and {{ for a brace",
        ),
        ("{new.top1:d}", "why='{new.top1:d}': allowed are"),
        ("{new.top1 + old.top1}", "why='{new.top1 + old.top1}': allowed are"),
        ("{new.top1", "why='{': allowed are"),
        ("{}", "why='{}': allowed are"),
    ],
)
def test_mistakes(folder, why, message):
    path = made.claim(folder, why=why)
    found = made.evidence(folder)
    with pytest.raises(UsageError) as error:
        filled(found.claims["C1"], found)
    assert str(error.value).startswith(f"{path}: {message}")
