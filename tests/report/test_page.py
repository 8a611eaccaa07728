"""The page of a run. Oracle: what was written into the run directory, and the rules of HTML."""

import re

import pytest

from qat.analysis import Advice, Outcome, Table, write_outcome
from qat.report.page import write_report
from tests.report.pages import LAYERS, RESULTS, Reader, drawing, origin, write_run

HOSTILE = "<script>document.title='hacked'</script>\"'&amp;</style><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("page") / "run"), origin()).read_text()


@pytest.fixture(scope="module")
def read(page):
    return Reader(page)


def test_is_well_formed(read):
    assert read.wrong == []
    assert read.open == []
    # A reader that sees nothing would pass.
    assert len(read.found) > 100


def test_a_reader_finds_what_is_wrong():
    assert Reader("<p id=a><b></p><p id=a>").wrong != []
    assert Reader('<a href="#nowhere">x</a>').wrong == ["nothing has the id nowhere"]


def test_says_what_came_out(read):
    for text in ("88.89", "90.00", "−1.11", "190 kB", "190,236", "10.0× smaller", "200× fewer", "34 s", "W2 A2", "2026-01-02"):
        assert text in read.text, text


def test_says_how_it_was_run(read):
    for text in ("python train.py seed=0", "optimizer.lr", "0.002", "conf/train.yaml", "2.14.1", "command: train"):
        assert text in read.text, text


def test_warnings_come_first_with_advice(read):
    assert read.text.index("9 of 16 levels are unused") < read.text.index("Accuracy on the test split")
    assert "Give it fewer bits." in read.text


def test_every_picture_has_words(read):
    assert len(read.all("img")) == 2
    assert {image["alt"] for image in read.all("img")} == {"The first bar has 1, the second 2."}
    drawn = read.all("svg")
    assert len(drawn) == 4
    assert [attrs["aria-label"] for _, attrs in read.found if attrs.get("role") == "img"] == [
        "Cross entropy",
        "Validation top-1, %",
        "Learning rate",
        "Share of weights that oscillate",
    ]
    assert "training: from 2.25 at step 9 to 1.5 at step 19" in read.text
    assert "validation top-1: from 40 at step 9 to 80 at step 19" in read.text


def test_tables_have_captions_and_headers(read, page):
    assert len(read.all("caption")) == len(read.all("table")) >= 3
    assert all(one.get("scope") in {"col", "row"} for one in read.all("th"))
    assert "data-sortable" in page


