"""Compile functions of image batches for the largest batch; smaller batches run eagerly."""

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
from torch._inductor.decomposition import decompositions, fast_random_decomps
from torch.compiler import config as compiler
from torch.utils._pytree import tree_map_only

from qat import functional, kernels
from qat.kernels import operators

log = logging.getLogger(__name__)

# Make compiled code round like eager code, because integer codes may depend on it: division rounds
# to nearest, no product is contracted with a sum, and half-precision values are rounded between
# fused operations. The option for division has one name in newer versions of torch and another in
# older ones; `emulate_precision_casts` controls products and half-precision values. In C++ code,
# division and products need no option.
ROUNDING = {
    "eager_numerics.division_rounding": True,
    "emulate_divison_rounding": True,
    "emulate_precision_casts": True,
}


def source_hash(*packages: ModuleType) -> str:
    """Hash of the Python files of packages, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _kernel_source_hash() -> str:
    return source_hash(functional, kernels)


def register_decompositions() -> None:
    """Register decompositions of our operators, so that inductor fuses them with other operations.

    Compilation takes longer; with `ROUNDING`, a decomposition returns the same bits as the
    operator.
    """
    decompositions.update(operators.DECOMPOSITIONS)
    # Torch may already have copied the table of decompositions.
    fast_random_decomps().update(operators.DECOMPOSITIONS)
    # Torch finds compiled graphs in its caches by the names of operators, so different
    # decompositions need a different key.
    if not compiler.cache_key_tag.endswith(_kernel_source_hash()):
        compiler.cache_key_tag += _kernel_source_hash()


def compile_options() -> dict[str, bool]:
    """`ROUNDING` and other options of the compiler, as far as this version of torch knows them.

    Rows are not padded, because operators would copy padded rows. With `trainer.deterministic`, the
    compiler does not choose kernels by measured speed. Before torch 2.15, reductions of different
    orders are not fused, because this may leave a gradient unwritten (pytorch #193061).
    """
    options = {
        **ROUNDING,
        "comprehensive_padding": False,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if torch.__version__ < "2.15":
        options["triton.mix_order_reduction"] = False
    supported = inductor.get_config_copy()
    return {name: value for name, value in options.items() if name in supported}


@functools.cache  # so that each reason appears in the log only once
def _warn_of_skipped_graph(reason: str) -> None:
    log.warning("compile=graphs: part of the training step runs without CUDA graphs: %s", reason)


def _shorten_cudagraph_log(record: logging.LogRecord) -> bool:
    """Return False for a message about a skipped CUDA graph, and log its reason once."""
    first_line = record.getMessage().partition("\n")[0].rstrip()
    match = re.match(r"\w+ cudagraphs? due to (.+?)\.?(?: Found from.*)?$", first_line)
    if match is None:
        return True
    _warn_of_skipped_graph(match[1])
    return False


class CompiledCall:
    """Runs a function of images (B, ...): compiled, or eagerly if an earlier batch was larger.

    One graph for all sizes would be slower for every batch; a graph for each size would take
    minutes to compile, only for the short batch at the end of a dataset. Eager and compiled results
    may differ slightly, because sums may be added in another order.

    Args:
        function: the function, which calls `net`.
        net: the net; a graph is for one training mode, gradient mode and image shape.
        recompute: True = let the compiler save less for backward and recompute more.
        cuda_graphs: True = replay CUDA graphs. Gradients, and tensors that were passed to hooks in
            the net, are overwritten when the next step begins
            (`torch.compiler.cudagraph_mark_step_begin`); results of calls are copies.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        net: nn.Module,
        *,
        recompute: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        register_decompositions()
        # `inductor.patch` around a call would not be enough: backward is compiled later, when it
        # first runs.
        options: dict[str, Any] = {**compile_options(), "triton.cudagraphs": cuda_graphs}
        self._call = torch.compile(function, fullgraph=True, dynamic=False, options=options)
        self._cuda_graphs = cuda_graphs
        if cuda_graphs:
            cudagraphs_log.addFilter(_shorten_cudagraph_log)
        self._net = net
        self._compiled_batch_size: dict[tuple[object, ...], int] = {}
        self._recompute = recompute

    def __call__(self, images: Tensor) -> Any:
        """Result of the function."""
        mode = (self._net.training, torch.is_grad_enabled(), images.shape[1:])
        if len(images) < self._compiled_batch_size.get(mode, 0):
            with torch.compiler.set_stance("force_eager"):
                return self._call(images)

        graph_counts = counters["stats"]
        count_before = graph_counts["unique_graphs"]
        # Set this at every call: any call may compile a graph, and the compiler then decides what
        # to save for backward.
        with functorch.patch(aggressive_recomputation=self._recompute):
            result = self._call(images)
        # No graph is compiled if there is one, or a caller has forced eager execution.
        if graph_counts["unique_graphs"] > count_before:
            self._compiled_batch_size[mode] = len(images)
        return tree_map_only(Tensor, torch.clone, result) if self._cuda_graphs else result


def compile_in_place(net: nn.Module, *, recompute: bool = False, cuda_graphs: bool = False) -> None:
    """Compile a net (see `CompiledCall`); parameter names stay, and copies are not compiled."""
    net._compiled_call_impl = CompiledCall(
        net._call_impl, net, recompute=recompute, cuda_graphs=cuda_graphs
    )
