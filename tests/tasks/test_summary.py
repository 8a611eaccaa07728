"""The first lines of a run. Oracle: the conversion report."""

import re

import pytest
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import nn

import qat
from qat.data import Digits, ImageFolder
from qat.model.cost import cost, matmuls
from qat.tasks import build, summary
from qat.tasks.conf import display_name
from tests.conftest import compose
from tests.report.pages import cells
from tests.tasks.test_evaluate import DIGITS
from tests.tiny import SIZE, converted, quantized, vit


@pytest.mark.parametrize(
    ("preset", "knobs", "widths", "of_products"),
    [
        ("ofq", {"bits": 2}, ["2 bit", "8 bit", "float"], "2 bit"),
        ("lsq", {"bits": 3, "act_bits": 4}, ["3 bit", "4 bit", "8 bit", "float"], "4 bit"),
        ("statsq", {"bits": 4}, ["4 bit", "8 bit", "float"], "float"),
    ],
)
def test_shares_of_weights_and_products(tmp_path, preset, knobs, widths, of_products):
    net = converted(preset, **knobs)
    text = summary.write_conversion(net, tmp_path)
    title, *table = text.splitlines()
    assert title == "quantized"
    rows = cells(text)
    assert rows[0] == ["share of", "weights", "products"]
    shares = {name: re.findall(r"[\d.]+", " ".join(cells)) for name, *cells in rows[1:]}
    assert list(shares) == widths

    # Blocks have `bits`, everything else 8 bits or none; QKR drops biases, 0.5 % of all weights.
    blocks = sum(m.weight.numel() for m in vit().blocks.modules() if isinstance(m, nn.Linear))
    expected = 100 * blocks / sum(p.numel() for p in vit().parameters())
    assert float(shares[f"{knobs['bits']} bit"][0]) == pytest.approx(expected, abs=0.6)
    ends = sum(p.macs for p in matmuls(net, SIZE) if max(p.bits) == 8)
    total = cost(net, SIZE).macs
    assert float(shares["8 bit"][1]) == pytest.approx(100 * ends / total, abs=0.06)
    assert float(shares[of_products][1]) > 90
    for column in (0, 1):
        assert sum(float(row[column]) for row in shares.values()) == pytest.approx(100, abs=0.3)

    assert "blocks.*.norm* (LayerNorm) x4" in table[-2]
    rows = qat.conversion_report(net).rows
    assert len((tmp_path / "conversion.txt").read_text().splitlines()) > len(rows)


IMAGENET_MEAN = "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, f"16 x 16, center crop 0.9, bicubic, {IMAGENET_MEAN}"),
        (
            {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
            f"16 x 16, squash crop 1, bilinear, {IMAGENET_MEAN}",
        ),
        (
            {"mean": [0.5] * 3, "std": [0.25] * 3},
            "16 x 16, center crop 0.9, bicubic, mean 0.5 0.5 0.5, std 0.25 0.25 0.25",
        ),
    ],
)
def test_images_in_words(settings, text):
    given = {"image_size": 16, "patch_size": 8, "in_chans": 3, "num_classes": 3}
    photos = ImageFolder(**given, **{"mean": None, "std": None, **settings})
    assert summary.describe_images(photos.settings) == text
    assert summary.describe_images(photos.settings, ["mean"]) == f"{text}; assumed: mean"
    digits = Digits(**DIGITS).settings
    assert summary.describe_images(digits).startswith("8 x 8, whole image, bicubic, mean 0.305")


ALL = ["crop_pct", "interpolation", "mean", "std"]


