"""Image folders, including ImageNet. Oracles: torchvision's ImageFolder, timm's transforms, and pixels known by construction."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from torchvision import datasets

import qat
from qat.data import ImageArrays, ImageFolder, ImageNet
from qat.nn.hf_constructor import CLASSIFIER
from qat.tasks import build
from tests.commands import typed
from tests.conftest import compose, evaluate
from tests.data.files import SETTINGS, write_folder, write_image
from tests.errors import usage_error

ALL = (("train", 20), ("val", 4), ("test", 6))
WNIDS = ("n01440764", "n01443537", "n01484850")
UNSET = {**SETTINGS, "num_classes": 3, "mean": None, "std": None}


def data(folder, kind=ImageFolder, **changes):
    return kind(**{**SETTINGS, "root": None if folder is None else str(folder), **changes})


def images_of(loader):
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("size", [None, 16])
def test_images_and_labels_are_torchvisions(tmp_path, size):
    root = write_folder(tmp_path, ALL, classes=("b", "a", "C"), size=size)
    found = data(root, num_classes=3)
    for split, n in ALL:
        expected, source = datasets.ImageFolder(root / split), found.split(split)
        assert isinstance(source, ImageArrays) == (size is not None)
        assert source.labels.tolist() == expected.targets
        assert len(source) == 3 * n
        for i, (image, label) in enumerate(expected):
            assert source[i][1] == label
            assert np.array_equal(source[i][0], np.asarray(image))
    assert found.evaluation_split == "test"


@pytest.mark.parametrize(
    ("names", "splits"),
    [(("Training", "Testing"), ("train", "val", "test")), (("train", "Val"), ("train", "val"))],
)
def test_other_names_of_splits(tmp_path, names, splits):
    root = write_folder(tmp_path, tuple((name, 20) for name in names))
    assert data(root).splits == splits
    assert len(data(root).split(splits[-1])) == 40


def test_a_class_without_images_is_named(tmp_path):
    root = write_folder(tmp_path)
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "bee").mkdir()
    (root / "train" / "bee" / "1.heic").write_bytes(b"0")
    assert lines(root).startswith(f"{root / 'train' / 'bee'}: has no images; must contain")


def test_without_validation_a_tenth_of_each_class_is_held_out(tmp_path):
    found = data(write_folder(tmp_path, (("train", 20),)))
    assert found.split("val").labels.tolist() == [0, 0, 1, 1]
    images = {
        found.split(split)[i][0].tobytes()
        for split in ("train", "val")
        for i in range(len(found.split(split)))
    }
    assert len(images) == 40
    few = write_folder(tmp_path / "few", (("train", 1),))
    assert lines(few).startswith("data: 10% of 2 train images cannot be held out (")


SAME = {
    "link": lambda train, other: other.symlink_to(train),
    "links": lambda train, other: shutil.copytree(
        train, other, copy_function=lambda a, b: Path(b).symlink_to(a)
    ),
    "hard links": lambda train, other: shutil.copytree(train, other, copy_function=os.link),
    "copies": shutil.copytree,
    "others": lambda train, other: write_folder(other, ((".", 21),), size=9),
    "one differs": lambda train, other: write_image(
        shutil.copytree(train, other) / "bee" / "019.JPEG", 9, 9
    ),
}


@pytest.mark.parametrize("memory_mb", [0, 100])
@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("way", SAME)
def test_a_split_that_is_another_one_is_named(tmp_path, caplog, way, split, memory_mb):
    root = write_folder(tmp_path, (("train", 20),), size=9)
    SAME[way](root / "train", root / split)
    source = data(root, memory_mb=memory_mb)
    assert len(source.split("train")) + len(source.split("val")) >= 40
    lines_said = [line.partition(";")[0] for line in caplog.messages]
    line = f"data: train and {split} contain the same images"
    assert lines_said == ([line] if way in {"link", "links", "hard links", "copies"} else [])


def test_other_files_are_left_alone(tmp_path):
    root = write_folder(tmp_path)
    (root / "train" / "ant" / "notes.txt").write_text("a")
    (root / "train" / "ant" / ".hidden.png").write_text("a")
    (root / "train" / ".cache").mkdir()
    write_image(root / "train" / "ant" / "deeper" / "a.PNG", 12, 12)
    write_image(root / "train" / "ant" / ".checkpoints" / "a.png", 12, 12)
    assert np.bincount(data(root).split("train").labels).tolist() == [21, 20]


def test_the_number_of_classes_has_to_be_that_of_the_folders(tmp_path):
    root = write_folder(tmp_path, classes=("a", "b", "c"))
    assert data(root, num_classes=None).settings.num_classes == 3
    assert lines(None, num_classes=None).startswith("data.root=None: must be the folder")
    (tmp_path / "none" / "train").mkdir(parents=True)
    assert "has 0 class folders" in lines(tmp_path / "none", num_classes=None)
    for classes in (2, 4):
        line = f"data.num_classes={classes}: data.root='{root}' has 3 class folders in train"
        assert lines(root, num_classes=classes).startswith(line)


def test_class_folders_without_splits_are_split_for_a_training_and_evaluated_whole(tmp_path):
    root = write_folder(tmp_path, (("train", 20),))
    flat, split = data(root / "train"), data(root)
    assert flat.splits == ("train", "val")
    assert [flat.split(name).labels.tolist() for name in flat.splits] == [
        split.split(name).labels.tolist() for name in flat.splits
    ]
    assert torch.equal(images_of(flat.val_dataloader()), images_of(split.val_dataloader()))
    whole = data(root / "train")
    whole.evaluates_whole = True
    assert (whole.splits, len(whole.split("test"))) == (("test",), 40)
    (root / "train" / "notes").mkdir()
    assert "has no folder train" in lines(root / "train")


def test_a_model_learns_and_is_evaluated_on_class_folders(tmp_path):
    """A model that timm knows and `conf/` does not, with an argument of its own, and as many classes as there are folders."""
    flat = write_folder(tmp_path / "data", (("train", 20),), classes=("a", "b", "c")) / "train"
    given = [
        f"data.root={flat}",
        "data.image_size=32",
        "data.num_workers=0",
        "data.batch_size=8",
        "model=timm/vit_tiny_patch16_384",
    ]
    given += [
        "model.args.depth=1",
        "model.args.embed_dim=24",
        "quant=fp",
        "trainer.fast_dev_run=false",
        "trainer.max_epochs=1",
    ]
    code, out = typed(
        "train.py", "data=imagefolder", *given, "report=false", "run_dir=run", cwd=tmp_path
    )
    assert code == 0, out
    assert "54 train, 6 val images, 3 classes" in out
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    again = evaluate(tmp_path / "again", f"ckpt={best}")
    assert (again["split"], again["images"]) == ("val", 6)
    moved = shutil.copytree(flat, tmp_path / "moved")
    assert evaluate(tmp_path / "held_out", f"ckpt={best}", f"data.root={moved}")["images"] == 6
    other = write_folder(tmp_path / "more", (("all", 20),), classes=("a", "b", "c")) / "all"
    write_image(other / "c" / "another.png", 12, 12)
    few = write_folder(tmp_path / "few", (("all", 1),), classes=("a", "b", "c")) / "all"
    assert evaluate(tmp_path / "three", f"ckpt={best}", f"data.root={few}")["images"] == 3
    found = evaluate(tmp_path / "eval", f"ckpt={best}", f"data.root={other}")
    assert (found["split"], found["images"]) == ("test", 61)


@pytest.mark.parametrize("source", ["train", "val"])
def test_a_class_that_the_first_split_does_not_have_is_refused(tmp_path, source):
    write_image(
        write_folder(tmp_path, ((source, 20), ("test", 4))) / "test" / "cat" / "a.png", 12, 12
    )
    with usage_error(rf"^{tmp_path}/test/cat: .*{source}.* ant, bee"):
        data(tmp_path).test_dataloader()


@pytest.mark.parametrize("splits", [(("train", 20),), (("train", 20), ("val", 4)), (("val", 4),)])
def test_test_images_without_class_folders_are_left_out(tmp_path, splits):
    root = write_folder(tmp_path, splits)
    write_image(root / "test" / "ILSVRC2012_test_00000001.JPEG", 12, 12)
    (root / "test" / ".cache").mkdir()
    found = data(root, crop_pct=1.0, interpolation="bicubic")
    assert found.splits == tuple(
        split for split in ("train", "val") if split == "val" or split in dict(splits)
    )


def lines(root, **changes):
    with pytest.raises(qat.UsageError) as caught:
        data(root, **changes).train_dataloader()
    return str(caught.value)


def test_a_folder_of_another_kind_is_named(tmp_path):
    for root in (None, "/no/such"):
        line = f"data.root={root!r}: must be the folder that contains train/<class>/*"
        assert lines(root).startswith(line)
    assert lines(tmp_path).startswith(f"data.root='{tmp_path}': has no folder train")
    write_image(tmp_path / "train" / "a.png", 8, 8)
    line = f"data.num_classes=2: data.root='{tmp_path}' has 0 class folders in train/<class>/*"
    assert lines(tmp_path).startswith(line)


def test_a_split_without_images_is_named(tmp_path):
    root = write_folder(tmp_path, (("train", 20),))
    (root / "val").mkdir()
    assert lines(root).startswith(f"{root}/val: has no images; must contain files that end in .jpg")


@pytest.mark.parametrize("split", ["val", "valid", "test"])
def test_one_split_without_train_is_enough_for_evaluation(tmp_path, split):
    root = write_folder(tmp_path / "whole", (("train", 20), (split, 6)), classes=("b", "a", "C"))
    whole = list(data(root, num_classes=3).test_dataloader())
    (tmp_path / "alone").mkdir()
    (root / split).rename(tmp_path / "alone" / split)
    alone = data(tmp_path / "alone", num_classes=3)
    for (images, labels), (expected, ids) in zip(alone.test_dataloader(), whole, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, ids)
    for use in (alone.train_dataloader, alone.calibration_batches):
        with usage_error(r"^data\.root='.*': has no split 'train'"):
            use()


@pytest.mark.parametrize(("model", "mean"), [("deit_t", 0.485), ("vit_s", 0.5)])
def test_evaluation_on_imagenet_is_what_the_models_weights_expect(tmp_path, model, mean):
    root = write_folder(tmp_path, (("train", 4), ("val", 3)), classes=WNIDS)
    cfg = compose(
        "train",
        "data=imagenet",
        f"model={model}",
        "data.num_classes=3",
        "data.num_workers=0",
        f"data.root={root}",
        "run_dir=a",
    )
    found = build.build_data(cfg)
    assert found.settings.mean[0] == mean
    assert found.input_size == (3, 224, 224)
    options = timm.data.resolve_data_config(
        pretrained_cfg=timm.get_pretrained_cfg(cfg.model.name).to_dict()
    )
    transform = timm.data.create_transform(**options)
    expected = torch.stack([transform(image) for image, _ in datasets.ImageFolder(root / "val")])
    torch.testing.assert_close(images_of(found.val_dataloader()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", [None, CLASSIFIER])
def test_without_a_pretrained_config_it_is_imagenets(tmp_path, model):
    settings = ImageNet(**UNSET, root=str(tmp_path), model=model).settings
    assert (settings.crop_pct, settings.interpolation) == (0.9, "bicubic")
    assert (settings.mean, settings.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert ImageNet(**UNSET | {"in_chans": 1}, root=str(tmp_path)).settings.mean == pytest.approx([
        (0.485 + 0.456 + 0.406) / 3
    ])


def test_classes_of_imagenet_are_the_sorted_wnids(tmp_path):
    root = write_folder(tmp_path, (("val", 3),), classes=WNIDS[::-1])
    found = ImageNet(**UNSET, root=str(root))
    assert found.split("val").labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.split("val").name(0).startswith(f"{root}/val/{WNIDS[0]}/")
    assert found.named_classes()[1].startswith("goldfish")
    write_image(root / "val" / "tench" / "a.png", 12, 12)
    with usage_error(rf"^data\.root='{root}': class tench .*n01440764"):
        ImageNet(**UNSET, root=str(root)).val_dataloader()
