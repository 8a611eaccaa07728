"""Run directories with known content, and a strict reader of HTML."""

import json
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr"}
HOSTILE = "<script>document.title='hacked'</script>\"'&amp;</style><img src=x onerror=alert(1)>"

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
    "size_bytes": 190236,
    "bitops": 8220672,
    "wall_seconds": 34.0,
    "recipe": {"name": "ofq", "bits": 2, "act_bits": 2},
    "versions": {"torch": "2.14.1"},
    "finished": "2026-01-02 03:04:05 +0000",
}
METRICS = """epoch,step,train/loss,train/loss_ce,val/loss,val/top1,lr-AdamW,osc/share
,0,,,,,0.001,0.01
0,9,2.25,2.25,1.93,40.0,,
,10,,,,,0.0005,0.02
1,19,1.5,1.5,1.25,80.0,,
"""
LAYERS = """net,layer,role,bits,kurtosis
this run,blocks.0.mlp.fc1,weight,2,3.5
this run,blocks.1.mlp.fc1,weight,8,12.25
this run,blocks.2.mlp.fc1,weight,4,2.5
this run,head,weight,4,1.75
"""
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="400" height="200"><rect width="9" height="9"/></svg>'


def cells(text):
    """Rows of a table on the terminal."""
    rows = [line.split("│")[1:-1] for line in text.splitlines() if "│" in line]
    return [[cell.strip() for cell in row] for row in rows]


def write_analysis(folder, name, title="A title", alt="In words.", rows=LAYERS, summary=None):
    """What an analysis leaves: its index, a table, a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    tables, figures = (
        [{"file": f"{name}.csv", "title": title}],
        [{"file": f"{name}_plot.svg", "title": title, "alt": alt}],
    )
    (folder / f"{name}.json").write_text(
        json.dumps({
            "analysis": name,
            "summary": summary or {},
            "tables": tables,
            "figures": figures,
        })
    )
    (folder / f"{name}.csv").write_text(rows)
    (folder / f"{name}_plot.svg").write_text(SVG)


def write_run(folder, **results):
    """A finished training run with analyses of its own model."""
    write_analysis(folder / "analysis", "weights")
    in_float = {"size_bytes": 1902360, "bitops": 1644134400}
    write_analysis(folder / "analysis", "cost", summary={"this run": {"in_float": in_float}})
    (folder / "results.json").write_text(json.dumps(RESULTS | results))
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "config.yaml").write_text("command: train\n")
    (folder / "command.json").write_text(
        json.dumps({"program": "qat train", "overrides": ["seed=0", "callbacks=[default,ema]"]})
    )
    return folder


class Reader(HTMLParser):
    """Elements and text, and whatever is wrong: tags that are not closed, ids that are there twice, links to nowhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.found, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        ids = [attrs["id"] for _, attrs in self.found if "id" in attrs]
        links = [
            attrs[name].lstrip("#")
            for _, attrs in self.found
            for name in ("aria-labelledby", "href")
            if name in attrs
        ]
        self.wrong += [f"<{tag}> is open" for tag in self.open] + [
            f"id {one} twice" for one in ids if ids.count(one) > 1
        ]
        self.wrong += [
            f"nothing has the id {one}"
            for one in links
            if one not in ids and not one.startswith("data:") and "/" not in one
        ]

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes something else, line {self.getpos()[0]}")

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


def read(path):
    """A page, which has to be well formed."""
    found = Reader(path.read_text())
    assert found.wrong == []
    return found
