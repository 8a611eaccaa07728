"""Image folders. Oracles: torchvision's ImageFolder, timm's transforms, and Pillow on the same files."""

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision import datasets

import qat
from qat.data import ImageArrays, ImageFolder
from qat.data.encoded import LazyImages
from tests.conftest import TINY, compose, evaluate, results, train
from tests.data.files import write_folder, write_image

SETTINGS = {"image_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 2, "mean": [0.5] * 3, "std": [0.25] * 3}
ALL = (("train", 20), ("val", 4), ("test", 6))


@pytest.mark.parametrize("size", [None, 16])
def test_images_and_labels_are_torchvisions(tmp_path, size):
    root = write_folder(tmp_path, ALL, classes=("b", "a", "C"), size=size)
    data = ImageFolder(**{**SETTINGS, "num_classes": 3}, root=str(root))
    for split, n in ALL:
        expected = datasets.ImageFolder(root / split)
        source = data.split(split)
        assert isinstance(source, LazyImages if size is None else ImageArrays)
        assert source.labels.tolist() == expected.targets
        assert len(source) == 3 * n
        for i, (image, label) in enumerate(expected):
            assert source[i][1] == label
            assert np.array_equal(source[i][0], np.asarray(image))
    assert data.evaluation_split == "test"


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_names_of_the_validation_folder(tmp_path, name):
    data = ImageFolder(**SETTINGS, root=str(write_folder(tmp_path, (("train", 4), (name, 3)))))
    assert [len(data.split(s)) for s in ("train", "val")] == [8, 6]
    assert data.evaluation_split == "val"


@pytest.mark.parametrize("size", [None, 16])
def test_without_validation_a_tenth_of_each_class_is_held_out(tmp_path, size):
    root = write_folder(tmp_path, (("train", 20),), size=size)
    splits = [ImageFolder(**SETTINGS, root=str(root), seed=seed) for seed in (1, 2)]
    assert [len(splits[0].split(s)) for s in ("train", "val")] == [36, 4]
    assert splits[0].split("val").labels.tolist() == [0, 0, 1, 1]
    held_out = [[s.split("val")[i][0].tobytes() for i in range(4)] for s in splits]
    assert held_out[0] == held_out[1]
    kept = {splits[0].split("train")[i][0].tobytes() for i in range(36)}
    assert len(kept | set(held_out[0])) == 40


def test_images_stay_on_disk_where_that_is_set(tmp_path):
    root = str(write_folder(tmp_path, size=16))
    assert isinstance(ImageFolder(**SETTINGS, root=root, in_memory=False).split("val"), LazyImages)


@pytest.mark.parametrize("augment", ["none", "light", "timm"])
def test_where_images_are_kept_changes_no_pixel(tmp_path, augment):
    root = str(write_folder(tmp_path, size=16))

    def batches(**settings):
        data = ImageFolder(**SETTINGS, root=root, augment=augment, batch_size=8, **settings)
        return torch.cat([images for loader in (data.train_dataloader(), data.test_dataloader()) for images, _ in loader])

    first = batches()
    assert torch.equal(batches(in_memory=False), first)
    assert torch.equal(batches(in_memory=False, num_workers=2), first)


@pytest.mark.parametrize(("crop_pct", "interpolation"), [(0.9, "bicubic"), (0.5, "bilinear"), (1.0, "lanczos")])
def test_evaluation_is_timms(tmp_path, crop_pct, interpolation):
    root = write_folder(tmp_path)
    data = ImageFolder(**SETTINGS, root=str(root), crop_pct=crop_pct, interpolation=interpolation, batch_size=100)
    ((images, _),) = data.val_dataloader()
    options = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": crop_pct, "interpolation": interpolation}
    transform = timm.data.create_transform((3, 8, 8), **options)
    expected = torch.stack([transform(image) for image, _ in datasets.ImageFolder(root / "val")])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_the_middle_is_what_evaluation_sees(tmp_path):
    # 16 x 32 with a white middle of 8 columns: half the shorter side is cropped, all of it white.
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 12:20] = 255
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "a.png")
    data = ImageFolder(**{**SETTINGS, "num_classes": 1}, root=str(tmp_path), crop_pct=0.5, interpolation="nearest")
    ((images, _),) = data.val_dataloader()
    assert torch.equal(images, torch.full((1, 3, 8, 8), 2.0))


def test_light_is_a_random_crop_of_8_to_100_percent_and_a_flip(tmp_path):
    # A horizontal ramp: brightness tells where a crop lies and whether it was flipped.
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / split / "a" / "a.png")

    def crops(hflip):
        settings = {**SETTINGS, "num_classes": 1, "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"}
        dataset = ImageFolder(**settings, root=str(tmp_path), augment="light", hflip=hflip).train_dataloader().dataset
        return torch.stack([dataset[epoch, 0][0] for epoch in range(200)])

    straight = crops(0.0)
    rise = straight[:, 0, :, -1].mean(1) - straight[:, 0, :, 0].mean(1)
    assert rise.min() > 0
    assert rise.max() > 0.8
    assert rise.min() < 0.35
    assert torch.allclose(straight[:, 0], straight[:, 2])
    flipped = crops(1.0)
    assert (flipped[:, 0, :, -1].mean(1) < flipped[:, 0, :, 0].mean(1)).all()
    assert torch.equal(crops(0.0), straight)


