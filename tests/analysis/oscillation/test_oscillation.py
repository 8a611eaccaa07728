"""`analysis=oscillation`. Oracle: logs and states written here by hand; for a run, the table that its callback wrote."""

import csv
import math

import pytest
import torch

from qat.analysis import StudiedNet, write_outcome
from qat.analysis.oscillation import OscillationAnalysis
from qat.analysis.oscillation.recorded import Series, per_step, read_run, run_folder
from qat.errors import UsageError
from tests import tiny
from tests.conftest import train

HEADER = "epoch,freeze/frozen,osc/band,osc/flips,osc/frequency,osc/share,osc/share/blocks.0.fc1,osc/share/blocks.0.fc2,step,train/loss_step"
LINES = [
    ",,0.02,0,0.001,0.1,0.15,0.05,4,2.5",
    "0,,,,,,,,4,",
    ",0.25,0.03,100,0.002,0.3,0.35,0.25,9,2.0",
    ",0.5,0.01,120,0.001,0.2,0.2,0.2,19,1.5",
]
CONFIG = "callbacks:\n  oscillation:\n    momentum: {momentum}\n    threshold: {threshold}\n"


def packed(frequencies, momentum, flips):
    return {"frequency": torch.tensor(frequencies), "flips": torch.tensor(flips)}


