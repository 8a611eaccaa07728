"""Outputs of models by name, and the layers that compute those of models of Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

LOGITS = "logits"
BOXES = "pred_boxes"
_PREDICTIONS = (LOGITS, BOXES, "pred_masks")


def named_outputs(out: object) -> dict[str, Tensor]:
    """Outputs of a model by name.

    Args:
        out: a tensor of logits, an output of a model of Transformers, or a result of this function.

    Returns:
        The predictions if there are logits, else all tensors, such as `last_hidden_state` and
        `pooler_output` of encoders; empty for other types.
    """
    if isinstance(out, Tensor):
        return {LOGITS: out}
    if not isinstance(out, Mapping):
        return {}
    names = _PREDICTIONS if LOGITS in out else out
    return {name: out[name] for name in names if isinstance(out.get(name), Tensor)}


def last_layers(model: Any, image: Tensor) -> frozenset[nn.Module]:
    """Layers outside of the base model from which an output is computed without another layer.

    These are classifiers, the last layers of box predictors, and projections of embeddings; an
    encoder has none.

    Args:
        model: a model of Transformers.
        image: (1, C, H, W).
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    layers: dict[Any, nn.Module] = {}
    outside = set()

    def remember(layer: nn.Module, _: object, out: Tensor) -> None:
        layers[out.grad_fn] = layer

    hooks = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        hooks.append(module.register_forward_hook(remember))
        if not name.startswith(prefix):
            outside.add(module)
    try:
        with torch.enable_grad():
            outputs = tree_leaves(dict(model(image.requires_grad_())))
    finally:
        for hook in hooks:
            hook.remove()
    found = set()
    seen = set()
    functions = [out.grad_fn for out in outputs if isinstance(out, Tensor)]
    while functions:
        function = functions.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if function in layers:
            found.add(layers[function])
        else:
            functions += [following for following, _ in function.next_functions]
    return frozenset(found & outside)