def test_other_files_are_left_alone(tmp_path):
    root = write_folder(tmp_path)
    (root / "train" / "ant" / "notes.txt").write_text("a")
    (root / "train" / "ant" / ".hidden.png").write_text("a")
    (root / "train" / ".cache").mkdir()
    write_image(root / "train" / "ant" / "deeper" / "a.PNG", 12, 12)
    assert np.bincount(ImageFolder(**SETTINGS, root=str(root)).split("train").labels).tolist() == [21, 20]


def test_the_number_of_classes_has_to_be_set(tmp_path):
    root = write_folder(tmp_path, classes=("a", "b", "c"))
    message = rf"data\.num_classes is not set: data\.root='{root}' has 3 classes; set data\.num_classes=3$"
    with pytest.raises(qat.UsageError, match=message):
        ImageFolder(**{**SETTINGS, "num_classes": None}, root=str(root))
    with pytest.raises(qat.UsageError, match=rf"data\.root='{root}/train': has 1 class; must have at least 2$"):
        ImageFolder(**{**SETTINGS, "num_classes": None}, root=str(write_folder(root / "train", classes=("a",))))


@pytest.mark.parametrize("classes", [1, 3])
def test_another_number_of_classes_is_refused(tmp_path, classes):
    data = ImageFolder(**{**SETTINGS, "num_classes": classes}, root=str(write_folder(tmp_path)))
    with pytest.raises(qat.UsageError, match=rf"data\.num_classes={classes}: {tmp_path}/train has 2 class folders"):
        data.train_dataloader()


def test_a_class_that_train_does_not_have_is_refused(tmp_path):
    write_image(write_folder(tmp_path) / "val" / "cat" / "a.png", 12, 12)
    with pytest.raises(qat.UsageError, match=rf"{tmp_path}/val/cat: is no class of train; its classes are ant, bee"):
        ImageFolder(**SETTINGS, root=str(tmp_path)).train_dataloader()


@pytest.mark.parametrize("splits", [(("train", 20),), (("train", 20), ("val", 4)), (("val", 4),)])
def test_test_images_without_class_folders_are_left_out(tmp_path, caplog, splits):
    root = write_folder(tmp_path, splits)
    write_image(root / "test" / "ILSVRC2012_test_00000001.JPEG", 12, 12)
    (root / "test" / ".cache").mkdir()
    data = ImageFolder(**SETTINGS, root=str(root), crop_pct=1.0, interpolation="bicubic")
    assert data.splits == tuple(split for split in ("train", "val") if split == "val" or split in dict(splits))
    assert data.evaluation_split == "val"
    assert [record.getMessage() for record in caplog.records] == [f"{root}/test: has images but no class folders, val is evaluated"]


@pytest.mark.parametrize("classes", [2, None])
def test_a_folder_of_another_kind_is_named(tmp_path, classes):
    def message(root):
        with pytest.raises(qat.UsageError) as caught:
            ImageFolder(**{**SETTINGS, "num_classes": classes}, root=root).train_dataloader()
        return str(caught.value)

    assert message(None).startswith("data.root is not set: give the folder that holds train/<class>/*")
    assert message("/no/such") == "data.root='/no/such': no such folder"
    assert message(str(tmp_path)).startswith(f"data.root='{tmp_path}': has no folder train")
    write_image(tmp_path / "train" / "a.png", 8, 8)
    assert message(str(tmp_path)).startswith(f"{tmp_path}/train: holds no class folders")


@pytest.mark.parametrize(("split", "name"), [("val", "a.png"), ("test", "a.txt")])
def test_other_splits_without_class_folders_are_refused(tmp_path, split, name):
    write_image(write_folder(tmp_path, (("train", 20),)) / split / "a.png", 12, 12).rename(tmp_path / split / name)
    with pytest.raises(qat.UsageError, match=rf"^{tmp_path}/{split}: holds no class folders"):
        ImageFolder(**SETTINGS, root=str(tmp_path)).train_dataloader()


def test_test_images_alone_need_class_folders(tmp_path):
    write_image(tmp_path / "test" / "a.png", 8, 8)
    with pytest.raises(qat.UsageError, match=rf"^{tmp_path}/test: holds no class folders"):
        ImageFolder(**SETTINGS, root=str(tmp_path)).test_dataloader()


