"""The model that a command evaluates, with its data and class names.

Evaluation, post-training quantization, analysis and export start from this model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omegaconf import DictConfig
from torch import nn

from qat.data import ImageData
from qat.data.image_data import EncodedImageData
from qat.data.splits import hold_out
from qat.errors import UsageError
from qat.model.checkpoint import Checkpoint, read_checkpoint
from qat.model.convert import conversion_of
from qat.model.metadata import classes_of
from qat.model.scales import check_finite
from qat.model.storage import build_from
from qat.spec import QuantRecipe, recipe
from qat.tasks import build, summary
from qat.tasks.checks import check_classes, check_classifier, check_patches
from qat.tasks.stored_data import choose_data

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluatedNet:
    """A model and its data, built and checked.

    Attributes:
        net: the model.
        name: name of the model.
        recipe: recipe of the model; `fp` if it is not quantized.
        data: dataset; its settings describe how images are prepared for the model.
        classes: names of the classes, or class ids as text.
        assumed: names of image settings that are assumed, see `summary.assumed_settings`.
    """

    net: nn.Module
    name: str
    recipe: QuantRecipe
    data: ImageData
    classes: list[str]
    assumed: Sequence[str] = ()


def build_evaluated_net(cfg: DictConfig, *, tests_only: bool = True) -> EvaluatedNet:
    """Build the model of `ckpt` or `model`, with its data and classes.

    `cfg.data` is set to the config of these data.

    Args:
        cfg: config of a command.
        tests_only: True if the command reads only images for testing. In a folder without splits,
            all images are then used, unless the model was trained on the folder or `split` is set.

    Raises:
        UsageError: a setting or file cannot be used, or the data do not suit the model.
    """
    checkpoint = read_checkpoint(cfg.ckpt, fmt=cfg.ckpt_format) if cfg.ckpt else None
    own_data = build.to_plain(cfg.data)
    choose_data(cfg, checkpoint)
    data = build.build_data(cfg)
    is_unused = tests_only and not _is_trained_on(checkpoint, data)
    data.evaluates_whole = is_unused and cfg.get("split") is None
    net, name = _load_net(cfg, checkpoint, data)
    # Only weights from a file can fail the checks that name this setting: random weights and timm's
    # are finite and have no class names.
    setting = "ckpt" if cfg.ckpt else "model.weights"
    check_finite(net, f"{setting}={origin(cfg)!r}")
    _check_fit(net, data)
    if cfg.get("predict") is None:
        check_classes(net, data, f"{setting}={origin(cfg)!r}")
    conversion = conversion_of(net)
    return EvaluatedNet(
        net,
        name,
        recipe("fp") if conversion is None else conversion.recipe,
        data,
        class_names(classes_of(net), data),
        summary.assumed_settings(cfg, own_data, net, data),
    )


def origin(cfg: DictConfig) -> str:
    """The source of the weights: a path, "timm's pretrained" or "random"."""
    default_origin = "timm's pretrained" if cfg.model.pretrained else "random"
    return str(cfg.ckpt or cfg.model.weights or default_origin)


def class_names(stored_names: object, data: ImageData) -> list[str]:
    """Names of the classes of the data, or class ids as text.

    Args:
        stored_names: names that are stored with the model; used if there is one for each class.
        data: the dataset, which may know class names.
    """
    num_classes = data.settings.num_classes
    for names in (stored_names, data.named_classes()):
        if isinstance(names, list) and len(names) == num_classes:
            return [str(name) for name in names]
    return [str(number) for number in range(num_classes)]


def _is_trained_on(checkpoint: Checkpoint | None, data: ImageData) -> bool:
    """True if a checkpoint was trained on the folder of the data, which may have moved since."""
    meta = checkpoint.meta if checkpoint is not None else None
    meta = meta or {}
    stored_root = (meta.get("data") or {}).get("root")
    root = data.settings.root
    if not stored_root or not root:
        return False
    if os.path.realpath(str(stored_root)) == os.path.realpath(str(root)):
        return True
    fingerprints = meta.get("run", {}).get("images")
    if not isinstance(fingerprints, Mapping) or "test" in fingerprints:
        return False
    if not isinstance(data, EncodedImageData):
        return False
    try:
        splits = hold_out(data.encoded())
    except UsageError:  # a few images, none of which can be held out
        return False
    return "train" in splits and splits["train"].fingerprint() == fingerprints.get("train")


def _load_net(
    cfg: DictConfig, checkpoint: Checkpoint | None, data: ImageData
) -> tuple[nn.Module, str]:
    """The model and its name."""
    name = cfg.model.name
    if checkpoint is None:
        if name is None:
            raise UsageError(
                "ckpt is not set: must be a checkpoint; "
                "or set model=NAME with model.pretrained=true or model.weights=FILE"
            )
        return build.build_start(cfg, keep_head=True).net.eval(), name
    ofq_net = build.find_ofq_net(cfg, checkpoint)
    if checkpoint.meta is not None:
        stored_name = checkpoint.meta["model"]["name"]
        if name not in {None, stored_name}:
            raise UsageError(
                f"model.name={name!r}: ckpt={cfg.ckpt!r} contains {stored_name}; leave model out"
            )
        return build_from(checkpoint, data.input_size[1:]), stored_name
    if ofq_net is not None:
        log.info("%s", ofq_net.note)
        return ofq_net.net, ofq_net.model
    if name is None:
        raise UsageError(f"ckpt={cfg.ckpt!r} does not name its model; set model=NAME")
    return build.build_start(cfg, keep_head=True).net.eval(), name


def _check_fit(net: nn.Module, data: ImageData) -> None:
    """Check that a model suits the data: number of classes, image size, patches and output."""
    settings = data.settings
    num_classes = getattr(net, "num_classes", settings.num_classes)
    if num_classes != settings.num_classes:
        raise UsageError(
            f"data.num_classes={settings.num_classes}: the model has {num_classes} classes; "
            f"must be {num_classes}, or choose another model"
        )
    conversion = conversion_of(net)
    if conversion is not None and conversion.input_size != data.input_size:
        raise UsageError(
            f"data.image_size={settings.image_size}: images must be {conversion.input_size}, for "
            f"which the model is quantized, not {data.input_size}"
        )
    check_patches(net, data)
    check_classifier(net, data)
