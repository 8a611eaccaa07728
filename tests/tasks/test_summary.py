"""The first lines of a run. Oracle: the report that they condense."""

import re

import pytest
from lightning.pytorch import Trainer
from safetensors.torch import save_file

import qat
from qat.data import Digits
from qat.tasks import build, summary
from qat.tasks.conf import alias
from tests.conftest import compose
from tests.tasks.test_evaluate import DIGITS
from tests.tiny import converted, quantized


def test_quantizers_are_counted(tmp_path):
    net = converted("ofq", bits=2)
    text = summary.conversion(net, tmp_path)
    rows = qat.conversion_report(net).rows
    assert sum(map(int, re.findall(r" x(\d+)", text.splitlines()[1]))) == len(rows)
    assert "statsq 2 bit (qk) x2" in text
    assert "blocks.*.norm* (LayerNorm) x4" in text
    assert len((tmp_path / "conversion.txt").read_text().splitlines()) > len(rows)


def test_recipe_in_words():
    text = summary.describe_recipe(
        qat.recipe("ofq", bits=2, act_bits=3, overrides={"blocks.0.*": {"bits": 4}})
    )
    for part in (
        "weights 2 bit statsq",
        "activations 3 bit lsq",
        "attention qkr (query bias: drop)",
        "stem 8 bit",
        "1 override",
    ):
        assert part in text
    assert "query bias" not in summary.describe_recipe(qat.recipe("lsq"))


def test_data_in_words():
    assert (
        summary.describe_data(Digits(**DIGITS))
        == "digits: 1257 train, 180 val, 360 test images, 10 classes"
    )


@pytest.mark.parametrize(
    ("changes", "steps", "is_short"),
    [
        # 1,257 images: 19 batches of 64 and 41 more; 2 of 512 and 233 more.
        ({}, "30 epochs x 19 steps, 41 of 1257 images left out of each", False),
        (
            {"data.batch_size": 512},
            "30 epochs x 2 steps, 233 of 1257 images left out of each",
            True,
        ),
        ({"data.batch_size": 419}, "30 epochs x 3 steps", True),
        ({"data.batch_size": 2048}, "30 epochs x 1 step", True),
        (
            {"trainer.accumulate_grad_batches": 4},
            "30 epochs x 5 steps, 41 of 1257 images left out of each",
            False,
        ),
        ({"trainer.limit_train_batches": 3}, "30 epochs x 3 steps", False),
        ({"trainer.limit_train_batches": 0.5}, "30 epochs x 9 steps", False),
        (
            {"trainer.max_epochs": 1, "trainer.fast_dev_run": True},
            "1 epoch x 19 steps, 41 of 1257 images left out of each",
            False,
        ),
    ],
)
def test_steps_and_unused_images_are_counted(caplog, changes, steps, is_short):
    cfg = compose("train", "run_dir=a", *(f"{name}={value}" for name, value in changes.items()))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    assert summary.describe_training(cfg, build.build_data(cfg), trainer) == steps
    warnings = [line for line in caplog.messages if line.startswith("data.batch_size=")]
    assert len(warnings) == is_short
    assert all("training step" in line for line in warnings)


@pytest.mark.parametrize(
    ("overrides", "warns"),
    [
        ((), True),
        (("trainer.fast_dev_run=true",), False),
        (("model.weights=float.safetensors",), False),
        (("ckpt=float.safetensors",), False),
    ],
)
def test_quantized_training_from_random_weights_is_warned_of(
    tmp_path, monkeypatch, caplog, overrides, warns
):
    monkeypatch.chdir(tmp_path)
    cfg = compose("train", "run_dir=a", *overrides)
    weights = build.from_scratch(cfg.model.name, build.model_args(cfg)).net.state_dict()
    save_file(weights, "float.safetensors")
    summary.warn_of_random_weights(cfg, build.build_start(cfg))
    assert ("train with quant=fp first" in caplog.text) == warns


def test_model_in_words():
    net = converted("fp")
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert re.fullmatch(
        rf"tiny, {millions:.2f} M parameters, images 1 x 8 x 8",
        summary.describe_model("tiny", net, (1, 8, 8)),
    )


def test_a_size_says_of_which_file():
    assert summary.describe_size(converted("fp"), 1_802_152) == "1.8 MB of float weights"
    net = quantized("ofq", bits=2)
    assert re.fullmatch(
        r"packed size 190 kB \(`.*export.* format=packed` writes the file\)",
        summary.describe_size(net, 190_236),
    )
    assert summary.describe_size(qat.freeze(net), 182_360) == "packed size 182 kB"


def test_a_net_of_digits_has_its_alias():
    demo = {
        "img_size": 8,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "global_pool": "avg",
        "class_token": False,
    }
    assert alias("vit_tiny_patch16_224", demo) == "vit_tiny_demo (vit_tiny_patch16_224)"
    assert (
        alias("vit_tiny_patch16_224", demo | {"depth": 6})
        == alias("vit_tiny_patch16_224", {})
        == "vit_tiny_patch16_224"
    )


@pytest.mark.parametrize(
    ("top1", "images", "share", "says"),
    [(43.33, 60, 40.0, True), (53.0, 60, 40.0, False), (43.33, 6000, 40.0, False)],
)
def test_scores_say_where_nothing_may_be_learned(top1, images, share, says):
    # Two standard errors of 40 % of 60 images: 2 * sqrt(40 * 60 / 60) = 12.65.
    found = summary.scores({"top1": top1, "top5": None, "images": images, "majority_share": share})
    note = "not clearly better than always predicting the most frequent class, which gives 40.00 %"
    assert found == {"top-1": f"{top1:.2f} %"} | ({"note": note} if says else {})


def test_lines_are_aligned():
    assert summary.lines("title", {"a": "1", "long": "2"}) == "title\n  a     1\n  long  2"
