"""`torch.compile` of functions of image batches: a graph for each mode, for its largest batch."""

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

# Let compiled code round as eager code does, as integer codes may depend on it: division to
# nearest, no product contracted with a sum, and values of half precision rounded between two fused
# operations. One setting has the last two. C++ code does the first two anyway. Older versions of
# torch spell the setting of division as the second name.
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
def _formulas_hash() -> str:
    return source_hash(functional, kernels)


def register_formulas() -> None:
    """Let torch compile the forward passes of our operators as formulas, to fuse their neighbours.

    It costs compilation time; `ROUNDING` keeps the bits.
    """
    decompositions.update(operators.FORMULAS)
    fast_random_decomps().update(operators.FORMULAS)  # a copy that torch may have made earlier
    # Torch finds a compiled graph in its caches by the names of operators: other formulas need
    # another key.
    if not compiler.cache_key_tag.endswith(_formulas_hash()):
        compiler.cache_key_tag += _formulas_hash()


def compile_options() -> dict[str, bool]:
    """`ROUNDING` and other options of the compiler, as far as this version of torch knows them.

    Rows are not padded, since operators would copy padded ones. With `trainer.deterministic` the
    compiler does not choose by measured speed. Before 2.15 a reduction that torch fuses with one of
    another order may not write a gradient (pytorch #193061).
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


@functools.cache  # one line for each reason
def _warn_of_skipped_graph(reason: str) -> None:
    log.warning("compile=graphs: part of the training step runs without CUDA graphs: %s", reason)


def _replace_stack(record: logging.LogRecord) -> bool:
    """Replace torch's many lines about a skipped CUDA graph by one; False drops the record."""
    first_line = record.getMessage().partition("\n")[0].rstrip()
    skipped = re.match(r"\w+ cudagraphs? due to (.+?)\.?(?: Found from.*)?$", first_line)
    if skipped is None:
        return True
    _warn_of_skipped_graph(skipped[1])
    return False


class CompiledCall:
    """Calls a function of images (B, ...) as one compiled graph, smaller batches eagerly.

    A graph for any size would be slower for every batch, and a graph for each size takes minutes to
    compile, for the one short batch at the end of a dataset. Eager and compiled results differ by
    rounding.

    Args:
        function: calls `net`.
        net: its training and evaluation modes have separate graphs.
        recompute: let the compiler save less for backward and recompute more.
        graphs: replay CUDA graphs. Gradients, and tensors that hooks in the net were passed, are
            overwritten once the next step begins (`torch.compiler.cudagraph_mark_step_begin`);
            results of calls are copies.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        net: nn.Module,
        *,
        recompute: bool = False,
        graphs: bool = False,
    ) -> None:
        register_formulas()
        # Not by `inductor.patch` around a call: backward is compiled later, when it first runs.
        options: dict[str, Any] = {**compile_options(), "triton.cudagraphs": graphs}
        self._call = torch.compile(function, fullgraph=True, dynamic=False, options=options)
        self._graphs = graphs
        if graphs:
            cudagraphs_log.addFilter(_replace_stack)
        self._net = net
        self._largest: dict[tuple[object, ...], int] = {}
        self._recompute = recompute

    def __call__(self, images: Tensor) -> Any:
        """Result of the function."""
        mode = (self._net.training, torch.is_grad_enabled(), images.shape[1:])
        if len(images) < self._largest.get(mode, 0):
            with torch.compiler.set_stance("force_eager"):
                return self._call(images)

        graph_counts = counters["stats"]
        count_before = graph_counts["unique_graphs"]
        # At every call: the compiler decides in the first one what to save for backward.
        with functorch.patch(aggressive_recomputation=self._recompute):
            out = self._call(images)
        # Unless a caller has forced eager execution.
        if graph_counts["unique_graphs"] > count_before:
            self._largest[mode] = len(images)
        return tree_map_only(Tensor, torch.clone, out) if self._graphs else out


def compile_in_place(net: nn.Module, *, recompute: bool = False, graphs: bool = False) -> None:
    """Compile a net, see `CompiledCall`; names of its parameters stay, copies are not compiled."""
    net._compiled_call_impl = CompiledCall(net._call_impl, net, recompute=recompute, graphs=graphs)
