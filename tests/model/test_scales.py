"""Scales from data. Oracle: the first-step formula on what each quantizer really receives."""

import copy
import pickle
import re

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import qat
from qat import functional as F
from qat.model import scales
from qat.model.transfer import copy_scales
from tests.errors import usage_error
from tests.tiny import (
    convert,
    converted,
    identical,
    images,
    logits,
    quantized,
    sites,
    vit,
    watched,
    with_scales,
)


def test_assert_ready_names_the_first_gap():
    net = quantized()
    qat.assert_ready(net)
    with torch.no_grad():
        net.blocks[1].mlp.fc1.input_quantizer.quantizer.start[3] = torch.nan
    with usage_error("scales of blocks.1.mlp.fc1.input_quantizer are not initialized"):
        qat.assert_ready(net)
    with usage_error(r"scales of patch_embed.proj.input_quantizer are not"):
        qat.assert_ready(converted())


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_data_is_an_error(batches):
    with usage_error("batches: must contain at least one batch of images"):
        qat.initialize_scales(converted(), batches)


@pytest.mark.parametrize(
    ("batch", "line"),
    [
        (images() * torch.nan, "NaN or infinity"),
        ({"image": images()}, "a batch is dict; must be float images"),
        (images(0), r"a batch is torch.float32 \(0, 1, 8, 8\); must be float images"),
    ],
)
def test_what_holds_no_finite_images_is_an_error_and_leaves_no_scale(batch, line):
    net = converted()
    with usage_error(line):
        qat.initialize_scales(net, [5 * images(), batch])
    assert torch.equal(logits(with_scales(net)), logits(quantized()))


def test_a_loader_of_images_and_labels_is_taken_as_it_is():
    nets = [
        qat.initialize_scales(converted(), [batch])
        for batch in (images(), [images(), torch.zeros(len(images()))])
    ]
    assert torch.equal(logits(nets[0]), logits(nets[1]))


@pytest.mark.parametrize("most", [8, 10, 16, 100])
def test_the_first_images_are_enough(most):
    batches = [images(8, seed) for seed in range(2)]
    read = iter(batches)
    net = qat.initialize_scales(converted(), read, max_images=most)
    first = [batch for batch in (batches[0], batches[1][: max(most - 8, 0)]) if len(batch)]
    assert torch.equal(logits(net), logits(qat.initialize_scales(converted(), first)))
    assert len(list(read)) == (most == 8)


def test_no_images_are_too_few():
    with usage_error("^max_images=0: must be"):
        qat.initialize_scales(converted(), [images()], max_images=0)


@pytest.mark.parametrize("every", [0, 10])
def test_a_long_search_says_how_far_it_is(monkeypatch, caplog, every):
    monkeypatch.setattr(scales, "LOG_EVERY_S", every)
    net = converted()
    total = len(list(qat.iter_quantizers(net)))
    qat.initialize_scales(net, [images(4), images(4)])
    said = [record.message for record in caplog.records]
    assert bool(said) == (every == 0)
    pattern = r"initialize_scales: \d+ s, (4|8) images, \d+ of \d+ quantizers"
    assert all(re.fullmatch(pattern, line) for line in said)
    assert len(said) <= 2 * total


def test_scales_that_hold_numbers_stay():
    net = converted()
    kept = net.blocks[0].mlp.fc1.input_quantizer.quantizer.start
    with torch.no_grad():
        kept.fill_(0.125)
    with_scales(net)
    assert (kept == 0.125).all()
    assert not (net.blocks[1].mlp.fc1.input_quantizer.quantizer.scale == 0.125).any()


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_hooks_are_gone(training):
    net = converted().train(training)
    with_scales(net)
    assert {m.training for m in net.modules()} == {training}
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_calibration_runs_without_dropout():
    nets = [convert(vit(proj_drop_rate=0.5), "ofq").train(mode) for mode in (True, False)]
    assert identical(*(with_scales(net).state_dict() for net in nets))


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn.input_quantizer",
        "blocks.0.mlp.fc1.input_quantizer",
        "blocks.1.mlp.fc1.input_quantizer",
    ],
)
def test_each_quantizer_sees_its_input_behind_the_others(name):
    net = quantized(bits=2)
    x = watched(net)[name][0]
    scale = sites(net)[name].quantizer.quantizer.scale
    assert_close(scale, F.lsq_init_scale(x, -2, 1, -2))
    float_net = converted(bits=2, weight_quantizer="float", act_quantizer="float")
    assert (scale - F.lsq_init_scale(watched(float_net)[name][0], -2, 1, -2)).abs().max() > 1e-3


UNSET = r"scales of \S+input_quantizer are not initialized"


def refuses(net):
    """Whether calling the net raises, in training and in evaluation."""
    for training in (True, False):
        with usage_error(UNSET):
            net.train(training)(images())
    return True


def hooks(net):
    """Forward pre-hooks of a net and all in it."""
    return [hook for module in net.modules() for hook in module._forward_pre_hooks.values()]


def test_a_net_without_scales_raises_wherever_it_is():
    net = converted()
    assert refuses(net)
    assert refuses(torch.nn.Sequential(net, torch.nn.Flatten()))
    assert refuses(copy.deepcopy(net))
    assert refuses(pickle.loads(pickle.dumps(net)))
    assert refuses(AveragedModel(net))
    assert refuses(converted("minmax"))


def by_hand(source, net):
    with torch.no_grad():
        for mine, its in zip(qat.iter_quantizers(net), qat.iter_quantizers(source), strict=True):
            theirs = its.quantizer.state_dict()
            for name, tensor in mine.quantizer.state_dict().items():
                tensor.copy_(theirs[name])


FILLED = {
    "data": lambda source, net: with_scales(net),
    "data, from outside": lambda source, net: with_scales(torch.nn.Sequential(net)),
    "state dict": lambda source, net: net.load_state_dict(source.state_dict()),
    "state dict of an outer module": lambda source, net: torch.nn.Sequential(net).load_state_dict(
        torch.nn.Sequential(source).state_dict()
    ),
    "copy": copy_scales,
    "hand": by_hand,
}


@pytest.mark.parametrize("way", FILLED)
def test_deviates_from_reference_scales_exist_from_conversion_on(way):
    # There they are None until a first batch, so that a strict load into a fresh net fails.
    source, net = quantized(), converted()
    assert refuses(net)
    FILLED[way](source, net)
    assert torch.equal(logits(net), logits(source))
    assert hooks(net) == []
    assert hooks(copy.deepcopy(net)) == []


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "around",
    [lambda net: net, torch.nn.Sequential, AveragedModel, copy.deepcopy],
    ids=["itself", "sequential", "averaged", "copy"],
)
@pytest.mark.parametrize("assign", [False, True])
def test_scales_that_are_loaded_as_nan_are_found(around, assign):
    net = around(quantized())
    state = copy.deepcopy(net.state_dict())
    net.load_state_dict(state, assign=assign)
    assert hooks(net) == []
    net.load_state_dict(
        {name: t * torch.nan if name.endswith("start") else t for name, t in state.items()},
        assign=assign,
    )
    assert refuses(net)
    net.load_state_dict(state)
    assert logits(net).isfinite().all()
    assert hooks(net) == []


def test_scales_that_a_partial_load_leaves_out_are_named():
    net = converted()
    state = quantized().state_dict()
    del state["blocks.1.mlp.fc1.input_quantizer.quantizer.start"]
    net.load_state_dict(state, strict=False)
    with usage_error(r"scales of blocks.1.mlp.fc1.input_quantizer are not initialized"):
        net(images())
    with_scales(net)
    assert logits(net).isfinite().all()
