"""A small calibrated net with its float twin, for the tests of compensation and reconstruction."""

import copy

import torch

import qat
from tests import tiny

KNOBS = {
    "placement": "inputs",
    "bits": 3,
    "act_bits": 3,
    "weight_observer": "mse",
    "act_observer": "mse",
    "weight_signed": True,
}


def calibrated(reference, images, method="reconstruct", **knobs):
    """The calibrated net of a float one."""
    recipe = qat.PtqRecipe(**KNOBS | {"method": method} | knobs)
    return tiny.fitted(copy.deepcopy(reference), images, recipe)


def pair(name=tiny.VIT, method="compensate", **knobs):
    """Calibrated and float net."""
    reference = tiny.vit(name)
    return calibrated(reference, tiny.images(32), method, **knobs), reference


def outputs(net, layer, images):
    """Output of a layer, channels last."""
    seen = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _m, _a, y: seen.append(y))
    with torch.no_grad():
        net(images)
    handle.remove()
    return seen[0].movedim(1, -1) if seen[0].ndim == 4 and layer == "patch_embed.proj" else seen[0]


def error(net, reference, images):
    """Mean squared error of the logits."""
    return float((tiny.logits(net, images) - tiny.logits(reference, images)).square().mean())
