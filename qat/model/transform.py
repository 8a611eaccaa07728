"""Prepare an image as a model's input, with the transform that evaluation uses."""

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
    """Return the evaluation transform of a model.

    The transform maps a Pillow image, an (H, W) or (H, W, C) uint8 array or a path to (C, H, W)
    float32. If the model was loaded (`qat.load`) from `last.ckpt`, `best.ckpt` or a file of
    `qat.save(net, path, data=...)`, the transform prepares images as `eval.py` does, by the data
    config in the file. Settings that are not in a file come from timm's `resolve_data_config` for
    the model's `pretrained_cfg`: crop, interpolation, mean and std of the pretrained weights
    (averaged over the colours for grey images), at the model's input size.

    Raises:
        UsageError: the model has neither a data config with mean and std nor a `pretrained_cfg`,
            is not known to take square images of 1 or 3 channels, or its data class is neither part
            of qat nor imported.
    """
    from qat.data import image_transform  # qat.data imports Lightning

    return image_transform(data_config(net))


def data_config(net: nn.Module) -> Mapping[str, Any]:
    """The data config of a model, as plain data; see `transform`."""
    stored = data_of(net) or {}
    if "_target_" in stored:
        return stored
    config = getattr(net, "pretrained_cfg", None)
    if not config and not {"mean", "std"} <= stored.keys():
        raise UsageError(
            "transform: this model does not record how its images are prepared; "
            "qat.save(model, path, data={'mean': [...], 'std': [...]}) stores this"
        )
    return {**_settings_of_model(net, config or {}), **stored}


def _settings_of_model(net: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of timm's `pretrained_cfg`, and those that follow from the model itself."""
    conversion = conversion_of(net)
    input_size = own_input_size(net) if conversion is None else conversion.input_size
    channels, height, width = input_size
    if height != width:
        raise UsageError(
            f"transform: the model takes images of {height} x {width} pixels; must be square"
        )
    settings = _preparation_of_timm(config, channels) if config else {}
    # A backbone has no classes; any number will do, because preparing images does not depend on it.
    num_classes = getattr(net, "num_classes", None) or config.get("num_classes") or 1
    return settings | {
        "image_size": height,
        "patch_size": None,
        "in_chans": channels,
        "num_classes": num_classes,
    }


def _preparation_of_timm(config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Settings of timm's `pretrained_cfg`; mean and std are averaged to fit other `channels`."""
    resolved = timm.data.resolve_data_config({}, pretrained_cfg=config)
    names = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    settings = {name: resolved[name] for name in names}
    if channels != len(settings["mean"]):
        for name in ("mean", "std"):
            average = sum(settings[name]) / len(settings[name])
            settings[name] = [average] * channels
    return settings


def renormalize(net: nn.Module, image_stats: Sequence[Any], training_stats: Sequence[Any]) -> None:
    """Make a model accept images that were normalized with another mean and standard deviation.

    A hook before the first layer converts such images to the normalization of the training images.

    Args:
        net: the model.
        image_stats: (means, standard deviations) with which the new images are normalized; each has
            one number per channel.
        training_stats: like `image_stats`, for the training images. If `image_stats` and
            `training_stats` are equal, the model is not changed.
    """
    if image_stats == training_stats:
        return
    statistics = torch.tensor([image_stats, training_stats], dtype=torch.float64)[..., None, None]
    (mean, std), (own_mean, own_std) = statistics
    factor_and_offset = torch.stack([std, mean - own_mean]).div(own_std).float()
    # As buffers, the tensors move to other devices with the model. No file stores them.
    net.register_buffer("to_own", factor_and_offset, persistent=False)
    net.register_forward_pre_hook(lambda net, args: (args[0] * net.to_own[0] + net.to_own[1],))
