"""Gathering a sweep. Oracle: hand-made job directories, and means and deviations worked out by hand."""

import csv
import json

import pytest
import yaml

from qat.errors import UsageError
from qat.report.sweep_jobs import gather, read_sweep, write_tables
from qat.report.sweep_page import sweep_page
from qat.report.sweep_table import closing_lines, shown, table
from tests.report.pages import RESULTS, Reader
from tests.report.test_page import HOSTILE

BOTH = {"top5": 99.0, "val_top1": 88.0}


def job(folder, overrides, *, began=True, **results):
    """A job's directory: what Hydra writes, what the run writes once it has begun, what it leaves."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    if began:
        (folder / "command.json").write_text(json.dumps({"command": "train.py", "overrides": overrides}))
    if results:
        (folder / "results.json").write_text(json.dumps(RESULTS | results))


@pytest.fixture
def folder(tmp_path):
    """Two groups of two and three seeds; one job failed, one was killed, one never got to its first step."""
    root = tmp_path / "sweep"
    for number, (seed, top1) in enumerate([(1, 90.0), (2, 92.0), (10, 97.0)]):
        job(root / str(number), ["quant=ofq_2bit", f"seed={seed}", "trainer.max_epochs=5", "run_dir=a"], seed=seed, top1=top1, **BOTH)
    job(root / "3", ["quant=ofq_4bit", "seed=1", "trainer.max_epochs=5", "run_dir=a"], seed=1, top1=80.0, top5=98.0, val_top1=95.0)
    job(root / "4", ["quant=ofq_4bit", "seed=2", "trainer.max_epochs=5"], seed=2, top1=None, error="the loss\nis nan")
    job(root / "10", ["quant=ofq_4bit", "seed=10", "trainer.max_epochs=5"])
    return root


def lines(folder):
    return closing_lines(gather(folder), {})


def test_jobs_that_differ_in_their_seed_are_one_group(folder):
    two, four = gather(folder).groups
    assert two.setting == {"quant": "ofq_2bit"}
    assert four.setting == {"quant": "ofq_4bit"}
    # 90, 92, 97: mean 93, squares 9 + 1 + 16 over n - 1 = 2, so the deviation is sqrt(13).
    assert two.statistic("top1").mean == pytest.approx(93.0)
    assert two.statistic("top1").std == pytest.approx(13**0.5)
    assert four.statistic("top1").mean == 80.0
    assert four.statistic("top1").std is None


def test_jobs_come_in_the_order_of_their_numbers(folder):
    assert [one.name for one in gather(folder).jobs] == ["0", "1", "2", "3", "4", "10"]


def test_failed_and_killed_jobs_are_named_and_count_in_no_mean(folder):
    sweep = gather(folder)
    assert sweep.counted == "6 jobs: 4 done, 1 failed, 1 not finished"
    assert lines(folder)[:2] == [
        "job 4 (quant=ofq_4bit seed=2): the loss is nan",
        "job 10 (quant=ofq_4bit seed=10): no results.json: killed, or still going",
    ]
    rows = list(zip(*(column.cells for column in table(sweep).columns), strict=True))
    assert [tuple(map(str, row[:3])) for row in rows] == [("ofq_2bit", "3", "93.00 ± 3.61"), ("ofq_4bit", "1 of 3", "80.00")]


def test_validation_chooses_the_best_group_and_the_test_split_does_not(folder):
    assert lines(folder)[2] == "highest validation top-1: quant=ofq_4bit (95.00 %); some have one seed: how much seeds change is not known"


@pytest.mark.parametrize(
    ("second", "said"),
    [
        # Standard deviations of two values that are 2 and d apart: sqrt(2) and d / sqrt(2); means 81 and 78 + d / 2.
        ((78.0, 79.0), "(81.00 ± 1.41 %)"),
        ((78.0, 81.0), "(81.00 ± 1.41 %); within the spread over seeds of quant=b: no winner"),
    ],
)
def test_a_best_is_called_where_spreads_do_not_overlap(tmp_path, second, said):
    for i, (name, value) in enumerate([("a", 80.0), ("a", 82.0), *(("b", one) for one in second)]):
        job(tmp_path / str(i), [f"quant={name}", f"seed={i}"], seed=i, top1=50.0, val_top1=value)
    assert lines(tmp_path)[0] == f"highest validation top-1: quant=a {said}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"top1": [1], "seed": 1}', "top1=[1]"),
        ('{"top1": Infinity, "seed": 1}', "top1=inf"),
        ('{"top1": 1e300, "seed": 1}', "top1=1e+300"),
        ('{"top1": 50.0, "seed": {"a": 1}}', "seed={'a': 1}"),
        (f'{{"size_bytes": {"9" * 5000}, "seed": 1}}', "size_bytes=inf"),
    ],
)
def test_one_damaged_file_ends_no_table(folder, text, said):
    (folder / "3" / "results.json").write_text(text)
    sweep = gather(folder)
    assert sweep.counted == "6 jobs: 3 done, 1 failed, 1 damaged, 1 not finished"
    assert lines(folder)[0].endswith(f"results.json is damaged: {said}")
    write_tables(sweep)
    assert Reader(sweep_page(sweep)) is not None


def test_a_folder_in_the_place_of_a_file_is_no_result(folder):
    (folder / "3" / "results.json").unlink()
    (folder / "3" / "results.json").mkdir()
    assert [one.status for one in gather(folder).jobs][3] == "not finished"


def test_nested_sweeps_and_other_commands_are_gathered_together(folder):
    job(folder / "more" / "0", ["quant=ofq_2bit", "seed=3", "trainer.max_epochs=5"], seed=3, top1=91.0)
    job(folder / "0" / "eval", ["ckpt=best.ckpt"], began=False, command="eval", seed=0, top1=89.0)
    sweep = gather(folder)
    assert [one.name for one in sweep.jobs[-2:]] == ["10", "more/0"]
    assert [dict(group.setting) for group in sweep.groups] == [
        {"command": "train", "quant": "ofq_2bit", "trainer.max_epochs": "5"},
        {"command": "eval", "ckpt": "best.ckpt"},
        {"command": "train", "quant": "ofq_4bit", "trainer.max_epochs": "5"},
    ]
    assert len(sweep.groups[0].done) == 4


def test_of_a_refused_job_the_results_keep_the_settings_they_came_from(folder):
    # Hydra has written the settings of the new job into the directory of the old one.
    (folder / "3" / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(["quant=lsq_8bit", "seed=7"]))
    assert gather(folder).jobs[3].setting["quant"] == "ofq_4bit"


def test_without_overrides_results_say_what_a_run_was(tmp_path):
    for name, top1 in (("a", 90.0), ("b", 92.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(RESULTS | {"top1": top1, "seed": len(name)}))
    (group,) = gather(tmp_path).groups
    assert (len(group.done), group.statistic("top1").mean) == (2, 91.0)


def test_a_job_without_an_accuracy_beside_others_that_have_one_does_not_count(folder):
    job(folder / "11", ["quant=ofq_4bit", "seed=11", "trainer.max_epochs=5"], seed=11, top1=None, loss=1.0)
    assert "job 11 (quant=ofq_4bit seed=11): its results.json has no accuracy" in lines(folder)
    assert len(gather(folder).groups[1].done) == 1


@pytest.mark.parametrize("text", ["{half", "[]", ""])
def test_results_that_cannot_be_read_are_named(folder, text):
    (folder / "3" / "results.json").write_text(text)
    assert lines(folder)[0] == "job 3 (quant=ofq_4bit seed=1): results.json is damaged"


def test_numbers_are_shortened_where_they_are_shown_and_whole_in_the_tables(tmp_path):
    for number, rate in enumerate(("0.00024156772025296256", "0.001")):
        job(tmp_path / str(number), [f"optimizer.lr={rate}"], top1=90.0, val_top1=90.0 - number)
    assert (
        lines(tmp_path)[0]
        == "highest validation top-1: optimizer.lr=0.0002416 (90.00 %); some have one seed: how much seeds change is not known"
    )
    write_tables(gather(tmp_path))
    assert "0.00024156772025296256" in (tmp_path / "sweep.csv").read_text()
    assert "0.00024156772025296256" in (tmp_path / "sweep_groups.csv").read_text()


def test_tables_have_every_job_with_every_key_and_every_group(folder):
    write_tables(gather(folder))
    with (folder / "sweep.csv").open() as file:
        jobs = list(csv.DictReader(file))
    assert [row["status"] for row in jobs] == ["done"] * 4 + ["failed", "not finished"]
    assert jobs[0] | {"job": "0", "overrides.quant": "ofq_2bit", "top1": "90.0", "recipe.bits": "2", "versions.torch": "2.14.1"} == jobs[0]
    assert jobs[4]["error"] == "the loss is nan"
    with (folder / "sweep_groups.csv").open() as file:
        two, four = list(csv.DictReader(file))
    assert (two["n"], two["jobs"], two["seeds"], float(two["top1_mean"])) == ("3", "3", "1 2 10", 93.0)
    assert float(two["top1_std"]) == pytest.approx(13**0.5)
    assert (four["n"], four["jobs"], four["top1_std"]) == ("1", "3", "")


def test_sizes_that_are_all_equal_have_no_deviation(folder):
    assert shown("size_bytes", gather(folder).groups[0].statistic("size_bytes")) == "190,236"


def test_the_page_shows_groups_jobs_and_errors(folder):
    (folder / "0" / "report.html").touch()
    read = Reader(sweep_page(gather(folder)))
    assert read.wrong == []
    for text in ("93.00 ± 3.61", "the loss is nan", "1 of 3", "highest validation top-1", "trainer.max_epochs"):
        assert text.lower() in read.text.lower(), text
    assert [link["href"] for link in read.all("a") if "report.html" in link["href"]] == ["0/report.html"]
    assert len(read.all("svg")) == 1
    assert "quant=ofq_2bit: 93.00 ± 3.61 % (n = 3); quant=ofq_4bit: 80.00 % (n = 1)" in read.text


def test_over_one_number_the_page_has_an_axis_of_it(tmp_path):
    for number in range(4):
        job(tmp_path / str(number), [f"optimizer.lr={10.0**-number}"], top1=90.0 - number)
    page = sweep_page(gather(tmp_path))
    assert ">optimizer.lr</text>" in page
    assert Reader(page).wrong == []


def test_nothing_in_a_sweep_is_taken_for_markup(tmp_path):
    job(tmp_path / "0", [f"ckpt={HOSTILE}"], top1=90.0)
    job(tmp_path / "1", ["ckpt=b"], top1=None, error=HOSTILE)
    page = sweep_page(gather(tmp_path))
    assert HOSTILE not in page
    assert Reader(page).wrong == []
    assert page.count("<script") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "no such folder"), ("empty", "there is no results.json below it"), ("sweep/0", "is a run itself; run=")],
)
def test_what_is_no_sweep_is_refused(folder, name, words):
    (folder.parent / "empty").mkdir()
    with pytest.raises(UsageError, match=f"sweep='.*{name}': {words}"):
        read_sweep(folder.parent / name)
