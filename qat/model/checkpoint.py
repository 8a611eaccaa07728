"""Checkpoints that rebuild a net from the file alone: constructor, recipe and weights, as plain data."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import get_model_args
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from qat.errors import UsageError
from qat.model.bounds import about_as_large_as, check_net
from qat.model.convert import conversion_of, convert, recipe_of
from qat.model.frozen import NOT_PLAIN, freeze_structure, is_frozen, prune_offsets
from qat.model.packed import read_packed
from qat.model.ptq_spec import recipe_from
from qat.model.scales import assert_ready, check_finite
from qat.utils.files import check_bounds, check_tensors, read_torch, write_torch
from qat.utils.validate import check_choice, check_images

FORMAT_VERSION = 1
META_KEY = "qat"
# Of timm's `pretrained_cfg`: which weights, and how images are prepared for them; other tags of one model differ in it.
OF_IMAGES = ("tag", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
FETCHING_ARGS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
}  # would read further files
NET_PREFIX = "net."
FORMATS = ("auto", "qat", "timm", "ofq")
_AVERAGED, _TRAINED = (
    ("state_dict_ema", "model_ema"),
    ("state_dict", "model"),
)  # under which scripts keep weights
_WRAPPED = re.compile(r"^(_orig_mod\.)?module\.|_orig_mod\.")  # what wrappers put before names
_EXPORTED = (".onnx", ".pte")  # files of `qat export` that hold no weights of a net
_MOST_PIXELS = 2**25  # of an image that a file says its net takes


def is_plain(value: object) -> bool:
    """True for what `torch.load(weights_only=True)` reads back without help: None, numbers, text, lists and dicts of them."""
    # Of these classes themselves: a subclass, as NumPy's numbers or an enumeration, is written by its name and refused by the reader.
    kind = type(value)
    if kind is dict:
        return all(type(k) is str and is_plain(v) for k, v in value.items())  # type: ignore[attr-defined]
    if kind in {list, tuple}:
        return all(is_plain(v) for v in value)  # type: ignore[attr-defined]
    return value is None or kind in {bool, int, float, str}


def describe(
    net: nn.Module,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What a checkpoint says of a net beside its weights.

    Args:
        net: converted or float.
        model: timm name; None = the name timm itself wrote on the net.
        model_kwargs: arguments of `timm.create_model`; None = those timm noted.
        data: config of the data it was trained on, stored as it is; None = what `load` found in the net's file, if it came from one.
        classes: names of its classes, in the order of its outputs; None = what `load` found in the net's file.

    Raises:
        UsageError: the net does not say how it was built, or not in plain data; data or classes are not of their kind.
    """
    data, classes = (
        data_of(net) if data is None else data,
        classes_of(net) if classes is None else classes,
    )
    fits = isinstance(data, Mapping | None) and isinstance(classes, list | tuple | None)
    if (
        not fits
        or not is_plain(data and dict(data))
        or not all(type(name) is str for name in classes or [])
    ):
        raise UsageError(
            "save: data must be a dict of Python's own numbers, text, lists and dicts, classes a list of names"
        )
    config = getattr(net, "pretrained_cfg", None) or {}
    name = model or config.get("architecture")
    kwargs = getattr(net, "_model_args", None) if model_kwargs is None else dict(model_kwargs)
    if not name or kwargs is None:
        how = (
            "save net.module if it is a wrapper, else set model='timm name' and model_kwargs={...}"
        )
        raise UsageError(f"save: this model does not record how timm built it; {how}")
    num_classes = getattr(net, "num_classes", None)
    if isinstance(num_classes, int):
        kwargs = {**kwargs, "num_classes": num_classes}
        # What `reset_classifier` may have changed, and the constructor does not say: the classifier and the pooling.
        head = net.get_classifier() if callable(getattr(net, "get_classifier", None)) else None  # type: ignore[operator]
        outputs = getattr(head, "out_features", num_classes)
        if outputs != num_classes:
            raise UsageError(
                f"save: the head has {outputs} outputs, num_classes={num_classes}; net.reset_classifier({outputs}) sets both"
            )
    if not is_plain(kwargs):
        raise UsageError(
            f"save: model arguments {kwargs} are not plain data; set model_kwargs={{...}} of numbers and text"
        )
    done, recipe = conversion_of(net), recipe_of(net)
    return {
        "format_version": FORMAT_VERSION,
        "model": {"name": name, "kwargs": dict(kwargs)},
        "pretrained_cfg": {
            key: value for key, value in config.items() if key in OF_IMAGES and value is not None
        },
        "pool": get_model_args(net).get("global_pool"),
        "biases": grown_biases(net),
        "recipe": None if recipe is None else recipe.to_dict(),
        "input_size": None if done is None else list(done.input_size),
        "frozen": is_frozen(net),
        "data": data and dict(data),
        "classes": classes and list(classes),
    }


