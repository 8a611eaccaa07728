"""Run directories with known content, and a strict reader of HTML."""

import functools
import json
import shutil
import tempfile
from html.parser import HTMLParser
from pathlib import Path

from matplotlib.figure import Figure

from qat.analysis import Advice, Drawing, Outcome, Table, write_outcome
from qat.report.run_files import Origin

VOID = {"meta", "link", "img", "br", "hr", "input"}

RESULTS = {
    "command": "train",
    "model": "vit_tiny_patch16_224",
    "quant": "ofq_2bit",
    "data": "digits",
    "seed": 0,
    "split": "test",
    "top1": 88.89,
    "top5": 99.44,
    "loss": 0.6174,
    "top1_fp": 90.0,
    "n_params": 458006,
    "size_bytes": 190236,
    "bitops": 8220672,
    "wall_seconds": 34.0,
    "recipe": {"name": "ofq", "bits": 2, "act_bits": 2},
    "versions": {"torch": "2.14.1"},
    "finished": "2026-01-02 03:04:05 +0000",
}
CONFIG = {"command": "train", "data": {"num_classes": 10}}
METRICS = """epoch,step,train/loss,train/loss_ce,val/loss,val/top1,lr-AdamW,osc/share
,0,,,,,0.001,0.01
0,9,2.25,2.25,1.93,40.0,,
,10,,,,,0.0005,0.02
1,19,1.5,1.5,1.25,80.0,,
"""
LAYERS = [
    {"net": "this run", "layer": "blocks.0.mlp.fc1", "role": "weight", "bits": 2, "kurtosis": 3.5, "unused levels": 0},
    {"net": "this run", "layer": "blocks.1.mlp.fc1", "role": "weight", "bits": 8, "kurtosis": 12.25, "unused levels": 10},
    {"net": "this run", "layer": "head", "role": "weight", "bits": 4, "kurtosis": 1.75, "unused levels": 9},
]
WORRY = Advice("head", "9 of 16 levels are unused", "Give it fewer bits.")


def drawing(name, title="Two bars", alt="The first bar has 1, the second 2."):
    figure = Figure(figsize=(4, 3))
    figure.add_subplot().bar([0, 1], [1, 2])
    return Drawing(name, title, alt, figure)


def write_run(folder, **results):
    """A finished training run with an analysis of its weights."""
    shutil.copytree(_analyses().name, folder / "analysis")
    (folder / "results.json").write_text(json.dumps(RESULTS | results))
    (folder / "metrics.csv").write_text(METRICS)
    return folder


@functools.cache
def _analyses():
    """What analyses of a run leave; drawn once."""
    folder = tempfile.TemporaryDirectory(prefix="qat-pages")
    cost = {"this run": {"in_float": {"size_bytes": 1902360, "bitops": 1644134400}}}
    tables = [Table("weights", "Weights", LAYERS)]
    write_outcome(Path(folder.name), "weights", {}, Outcome({}, tables, [drawing("one"), drawing("two")], [WORRY]), png=False)
    write_outcome(Path(folder.name), "cost", {}, Outcome(cost))
    return folder


def origin(**changes):
    known = {"config": CONFIG, "config_text": "command: train\n", "command": "python train.py seed=0", "repeat": "python train.py"}
    return Origin(
        **known
        | {"compared": "conf/train.yaml", "differences": [{"setting": "optimizer.lr", "here": "0.002", "default": "0.001"}]}
        | changes
    )


class Reader(HTMLParser):
    """Elements, texts by element, and whatever is wrong: tags that are not closed, ids that are there twice, links to nowhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.ids, self.found, self.text = [], [], [], [], ""
        self.links = []
        self.feed(text)
        self.close()
        self.wrong += [f"<{tag}> is open" for tag in self.open]
        self.wrong += [f"id {one} twice" for one in self.ids if self.ids.count(one) > 1]
        self.wrong += [f"nothing has the id {one}" for one in self.links if one not in self.ids]

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes something else, line {self.getpos()[0]}")

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]

    def _note(self, tag, attrs):
        known = dict(attrs)
        self.found.append((tag, known))
        if "id" in known:
            self.ids.append(known["id"])
        for name in ("aria-labelledby", "aria-describedby"):
            self.links += known.get(name, "").split()
        for name in ("href", "xlink:href"):
            if known.get(name, "").startswith("#"):
                self.links.append(known[name][1:])
        self.wrong += [f"attribute {name} twice in <{tag}>" for name in known if [n for n, _ in attrs].count(name) > 1]
