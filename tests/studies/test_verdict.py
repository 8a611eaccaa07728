"""States of expectations and verdicts of claims. Oracle: differences small enough to work out by hand."""

import pytest

from qat.errors import UsageError
from studies import verdict
from studies.claims import Expectation
from tests.studies import made


def expected(direction, margin=0.0, than="old"):
    return Expectation("it", "top1", "new", than, direction, margin)


@pytest.mark.parametrize(
    ("found", "state"),
    [
        ([1.0, 1.0, 1.0], "supported"),  # no deviation, no error
        ([1.0, 2.0, 3.0], "supported"),  # mean 2, error 1/sqrt(3): 2 > 1.155
        ([0.1, 0.1, 4.0], "undecided"),  # all above zero, mean 1.4, error 1.3
        ([-0.1, 5.0, 5.0], "undecided"),  # mean 3.3, but one below zero
        ([0.0, 1.0, 1.0], "undecided"),  # zero is not beyond
        ([0.0, 0.0, 0.0], "undecided"),
        ([-1.0, -2.0, -3.0], "contradicted"),
        ([-0.1, -0.1, -4.0], "undecided"),
        ([1.0, 1.0], "open"),
        ([], "open"),
    ],
)
def test_states(found, state):
    assert verdict.state(found) == state


def test_two_standard_errors_are_needed_to_the_last_digit():
    # Mean 4, deviation 2, error 2/sqrt(n): 4 seeds give 2 errors = 2, 1.1547 * 2 below 4.
    assert verdict.state([2.0, 4.0, 6.0]) == "supported"
    # (1, 1, x): mean (2 + x)/3, error (x - 1)/3; equal to two errors at x = 4.
    assert verdict.state([1.0, 1.0, 4.0]) == "undecided"
    assert verdict.state([1.0, 1.0, 3.99]) == "supported"


@pytest.mark.parametrize(
    ("one", "pairs", "leads"),
    [
        (expected("higher"), [(61.5, 60.0)], [1.5]),
        (expected("higher", 0.5), [(61.5, 60.0)], [1.0]),
        (expected("lower"), [(61.5, 60.0)], [-1.5]),
        (expected("lower", 0.5), [(1.0, 2.0)], [0.5]),
        (expected("within", 2.0), [(59.0, 60.0), (57.0, 60.0), (63.0, 60.0)], [1.0, -1.0, 5.0]),
        (expected("near", 0.1), [(1.85, 1.8), (1.65, 1.8)], [0.05, -0.05]),
        # In floats 61.2 - 63.2 + 2 and 1.9 - 1.8 - 0.1 are not zero.
        (expected("within", 2.0), [(61.2, 63.2)], [0.0]),
        (expected("near", 0.1), [(1.9, 1.8), (1.7, 1.8)], [0.0, 0.0]),
    ],
)
def test_leads(one, pairs, leads):
    assert verdict.leads(one, pairs) == pytest.approx(leads, abs=1e-12)
    assert [lead == 0 for lead in verdict.leads(one, pairs)] == [lead == 0 for lead in leads]


def judged(folder, **settings):
    found = made.evidence(folder)
    return verdict.judge(found.claims["C1"], found)


def expect(**settings):
    return {"what": "it", "metric": "top1", "arm": "new", "than": "old", "is": "higher"} | settings


def test_seeds_are_paired_by_number(tmp_path):
    made.claim(tmp_path, expect=[expect()])
    made.runs(tmp_path, "new", [61.0, 71.0, 81.0])
    made.runs(tmp_path, "old", [60.0, 70.0, 80.0, 99.0])  # seed 3 has no other
    (one,) = judged(tmp_path)
    assert (one.differences, one.state) == ((1.0, 1.0, 1.0), "supported")


def test_a_run_without_the_metric_is_no_seed(tmp_path):
    made.claim(tmp_path, expect=[expect()])
    made.runs(tmp_path, "new", [61.0, None, 81.0])
    made.runs(tmp_path, "old", [60.0, 70.0, 80.0])
    (one,) = judged(tmp_path)
    assert (one.differences, one.state) == ((1.0, 1.0), "open")


