"""Where a net's weights come from: scratch, timm's pretrained weights, a local file, a checkpoint of any recipe."""

from __future__ import annotations

import difflib
import http.client
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub
import timm
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.checkpoint import Checkpoint, build_from, grow_biases, grown_biases
from qat.model.frozen import keeps_weights
from qat.model.pretrained import WEIGHTS, find_cached, require_host
from qat.model.scales import check_finite
from qat.model.transfer import timm_state_dict

NEW_HEAD = "; model.reset_head=true gives it a new head"
RANDOM = "random weights"


@dataclass
class Start:
    """Where a net's weights came from.

    Attributes:
        net: the float timm model.
        notes: for a person, a line each.
        source: the net of the checkpoint of ours that it came from, float or quantized: its scales may be copied after conversion.
    """

    net: nn.Module
    notes: list[str] = field(default_factory=list)
    source: nn.Module | None = None

    @property
    def is_random(self) -> bool:
        """True for a model that starts from random weights."""
        return RANDOM in self.notes


def from_scratch(model: str, kwargs: Mapping[str, Any]) -> Start:
    """Random weights.

    Raises:
        UsageError: timm has no such model, or does not take the arguments.
    """
    return Start(_create(model, kwargs), [RANDOM])


def check_model(setting: str, model: object) -> None:
    """Raise `UsageError` unless `model` is a name of timm's."""
    if not isinstance(model, str) or not timm.is_model(model):
        # By their beginnings: names go on with patch and image sizes.
        beginnings = {name[: len(str(model)) + 1]: name for name in reversed(timm.list_models())}
        near = ", ".join(
            beginnings[found]
            for found in difflib.get_close_matches(str(model), beginnings, cutoff=0)
        )
        raise UsageError(f"{setting}={model!r}: timm has no such model; closest: {near}")


def _create(model: str, kwargs: Mapping[str, Any], **loading: Any) -> nn.Module:
    check_model("model.name", model)
    failures: tuple[type[Exception], ...] = (
        TypeError,
        AssertionError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
    )
    if not loading:  # where weights are read as well, a RuntimeError says that they do not fit
        failures += (RuntimeError,)
    try:
        net: nn.Module = timm.create_model(model, **kwargs, **loading)
    except failures as error:
        raise UsageError(
            f"model.name={model!r} with {dict(kwargs)}: {' '.join(str(error).split())}"
        ) from error
    return net