def data_of(net: nn.Module) -> dict[str, Any] | None:
    """Config of the data that a net was trained on, as its file had it; None where it came from no such file."""
    return getattr(net, "qat_data", None)


def classes_of(net: nn.Module) -> list[str] | None:
    """Names of a net's classes, in the order of its outputs; None if they are not known."""
    return getattr(net, "qat_classes", None)


def save(
    net: nn.Module,
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write a net to one file that `qat.load` rebuilds without data; readable with `torch.load(weights_only=True)`.

    Args:
        net: converted or float.
        path: the file.
        model: see `describe`.
        model_kwargs: see `describe`.
        data: how images are to be prepared, as in `data/*.yaml`, for `qat.transform` and `eval.py`: `image_size`, `mean`, `std` ...
        classes: names of the classes, in the order of the net's outputs.

    Raises:
        UsageError: see `describe`; weights are made from others (pruning, parametrizations); or, once written, `load` cannot read them.
    """
    if prune.is_pruned(net) or any(map(parametrize.is_parametrized, net.modules())):
        raise UsageError(f"save: the net {NOT_PLAIN}")
    meta = describe(net, model=model, model_kwargs=model_kwargs, data=data, classes=classes)
    write_torch(path, {META_KEY: meta, "state_dict": net.state_dict()})
    check_loads(path)


def check_loads(path: str | os.PathLike[str]) -> None:
    """Raise `UsageError` if `load` cannot rebuild a net that was just written: somebody has changed its modules since timm built it."""
    with torch.random.fork_rng(devices=[]):
        try:
            load(path)
        except UsageError as error:
            raise UsageError(
                f"save: written, but qat.load cannot rebuild the model: {error}"
            ) from error


@dataclass(frozen=True)
class Checkpoint:
    """A file read into memory.

    Attributes:
        path: where it came from.
        state: weights by name, without wrapper prefixes.
        meta: what `describe` wrote; None for a timm or plain state dict.
        step: optimizer steps taken, for a training checkpoint.
        args: arguments of the script that wrote it, as timm's scripts store them.
        training: of a training checkpoint `epochs`, how many are over, and `groups`, the settings and sizes of the optimizer's.
    """

    path: Path
    state: dict[str, Tensor]
    meta: dict[str, Any] | None
    step: int | None = None
    args: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)


def _read_file(path: Path, origin: str) -> Any:
    if not path.is_file():
        raise UsageError(
            f"{origin}: {'must be a file, not a folder' if path.is_dir() else 'no such file'}"
        )
    if path.suffix.lower() in _EXPORTED:
        raise UsageError(
            f"{origin}: is an exported file for another runtime; must be the checkpoint that it was exported from"
        )
    try:
        if path.suffix == ".safetensors":
            packed = read_packed(path)
            return (
                safetensors.torch.load_file(path)
                if packed is None
                else {"state_dict": packed[0], META_KEY: packed[1]}
            )
        # timm writes its training arguments into its checkpoints; nothing else than plain data and tensors is read.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return read_torch(path)
    except UsageError:
        raise
    except Exception as error:
        # Not torch's words, which advise to turn the check off.
        why: object = (
            "damaged, or it holds more than tensors and plain data; save only the state_dict()"
        )
        if path.suffix != ".safetensors" and not _is_of_torch(path):
            why = "must be a file of torch.save or safetensors"
        if isinstance(error, ValueError | OverflowError) or getattr(error, "filename", None):
            why = getattr(error, "strerror", error)
        raise UsageError(
            f"{origin}: not a checkpoint that can be read safely ({' '.join(str(why).split())})"
        ) from error


def _is_of_torch(path: Path) -> bool:
    """True for a file that begins as an archive or a pickle."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(2) in {b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}
    return True


def read_checkpoint(
    path: str | os.PathLike[str], *, fmt: str = "auto", setting: str = "ckpt"
) -> Checkpoint:
    """Read a file of ours, of timm, or a plain state dict (torch or safetensors). Nothing in it is executed.

    Where a training script has left averaged weights as well, those are read, as timm does.

    Args:
        path: the file.
        fmt: one of `FORMATS`; `ofq` (the paper's code) is read like `timm`, `qat.interop` makes a net of it.
        setting: the name by which an error calls the file.

    Raises:
        UsageError: no such file, damaged, not plain data, or not of the format asked for.
    """
    check_choice("ckpt_format", fmt, FORMATS)
    path = Path(path)
    origin = f"{setting}={str(path)!r}"
    content = _read_file(path, origin)
    if not isinstance(content, Mapping):
        raise UsageError(
            f"{origin}: holds a {type(content).__name__}, expected a dictionary of tensors"
        )
    meta = content.get(META_KEY) if fmt in {"auto", "qat"} else None
    if fmt == "qat" and meta is None:
        raise UsageError(
            f"{origin}: not a checkpoint of qat (ckpt_format=qat); here it must be one of auto, timm, ofq"
        )
    state = next(
        (
            v
            for k in (*(() if fmt == "ofq" else _AVERAGED), *_TRAINED)
            if isinstance(v := content.get(k), Mapping) and v
        ),
        content,
    )
    named = {
        _WRAPPED.sub("", k): v
        for k, v in state.items()
        if isinstance(k, str) and isinstance(v, Tensor)
    }
    module = (
        "" if meta else "".join(os.path.commonprefix([*named]).rpartition(".")[:2])
    )  # such as `net.` of a LightningModule
    tensors = timm_names({k.removeprefix(module): v for k, v in named.items()})
    if not tensors:
        raise UsageError(f"{origin}: holds no weights")
    check_tensors(tensors, origin, path.stat().st_size)
    if meta is not None:
        _check_meta(meta, origin)
        if "pytorch-lightning_version" in content:
            tensors = {
                k.removeprefix(NET_PREFIX): v
                for k, v in tensors.items()
                if k.startswith(NET_PREFIX)
            }
    step, args = content.get("global_step"), content.get("args")
    said = (
        vars(args)
        if isinstance(args, argparse.Namespace)
        else dict(args)
        if isinstance(args, Mapping)
        else None
    )
    return Checkpoint(
        path, tensors, meta, step if isinstance(step, int) else None, said, _training_of(content)
    )


def _check_meta(meta: Any, origin: str) -> None:
    """Raise `UsageError` if what a file of ours says of itself is not of the kind that `describe` writes."""
    try:
        check_bounds(meta)
        model, data, size, config = (
            meta["model"],
            meta.get("data") or {},
            meta.get("input_size") or [1],
            meta.get("pretrained_cfg") or {},
        )
        classes = meta.get("classes") or []
        kinds: dict[type, tuple[Any, ...]] = {
            dict: (model["kwargs"], data, config, meta.get("run", {})),
            list: (classes,),
            str: (model["name"], data.get("_target_", ""), data.get("model") or "", *classes),
            int: (meta.get("format_version", 0),),
        }
        if not (
            all(isinstance(value, kind) for kind in kinds for value in kinds[kind])
            and math.prod(size) <= _MOST_PIXELS
        ):
            raise TypeError("has something of another kind")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"{origin}: is damaged, or not written by qat: its description of the model: {error}"
        ) from error
    check_images(f"{origin}: its data", data)


