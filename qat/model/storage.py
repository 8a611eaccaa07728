"""Save a model to one file, and rebuild it only from this file."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from qat.errors import UsageError
from qat.model.bounds import check_net
from qat.model.checkpoint import Checkpoint, read_checkpoint
from qat.model.convert import apply_recipe
from qat.model.foreign_weights import add_biases
from qat.model.freeze import NOT_PLAIN_MESSAGE, freeze_structure, prune_offsets
from qat.model.frozen import is_frozen
from qat.model.metadata import FORMAT_VERSION, IMAGE_KEYS, META_KEY, describe
from qat.model.ptq_spec import recipe_from
from qat.model.scales import assert_ready, check_finite
from qat.utils.files import write_torch
from qat.utils.validate import check_images

# Arguments of timm's models that would make timm read other files.
FETCHING_ARGS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
}


def save(
    net: nn.Module,
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write a model to one file, from which `qat.load` rebuilds the model without data.

    The file can be read with `torch.load(weights_only=True)`.

    Args:
        net: a converted or float model.
        path: the file.
        model: see `describe`.
        model_kwargs: see `describe`.
        data: settings with which `qat.transform` and `eval.py` prepare images, as in `data/*.yaml`:
            `image_size`, `mean`, `std` ...; for None, see `describe`.
        classes: names of the classes, in the order of the outputs; for None, see `describe`.

    Raises:
        UsageError: see `describe`; or weights are computed from other tensors (pruning,
            parametrizations), or `load` cannot read the written file.
    """
    if prune.is_pruned(net) or any(map(parametrize.is_parametrized, net.modules())):
        raise UsageError(f"save: the model {NOT_PLAIN_MESSAGE}")
    meta = describe(net, model=model, model_kwargs=model_kwargs, data=data, classes=classes)
    write_torch(path, {META_KEY: meta, "state_dict": net.state_dict()})
    check_loads(path)


def check_loads(path: str | os.PathLike[str]) -> None:
    """Raise `UsageError` if `load` cannot rebuild a model from a file that was just written.

    This happens, for example, if modules were replaced after timm built the model.
    """
    try:
        load(path)
    except UsageError as error:
        raise UsageError(
            f"the file was written, but qat.load cannot rebuild the model: {error}"
        ) from error


def load(path: str | os.PathLike[str], *, imports: Sequence[str] = ()) -> nn.Module:
    """Rebuild a model from a file, without data, in eval mode; torch's random state is unchanged.

    The file comes from a run (`last.ckpt`, `best.ckpt`), `qat.save`, `qat.save_pretrained` or
    `export.py format=packed`.

    Args:
        path: the file.
        imports: modules to import first: those with models or quantizers (`package.module:Class`)
            of your own that the file names. Reading a file never imports a module.

    Raises:
        ImportError: one of `imports` cannot be imported.
        UsageError: see `read_checkpoint` and `build_from`.
    """
    for name in imports:
        importlib.import_module(name)
    with torch.random.fork_rng(devices=[]):
        return build_from(read_checkpoint(path))


def build_from(checkpoint: Checkpoint, image_size: tuple[int, int] | None = None) -> nn.Module:
    """Build the model of a qat checkpoint, and load the weights.

    Args:
        checkpoint: the file.
        image_size: (height, width) of images with which the model will also be called, for the
            check of the memory they take; None = check only the sizes in the file.

    Raises:
        UsageError: the file does not state its model, or a newer version of qat wrote it; its model
            cannot be built, or its weights do not fit or are not finite; or the model, or an image
            for it, takes much more memory than the weights.
    """
    origin = f"ckpt={str(checkpoint.path)!r}"
    meta = checkpoint.meta
    if meta is None:
        raise UsageError(f"{origin}: does not name its model; set model=NAME on the command line")
    version = meta.get("format_version", 0)
    if version > FORMAT_VERSION:
        raise UsageError(
            f"{origin}: written by a newer qat (format {version}); "
            f"this one reads up to {FORMAT_VERSION}; install a newer one"
        )
    net = _build_with_limits(meta, checkpoint.state, origin, image_size)
    if is_frozen(net):
        prune_offsets(net, checkpoint.state)
    try:
        net.load_state_dict(checkpoint.state, strict=True)
    except RuntimeError as error:
        reason = str(error)[:300]
        name = meta["model"]["name"]
        raise UsageError(f"{origin}: weights do not fit {name} ({reason})") from error
    check_finite(net, origin, unset=True)
    # `assert_ready` removes the hook that checks for unset scales. If scales are unset, the hook
    # stays, and calls of the model raise an error.
    with contextlib.suppress(UsageError):
        assert_ready(net)
    net.qat_data = meta.get("data")  # type: ignore[assignment]
    net.qat_classes = meta.get("classes")  # type: ignore[assignment]
    return net.eval()