def test_folders_without_images_are_named(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir(parents=True)
    with pytest.raises(qat.UsageError, match=rf"{tmp_path}/train: holds no images; known are \.jpg"):
        ImageFolder(**SETTINGS, root=str(tmp_path)).train_dataloader()


def test_too_few_images_to_hold_some_out_are_refused(tmp_path):
    data = ImageFolder(**SETTINGS, root=str(write_folder(tmp_path, (("train", 1),))))
    with pytest.raises(qat.UsageError, match=r"data\.root: 10% of 2 images cannot be held out"):
        data.train_dataloader()


@pytest.mark.parametrize("split", ["images of different sizes", "images of one size"])
def test_a_net_trains_and_is_evaluated_from_its_file(tmp_path, refused, split):
    root = write_folder(tmp_path / "data", ALL, size=16 if split == "images of one size" else None)
    small = ["data.image_size=16", "data.patch_size=8", "data.num_workers=0", "data.batch_size=8", "data.augment=timm"]
    settings = ["data=imagefolder", f"data.root={root}", *small]
    line = refused("train", compose("train", *settings, f"run_dir={tmp_path}/refused"))
    assert line.endswith("has 2 classes; set data.num_classes=2")
    run = train(tmp_path / "run", *settings, "data.num_classes=2")
    found = evaluate(tmp_path / "eval", f"ckpt={run}/checkpoints/best.ckpt")
    assert found["top1"] == results(run)["top1"]
    assert (found["data"], found["split"]) == ("imagefolder", "test")


def test_a_damaged_image_stops_a_run_with_its_name(tmp_path, refused):
    root = write_folder(tmp_path / "data")
    for path in (root / "train" / "ant").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    small = ["data.image_size=16", "data.patch_size=8", "data.num_workers=2", "data.batch_size=8", "data.num_classes=2"]
    line = refused("train", compose("train", "data=imagefolder", f"data.root={root}", *small, f"run_dir={tmp_path}/run"))
    assert f"{root}/train/ant/0" in line
    assert "cannot be decoded (" in line


@pytest.mark.parametrize("split", ["val", "valid", "test"])
@pytest.mark.parametrize("size", [None, 16])
def test_one_split_without_train_is_enough_for_evaluation(tmp_path, split, size):
    root = write_folder(tmp_path / "whole", (("train", 20), (split, 6)), classes=("b", "a", "C"), size=size)
    settings = {**SETTINGS, "num_classes": 3, "batch_size": 5}
    whole = list(ImageFolder(**settings, root=str(root)).test_dataloader())
    (tmp_path / "alone").mkdir()
    (root / split).rename(tmp_path / "alone" / split)
    alone = ImageFolder(**settings, root=str(tmp_path / "alone"))
    for (images, labels), (expected, ids) in zip(alone.test_dataloader(), whole, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, ids)
    assert alone.splits == (("test",) if split == "test" else ("val",))


def test_training_and_calibration_say_that_they_need_train(tmp_path):
    data = ImageFolder(**SETTINGS, root=str(write_folder(tmp_path, (("val", 4),))))
    for use, purpose in ((data.train_dataloader, "a net learns"), (data.calibration_batches, "scales are initialised")):
        with pytest.raises(qat.UsageError, match=rf"^data\.root='{tmp_path}': has no train images, from which {purpose}; it has val$"):
            use()


@pytest.mark.parametrize("classes", [1, 3])
def test_without_train_every_class_needs_a_folder(tmp_path, classes):
    data = ImageFolder(**{**SETTINGS, "num_classes": classes}, root=str(write_folder(tmp_path, (("val", 4),))))
    line = rf"^data\.num_classes={classes}: {tmp_path}/val has 2 class folders; without train it needs one for every class"
    with pytest.raises(qat.UsageError, match=line):
        data.val_dataloader()


def test_without_train_another_split_has_no_further_classes(tmp_path):
    write_image(write_folder(tmp_path, (("val", 4), ("test", 4))) / "test" / "cat" / "a.png", 12, 12)
    with pytest.raises(qat.UsageError, match=rf"{tmp_path}/test/cat: is no class of val; its classes are ant, bee"):
        ImageFolder(**SETTINGS, root=str(tmp_path)).val_dataloader()


@pytest.mark.parametrize("quant", ["fp", "ofq_4bit"])
def test_a_net_is_evaluated_but_not_trained_on_val_alone(tmp_path, refused, quant):
    root = write_folder(tmp_path / "data", (("train", 8), ("val", 4)))
    small = ["data.image_size=16", "data.patch_size=8", "data.num_workers=0", "data.batch_size=8", "data.num_classes=2", f"quant={quant}"]
    run = train(tmp_path / "run", "data=imagefolder", f"data.root={root}", *small)
    alone = write_folder(tmp_path / "alone", (("val", 4),))
    found = evaluate(tmp_path / "eval", f"ckpt={run}/checkpoints/best.ckpt", f"data.root={alone}")
    assert (found["loss"], found["split"]) == (pytest.approx(results(run)["loss"], rel=1e-5), "val")
    line = refused("train", compose("train", "data=imagefolder", f"data.root={alone}", *small, *TINY, f"run_dir={tmp_path}/refused"))
    assert f"data.root='{alone}': has no " in line
    assert line.endswith("; it has val")
