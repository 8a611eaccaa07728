"""Evaluations of changed nets. Oracle: scores of the net while the change lasts, and counts of calls."""

import contextlib
import logging
import re

import pytest
import torch

from qat.analysis import EvaluationPoint, Ledger, measure
from qat.analysis.runner import evaluated
from tests import tiny
from tests.analysis.common import image_set, is_as_before, net_of, state


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


def test_rows_come_in_the_order_of_the_points(tmp_path):
    net, images = tiny.vit(), image_set()
    rows = list(measure(points_of(net, [0, 64, 8]), images, Ledger(tmp_path, "x", resume=False)))
    assert [row["shift"] for row in rows] == [0, 64, 8]
    assert rows[0]["loss"] == images.score(net)["loss"]
    net.head.bias.data[0] += 64
    assert rows[1]["loss"] == images.score(net)["loss"]
    assert rows[0].keys() == {"net", "shift", "top1", "loss", "seconds"}
    assert rows[0]["seconds"] > 0


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    net, images = tiny.vit(), image_set()
    first = list(measure(points_of(net, [0, 8]), images, Ledger(tmp_path, "x", resume=True)))
    calls, score = [], type(images).score
    monkeypatch.setattr(type(images), "score", lambda *args: calls.append(args) or score(*args))
    caplog.clear()
    rows = list(measure(points_of(net, [4, 0, 8]), images, Ledger(tmp_path, "x", resume=True)))
    assert rows[1:] == first
    assert len(calls) == 1
    assert "1 evaluations (2 done before) of 16 test images" in caplog.text
    caplog.clear()
    assert list(measure(points_of(net, [0, 8]), images, Ledger(tmp_path, "x", resume=True))) == first
    assert caplog.text == ""


def test_the_cost_is_said_before_anything_is_evaluated(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = measure(points_of(tiny.vit(), [0, 8, 64]), image_set(), Ledger(tmp_path, "x", resume=False))
    next(rows)
    assert re.search(r"3 evaluations of 16 test images, 0 MB in memory: about \d+(\.\d)? s", caplog.text)


def test_a_point_that_fails_leaves_the_net_and_the_ones_before(tmp_path):
    net, images = tiny.vit(), image_set()
    before = state(net)

    def fails(batch):
        raise KeyboardInterrupt

    wanted = [*points_of(net, [8]), EvaluationPoint({"net": "a", "shift": -1}, net, points_of(net, [16])[0].change, images=fails)]
    rows = measure(wanted, images, Ledger(tmp_path, "x", resume=False))
    assert next(rows)["shift"] == 8
    with pytest.raises(KeyboardInterrupt):
        next(rows)
    assert is_as_before(net, before)
    assert len(Ledger(tmp_path, "x", resume=True)) == 1


@pytest.mark.parametrize("kind", ["ofq2", "ptq4"])
def test_weights_are_quantized_once_an_evaluation(kind):
    net, images = net_of(kind), image_set()
    before, calls = state(net), []
    quantizer = tiny.sites(net)["blocks.0.mlp.fc1.weight_quantizer"].quantizer
    handle = quantizer.register_forward_hook(lambda *_: calls.append("called"))
    inner = quantizer.forward
    quantizer.forward = lambda weight: calls.append("quantized") or inner(weight)
    found = evaluated(EvaluationPoint({"net": "a"}, net), images)
    assert (calls.count("called"), calls.count("quantized")) == (len(images.batches), 1)
    del quantizer.forward
    handle.remove()
    assert found["loss"] == images.score(net)["loss"]
    assert is_as_before(net, before)


def test_modes_are_kept_and_evaluations_are_in_eval_mode():
    net, images = tiny.vit(drop_rate=0.5), image_set()
    expected = images.score(net)["loss"]
    net.train()
    net.blocks[0].eval()
    modes = [module.training for module in net.modules()]
    assert evaluated(EvaluationPoint({"net": "a"}, net), images)["loss"] == expected
    assert [module.training for module in net.modules()] == modes


def test_images_of_a_point_are_changed():
    net, images = tiny.vit(), image_set()
    found = evaluated(EvaluationPoint({"net": "a"}, net, images=torch.neg), images)
    assert found["loss"] == images.score(net, torch.neg)["loss"]
