"""Metadata of a checkpoint, which tells how to build the model that the weights belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import get_model_args
from torch import nn

from qat.errors import UsageError
from qat.model.convert import conversion_of, recipe_of
from qat.model.foreign_weights import added_biases
from qat.model.frozen import is_frozen
from qat.nn.hf_constructor import constructor_of
from qat.utils.files import check_bounds
from qat.utils.validate import check_images

FORMAT_VERSION = 1
META_KEY = "qat"
# Keys of timm's `pretrained_cfg` that files store: the origin of the weights, and the preparation
# of images. A model's name does not determine their values, which differ between its tags.
IMAGE_KEYS = ("tag", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_MAX_VALUES = 2**25  # maximum channels * height * width of images in a file


def is_plain_data(value: object) -> bool:
    """True for None, numbers, text, and lists, tuples and dicts (with text as keys) of these.

    `torch.load(weights_only=True)` can read these values. Instances of subclasses, such as NumPy's
    numbers and enumerations, are not plain: files store them with the names of their classes, which
    `torch.load` then refuses.
    """
    kind = type(value)
    if kind is dict:
        items = value.items()  # type: ignore[attr-defined]
        return all(type(key) is str and is_plain_data(item) for key, item in items)
    if kind in {list, tuple}:
        return all(is_plain_data(item) for item in value)  # type: ignore[attr-defined]
    return value is None or kind in {bool, int, float, str}


def data_of(net: nn.Module) -> dict[str, Any] | None:
    """Data config from the file that a model was loaded from; None if unknown."""
    return getattr(net, "qat_data", None)


def classes_of(net: nn.Module) -> list[str] | None:
    """Names of a model's classes, in the order of its outputs; None if unknown."""
    return getattr(net, "qat_classes", None)


def recorded_constructor(net: nn.Module) -> tuple[str | None, dict[str, Any] | None]:
    """Name and arguments with which timm builds the model; None where they are not recorded."""
    config = getattr(net, "pretrained_cfg", None) or {}
    timm_record = config.get("architecture"), getattr(net, "_model_args", None)
    return constructor_of(net) or timm_record


def describe(
    net: nn.Module,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Metadata of a checkpoint of `net`.

    Args:
        net: a converted or float model.
        model: timm name; None = the name that timm stored in the model. Models of Transformers need
            no name.
        model_kwargs: arguments of `timm.create_model`; None = the arguments that timm stored in the
            model. `net.num_classes`, if set, takes precedence.
        data: config of the training data; None = the config that `load` found in the model's file.
        classes: class names in the order of the outputs; None = the names that `load` found in the
            model's file.

    Raises:
        UsageError: the model's name or arguments are unknown, or the arguments are not plain data;
            `data` is not a dict of plain data, or `classes` is not a list of names; or the head
            does not have `net.num_classes` outputs.
    """
    if data is None:
        data = data_of(net)
    if classes is None:
        classes = classes_of(net)
    _check_data_and_classes(data, classes)
    own_name, own_kwargs = recorded_constructor(net)
    name = model or own_name
    kwargs = own_kwargs if model_kwargs is None else dict(model_kwargs)
    if not name or kwargs is None:
        advice = (
            "if this model is a wrapper, save net.module; "
            "otherwise set model='timm name' and model_kwargs={...}"
        )
        raise UsageError(f"save: this model does not record how timm built it; {advice}")
    num_classes = getattr(net, "num_classes", None)
    if isinstance(num_classes, int):
        kwargs = {**kwargs, "num_classes": num_classes}
        _check_outputs(net, num_classes)
    if not is_plain_data(kwargs):
        raise UsageError(
            f"save: model arguments {kwargs} are not plain data; "
            "set model_kwargs={...} of numbers and text"
        )
    conversion = conversion_of(net)
    recipe = recipe_of(net)
    config = getattr(net, "pretrained_cfg", None) or {}
    image_config = {}
    for key in IMAGE_KEYS:
        if config.get(key) is not None:
            image_config[key] = config[key]
    return {
        "format_version": FORMAT_VERSION,
        "model": {"name": name, "kwargs": dict(kwargs)},
        "pretrained_cfg": image_config,
        # `reset_classifier` may have changed the pooling after timm stored the arguments.
        "pool": get_model_args(net).get("global_pool"),
        "biases": added_biases(net),
        "recipe": None if recipe is None else recipe.to_dict(),
        "input_size": None if conversion is None else list(conversion.input_size),
        "signs": None if conversion is None else conversion.signs,
        "frozen": is_frozen(net),
        "data": data and dict(data),
        "classes": classes and list(classes),
    }


def _check_data_and_classes(data: Any, classes: Any) -> None:
    is_dict = isinstance(data, Mapping | None) and is_plain_data(data and dict(data))
    is_list = isinstance(classes, list | tuple | None)
    if is_dict and is_list and all(type(name) is str for name in classes or []):
        return
    raise UsageError(
        "save: data must be a dict of Python's own numbers, text, lists and dicts, "
        "classes a list of names"
    )


def _check_outputs(net: nn.Module, num_classes: int) -> None:
    get_classifier = getattr(net, "get_classifier", None)
    head = get_classifier() if callable(get_classifier) else None
    outputs = getattr(head, "out_features", num_classes)
    if outputs != num_classes:
        raise UsageError(
            f"save: the head has {outputs} outputs, num_classes={num_classes}; "
            f"net.reset_classifier({outputs}) makes both agree"
        )


def check_metadata(meta: Any, origin: str) -> None:
    """Raise `UsageError` if required metadata of a file is missing, or a type or range is wrong."""
    try:
        check_bounds(meta)
        _check_types(meta)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"{origin}: the description of the model is damaged, or was not written by qat "
            f"({error})"
        ) from error
    check_images(f"{origin}: data", meta.get("data") or {})


def _check_types(meta: Any) -> None:
    data = meta.get("data") or {}
    dicts = (
        meta["model"]["kwargs"],
        data,
        meta.get("pretrained_cfg") or {},
        meta.get("run", {}),
    )
    classes = meta.get("classes") or []
    texts = (meta["model"]["name"], data.get("_target_", ""), data.get("model") or "", *classes)
    num_values = math.prod(meta.get("input_size") or [1])
    is_valid = (
        all(isinstance(value, dict) for value in dicts)
        and isinstance(classes, list)
        and all(isinstance(value, str) for value in texts)
        and isinstance(meta.get("format_version", 0), int)
        and num_values <= _MAX_VALUES
    )
    if not is_valid:
        raise TypeError("a value has the wrong type or is out of range")
