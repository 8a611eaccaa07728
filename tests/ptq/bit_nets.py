"""A small calibrated net whose weights all have bits to choose, its images and float logits."""

import copy
import functools

import torch

import qat
from qat.model.cost import size_bytes
from qat.model.ptq_spec import PtqRecipe
from qat.ptq.bits import search_bits
from qat.ptq.bits_settings import BitsSettings
from qat.ptq.fitness import logits_of
from tests import tiny
from tests.ptq.searching import batches

LAYERS = (
    "patch_embed.proj",
    *(f"blocks.{b}.{layer}" for b in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "head",
)


@functools.cache
def _made(knobs):
    net = tiny.vit()
    targets = [logits_of(net, images, 8) for images in batches()]
    qat.convert(net, PtqRecipe(**{"bits": 4, **dict(knobs)}), input_size=tiny.SIZE)
    qat.ptq.calibrate(net, batches())
    return net, targets


def calibrated(**knobs):
    """A net of its own, and the float logits of `batches()`."""
    net, targets = _made(tuple(sorted(knobs.items())))
    return copy.deepcopy(net).eval(), targets


def with_overrides(overrides, **knobs):
    """A net that was converted with these rules and calibrated then."""
    net = qat.convert(tiny.vit(), PtqRecipe(**{"bits": 4, **knobs, "overrides": overrides}), input_size=tiny.SIZE)
    qat.ptq.calibrate(net, batches())
    return net.eval()


def settings(**knobs):
    knobs = {"average_bits": 3, "choices": (2, 3, 4, 8), "generations": 4, "children": 3, "micro_batch": 8} | knobs
    return BitsSettings(**(knobs | ({"average_bits": None} if "budget_mb" in knobs else {})))


def searched(net, targets, chosen, images=None, **more):
    return search_bits(net, batches() if images is None else images, targets, chosen, size_bytes=size_bytes(net), **more)


def bits_of(net):
    """Bits of weights by module."""
    return {site.name.rpartition(".")[0]: site.quantizer.spec.bits for site in qat.iter_quantizers(net) if site.is_weight}


def same(one, two):
    """Equal states, bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
