"""The page and the README of this repository say what its records say. Oracle: both made anew."""

from studies import page
from tests.conftest import ROOT


def test_page_and_readme_are_up_to_date():
    assert page.check(ROOT) == []
