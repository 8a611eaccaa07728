"""`analyze.py`: nets from files, images of a split, files of results. Oracle: the nets loaded and scored here."""

import dataclasses
import json
from typing import ClassVar

import pytest
import torch

import qat
from qat.analysis import Analysis, Outcome, Table
from qat.data import Digits
from qat.model.metadata import META_KEY
from qat.tasks.analyze import analyze as task
from qat.tasks.analyze import make_labels
from qat.utils.files import csv_rows
from tests.conftest import compose, contents, evaluate, results
from tests.data.files import write_folder
from tests.errors import usage_error
from tests.tasks.test_evaluate import DIGITS, counted, edited, last

SMALL = ("analysis.parts=[steps,bits]", "analysis.ratios=3", "analysis.bits=[2,4,32]")


def analyze(run_dir, *overrides):
    """Analyse, and return the results."""
    task(compose("analyze", f"run_dir={run_dir}", *overrides))
    return results(run_dir)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["cost", "robustness", "landscape", "weights"])
def test_what_a_run_leaves_behind(tmp_path, run_4bit, name):
    more = {"robustness": SMALL, "landscape": ("analysis.points=3",)}.get(name, ())
    found = analyze(tmp_path, f"ckpt={last(run_4bit)}", f"analysis={name}", "images=40", *more)
    split = {"robustness": "test", "weights": "train", "landscape": "val"}.get(name)
    assert [found[key] for key in ("command", "analysis", "split")] == ["analyze", name, split]
    assert found["weights"] == str(last(run_4bit))
    assert (found["quant"], found["data"]) == ("ofq_4bit", "digits")
    index = json.loads((tmp_path / f"{name}.json").read_text())
    assert index["summary"] == found["summary"]
    assert list(found["summary"]) == ["last"]
    named = [
        entry[key]
        for entry in index["tables"] + index["figures"]
        for key in ("file", "png")
        if key in entry
    ]
    assert named
    assert {*named, "config.yaml", "results.json"} <= {path.name for path in tmp_path.iterdir()}


@dataclasses.dataclass(frozen=True)
class Bare(Analysis):
    """Of one's own, in a file of one's own."""

    word: str = "no"

    name: ClassVar[str] = "bare"
    split: ClassVar[str] = "test"

    def run(self, nets, images):
        rows = [{"net": net.label, **images.score(net.net)} for net in nets]
        return Outcome({"n": images.num_images, "word": self.word}, [Table("bare", "Bare", rows)])


def bare(run_dir, *overrides, **settings):
    cfg = compose("analyze", f"run_dir={run_dir}", "analysis=cost", *overrides)
    cfg.analysis = {"_target_": f"{__name__}.Bare", **settings}
    task(cfg)
    return csv_rows(run_dir / "bare.csv")


def test_an_analysis_of_ones_own_is_a_class(tmp_path, run_4bit):
    (row,) = bare(tmp_path, f"ckpt={last(run_4bit)}", "images=null", word="yes")
    found = results(tmp_path)
    assert (found["analysis"], found["split"], found["summary"]) == (
        "bare",
        "test",
        {"n": 360, "word": "yes"},
    )
    assert float(row["top1"]) == pytest.approx(
        counted(qat.load(last(run_4bit)), Digits(**DIGITS))[0]
    )


def test_several_checkpoints_are_compared(tmp_path, run_4bit, float_run):
    paths = [last(run_4bit), last(float_run)]
    rows = bare(tmp_path, f"ckpt=[{paths[0]},{paths[1]}]", "labels=[four bits,float]")
    assert results(tmp_path)["weights"] == [str(path) for path in paths]
    assert [row["net"] for row in rows] == ["four bits", "float"]
    for path, row in zip(paths, rows, strict=True):
        (alone,) = bare(tmp_path / row["net"], f"ckpt={path}")
        assert {**alone, "net": row["net"]} == row
    with usage_error("contains results.json of analyze.py"):
        evaluate(tmp_path, f"ckpt={paths[0]}")


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["a/one.ckpt", "a/two.ckpt"], ["one", "two"]),
        (["a/x/checkpoints/best.ckpt", "a/y/checkpoints/best.ckpt"], ["x/best", "y/best"]),
        (["best.ckpt", "a/best.ckpt"], ["best", "a/best"]),
        (["a/one.ckpt"], ["one"]),
        (["checkpoints.ckpt"], ["checkpoints"]),
    ],
)
def test_labels_are_the_shortest_ends_that_differ(paths, labels):
    assert make_labels(None, paths) == labels


