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
_ACTIVATIONS = {F.gelu, F.relu, F.relu6, F.silu, F.hardswish, torch.relu, Tensor.relu, torch.relu_}
# Activations with a longer negative tail, which an unsigned grid from zero cuts off. Inputs of
# convolutions have no offsets.
_LONG_TAILS = (nn.SiLU, nn.Hardswish)
# Functions that may copy, drop or pad values, but keep their signs.
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
        classes: additional classes of activations with a small negative tail.
        signed_tails: True = inputs of convolutions after SiLU or Hardswish are signed.
    """

    def __init__(
        self, classes: Sequence[type[nn.Module]] = (), *, signed_tails: bool = True
    ) -> None:
        super().__init__()
        self.classes = (*NEARLY_POSITIVE, *classes)
        self.signed_tails = signed_tails
        # For each layer, whether all of its inputs so far are unsigned.
        self.layers: dict[nn.Module, bool] = {}
        # For each storage, a tensor that keeps the storage alive, the version of its values, and
        # whether the activation has a long tail.
        self.outputs: dict[int, tuple[Tensor, int, bool]] = {}

    def register_hooks(self, net: nn.Module) -> Iterator[RemovableHandle]:
        """Yield handles of hooks on the activations and layers of a model.

        A hook is registered when its handle is requested. The caller removes it.
        """
        for module in net.modules():
            if isinstance(module, self.classes):
                yield module.register_forward_hook(self._after_activation)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                yield module.register_forward_pre_hook(self._before_layer)

    def unsigned_inputs(self) -> frozenset[nn.Module]:
        """Layers that received only outputs of activation functions.

        With `signed_tails`, convolutions that received an output of SiLU or Hardswish are left out.
        """
        return frozenset(layer for layer, is_unsigned in self.layers.items() if is_unsigned)

    def _after_activation(self, module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> None:
        self._record(out, has_tail=isinstance(module, _LONG_TAILS))

    def _record(self, out: Tensor, *, has_tail: bool) -> None:
        self.outputs[out.untyped_storage()._cdata] = (out, out._version, has_tail)

    def _before_layer(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        output = self._find_output(args)
        is_unsigned = output is not None
        if output is not None and self.signed_tails and isinstance(layer, nn.Conv2d):
            _, _, has_tail = output
            is_unsigned = not has_tail
        self.layers[layer] = is_unsigned and self.layers.get(layer, True)

    def _find_output(self, args: tuple[Any, ...]) -> tuple[Tensor, int, bool] | None:
        """The entry of `outputs` for the first argument; None without a current entry."""
        output = self.outputs.get(args[0].untyped_storage()._cdata) if args else None
        if output is None or args[0]._version != output[1]:
            return None
        return output

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        source_output = self._find_output(args) if func in _COPIES else None
        if func in _ACTIVATIONS:
            self._record(out, has_tail=func in {F.silu, F.hardswish})
        elif source_output is not None:
            self._record(out, has_tail=source_output[2])
        return out
