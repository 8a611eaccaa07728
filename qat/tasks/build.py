"""Build dataset, recipe, loss and model from a config, and check them before the first step."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from qat.data import ImageData
from qat.errors import UsageError
from qat.interop import OfqNet, is_ofq, net_from_ofq
from qat.losses import CompositeLoss
from qat.model.checkpoint import Checkpoint, read_checkpoint
from qat.model.convert import convert
from qat.model.ptq_spec import custom_quantizers
from qat.model.scales import assert_ready, initialize_scales
from qat.model.start import (
    Start,
    from_checkpoint,
    from_net,
    from_scratch,
    from_state,
    from_timm,
    from_transformers,
)
from qat.model.transfer import add_random_biases, copy_scales, reset_attention_weights
from qat.nn.hf_constructor import CLASSIFIER
from qat.quantizers.registry import import_quantizer
from qat.spec import QuantRecipe
from qat.tasks.checks import check_unread
from qat.utils.validate import check_number

log = logging.getLogger(__name__)
T = TypeVar("T")

# Maximum number of images per calibration batch, so that a batch fits on one device.
MAX_CALIBRATION_BATCH = 1024


def to_plain(cfg: Any) -> Any:
    """Convert a config node to dicts, lists and scalars, with interpolations resolved.

    Other values are returned unchanged.
    """
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def instantiate(node: DictConfig, setting: str) -> Any:
    """Build the object that a config node's `_target_` names, from plain arguments.

    Raises:
        UsageError: the node names no class, the class does not exist, or it refuses the arguments.
    """
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise UsageError(
            f"{setting}={to_plain(node)!r}: must name a class: "
            f"{setting}._target_=package.module.Class"
        )
    arguments = {
        key: value for key, value in to_plain(node).items() if not str(key).startswith("_")
    }
    try:
        return hydra.utils.instantiate(node, _convert_="all", **_execution_whitelist(node))
    except InstantiationException as error:
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from error
        reason = error.__cause__ or error
        raise UsageError(
            f"{setting}._target_={node.get('_target_')!r}: {reason} (with {arguments})"
        ) from error


def _execution_whitelist(node: DictConfig) -> dict[str, Any]:
    """An argument for Hydra 1.4 and newer: the packages of all `_target_`s of a config node.

    All packages are allowed, because the user may name any class. For classes that a checkpoint
    names, `stored_data.py` has already refused all except datasets of qat. Hydra itself refuses
    functions that run commands.
    """
    if not hasattr(hydra.utils, "execution_whitelist"):
        return {}
    packages = re.findall(r"_target_: *(\w+)\.", OmegaConf.to_yaml(node, resolve=True))
    return {"_execution_whitelist_": [f"{package}.*" for package in packages]}


def build_settings(settings_class: type[T], group: str, settings: Mapping[str, Any]) -> T:
    """Build a dataclass from a group of settings.

    Raises:
        UsageError: the group is not a mapping, a key is not a field, or a value is invalid.
    """
    if not isinstance(settings, Mapping):
        raise UsageError(f"{group}={settings!r}: must be a group of settings")
    names = [field.name for field in dataclasses.fields(settings_class)]  # type: ignore[arg-type]
    for key in settings:
        if key not in names:
            raise UsageError(f"{group}.{key}: must be one of {', '.join(names)}")
    return settings_class(**settings)


def build_data(cfg: DictConfig) -> ImageData:
    """Build the dataset of `cfg.data`.

    Raises:
        UsageError: the class does not exist, is not an `ImageData`, refuses a setting, or ignores a
            setting that was changed.
    """
    data = instantiate(cfg.data, "data")
    if not isinstance(data, ImageData):
        raise UsageError(
            f"data._target_={cfg.data.get('_target_')!r}: must be a subclass of qat.data.ImageData"
        )
    # A prediction decodes images itself, and uses `on_error` for every dataset.
    check_unread(data, [] if cfg.get("predict") is None else ["on_error"])
    return data


def fill_in_num_classes(cfg: DictConfig) -> None:
    """If a dataset's `num_classes` is null, set it to the number that the dataset finds.

    Models are built from the config, so call this before building one.

    Raises:
        UsageError: see `build_data`.
    """
    if "_target_" in cfg.data and cfg.data.get("num_classes", 0) is None:
        cfg.data.num_classes = build_data(cfg).settings.num_classes


def build_recipe(cfg: DictConfig) -> QuantRecipe:
    """Build the recipe of `cfg.quant`.

    Raises:
        UsageError: the recipe has an unknown key or an invalid value, or a quantizer cannot be
            imported.
    """
    recipe = build_settings(QuantRecipe, "quant", to_plain(cfg.quant))
    for name in custom_quantizers(recipe):
        # The user named the class, so it may be imported. A class that only a checkpoint names is
        # never imported.
        import_quantizer(name)
    return recipe


def model_args(cfg: DictConfig) -> dict[str, Any]:
    """Arguments for `timm.create_model`: those that the config sets, and classes and channels.

    Raises:
        UsageError: an argument is invalid or contradicts the data.
    """
    args = {key: value for key, value in to_plain(cfg.model.args).items() if value is not None}
    if "drop_path_rate" in args:
        check_number("model.args.drop_path_rate", args["drop_path_rate"], 0, below=1)
    for name in ("num_classes", "in_chans"):
        # These values come from the data, not from timm's defaults.
        args.setdefault(name, cfg.data[name])
        if args[name] != cfg.data[name] or isinstance(args[name], bool):
            raise UsageError(
                f"model.args.{name}={args[name]!r}: the data have {cfg.data[name]}; "
                f"set data.{name} if that is wrong"
            )
    return args


def import_modules(names: Iterable[str] | None) -> None:
    """Import `model.imports`: modules that register models in timm, or quantized layers in qat.

    Raises:
        UsageError: a module cannot be imported.
    """
    for name in names or ():
        try:
            importlib.import_module(name)
        except (ImportError, TypeError, ValueError) as error:
            raise UsageError(f"model.imports={name!r}: {error}") from error


def find_ofq_net(cfg: DictConfig, checkpoint: Checkpoint) -> OfqNet | None:
    """Return the model in a file of OFQ's own code, or None if another format applies.

    Raises:
        UsageError: `ckpt_format` is `ofq` but the file is not of OFQ's code; the model in the file
            cannot be built; or bits are set for another kind of file.
    """
    looks_like_ofq = checkpoint.meta is None and is_ofq(checkpoint.state)
    if cfg.ckpt_format == "ofq" or (cfg.ckpt_format == "auto" and looks_like_ofq):
        return net_from_ofq(checkpoint, cfg.model.name, cfg.ckpt_bits, cfg.ckpt_act_bits)
    for setting in ("ckpt_bits", "ckpt_act_bits"):
        if cfg[setting] is not None:
            raise UsageError(
                f"{setting}={cfg[setting]!r}: works only with files of OFQ's own code "
                "(ckpt_format=ofq); other files state their bits"
            )
    return None


def build_start(cfg: DictConfig, *, keep_head: bool = False) -> Start:
    """The float model and its weights: `ckpt`, `model.weights`, `model.pretrained` or random.

    Args:
        cfg: config of a command.
        keep_head: for weights with another number of classes: True = raise an error; False = give
            the model a new head (if `ckpt` is a file of qat or of OFQ's code, only with
            `model.reset_head=true`).

    Raises:
        UsageError: a setting or file cannot be used.
    """
    import_modules(cfg.model.imports)
    name = cfg.model.name
    args = model_args(cfg)
    if cfg.ckpt:
        return _start_from_ckpt(cfg, name, args, keep_head=keep_head)
    if cfg.model.weights and name == CLASSIFIER:
        return from_transformers(args, Path(cfg.model.weights).parent, keep_head=keep_head)
    if cfg.model.weights:
        file = read_checkpoint(cfg.model.weights, fmt="timm", setting="model.weights")
        origin = f"model.weights={str(file.path)!r}"
        return from_state(name, args, file.state, origin=origin, keep_head=keep_head)
    if cfg.model.pretrained:
        return from_timm(name, args, keep_head=keep_head)
    return from_scratch(name, args)


def _start_from_ckpt(cfg: DictConfig, name: str, args: dict[str, Any], *, keep_head: bool) -> Start:
    checkpoint = read_checkpoint(cfg.ckpt, fmt=cfg.ckpt_format)
    ofq_net = find_ofq_net(cfg, checkpoint)
    reset_head = cfg.model.reset_head
    if ofq_net is None:
        return from_checkpoint(name, args, checkpoint, reset_head=reset_head, keep_head=keep_head)
    origin = f"ckpt={str(cfg.ckpt)!r}"
    start = from_net(name, args, ofq_net.net, origin=origin, reset_head=reset_head)
    start.notes.append(ofq_net.note)
    return start


def quantize(
    start: Start, recipe: QuantRecipe, data: ImageData, *, init: str, processes: int
) -> list[str]:
    """Convert a model in place; copy the matching scales of the starting model; compute others.

    Args:
        start: the float model, and the quantized model that its weights come from, if there is one.
        recipe: the recipe.
        data: the dataset; new scales are computed from its calibration images.
        init: `full` keeps all weights; `reference` resets weights and adds biases as OFQ's code
            does.
        processes: number of processes of the run. Each process computes the scales from the same
            images, in batches of the global size (at most `MAX_CALIBRATION_BATCH`). Scales are then
            equal in all processes, and equal to those of a single process with this batch size.

    Returns:
        Notes for the user, one line each.

    Raises:
        UsageError: conversion or calibration is impossible.
    """
    as_reference = init == "reference" and recipe.name != "fp"
    reset_names = add_random_biases(start.net) if as_reference else []
    convert(start.net, recipe, input_size=data.input_size)
    if recipe.name == "fp":
        return []
    if as_reference:
        reset_names += reset_attention_weights(start.net)
    notes = [f"re-initialized, as in OFQ's code: {', '.join(reset_names)}"] if reset_names else []
    copied_names: list[str] = []
    missing_names: list[str] = []
    if start.source is not None:
        copied_names, missing_names = copy_scales(start.source, start.net)
    batch_size = min(data.settings.batch_size * processes, MAX_CALIBRATION_BATCH)
    batches = data.calibration_batches(batch_size)
    initialize_scales(start.net, batches, max_images=data.settings.calibration_images)
    assert_ready(start.net)
    if copied_names and not missing_names:
        return [*notes, f"scales of all {len(copied_names)} quantizers copied"]
    scales = "scales"
    if copied_names:
        names = ", ".join(missing_names)
        scales += f" of {len(copied_names)} quantizers copied, of {len(missing_names)} ({names})"
    num_images = sum(map(len, batches))
    return [*notes, f"{scales} initialized from {num_images} training images"]


def build_loss(cfg: DictConfig) -> CompositeLoss:
    """Build the terms of `cfg.loss`, and the regularizers whose weight is not 0.

    Raises:
        UsageError: a term cannot be built, or terms cannot be combined.
    """
    terms = {}
    for name, term in (cfg.loss.terms or {}).items():
        terms[name] = instantiate(term, f"loss.terms.{name}")
    for name, term in (cfg.loss.get("regularizers") or {}).items():
        regularizer = instantiate(term, f"loss.regularizers.{name}")
        if getattr(regularizer, "weight", None) == 0:
            continue
        if name in terms:
            raise UsageError(
                f"loss.terms.{name}: must have another name than loss.regularizers.{name}"
            )
        terms[name] = regularizer
    return CompositeLoss(terms)
