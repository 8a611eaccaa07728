"""Build the initial model of a run: with random weights, timm's weights, or those of a file.

The file may be a checkpoint of qat with any recipe, a timm checkpoint, or a plain state dict.
Weights may also come from a folder that Transformers' `save_pretrained` wrote.
"""

from __future__ import annotations

import difflib
import http.client
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub
import safetensors
import timm
from timm.models import get_model_args
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.checkpoint import Checkpoint, read_checkpoint
from qat.model.foreign_weights import add_biases, added_biases
from qat.model.freeze import can_recover_weights
from qat.model.metadata import classes_of, data_of, describe
from qat.model.pretrained import WEIGHTS, find_cached, require_host
from qat.model.scales import check_finite
from qat.model.storage import build_from, float_twin
from qat.model.transfer import timm_state_dict
from qat.nn.hf_constructor import CLASSIFIER, model_class, model_config, package

NEW_HEAD = "; model.reset_head=true gives the model a new head"
RANDOM = "random weights"


@dataclass
class Start:
    """The initial model of a run.

    Attributes:
        net: a float model.
        notes: lines for the user that tell where the weights come from.
        source: the model that `from_net` copied the weights from, or None. The scales of this model
            may be copied after the conversion.
    """

    net: nn.Module
    notes: list[str] = field(default_factory=list)
    source: nn.Module | None = None

    @property
    def is_random(self) -> bool:
        """True if the weights are random."""
        return RANDOM in self.notes


def from_scratch(model: str, kwargs: Mapping[str, Any]) -> Start:
    """Build a model with random weights.

    Raises:
        UsageError: timm has no such model, or the model does not accept the arguments.
    """
    return Start(_create(model, kwargs), [RANDOM])


def check_model(setting: str, model: object) -> None:
    """Raise `UsageError` unless timm has a model of this name."""
    if isinstance(model, str) and timm.is_model(model):
        return
    # Compare only prefixes, because names end with patch and image sizes. Of names with
    # the same prefix, `reversed` keeps the first.
    length = len(str(model)) + 1
    prefixes = {name[:length]: name for name in reversed(timm.list_models())}
    closest = difflib.get_close_matches(str(model), prefixes, cutoff=0)
    names = ", ".join(prefixes[prefix] for prefix in closest)
    raise UsageError(f"{setting}={model!r}: timm has no such model; closest: {names}")


def _create(model: str, kwargs: Mapping[str, Any], **loading: Any) -> nn.Module:
    check_model("model.name", model)
    expected_errors: tuple[type[Exception], ...] = (
        TypeError,
        AssertionError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
    )
    if not loading:  # with weights, a RuntimeError means that they do not fit
        expected_errors += (RuntimeError,)
    try:
        net: nn.Module = timm.create_model(model, **kwargs, **loading)
    except expected_errors as error:
        arguments = {key: value for key, value in kwargs.items() if not isinstance(value, dict)}
        raise UsageError(f"model.name={model!r} with {arguments}: {error}") from error
    return net


