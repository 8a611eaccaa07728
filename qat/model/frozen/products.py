"""Products of whole numbers, and a list of those that were made."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import UsageError

LARGEST = 2**31 - 1


class UnsupportedIntegerOp(UsageError, TypeError):
    """What a net does between two quantizers has no form on integer codes."""


@dataclass(frozen=True)
class Product:
    """One product of codes.

    Attributes:
        left, right: names of the quantizers whose codes are the factors.
        terms: products that a sum has.
        left_bound, right_bound: largest magnitudes of the codes.
    """

    left: str
    right: str
    terms: int
    left_bound: int
    right_bound: int

    @property
    def largest(self) -> int:
        """Largest magnitude that a sum can have."""
        return self.terms * self.left_bound * self.right_bound

    @property
    def bits(self) -> int:
        """Width of a signed accumulator that no codes can overflow."""
        return self.largest.bit_length() + 1


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of int32 matrices, exact, int32.

    CUDA has no product of int32: float64, whose whole numbers are exact to 2^53, gives the same ones there.
    """
    if a.device.type == "cuda":
        return torch.matmul(a.double(), b.double()).to(torch.int32)
    return torch.matmul(a, b)


@dataclass
class Noted:
    """A product that was made.

    Attributes:
        product: which.
        seen: largest magnitude of its sums.
    """

    product: Product
    seen: int


_ledger: ContextVar[list[Noted] | None] = ContextVar("ledger", default=None)


def note(product: Product, sums: Tensor) -> None:
    """Write a product into the list of `noting`, if there is one.

    Raises:
        UnsupportedIntegerOp: its sums might not fit int32.
    """
    if product.largest > LARGEST:
        raise UnsupportedIntegerOp(f"{product.left} x {product.right}: {product.bits} bits, an accumulator of int32 might overflow")
    if (ledger := _ledger.get()) is not None:
        ledger.append(Noted(product, int(sums.abs().amax()) if sums.numel() else 0))


@contextlib.contextmanager
def noting() -> Generator[list[Noted]]:
    """Collect the products of codes that are made inside the block, in their order."""
    found: list[Noted] = []
    token = _ledger.set(found)
    try:
        yield found
    finally:
        _ledger.reset(token)
