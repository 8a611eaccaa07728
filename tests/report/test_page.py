"""Reports of runs. Oracle: the files of the run directory, and the rules of HTML."""

import base64
import json

import numpy as np
import pytest

from qat.report.figures import bits_of, format_value, parse_number
from qat.report.page import columns, write_report
from tests.report.pages import HOSTILE, Reader, read, write_analysis, write_run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return read(write_report(write_run(tmp_path_factory.mktemp("page") / "run")))


def test_a_reader_finds_what_is_wrong():
    assert len(Reader("<p id=a><b></p><p id=a>").wrong) > 1
    assert Reader('<a href="#nowhere">x</a>').wrong == ["nothing has the id nowhere"]


@pytest.mark.parametrize(
    "text",
    [
        "88.89 %",
        "test split, −1.11 compared with float",
        "190 kB",
        "10.0× smaller",
        "200.0× fewer",
        "34 s",
        "W2 A2",
        "1,902,360",
        "0.6174",
        "qat train seed=0 'callbacks=[default,ema]'",
        "2026-01-02",
        "2.14.1",
        "command: train",
        "blocks.1.mlp.fc1",
        "12.25",
        "2.25 at step 9 to 1.5 at step 19.",
        "1.93 at step 9",
        "analysis/cost.csv",
        "vit_tiny_patch16_224 · ofq_2bit · digits",
    ],
)
def test_says(page, text):
    assert text in page.text


def test_nothing_is_fetched_and_everything_has_a_name(page):
    assert [attrs["src"][:9] for attrs in page.all("img")] == ["data:imag"] * 7
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert all(
        attrs["href"].startswith(("#", "data:")) for tag in ("a", "link") for attrs in page.all(tag)
    )
    assert not any("src" in attrs for attrs in page.all("script"))
    assert any(
        attrs.get("content", "").startswith("default-src 'none'; img-src data:;")
        for attrs in page.all("meta")
    )
    assert len(page.all("caption")) == len(page.all("table")) >= 3
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    assert all(attrs.get("scope") in {"col", "row"} for attrs in page.all("th"))


def test_text_is_never_markup(tmp_path):
    classes = [{"class": HOSTILE, "images": 3, "top1": 50.0}]
    run = write_run(
        tmp_path / "run",
        **dict.fromkeys(("model", "weights", "error", "device", "split"), HOSTILE),
        classes=classes,
    )
    write_analysis(
        run,
        "robustness",
        HOSTILE,
        HOSTILE,
        rows=f'"{HOSTILE.replace(chr(34), chr(34) * 2)}",b\n1,2\n',
    )
    (run / "metrics.csv").write_text("step,val/top1,lr-<script>\n1,2,3\n2,3,4\n")
    (run / "config.yaml").write_text(HOSTILE)
    (run / "command.json").write_text(json.dumps({"program": HOSTILE, "overrides": [HOSTILE]}))
    found = read(write_report(run))
    assert len(found.all("script")) == 1
    assert "onerror" not in {name for _, attrs in found.found for name in attrs}
    assert found.text.count("document.title='hacked'") > 10


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "missing",
    [
        "results.json",
        "metrics.csv",
        "command.json",
        "analysis/weights.json",
        "analysis/weights.csv",
    ],
)
@pytest.mark.parametrize("content", [None, '{"analysis": '])
def test_a_file_that_is_missing_or_cut_leaves_the_rest(tmp_path, missing, content):
    run = write_run(tmp_path / "run")
    (run / missing).unlink() if content is None else (run / missing).write_text(content)
    found = read(write_report(run))
    assert ("88.89" in found.text) == (missing != "results.json")
    assert ("The run has not ended." in found.text) == (missing == "results.json")
    assert "command: train" in found.text


def test_of_an_empty_directory_and_of_a_run_that_is_going(tmp_path):
    read(write_report(tmp_path))
    (tmp_path / "metrics.csv").write_text("step,train/loss_step,val/top1\n1,2.0,\n2,1.5,\n3,1.")
    # The line that is being written is left out.
    assert "2 at step 1 to 1.5 at step 2." in read(write_report(tmp_path)).text


