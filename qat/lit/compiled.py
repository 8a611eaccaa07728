"""`torch.compile` of what is called with batches of images: one graph for each way of running it, made for its largest batch."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.cudagraph_utils import cudagraphs_log
from torch._inductor.decomposition import decompositions
from torch.compiler import config as compiler
from torch.utils._pytree import tree_map_only

from qat import functional, kernels
from qat.kernels import operators

log = logging.getLogger(__name__)

# Forward passes are fused with what stands before and after them, at the price of a formula to compile; `ROUNDING` keeps their bits.
decompositions.update(operators.FORMULAS)


def source_hash(*packages: ModuleType) -> str:
    """Of the Python files of packages."""
    found = hashlib.sha256()
    for package in packages:
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


# Torch finds a compiled graph in its caches by the names of its operators: those of other formulas shall not be found.
compiler.cache_key_tag += source_hash(functional, kernels)
# What has compiled code round as eager code does, where a code may depend on it: division to nearest, no product contracted with a sum,
# and values of half precision rounded between two operations that are fused. The last two are one setting. C++ does the first two anyway.
# The second name is that of division in older versions of torch, spelled so.
ROUNDING = {
    "eager_numerics.division_rounding": True,
    "emulate_divison_rounding": True,
    "emulate_precision_casts": True,
}


def compile_options() -> dict[str, bool]:
    """What compiled code is asked for beside `ROUNDING`, as far as this version of torch knows it.

    Rows without padding, as operators would copy others; with `trainer.deterministic` no choice by what was fastest just then.
    """
    known = inductor.get_config_copy()
    wanted = {
        **ROUNDING,
        "comprehensive_padding": False,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return {name: value for name, value in wanted.items() if name in known}


@functools.cache  # once each
def _say(reason: str) -> None:
    log.warning("compile=graphs: part of the training step runs without CUDA graphs: %s", reason)


def _without_graphs(record: logging.LogRecord) -> bool:
    """Whether torch has to say it: what it runs without a CUDA graph is one line here, many of a stack there."""
    skipped = re.match(
        r"\w+ cudagraphs? due to (.+?)\.?(?: Found from.*)?$",
        record.getMessage().partition("\n")[0].rstrip(),
    )
    if skipped:
        _say(skipped[1])
    return not skipped


class CompiledCall:
    """Calls a function of images (B, ...) as one compiled graph; batches smaller than those that it was compiled for run eagerly.

    A graph for any size would be a slower one for every batch, and one for each size takes a minute or more each, for the one short batch
    at the end of a data set. Eager and compiled differ by rounding.

    Args:
        function: calls `net`.
        net: training and evaluation are graphs of their own.
        recompute: let the compiler keep less for backward and make more of it again.
        graphs: replay CUDA graphs. Gradients, and what hooks of modules in the net were given, are then overwritten once the next step
            begins (`torch.compiler.cudagraph_mark_step_begin`); what a call gives is not.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        net: nn.Module,
        *,
        recompute: bool = False,
        graphs: bool = False,
    ) -> None:
        # Not by `inductor.patch` around a call: backward is compiled later, when it first runs.
        options: dict[str, Any] = {**compile_options(), "triton.cudagraphs": graphs}
        self._call = torch.compile(function, fullgraph=True, dynamic=False, options=options)
        self._graphs = graphs
        if graphs:
            cudagraphs_log.addFilter(_without_graphs)
        self._net = net
        self._largest: dict[tuple[object, ...], int] = {}
        self._recompute = recompute

    def __call__(self, images: Tensor) -> Any:
        """What the function gives."""
        way, graphs = (
            (self._net.training, torch.is_grad_enabled(), images.shape[1:]),
            counters["stats"],
        )
        if len(images) < self._largest.get(way, 0):
            with torch.compiler.set_stance("force_eager"):
                return self._call(images)
        before = graphs["unique_graphs"]
        # In force whenever the function is called: what is kept for backward is chosen then, not before.
        with functorch.patch(aggressive_recomputation=self._recompute):
            out = self._call(images)
        if graphs["unique_graphs"] > before:  # else somebody has asked for eager execution
            self._largest[way] = len(images)
        return tree_map_only(Tensor, torch.clone, out) if self._graphs else out


def compile_in_place(net: nn.Module, *, recompute: bool = False, graphs: bool = False) -> None:
    """Compile a net as `CompiledCall` says; its parameters keep their names, and a copy of it is not compiled."""
    net._compiled_call_impl = CompiledCall(net._call_impl, net, recompute=recompute, graphs=graphs)
