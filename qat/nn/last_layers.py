"""The layers that compute the outputs of a model of Transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


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