def from_timm(model: str, kwargs: Mapping[str, Any], *, keep_head: bool = False) -> Start:
    """Build a model with timm's pretrained weights, from a local cache or the network.

    Args:
        model: timm name.
        kwargs: arguments of `timm.create_model`.
        keep_head: what to do if the class count differs: True = raise an error; False = give the
            model a new head.

    Raises:
        UsageError: see `from_scratch`; timm has no pretrained weights for the model; the weights
            cannot be downloaded (the host must respond within 4 s) or read, or do not fit; or
            `keep_head` is True, and timm would give the model a new, untrained head.
    """
    advice = "use model.weights=FILE or model.pretrained=false"
    untrained = _create(model, kwargs)  # raises an error if the name or an argument is wrong
    pretrained_cfg = dict(untrained.pretrained_cfg)  # type: ignore[arg-type]
    hub_id = pretrained_cfg.get("hf_hub_id")
    url = pretrained_cfg.get("url")
    if not hub_id and not url:
        raise UsageError(
            f"model.pretrained=true: timm has no pretrained weights for {model!r}; {advice}"
        )
    trained_classes = pretrained_cfg.get("num_classes")
    num_classes = getattr(untrained, "num_classes", None)
    if keep_head and trained_classes != num_classes:
        raise UsageError(
            f"model.pretrained=true: {model} is trained for {trained_classes} classes, "
            f"the data have {num_classes}; use ckpt=FILE"
        )
    cached = find_cached(hub_id, (WEIGHTS, "pytorch_model.bin")) if hub_id else None
    source: dict[str, Any] = {}
    if cached is not None:
        source["pretrained_cfg_overlay"] = {"file": cached}
    else:
        require_host(
            huggingface_hub.constants.ENDPOINT if hub_id else str(url),
            "model.pretrained=true",
            f"the weights of {model!r} are not in the local cache",
            advice,
        )
    try:
        net = _create(model, kwargs, pretrained=True, **source)
    except (
        OSError,
        RuntimeError,
        http.client.HTTPException,
        safetensors.SafetensorError,
    ) as error:
        reason = str(error)[:200]
        raise UsageError(
            f"model.pretrained=true: the weights of {model!r} cannot be fetched "
            f"or read, or do not fit ({reason}); {advice}"
        ) from error
    suffix = " (cached)" if cached is not None else ""
    return Start(net, [f"timm's pretrained weights of {model}{suffix}"])


