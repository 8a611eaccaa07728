"""Accuracy class by class. Oracles: a matrix worked out by hand; torchmetrics' total; the names of the data."""

import csv

import pytest
import torch

from qat.tasks.results import CLASSES, CONFUSION, class_fields, write_class_tables
from tests.conftest import compose, results, tiny
from tests.data.files import write_folder

MATRIX = torch.tensor([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
NAMES = ["cat", "dog", "none"]


def rows(path):
    return list(csv.reader(path.open()))


def test_a_matrix_by_hand():
    found = class_fields(MATRIX, NAMES)
    assert [list(one.values()) for one in found["classes"]] == [
        ["cat", 10, 80.0],
        ["dog", 10, 50.0],
        ["none", 0, None],
    ]
    assert [list(one.values()) for one in found["confused"]] == [
        ["dog", "cat", 5, 50.0],
        ["cat", "dog", 2, 20.0],
    ]


def test_tables_have_the_names(tmp_path):
    write_class_tables(tmp_path, MATRIX, ["cat", "do,g", "no\x1bne"])
    assert rows(tmp_path / CLASSES)[:3] == [
        ["class", "images", "top1"],
        ["cat", "10", "80.0"],
        ["do,g", "10", "50.0"],
    ]
    assert rows(tmp_path / CONFUSION)[:2] == [
        ["true \\ predicted", "cat", "do,g", "no\\x1bne"],
        ["cat", "8", "2", "0"],
    ]


def test_eval_says_which_classes_are_confused(tmp_path, run_4bit, caplog):
    from qat.tasks.evaluate import evaluate

    caplog.set_level("INFO")
    evaluate(
        compose(
            "eval", f"ckpt={run_4bit}/checkpoints/best.ckpt", f"run_dir={tmp_path}", "report=true"
        )
    )
    found = results(tmp_path)
    confusion = torch.tensor([[int(n) for n in row[1:]] for row in rows(tmp_path / CONFUSION)[1:]])
    assert confusion.sum() == found["images"] == sum(one["images"] for one in found["classes"])
    assert abs(100 * confusion.diagonal().sum() / confusion.sum() - found["top1"]) < 1e-3
    assert [one["class"] for one in found["classes"]] == [str(n) for n in range(10)]
    worst = found["confused"][0]
    assert confusion.fill_diagonal_(0).max() == worst["images"]
    page = (tmp_path / "report.html").read_text()
    assert "Most often confused" in page
    assert "Accuracy of each class" in page
    assert rows(run_4bit / CONFUSION) == rows(tmp_path / CONFUSION)


@pytest.mark.long
def test_the_same_classes_in_another_order_are_refused(tmp_path, refused, caplog):
    from qat.tasks.evaluate import evaluate
    from qat.tasks.train import train

    root = write_folder(tmp_path / "photos", classes=("class2", "class10"))
    sizes = ("data.image_size=8", "data.patch_size=4", "data.batch_size=4", "data.num_classes=2")
    small = (*sizes, "data.calibration_images=8", "data.num_workers=0", f"data.root={root}")
    data = ("data=imagefolder", *small)
    # timm sorts by the numbers within names.
    other = ("data=timm", "data.val_split=val", *small)
    train(tiny(tmp_path / "run", *data, "quant=fp"))
    best = f"ckpt={tmp_path}/run/checkpoints/best.ckpt"
    said = f"ckpt={best[5:]!r}: class 0 of the model is 'class10', class 0 of the data is 'class2': the data have the model's classes in another order"
    assert said in refused(compose("eval", best, *other, f"run_dir={tmp_path}/eval"))
    assert said in refused(tiny(tmp_path / "more", best, *other, "quant=fp"))
    assert f"teacher.{said}" in refused(
        tiny(tmp_path / "more", f"teacher.{best}", "loss=kd", *other, "quant=fp")
    )
    (root / "train" / "class2").rename(root / "train" / "two")
    (root / "val" / "class2").rename(root / "val" / "two")
    evaluate(compose("eval", best, *data, f"run_dir={tmp_path}/eval"))
    assert (
        "class 1 of the model is 'class2', class 1 of the data is 'two': names differ; assuming the same classes"
        in caplog.text
    )
