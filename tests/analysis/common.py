"""Models with each kind of weight quantizer, and a few images, for the tests of analyses."""

import copy
import functools

import torch

from qat.analysis import ImageSet, StudiedNet
from qat.model.ptq_spec import PtqRecipe
from qat.quantizers import LSQ, Affine
from qat.spec import QuantSpec
from tests import tiny
from tests.tiny import identical

# Weights with a stored scale and a zero point, as no recipe of ours has them.
STORED = "qat.quantizers.affine:MinMax"
QAT = {
    **{f"ofq{bits}": ("ofq", {"bits": bits}) for bits in (2, 3, 4, 8)},
    "fold": ("ofq", {"bits": 2, "qk_bias": "fold"}),
    "noqkr": ("ofq_noqkr", {"bits": 2}),
    "statsq": ("statsq", {"bits": 4}),
    "lsq2": ("lsq", {"bits": 2}),
    "lsq4": ("lsq", {"bits": 4}),
    "minmax": ("minmax", {"bits": 3}),
    "stored": ("minmax", {"bits": 4, "weight_quantizer": STORED}),
}
PTQ = {
    "ptq4": {"bits": 4},
    "ptq3": {"bits": 3, "weight_observer": "omse", "bias_correction": True},
    "signed": {"bits": 4, "weight_signed": True, "weight_observer": "mse"},
    "corrected": {"bits": 2, "bias_correction": True, "weight_observer": "percentile"},
    "ptf": {"bits": 4, "residual_observer": "ptf"},
    "inputs": {"bits": 4, "placement": "inputs"},
}
KINDS = (*QAT, *PTQ)


def ptq(**knobs):
    """A calibrated net of its own."""
    return copy.deepcopy(_ptq(tuple(knobs.items())))


def net_of(kind):
    """A net of its own, ready to run."""
    return ptq(**PTQ[kind]) if kind in PTQ else copy.deepcopy(_trained(kind))


@functools.cache
def _ptq(knobs):
    return tiny.fitted(tiny.vit(), tiny.images(seed=1), PtqRecipe(**dict(knobs)))


@functools.cache
def _trained(kind):
    preset, knobs = QAT[kind]
    return tiny.quantized(preset, **knobs).eval()


def studied(net, label="net"):
    """The net under a name."""
    return StudiedNet(label, net, tiny.SIZE)


def image_set(n=16, batch=6):
    """Random images with random classes, in batches of which the last is smaller."""
    generator = torch.Generator().manual_seed(3)
    images, classes = (
        torch.rand(n, *tiny.SIZE, generator=generator) * 2 - 1,
        torch.randint(10, (n,), generator=generator),
    )
    return ImageSet(list(zip(images.split(batch), classes.split(batch), strict=True)), "test")


def state(net):
    """A copy of all tensors."""
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def is_as_before(net, before):
    """True if no tensor has changed and no module has a function of its own in the place of its forward."""
    same = identical(before, net.state_dict())
    return same and not any("forward" in module.__dict__ for module in net.modules())


def spec(quantizer, **changes):
    """Two-bit weights with a scale for each row."""
    return QuantSpec("weight", quantizer, 2, axis=0, **changes)


def lsq(*steps):
    """A quantizer of weights with these learned step sizes."""
    quantizer = LSQ(spec("lsq"))
    quantizer.scale = torch.nn.Parameter(torch.tensor(steps))
    return quantizer


def affine(steps, zero_points):
    """A quantizer of weights with codes from 0 to 3."""
    quantizer = Affine(spec("affine", signed=False))
    quantizer.scale = torch.tensor(steps)
    quantizer.zero_point = torch.tensor(zero_points)
    return quantizer
