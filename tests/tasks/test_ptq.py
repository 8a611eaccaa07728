"""`ptq.py`: a float checkpoint in, a quantized one out. Oracle: `qat.load` of the file, counted here, and the float net it came from."""

import dataclasses
import shutil

import pytest
import torch

import qat
from qat.data import Digits
from qat.model.ptq_spec import TRAINING_KNOBS
from qat.tasks import build
from qat.tasks.ptq_start import build_ptq_recipe
from qat.tasks.results import recipe_fields
from tests.conftest import TINY, compose, contents, results, tiny, train
from tests.data.files import write_folder
from tests.system.test_configs import choices
from tests.tasks.test_evaluate import DIGITS, counted, last
from tests.tiny import identical

SMALL = ("data.calibration_images=60", "ptq.batch=20")
MODEL = ("model=vit_tiny_demo", *(o for o in TINY if "model.args" in o))


def quantize(run_dir, *overrides):
    """Quantize, and return the results."""
    from qat.tasks.ptq import ptq as task

    task(compose("ptq", f"run_dir={run_dir}", *overrides))
    return results(run_dir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A float net that reads digits."""
    size = (
        "++model.args.embed_dim=48",
        "++model.args.depth=2",
        "data.augment=none",
        "optimizer.lr=2e-3",
        "trainer.max_epochs=2",
    )
    return train(
        tmp_path_factory.mktemp("trained") / "run",
        "quant=fp",
        *size,
        "trainer.limit_train_batches=1.0",
    )


@pytest.fixture(scope="module")
def quantized_run(tmp_path_factory, trained):
    """Its 4-bit twin."""
    run = tmp_path_factory.mktemp("quantized") / "run"
    quantize(run, f"ckpt={last(trained)}", "ptq=fqvit_w4a8")
    return run


def test_what_a_run_leaves_behind(quantized_run, trained):
    found = results(quantized_run)
    assert {p.name for p in quantized_run.iterdir()} >= {
        "quantized.ckpt",
        "results.json",
        "config.yaml",
        "conversion.txt",
    }
    expected = {
        "command": "ptq",
        "quant": "fqvit_w4a8",
        "data": "digits",
        "split": "test",
        "weights": str(last(trained)),
        "model": "vit_tiny_patch16_224",
    }
    assert expected.items() <= found.items()
    assert {"images": 1000, "batches": 10, "seed": 0}.items() <= found["calibration"].items()
    table = (quantized_run / "conversion.txt").read_text().replace("│", " ")
    rows = [line.split() for line in table.splitlines()]
    assert ["blocks.1.attn.qkv", "weight", "affine", "4", "0", "144", "none"] in rows


def test_its_numbers_are_those_of_the_two_nets(quantized_run, trained):
    found = results(quantized_run)
    theirs, ours = (
        qat.load(last(trained)).state_dict(),
        qat.load(quantized_run / "quantized.ckpt").state_dict(),
    )
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    top1, loss = counted(qat.load(quantized_run / "quantized.ckpt"), Digits(**DIGITS))
    assert found["top1"] == pytest.approx(top1)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["top1_fp"] == pytest.approx(counted(qat.load(last(trained)), Digits(**DIGITS))[0])


def test_deviates_from_reference_calibration_images_do_not_depend_on_the_model(
    monkeypatch, tmp_path
):
    # There they are drawn by a generator that has made the weights before.
    from qat.tasks import ptq as module

    seen = []
    monkeypatch.setattr(
        module,
        "calibration_batches",
        lambda *args, made=module.calibration_batches: seen.append(made(*args)) or seen[-1],
    )
    for depth in (1, 2):
        quantize(
            tmp_path / str(depth), *MODEL, *SMALL, f"++model.args.depth={depth}", "ptq=minmax_w8a8"
        )
    assert identical(*seen)


@pytest.mark.long
@pytest.mark.parametrize("quant", ["ofq_4bit", "fp"])
def test_training_starts_from_the_file(tmp_path, quantized_run, trained, quant):
    start = build.build_start(
        tiny(tmp_path, *size(), f"quant={quant}", f"ckpt={quantized_run}/quantized.ckpt")
    )
    theirs = qat.load(last(trained)).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in start.net.state_dict().items())
    run = train(tmp_path / "run", *size(), f"quant={quant}", f"ckpt={quantized_run}/quantized.ckpt")
    assert results(run)["quant"] == quant
    assert results(run)["top1"] is not None


def size():
    """The trained net's."""
    return ("++model.args.embed_dim=48", "++model.args.depth=2")


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", [name for name in choices("ptq") if name != "keep"])
def test_a_file_has_all_knobs_and_the_name_that_results_give_it(name):
    cfg = compose("ptq", f"ptq={name}", "run_dir=a")
    others = {*TRAINING_KNOBS, "rule_bits"}
    assert set(cfg.ptq) == {f.name for f in dataclasses.fields(qat.PtqRecipe)} - others | {
        "batch",
        "reconstruct",
    }
    assert recipe_fields(build_ptq_recipe(cfg))["quant"] == name


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "typed",
    [
        "ptq=fqvit_integer_w4a8",
        "ptq=fqvit_w4a4 ptq.softmax_bits=3",
        "model=deit_t_distilled ++model.args.depth=1 ptq.overrides={head:{bits:8}}",
        pytest.param(
            "model=swin_t ++model.args.depths=[1,1,1,1] trainer.limit_test_batches=1",
            marks=pytest.mark.long,
        ),
    ],
)
def test_other_recipes_and_models(tmp_path, typed):
    model = () if typed.startswith("model=") else MODEL
    found = quantize(tmp_path, *model, *SMALL, *typed.split())
    assert qat.load(tmp_path / "quantized.ckpt") is not None
    assert found["loss"] == found["loss"]
    assert found["weights"] == "random"


