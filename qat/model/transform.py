"""The transform that evaluation uses to turn an image into the input of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import timm.data
import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.convert import conversion_of, own_input_size
from qat.model.metadata import data_of

if TYPE_CHECKING:
    from qat.data.image_transform import AnyImage


def transform(net: nn.Module) -> Callable[[AnyImage], Tensor]:
    """The evaluation transform of a model.

    It maps a Pillow image, an (H, W, C) uint8 array or a path to (C, H, W) float32. A model from
    `last.ckpt` or `best.ckpt` (`qat.load`) gets images as `eval.py` prepares them, from the data
    config in the file; so does a model from `qat.save(net, path, data=...)`. Settings that are not
    in the file follow timm's `resolve_data_config` for the model's `pretrained_cfg`: crop,
    interpolation, mean and std of its pretrained weights (their averages over the colours for grey
    images), at the model's input size.

    Raises:
        UsageError: the model has neither a data config nor a `pretrained_cfg`, does not take square
            images, or the class of its data is neither ours nor imported.
    """
    from qat.data import image_transform  # qat.data imports Lightning

    return image_transform(data_config(net))


def data_config(net: nn.Module) -> Mapping[str, Any]:
    """The data config of a model, as plain data; see `transform`."""
    stored = data_of(net) or {}
    if "_target_" in stored:
        return stored
    return {**_settings_of_timm(net), **stored}


def _settings_of_timm(net: nn.Module) -> dict[str, Any]:
    config = getattr(net, "pretrained_cfg", None)
    if not config:
        raise UsageError(
            "transform: this model does not record its data; "
            "qat.save(model, path, data={...}) stores the settings"
        )
    conversion = conversion_of(net)
    input_size = own_input_size(net) if conversion is None else conversion.input_size
    channels, height, width = input_size
    if height != width:
        raise UsageError(
            f"transform: the model takes images of {height} x {width} pixels; must be square"
        )
    resolved = timm.data.resolve_data_config({}, pretrained_cfg=config)
    names = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    settings = {name: resolved[name] for name in names}
    if channels != len(settings["mean"]):
        for name in ("mean", "std"):
            average = sum(settings[name]) / len(settings[name])
            settings[name] = [average] * channels
    # A backbone has no classes, and the preparation of images does not depend on classes.
    num_classes = getattr(net, "num_classes", None) or config.get("num_classes") or 1
    return settings | {
        "image_size": height,
        "patch_size": None,
        "in_chans": channels,
        "num_classes": num_classes,
    }


def renormalize(net: nn.Module, given: Sequence[Any], own: Sequence[Any]) -> None:
    """Make a model accept images whose mean and standard deviation differ from its training.

    A hook maps such images to the mean and standard deviation of the training images before the
    first layer.

    Args:
        net: the model.
        given: mean and standard deviation per channel of the new images.
        own: mean and standard deviation per channel of the model's training images. If `given` and
            `own` are equal, the model is not changed.
    """
    if given == own:
        return
    statistics = torch.tensor([given, own], dtype=torch.float64)[..., None, None]
    (mean, std), (own_mean, own_std) = statistics
    factor_and_offset = torch.stack([std, mean - own_mean]).div(own_std).float()
    # Buffers move to other devices with the model; no file stores these buffers.
    net.register_buffer("to_own", factor_and_offset, persistent=False)
    net.register_forward_pre_hook(lambda net, args: (args[0] * net.to_own[0] + net.to_own[1],))
