"""Every yaml composes, every recipe fits every model, and every key is one that something reads."""

import dataclasses
import inspect
import itertools

import pytest
from hydra.utils import get_class
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

import qat
from qat.spec import PRESETS
from qat.tasks import build
from tests.conftest import ROOT, TINY, compose, results, train
from tests.errors import usage_error

CONF = ROOT / "conf"


def choices(group):
    """Names of a group's files; those with an underscore are parts of others."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml") if not p.stem.startswith("_"))


GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "hydra")
# Their choices are configs of all other groups.
CHOOSERS = {"experiment", "debug"}
# Groups that train.py does not have.
ELSEWHERE = {"ptq", "search", "analysis", "format"}
RECIPES = {
    f"{name}_{bits}bit": (name, {"bits": bits}) for name in PRESETS for bits in (2, 3, 4, 8)
} | {name: (name, {}) for name in PRESETS}
RECIPES |= {
    "nvfp4_w4a4": ("nvfp4", {}),
    "mxfp4_w4a4": ("mxfp4", {}),
    "mxfp4_w4a8": ("mxfp4", {"act_bits": 8}),
    "fp8_w8a8": ("fp8", {}),
}
# One of each kind, for the tests of every change.
OFTEN = {
    "deit_t",
    "deit_t_distilled",
    "vit_tiny_demo",
    "resnet_tiny_demo",
    "swin_t",
    "swinv2_t",
    "eva02_t",
}
# Queries and keys of these are rotated or normalized.
NO_QKR = {"eva02_t", "swinv2_t"}
# A recipe of each kind; what a net makes of it does not depend on the bits.
KINDS = ("fp", "ofq_2bit", "ofq_noqkr_2bit", "lsq_2bit", "seq_2bit", "minmax_8bit")


def one_block(model):
    """Overrides for the smallest net of a family."""
    stages = {"swin": "depths", "resnet": "layers"}
    kind = next((kind for kind in stages if model.startswith(kind)), None)
    return f"++model.args.{stages[kind]}=[1,1,1,1]" if kind else "++model.args.depth=1"


def whole(config, *overrides):
    cfg = compose(config, *overrides, "run_dir=a")
    assert not OmegaConf.missing_keys(cfg)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("group", "choice"), [(g, c) for g in sorted(CHOOSERS) for c in choices(g)]
)
def test_every_choice_of_many_composes(group, choice):
    needs_a_model = (
        ("model=deit_t",) if choice.startswith(("ofq_", "evolq_")) and group == "experiment" else ()
    )
    whole("ptq" if choice.startswith("evolq_") else "train", f"{group}={choice}", *needs_a_model)


GROUPS_OF = {
    "train": [g for g in GROUPS if g not in CHOOSERS | ELSEWHERE],
    "eval": ["model", "data", "trainer", "logger"],
    "ptq": ["ptq", "search"],
    "analyze": ["analysis"],
    "export": ["format"],
}


def rows(groups):
    """The n-th choice of each group, for as many n as the longest group has choices."""
    columns = [[f"{group}={choice}" for choice in choices(group)] for group in groups]
    for n in range(max(len(column) for column in columns)):
        yield [column[n % len(column)] for column in columns]


@pytest.mark.sample(12)
@pytest.mark.parametrize(
    ("config", "row"),
    [(config, row) for config, groups in GROUPS_OF.items() for row in rows(groups)],
)
def test_every_choice_composes(config, row):
    whole(config, *row)


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("model", "quant"),
    [
        *(
            pytest.param(m, q, marks=() if m in OFTEN else pytest.mark.long)
            for m, q in itertools.product(choices("model"), KINDS)
        ),
        *(("vit_tiny_demo", q) for q in choices("quant") if q not in KINDS),
    ],
)
def test_every_recipe_fits_every_model(model, quant):
    cfg = compose("train", f"model={model}", f"quant={quant}", one_block(model), "run_dir=a")
    start = build.build_start(cfg)
    recipe = build.build_recipe(cfg)
    if model in NO_QKR and recipe.attention == "qkr":
        with usage_error("quant.attention='qkr': this model (normalizes|rotates) queries and keys"):
            qat.convert(start.net, recipe, input_size=(1, 8, 8))
        return
    qat.convert(start.net, recipe, input_size=(1, 8, 8))
    roles = {site.role for site in qat.iter_quantizers(start.net)}
    expected = {
        "float": set() if quant == "fp" else {"weight", "input", "image"},
        "qkr": {"weight", "input", "v", "k", "qk", "probs", "image"},
        "standard": {"weight", "input", "q", "k", "v", "probs", "image"},
    }
    # A pooling by attention has a learnt query of its own.
    pooled = {"q"} if model == "siglip_b" and recipe.attention == "qkr" else set()
    present = (
        {"weight", "input", "image"}
        if model.startswith("resnet")
        else {"weight", "input", "image", *expected[recipe.attention]}
    )
    assert roles == (expected[recipe.attention] & present) | pooled


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", choices("quant"))
def test_a_quant_file_has_all_knobs_and_is_the_recipe_of_its_name(name):
    knobs = OmegaConf.to_container(
        compose("train", f"quant={name}", "run_dir=a").quant, resolve=True
    )
    assert set(knobs) == {f.name for f in dataclasses.fields(qat.QuantRecipe)} - {"rule_bits"}
    preset, settings = RECIPES[name]
    assert qat.QuantRecipe(**knobs) == qat.recipe(preset, **settings) == qat.recipe(name)
    assert preset in {"fp", "fp8"} or qat.recipe(name, bits=4, act_bits=4).bits == 4


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", choices("trainer"))
def test_trainer_keys_are_lightnings(name):
    cfg = compose("train", f"trainer={name}", "run_dir=a")
    assert set(cfg.trainer) <= set(inspect.signature(Trainer).parameters)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", choices("data"))
def test_data_files_have_all_settings(name):
    cfg = compose("train", f"data={name}", "run_dir=a").data
    assert set(cfg) == {f.name for f in dataclasses.fields(get_class(cfg._target_).SETTINGS)} | {
        "_target_"
    }


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", choices("loss"))
def test_every_loss_trains(tmp_path, float_run, name):
    run = train(tmp_path / "run", f"loss={name}", f"ckpt={float_run}/checkpoints/last.ckpt")
    assert results(run)["top1"] is not None


@pytest.mark.sample(1)
@pytest.mark.parametrize("debug", choices("debug"))
def test_debug_configs_run(tmp_path, debug):
    run = train(tmp_path / "run", f"debug={debug}")
    assert not list(run.rglob("*.ckpt"))


ELSEWHERE_RUN = (
    "ofq_",
    "evolq_",
    "cifar10_",
)  # tests/tasks/test_recipes.py, tests/tasks/test_search.py, tests/system/test_docs.py


@pytest.mark.parametrize(
    "name", [name for name in choices("experiment") if not name.startswith(ELSEWHERE_RUN)]
)
def test_experiments_run(tmp_path, float_run, name):
    start = (
        [f"ckpt={float_run}/checkpoints/last.ckpt"]
        if "kd" in compose("train", f"experiment={name}").loss.terms
        else []
    )
    small = ("trainer.fast_dev_run=true", *(o for o in TINY if "model.args" in o), *start)
    run = train(tmp_path / "run", f"experiment={name}", *small, "trainer.max_epochs=60")
    assert results(run)["weights"] == "final"
