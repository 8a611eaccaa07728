"""Gathering a sweep, and the table of several runs. Oracle: hand-made directories; means and deviations worked out by hand."""

import json

import pytest
import yaml

from qat.report.__main__ import main
from qat.report.sweep import gather, group_rows, publish
from qat.utils.files import csv_rows
from tests.errors import usage_error
from tests.report.pages import HOSTILE, RESULTS, cells, read

EPOCHS = ("trainer.max_epochs=5", "run_dir=a")


def job(folder, *overrides, **results):
    """A job's directory: what Hydra writes, and what the run leaves."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    if results:
        (folder / "results.json").write_text(json.dumps(RESULTS | results))


@pytest.fixture
def folder(tmp_path):
    """Two groups of three seeds; of the second one job failed, and one was killed."""
    root = tmp_path / "sweep"
    failed = {"top1": None, "error": "the loss\nis nan"}
    jobs = {
        "0": ("ofq_2bit", 1, {"top1": 90.0}),
        "1": ("ofq_2bit", 2, {"top1": 92.0}),
        "2": ("ofq_2bit", 10, {"top1": 97.0}),
        "3": ("ofq_4bit", 1, {"top1": 80.0}),
        "4": ("ofq_4bit", 2, failed),
    }
    for number, (quant, seed, found) in jobs.items():
        job(root / number, f"quant={quant}", f"seed={seed}", *EPOCHS, seed=seed, **found)
    job(root / "10", "quant=ofq_4bit", "seed=10", *EPOCHS)
    return root


def test_the_terminal_has_a_row_for_each_group_and_a_line_for_each_failed_job(folder, capsys):
    publish(folder, report=False, refused={"1": "contains best.ckpt already"})
    out = capsys.readouterr().out
    assert out.startswith("6 jobs: 4 done, 1 failed, 1 not finished\n")
    assert out.splitlines()[-4:] == [
        "job 1 (quant=ofq_2bit seed=2): contains best.ckpt already",
        "job 4 (quant=ofq_4bit seed=2): the loss is nan",
        "job 10 (quant=ofq_4bit seed=10): no results.json: killed, or still running",
        f"in {folder}: sweep.csv",
    ]
    rows = [row[:3] for row in cells(out)]
    # 90, 92, 97: mean 93, squares 9 + 1 + 16 over n - 1 = 2, so the deviation is sqrt(13).
    assert rows == [["ofq_2bit", "3", "93.00 ± 3.61"], ["ofq_4bit", "1", "80.00"]]
    assert not (folder / "report.html").exists()


def test_the_csv_has_a_row_for_each_job(folder):
    publish(folder, report=False)
    rows = csv_rows(folder / "sweep.csv")
    assert [row["job"] for row in rows] == ["0", "1", "2", "3", "4", "10"]
    assert [row["status"] for row in rows] == ["done"] * 4 + ["failed", "not finished"]
    assert {
        "overrides.quant": "ofq_2bit",
        "overrides.seed": "1",
        "top1": "90.0",
        "model": RESULTS["model"],
    }.items() <= rows[0].items()
    assert rows[4]["error"] == "the loss is nan"
    assert "recipe" not in rows[0]


def test_the_page_has_the_table_its_figure_and_every_job(folder):
    (folder / "0" / "report.html").touch()
    publish(folder, report=True)
    found = read(folder / "report.html")
    for text in (
        "sweep: Comparison of quant, seed",
        "93.00 ± 3.61",
        "the loss is nan",
        "quant=ofq_2bit: 93.00 ± 3.61 %; quant=ofq_4bit: 80.00 %",
    ):
        assert text in found.text
    assert [link["href"] for link in found.all("a") if "report.html" in link["href"]] == [
        "0/report.html"
    ]
    assert len(found.all("img")) == 1
    page = (folder / "report.html").read_text()
    assert page.index("<img") < page.index("<table")


def test_of_a_refused_job_the_results_keep_the_settings_they_came_from(folder):
    # Hydra has written the settings of the new job into the directory of the old one.
    (folder / "3" / "command.json").write_text(json.dumps({"overrides": ["quant=ofq_3bit"]}))
    assert gather(folder)[3]["overrides.quant"] == "ofq_3bit"


def test_nested_sweeps_are_gathered_together(folder):
    job(folder / "more" / "0", "quant=ofq_2bit", "seed=3", *EPOCHS, seed=3, top1=93.0)
    assert gather(folder)[-1]["job"] == "more/0"
    assert group_rows(gather(folder))[0]["n"] == "4"


def test_long_numbers_are_shortened_where_they_are_shown(tmp_path):
    for number, rate in enumerate((
        "0.00024156772025296256",
        "0.001",
        "0.00024156",
    )):  # two that look alike are two
        job(tmp_path / str(number), f"optimizer.lr={rate}", top1=90.0)
    publish(tmp_path, report=True)
    assert [row["optimizer.lr"] for row in group_rows(gather(tmp_path))] == [
        "0.0002416",
        "0.001",
        "0.0002416",
    ]
    assert "0.00024156772025296256" in (tmp_path / "sweep.csv").read_text()


def test_values_of_the_command_line_are_shown_without_quotes_and_control_characters(
    tmp_path, capsys
):
    for number, root in enumerate(("'2024_01'", r"'it\'s'", '"a b"', "b\x1b[31m\nc")):
        job(tmp_path / str(number), f"data.root={root}", top1=90.0, error="\x1b[2J")
    publish(tmp_path, report=True)
    roots = [row["overrides.data.root"] for row in gather(tmp_path)]
    assert roots == ["2024_01", "it's", "a b", r"b\x1b[31m\x0ac"]
    for text in (capsys.readouterr().out, (tmp_path / "report.html").read_text()):
        assert "\x1b" not in text


@pytest.mark.parametrize("name", ["results.json", "command.json", ".hydra/overrides.yaml"])
def test_links_out_of_a_job_are_not_followed(tmp_path, name):
    job(tmp_path / "sweep/0", "seed=1", top1=90.0)
    job(tmp_path / "sweep/1", "seed=2", top1=90.0)
    outside = tmp_path / "outside"
    outside.write_text('{"top1": 12.5, "overrides": ["a=12.5"], "a=12.5": 0}')
    path = tmp_path / "sweep/1" / name
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    publish(tmp_path / "sweep", report=True)
    assert "12.5" not in (tmp_path / "sweep/sweep.csv").read_text()


def test_nothing_in_a_sweep_is_taken_for_markup(tmp_path):
    job(tmp_path / "0", f"ckpt={HOSTILE}", top1=90.0)
    job(tmp_path / "1", "ckpt=b", top1=None, error=HOSTILE)
    job(tmp_path / "2", r"ckpt=$\no$", top1=80.0)
    publish(tmp_path, report=True)
    found = read(tmp_path / "report.html")
    assert found.text.count("document.title='hacked'") > 2
    assert len(found.all("script")) == 1


def test_a_setting_named_loss_and_the_mean_loss_have_columns_of_their_own(tmp_path):
    for name in ("ce", "kd", "infonce"):
        job(tmp_path / name, f"loss={name}", loss=0.5)
    assert [row["job"] for row in gather(tmp_path)] == ["ce", "infonce", "kd"]
    rows = group_rows(gather(tmp_path))
    assert [(row["loss"], row["mean loss"]) for row in rows] == [
        (name, "0.5000") for name in ("ce", "infonce", "kd")
    ]


def test_a_sweep_of_few_classes_has_no_top5(tmp_path, capsys):
    job(tmp_path / "0", "seed=1", top1=90.0, top5=None)
    publish(tmp_path, report=False)
    assert main([str(tmp_path / "0")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 job: 1 done\n")
    assert "top-5" not in out


def test_a_checkpoint_for_each_seed_splits_no_group(tmp_path):
    for seed, top1 in enumerate([90.0, 92.0]):
        start = f"ckpt=runs/float-seed{seed}/best.ckpt"
        job(tmp_path / str(seed), f"seed={seed}", start, "quant=ofq_2bit", seed=seed, top1=top1)
    (row,) = group_rows(gather(tmp_path))
    assert (row["ckpt"], row["n"]) == ("runs/float-seed*/best.ckpt", "2")
    assert row["top-1 %"] == "91.00 ± 1.41"


def test_a_number_that_is_not_the_seed_splits_groups(tmp_path):
    for number in (2, 3):
        job(tmp_path / str(number), "seed=0", f"model=seed{number}_net", seed=0, top1=90.0)
    assert [row["model"] for row in group_rows(gather(tmp_path))] == ["seed2_net", "seed3_net"]


def test_a_folder_without_runs_is_refused(tmp_path):
    with usage_error("sweep='.*nowhere': must be a folder with runs below it"):
        publish(tmp_path / "nowhere", report=False)


def test_a_table_of_several_runs(folder, capsys):
    job(folder / "seed1" / "fp", quant="fp", recipe=None, seed=1, top1=95.0)
    job(folder / "seed2" / "fp", quant="fp", recipe=None, seed=2, top1=97.0)
    for seed, top1 in ((1, 91.0), (2, 92.0)):
        job(folder / f"seq_seed{seed}", quant="seq_2bit", seed=seed, top1=top1)
    assert main([str(folder / "seq_seed1"), str(folder / "seq_seed2")]) == 0
    assert cells(capsys.readouterr().out)[0][2] == "91.50 ± 0.71"
    job(folder / "bad", quant="lsq_2bit", error="boom")
    assert main([str(folder / name) for name in ("0", "seed1/fp", "seed2/fp", "bad")]) == 0
    rows = [row[:3] for row in cells(capsys.readouterr().out)]
    assert rows[0] == ["ofq_2bit", "W2 A2", "90.00"]
    assert ["fp", "W32 A32", "96.00 ± 1.41"] in rows
    assert ["lsq_2bit", "failed", "–"] in rows
    assert main([str(folder / "10")]) == 1
    assert (
        capsys.readouterr().err
        == f"error: {folder / '10'}: must be the directory of a run; there is no results.json\n"
    )


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("file", "text"),
    [
        *((".hydra/overrides.yaml", text) for text in ("- a=1\n- 'b=", "5", "- {a: 1}\n", "\x00")),
        *(("command.json", json.dumps({"overrides": value})) for value in (5, "a=1", [5, None])),
        *(
            ("results.json", text)
            for text in (
                '{"top1": "x"}',
                '{"top1": NaN}',
                '{"top1": 1e308}',
                '{"top1": [1]}',
                "[",
                "5",
            )
        ),
    ],
)
def test_a_damaged_job_leaves_the_rest_of_the_table(folder, capsys, file, text):
    (folder / "2" / file).write_text(text)
    publish(folder, report=True)
    out = capsys.readouterr().out
    assert "ofq_4bit" in out
    assert len((folder / "sweep.csv").read_text().splitlines()) == 7