def _training_of(content: Mapping[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(LookupError, TypeError, ValueError):
        epochs = int(content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
        (state,) = content["optimizer_states"]
        groups = [
            (sorted({*map(str, group)} - {"params"}), len(group["params"]))
            for group in state["param_groups"]
        ]
        return {"epochs": epochs, "groups": groups}
    return {}


def build_from(checkpoint: Checkpoint) -> nn.Module:
    """The net of a checkpoint of ours, with its weights.

    Raises:
        UsageError: the file does not say which model it holds, or its weights do not fit or are not finite.
    """
    origin, meta = f"ckpt={str(checkpoint.path)!r}", checkpoint.meta
    if meta is None:
        raise UsageError(f"{origin}: does not say which model it holds; set model=...")
    if (version := meta.get("format_version", 0)) > FORMAT_VERSION:
        raise UsageError(
            f"{origin}: written by a newer qat (format {version}); this one reads up to {FORMAT_VERSION}"
        )
    try:
        with about_as_large_as(checkpoint.state):
            net = _described(meta, checkpoint.state)
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
            f"{origin}: cannot build the model it describes ({' '.join(str(error).split())})"
        ) from error
    if is_frozen(net):
        prune_offsets(net, checkpoint.state)
    try:
        net.load_state_dict(checkpoint.state, strict=True)
    except RuntimeError as error:
        raise UsageError(
            f"{origin}: weights do not fit {meta['model']['name']} ({' '.join(str(error).split())[:300]})"
        ) from error
    check_finite(net, origin, unset=True)
    with contextlib.suppress(
        UsageError
    ):  # a file without scales gives a net that raises when it is called
        assert_ready(net)
    net.qat_data, net.qat_classes = meta.get("data"), meta.get("classes")  # type: ignore[assignment]
    return net.eval()


def _described(meta: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    name, kwargs = meta["model"]["name"], meta["model"]["kwargs"]
    # timm would also take hub:repository for a name, and arguments that fetch or read further files.
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}")
    for argument in sorted(FETCHING_ARGS & set(kwargs)):
        raise ValueError(f"argument {argument} would read something else")
    if weights is not None:
        data = meta.get("data") or {}
        check_net(
            name,
            kwargs,
            weights,
            meta.get("input_size") or [data.get("in_chans"), *[data.get("image_size")] * 2],
        )
    net: nn.Module = timm.create_model(name, **kwargs)
    if meta.get("pool") not in {None, get_model_args(net).get("global_pool")}:
        net.reset_classifier(net.num_classes, meta["pool"])  # type: ignore[operator]
    if images := {
        key: value for key, value in (meta.get("pretrained_cfg") or {}).items() if key in OF_IMAGES
    }:
        config = {**net.pretrained_cfg, **images}  # type: ignore[dict-item]
        check_images("pretrained_cfg", config)
        net.pretrained_cfg = net.default_cfg = config  # type: ignore[assignment]
    grow_biases(net, meta.get("biases") or [])
    if meta.get("recipe") is not None:
        convert(net, recipe_from(meta["recipe"]), input_size=meta["input_size"])
        if meta.get("frozen"):
            freeze_structure(net)
    return net


def float_twin(net: nn.Module) -> nn.Module:
    """A float net of the same constructor with fresh weights; in eval mode.

    Raises:
        UsageError: the net does not say how timm built it.
        LookupError, TypeError, ValueError, RuntimeError: what it says cannot be built.
    """
    with torch.random.fork_rng(
        devices=[]
    ):  # the weights, drawn on the CPU, are not looked at: nobody's draws move
        return _described({**describe(net), "recipe": None}).eval()


def load(path: str | os.PathLike[str], *, imports: Sequence[str] = ()) -> nn.Module:
    """Rebuild a net from a file of `qat.save` or a `last.ckpt` / `best.ckpt`: strict, without data, in eval mode.

    Args:
        path: the file.
        imports: modules to import first, with quantizers `package.module:Class` and models that the file names; it imports none itself.

    Raises:
        ImportError: one of `imports` cannot be imported.
        UsageError: see `read_checkpoint` and `build_from`.
    """
    for name in imports:
        importlib.import_module(name)
    return build_from(read_checkpoint(path))


# Torchvision's Swin, and that of the paper's code, which has its names: only the first has a table of biases there.
_MARK = "features.1.0.attn.relative_position_bias_table"


def _stage(found: re.Match[str]) -> str:
    """Stages and mergings are counted alike there: 1 = first stage, 2 = the merging before the second."""
    place = int(found[1])
    return f"layers.{place // 2}." + ("blocks." if place % 2 else "downsample.")


_NAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.(\d+)\.", _stage),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.", "head.fc."),
)


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names; a state dict of anything but torchvision's Swin comes back as it is."""
    if _MARK not in state:
        return dict(state)
    return {
        _renamed(name): tensor
        for name, tensor in state.items()
        if not name.endswith("relative_position_index")
    }


def _renamed(name: str) -> str:
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name


def grow_biases(net: nn.Module, names: Iterable[str]) -> None:
    """Give Linears a bias of zeros, which some checkpoints have and timm has not; `net.qat_biases` has their names, for checkpoints.

    Args:
        net: a timm net, not yet converted.
        names: of Linears, `layers.1.downsample.reduction`; those that have a bias already stay as they are.

    Raises:
        ValueError: one of them is no Linear.
    """
    modules = dict(net.named_modules())
    for name in names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is not a linear layer")
        if linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
            net.qat_biases = [*grown_biases(net), name]


def grown_biases(net: nn.Module) -> list[str]:
    """Names of the Linears of `net` that `grow_biases` gave a bias."""
    return list(getattr(net, "qat_biases", []))