def _build_with_limits(
    meta: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    origin: str,
    image_size: tuple[int, int] | None,
) -> nn.Module:
    """Build the model that untrusted metadata describes.

    Raise `UsageError` if the model cannot be built, or needs far more memory than `weights`.
    """
    try:
        _check_constructor(meta)
        pretrained_cfg = meta.get("pretrained_cfg") or {}
        check_images("pretrained_cfg", pretrained_cfg)
        image_sizes = _image_sizes(meta)
        if image_size is not None:
            image_sizes.append(image_size)
        check_net(
            meta["model"]["name"],
            meta["model"]["kwargs"],
            weights,
            image_sizes,
            pretrained_cfg.get("input_size"),
        )
        return _build(meta)
    except (
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        AssertionError,
        RuntimeError,
    ) as error:
        raise UsageError(
            f"{origin}: cannot build the model that the file describes ({error})"
        ) from error


def _image_sizes(meta: Mapping[str, Any]) -> list[Sequence[int]]:
    """Sizes (height, width) of the images with which a model is converted and evaluated."""
    sizes = []
    if meta.get("input_size") is not None:
        sizes.append(meta["input_size"][1:])
    side = (meta.get("data") or {}).get("image_size")
    if side is not None:
        sizes.append((side, side))
    return sizes


def _check_constructor(meta: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless timm has the model, and building it reads no other files.

    `timm.create_model` would also accept `hf-hub:repository` as a name.
    """
    name = meta["model"]["name"]
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}")
    fetching = sorted(FETCHING_ARGS & set(meta["model"]["kwargs"]))
    if fetching:
        raise ValueError(f"argument {fetching[0]} is not allowed: it loads another file")


def _build(meta: Mapping[str, Any]) -> nn.Module:
    """Build the model that metadata from `describe` specifies, with new weights."""
    _check_constructor(meta)
    net: nn.Module = timm.create_model(meta["model"]["name"], **meta["model"]["kwargs"])
    pool = meta.get("pool")
    if pool is not None and pool != get_model_args(net).get("global_pool"):
        net.reset_classifier(net.num_classes, pool)  # type: ignore[operator]
    _set_image_config(net, meta.get("pretrained_cfg") or {})
    add_biases(net, meta.get("biases") or [])
    if meta.get("recipe") is not None:
        # Older files do not store `signs`; their models were converted as with `mlp`.
        signs = meta["signs"] if meta.get("signs") in {"probe", "tails"} else "mlp"
        apply_recipe(net, recipe_from(meta["recipe"]), input_size=meta["input_size"], signs=signs)
        if meta.get("frozen"):
            freeze_structure(net)
    return net


def _set_image_config(net: nn.Module, stored: Mapping[str, Any]) -> None:
    image_config = {key: value for key, value in stored.items() if key in IMAGE_KEYS}
    if not image_config:
        return
    config = {**net.pretrained_cfg, **image_config}  # type: ignore[dict-item]
    check_images("pretrained_cfg", config)
    net.pretrained_cfg = config  # type: ignore[assignment]
    net.default_cfg = config  # type: ignore[assignment]


def float_twin(net: nn.Module) -> nn.Module:
    """Build the float version of a model, with new weights, in eval mode.

    Raises:
        UsageError: see `describe`.
        LookupError, TypeError, ValueError, RuntimeError: the model cannot be built from the record.
    """
    # Building the model draws random weights. This must not change later random numbers on the CPU.
    with torch.random.fork_rng(devices=[]):
        return _build({**describe(net), "recipe": None}).eval()
