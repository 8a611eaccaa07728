"""`search=evolution` of `ptq.py`: settings from the config, a run from end to end, and the published rows."""

import dataclasses

import pytest

from qat.ptq.search import SearchSettings
from qat.tasks.ptq_start import build_ptq_recipe, build_search
from tests.conftest import compose
from tests.system.test_configs import choices

ROWS = [f"evolq_w{bits}a8" for bits in (8, 4, 3)]


def test_the_file_has_all_settings_at_their_defaults():
    assert choices("search") == ["evolution"]
    cfg = compose("ptq", "search=evolution", "seed=3", "run_dir=a")
    assert set(cfg.search) == {field.name for field in dataclasses.fields(SearchSettings)}
    assert build_search(cfg) == SearchSettings(seed=3)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_its_name_says(name):
    assert name in choices("experiment")
    cfg = compose("ptq", f"experiment={name}", "model=deit_s", "run_dir=a")
    recipe, search = build_ptq_recipe(cfg), build_search(cfg)
    assert f"w{recipe.bits}a{recipe.act_bits}" == name.rpartition("_")[2]
    assert recipe.bias_correction == (recipe.bits < 8)
    assert recipe.residual_observer == "ptf"
    assert (search, cfg.data.calibration_images, cfg.ptq.batch) == (SearchSettings(), 1000, 100)
