"""Evaluations of changed nets. Oracle: scores of the net while the change lasts, and counts of calls."""

import contextlib
import logging

import pytest

from qat.analysis import EvaluationPoint, measure, runner
from tests import tiny
from tests.analysis.common import image_set, is_as_before, state


def points_of(net, shifts):
    """The net with a head whose bias is shifted by hand, undone by hand."""

    @contextlib.contextmanager
    def shifted(by):
        before = net.head.bias.data.clone()
        net.head.bias.data[0] += by
        try:
            yield
        finally:
            net.head.bias.data.copy_(before)

    return [EvaluationPoint({"net": "a", "shift": by}, net, lambda by=by: shifted(by)) for by in shifts]


def test_rows_come_in_the_order_of_the_points(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_LINES", -1)
    net, images = tiny.vit(), image_set()
    rows = measure(points_of(net, [0, 64, 8]), images)
    assert [row["shift"] for row in rows] == [0, 64, 8]
    assert rows[0]["loss"] == images.score(net)["loss"]
    net.head.bias.data[0] += 64
    assert rows[1]["loss"] == images.score(net)["loss"]
    assert rows[0].keys() == {"net", "shift", "top1", "loss", "seconds"}
    assert "3 evaluations of 16 test images" in caplog.text
    assert "2 of 3 evaluations, about 0.0 s left" in caplog.text


def test_a_point_that_fails_leaves_the_net():
    net = tiny.vit()
    before = state(net)

    def fails(net, images):
        raise KeyboardInterrupt

    (shifted,) = points_of(net, [16])
    with pytest.raises(KeyboardInterrupt):
        measure([EvaluationPoint({"net": "a"}, net, shifted.change, score=fails)], image_set())
    assert is_as_before(net, before)


def test_modes_are_kept_and_evaluations_are_in_eval_mode():
    net, images = tiny.vit(drop_rate=0.5), image_set()
    expected = images.score(net)["loss"]
    net.train()
    net.blocks[0].eval()
    modes = [module.training for module in net.modules()]
    (found,) = measure([EvaluationPoint({"net": "a"}, net)], images)
    assert found["loss"] == expected
    assert [module.training for module in net.modules()] == modes