def test_landmarks_and_headings(read):
    for tag in ("header", "nav", "main", "footer", "h1"):
        assert len(read.all(tag)) == 1, tag
    assert all(one["aria-labelledby"] for one in read.all("section"))
    assert read.all("html") == [{"lang": "en"}]
    assert "skip" in {one.get("class") for one in read.all("a")}
    levels = [int(tag[1]) for tag, _ in read.found if re.fullmatch(r"h\d", tag)]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_nothing_is_fetched(page, read):
    sources = [attrs[name] for _, attrs in read.found for name in ("src", "href", "xlink:href") if name in attrs]
    assert [source for source in sources if not source.startswith(("#", "data:"))] == []
    assert "@import" not in page
    assert re.findall(r"url\((?!#|%23)", page) == []
    policy = next(one["content"] for one in read.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_is_small(page):
    assert len(page) < 150_000


def test_text_is_never_markup(tmp_path):
    run = write_run(tmp_path / "run", model=HOSTILE, weights=HOSTILE, error=None, device=HOSTILE, split=HOSTILE)
    rows = [{"layer": HOSTILE, HOSTILE: HOSTILE}, {"layer": "b", HOSTILE: "1"}]
    outcome = Outcome({}, [Table("mean", HOSTILE, rows)], [drawing("plot", HOSTILE, HOSTILE)], [Advice(HOSTILE, HOSTILE, HOSTILE)])
    write_outcome(run, "robustness", {}, outcome)
    (run / "metrics.csv").write_text("step,val/top1,lr-<script>\n1,2,3\n2,3,4\n")
    text = write_report(
        run,
        origin(
            config_text=HOSTILE, command=HOSTILE, repeat=HOSTILE, compared=HOSTILE, differences=[{"setting": HOSTILE, HOSTILE: HOSTILE}]
        ),
    ).read_text()
    found = Reader(text)
    assert found.wrong == []
    assert len(found.all("script")) == 1
    assert text.count("<script") == 1
    assert "onerror" not in {name for _, attrs in found.found for name in attrs}
    assert found.text.count("document.title='hacked'") > 10


@pytest.mark.parametrize("missing", ["results.json", "metrics.csv", "analysis/weights.json", "analysis/weights.csv", "analysis/one.svg"])
def test_a_file_that_is_missing_leaves_the_rest(tmp_path, missing):
    run = write_run(tmp_path / "run")
    (run / missing).unlink()
    text = write_report(run, origin()).read_text()
    assert Reader(text).wrong == []
    assert ("88.89" in text) == (missing != "results.json")


@pytest.mark.parametrize("broken", ["results.json", "analysis/weights.json"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, broken):
    run = write_run(tmp_path / "run")
    (run / broken).write_text('{"analysis": ')
    text = write_report(run, origin()).read_text()
    assert Reader(text).wrong == []
    assert f"Cannot be read: {broken.rpartition('/')[2]}" in text


def test_a_run_that_is_still_going(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("step,train/loss_step,val/top1\n1,2.0,\n2,1.5,\n3,1.")
    found = Reader(write_report(run, origin()).read_text())
    assert found.wrong == []
    assert "The run has not ended." in found.text
    # The line that is being written is left out.
    assert "from 2 at step 1 to 1.5 at step 2" in found.text


def test_an_empty_directory(tmp_path):
    assert Reader(write_report(tmp_path, origin(config={}, config_text="")).read_text()).wrong == []


def test_points_of_long_runs_are_thinned(tmp_path):
    run = write_run(tmp_path / "run")
    lines = "\n".join(f"{step},{1 / (step + 1)}" for step in range(20_000))
    (run / "metrics.csv").write_text(f"step,train/loss\n{lines}\n")
    text = write_report(run, origin()).read_text()
    assert len(text) < 150_000
    # The ends and the extremes are those of all points.
    assert "training loss: from 1 at step 0 to 5e-05 at step 19,999" in text


def test_ids_in_pictures_are_unique(tmp_path):
    run = write_run(tmp_path / "run")
    text = write_report(run, origin()).read_text()
    clips = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(clips) == len(set(clips)) >= 4
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(clips)


def test_colours_come_from_the_page(page):
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--series-1)" in drawn
    assert "currentColor" in drawn
    assert re.findall(r"#[0-9a-f]{6}\b", drawn) == []


def test_png_where_a_drawing_is_large(tmp_path):
    run = tmp_path / "run"
    write_outcome(run, "robustness", {}, Outcome({}, [], [drawing("plot")]))
    (run / "plot.svg").write_text(f"<svg>{'<path/>' * 100_000}</svg>")
    text = write_report(run, origin()).read_text()
    assert "data:image/png;base64" in text
    assert len(text) < 150_000


def test_search(tmp_path):
    run = write_run(tmp_path / "run", command="ptq", search={"method": "evolution", "accepted": 1})
    (run / "search.csv").write_text("pass,cycle,fitness,accepted\n0,incumbent,5.0,1\n0,0,6.0,0\n0,1,4.5,1\n")
    found = Reader(write_report(run, origin()).read_text())
    assert found.wrong == []
    assert "2 candidates, 1 of them accepted" in found.text


def test_two_nets_are_no_list_of_layers(tmp_path):
    run = tmp_path / "run"
    rows = [*LAYERS, *({**row, "net": "other"} for row in LAYERS)]
    write_outcome(run, "weights", {}, Outcome({}, [Table("weights", "Weights of two nets", rows)]))
    text = write_report(run, origin()).read_text()
    assert "Weights of two nets" in text
    assert 'id="layers"' not in text


def test_float_runs_have_one_row(tmp_path):
    run = write_run(tmp_path / "run", quant="fp", recipe={"name": "fp"}, top1_fp=None)
    text = write_report(run, origin()).read_text()
    assert "Quantized" not in text
    assert str(RESULTS["top1"]) in text


@pytest.mark.parametrize(("key", "name"), [("top1_calibrated", "Calibrated, W2 A2"), ("top1_start", "As it came, W2 A2")])
def test_what_a_search_began_with(tmp_path, key, name):
    text = write_report(write_run(tmp_path / "run", command="ptq", **{key: 77.5}), origin()).read_text()
    rows = dict(re.findall(r'<tr><th scope="row">([^<]+)</th><td class="n">([^<]+)</td>', re.sub(r">\s+<", "><", text)))
    assert (rows[name], rows["Searched, W2 A2"], rows["Change from float"]) == ("77.50", "88.89", "−1.11")


EXPORTED = {
    "command": "export",
    "file": "runs/net.onnx",
    "size_bytes": 500_000,
    "agreement": 99.5,
    "agrees": {"onnxruntime": True, "openvino": False},
    "bytes": {"float": 2_000_000, "int8": 700_000, "this": 500_000},
    "latency_ms": {"onnxruntime": {"float": 10.0, "int8": 6.0, "this": 7.5}, "openvino": {"float": 9.0, "int8": 20.0, "this": 6.0}},
}


def test_an_exported_file(tmp_path):
    text = Reader(write_report(write_run(tmp_path / "run", **EXPORTED), origin()).read_text()).text
    for said in ("runs/net.onnx", "4.0× smaller than in float", "7.50 ms", "0.75 of float", "6.00 ms", "0.60 of float", "99.50 %"):
        assert said in text, said
    assert "In openvino the file does not run, or is not what the checkpoint is." in text
    assert "Accuracy on" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"bytes": {"codes": 5, "scales": 1}, "latency_ms": None, "agrees": None},
        {"bytes": HOSTILE, "latency_ms": {HOSTILE: {}, "openvino": 3}, "file": HOSTILE, "agreement": HOSTILE},
    ],
)
def test_an_exported_file_of_which_less_is_known(tmp_path, changes):
    read = Reader(write_report(write_run(tmp_path / "run", **(EXPORTED | changes)), origin()).read_text())
    assert read.wrong == []
    assert "500 kB" in read.text
