"""The teacher of a distillation loss, or of a search over scales."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import timm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat.data import ImageData
from qat.data.image_data import EncodedImageData
from qat.errors import UsageError
from qat.interop import is_ofq
from qat.launch.ranks import is_first
from qat.lit import Teacher
from qat.losses import CompositeLoss
from qat.model.checkpoint import read_checkpoint
from qat.model.convert import check_input, conversion_of
from qat.model.metadata import data_of
from qat.model.scales import check_finite
from qat.model.start import Start, check_model, from_state, from_timm
from qat.model.storage import build_from
from qat.model.transform import data_config, renormalize
from qat.tasks.build import build_start, model_args
from qat.tasks.checks import check_classes
from qat.tasks.conf import timm_argument

log = logging.getLogger(__name__)

QUANTIZED_ERROR = (
    "is already quantized and cannot be the float teacher; "
    "set teacher.ckpt to a float checkpoint, or use teacher.pretrained=true"
)
# Arguments of the student that the teacher shares; others may not fit the teacher.
COMMON_ARGS = ("img_size", "patch_size", "in_chans", "num_classes")
# Names of settings in messages of `from_timm`, each with the teacher's setting to show instead.
OWN_SETTINGS = {
    "model.name": "teacher.model",
    "model.pretrained": "teacher.pretrained",
    "model.weights": "teacher.ckpt",
    "use ckpt": "use teacher.ckpt",
}
# Settings that name weights to start from; the first one that is set is used.
WEIGHT_SETTINGS = ("ckpt", "model.weights", "model.pretrained")
TEACHER_SETTINGS = ("teacher.ckpt", "teacher.pretrained", *WEIGHT_SETTINGS)


def build_teacher(cfg: DictConfig, loss: CompositeLoss, data: ImageData) -> Teacher | None:
    """Build the teacher of the loss from `teacher.*`, or from the student's float starting weights.

    Return None if no loss term uses a teacher.

    Raises:
        UsageError: `teacher.model` is unknown; or the loss needs a teacher, but its weights are
            missing, set twice or cannot be used, or it does not suit the data.
    """
    if cfg.teacher.model is not None:
        check_model("teacher.model", cfg.teacher.model)
    sources = []
    for name in ("ckpt", "pretrained"):
        if cfg.teacher[name]:
            sources.append(f"teacher.{name}={cfg.teacher[name]!r}")
    if not loss.needs_teacher:
        if sources:
            log.warning("%s: no loss term uses a teacher, so it is not loaded", sources[0])
        return None
    if len(sources) > 1:
        raise UsageError(f"{', '.join(sources)}: only one of them can set the teacher")
    has_own_model = sources or cfg.teacher.model
    start = Start(_own_teacher(cfg)) if has_own_model else _student_start(cfg)
    setting = next((key for key in TEACHER_SETTINGS if OmegaConf.select(cfg, key)), "model.name")
    sets_mean = cfg.data.get("mean") is not None
    adapt_teacher(start, data, setting, OmegaConf.select(cfg, setting), sets_mean=sets_mean)
    return Teacher(start.net, cfg.loss.get("teacher_head", "cls"))


def adapt_teacher(
    start: Start, data: ImageData, setting: str, value: Any, *, sets_mean: bool
) -> None:
    """Make a teacher accept images of the data, even if it was trained with another normalization.

    Args:
        start: the teacher.
        data: the training data.
        setting: the setting that the teacher's weights come from.
        value: value of this setting.
        sets_mean: True if `data.mean` is set.

    Raises:
        UsageError: the teacher has another number of classes, has the same classes in another
            order, or does not accept the images.
    """
    net = start.net
    origin = f"{setting}={value!r}"
    num_classes = getattr(net, "num_classes", data.settings.num_classes)
    if num_classes != data.settings.num_classes:
        raise UsageError(
            f"{origin}: the teacher has {num_classes} classes; must have those of the data, "
            f"{data.settings.num_classes}"
        )
    check_classes(net, data, origin)
    try:
        check_input(net, data.input_size)
    except UsageError as error:
        raise UsageError(f"{origin}: the teacher must take images of the data ({error})") from error
    training_normalization = _training_normalization(start, data, setting, sets_mean=sets_mean)
    renormalize(net, _normalization(data), training_normalization)


def warn_of_normalization(start: Start, cfg: DictConfig, data: ImageData) -> None:
    """Warn if the initial weights were trained on images with another normalization."""
    setting = next((key for key in WEIGHT_SETTINGS if OmegaConf.select(cfg, key)), "model.name")
    sets_mean = cfg.data.get("mean") is not None
    training_normalization = _training_normalization(start, data, setting, sets_mean=sets_mean)
    data_normalization = _normalization(data)
    if training_normalization != data_normalization and is_first():
        log.warning(
            "%s=%r: trained on images of mean %s and std %s; "
            "data.mean and data.std set mean %s and std %s",
            setting,
            OmegaConf.select(cfg, setting),
            *training_normalization,
            *data_normalization,
        )


def _normalization(data: ImageData) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that the data are normalized with."""
    return list(data.settings.mean), list(data.settings.std)