def write_run(folder, lines=LINES, weights=None, callbacks=None, momentum=0.01, threshold=0.005):
    """A run directory; gives the net of its checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    if lines is not None:
        (folder / "metrics.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    (folder / "config.yaml").write_text(CONFIG.format(momentum=momentum, threshold=threshold))
    states = dict(callbacks or {})
    if weights is not None:
        states["Oscillation"] = {"weights": weights, "activations": {}}
    content = {"callbacks": states, "global_step": 20, "pytorch-lightning_version": "2.6.0", "state_dict": {}}
    torch.save(content, folder / "checkpoints" / "best.ckpt")
    return StudiedNet(folder.name, torch.nn.Identity(), "vit", (1, 8, 8), folder / "checkpoints" / "best.ckpt")


WEIGHTS = {
    "blocks.0.fc1.weight_quantizer": packed([0.0, 0.015, 0.004, 0.3], 0.01, 7),
    "blocks.0.fc2.weight_quantizer": packed([0.0, 0.006], 0.01, 1),
}


def table(found, name):
    (rows,) = [t.rows for t in found.tables if t.name == name]
    return rows


def test_the_log_is_read_as_it_is(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert run.totals["osc/share"] == Series([4, 9, 19], [0.1, 0.3, 0.2])
    assert run.layers == {"blocks.0.fc1": Series([4, 9, 19], [0.15, 0.35, 0.2]), "blocks.0.fc2": Series([4, 9, 19], [0.05, 0.25, 0.2])}
    assert run.frozen == Series([9, 19], [0.25, 0.5])
    assert per_step(run.totals["osc/flips"]) == Series([9, 19], [20.0, 2.0])
    assert (run.step, run.threshold, list(run.now)) == (20, 0.005, [])


def test_what_annealing_lets_move_is_turned_round(tmp_path):
    path = write_run(tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("freeze/frozen", "cga/trainable"))
    assert read_run(path).frozen == Series([9, 19], [0.75, 0.5])


def test_of_a_step_logged_twice_the_later_line_counts(tmp_path):
    run = read_run(write_run(tmp_path / "run", [*LINES, ",0.5,0.01,110,0.001,0.25,0.2,0.2,9,2.0", ",,,nan,,nan,,,29,"]))
    assert run.totals["osc/share"] == Series([4, 9, 19], [0.1, 0.25, 0.2])


def test_half_a_line_that_a_kill_has_left_is_none(tmp_path):
    path = write_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write(",0.5,0.01,110,0.001,0.25,0.2,0.2,2")  # of step 29
    assert read_run(path).totals["osc/share"] == Series([4, 9, 19], [0.1, 0.3, 0.2])


@pytest.mark.parametrize("momentum", [0.01, 0.05])
def test_the_state_is_unpacked_with_the_momentum_of_the_run(tmp_path, momentum):
    weights = {"blocks.0.fc1.weight_quantizer": packed([0.0, 0.02, 0.3], momentum, 7)}
    (state,) = read_run(write_run(tmp_path / "run", weights=weights, momentum=momentum)).now
    assert state.layer == "blocks.0.fc1"
    assert state.frequency.tolist() == pytest.approx([0.0, 0.02, 0.3], rel=0.01)
    assert state.flips == 7


def test_numbers_of_the_layers_now(tmp_path):
    found = OscillationAnalysis().outcome([write_run(tmp_path / "run", weights=WEIGHTS)], [])
    first, second = table(found, "oscillation_layers")
    assert (first["layer"], first["weights"], first["oscillating, %"], first["flips so far"]) == ("blocks.0.fc1", 4, 50, 7)
    assert first["mean frequency"] == pytest.approx(0.319 / 4, rel=1e-3)
    assert (second["layer"], second["oscillating, %"]) == ("blocks.0.fc2", 50)
    assert found.summary["run"]["share_now_percent"] == pytest.approx(50)
    assert found.summary["run"]["share_logged_last_percent"] == pytest.approx(20)
    assert found.summary["run"]["frozen_logged_last_percent"] == pytest.approx(50)
    counts = {row["flips per look"]: row["weights"] for row in table(found, "oscillation_frequencies")}
    assert counts == {
        "below 0.0001": 2,
        "up to 0.005": 1,
        "up to 0.01": 1,
        "up to 0.02": 1,
        "up to 0.05": 0,
        "up to 0.1": 0,
        "up to 1": 1,
    }


def test_the_threshold_is_that_of_the_run_unless_it_is_given(tmp_path):
    net = write_run(tmp_path / "run", weights=WEIGHTS, threshold=0.1)
    for analysis, threshold, share in ((OscillationAnalysis(), 0.1, 100 / 6), (OscillationAnalysis(threshold=0.005), 0.005, 50)):
        found = analysis.outcome([net], [])
        assert found.summary["run"]["threshold"] == threshold
        assert found.summary["run"]["share_now_percent"] == pytest.approx(share)
        (axis,) = next(d for d in found.drawings if d.name == "oscillation_frequencies").figure.axes
        assert [list(line.get_xdata()) for line in axis.lines if line.get_linestyle() == "--"] == [[threshold, threshold]]


def test_several_runs_lie_over_each_other(tmp_path):
    nets = [write_run(tmp_path / "a", weights=WEIGHTS), write_run(tmp_path / "b", LINES[:2])]
    found = OscillationAnalysis().outcome(nets, [])
    curves = next(d for d in found.drawings if d.name == "oscillation_curves").figure.axes[0]
    assert [line.get_label() for line in curves.lines if not line.get_label().startswith("_")] == ["a", "b"]
    assert {d.name for d in found.drawings} == {
        "oscillation_curves",
        "oscillation_map_1",
        "oscillation_map_2",
        "oscillation_top",
        "oscillation_frequencies",
    }
    assert {row["net"] for row in table(found, "oscillation")} == {"a", "b"}
    assert {row["net"] for row in table(found, "oscillation_layers")} == {"a"}


def test_a_state_without_a_log_and_a_log_without_a_state(tmp_path):
    state_only = OscillationAnalysis().outcome([write_run(tmp_path / "a", None, WEIGHTS)], [])
    assert {d.name for d in state_only.drawings} == {"oscillation_top", "oscillation_frequencies"}
    assert state_only.summary["a"]["share_logged_last_percent"] is None
    log_only = OscillationAnalysis().outcome([write_run(tmp_path / "b")], [])
    assert {d.name for d in log_only.drawings} == {"oscillation_curves", "oscillation_map"}
    assert log_only.summary["b"]["share_now_percent"] is None


def test_a_net_in_which_nothing_has_turned_back_is_drawn(tmp_path):
    still = {"blocks.0.fc1.weight_quantizer": packed([0.0, 0.0, 0.0], 0.01, 0)}
    found = OscillationAnalysis().outcome([write_run(tmp_path / "run", weights=still)], [])
    write_outcome(tmp_path / "out", "oscillation", {}, found)
    assert (tmp_path / "out" / "oscillation_frequencies.png").stat().st_size > 0
    assert "highest frequency 0.000" in next(d.alt for d in found.drawings if d.name == "oscillation_frequencies")


def test_iterative_freezing_tracks_too(tmp_path):
    codes = torch.zeros(4)
    tracked = {"frequency": torch.tensor([0.0, 0.0, 0.2, 0.3])}
    frozen = {"frozen": torch.tensor([False, False, False, True]), "codes": codes, "mean": codes}
    callbacks = {"IterativeFreezing": {"codes": {"fc.weight_quantizer": tracked}, "frozen": {"fc.weight_quantizer": frozen}}}
    found = OscillationAnalysis().outcome([write_run(tmp_path / "run", None, callbacks=callbacks)], [])
    (row,) = table(found, "oscillation_layers")
    assert (row["layer"], row["oscillating, %"], row["frozen, %"]) == ("fc", 50, 25)
    assert "flips so far" not in row


def test_layers_that_oscillate_and_growth_are_told(tmp_path):
    growing = [f",,0.02,{step},0.001,{share},0.1,0.1,{step},2.5" for step, share in ((1, 0.1), (2, 0.1), (3, 0.2), (4, 0.3))]
    many = {f"blocks.{n}.fc.weight_quantizer": packed([0.0, 0.02], 0.01, 1) for n in range(5)}
    layers, growth = OscillationAnalysis().outcome([write_run(tmp_path / "run", growing, many)], []).warnings
    assert layers.where.startswith("run: blocks.")
    assert layers.where.endswith(" and 2 more")
    assert layers.what == "up to 50 % of the weights of a layer oscillate"
    assert "callbacks=[default,cga,oscillation]" in layers.advice
    assert growth.what == "the share of oscillating weights grew by 50 % in the second half of the run"
    calm = {"fc.weight_quantizer": packed([0.0] * 20 + [0.02], 0.01, 1)}
    assert OscillationAnalysis().outcome([write_run(tmp_path / "calm", LINES, calm)], []).warnings == []


def test_a_run_that_tracked_nothing_says_what_turns_it_on(tmp_path):
    net = write_run(tmp_path / "run", [])
    with pytest.raises(UsageError) as error:
        OscillationAnalysis().outcome([net], [])
    expected = "its run tracked no oscillation; train with callbacks=[default,oscillation], in the same run_dir"
    assert str(error.value) == f"ckpt={str(net.path)!r}: {expected}"


def test_a_net_of_no_file_is_a_mistake():
    net = StudiedNet("net", tiny.vit(), "vit", tiny.SIZE)
    with pytest.raises(UsageError, match=r"^ckpt=None: oscillation is read from the run of a checkpoint"):
        OscillationAnalysis().outcome([net], [])


@pytest.mark.parametrize("content", ["not yaml: [", "- a list\n", "callbacks: null\n", ""])
def test_a_config_that_says_nothing_is_no_obstacle(tmp_path, content):
    net = write_run(tmp_path / "run", weights=WEIGHTS)
    (tmp_path / "run" / "config.yaml").write_text(content)
    assert read_run(net).threshold == 0.005


def test_a_file_that_is_no_checkpoint_of_lightning_has_its_log(tmp_path):
    net = write_run(tmp_path / "run", weights=WEIGHTS)
    torch.save({"state_dict": {}}, net.path)
    assert list(read_run(net).now) == []


def test_the_run_is_the_folder_above_checkpoints(tmp_path):
    assert run_folder(tmp_path / "checkpoints" / "last.ckpt") == tmp_path.resolve()
    assert run_folder(tmp_path / "last.ckpt") == tmp_path.resolve()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 0}, "analysis.top=0: must be an integer of at least 1"),
        ({"threshold": 1.0}, "analysis.threshold=1.0: must be a number from 0 to below 1"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(UsageError) as error:
        OscillationAnalysis(**settings)
    assert str(error.value) == message


def test_a_real_run(tmp_path):
    run = train(
        tmp_path / "run", "quant=ofq_2bit", "callbacks=[default,oscillation]", "optimizer.lr=0.1",
        "trainer.max_epochs=3", "trainer.log_every_n_steps=1", "callbacks.oscillation.momentum=0.2",
    )  # fmt: skip
    path = run / "checkpoints" / "last.ckpt"
    found = OscillationAnalysis().outcome([StudiedNet("run", torch.nn.Identity(), "vit", (1, 8, 8), path)], [])
    with (run / "oscillation.csv").open() as file:
        *layers, total = csv.DictReader(file)
    rows = {row["layer"]: row for row in table(found, "oscillation_layers")}
    assert set(rows) == {row["layer"] for row in layers}
    for row in layers:
        mine = rows[row["layer"]]
        assert (mine["weights"], mine["flips so far"]) == (int(row["weights"]), int(row["flips"]))
        assert mine["oscillating, %"] == pytest.approx(100 * int(row["oscillating"]) / int(row["weights"]), abs=1e-3)
        assert mine["mean frequency"] == pytest.approx(float(row["mean_frequency"]), rel=1e-4)
    assert int(total["flips"]) > 0
    curve = table(found, "oscillation")
    assert [row["step"] for row in curve] == list(range(6))
    assert curve[-1]["oscillating, %"] == pytest.approx(100 * int(total["oscillating"]) / int(total["weights"]), rel=1e-4)
    assert not any(math.isnan(value) for row in curve for value in row.values() if isinstance(value, float))
