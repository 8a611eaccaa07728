"""What stands between an image and a net: the transform that evaluation uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import timm.data
import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.checkpoint import data_of
from qat.model.convert import conversion_of, own_input_size

if TYPE_CHECKING:
    from qat.data.image_transform import AnyImage


def transform(net: nn.Module) -> Callable[[AnyImage], Tensor]:
    """The evaluation transform of a net: maps Pillow's image, an (H, W, C) uint8 array or a path to (C, H, W) float32.

    A net from `last.ckpt` or `best.ckpt` (`qat.load`) knows the data it was trained on, and gets images as `eval.py` gives them to it;
    so does one from a file of `qat.save(net, path, data=...)`, where settings that `data` leaves out are found as follows. Any other net
    gets them as timm's `resolve_data_config` says for its `pretrained_cfg`: crop, interpolation, mean and std of its pretrained
    weights, the average of the latter over the colours for a net of grey images; at the size that the net takes.

    Raises:
        UsageError: neither is there, the net takes no square images, or its data are of a class that is neither ours nor imported.
    """
    from qat.data import image_transform  # here, because it brings Lightning with it

    return image_transform(data_config(net))


def data_config(net: nn.Module) -> Mapping[str, Any]:
    """The data config of a net, plain; see `transform`."""
    stored = data_of(net) or {}
    return stored if "_target_" in stored else {**_by_timm(net), **stored}


def _by_timm(net: nn.Module) -> dict[str, Any]:
    config = getattr(net, "pretrained_cfg", None)
    if not config:
        raise UsageError(
            "transform: this model does not record its data; qat.save(model, path, data={...}) stores the settings"
        )
    done = conversion_of(net)
    chans, height, width = done.input_size if done else own_input_size(net)
    if height != width:
        raise UsageError(
            f"transform: the model takes images of {height} x {width} pixels; must be square"
        )
    found = timm.data.resolve_data_config({}, pretrained_cfg=config)
    settings = {
        name: found[name] for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    }
    if chans != len(settings["mean"]):
        settings |= {
            name: [sum(settings[name]) / len(settings[name])] * chans for name in ("mean", "std")
        }
    classes = (
        getattr(net, "num_classes", None) or config.get("num_classes") or 1
    )  # a backbone has none, and images do not depend on it
    return settings | {
        "image_size": height,
        "patch_size": None,
        "in_chans": chans,
        "num_classes": classes,
    }


def renormalize(net: nn.Module, given: Sequence[Any], own: Sequence[Any]) -> None:
    """Let a net take images of another mean and standard deviation than those that it was trained on.

    Args:
        net: from here on maps such images to its own before its first layer.
        given: mean and standard deviation per channel of the images that come.
        own: of those that it was trained on. Where both are equal nothing is done.
    """
    if given == own:
        return
    (mean, std), (own_mean, own_std) = torch.tensor([given, own], dtype=torch.float64)[
        ..., None, None
    ]
    # A buffer moves with the net; it is in none of its files.
    net.register_buffer(
        "to_own", torch.stack([std, mean - own_mean]).div(own_std).float(), persistent=False
    )
    net.register_forward_pre_hook(lambda net, args: (args[0] * net.to_own[0] + net.to_own[1],))
