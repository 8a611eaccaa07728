"""Checkpoints that rebuild a net from the file alone: constructor, recipe and weights, as plain data."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.biases import grow_biases, grown_biases
from qat.model.convert import conversion_of, convert, recipe_of
from qat.model.frozen import freeze_structure, is_frozen, prune_offsets
from qat.model.frozen.packed import read_packed
from qat.model.hub import FETCHING_ARGS
from qat.model.ptq_spec import recipe_from
from qat.model.scales import assert_ready
from qat.model.torchvision_swin import timm_names
from qat.spec import QuantRecipe
from qat.utils.files import about_as_large_as, check_bounds, check_model_arguments, check_tensors, damage_of, write_torch

FORMAT_VERSION = 1
META_KEY = "qat"
NET_PREFIX = "net."
# What Lightning needs to go on with a run, and the kinds of it.
TRAINING = {
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "callbacks": dict,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
}
FORMATS = ("auto", "qat", "timm", "ofq")
_AVERAGED, _TRAINED = ("state_dict_ema", "model_ema"), ("state_dict", "model")  # under which scripts keep weights
_DATA, _CLASSES = "qat_data", "qat_classes"  # where a net keeps what its file said of its data
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
    data, classes = data_of(net) if data is None else data, classes_of(net) if classes is None else classes
    data = dict(data) if isinstance(data, Mapping) else data
    if data is not None and not (isinstance(data, dict) and is_plain(data)):
        raise UsageError("save: data is no plain config: must be a dict of Python's own numbers, text, lists and dicts of them")
    try:
        check_bounds([data, classes])  # what `load` would refuse
    except ValueError as error:
        raise UsageError(f"save: data and classes: must be smaller: what they hold {error}") from error
    if classes is not None and not (isinstance(classes, list | tuple) and all(type(name) is str for name in classes)):
        raise UsageError(f"save: classes={str(classes)[:60]}: must be a list of names, one text for each class")
    name = model or (getattr(net, "pretrained_cfg", None) or {}).get("architecture")
    kwargs = getattr(net, "_model_args", None) if model_kwargs is None else dict(model_kwargs)
    if not name or kwargs is None:
        raise UsageError("save: this net does not say how timm built it; give model='timm name' and model_kwargs={...}")
    num_classes = getattr(net, "num_classes", None)
    if isinstance(num_classes, int):
        kwargs = {**kwargs, "num_classes": num_classes}
        # What `reset_classifier` may have changed, and the constructor does not say: the classifier and the pooling.
        head = net.get_classifier() if callable(getattr(net, "get_classifier", None)) else None  # type: ignore[operator]
        outputs = getattr(head, "out_features", num_classes)
        if outputs != num_classes:
            raise UsageError(f"save: the head has {outputs} outputs, num_classes={num_classes}; net.reset_classifier({outputs}) sets both")
    for key, value in kwargs.items():
        if not is_plain(value):
            raise UsageError(f"save: model argument {key}={value!r} is not plain data; give model_kwargs={{...}} of numbers and text")
    done, recipe, pool = conversion_of(net), recipe_of(net), getattr(net, "global_pool", None)
    return {
        "format_version": FORMAT_VERSION,
        "model": {"name": name, "kwargs": dict(kwargs)},
        "pool": pool if isinstance(pool, str) else None,
        "biases": grown_biases(net),
        "recipe": None if recipe is None else recipe.to_dict(),
        "input_size": None if done is None else list(done.input_size),
        "frozen": is_frozen(net),
        "data": data,
        "classes": None if classes is None else list(classes),
    }


def data_of(net: nn.Module) -> dict[str, Any] | None:
    """Config of the data that a net was trained on, as its file had it; None where it came from no such file."""
    return getattr(net, _DATA, None)


def classes_of(net: nn.Module) -> list[str] | None:
    """Names of a net's classes, in the order of its outputs; None if they are not known."""
    return getattr(net, _CLASSES, None)


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
        UsageError: see `describe`.
    """
    meta = describe(net, model=model, model_kwargs=model_kwargs, data=data, classes=classes)
    write_torch(path, {META_KEY: meta, "state_dict": net.state_dict()})


@dataclass(frozen=True)
class Checkpoint:
    """A file read into memory.

    Attributes:
        path: where it came from.
        state: weights by name, without wrapper prefixes.
        meta: what `describe` wrote; None for a timm or plain state dict.
        step: optimizer steps taken, for a training checkpoint.
        args: arguments of the script that wrote it, as timm's scripts store them.
        training: what a training checkpoint has beside the weights, by name: kinds, of the optimizer's groups the settings and sizes, and
            `epochs`, how many are over.
    """

    path: Path
    state: dict[str, Tensor]
    meta: dict[str, Any] | None
    step: int | None = None
    args: dict[str, Any] | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


def _read_file(path: Path, setting: str) -> Any:
    origin = f"{setting}={str(path)!r}"
    if path.is_dir():
        names = ("checkpoints/best.ckpt", "best.ckpt", "quantized.ckpt")
        within = next((found for name in names if (found := path / name).is_file()), None)
        raise UsageError(f"{origin}: a folder, not a file{f'; {setting}={within} is in it' if within else ''}")
    if not path.is_file():
        raise UsageError(f"{origin}: no such file")
    if not path.stat().st_size:
        raise UsageError(f"{origin}: not a checkpoint that can be read safely (the file is empty)")
    try:
        if path.suffix == ".safetensors":
            packed = read_packed(path)
            return safetensors.torch.load_file(path) if packed is None else {"state_dict": packed[0], META_KEY: packed[1]}
        if (damage := damage_of(path)) is not None:
            raise UsageError(f"{origin}: the file is damaged ({damage})")
        # timm writes its training arguments into its checkpoints; nothing else than plain data and tensors is read.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{origin}: not a checkpoint that can be read safely ({_why(path, error)})") from error


def _why(path: Path, error: Exception) -> str:
    """Why a file cannot be read safely, and the way around, in place of torch's advice to turn the check off."""
    with contextlib.suppress(Exception):
        if objects := sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"}):
            instead = "where it was made, save the weights alone: torch.save(model.state_dict(), 'weights.pth')"
            return f"it holds {', '.join(objects)}; {instead}"
    if isinstance(error, OSError | EOFError) or "PytorchStreamReader" in str(error):
        return "it is damaged or cut short"
    if isinstance(error, LookupError) or "Weights only load failed" in str(error):
        return "it is no file of tensors: neither torch nor safetensors wrote it"
    return str(error).strip().partition("\n")[0]


