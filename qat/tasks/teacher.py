"""Which net a distilling loss follows."""

from __future__ import annotations

import logging
from typing import Any

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
from qat.model.start import Start, check_model, from_pretrained, from_state
from qat.model.storage import build_from
from qat.model.transform import data_config, renormalize
from qat.tasks.build import build_start, model_args
from qat.tasks.checks import check_classes

log = logging.getLogger(__name__)

QUANTIZED = "is already quantized and cannot be the float teacher; set teacher.ckpt=FILE or teacher.pretrained=true"
# What every vision transformer takes; the rest of the student's arguments may not fit another model.
COMMON_ARGS = ("img_size", "patch_size", "in_chans", "num_classes")
# What may give weights, the first that is set.
STARTS = ("ckpt", "model.weights", "model.pretrained")
TEACHERS = ("teacher.ckpt", "teacher.pretrained", *STARTS)


def build_teacher(cfg: DictConfig, loss: CompositeLoss, data: ImageData) -> Teacher | None:
    """The teacher that the loss needs: `teacher.*`, or the float weights that the student starts from.

    Raises:
        UsageError: the loss distils and there are no trained weights to follow, or they are for other classes.
    """
    if cfg.teacher.model is not None:
        check_model("teacher.model", cfg.teacher.model)
    given = [
        f"teacher.{name}={cfg.teacher[name]!r}"
        for name in ("ckpt", "pretrained")
        if cfg.teacher[name]
    ]
    if not loss.needs_teacher:
        if given:
            log.warning("%s: no loss term uses a teacher, so it is not loaded", given[0])
        return None
    if len(given) > 1:
        raise UsageError(f"{', '.join(given)}: a teacher comes from only one of them")
    start = Start(_own_teacher(cfg)) if given or cfg.teacher.model else _students_start(cfg)
    name = next((key for key in TEACHERS if OmegaConf.select(cfg, key)), "model.name")
    fit_teacher(start, cfg, data, name)
    return Teacher(start.net, cfg.loss.get("teacher_head", "cls"))


def fit_teacher(start: Start, cfg: DictConfig, data: ImageData, setting: str) -> None:
    """Let a teacher take images of the data, whatever mean and standard deviation it was trained with.

    Args:
        start: the teacher.
        cfg: with the config of the data in force.
        data: what it teaches on.
        setting: what it comes from.

    Raises:
        UsageError: it has other classes, or the same ones in another order, or takes images of another size.
    """
    net, origin = start.net, f"{setting}={OmegaConf.select(cfg, setting)!r}"
    classes = getattr(net, "num_classes", data.settings.num_classes)
    if classes != data.settings.num_classes:
        raise UsageError(
            f"{origin} is the teacher: has {classes} classes, the data {data.settings.num_classes}"
        )
    check_classes(net, data, origin)
    try:
        check_input(net, data.input_size)
    except UsageError as error:
        raise UsageError(f"{origin} is the teacher: {error}") from error
    renormalize(net, _normalization(data), _trained_with(start, cfg, data, setting))


def warn_of_normalization(start: Start, cfg: DictConfig, data: ImageData) -> None:
    """Log a line if a net starts from weights that were trained on images of another mean or standard deviation."""
    setting = next((key for key in STARTS if OmegaConf.select(cfg, key)), "model.name")
    had, has = _trained_with(start, cfg, data, setting), _normalization(data)
    if had != has and is_first():
        names = ("mean {} and std {}".format(*pair) for pair in (had, has))
        log.warning(
            "%s=%r: trained on images of {}; data.mean and data.std set {}".format(*names),
            setting,
            OmegaConf.select(cfg, setting),
        )


def _normalization(data: ImageData) -> tuple[list[float], list[float]]:
    return list(data.settings.mean), list(data.settings.std)


def _trained_with(
    start: Start, cfg: DictConfig, data: ImageData, setting: str
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of what a net was trained on; those of the data where nothing says it.

    A file says it, and timm of its own weights. Of other weights timm's word is taken where the data follow it too.
    """
    net = start.source or start.net
    follows_timm = isinstance(data, EncodedImageData) and cfg.data.get("mean") is None
    is_known = (
        data_of(net)
        or setting.endswith(".pretrained")
        or (follows_timm and setting != "model.name")
    )
    if not is_known:
        return _normalization(data)
    config, one = data_config(net), {"image_size": 1, "patch_size": None, "num_classes": 1}
    settings = EncodedImageData.complete(
        one | {key: config.get(key) for key in ("in_chans", "mean", "std", "model")}
    )
    return list(settings.mean), list(settings.std)


def _own_teacher(cfg: DictConfig) -> nn.Module:
    """The net of `teacher.*`."""
    name, args = cfg.teacher.model or cfg.model.name, model_args(cfg)
    if cfg.teacher.model:
        args = {key: args[key] for key in COMMON_ARGS if key in args}
    if cfg.teacher.ckpt:
        return net_of_file(cfg.teacher.ckpt, name, args, cfg.teacher.model)
    if not cfg.teacher.pretrained:
        raise UsageError(
            f"teacher.model={name!r}: set its weights with teacher.ckpt=FILE or teacher.pretrained=true"
        )
    try:
        return from_pretrained(name, args, keep_head=True).net
    except UsageError as error:
        raise UsageError(str(error).replace("model.", "teacher.")) from error


def _students_start(cfg: DictConfig) -> Start:
    if not (cfg.ckpt or cfg.model.weights or cfg.model.pretrained):
        if not cfg.trainer.fast_dev_run:
            instead = "set teacher.ckpt=FILE, teacher.pretrained=true, or start from float weights"
            raise UsageError(f"loss with distillation: no teacher; {instead}")
        log.warning(
            "no teacher: this dry run (trainer.fast_dev_run) uses random weights as the teacher"
        )
    start = build_start(cfg, keep_head=True)
    if start.source is not None and conversion_of(start.source) is not None:
        raise UsageError(f"ckpt={cfg.ckpt!r} {QUANTIZED}")
    return start


def net_of_file(path: str, name: str, args: dict[str, Any], typed: str | None = None) -> nn.Module:
    """The net of `teacher.ckpt`.

    Args:
        path: a checkpoint of ours, which says what it holds, or weights of timm's.
        name: of the timm model that weights of timm's are for.
        args: its arguments.
        typed: name of the model that a checkpoint of ours has to hold; None = any.

    Raises:
        UsageError: there is no such file, it cannot be read, does not fit or holds another model, or weights of OFQ's authors.
    """
    origin = f"teacher.ckpt={str(path)!r}"
    checkpoint = read_checkpoint(path, setting="teacher.ckpt")
    if checkpoint.meta is None:
        if is_ofq(checkpoint.state):
            raise UsageError(f"{origin} {QUANTIZED}")
        return from_state(name, args, checkpoint.state, origin=origin, keep_head=True).net
    held = str(checkpoint.meta.get("model", {}).get("name"))
    if typed is not None and typed.partition(".")[0] != held.partition(".")[0]:
        raise UsageError(f"teacher.model={typed!r}: must be null; {origin} holds {held}")
    net = build_from(checkpoint)
    check_finite(net, origin)
    return net
