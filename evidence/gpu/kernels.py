"""How fast the device copies and multiplies, and what of that each Triton kernel and inductor's form of it reach, with their errors.

Bytes are counted as each tensor read once and written once. Tensors are larger than a Hopper's cache of 50 MB, as those of DeiT-B are.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

from evidence.gpu.clock import median_ms
from evidence.gpu.records import Row, commit
from qat import kernels
from qat.kernels import CodeRange, gpu, reference

NAMES = (
    "lsq_forward tokens",
    "lsq_forward tokens bfloat16",
    "lsq_forward channels",
    "lsq_gradients tokens",
    "lsq_gradients channels",
    "statsq_forward",
    "probs_gradients",
)
# Kernels give the bits of the reference but for sums; inductor divides in its own way, so that values halfway between codes may move.
LIMITS = {"kernel": 1e-4, "inductor": 1e-2}
Call = Callable[[], Any]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; NaN where one of them holds NaN, or nothing is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()


def tensors_of(found: Any) -> list[Tensor]:
    """The tensors of a kernel's result."""
    return [found] if isinstance(found, Tensor) else [x for x in found if isinstance(x, Tensor)]


def n_bytes(*tensors: Tensor | None) -> int:
    """Together."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


class Kernels:
    """Measures one kernel at a time.

    Args:
        dry_run: on the CPU, with small tensors and the kernels that there are.
    """

    def __init__(self, *, dry_run: bool) -> None:
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.images, self.heads, self.tokens, self.channels = (2, 2, 5, 8) if dry_run else (256, 12, 197, 768)
        self.weight = (16, 8) if dry_run else (16384, 4096)
        self.product = 16 if dry_run else 8192
        # On a device the kernels themselves: a form that declines is seen, not replaced.
        self.lsq_forward: Any = kernels.lsq_forward if dry_run else gpu.lsq_forward
        self.lsq_gradients: Any = kernels.lsq_backward if dry_run else gpu.lsq_backward
        self.statsq_forward: Any = kernels.statsq_forward if dry_run else gpu.statsq_forward
        self.probs_gradients: Any = kernels.probs_backward if dry_run else gpu.probs_backward

    def machine(self) -> Row:
        """What everything is measured on, and its two ceilings: bytes copied and products in bfloat16, on random data."""
        x, y = (self._random(self.images, 4 * self.tokens, self.channels) for _ in range(2))
        a, b = (self._random(self.product, self.product).bfloat16() for _ in range(2))
        copy, product = median_ms(lambda: y.copy_(x), self.device), median_ms(lambda: a @ b, self.device)
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU, sizes for a try alone",
            "with": f"torch {torch.__version__}, timm {timm.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}",
            "cores": os.cpu_count(),
            "commit": commit(),
            "copy_gb_s": n_bytes(x, y) / copy / 1e6,
            "tflop_s": 2 * self.product**3 / product / 1e9,
        }

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def _case(self, name: str) -> tuple[Call, Call, int]:
        """The kernel, `reference` with the same arguments, and the bytes they must move."""
        kind = name.partition(" ")[0]
        if kind == "statsq_forward":
            w = self._random(*self.weight)
            scale = 2 * w.abs().mean(1, keepdim=True)
            return lambda: self.statsq_forward(w, scale, 2), lambda: reference.statsq_forward(w, scale, 2), 2 * n_bytes(w)
        if kind == "probs_gradients":
            return self._probs()
        return self._lsq(kind, name)

    def _lsq(self, kind: str, name: str) -> tuple[Call, Call, int]:
        by_channel = "channels" in name
        x = self._random(self.images, self.tokens, self.channels)
        x = x.bfloat16() if "bfloat16" in name else x
        grid = CodeRange(-2, 1, -1 if by_channel else -2)
        scale = torch.rand(self.channels if by_channel else self.tokens, device=self.device) + 0.5
        before, after = self._random(self.channels), self._random(self.channels)
        if kind == "lsq_forward":
            given = (x, scale, before, after, grid)
            return lambda: self.lsq_forward(*given), lambda: reference.lsq_forward(*given), n_bytes(x) + 4 * x.numel()
        given, shape = (self._random(*x.shape), x, scale, before, grid), after.shape

        def plain() -> Any:
            found = reference.lsq_backward(*given, after_shape=shape)
            return found._replace(dequantized=reference.lsq_forward(x, scale, before, after, grid))

        return lambda: self.lsq_gradients(*given, after_shape=shape, dequantized=torch.float32, after=after), plain, 4 * n_bytes(x)

    def _probs(self) -> tuple[Call, Call, int]:
        p = self._random(self.images, self.heads, self.tokens, self.tokens).softmax(-1)
        scale, grid = torch.rand(self.tokens, device=self.device) * 0.01 + 0.005, CodeRange(0, 3, -2)
        given = (self._random(*p.shape), p, scale, grid, 0.1)

        def plain() -> Any:
            return *reference.probs_backward(*given), reference.lsq_forward(p, scale, None, None, grid)

        return lambda: self.probs_gradients(*given, out=torch.empty_like(p)), plain, 4 * n_bytes(p)

    def kernel(self, name: str) -> Row:
        """Errors against the reference, and milliseconds and GB/s; both of our kernel and of what inductor makes of the reference."""
        torch.manual_seed(0)
        ours, plain, moved = self._case(name)
        expected = tensors_of(plain())
        row: Row = {"bytes": moved, "plain_ms": median_ms(plain, self.device)}
        made = {"kernel": ours} if self.device.type == "cpu" else {"kernel": ours, "inductor": torch.compile(plain, dynamic=False)}
        for form, run in made.items():
            found = run()
            if found is None:
                return {"failed": "the kernel declines these tensors"}
            errors = [relative_error(a, b) for a, b in zip(tensors_of(found), expected, strict=True)]
            ms = median_ms(run, self.device)
            # A NaN is below no limit.
            row |= {f"{form}_errors": errors, f"{form}_right": all(e < LIMITS[form] for e in errors)}
            row |= {f"{form}_ms": ms, f"{form}_gb_s": moved / ms / 1e6}
        return row