def test_no_order_of_checkpoints_tests_a_model_on_its_training_images(tmp_path, run_4bit):
    """Folders without splits: whoever was trained on one is tested on its validation images."""
    classes = [str(number) for number in range(10)]
    paths = {}
    for name in ("own", "other"):
        root = write_folder(tmp_path / name, (("all", 20),), classes=classes) / "all"
        stored = torch.load(last(run_4bit), weights_only=True)[META_KEY]["data"]
        stored |= {"_target_": "qat.data.ImageFolder", "root": str(root)}
        paths[name] = edited(last(run_4bit), tmp_path / f"{name}.ckpt", stored)
    root = f"data.root={tmp_path / 'own' / 'all'}"
    for order in ([paths["own"], paths["other"]], [paths["other"], paths["own"]]):
        listed = f"ckpt=[{order[0]},{order[1]}]"
        bare(tmp_path / "run", listed, root, "images=null")
        assert results(tmp_path / "run")["summary"]["n"] == 20
    with usage_error(rf"ckpt='{paths['other']}': the data have root {tmp_path}/other/all, "):
        bare(tmp_path / "run", f"ckpt=[{paths['own']},{paths['other']}]")


MISTAKES = {
    "ckpt={four}": "analysis is not set: must be one of cost, landscape, oscillation, robustness, sensitivity, weights; or set run=DIR",
    "analysis=robustness analysis.low=0 ckpt={four}": "analysis.low=0: must be a number above 0",
    "analysis=cost ckpt=[{four},{four}]": "ckpt=['{four}', '{four}']: the paths give equal labels; set labels",
    "analysis=cost ckpt=[{four},{float}] labels=[a,a]": "labels=['a', 'a']: must be 2 different names, one for each checkpoint",
    "analysis=cost ckpt=[{four},3]": "ckpt=3: must be a path",
    "analysis=cost ckpt=[]": "ckpt=[]: must be a path",
    "analysis=robustness ckpt=[{four},{large}]": "ckpt='{large}': the data have mean [0.5], but the data of '{four}' have [0.3051]; set data=... and data.mean=... for both",
    "analysis=robustness ckpt=[{four},{cropped}]": "ckpt='{cropped}': the data have crop_pct 0.5, but the data of '{four}' have None; ",
    "analysis=robustness ckpt=[{four},{fashion}]": "ckpt='{fashion}': the data have class FashionMnist, but the data of '{four}' have Digits; ",
    "analysis=cost trainer.devices=2 ckpt={four}": "trainer.devices=2: analyses run on one device; must be 1",
    "analysis=cost +trainer.num_nodes=2 ckpt={four}": "trainer.num_nodes=2: analyses run on one device; must be 1",
    "analysis=cost trainer.precision=bf16-mixed ckpt={four}": "trainer.precision='bf16-mixed': analyses run in float32; must be 32-true",
    "analysis=oscillation ckpt={four}": "ckpt='{four}': this run did not track oscillation; train with callbacks=[default,oscillation]",
    "analysis=weights ckpt={frozen} data=digits": "patch_embed.proj.weight_quantizer contains only integer codes; ",
}  # fmt: skip


@pytest.mark.sample(3)
@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_are_one_line_and_leave_an_older_run_as_it_was(
    tmp_path, run_4bit, float_run, refused, typed
):
    paths = {"four": last(run_4bit), "float": last(float_run)}
    for name in ("large", "cropped", "fashion", "frozen"):
        paths[name] = tmp_path / f"{name}.ckpt"
    stored = torch.load(paths["four"], weights_only=True)["qat"]["data"]
    edited(paths["four"], paths["large"], {**stored, "mean": [0.5]})
    edited(paths["four"], paths["cropped"], {**stored, "crop_pct": 0.5})
    edited(paths["four"], paths["fashion"], {**stored, "_target_": "qat.data.FashionMnist"})
    qat.save(qat.freeze(qat.load(paths["four"])), paths["frozen"])
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "command.json", "results.json"):
        (run / name).write_text("{}\n")
    before = contents(run)
    cfg = compose("analyze", f"run_dir={run}", "images=40", *typed.format(**paths).split())
    line = refused(cfg)
    assert line.startswith("error: " + MISTAKES[typed].format(**paths))
    assert contents(run) == before