def from_transformers(
    kwargs: Mapping[str, Any], folder: str | os.PathLike[str], *, keep_head: bool
) -> Start:
    """Build an image classifier of Transformers with the weights of a folder.

    Args:
        kwargs: arguments of `TransformersClassifier`.
        folder: a folder that Transformers' `save_pretrained` wrote.
        keep_head: what to do if the class count differs: True = raise an error; False = give the
            model a new head.

    Raises:
        UsageError: the weights cannot be read, or do not fit the config; see `from_state`.
    """
    origin = f"model.name={str(folder)!r}"
    package().logging.set_verbosity_error()
    package().logging.disable_progress_bar()
    cls = model_class(kwargs["architecture"])
    try:
        net, loading = cls.from_pretrained(
            folder,
            config=model_config(kwargs["architecture"], kwargs["config"]),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        reason = str(error)[:300]
        raise UsageError(f"{origin}: the weights cannot be read ({reason})") from error
    misfit = f"{origin}: the weights do not fit the config"
    if loading["mismatched_keys"]:
        name, file_shape, shape = min(loading["mismatched_keys"])
        shapes = f"{list(file_shape)}; the model has {list(shape)}"
        raise UsageError(f"{misfit} ({name} has the shape {shapes})")
    patterns = {re.sub(r"\d+", "#", name) for name in net.state_dict()}
    for name in sorted(loading["unexpected_keys"]):
        # A name that differs from the model's names only in numbers belongs to a block that the
        # config lacks. Ignore other names; they belong to other parts, such as a text encoder.
        if re.sub(r"\d+", "#", name) in patterns:
            raise UsageError(f"{misfit} (the model has no {name})")
    state = {}
    for name, tensor in net.float().state_dict().items():
        if name not in loading["missing_keys"]:  # an encoder's file has no head
            state[f"model.{name}"] = tensor
    return from_state(CLASSIFIER, kwargs, state, origin=origin, keep_head=keep_head)


def from_state(
    model: str,
    kwargs: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    origin: str,
    keep_head: bool,
    biases: Sequence[str] = (),
    hint: str = "",
) -> Start:
    """Build a model with weights under timm's names.

    Position embedding, patch size and input channels are adapted as in timm.

    Args:
        model: timm name of the model to build.
        kwargs: arguments of `timm.create_model`.
        state: weights of a model of the same family.
        origin: name of the weights in messages, such as `ckpt='x.pt'`.
        keep_head: True = a different class count is an error; False = the model then gets a new
            head.
        biases: names of linear layers that have a bias in `state` but not in timm's model; they get
            a bias.
        hint: text that ends the error message about a different class count.

    Raises:
        UsageError: see `from_scratch`; the class count differs and `keep_head` is True; or the
            weights belong to another model or are not finite.
    """
    untrained = _create(model, kwargs)
    bias_tensors = {f"{name}.bias": state[f"{name}.bias"] for name in biases}
    state = {name: tensor for name, tensor in state.items() if name not in bias_tensors}
    if model == CLASSIFIER and not all(name.startswith("model.") for name in state):
        # `read_checkpoint` removes a prefix that all names have.
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    cfg = dict(untrained.pretrained_cfg)  # type: ignore[arg-type]
    own_state = untrained.state_dict()
    state, head_notes, difference = _replace_heads(state, own_state, cfg.get("classifier") or ())
    stem = state.get(f"{cfg.get('first_conv')}.weight")
    channels = cfg["input_size"][0] if stem is None else stem.shape[1]
    overlay = {
        "state_dict": state,
        "num_classes": untrained.num_classes,
        "input_size": (channels, *cfg["input_size"][1:]),
    }
    try:
        net = _create(model, kwargs, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError) as error:
        reason = str(error)[:300]
        file_size = _describe_size(state, cfg.get("first_conv"))
        model_size = _describe_size(own_state, cfg.get("first_conv"))
        if file_size and model_size and file_size != model_size:
            reason = f"the file has {file_size}; the model has {model_size}"
        raise UsageError(f"{origin}: the weights do not fit {model} ({reason})") from error
    # Check this only now: if the weights belong to another model, the error above is more useful.
    if keep_head and difference:
        raise UsageError(f"{origin}: {difference}{hint}")
    net.pretrained_cfg = cfg  # type: ignore[assignment]
    net.default_cfg = cfg  # type: ignore[assignment]
    add_biases(net, biases)
    net.load_state_dict(bias_tensors, strict=False)
    check_finite(net, origin)
    return Start(net, [f"weights of {origin}", *head_notes])


def _replace_heads(
    state: dict[str, Tensor], own_state: Mapping[str, Tensor], classifier: str | Sequence[str]
) -> tuple[dict[str, Tensor], list[str], str]:
    """Replace each head that is missing or has another class count; with num_classes=0, remove it.

    Returns:
        The new state; a note for each new head; and a description of the first difference, or "".
    """
    notes = []
    difference = ""
    names = [classifier] if isinstance(classifier, str) else classifier
    for name in names:
        if f"{name}.weight" not in own_state:  # num_classes=0
            # Remove the module around the classifier as well: LeViT's also has a norm.
            parent = name.rpartition(".")[0] or name
            state = {
                key: tensor
                for key, tensor in state.items()
                if key in own_state or not key.startswith(f"{parent}.")
            }
            continue
        num_classes = own_state[f"{name}.weight"].shape[0]
        weight = state.get(f"{name}.weight")
        num_stored = 0 if weight is None else weight.shape[0]
        if num_stored == num_classes:
            continue
        difference = difference or f"has {num_stored or 'no'} classes, the data {num_classes}"
        suffix = f" (the file has {num_stored})" if num_stored else ""
        notes.append(f"new {name} for {num_classes} classes{suffix}")
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in own_state:
                state = {**state, key: own_state[key]}
    return state, notes, difference


def _describe_size(state: Mapping[str, Tensor], stem: str | None) -> str:
    """Describe the size of the model that the weights belong to; "" if it has no blocks.

    If the weights do not include the first convolution `stem`, the result names one of the weights.
    """
    first = state.get(f"{stem}.weight")
    if first is None:
        return f"weights such as {min(state)}"
    blocks = set()
    for name in state:
        if match := re.match(r".*\bblocks\.\d+", name):
            blocks.add(match[0])
    return f"{len(blocks)} blocks of width {len(first)}" if blocks else ""


def from_checkpoint(
    model: str,
    kwargs: Mapping[str, Any],
    checkpoint: Checkpoint,
    *,
    reset_head: bool,
    keep_head: bool = False,
) -> Start:
    """Start from a file: a checkpoint of qat or timm, or a plain state dict.

    Args:
        model: timm name of the model to build.
        kwargs: arguments of `timm.create_model`.
        checkpoint: the file.
        reset_head: for a checkpoint of qat with another class count: True = give the model a new
            head; False = raise an error.
        keep_head: True = raise an error if the class count differs, whatever the kind of file,
            because the model will be used without training.

    Raises:
        UsageError: see `build_from`, `from_state` and `from_net`.
    """
    origin = f"ckpt={str(checkpoint.path)!r}"
    if checkpoint.meta is None:
        return from_state(model, kwargs, checkpoint.state, origin=origin, keep_head=keep_head)
    source = build_from(checkpoint)
    start = from_net(
        model,
        kwargs,
        source,
        origin=origin,
        reset_head=reset_head and not keep_head,
        hint="" if keep_head else NEW_HEAD,
    )
    if "global_pool" not in kwargs:
        _copy_pooling(source, start.net)
    return start


def load_float(path: str | os.PathLike[str], *, num_classes: int | None = None) -> nn.Module:
    """Build the float version of the model in a checkpoint of qat, to train or convert it.

    Args:
        path: a file of `qat.save` or of a run; the model may have any recipe.
        num_classes: number of classes; the model gets a new head if its own number differs. None =
            keep the head.

    Raises:
        UsageError: see `read_checkpoint` and `build_from`; the float weights cannot be recovered;
            or `num_classes` is set for a model without this attribute.
    """
    checkpoint = read_checkpoint(path)
    origin = f"ckpt={str(path)!r}"
    source = build_from(checkpoint)
    if getattr(source, "num_classes", None) is None:  # a backbone or a model of Transformers
        return _float_version(source, num_classes, origin)
    model = describe(source)["model"]
    kwargs = dict(model["kwargs"])
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    net = from_net(model["name"], kwargs, source, origin=origin, reset_head=True).net
    _copy_pooling(source, net)
    for attribute in ("pretrained_cfg", "default_cfg"):
        setattr(net, attribute, source.pretrained_cfg)
    _copy_data(source, net)
    return net


def _copy_data(source: nn.Module, net: nn.Module) -> None:
    """Copy the data config, and the class names if their number fits, from `source` to `net`."""
    net.qat_data = data_of(source)  # type: ignore[assignment]
    classes = classes_of(source)
    if classes is not None and len(classes) == getattr(net, "num_classes", len(classes)):
        net.qat_classes = classes  # type: ignore[assignment]


def _float_version(source: nn.Module, num_classes: int | None, origin: str) -> nn.Module:
    """A float model with the weights of a model whose class count cannot be changed."""
    if num_classes is not None:
        raise UsageError(f"{origin}: num_classes={num_classes}: must be None for this model")
    if not can_recover_weights(source):
        raise UsageError(f"{origin}: contains only integer codes")
    net = float_twin(source)
    net.load_state_dict(timm_state_dict(source))
    _copy_data(source, net)
    return net.train()


def from_net(
    model: str,
    kwargs: Mapping[str, Any],
    source: nn.Module,
    *,
    origin: str,
    reset_head: bool,
    hint: str = NEW_HEAD,
) -> Start:
    """Start from the weights of a model with any recipe.

    The result also contains `source`, so that its scales can be copied after the conversion.

    Raises:
        UsageError: see `from_state`; the class count differs and `reset_head` is False; or the
            model is frozen and its float weights cannot be recovered.
    """
    if not can_recover_weights(source):
        raise UsageError(
            f"{origin}: contains only integer codes, with folded weights or offsets; "
            "must be the checkpoint that it was exported from"
        )
    start = from_state(
        model,
        kwargs,
        timm_state_dict(source),
        origin=origin,
        keep_head=not reset_head,
        biases=added_biases(source),
        hint=hint,
    )
    start.source = source
    return start


def _copy_pooling(source: nn.Module, net: Any) -> None:
    """Copy the pooling of `source`, which `reset_classifier` may have changed, to `net`."""
    pool = get_model_args(source).get("global_pool")
    if pool is not None and pool != get_model_args(net).get("global_pool"):
        weights = net.state_dict()
        net.reset_classifier(net.num_classes, pool)
        net.load_state_dict(weights)
