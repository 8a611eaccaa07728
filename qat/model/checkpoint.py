"""Read checkpoints of qat or timm and plain state dicts, without executing anything in them."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from torch.serialization import safe_globals

from qat.errors import UsageError
from qat.model.foreign_weights import timm_names
from qat.model.metadata import META_KEY, check_metadata
from qat.model.packed import read_packed
from qat.utils.files import check_tensors, read_torch
from qat.utils.validate import check_choice

FORMATS = ("auto", "qat", "timm", "ofq")
NET_PREFIX = "net."
# Keys under which training scripts store weights or averaged weights.
_AVERAGED_KEYS = ("state_dict_ema", "model_ema")
_TRAINED_KEYS = ("state_dict", "model")
# Prefixes that wrappers put before names.
_WRAPPER_PREFIX = re.compile(r"^(_orig_mod\.)?module\.|_orig_mod\.")
# Suffixes of files that `qat export` writes for other runtimes.
_EXPORT_SUFFIXES = (".onnx", ".pte")
# Checkpoints in a run directory, the best one first.
_FILES_OF_RUNS = ("checkpoints/best.ckpt", "quantized.ckpt", "checkpoints/last.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
        path: the file.
        state: weights by name, without wrapper prefixes.
        meta: metadata that `describe` returned; None if absent, or if read as `timm` or `ofq`.
        step: number of optimizer steps, for a training checkpoint.
        args: arguments of the training script that wrote the file, as timm's scripts store them.
        training: for a training checkpoint with one optimizer, `epochs`, the number of completed
            epochs, and `groups`: for each group of the optimizer, the sorted names of its settings
            and the number of its parameters; else empty.
    """

    path: Path
    state: dict[str, Tensor]
    meta: dict[str, Any] | None
    step: int | None = None
    args: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(
    path: str | os.PathLike[str], *, fmt: str = "auto", setting: str = "ckpt"
) -> Checkpoint:
    """Read a checkpoint of qat or timm, or a plain state dict (torch or safetensors).

    Nothing in the file is executed. If the file also contains averaged weights, they are read
    instead, as in timm, except with `ofq`.

    Args:
        path: the file.
        fmt: one of `FORMATS`: `auto` = any file; `qat` = only a checkpoint of qat; `timm` = ignore
            the metadata of qat; `ofq` = a file of OFQ's own code, from which `qat.interop` builds a
            model.
        setting: name of the setting for the file, for error messages.

    Raises:
        UsageError: the file cannot be read, is not plain data, has another format, or contains no
            usable weights; or `fmt` is unknown.
    """
    check_choice("ckpt_format", fmt, FORMATS)
    path = Path(path)
    origin = f"{setting}={str(path)!r}"
    content = _read_file(path, origin)
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UsageError(f"{origin}: contains a {kind}; must contain a dictionary of tensors")
    meta = content.get(META_KEY) if fmt in {"auto", "qat"} else None
    if fmt == "qat" and meta is None:
        raise UsageError(
            f"{origin}: must be a checkpoint of qat; for other files, ckpt_format must be one of "
            "auto, timm, ofq"
        )
    tensors = _weights(content, fmt, has_prefix=not meta)
    if not tensors:
        raise UsageError(f"{origin}: must contain weights; has none")
    check_tensors(tensors, origin, path.stat().st_size)
    if meta is not None:
        check_metadata(meta, origin)
        if "pytorch-lightning_version" in content:
            tensors = _strip_prefix(tensors, NET_PREFIX)
    step = content.get("global_step")
    return Checkpoint(
        path,
        tensors,
        meta,
        step if isinstance(step, int) else None,
        _script_args(content.get("args")),
        _training_info(content),
    )


def _read_file(path: Path, origin: str) -> Any:
    if path.is_dir():
        hint = ""
        for name in _FILES_OF_RUNS:
            if (path / name).is_file():
                hint = f"; this one contains {name}"
                break
        raise UsageError(f"{origin}: must be a file, not a folder{hint}")
    if not path.is_file():
        raise UsageError(f"{origin}: no such file")
    if path.suffix.lower() in _EXPORT_SUFFIXES:
        raise UsageError(
            f"{origin}: is an exported file for another runtime; "
            "must be the checkpoint that it was exported from"
        )
    try:
        if path.suffix.lower() == ".safetensors":
            return _read_safetensors(path)
        # timm stores the arguments of its training script in this class.
        with safe_globals([argparse.Namespace]):
            return read_torch(path)
    except UsageError:
        raise
    except Exception as error:
        reason = " ".join(_reason(error, path).split())
        raise UsageError(
            f"{origin}: not a checkpoint that can be read safely ({reason})"
        ) from error


def _reason(error: Exception, path: Path) -> str:
    """Why a file cannot be read; replaces torch's own message, which advises to allow code."""
    if isinstance(error, ValueError | OverflowError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return str(error.strerror)
    if path.suffix.lower() != ".safetensors" and not _looks_like_torch(path):
        return "must be a file of torch.save or safetensors"
    return "damaged, or contains more than tensors and plain data; save only the state_dict()"


def _looks_like_torch(path: Path) -> bool:
    """True if a file begins like an archive or a pickle, or cannot be opened."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(2) in {b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}
    return True


def _read_safetensors(path: Path) -> dict[str, Any]:
    packed = read_packed(path)
    if packed is None:
        return safetensors.torch.load_file(path)
    state, meta = packed
    return {"state_dict": state, META_KEY: meta}


def _weights(content: Mapping[str, Any], fmt: str, *, has_prefix: bool) -> dict[str, Tensor]:
    """Weights in a file, under timm's names.

    Args:
        content: the dictionary in the file.
        fmt: one of `FORMATS`.
        has_prefix: True = remove the prefix that all names have in common, such as `net.` of a
            LightningModule.
    """
    tensors = {}
    for name, value in _state_dict(content, fmt).items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[_WRAPPER_PREFIX.sub("", name)] = value
    prefix = ""
    if has_prefix:
        module, dot, _ = os.path.commonprefix([*tensors]).rpartition(".")
        prefix = module + dot
    return timm_names({name.removeprefix(prefix): value for name, value in tensors.items()})


def _state_dict(content: Mapping[str, Any], fmt: str) -> Mapping[Any, Any]:
    keys = _TRAINED_KEYS if fmt == "ofq" else (*_AVERAGED_KEYS, *_TRAINED_KEYS)
    for key in keys:
        state = content.get(key)
        if isinstance(state, Mapping) and state:
            return state
    return content


def _strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix; the prefix is removed."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _script_args(args: object) -> dict[str, Any] | None:
    if isinstance(args, argparse.Namespace):
        return vars(args)
    if isinstance(args, Mapping):
        return dict(args)
    return None


def _training_info(content: Mapping[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(LookupError, TypeError, ValueError):
        epochs = int(content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
        (optimizer_state,) = content["optimizer_states"]
        groups = []
        for group in optimizer_state["param_groups"]:
            settings = {*map(str, group)} - {"params"}
            groups.append((sorted(settings), len(group["params"])))
        return {"epochs": epochs, "groups": groups}
    return {}
