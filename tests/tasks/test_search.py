"""`search=...` of `ptq.py`: settings from the config, a run from end to end, and the published rows."""

import dataclasses

import pytest
from omegaconf import OmegaConf

import qat
from qat.ptq.bits_settings import METHOD as BITS
from qat.ptq.drivers import DRIVERS
from qat.ptq.settings import GRADIENT_METHODS, METHODS, SearchSettings
from qat.tasks.ptq import build_ptq_recipe
from qat.tasks.search import build_search
from tests.conftest import compose, results
from tests.tasks.test_ptq import MODEL, SMALL
from tests.test_configs import choices

ROWS = [f"evolq_w{bits}a8" for bits in (3, 4, 8)]
MODELS = ("deit_t", "deit_s", "deit_b", "vit_b")
ONE_BLOCK = ("++model.args.embed_dim=24", "++model.args.depth=2", "++model.args.num_heads=3", "++model.args.img_size=8")


def run(run_dir, *overrides):
    from qat.tasks.ptq import ptq

    ptq(compose("ptq", f"run_dir={run_dir}", *overrides))
    return results(run_dir)


def test_a_file_for_every_method():
    assert set(choices("search")) == {*METHODS, BITS, "adam_all"}
    assert set(METHODS) == set(DRIVERS)


def test_all_scales_are_those_of_activations_too():
    every, adam = (compose("ptq", f"search={name}", "run_dir=a").search for name in ("adam_all", "adam"))
    assert dict(every) == {**adam, "targets": ["*"], "radius": 0.05}


@pytest.mark.parametrize("name", METHODS)
def test_a_file_has_all_settings_at_their_defaults(name):
    cfg = compose("ptq", f"search={name}", "seed=3", "run_dir=a")
    assert set(cfg.search) == {field.name for field in dataclasses.fields(SearchSettings)}
    step = {"radius": 0.3, "relative": True} if name in GRADIENT_METHODS else {}
    assert build_search(cfg) == SearchSettings(method=name, seed=3, **step)


def test_the_rows_are_those_that_were_published():
    assert [name for name in choices("experiment") if name.startswith("evolq_")] == ROWS


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("model", MODELS)
def test_a_row_is_what_its_name_says(name, model):
    cfg = compose("ptq", f"experiment={name}", f"model={model}", "run_dir=a")
    recipe, search = build_ptq_recipe(cfg), build_search(cfg)
    assert f"w{recipe.bits}a{recipe.act_bits}" == name.rpartition("_")[2]
    assert recipe.bias_correction == (recipe.bits < 8)
    assert recipe.residual_observer == "ptf"
    assert (search, cfg.data.calibration_images, cfg.ptq.batch) == (SearchSettings(), 1000, 100)
    assert cfg.model.pretrained
    assert OmegaConf.missing_keys(cfg) == set()


@pytest.mark.slow
def test_a_row_runs_on_a_small_net(tmp_path):
    small = ("data=digits", *ONE_BLOCK, "model.pretrained=false", "search.passes=1", "search.radius=0.05", "search.relative=true", *SMALL)
    found = run(tmp_path / "run", "experiment=evolq_w4a8", "model=deit_t", *small)
    search = found["search"]
    assert (search["method"], search["selected_on"], search["evaluations"]) == ("evolution", "calibration", 6)
    assert search["fitness"] <= search["fitness_before"]
    net = qat.load(tmp_path / "run" / "quantized.ckpt")
    assert sum(1 for _ in qat.iter_quantizers(net)) > 0
    assert (tmp_path / "run" / "search.csv").read_text().count("\n") == 8
    assert (tmp_path / "run" / "search.ckpt").is_file()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("search.method=annealing", "search.method='annealing': must be one of evolution, random, adam, sgd"),
        ("+search.cycle=3", "search.cycle: must be one of method, passes, cycles"),
        ("search.targets=[head]", "search.targets=['head']: no block has such a scale; stored scales are those of "),
    ],
)
def test_mistakes(override, line, refused, tmp_path):
    cfg = compose("ptq", "search=evolution", override, *MODEL, *SMALL, f"run_dir={tmp_path}")
    assert refused("ptq", cfg).startswith(f"error: {line}")