MISTAKES = {
    "ptq.bits=9": "ptq.bits=9: must be an integer from 2 to 8",
    "+ptq.colour=red": "ptq.colour: must be one of name, bits",
    "ptq.reconstruct=3": "ptq.reconstruct=3: must be a group of settings",
    "ptq=compensate_w4a4 ptq.reconstruct.steps=9": "ptq.reconstruct.steps=9: is used only if ptq.method is reconstruct, as in ptq=reconstruct_w4a4; here it is compensate",
    "ptq=keep +ptq.reconstruct.lr=1": "ptq.reconstruct.lr=1: is used only if ptq.method is reconstruct, as in ptq=reconstruct_w4a4; here it is keep",
    "trainer.precision=bf16-true": "trainer.precision='bf16-true': would round the float weights, which are kept; must be one of 32-true, bf16-mixed, 16-mixed",
    "ptq.batch=0": "ptq.batch=0: must be an integer of at least 1",
    "data.calibration_images=50": "data.calibration_images=50: less than one batch; must be an integer of at least ptq.batch=100",
    "ptq.batch=2000 data.calibration_images=2000": "ptq.batch=2000: the data have 1257 training images",
    "ptq.overrides={nothing:{bits:8}}": "ptq.overrides['nothing']: must match a quantized module",
    "ckpt=missing.ckpt": "ckpt='missing.ckpt': no such file",
    "resume=maybe": "resume='maybe': must be one of false, true, auto",
    "resume=true": "has no search.ckpt and no reconstruct.ckpt; use resume=auto to start a new run in that case",
    "search=evolution search.passes=0": "search.passes=0: must be an integer of at least 1",
    "+search.colour=red": "search.colour: must be one of passes, cycles",
    "search=evolution search.reference_selection=no": "search.reference_selection='no': must be true or false",
    "ptq=reconstruct_w4a4 ptq.reconstruct.batch=1001": "ptq.reconstruct.batch=1001: must be at most the number",
    "ptq=reconstruct_w4a4 +ptq.reconstruct.rate=1": "ptq.reconstruct.rate: must be one of steps",
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_are_one_line(tmp_path, float_run, refused, typed):
    given = (f"ckpt={last(float_run)}", f"run_dir={tmp_path}/run", *typed.split())
    assert MISTAKES[typed] in refused(compose("ptq", *given))
    assert not (tmp_path / "run" / "quantized.ckpt").exists()


def test_a_directory_with_a_result_is_not_overwritten(
    tmp_path, refused, float_run, trained, quantized_run
):
    run = tmp_path / "run"
    shutil.copytree(quantized_run, run)
    before = (run / "quantized.ckpt").read_bytes()
    arguments = (f"run_dir={run}", f"ckpt={last(float_run)}", *SMALL)
    assert (
        "contains quantized.ckpt already; choose another run_dir or set overwrite=true"
        in refused(compose("ptq", *arguments))
    )
    assert (run / "quantized.ckpt").read_bytes() == before
    other = (f"run_dir={run}", f"ckpt={last(trained)}", "ptq=fqvit_w4a4", "resume=auto")
    assert "ptq.act_bits=4 (the run had 8)" in refused(compose("ptq", *other))
    assert (run / "quantized.ckpt").read_bytes() == before
    (run / "results.json").unlink()
    assert "contains quantized.ckpt already" in refused(compose("export", *arguments[:2]))
    (run / "search.ckpt").touch()  # of the older run
    quantize(run, *arguments[1:], "overwrite=true")
    assert (run / "quantized.ckpt").read_bytes() != before
    assert not (run / "search.ckpt").exists()


@pytest.mark.parametrize("typed", ["", "overwrite=true", "resume=auto"])
def test_a_directory_of_training_is_refused(tmp_path, refused, float_run, typed):
    run = tmp_path / "run"
    shutil.copytree(float_run, run)
    before = contents(run)
    line = refused(compose("ptq", f"run_dir={run}", f"ckpt={last(float_run)}", *typed.split()))
    assert line.endswith("/best.ckpt already; choose another run_dir")
    assert contents(run) == before


def test_images_without_splits_are_split(tmp_path, quantized_run):
    root = write_folder(tmp_path, (("train", 60),), classes=("a", "b", "c")) / "train"
    settings = ("model=vit_tiny_demo", "data=imagefolder", f"data.root={root}")
    sizes = ("data.num_classes=3", "data.image_size=16", "data.calibration_images=4", "ptq.batch=4")
    quantize(tmp_path / "run", *settings, *sizes, "ptq=minmax_w8a8")
    assert results(tmp_path / "run")["split"] == "val"
