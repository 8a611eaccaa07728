"""The optimizer state of another run's checkpoint, carried over by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qat.errors import UsageError
from qat.lit.optim import parameter_groups
from qat.model.checkpoint import build_from, read_checkpoint
from qat.utils.files import read_torch

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
State = dict[str, dict[str, Any]]


def read_optimizer_state(path: str) -> State:
    """What a training checkpoint of ours says of every parameter: moments and step counts, by parameter name.

    The file numbers parameters in the order of the optimizer's groups. The net in it, built again, has the same groups, so names follow.

    Raises:
        UsageError: the file is not a training checkpoint of ours, or its groups are not those of its net.
    """
    setting = f"ckpt_optimizer=true: ckpt={str(path)!r}"
    checkpoint = read_checkpoint(path)
    content = read_torch(path) if checkpoint.meta is not None else {}
    stored = content.get("optimizer_states") or []
    if len(stored) != 1 or not stored[0].get("state"):
        raise UsageError(f"{setting} holds no optimizer state; last.ckpt and best.ckpt of a training run do")
    groups = stored[0]["param_groups"]
    by_layer = any(str(group.get("name", "")).startswith("layer") for group in groups)
    names = parameter_names(build_from(checkpoint), by_layer=by_layer)
    if [len(group["params"]) for group in groups] != [len(members) for members in names]:
        raise UsageError(f"{setting} holds the state of other parameters than those of its net; must be false")
    indices = [index for group in groups for index in group["params"]]
    entries = stored[0]["state"]
    return {name: entries[index] for index, name in zip(indices, sum(names, []), strict=True) if index in entries}


def parameter_names(net: nn.Module, *, by_layer: bool = False) -> list[list[str]]:
    """Names of the parameters of every optimizer group, in the optimizer's order.

    Args:
        net: the net that is trained.
        by_layer: whether the groups are also by layer, as they are under `optimizer.layer_decay`.
    """
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = parameter_groups(net, weight_decay=0.0, layer_decay=1.0 if by_layer else None)
    return [[names[parameter] for parameter in group["params"]] for group in groups]


def with_optimizer_state(make: OptimizerFactory, path: str, net: nn.Module) -> tuple[OptimizerFactory, str]:
    """An optimizer factory whose optimizers go on where those of a checkpoint were: moments and steps, not rates or decay.

    Args:
        make: makes an optimizer from a net.
        path: the checkpoint.
        net: the net to train. A parameter whose name or shape the checkpoint does not have begins with nothing.

    Returns:
        The factory, and what a person should be told.

    Raises:
        UsageError: see `read_optimizer_state`; or the checkpoint is from another kind of optimizer, or has none of the parameters.
    """
    state = read_optimizer_state(path)
    setting = f"ckpt_optimizer=true: ckpt={str(path)!r}"
    parameters = dict(net.named_parameters())
    fitting = {name: entry for name, entry in state.items() if name in parameters and _fits(entry, parameters[name].shape)}
    if not fitting:
        raise UsageError(f"{setting} holds the state of none of this net's parameters; must be false")
    smallest = min(fitting, key=lambda name: parameters[name].numel())
    stored, kept = set(fitting[smallest]), _kept_by(make, net, parameters[smallest])
    if stored != kept:
        raise UsageError(f"{setting} is of an optimizer that keeps {_list(stored)}; optimizer.opt is one that keeps {_list(kept)}")

    def make_and_fill(net: nn.Module) -> torch.optim.Optimizer:
        optimizer = make(net)
        fill(optimizer, net, fitting)
        return optimizer

    return make_and_fill, f"optimizer state of {len(fitting)} of {len(parameters)} parameters taken"


def fill(optimizer: torch.optim.Optimizer, net: nn.Module, state: State) -> None:
    """Give an optimizer a state by parameter name; its own rates and decay stay. torch moves it to the parameters' device."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    content = optimizer.state_dict()
    content["state"] = {index: dict(state[name]) for index, name in enumerate(order) if name in state}
    optimizer.load_state_dict(content)


def _fits(entry: Mapping[str, Any], shape: torch.Size) -> bool:
    """True if every tensor of an entry is a scalar or of the parameter's shape."""
    return all(value.shape in {torch.Size(()), shape} for value in entry.values() if isinstance(value, torch.Tensor))


def _kept_by(make: OptimizerFactory, net: nn.Module, parameter: nn.Parameter) -> set[str]:
    """What an optimizer keeps of a parameter, found by a step without gradient; the parameter is afterwards what it was."""
    optimizer, before = make(net), parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parameter.grad = None
    with torch.no_grad():
        parameter.copy_(before)
    return set(optimizer.state[parameter])


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