@pytest.mark.parametrize("turned", [False, True])
def test_a_net_that_others_start_from_stands_for_every_seed(tmp_path, turned):
    arms = {"new": {"label": "New"}, "old": {"label": "Old", "seeds": [0], "keep": True}}
    names = {"arm": "old", "than": "new"} if turned else {"arm": "new", "than": "old"}
    made.claim(tmp_path, arms=arms, expect=[expect(**names)])
    made.runs(tmp_path, "new", [61.0, 62.0, 63.0])
    made.runs(tmp_path, "old", [60.0])
    (one,) = judged(tmp_path)
    assert one.differences == ((-1.0, -2.0, -3.0) if turned else (1.0, 2.0, 3.0))
    assert one.state == ("contradicted" if turned else "supported")


def test_any_other_arm_with_one_seed_is_one_pair(tmp_path):
    made.claim(tmp_path, arms={"new": {"label": "New"}, "old": {"label": "Old", "seeds": [0]}}, expect=[expect()])
    made.runs(tmp_path, "new", [61.0, 62.0, 63.0])
    made.runs(tmp_path, "old", [60.0])
    (one,) = judged(tmp_path)
    assert (one.differences, one.state) == ((1.0,), "open")


def test_an_arm_of_which_seeds_are_to_come_stands_for_none_but_its_own(tmp_path):
    made.claim(tmp_path, expect=[expect()])
    made.runs(tmp_path, "new", [61.0, 62.0, 63.0])
    made.runs(tmp_path, "old", [60.0])
    (one,) = judged(tmp_path)
    assert (one.differences, one.state) == ((1.0,), "open")


def test_two_arms_with_one_seed_are_one_pair(tmp_path):
    made.claim(tmp_path, seeds=[0], expect=[expect()])
    made.runs(tmp_path, "new", [61.0])
    made.runs(tmp_path, "old", [60.0])
    assert judged(tmp_path)[0].differences == (1.0,)


def test_a_number_and_an_arm_of_another_claim(tmp_path):
    made.claim(tmp_path, "START", arms={"float": {"label": "float", "seeds": [0], "keep": True}})
    made.claim(tmp_path, expect=[expect(than=1.8, by=0.1, **{"is": "near"}), expect(than="START/float")])
    made.runs(tmp_path, "new", [1.75, 1.8, 1.85])
    made.runs(tmp_path, "float", [1.0], claim="START")
    near, above = judged(tmp_path)
    assert near.differences == pytest.approx((-0.05, 0.0, 0.05))
    assert (near.state, above.state) == ("supported", "supported")
    assert above.differences == pytest.approx((0.75, 0.8, 0.85))


def test_a_metric_that_no_run_has(tmp_path):
    path = made.claim(tmp_path, expect=[expect(metric="top")])
    assert judged(tmp_path)[0].state == "open"
    made.runs(tmp_path, "old", [1.0])
    with pytest.raises(UsageError) as error:
        judged(tmp_path)
    assert str(error.value) == f"{path}: old.top: must be one of top1"


@pytest.mark.parametrize(
    ("states", "said", "summary"),
    [
        ("", "", None),
        ("s", "confirmed", "1 of 1 expectation supported."),
        ("ss", "confirmed", "2 of 2 expectations supported."),
        ("suc", "mixed", "1 of 3 expectations supported. Contradicted: n2. Undecided: n1."),
        ("uc", "not confirmed", "0 of 2 expectations supported. Contradicted: n1. Undecided: n0."),
        ("sooc", "not decided yet", "1 of 4 expectations supported. Contradicted: n3. Open: n1; n2."),
    ],
)
def test_verdicts(states, said, summary):
    names = {"s": "supported", "u": "undecided", "c": "contradicted", "o": "open"}
    found = [verdict.Judged(Expectation(f"n{i}", "top1", "a", "b", "higher"), (), names[one]) for i, one in enumerate(states)]
    assert verdict.verdict(found) == said
    if summary is not None:
        assert verdict.summary(found) == summary
