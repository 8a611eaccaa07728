"""A small calibrated net with its float twin, for the tests of compensation and reconstruction."""

import torch

import qat
from qat.ptq import calibrate
from tests import tiny

KNOBS = {
    "placement": "inputs",
    "bits": 3,
    "act_bits": 3,
    "weight_observer": "mse",
    "act_observer": "mse",
    "weight_signed": True,
}


def pair(name=tiny.VIT, method="compensate", **knobs):
    """Calibrated and float net."""
    kwargs = knobs.pop("kwargs", {})
    recipe = qat.PtqRecipe(**KNOBS | {"method": method} | knobs)
    net = qat.convert(tiny.vit(name, **kwargs), recipe, input_size=tiny.SIZE)
    calibrate(net, [tiny.images(32)])
    return net.eval(), tiny.vit(name, **kwargs)


def outputs(net, layer, images):
    """What a layer gives, channels last."""
    seen = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _m, _a, y: seen.append(y))
    with torch.no_grad():
        net(images)
    handle.remove()
    return seen[0].movedim(1, -1) if seen[0].ndim == 4 and layer == "patch_embed.proj" else seen[0]


def error(net, reference, images):
    """Mean squared error of the logits."""
    return float((tiny.logits(net, images) - tiny.logits(reference, images)).square().mean())
