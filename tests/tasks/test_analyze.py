"""`analyze.py`: nets from files, images of a split, files of results. Oracle: the nets loaded and scored here."""

import csv
import dataclasses
import json
import logging
import shutil
import signal
from typing import ClassVar

import pytest
import torch

import qat
from qat.analysis import Analysis, EvaluationPoint, ImageSet, Outcome, Table
from qat.data import Digits
from qat.launch.signals import Preempted
from qat.tasks.analyze import INTERRUPTED, _labels
from qat.tasks.analyze import analyze as task
from tests import tiny
from tests.commands import typed
from tests.conftest import compose, results
from tests.tasks.test_evaluate import DIGITS, counted, edited, last

SMALL = ("analysis=robustness", "analysis.parts=[steps,bits]", "analysis.ratios=3", "analysis.bits=[2,4,32]", "images=40")


def analyze(run_dir, *overrides):
    """Analyse; gives the results back."""
    task(compose("analyze", f"run_dir={run_dir}", *overrides))
    return results(run_dir)


def lines(run_dir):
    """What `points.jsonl` holds, its head left out."""
    return [json.loads(line) for line in (run_dir / "points.jsonl").read_text().splitlines()[1:]]


def table(run_dir, name):
    with (run_dir / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def analysed(tmp_path_factory, run_4bit):
    """A finished analysis of the 4-bit net."""
    run = tmp_path_factory.mktemp("analysed") / "run"
    analyze(run, f"ckpt={last(run_4bit)}", *SMALL)
    return run


def test_what_a_run_leaves_behind(analysed, run_4bit):
    found = results(analysed)
    assert (found["command"], found["analysis"], found["complete"]) == ("analyze", "robustness", True)
    assert (found["quant"], found["data"], found["split"], found["weights"]) == ("ofq_4bit", "digits", "test", str(last(run_4bit)))
    index = json.loads((analysed / "robustness.json").read_text())
    assert index["summary"] == found["summary"]
    assert (index["settings"]["ratios"], index["settings"]["seed"]) == (3, 0)
    named = [entry[key] for entry in index["tables"] + index["figures"] for key in ("file", "png") if key in entry]
    assert named
    assert {*named, "config.yaml", "points.jsonl", "results.json"} <= {path.name for path in analysed.iterdir()}
    assert len(lines(analysed)) == 1 + 2 + 2


def test_a_net_as_it_is_has_the_accuracy_of_eval(tmp_path, run_4bit):
    found = analyze(tmp_path, f"ckpt={last(run_4bit)}", *SMALL[:-1], "images=null", "analysis.parts=[power_of_two]")
    top1, _ = counted(qat.load(last(run_4bit)), Digits(**DIGITS))
    assert found["summary"]["last"]["top1"] == pytest.approx(top1)


def test_points_are_the_changed_net_on_a_spread_sample(analysed, run_4bit):
    net, data = qat.load(last(run_4bit)), Digits(**DIGITS)
    x, target = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    chosen = [i * len(x) // 40 for i in range(40)]
    images = ImageSet([(x[chosen], target[chosen])], "test")
    found = lines(analysed)[0]
    assert found["key"] == {"net": "last", "part": "clean"}
    assert found["values"]["top1"] == pytest.approx(images.score(net)["top1"])
    assert found["values"]["loss"] == pytest.approx(images.score(net)["loss"], rel=1e-6)


def test_the_same_command_evaluates_nothing_and_says_the_same(analysed, run_4bit, caplog):
    before = {path.name: path.read_bytes() for path in analysed.iterdir() if path.suffix in {".csv", ".jsonl", ".svg", ".png"}}
    caplog.set_level(logging.INFO)
    analyze(analysed, f"ckpt={last(run_4bit)}", *SMALL)
    assert "evaluations" not in caplog.text
    assert {name: (analysed / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("stop", [0, 2, 4])
def test_an_interrupted_run_goes_on(tmp_path, analysed, run_4bit, monkeypatch, caplog, stop):
    run, left, score = tmp_path / "run", [True] * stop, ImageSet.score

    def interrupting(self, predict, change=None):
        if not left:
            raise Preempted(signal.SIGINT)
        left.pop()
        return score(self, predict, change)

    monkeypatch.setattr(ImageSet, "score", interrupting)
    with pytest.raises(SystemExit) as end:
        analyze(run, f"ckpt={last(run_4bit)}", *SMALL)
    assert end.value.code == INTERRUPTED
    assert f"interrupted after {stop} evaluations; the same command with run_dir={run} goes on from there" in caplog.text
    assert results(run)["complete"] is json.loads((run / "robustness.json").read_text())["complete"] is False
    left[:] = [True] * (5 - stop)
    assert analyze(run, f"ckpt={last(run_4bit)}", *SMALL)["complete"] is True
    assert left == []
    for name in ("step_sizes", "bit_widths"):
        assert (run / f"{name}.csv").read_text() == (analysed / f"{name}.csv").read_text()


@pytest.mark.parametrize(
    "other",
    ["analysis.ratios=4", "images=41", "split=val", "seed=1", "labels=[other]", "ckpt={float}"],
    ids=lambda other: other.partition("=")[0],
)
def test_a_run_of_other_inputs_is_not_continued(tmp_path, analysed, run_4bit, float_run, refused, other):
    run = tmp_path / "run"
    shutil.copytree(analysed, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    other = other.format(float=last(float_run))
    more = ["analysis.parts=[bits]"] if "ckpt" in other else []
    cfg = compose("analyze", f"run_dir={run}", f"ckpt={last(run_4bit)}", *SMALL, other, *more)
    line = f"error: resume: {run}/points.jsonl is of another net, other images or other settings; resume=false starts anew"
    assert refused("analyze", cfg) == line
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_the_same_tensors_at_other_bits_are_another_net(tmp_path, refused):
    run, paths = tmp_path / "run", {bits: tmp_path / f"{bits}.ckpt" for bits in (2, 4)}
    for bits, path in paths.items():
        qat.save(tiny.converted("minmax", bits=bits, stem_bits=bits, head_bits=bits, act_quantizer="float"), path)
    tensors = [qat.load(path).state_dict() for path in paths.values()]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0] | tensors[1])
    command = (f"run_dir={run}", "data=digits", "labels=[net]", "analysis=robustness", "analysis.parts=[power_of_two]", "images=20")
    task(compose("analyze", f"ckpt={paths[2]}", *command))
    line = f"error: resume: {run}/points.jsonl is of another net, other images or other settings; resume=false starts anew"
    assert refused("analyze", compose("analyze", f"ckpt={paths[4]}", *command)) == line


def test_resume_false_starts_anew(tmp_path, analysed, run_4bit, caplog):
    run = tmp_path / "run"
    shutil.copytree(analysed, run)
    caplog.set_level(logging.INFO)
    analyze(run, f"ckpt={last(run_4bit)}", *SMALL, "images=20", "resume=false")
    assert "5 evaluations of 20 test images" in caplog.text
    assert len(lines(run)) == 5


def test_a_damaged_file_is_one_line(tmp_path, analysed, run_4bit, refused):
    run = tmp_path / "run"
    shutil.copytree(analysed, run)
    (run / "points.jsonl").write_bytes(b"\xff\xff\n")
    cfg = compose("analyze", f"run_dir={run}", f"ckpt={last(run_4bit)}", *SMALL)
    assert refused("analyze", cfg) == f"error: resume: {run}/points.jsonl cannot be read; resume=false starts anew"


def test_a_torn_line_is_done_again(tmp_path, analysed, run_4bit, caplog):
    run = tmp_path / "run"
    shutil.copytree(analysed, run)
    content = (run / "points.jsonl").read_bytes()
    (run / "points.jsonl").write_bytes(content[:-9])
    caplog.set_level(logging.INFO)
    analyze(run, f"ckpt={last(run_4bit)}", *SMALL)
    assert "1 evaluations (4 done before)" in caplog.text
    assert [line["key"] for line in lines(run)] == [json.loads(line)["key"] for line in content.splitlines()[1:]]


@pytest.mark.parametrize(("split", "count"), [("val", 180), ("train", 1257), ("test", 360)])
def test_a_split_can_be_chosen(tmp_path, run_4bit, split, count, caplog):
    caplog.set_level(logging.INFO)
    found = analyze(
        tmp_path, f"ckpt={last(run_4bit)}", "analysis=robustness", "analysis.parts=[power_of_two]", f"split={split}", "images=5000"
    )
    assert found["split"] == split
    assert f"{count} of the {split} split" in caplog.text


def test_several_checkpoints_are_compared(tmp_path, run_4bit, float_run):
    paths = [last(run_4bit), last(float_run)]
    found = analyze(tmp_path, f"ckpt=[{paths[0]},{paths[1]}]", *SMALL, "analysis.parts=[bits]", "labels=[four bits,float]")
    assert found["weights"] == [str(path) for path in paths]
    assert list(found["summary"]) == ["four bits", "float"]
    rows = table(tmp_path, "bit_widths")
    assert [(row["net"], row["bits"], row["as trained"]) for row in rows] == [
        *(("four bits", bits, trained) for bits, trained in (("2", "0"), ("4", "1"), ("32", "0"))),
        *(("float", bits, trained) for bits, trained in (("2", "0"), ("4", "0"), ("32", "1"))),
    ]
    for path, label in zip(paths, found["summary"], strict=True):
        alone = analyze(tmp_path / label, f"ckpt={path}", *SMALL, "analysis.parts=[bits]")
        assert alone["summary"]["last"] == found["summary"][label]


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["a/one.ckpt", "a/two.ckpt"], ["one", "two"]),
        (["a/x/checkpoints/best.ckpt", "a/y/checkpoints/best.ckpt"], ["x/best", "y/best"]),
        (["a/x/1/best.ckpt", "a/y/1/best.ckpt"], ["x/1/best", "y/1/best"]),
        (["best.ckpt", "a/best.ckpt"], ["best", "a/best"]),
        (["a/one.ckpt", "a/one.pt"], ["a/one.ckpt", "a/one.pt"]),
        (["a/one.ckpt"], ["one"]),
    ],
)
def test_labels_are_the_shortest_ends_that_differ(paths, labels):
    assert _labels(compose("analyze", "analysis=cost", "run_dir=a"), paths) == labels