def from_pretrained(model: str, kwargs: Mapping[str, Any], *, keep_head: bool = False) -> Start:
    """Weights that timm keeps for the model, from the local caches or from their host.

    Raises:
        UsageError: the model has none, or they are not cached and their host does not answer within 4 s; under `keep_head` also if timm
            would give the net a new head, which nobody has trained.
    """
    fresh = _create(model, kwargs)  # also says what is wrong with name or arguments
    described = dict(fresh.pretrained_cfg)  # type: ignore[arg-type]
    hub_id, url, instead = (
        described.get("hf_hub_id"),
        described.get("url"),
        "use model.weights=FILE or model.pretrained=false",
    )
    if not hub_id and not url:
        raise UsageError(
            f"model.pretrained=true: timm has no pretrained weights for {model!r}; {instead}"
        )
    had, has = described.get("num_classes"), getattr(fresh, "num_classes", None)
    if keep_head and had != has:
        raise UsageError(
            f"model.pretrained=true: {model} is trained for {had} classes, the data have {has}; use ckpt=FILE"
        )
    cached = find_cached(hub_id, (WEIGHTS, "pytorch_model.bin")) if hub_id else None
    if cached is not None:
        net = _create(model, kwargs, pretrained=True, pretrained_cfg_overlay={"file": cached})
        return Start(net, [f"timm's pretrained weights of {model} (cached)"])
    address = huggingface_hub.constants.ENDPOINT if hub_id else str(url)
    require_host(
        address,
        "model.pretrained=true",
        f"the weights of {model!r} are not in the local cache",
        instead,
    )
    try:
        net = _create(model, kwargs, pretrained=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        why = f"the weights of {model!r} cannot be fetched, or do not fit ({' '.join(str(error).split())[:200]})"
        raise UsageError(f"model.pretrained=true: {why}; {instead}") from error
    return Start(net, [f"timm's pretrained weights of {model}"])


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
    """Weights under timm's names, adapted as timm does: position embedding, patch size, input channels.

    Args:
        model: timm name of the net to build.
        kwargs: arguments of `timm.create_model`.
        state: weights of a net of the same family.
        origin: how to call them in messages, `ckpt='x.pt'`.
        keep_head: another class count is an error (True), or gets a new head (False).
        biases: Linears that have a bias in `state` and none in timm's net; they get one.
        hint: end of the line about another class count.

    Raises:
        UsageError: the class count differs under `keep_head`, or the weights are of another net.
    """
    fresh = _create(model, kwargs)
    own_biases = {f"{name}.bias": state[f"{name}.bias"] for name in biases}
    state = {name: tensor for name, tensor in state.items() if name not in own_biases}
    notes = [f"weights of {origin}"]
    cfg = dict(fresh.pretrained_cfg)  # type: ignore[arg-type]
    own, classifier, wrong = fresh.state_dict(), cfg["classifier"], []
    for name in [classifier] if isinstance(classifier, str) else classifier:
        classes, theirs = own[f"{name}.weight"].shape[0], state.get(f"{name}.weight")
        has = 0 if theirs is None else theirs.shape[0]
        if has != classes:
            wrong.append(f"has {has} classes, the data {classes}")
            notes.append(
                f"new {name} for {classes} classes" + (f" (the file has {has})" if has else "")
            )
            state |= {k: own[k] for k in (f"{name}.weight", f"{name}.bias") if k in own}
    stem = state.get(f"{cfg['first_conv']}.weight")
    chans = cfg["input_size"][0] if stem is None else stem.shape[1]
    overlay = {
        "state_dict": state,
        "num_classes": fresh.num_classes,
        "input_size": (chans, *cfg["input_size"][1:]),
    }
    try:
        net = _create(model, kwargs, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError) as error:
        found, asked = (_size(weights, cfg["first_conv"]) for weights in (state, own))
        why = (
            f"it has {found}; asked for {asked}"
            if found and found != asked
            else " ".join(str(error).split())[:300]
        )
        raise UsageError(f"{origin}: its weights do not fit {model} ({why})") from error
    if keep_head and wrong:
        raise UsageError(f"{origin}: {wrong[0]}{hint}")
    net.pretrained_cfg = net.default_cfg = cfg  # type: ignore[assignment]
    grow_biases(net, biases)
    net.load_state_dict(own_biases, strict=False)
    check_finite(net, origin)
    return Start(net, notes)


def _size(state: Mapping[str, Tensor], stem: str) -> str:
    """Blocks and width of the net that weights are of, or what they are called, for people; nothing where there are no blocks."""
    blocks = {found[0] for name in state if (found := re.match(r".*\bblocks\.\d+", name))}
    first = state.get(f"{stem}.weight")
    return (
        f"weights such as {min(state)}"
        if first is None
        else f"{len(blocks)} blocks, {len(first)} wide"
        if blocks
        else ""
    )


def from_checkpoint(
    model: str,
    kwargs: Mapping[str, Any],
    checkpoint: Checkpoint,
    *,
    reset_head: bool,
    keep_head: bool = False,
) -> Start:
    """Start from a file: one of ours (any recipe), a timm checkpoint or a plain state dict.

    Args:
        model: timm name of the net to build.
        kwargs: its arguments.
        checkpoint: the file.
        reset_head: one of ours gets a new head where the class count differs.
        keep_head: every file must have the class count: for nets that nobody trains before they are looked at.

    Raises:
        UsageError: see `from_state` and `from_net`.
    """
    origin = f"ckpt={str(checkpoint.path)!r}"
    if checkpoint.meta is None:
        return from_state(model, kwargs, checkpoint.state, origin=origin, keep_head=keep_head)
    source, hint = build_from(checkpoint), "" if keep_head else NEW_HEAD
    return from_net(
        model, kwargs, source, origin=origin, reset_head=reset_head and not keep_head, hint=hint
    )


def from_net(
    model: str,
    kwargs: Mapping[str, Any],
    source: nn.Module,
    *,
    origin: str,
    reset_head: bool,
    hint: str = NEW_HEAD,
) -> Start:
    """Start from a net of any recipe; its scales may be copied after conversion.

    Raises:
        UsageError: see `from_state`; another class count needs `reset_head`; the net is frozen and its float weights cannot be recovered.
    """
    if not keeps_weights(source):
        why = "holds only integer codes, with folded weights or offsets"
        raise UsageError(f"{origin}: {why}; must be the checkpoint that it was exported from")
    state, biases = timm_state_dict(source), grown_biases(source)
    start = from_state(
        model, kwargs, state, origin=origin, keep_head=not reset_head, biases=biases, hint=hint
    )
    start.source = source
    return start
