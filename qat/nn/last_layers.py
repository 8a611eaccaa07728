"""Outputs of models by name, and the last layers of models of Transformers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

# Outputs whose names contain one of these parts are features for other layers, not predictions.
_FEATURES = ("hidden_state", "pooler_output", "feature", "attention", "reference_points")
LOGITS = "logits"
BOXES = "pred_boxes"
_PREDICTIONS = (LOGITS, BOXES, "pred_masks")


def named_outputs(out: object) -> dict[str, Tensor]:
    """Outputs of a model by name.

    Args:
        out: a tensor of logits, an output of a model of Transformers, or a result of this function.

    Returns:
        The predictions if there are logits, else all tensors, such as `last_hidden_state` and
        `pooler_output` of encoders. The result is empty if `out` has another type.
    """
    if isinstance(out, Tensor):
        return {LOGITS: out}
    if not isinstance(out, Mapping):
        return {}
    names = _PREDICTIONS if LOGITS in out else out
    return {name: out[name] for name in names if isinstance(out.get(name), Tensor)}


def last_layers(net: nn.Module, models: list[Any], image: Tensor) -> frozenset[nn.Module]:
    """Linears and `Conv2d`s whose output reaches a prediction without passing through another one.

    These are classifiers, the last layers of box and mask predictors, and projections of
    embeddings. Outputs in `_FEATURES` do not count, so an encoder has no such layers.

    Args:
        net: the model, or a module around it.
        models: the models of Transformers in `net`.
        image: (1, C, H, W).
    """
    layers: dict[Any, nn.Module] = {}
    outputs: list[Any] = []

    def record_layer(layer: nn.Module, _: object, out: Tensor) -> None:
        layers[out.grad_fn] = layer

    def record_outputs(_: nn.Module, __: object, out: object) -> None:
        if not isinstance(out, Mapping):
            return
        for name, value in out.items():
            if not any(part in name for part in _FEATURES):
                outputs.extend(tree_leaves(value))

    hooks = [model.register_forward_hook(record_outputs) for model in models]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                hooks.append(module.register_forward_hook(record_layer))
    try:
        # Inference tensors have no gradient, so the model runs with copies of them.
        with torch.inference_mode(mode=False), torch.enable_grad():
            tensors = itertools.chain(net.named_parameters(), net.named_buffers())
            copies = {name: tensor.clone() for name, tensor in tensors if tensor.is_inference()}
            functional_call(net, copies, (image.clone().requires_grad_(),))
    finally:
        for hook in hooks:
            hook.remove()
    last = set()
    visited = set()
    functions = [out.grad_fn for out in outputs if isinstance(out, Tensor)]
    while functions:
        function = functions.pop()
        if function is None or function in visited:
            continue
        visited.add(function)
        if function in layers:
            last.add(layers[function])
        else:
            functions += [next_function for next_function, _ in function.next_functions]
    return frozenset(last)