SEARCH = "pass,cycle,fitness,accepted\n0,incumbent,5.0,1\n0,0,6.0,0\n0,1,4.5,1\n"
SCORES = {"top1_fp": 91.25, "top5_fp": 99.5, "loss_fp": 0.7125, "top1_calibrated": 77.5}
CALIBRATED = ("91.25", "99.5", "0.7125", "top1 calibrated", "77.5", "Packed size")
EXPORTED = {
    "command": "export",
    "file": "net.onnx",
    "top1": None,
    "split": None,
    "size_bytes": 500_000,
    "agreement": 99.5,
    "bytes": {"float": 2_000_000, "this": 500_000},
    "latency_ms": {"onnxruntime": {"float": 10.0, "this": 7.25}, "openvino": None},
}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("results", "shown", "absent"),
    [
        # The float model has all scores of the log, and nothing is called a search that was none.
        (SCORES | {"command": "ptq"}, (*CALIBRATED, "Calibration"), ("Search", "–")),
        (
            SCORES | {"command": "ptq", "search": {"method": "evolution"}},
            (*CALIBRATED, "Search", "evolution", "5 at candidate 0 to 4.5 at candidate 2."),
            ("Calibration", "–"),
        ),
        (EXPORTED, ("500 kB", "99.50 %", "2,000,000", "onnxruntime, ms", "7.25", "net.onnx"), ()),
        (
            {"top5": None, "top1": 43.33, "images": 60, "majority_share": 40.0},
            ("Top-1 is not clearly better than ", "40.00 %."),
            ("Top-5",),
        ),
        (
            {"quant": "fp", "recipe": {"name": "fp"}, "top1_fp": None},
            ("Size of weights", "88.89"),
            ("Quantized",),
        ),
    ],
    ids=["calibration", "search", "exported file", "few classes", "float run"],
)
def test_of_other_runs(tmp_path, results, shown, absent):
    run = write_run(tmp_path / "run", **results)
    if "search" in results:
        (run / "search.csv").write_text(SEARCH)
    found = read(write_report(run)).text
    assert [text for text in shown if text not in found] == []
    assert [text for text in absent if text in found] == []


def test_layers_are_folded_where_they_are_not_the_subject(tmp_path):
    folded = read(write_report(write_run(tmp_path / "run")))
    write_analysis(tmp_path / "weights", "weights")
    subject = read(write_report(tmp_path / "weights"))
    assert (
        len(folded.all("summary")) - len(folded.all("figcaption")) - 1 == 1
    )  # a table of layers, beside config.yaml
    assert len(subject.all("summary")) == len(subject.all("figcaption"))


def test_of_an_analysis_all_tables_and_of_long_ones_the_first_rows(tmp_path):
    write_analysis(tmp_path, "landscape", rows="net,x\n" + "".join(f"a,{i}\n" for i in range(1000)))
    found = read(write_report(tmp_path))
    assert "the first 200 of 1,000 rows, all in landscape.csv" in found.text
    assert len(found.all("tr")) == 201


CONFUSION = "true \\ predicted,cat,dog\ncat,3,1\ndog,0,4\n"


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("text", "lowest"),
    [
        (CONFUSION, "cat, 75.0 %"),
        (CONFUSION.replace("cat", "<b>"), "<b>, 75.0 %"),
        ("true,cat,net\ncat,5,0\nnet,3,0\n", "net, 0.0 %"),
        (CONFUSION.replace("cat", "0"), "0, 75.0 %"),
        (CONFUSION.replace("dog,0,4", "dog,0,0"), "cat, 75.0 %"),
        (CONFUSION.replace("3", "three"), None),
        ("true,cat\ncat,1\n", None),
        (CONFUSION.partition("dog,0")[0], None),
    ],
)
def test_confusions_are_a_heat_map(tmp_path, text, lowest):
    folder = write_run(tmp_path / "run")
    (folder / "confusion.csv").write_text(text)
    found = read(write_report(folder))
    words = [image["alt"] for image in found.all("img") if "true classes" in image["alt"]]
    assert bool(words) is (lowest is not None)
    assert lowest is None or f"Lowest: {lowest} right." in words[0]