def _training_normalization(
    start: Start, data: ImageData, setting: str, *, sets_mean: bool
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation with which a model's training images were normalized.

    Files of qat may record these values, and timm states them for its own weights. For other
    weights, timm's values are assumed if the data use timm's values. If the values are unknown, the
    values of the data are returned.

    Args:
        start: the model.
        data: the training data.
        setting: the setting that the weights come from; `model.name` for random weights.
        sets_mean: True if `data.mean` is set, so the data may not use timm's values.
    """
    net = start.source or start.net
    has_timm_weights = setting.endswith(".pretrained")
    is_random = setting == "model.name"
    data_follow_timm = isinstance(data, EncodedImageData) and not sets_mean
    may_assume_timm = data_follow_timm and not is_random
    if not (data_of(net) or has_timm_weights or may_assume_timm):
        return _normalization(data)
    config = data_config(net)
    settings = EncodedImageData.complete({
        # Required, but without effect on mean and standard deviation.
        "image_size": 1,
        "patch_size": None,
        "num_classes": 1,
        **{key: config.get(key) for key in ("in_chans", "mean", "std", "model")},
    })
    return list(settings.mean), list(settings.std)


def _own_teacher(cfg: DictConfig) -> nn.Module:
    """The model that `teacher.*` describes."""
    name = cfg.teacher.model or cfg.model.name
    args = model_args(cfg)
    if cfg.teacher.model:
        args = _shared_arguments(name, args)
    if cfg.teacher.ckpt:
        return net_of_file(cfg.teacher.ckpt, name, args, cfg.teacher.model)
    if not cfg.teacher.pretrained:
        raise UsageError(
            f"teacher.model={name!r}: set its weights with teacher.ckpt=FILE "
            "or teacher.pretrained=true"
        )
    try:
        return from_timm(name, args, keep_head=True).net
    except UsageError as error:
        message = str(error)
        for setting, own_setting in OWN_SETTINGS.items():
            message = message.replace(setting, own_setting)
        raise UsageError(message) from error


def _shared_arguments(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the student for its teacher, except sizes that a timm teacher cannot take."""
    shared = {key: args[key] for key in COMMON_ARGS if key in args}
    if timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("timm.models"):
        for key in ("img_size", "patch_size"):
            if key in shared and timm_argument(name, key, shared[key]) is None:
                del shared[key]
    return shared


def _student_start(cfg: DictConfig) -> Start:
    """The student's float initial weights, which also serve as the teacher."""
    if not (cfg.ckpt or cfg.model.weights or cfg.model.pretrained):
        if not cfg.trainer.fast_dev_run:
            raise UsageError(
                "loss with distillation: no teacher; "
                "set teacher.ckpt=FILE, teacher.pretrained=true, or start from float weights"
            )
        log.warning(
            "no teacher: this dry run (trainer.fast_dev_run) uses random weights as the teacher"
        )
    start = build_start(cfg, keep_head=True)
    if start.source is not None and conversion_of(start.source) is not None:
        raise UsageError(f"ckpt={cfg.ckpt!r} {QUANTIZED_ERROR}")
    return start


def net_of_file(
    path: str, name: str, args: dict[str, Any], model_setting: str | None = None
) -> nn.Module:
    """Build the model of `teacher.ckpt`.

    Args:
        path: a qat checkpoint, which names its model, or plain timm weights.
        name: timm name of the model, for plain timm weights.
        args: arguments of that model, for plain timm weights.
        model_setting: value of `teacher.model`, the model that a qat checkpoint must contain; None
            = any model.

    Raises:
        UsageError: the file is missing or unreadable, its weights do not fit or are not finite, or
            it contains another model or a quantized model of the OFQ paper's code.
    """
    origin = f"teacher.ckpt={str(path)!r}"
    checkpoint = read_checkpoint(path, setting="teacher.ckpt")
    if checkpoint.meta is None:
        if is_ofq(checkpoint.state):
            raise UsageError(f"{origin} {QUANTIZED_ERROR}")
        return from_state(name, args, checkpoint.state, origin=origin, keep_head=True).net
    stored_name = str(checkpoint.meta.get("model", {}).get("name"))
    if model_setting is not None and _family(model_setting) != _family(stored_name):
        raise UsageError(
            f"teacher.model={model_setting!r}: must be null; {origin} contains {stored_name}"
        )
    net = build_from(checkpoint)
    check_finite(net, origin)
    return net


def _family(name: str) -> str:
    """Name of a timm model without the tag of its weights."""
    return name.partition(".")[0]
