"""`analysis=oscillation`. Oracle: logs written here by hand; for a run, the table that its callback wrote."""

import csv

import pytest
import torch

from qat.analysis import NO_IMAGES, StudiedNet
from qat.analysis.oscillation import FLIPS, OSCILLATING, OscillationAnalysis, read_curves
from tests.conftest import train
from tests.errors import usage_error

HEADER = "epoch,freeze/frozen,osc/flips,osc/share,osc/share/blocks.0.fc1,step"
LINES = [",,0,0.1,0.15,4", "0,,,,,4", ",0.25,100,0.3,0.35,9", ",0.5,120,0.2,0.2,19"]


def write_run(folder, lines=LINES, header=HEADER):
    """Write a run directory, and return the net of its checkpoint."""
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join([header, *lines]) + "\n")
    return StudiedNet(
        folder.name, torch.nn.Identity(), (1, 8, 8), folder / "checkpoints" / "best.ckpt"
    )


def analysed(*nets):
    return OscillationAnalysis().run(nets, NO_IMAGES)


@pytest.mark.parametrize(
    ("more", "share"),
    [
        ([], {4: 10, 9: 30, 19: 20}),
        (
            [",0.5,110,0.25,0.2,9"],
            {4: 10, 9: 25, 19: 20},
        ),  # a run that was resumed logs a step again
    ],
)
def test_the_log_is_read_as_it_is(tmp_path, more, share):
    write_run(tmp_path / "run", LINES + more)
    curves = read_curves(tmp_path / "run" / "metrics.csv")
    assert curves[OSCILLATING] == pytest.approx(share)
    assert curves[FLIPS] == (
        pytest.approx({9: 20, 19: 2}) if not more else pytest.approx({9: 22, 19: 1})
    )


def test_half_a_line_after_a_kill_is_ignored(tmp_path):
    write_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write(",0.5,110,0.25,0.2,2")  # of step 29
    assert [*read_curves(tmp_path / "run" / "metrics.csv")[OSCILLATING]] == [4, 9, 19]


def test_several_runs_lie_over_each_other(tmp_path):
    found = analysed(write_run(tmp_path / "a"), write_run(tmp_path / "b", LINES[:2]))
    (drawing,) = found.drawings
    assert [line.get_label() for line in drawing.figure.axes[0].lines] == ["a", "b"]
    assert [axis.get_ylabel() for axis in drawing.figure.axes] == [OSCILLATING, FLIPS]
    assert found.summary == {"a": {OSCILLATING: 20, FLIPS: 2}, "b": {OSCILLATING: 10}}
    assert (
        "a: oscillating weights, % 10.00 at first, 30.00 at most, 20.00 at the end" in drawing.alt
    )
    assert found.tables == []


@pytest.mark.parametrize("lines", [[], ["0,,,,,4"]])
def test_a_run_that_tracked_nothing_says_what_turns_it_on(tmp_path, lines):
    net = write_run(tmp_path / "run", lines)
    with usage_error(f"^ckpt='{net.path}': .*callbacks=.default,oscillation.$"):
        analysed(net)
    with usage_error(r"ckpt=null: must be a checkpoint"):
        analysed(StudiedNet("net", torch.nn.Identity(), (1, 8, 8)))


def test_a_real_run(tmp_path):
    run = train(
        tmp_path / "run", "quant=ofq_2bit", "callbacks=[default,oscillation]", "optimizer.lr=0.1",
        "trainer.max_epochs=3", "trainer.log_every_n_steps=1", "callbacks.oscillation.momentum=0.2",
    )  # fmt: skip
    found = analysed(
        StudiedNet("run", torch.nn.Identity(), (1, 8, 8), run / "checkpoints" / "last.ckpt")
    )
    with (run / "oscillation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [*found.tables[0].rows] == [{"net": "run", **row} for row in rows]
    assert found.summary["run"][OSCILLATING] == pytest.approx(
        100 * int(rows[-1]["oscillating"]) / int(rows[-1]["weights"]), rel=1e-4
    )
    assert len(found.drawings[0].figure.axes[0].lines[0].get_xdata()) == 6
