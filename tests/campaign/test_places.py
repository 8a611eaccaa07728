"""Paths and data files that are wrong, for all settings and datasets that read some.

Oracle: one line that names the setting or the file.
"""

import pytest

from tests.campaign.files import judged
from tests.campaign.places import data_cases, path_cases
from tests.campaign.running import attempt, no_steps


def wrong_outcomes(folder, cases):
    with no_steps():
        tried = [(case, attempt(case.task, case.cfg)) for case in cases]
    wrong = [
        f"{case.command} {case.name}: {found}: {outcome.message[:200]}"
        for case, outcome in tried
        if (found := judged(case, outcome, folder))
    ]
    return wrong, len(tried)


@pytest.mark.long
def test_a_path_that_is_wrong_is_one_line(tmp_path, run_4bit):
    wrong, count = wrong_outcomes(tmp_path, path_cases(tmp_path, run_4bit / "checkpoints" / "last.ckpt"))
    assert count > 100
    assert wrong == []


@pytest.mark.long
def test_data_that_are_wrong_are_one_line(tmp_path):
    wrong, count = wrong_outcomes(tmp_path, data_cases(tmp_path))
    assert count > 30
    assert wrong == []