def read_checkpoint(path: str | os.PathLike[str], *, fmt: str = "auto", setting: str = "ckpt") -> Checkpoint:
    """Read a file of ours, of timm, or a plain state dict (torch or safetensors). Nothing in it is executed.

    Where a training script has left averaged weights as well, those are read, as timm does.

    Args:
        path: the file.
        fmt: one of `FORMATS`; `ofq` (the paper's code) is read like `timm`, `qat.interop` makes a net of it.
        setting: the name by which an error calls the file.

    Raises:
        UsageError: no such file, damaged, not plain data, or not of the format asked for.
    """
    if fmt not in FORMATS:
        raise UsageError(f"ckpt_format={fmt!r}: must be one of {', '.join(FORMATS)}")
    path = Path(path)
    content = _read_file(path, setting)
    if not isinstance(content, Mapping):
        raise UsageError(f"{setting}={str(path)!r}: holds a {type(content).__name__}, expected a dictionary of tensors")
    meta = content.get(META_KEY)
    if fmt == "qat" and not isinstance(meta, Mapping):
        raise UsageError(f"{setting}={str(path)!r}: not a checkpoint of qat (ckpt_format=qat); here it must be one of auto, timm, ofq")
    state = next((content[k] for k in (*(() if fmt == "ofq" else _AVERAGED), *_TRAINED) if isinstance(content.get(k), Mapping)), content)
    tensors = timm_names({_bare(k): v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)})
    if not tensors:
        raise UsageError(f"{setting}={str(path)!r}: holds no weights")
    check_tensors(tensors, f"{setting}={str(path)!r}", path.stat().st_size)
    ours = dict(meta) if isinstance(meta, Mapping) and fmt not in {"timm", "ofq"} else None
    if ours is not None and "pytorch-lightning_version" in content:
        tensors = {k.removeprefix(NET_PREFIX): v for k, v in tensors.items() if k.startswith(NET_PREFIX)}
    if ours is not None:
        _check_meta(ours, f"{setting}={str(path)!r}")
    step, args = content.get("global_step"), content.get("args")
    said = vars(args) if isinstance(args, argparse.Namespace) else dict(args) if isinstance(args, Mapping) else None
    return Checkpoint(path, tensors, ours, step if isinstance(step, int) else None, said, _training_of(content))


def _check_meta(meta: Mapping[str, Any], origin: str) -> None:
    """Raise `UsageError` if what a file of ours says of itself is not of the kind that `describe` writes."""
    try:
        check_bounds(meta)
        model, size, classes = meta.get("model"), meta.get("input_size"), meta.get("classes")
        is_right = {
            "format_version": isinstance(meta.get("format_version", 0), int),
            "model": isinstance(model, Mapping) and isinstance(model.get("name"), str) and isinstance(model.get("kwargs"), Mapping),
            "input_size": size is None or (len(size) == 3 and min(size) > 0 and math.prod(size) <= _MOST_PIXELS),
            "data": isinstance(meta.get("data"), Mapping | None) and isinstance((meta.get("data") or {}).get("_target_", ""), str),
            "run": isinstance(meta.get("run", {}), Mapping),
            "classes": classes is None or all(isinstance(name, str) for name in classes),
        }
    except (TypeError, ValueError) as error:
        raise UsageError(f"{origin}: is damaged, or not written by qat: its description of the net {error}") from error
    for key, fits in is_right.items():
        if not fits:
            raise UsageError(f"{origin}: is damaged, or not written by qat: it says {key}={meta.get(key)!r} of itself")