def test_numbers_and_columns():
    values = (
        190236,
        "190236",
        100.0,
        0.000123456,
        1234.567,
        "fc1",
        None,
        "",
        float("nan"),
        True,
        1e30,
    )
    assert (
        "|".join(map(format_value, values))
        == "190,236|190236|100|0.0001235|1,234.57|fc1|–||nan|True|1e+30"
    )
    recipes = (None, {"name": "fp"}, {"name": "ofq", "bits": 2, "act_bits": 3})
    assert [bits_of(recipe) for recipe in recipes] == [None, None, "W2 A3"]
    assert columns([{"a": 1, "b": "−3 ± 1", "c": "x", "d": ""}]) == [
        ("a", False),
        ("b", True),
        ("c", False),
    ]


@pytest.mark.parametrize("kind", ["tables", "figures"])
@pytest.mark.parametrize(
    "name", ["../secret", "{outside}/secret", "link", "linked/secret", "../run/../secret"]
)
def test_a_directory_cannot_show_files_from_elsewhere(tmp_path, kind, name):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret").write_text("TOPSECRET,x\n1,2\n")
    (run / "link").symlink_to(tmp_path / "secret")
    (run / "linked").symlink_to(tmp_path)
    index = {"analysis": "x", "settings": {}, "summary": {}, "tables": [], "figures": []}
    index[kind] = [{"file": name.format(outside=tmp_path), "title": "t", "alt": "a"}]
    (run / "x.json").write_text(json.dumps(index))
    text = write_report(run).read_text()
    assert "TOPSECRET" not in text
    assert base64.b64encode(b"TOPSECRET")[:11].decode() not in text


@pytest.mark.parametrize("kind", ["tables", "figures"])
@pytest.mark.parametrize(
    "entries",
    [
        7,
        [7],
        ["x.csv"],
        [{}],
        *([{"file": file, "title": "t"}] for file in (7, [], "a" * 999, "\0")),
    ],
)
def test_an_index_that_names_no_file_shows_none(tmp_path, kind, entries):
    index = {"analysis": "study", "tables": [], "figures": [], kind: entries}
    (tmp_path / "x.json").write_text(json.dumps(index))
    assert "study" not in read(write_report(tmp_path)).text


@pytest.mark.parametrize("step", ["1", "1e308"])
def test_numbers_that_no_axis_holds_are_left_out_of_a_curve(tmp_path, step):
    rows = [("0", "1e308"), ("1", "-1e308"), (step, "1e308"), ("2", "0.5"), ("3", "0.25")]
    lines = "\n".join(map(",".join, [("step", "train/loss"), *rows]))
    (tmp_path / "metrics.csv").write_text(lines + "\n")
    with np.errstate(all="raise"):
        assert "0.5 at step 2 to 0.25 at step 3." in read(write_report(tmp_path)).text


def test_control_characters_are_shown_not_written(tmp_path):
    results = {"top1": 1.0, "classes": [{"class": "a\x1b[31m\u202e\x07", "top1": 1.0}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert r"a\x1b[31m\u202e\x07" in read(write_report(tmp_path)).text


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name", ["metrics.csv", "config.yaml", "results.json", "command.json", "analysis/weights.csv"]
)
def test_links_out_of_a_directory_are_not_followed(tmp_path, name):
    run = write_run(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.write_text((run / name).read_text() + "\n")
    before = write_report(run).read_text()
    (run / name).unlink()
    without = write_report(run).read_text()
    (run / name).symlink_to(outside)
    assert write_report(run).read_text() == without != before


def test_a_run_directory_may_be_a_link(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    linked = write_report(tmp_path / "link").read_text()
    assert linked.replace("/link", "/run") == write_report(run).read_text()


@pytest.mark.parametrize(
    ("text", "number"), [("3e-4", 3e-4), (2, 2.0), ("2024_01_15", None), ("1_000", None)]
)
def test_only_what_is_written_as_a_number_is_one(text, number):
    assert parse_number(text) == number