@dataclasses.dataclass(frozen=True)
class Bare(Analysis):
    """Of one's own, in a file of one's own."""

    word: str = "no"

    name: ClassVar[str] = "bare"
    split: ClassVar[str] = "val"

    def points(self, nets, images):
        return [EvaluationPoint({"net": net.label}, net.net) for net in nets]

    def outcome(self, nets, rows):
        return Outcome({"n": len(rows), "word": self.word}, [Table("bare", "Bare", rows)])


def test_an_analysis_of_ones_own_is_a_class(tmp_path, run_4bit):
    cfg = compose("analyze", f"run_dir={tmp_path}", f"ckpt={last(run_4bit)}", "analysis=cost")
    cfg.analysis = {"_target_": f"{__name__}.Bare", "word": "yes"}
    task(cfg)
    found = results(tmp_path)
    assert (found["analysis"], found["split"], found["summary"]) == ("bare", "val", {"n": 1, "word": "yes"})
    assert table(tmp_path, "bare")[0]["net"] == "last"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["images=0"], "images=0: must be an integer of at least 1"),
        (["split=dev"], "split='dev': must be one of train, val, test"),
        (["resume=true"], "resume=True: must be one of false, auto"),
        (["labels=[a,b]"], "labels=['a', 'b']: must be as many as there are checkpoints (1), all different"),
        (["labels=[]"], "labels=[]: must be as many as there are checkpoints (1), all different"),
        (["analysis.parts=[step]"], "analysis.parts='step': must be one of steps, bits, power_of_two, corruptions, quantizers"),
        (["analysis.low=0"], "analysis.low=0: must be a number above 0"),
        (["analysis.bits=[9]"], "analysis.bits=9: must be an integer from 2 to 8"),
        (["+analysis.colour=3"], "analysis.colour: must be one of parts, low, high, ratios, bits"),
        (
            ["ckpt={float}", "analysis.parts=[steps]"],
            "analysis.parts=['steps']: last has no quantized weights for steps; analysis.float_bits=4",
        ),
        (["ckpt=[{four},{four}]"], "ckpt=['{four}', '{four}']: the same file twice; must be different files"),
        (["ckpt=[{four},{float}]", "labels=[a,a]"], "labels=['a', 'a']: must be as many as there are checkpoints (2), all different"),
        (["ckpt=[{four},/nowhere.ckpt]"], "ckpt='/nowhere.ckpt': no such file"),
        (["ckpt=[{four},3]"], "ckpt=3: must be a path"),
        (
            ["ckpt=[{four},{large}]"],
            "ckpt='{large}': its data have mean [0.5], those of '{four}' [0.3051]; compared nets see the same images",
        ),
        (
            ["ckpt=[{four},{fashion}]"],
            "ckpt='{fashion}': its data are FashionMnist, those of '{four}' Digits; data=... gives both the same images",
        ),
        (["trainer.devices=2"], "trainer.devices=2: analyses run on one device; must be 1"),
        (["trainer.precision=bf16-mixed"], "trainer.precision='bf16-mixed': analyses run in float32; must be 32-true"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(tmp_path, run_4bit, float_run, refused, overrides, line):
    content = torch.load(last(run_4bit), weights_only=True)["qat"]["data"]
    names = {"four": last(run_4bit), "float": last(float_run), "large": tmp_path / "large.ckpt", "fashion": tmp_path / "fashion.ckpt"}
    edited(last(run_4bit), names["large"], {**content, "mean": [0.5]})
    edited(last(run_4bit), names["fashion"], {**content, "_target_": "qat.data.FashionMnist"})
    ckpt = [] if any(one.startswith("ckpt") for one in overrides) else [f"ckpt={last(run_4bit)}"]
    cfg = compose("analyze", f"run_dir={tmp_path / 'run'}", *ckpt, *SMALL, *(one.format(**names) for one in overrides))
    assert refused("analyze", cfg).startswith("error: " + line.format(**names))
    assert not (tmp_path / "run" / "points.jsonl").exists()


@pytest.mark.parametrize(("arguments", "code"), [(("images=10",), 0), (("images=0",), 1)])
def test_the_script_is_typed(tmp_path, run_4bit, arguments, code):
    few = ("analysis=robustness", "analysis.parts=[power_of_two]")
    found, out = typed("analyze.py", f"ckpt={last(run_4bit)}", *few, *arguments, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert found == code
    assert ("robustness: 1 figures, 1 tables" in out) == (code == 0)