@pytest.mark.parametrize(
    ("typed", "stored", "assumed"),
    [
        ("", None, []),
        ("model.pretrained=true", None, []),
        ("ckpt=f", None, ALL),
        ("model.weights=f", None, ALL),
        ("ckpt=f", {"mean": [0.5]}, ["crop_pct", "interpolation", "std"]),
        ("ckpt=f", {"_target_": "qat.data.Digits"}, []),
        ("ckpt=f data.mean=[0.5,0.5,0.5]", None, ["crop_pct", "interpolation", "std"]),
        ("ckpt=f data=cifar10 data.num_classes=10", None, ALL),
    ],
)
def test_what_no_file_states_of_images_is_assumed(typed, stored, assumed):
    photos = ("data=imagefolder", "data.num_classes=3")
    cfg = compose("train", "run_dir=a", *photos, *typed.split())
    net = nn.Identity()
    net.qat_data = stored
    assert summary.assumed_settings(cfg, cfg.data, net, build.build_data(cfg)) == assumed


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
    data = summary.describe_data(Digits(**DIGITS))
    assert data == "digits: 1257 train, 180 val, 360 test images, 10 classes"


OF_64 = "41 of 1257 images left out of each"


@pytest.mark.parametrize(
    ("typed", "steps", "is_short"),
    [
        # 1,257 images: 19 batches of 64 and 41 more; 2 of 512 and 233 more.
        ("", f"30 epochs x 19 steps, {OF_64}", False),
        ("data.batch_size=512", "30 epochs x 2 steps, 233 of 1257 images left out of each", True),
        ("data.batch_size=419", "30 epochs x 3 steps", True),
        ("data.batch_size=2048", "30 epochs x 1 step", True),
        ("trainer.accumulate_grad_batches=4", f"30 epochs x 5 steps, {OF_64}", False),
        ("trainer.limit_train_batches=3", "30 epochs x 3 steps", False),
        ("trainer.limit_train_batches=0.5", "30 epochs x 9 steps", False),
        ("trainer.fast_dev_run=true", "1 epoch x 1 step", False),
        ("trainer.fast_dev_run=4", "1 epoch x 4 steps", False),
    ],
)
def test_steps_and_unused_images_are_counted(caplog, typed, steps, is_short):
    cfg = compose("train", "run_dir=a", *typed.split())
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    assert summary.describe_training(cfg, build.build_data(cfg), trainer) == steps
    warnings = [line for line in caplog.messages if line.startswith("data.batch_size=")]
    assert len(warnings) == is_short
    assert all("training step" in line for line in warnings)


@pytest.mark.parametrize(
    ("typed", "warns"),
    [
        ("", True),
        ("trainer.fast_dev_run=true", False),
        ("model.weights=float.safetensors", False),
        ("ckpt=float.safetensors", False),
    ],
)
def test_quantized_training_from_random_weights_is_warned_of(
    tmp_path, monkeypatch, caplog, typed, warns
):
    monkeypatch.chdir(tmp_path)
    cfg = compose("train", "run_dir=a", *typed.split())
    weights = build.from_scratch(cfg.model.name, build.model_args(cfg)).net.state_dict()
    save_file(weights, "float.safetensors")
    is_dry_run = bool(cfg.trainer.fast_dev_run)
    summary.warn_of_random_weights(build.build_start(cfg), is_dry_run=is_dry_run)
    assert ("train with quant=fp first" in caplog.text) == warns


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
    assert display_name("vit_tiny_patch16_224", demo) == "vit_tiny_demo (vit_tiny_patch16_224)"
    assert (
        display_name("vit_tiny_patch16_224", demo | {"depth": 6})
        == display_name("vit_tiny_patch16_224", {})
        == "vit_tiny_patch16_224"
    )


@pytest.mark.parametrize(
    ("top1", "images", "share", "says"),
    [(43.33, 60, 40.0, True), (53.0, 60, 40.0, False), (43.33, 6000, 40.0, False)],
)
def test_scores_say_where_nothing_may_be_learned(top1, images, share, says):
    # Two standard errors of 40 % of 60 images: 2 * sqrt(40 * 60 / 60) = 12.65.
    found = summary.score_texts({
        "top1": top1,
        "top5": None,
        "images": images,
        "majority_share": share,
    })
    note = "not clearly better than always predicting the most frequent class, which gives 40.00 %"
    assert found == {"top-1": f"{top1:.2f} %"} | ({"note": note} if says else {})
