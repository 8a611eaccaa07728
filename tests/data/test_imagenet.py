"""ImageNet's folders. Oracle: timm's own evaluation transform for the model."""

import pytest
import timm
import timm.data
import torch
from PIL import Image

import qat
from qat.data import ImageNet
from qat.tasks import build
from tests.conftest import compose, evaluate, results, train
from tests.data.files import write_folder, write_image

WNIDS = ("n01440764", "n01443537", "n01484850")
SMALL = ("data.num_classes=3", "data.num_workers=0", "data.batch_size=8")


def folder(root, val="val"):
    return write_folder(root, (("train", 4), (val, 3)), classes=WNIDS)


@pytest.mark.parametrize("val", ["val", "validation"])
@pytest.mark.parametrize(("model", "mean"), [("deit_t", 0.485), ("vit_s", 0.5)])
def test_evaluation_is_what_the_models_weights_expect(tmp_path, val, model, mean):
    root = folder(tmp_path, val)
    cfg = compose("train", "data=imagenet", f"model={model}", *SMALL, f"data.root={root}", "run_dir=a")
    data = build.build_data(cfg)
    assert data.settings.mean[0] == mean
    assert data.input_size == (3, 224, 224)
    images, labels = zip(*data.val_dataloader(), strict=True)
    options = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(cfg.model.name).to_dict())
    transform = timm.data.create_transform(**options)
    paths = [p for wnid in WNIDS for p in sorted((root / val / wnid).iterdir())]
    expected = torch.stack([transform(Image.open(p).convert("RGB")) for p in paths])
    torch.testing.assert_close(torch.cat(images), expected, rtol=0, atol=1e-6)
    assert torch.cat(labels).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_what_is_set_is_not_the_models(tmp_path):
    changes = ["data.crop_pct=0.8", "data.interpolation=bilinear", "data.mean=[0.1,0.2,0.3]", "data.std=[1,1,1]"]
    settings = build.build_data(compose("train", "data=imagenet", "model=vit_s", *changes, f"data.root={tmp_path}")).settings
    assert (settings.crop_pct, settings.interpolation) == (0.8, "bilinear")
    assert (list(settings.mean), list(settings.std)) == ([0.1, 0.2, 0.3], [1, 1, 1])


@pytest.mark.parametrize("model", [None, "no_model_of_timm"])
def test_without_a_pretrained_config_it_is_imagenets_and_said(tmp_path, caplog, model):
    settings = {"image_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 3, "mean": None, "std": None}
    data = ImageNet(**settings, root=str(tmp_path), model=model)
    assert (data.settings.crop_pct, data.settings.interpolation) == (0.9, "bicubic")
    assert data.settings.mean == (0.485, 0.456, 0.406)
    assert data.settings.std == (0.229, 0.224, 0.225)
    assert f"data.model={model!r} has no pretrained config" in caplog.text


def test_grey_images_take_the_mean_of_the_channels(tmp_path):
    settings = {"image_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "mean": None, "std": None}
    assert ImageNet(**settings, root=str(tmp_path)).settings.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])


def test_names_that_are_no_wnids_are_refused(tmp_path):
    write_image(folder(tmp_path) / "train" / "tench" / "a.png", 12, 12)
    settings = {"image_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 4, "mean": None, "std": None}
    with pytest.raises(qat.UsageError, match=rf"{tmp_path}/train/tench: is no wnid like n01440764; .*data=imagefolder"):
        ImageNet(**settings, root=str(tmp_path)).train_dataloader()


def test_validation_images_without_folders_are_refused(tmp_path):
    root = write_folder(tmp_path, (("train", 4),), classes=WNIDS)
    write_image(root / "val" / "ILSVRC2012_val_00000001.JPEG", 12, 12)
    settings = {"image_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 3, "mean": None, "std": None}
    with pytest.raises(qat.UsageError, match=rf"{tmp_path}/val: holds no class folders; images have to lie in val/<class>/"):
        ImageNet(**settings, root=str(tmp_path)).train_dataloader()


def test_a_net_trains(tmp_path):
    root = folder(tmp_path / "data")
    run = train(tmp_path / "run", "data=imagenet", "data.image_size=32", "data.patch_size=16", *SMALL, f"data.root={root}")
    assert results(run)["split"] == "val"
    # The file holds the model's name, so its mean and crop are the same when it is evaluated.
    assert evaluate(tmp_path / "eval", f"ckpt={run}/checkpoints/best.ckpt")["loss"] == pytest.approx(results(run)["loss"], rel=1e-5)


def test_validation_images_alone_are_evaluated_by_the_sorted_wnids(tmp_path):
    root = write_folder(tmp_path, (("val", 3),), classes=WNIDS[::-1])
    settings = {"image_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 3, "mean": None, "std": None, "root": str(root)}
    data = ImageNet(**settings)
    assert data.split("val").labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.split("val").encoded.name(0).startswith(f"{root}/val/{WNIDS[0]}/")
    with pytest.raises(
        qat.UsageError, match=r"^data\.num_classes=1000: .*/val has 3 class folders; without train it needs one for every class"
    ):
        ImageNet(**{**settings, "num_classes": 1000}).val_dataloader()
    write_image(root / "val" / "tench" / "a.png", 12, 12)
    with pytest.raises(qat.UsageError, match=rf"{root}/val/tench: is no wnid like n01440764"):
        ImageNet(**{**settings, "num_classes": 4}).val_dataloader()
