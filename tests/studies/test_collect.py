"""What is kept of a run. Oracle: results and tables written by hand."""

import json

import pytest

from studies.claims import Arm
from studies.collect import Done, collect


def write(folder, name, *rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture
def kept(tmp_path):
    """The record of a run that ended with these results; its files are in `run` already."""

    def run(**results):
        path, arm = tmp_path / "C1" / "arm-seed0.json", Arm("C1", "arm", "an arm", results["command"])
        made_with = {"device": "a CPU", "versions": {"torch": "2.14.1"}, "git_commit": "0123abc", "wall_seconds": 1.0}
        collect(arm, 0, Done(results | made_with, tmp_path / "run", arm.command, "python ..."), {}, {}, path)
        return json.loads(path.read_text(encoding="utf-8"))

    return run


def test_a_search_is_kept_with_its_fitness_and_what_it_cost(kept):
    search = {"method": "adam", "fitness_before": 26.5, "fitness": 26.25, "evaluations": 24, "images": 24000, "seconds": 9.0}
    found = kept(command="ptq", top1=63.0, search=search)["metrics"]
    assert found == {"top1": 63.0, "wall_seconds": 1.0, "fitness_before": 26.5, "fitness": 26.25, "evaluations": 24, "images": 24000}
    assert kept(command="ptq", top1=53.0)["metrics"] == {"top1": 53.0, "wall_seconds": 1.0}


@pytest.mark.parametrize(("column", "values"), [("loss", (1.0, 2.0)), ("infonce", (26.0, 27.0))])
def test_a_landscape_is_of_what_it_was_asked_for(kept, tmp_path, column, values):
    columns = ["x", "y", "loss"] if column == "loss" else ["x", "y", "loss", "infonce"]
    rows = [{"x": x, "y": 0.5, "loss": loss, "infonce": 25 + loss} for x, loss in ((0.1, 2.0), (-0.1, 1.0))]
    write(tmp_path / "run", "landscape.csv", ",".join(columns), *(",".join(str(row[key]) for key in columns) for row in rows))
    found = kept(command="analyze", analysis="landscape", summary={"net": {"roughness": 0.5}})
    assert found["maps"] == {"loss": {"x": [-0.1, 0.1], "y": [0.5], "z": [list(values)]}}
    assert found["metrics"] == {"roughness": 0.5}
