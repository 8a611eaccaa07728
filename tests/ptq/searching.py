"""A small calibrated net, its calibration images and float logits, for the tests of the search."""

import copy
import functools

import torch

import qat
from qat.functional import logit_fitness
from qat.ptq.search import logits_of
from tests import tiny
from tests.callbacks.fitting import differing

# Weights with a stored scale and a zero point, quantizers where training has them.
WEIGHTS = "qat.quantizers.affine:MinMax"
BATCHES = (8, 8, 5)


def batches():
    return [tiny.images(n, seed) for seed, n in enumerate(BATCHES)]


@functools.cache
def _made(name, preset, knobs):
    net = tiny.vit(name)
    targets = [logits_of(net, images, 8) for images in batches()]
    tiny.convert(net, preset, **dict(knobs))
    return qat.initialize_scales(net, batches()).eval(), targets


def quantized(name=tiny.VIT, preset="minmax", **knobs):
    """A net of its own, and the float logits of `batches()`."""
    knobs = {"bits": 4, "weight_quantizer": WEIGHTS} | knobs
    net, targets = _made(name, preset, tuple(sorted(knobs.items())))
    return copy.deepcopy(net), targets


def whole_fitness(net, images, targets, settings):
    """By whole forwards, nothing remembered."""
    loss = logit_fitness(settings.fitness, settings.temperature)
    losses = [
        loss(logits_of(net, batch, settings.micro_batch), target)
        for batch, target in zip(images, targets, strict=True)
    ]
    return float(torch.stack(losses).double().mean())


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def changed(before, net):
    """Names of tensors that are not what they were."""
    return set(differing(before, net.state_dict()))
