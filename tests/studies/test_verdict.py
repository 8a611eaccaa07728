"""Intervals and answers. Oracles: tables of Student's t, scipy's t-test, differences small enough to work out by hand."""

import pytest
from scipy import stats

from qat.errors import UsageError
from studies import verdict
from studies.claims import Expectation
from tests.studies import made


def expected(direction, margin=0.0, than="old"):
    return Expectation("it", "top1", "new", than, direction, margin)


def answer(differences, *settings):
    return verdict.Found(expected(*settings), tuple(differences)).answer


@pytest.mark.parametrize(
    ("found", "around"),
    [
        ([1.0, 2.0, 3.0], (2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5)),  # t of 2 degrees
        ([2.0, 4.0], (3 - 12.706205, 3 + 12.706205)),  # t of 1
        ([1.0] * 4, (1.0, 1.0)),
        ([1.0], None),
        ([], None),
    ],
)
def test_intervals(found, around):
    assert verdict.interval(found) == (around and pytest.approx(around, abs=1e-5))


@pytest.mark.parametrize("shift", [-1.2, -0.5, 0.0, 0.3, 0.5, 1.2])
def test_yes_and_no_are_what_a_paired_t_test_at_five_per_cent_tells_apart(shift):
    found = [value + shift for value in (-0.7, 0.1, 0.4, -0.2, 0.4)]
    told_apart = stats.ttest_1samp(found, 0.0).pvalue < 0.05
    assert (answer(found, "higher") != "too small to see") == told_apart
    assert answer(found, "higher") == ("too small to see" if not told_apart else "yes" if shift > 0 else "no")


@pytest.mark.parametrize(
    ("settings", "mean", "said"),
    [
        # All differences lie within 0.1 of their mean, their interval within 0.25.
        (("higher",), 0.3, "yes"),
        (("higher",), 0.2, "too small to see"),
        (("higher",), -0.3, "no"),
        (("higher", 1.0), 1.3, "yes"),
        (("higher", 1.0), 0.7, "no"),
        (("higher", 1.0), 1.0, "too small to see"),
        (("lower", 0.5), -0.8, "yes"),
        (("lower", 0.5), -0.2, "no"),
        (("within", 2.0), -1.7, "yes"),
        (("within", 2.0), -2.3, "no"),
        (("within", 2.0), 3.0, "yes"),
        (("near", 1.0), 0.7, "yes"),
        (("near", 1.0), -0.9, "too small to see"),
        (("near", 1.0), -1.3, "no"),
        (("near", 1.0), 1.3, "no"),
    ],
)
def test_answers(settings, mean, said):
    assert answer([mean - 0.1, mean, mean + 0.1], *settings) == said


def test_a_margin_that_is_met_exactly_is_neither():
    # In floats 61.2 - 63.2 + 2 is not zero.
    assert answer([61.2 - 63.2] * 3, "within", 2.0) == "too small to see"


@pytest.mark.parametrize("found", [[], [5.0], [5.0, 5.0]])
def test_two_seeds_decide_nothing(found):
    assert answer(found, "higher") == "not decided yet"


def judged(folder):
    found = made.evidence(folder)
    return verdict.find(found.claims["C1"], found)


def expect(**settings):
    return {"what": "it", "metric": "top1", "arm": "new", "than": "old", "is": "higher"} | settings


def test_seeds_are_paired_by_number(tmp_path):
    made.claim(tmp_path, expect=[expect()])
    made.runs(tmp_path, "new", [61.0, 71.0, 81.0])
    made.runs(tmp_path, "old", [60.0, 70.0, 80.0, 99.0])  # seed 3 has no other
    (one,) = judged(tmp_path)
    assert (one.differences, one.answer) == ((1.0, 1.0, 1.0), "yes")


def test_a_run_without_the_metric_is_no_seed(tmp_path):
    made.claim(tmp_path, expect=[expect()])
    made.runs(tmp_path, "new", [61.0, None, 81.0])
    made.runs(tmp_path, "old", [60.0, 70.0, 80.0])
    (one,) = judged(tmp_path)
    assert (one.differences, one.answer) == ((1.0, 1.0), "not decided yet")


@pytest.mark.parametrize("turned", [False, True])
def test_a_net_that_others_start_from_stands_for_every_seed(tmp_path, turned):
    arms = {"new": {"label": "New"}, "old": {"label": "Old", "seeds": [0], "keep": True}}
    names = {"arm": "old", "than": "new"} if turned else {"arm": "new", "than": "old"}
    made.claim(tmp_path, arms=arms, expect=[expect(**names)])
    made.runs(tmp_path, "new", [61.0, 62.0, 63.0])
    made.runs(tmp_path, "old", [60.0])
    (one,) = judged(tmp_path)
    assert one.differences == ((-1.0, -2.0, -3.0) if turned else (1.0, 2.0, 3.0))
    assert one.answer == "too small to see"


def test_any_other_arm_with_one_seed_is_one_pair(tmp_path):
    made.claim(tmp_path, arms={"new": {"label": "New"}, "old": {"label": "Old", "seeds": [0]}}, expect=[expect()])
    made.runs(tmp_path, "new", [61.0, 62.0, 63.0])
    made.runs(tmp_path, "old", [60.0])
    (one,) = judged(tmp_path)
    assert (one.differences, one.answer) == ((1.0,), "not decided yet")


def test_an_arm_of_which_seeds_are_to_come_stands_for_none_but_its_own(tmp_path):
    made.claim(tmp_path, expect=[expect()])
    made.runs(tmp_path, "new", [61.0, 62.0, 63.0])
    made.runs(tmp_path, "old", [60.0])
    (one,) = judged(tmp_path)
    assert (one.differences, one.answer) == ((1.0,), "not decided yet")


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
    assert (near.answer, above.answer) == ("too small to see", "yes")
    assert above.differences == pytest.approx((0.75, 0.8, 0.85))


def test_a_metric_that_no_run_has(tmp_path):
    path = made.claim(tmp_path, expect=[expect(metric="top")])
    assert judged(tmp_path)[0].answer == "not decided yet"
    made.runs(tmp_path, "old", [1.0])
    with pytest.raises(UsageError) as error:
        judged(tmp_path)
    assert str(error.value) == f"{path}: old.top: must be one of top1"
