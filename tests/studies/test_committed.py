"""The page and the README of this repository say what its records say. Oracle: both made anew."""

from studies import page
from studies.arms import Arms, Places
from studies.run import outdated
from tests.conftest import ROOT


def test_page_and_readme_are_up_to_date():
    assert page.check(ROOT) == []


def test_every_record_was_made_by_what_its_claim_says():
    assert outdated(Arms.read(Places())) == []
