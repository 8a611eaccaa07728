"""`eval.py predict=...`. Oracle: softmax of the rebuilt net on what `qat.transform` makes of each file, one by one."""

import csv
import os
from pathlib import Path

import pytest
import timm
import torch

import qat
from qat.data import Cifar10, FashionMnist, ImageNet
from qat.tasks.set_up import _apply_timm_folder
from qat.tasks.stored_data import choose_data
from qat.tasks.subject import class_names
from qat.utils.text import printable
from tests.commands import typed
from tests.conftest import compose, results, train
from tests.data.files import SETTINGS, write_folder, write_image
from tests.tasks.test_evaluate import last

SMALL = ("data.num_workers=0", "data.image_size=16", "data.patch_size=8", "data.batch_size=8")


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    """A float net trained on two classes of photographs; its data are gone afterwards."""
    root = write_folder(tmp_path_factory.mktemp("bees") / "root")
    run = train(
        root.parent / "run",
        "data=imagefolder",
        f"data.root={root}",
        "data.num_classes=2",
        *SMALL,
        "quant=fp",
    )
    root.rename(root.parent / "gone")
    return run


@pytest.fixture
def photos(tmp_path):
    """Twelve images in two folders, and things that are none."""
    paths = [
        write_image(
            tmp_path / "photos" / "ab"[i % 2] / f"x{i:02}.{('png', 'JPG')[i % 3 == 0]}",
            10 + i,
            20,
            seed=i,
        )
        for i in range(12)
    ]
    for other in ("a/notes.txt", "a/._x00.png", ".cache/y.png"):
        (tmp_path / "photos" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / other).write_bytes(b"not an image")
    return sorted(paths)


def predict(run_dir, *overrides):
    """Run the command's task, and return the header and the rows of its file."""
    from qat.tasks.evaluate import evaluate

    assert evaluate(compose("eval", f"run_dir={run_dir}", *overrides)) is None
    with (run_dir / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


@torch.no_grad()
def expected(net, path, names):
    """Classes and probabilities of one image, the likeliest first."""
    shares = net(qat.transform(net)(path)[None]).softmax(-1)[0]
    order = shares.argsort(descending=True)[:5].tolist()
    return [(names[i], shares[i].item()) for i in order]


def assert_ranked(rows, net, paths, names):
    for row, path in zip(rows, paths, strict=True):
        classes, shares = zip(*expected(net, path, names), strict=True)
        assert tuple(row[1::2]) == classes
        assert [float(share) for share in row[2::2]] == pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize("size", [5, 64])
def test_every_image_gets_its_five_likeliest_classes(tmp_path, photos, run_4bit, size, caplog):
    caplog.set_level("INFO")
    header, rows = predict(
        tmp_path / "run",
        f"ckpt={last(run_4bit)}",
        f"predict={tmp_path}/photos",
        f"data.batch_size={size}",
    )
    assert header == [
        "path",
        *(f"{what}_{rank}" for rank in range(1, 6) for what in ("class", "probability")),
    ]
    assert [row[0] for row in rows] == [str(path) for path in photos]
    net = qat.load(last(run_4bit))
    assert_ranked(rows, net, photos, "0123456789")
    assert str(photos[9]) in caplog.text
    assert str(photos[10]) not in caplog.text
    assert "12 images: " in caplog.text
    found = results(tmp_path / "run")
    assert (found["command"], found["quant"]) == ("eval", "ofq_4bit")
    assert found["weights"] == str(last(run_4bit))
    assert [found[key] for key in ("data", "split", "top1", "top5", "loss")] == [None] * 5
    assert found["size_bytes"] > 0


def test_two_classes_by_name_when_the_training_data_are_gone(tmp_path, photos, folder_run):
    header, rows = predict(
        tmp_path / "run", f"ckpt={last(folder_run)}", f"predict={tmp_path}/photos"
    )
    assert header == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    net = qat.load(last(folder_run))
    assert_ranked(rows, net, photos, ["ant", "bee"])


def test_a_file_that_knows_no_data_gets_images_as_transform_has_them(tmp_path, photos):
    torch.manual_seed(0)
    net = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=7).eval()
    qat.save(net, tmp_path / "net.ckpt")
    _, rows = predict(tmp_path / "run", f"ckpt={tmp_path}/net.ckpt", f"predict={tmp_path}/photos")
    assert_ranked(rows, net, photos, "0123456")


