"""Layers whose inputs come from an activation function, found while a float model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import timm.layers as timm_layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

# Activations whose negative tail is small enough for an unsigned grid with a learned offset.
NEARLY_POSITIVE = (
    nn.GELU,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    timm_layers.GELU,
    timm_layers.GELUTanh,
    timm_layers.QuickGELU,
)
_FUNCTIONS = {F.gelu, F.relu, F.relu6, F.silu, F.hardswish, torch.relu, Tensor.relu, torch.relu_}
# Functions that may copy a tensor, but keep its values.
_COPIES = {
    F.dropout,
    F.max_pool2d,
    F.pad,
    torch.flatten,
    torch.reshape,
    Tensor.clone,
    Tensor.contiguous,
    Tensor.flatten,
    Tensor.reshape,
}


class ActivationTracer(TorchFunctionMode):
    """Follows the outputs of activation functions through views and copies, while a model runs.

    A tensor that is changed in place is no longer followed.

    Args:
        classes: further classes of activations with a small negative tail.
    """

    def __init__(self, classes: Sequence[type[nn.Module]] = ()) -> None:
        super().__init__()
        self.classes = (*NEARLY_POSITIVE, *classes)
        self.layers: dict[nn.Module, bool] = {}
        # For each storage, a tensor that keeps the storage alive, and the version of its values.
        self.outputs: dict[int, tuple[Tensor, int]] = {}

    def hooks(self, net: nn.Module) -> Iterator[RemovableHandle]:
        """Register hooks on the activations and layers of a model; the caller removes them."""
        for module in net.modules():
            if isinstance(module, self.classes):
                yield module.register_forward_hook(self._after_activation)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                yield module.register_forward_pre_hook(self._before_layer)

    def unsigned_inputs(self) -> frozenset[nn.Module]:
        """Layers that received only outputs of activation functions."""
        return frozenset(layer for layer, is_output in self.layers.items() if is_output)

    def _after_activation(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> None:
        self.outputs[out.untyped_storage()._cdata] = (out, out._version)

    def _before_layer(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        is_output = bool(args) and self._is_output(args[0])
        self.layers[layer] = is_output and self.layers.get(layer, True)

    def _is_output(self, x: Tensor) -> bool:
        output = self.outputs.get(x.untyped_storage()._cdata)
        return output is not None and x._version == output[1]

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        is_copy = func in _COPIES and bool(args) and self._is_output(args[0])
        if is_copy or func in _FUNCTIONS:
            self.outputs[out.untyped_storage()._cdata] = (out, out._version)
        return out