def _training_of(content: Mapping[str, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {key: type(content[key]) for key in TRAINING if key in content}
    with contextlib.suppress(LookupError, TypeError, ValueError):
        (state,) = content["optimizer_states"]
        parts["groups"] = [(sorted({*map(str, group)} - {"params"}), len(group["params"])) for group in state["param_groups"]]
    try:
        parts["epochs"] = int(content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except (LookupError, TypeError, ValueError, ArithmeticError):
        parts["epochs"] = None
    return parts


def _bare(key: str) -> str:
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        key = key.removeprefix(prefix)
    return key


def build_from(checkpoint: Checkpoint) -> nn.Module:
    """The net of a checkpoint of ours, with its weights.

    Raises:
        UsageError: the file does not say what net it holds, or its weights do not fit.
    """
    meta = checkpoint.meta
    if meta is None:
        raise UsageError(f"ckpt={str(checkpoint.path)!r}: does not say what net it holds; give model=...")
    if meta.get("format_version", 0) > FORMAT_VERSION:
        newer = f"written by a newer qat (format {meta['format_version']}); this one reads up to {FORMAT_VERSION}"
        raise UsageError(f"ckpt={str(checkpoint.path)!r}: {newer}")
    try:
        with about_as_large_as(checkpoint.state):
            net = _described(meta)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError, RuntimeError) as error:
        raise UsageError(
            f"ckpt={str(checkpoint.path)!r}: cannot build the net it describes ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error
    if is_frozen(net):
        prune_offsets(net, checkpoint.state)
    try:
        net.load_state_dict(checkpoint.state, strict=True)
    except RuntimeError as error:
        raise UsageError(
            f"ckpt={str(checkpoint.path)!r}: weights do not fit {meta['model']['name']} ({' '.join(str(error).split())[:300]})"
        ) from error
    with contextlib.suppress(UsageError):  # a file without scales gives a net that raises when it is called
        assert_ready(net)
    setattr(net, _DATA, meta.get("data"))
    setattr(net, _CLASSES, meta.get("classes"))
    return net.eval()


def _described(meta: Mapping[str, Any]) -> nn.Module:
    name, kwargs = meta["model"]["name"], meta["model"]["kwargs"]
    # timm would also take hub:repository for a name, and arguments that fetch or read further files.
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}")
    for argument in sorted(FETCHING_ARGS & set(kwargs)):
        raise ValueError(f"argument {argument} would read something else")
    check_model_arguments(kwargs)
    net: nn.Module = timm.create_model(name, **kwargs)
    if meta.get("pool") is not None and isinstance(getattr(net, "global_pool", None), str):
        net.global_pool = meta["pool"]
    grow_biases(net, meta.get("biases") or [])
    if meta.get("recipe") is not None:
        channels, height, width = meta["input_size"]
        convert(net, recipe_from(meta["recipe"]), input_size=(channels, height, width))
        if meta.get("frozen"):
            freeze_structure(net)
    return net


def built_alike(net: nn.Module, recipe: QuantRecipe, input_size: tuple[int, int, int]) -> nn.Module:
    """A net of the same constructor with fresh weights, under another recipe; in eval mode.

    Raises:
        UsageError: the net does not say how timm built it, or the recipe does not fit.
        LookupError, TypeError, ValueError, RuntimeError: what it says cannot be built.
    """
    with torch.random.fork_rng(devices=[]):  # the weights, drawn on the CPU, are not looked at: nobody's draws move
        alike = _described({**describe(net), "recipe": recipe.to_dict(), "input_size": list(input_size)})
    return alike.eval()


def load(path: str | os.PathLike[str], *, imports: Sequence[str] = ()) -> nn.Module:
    """Rebuild a net from a file of `qat.save` or a `last.ckpt` / `best.ckpt`: strict, without data, in eval mode.

    Args:
        path: the file.
        imports: modules to import first, with the quantizers `package.module:Class` and the models that the file names; of itself a
            file imports nothing.

    Raises:
        ImportError: one of `imports` cannot be imported.
        UsageError: see `read_checkpoint` and `build_from`.
    """
    for name in imports:
        importlib.import_module(name)
    return build_from(read_checkpoint(path))