def test_an_unreadable_image_stops_or_is_left_out(tmp_path, photos, run_4bit, refused, caplog):
    photos[3].write_bytes(photos[3].read_bytes()[:40])
    asked = (f"ckpt={last(run_4bit)}", f"predict={tmp_path}/photos")
    message = refused(compose("eval", *asked, f"run_dir={tmp_path}/a"))
    assert f"{photos[3]} cannot be decoded" in message
    assert not (tmp_path / "a" / "predictions.csv").exists()
    caplog.set_level("INFO")
    # Batches of one: that of the damaged file is empty.
    for size in (1, 12):
        _, rows = predict(
            tmp_path / f"b{size}", *asked, "data.on_error=skip", f"data.batch_size={size}"
        )
        assert [row[0] for row in rows] == [str(path) for path in photos if path != photos[3]]
    net = qat.load(last(run_4bit))
    assert_ranked(rows[3:4], net, photos[4:5], "0123456789")
    assert "11 of 12 images" in caplog.text


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "predict='nowhere': no such file or folder"),
        (".", "predict='.': the folder has no images; must contain files that end in .jpg, .jpeg"),
    ],
)
def test_wrong_paths_are_refused_before_a_net_is_read(
    tmp_path, refused, monkeypatch, where, message
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(
        compose("eval", "ckpt=nothing.ckpt", f"predict={where}", f"run_dir={tmp_path}/a"),
    )


def test_images_are_prepared_as_the_config_of_a_timm_folder_says():
    cfg = compose("eval", "model=vit_s", "model.pretrained=true", "predict=a.png", "run_dir=a")
    expected = {"mean": [0.1, 0.2, 0.3], "crop_pct": 1.0, "interpolation": "bilinear"}
    config = {"architecture": "vit_small_patch16_224", "pretrained_cfg": expected}
    _apply_timm_folder(cfg, Path("folder"), config)
    choose_data(cfg, None)
    assert {name: cfg.data[name] for name in expected} == expected


def test_known_classes():
    # The orders in which the makers of the data number their classes.
    def names(dataset, count, stored=None):
        return class_names(stored, dataset(**{**SETTINGS, "num_classes": count}))

    assert names(Cifar10, 10)[2:4] == ["bird", "cat"]
    assert names(Cifar10, 4) == ["0", "1", "2", "3"]
    assert names(FashionMnist, 10)[::9] == ["T-shirt/top", "Ankle boot"]
    assert names(ImageNet, 1000)[1] == "goldfish, Carassius auratus"
    assert names(Cifar10, 2, ["a", "b"]) == ["a", "b"]
    assert names(Cifar10, 3, ["a", "b"]) == ["0", "1", "2"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", [b"\xff.png", b"\x1b[31m.png"])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_names_that_are_no_text_can_be_shown_and_logged(tmp_path, run_4bit, name, is_damaged):
    path = write_image(tmp_path / "photos" / "x.png", 16, 16).rename(
        tmp_path / "photos" / os.fsdecode(name)
    )
    if is_damaged:
        path.write_bytes(b"no image")
    code, out = typed(
        "eval.py", f"ckpt={last(run_4bit)}", "predict=photos", "run_dir=run", cwd=tmp_path
    )
    assert code == is_damaged
    assert f"photos/{printable(path.name)}" in out
    assert "\x1b" not in out
    assert all(sign not in out for sign in ("Logging error", "could not be written"))
    assert ".png" in (tmp_path / "run" / "eval.log").read_text()
    if not is_damaged:
        assert printable(path.name) in (tmp_path / "run" / "predictions.csv").read_text()


def test_one_device_is_required_before_the_run_waits_for_others(
    tmp_path, photos, run_4bit, refused, monkeypatch
):
    monkeypatch.setattr(
        "qat.tasks.evaluate.connect",
        lambda trainer: pytest.fail(f"waits for {trainer.world_size} processes"),
    )
    asked = (
        f"ckpt={last(run_4bit)}",
        f"predict={photos[0]}",
        "trainer.devices=2",
        f"run_dir={tmp_path}/run",
    )
    assert "trainer.devices=2: predictions are made on one device; must be 1" in refused(
        compose("eval", *asked)
    )
    assert not (tmp_path / "run" / "config.yaml").exists()
