"""Numbers and their text. Oracle: means and deviations worked out by hand."""

import pytest

from qat.errors import UsageError
from studies.evidence import shown, spread
from tests.studies import made


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (1.005, ".1f", "1.0"),
        (-0.001, ".2f", "0.00"),
        (-0.001, "+.2f", "+0.00"),
        (620848, ",.0f", "620,848"),
        (0.612, ".1%", "61.2%"),
        (3e-7, ".1e", "3.0e-07"),
    ],
)
def test_one_number(value, spec, text):
    assert shown(value, spec) == text


@pytest.mark.parametrize(
    ("values", "spec", "text"),
    [((), ".2f", "–"), ((61.2,), ".2f", "61.20"), ((60, 62), ".1f", "61.0 ± 1.4"), ((1.0, 2.0, 3.0), "+.2f", "+2.00 ± 1.00")],
)
def test_mean_and_sample_deviation(values, spec, text):
    assert spread(values, spec) == text


@pytest.fixture
def folder(tmp_path):
    made.claim(tmp_path, "START", arms={"float": {"label": "float", "seeds": [0], "keep": True}})
    for seed, (new, old) in enumerate([(61.0, 60.0), (63.0, 61.0), (65.0, 62.0)]):
        made.record(tmp_path, arm="new", seed=seed, metrics={"top1": new, "w2.top-1": 1.23456})
        made.record(tmp_path, arm="old", seed=seed, metrics={"top1": old, "flips": 12345.6})
    made.record(tmp_path, claim="START", arm="float", metrics={"top1": 66.0})
    return tmp_path


def filled(folder, why, **settings):
    made.claim(folder, why=why, **settings)
    found = made.evidence(folder)
    claim = found.claims["C1"]
    return found.filled(claim, claim.why)


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
        ("`ofq_{{2,3}}bit`", "`ofq_{2,3}bit`"),
        ("{idle.top1}, {new.top1 - idle.top1}", "(not run yet), (not run yet)"),
    ],
)
def test_numbers_in_text(folder, why, text):
    assert filled(folder, why, arms=made.ARMS | {"idle": {"label": "not run"}}) == text


@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("{newer.top1}", "arm 'newer': must be"),
        ("{C7/new.top1}", "arm 'C7/new': must be"),
        ("{new.top1 - old.top5}", "old.top5: must be one of flips, top1"),
        ("{new}", "'new' is no number; must be text with {arm.metric}"),
        ("{new.top1 - old.top1 - old.top1}", "'new.top1 - old.top1 - old.top1' is no number"),
        ("{new.top1:d}", "Unknown format code"),
        ("{new.top1", "expected '}' before end of string"),
        ("{}", "'0' is no number"),
    ],
)
def test_mistakes(folder, why, message):
    with pytest.raises(UsageError) as error:
        filled(folder, why)
    assert str(error.value).startswith(f"{folder}/studies/claims/c1.yaml: {message}")
