"""`qat.transform`. Oracles: the tensors that a dataset's own test loader gives, and timm's own evaluation transform."""

import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import qat
from examples import classify
from examples.classify import prepare
from qat.data import Digits, sources
from qat.data.image_transform import data_settings
from qat.export.onnx_file import preprocessing
from qat.model.transform import data_config
from tests.conftest import train
from tests.data.files import DIGITS, write_folder, write_image
from tests.errors import usage_error

NETS = {
    "grey": {"img_size": 16, "in_chans": 1, "num_classes": 3},
    "colour": {"img_size": 32},
    "own size": {},
}


def net(name="deit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, depth=1, **kwargs).eval()


def saved(tmp_path, model, **options):
    qat.save(model, tmp_path / "net.ckpt", **options)
    return qat.load(tmp_path / "net.ckpt")


def test_digits_as_the_loader_has_them(run_4bit):
    loaded = qat.load(run_4bit / "checkpoints" / "best.ckpt")
    data = Digits()
    pixels = data.split("test").images
    wanted = torch.cat([images for images, _ in data.test_dataloader()])
    made = [qat.transform(loaded)(image) for image in pixels]
    assert torch.equal(torch.stack(made), wanted)
    assert made[0].dtype == torch.float32


def test_the_data_of_a_run_are_kept_by_load_and_save(tmp_path):
    root = write_folder(tmp_path / "root")
    size = ("data.image_size=16", "data.patch_size=8", "data.num_workers=0", "data.batch_size=8")
    photos = ("data=imagefolder", f"data.root={root}", "data.num_classes=2", *size)
    run = train(tmp_path / "run", *photos, "quant=fp")
    loaded = qat.load(run / "checkpoints" / "last.ckpt")
    image = write_image(tmp_path / "x.png", 40, 30)
    assert torch.equal(qat.transform(saved(tmp_path, loaded))(image), qat.transform(loaded)(image))


@pytest.mark.sample(2)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_without_data_it_is_timms_own(tmp_path, name, quantized):
    model = net(**NETS[name])
    chans, size = NETS[name].get("in_chans", 3), NETS[name].get("img_size", 224)
    if quantized:
        qat.convert(model, qat.recipe("lsq", bits=4), input_size=(chans, size, size))
    config = timm.data.resolve_data_config(
        {"input_size": (3, size, size)}, pretrained_cfg=model.pretrained_cfg
    )
    if chans == 1:
        config |= {
            "input_size": (1, size, size),
            "mean": [sum(config["mean"]) / 3],
            "std": [sum(config["std"]) / 3],
        }
    image = Image.open(write_image(tmp_path / "x.png", 300, 260)).convert(
        "L" if chans == 1 else "RGB"
    )
    wanted = timm.data.create_transform(**config)(image)
    assert torch.equal(qat.transform(model)(image), wanted)
    assert torch.equal(qat.transform(saved(tmp_path, model))(tmp_path / "x.png"), wanted)


def test_what_data_says_comes_before_timm(tmp_path):
    model = saved(
        tmp_path, net(img_size=16), data={"mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": None}
    )
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    wanted = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    found = qat.transform(model)(pixels)
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=1e-7
    )  # a division by 255 rounds otherwise than a multiplication
    assert torch.equal(qat.transform(saved(tmp_path, model))(pixels), found)


def test_a_model_of_transformers_takes_images_as_its_data_say(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    with usage_error("does not record how its images are prepared"):
        qat.transform(saved(tmp_path, model, data={"image_size": 8}))
    data = {"image_size": 8, "mean": [0.0] * 3, "std": [1.0] * 3}
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    found = qat.transform(saved(tmp_path, model, data=data))(pixels)
    wanted = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)


def test_a_wrong_image_is_named(tmp_path):
    apply = qat.transform(net(img_size=16))
    (tmp_path / "x.png").write_bytes(b"nothing")
    with usage_error("x.png cannot be decoded"):
        apply(tmp_path / "x.png")
    with usage_error("float32"):
        apply(np.zeros((8, 8, 3), np.float32))


def test_a_dataset_from_elsewhere_is_not_imported(tmp_path):
    model = saved(tmp_path, net(img_size=16), data={**DIGITS, "_target_": "antigravity.Digits"})
    with usage_error("antigravity.Digits"):
        qat.transform(model)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["vit_small_patch16_224.dino", "vit_base_patch16_clip_224.openai"])
def test_a_tag_keeps_its_images_in_files(tmp_path, name):
    net = timm.create_model(name, num_classes=5, depth=1, embed_dim=48, num_heads=3, img_size=32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
    qat.save(net, tmp_path / "net.ckpt")
    qat.save_pretrained(net, tmp_path / "shared")
    for again in (qat.load(tmp_path / "net.ckpt"), qat.from_pretrained(tmp_path / "shared")):
        assert again.pretrained_cfg["tag"] == name.partition(".")[2]
        assert torch.equal(qat.transform(again)(image), qat.transform(net)(image))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("share", [1.0, 0.9, 1.15])
def test_every_crop_is_timms(mode, share):
    net = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=1)
    net.pretrained_cfg = {**net.pretrained_cfg, "crop_mode": mode, "crop_pct": share}
    treatment = preprocessing(data_settings(data_config(net)))
    for size in ((260, 300), (90, 333), (500, 224)):
        image = Image.fromarray(
            np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
        )
        expected = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))(image)
        assert torch.equal(qat.transform(net)(image), expected)
        assert np.array_equal(prepare(image, **treatment)[0], expected.numpy())


def test_the_example_opens_what_data_opens():
    assert classify.FORMATS == sources.FORMATS


@pytest.mark.parametrize(("dtype", "value"), [("int32", 2**16), ("int32", -1), ("float32", 0.5)])
def test_the_example_refuses_32_bits_as_data_does(dtype, value):
    image = Image.fromarray(np.full((8, 8), value, dtype))
    with pytest.raises(SystemExit, match="32 bits per pixel") as stop:
        prepare(image, 8, [0.5], [0.5], "bicubic", None)
    with pytest.raises(ValueError, match="32 bits per pixel") as refusal:
        sources.to_pixels(image, 1)
    assert str(stop.value).endswith(str(refusal.value).removeprefix("it has"))
