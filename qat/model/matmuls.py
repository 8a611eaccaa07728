"""Watch which matrix products a forward pass makes, whatever module makes them and by whatever function."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qat.utils.validate import FLOAT_BITS


@dataclass(frozen=True)
class MatrixProduct:
    """One matrix product.

    Attributes:
        module: name of the innermost module that was running.
        macs: multiply-accumulates.
        of_activations: no operand is a parameter; False for a layer's weight times its input.
        bits: widths of the two operands.
    """

    module: str
    macs: int
    of_activations: bool
    bits: tuple[int, int] = (FLOAT_BITS, FLOAT_BITS)

    @property
    def bitops(self) -> int:
        """Multiply-accumulates times the widths of both operands."""
        return self.macs * self.bits[0] * self.bits[1]


def _attention_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    query, key, *_ = operands
    scores = query[..., 0].numel() * key.shape[-2]
    return [scores * query.shape[-1], scores * out.shape[-1]]


def _einsum_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    """The product of all dimensions that occur, for an equation of two operands without ellipsis."""
    equation, *factors = operands
    if not isinstance(equation, str) or len(factors) != 2:
        return []
    sizes: dict[str, int] = {}
    for letters, factor in zip(equation.split("->")[0].replace(" ", "").split(","), factors, strict=True):
        sizes |= dict(zip(letters, factor.shape, strict=False))
    return [math.prod(sizes.values())]


# Of operands in their order, by place or by name, and the result: multiply-accumulates of the products.
_Count = Callable[[tuple[Any, ...], Tensor], list[int]]
_OF_ACTIVATIONS: dict[Any, _Count] = {
    **dict.fromkeys(
        [torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__],
        lambda operands, out: [out.numel() * operands[0].shape[-1]],
    ),
    **dict.fromkeys(
        [torch.baddbmm, torch.addmm, Tensor.baddbmm, Tensor.addmm], lambda operands, out: [out.numel() * operands[1].shape[-1]]
    ),
    F.scaled_dot_product_attention: _attention_macs,
    torch.einsum: _einsum_macs,
}
_OF_WEIGHTS: dict[Any, _Count] = dict.fromkeys(
    [F.linear, F.conv1d, F.conv2d, F.conv3d], lambda operands, out: [out.numel() * operands[1][0].numel()]
)


class _Watch(TorchFunctionMode):
    """Notes products while it is on; `running` is the stack of names of modules."""

    def __init__(self, running: list[str], found: list[MatrixProduct]) -> None:
        super().__init__()
        self.running, self.found = running, found

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = _OF_ACTIVATIONS.get(func) or _OF_WEIGHTS.get(func)
        if count is not None:
            where, operands = self.running[-1] if self.running else "", (*args, *kwargs.values())
            by_weight = func in _OF_WEIGHTS or any(isinstance(a, nn.Parameter) for a in operands)
            self.found.extend(MatrixProduct(where, macs, not by_weight) for macs in count(operands, out))
        return out


@contextlib.contextmanager
def watching(net: nn.Module) -> Generator[list[MatrixProduct]]:
    """Collect the matrix products of what runs inside the block; the list fills as the net runs."""
    running: list[str] = []
    found: list[MatrixProduct] = []
    names = {id(module): name for name, module in net.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        running.append(names[id(module)])

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        running.pop()

    handles = [m.register_forward_pre_hook(enter) for m in net.modules()]
    handles += [m.register_forward_hook(leave, always_call=True) for m in net.modules()]
    try:
        with _Watch(running, found):
            yield found
    finally:
        for handle in handles:
            handle.remove()
