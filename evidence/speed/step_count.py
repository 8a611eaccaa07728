"""Bytes moved, kernels launched and the host's time of a training step on CUDA, counted without a GPU, in those of the float step.

Run by `make step-count`. Counted: a step of forward, loss, backward and fused AdamW in bfloat16 autocast on fake tensors, which have shapes
and no memory, with the branches of CUDA taken. An operation of torch is a kernel that reads its inputs and writes its outputs once; a view
is none; a factor of a product that cuBLAS cannot read where it lies is copied before. Ours in Triton count as they are launched. Fused
attention is one operation forward and one backward. What stays in a cache, and what a compiler would fuse, is not known here.
Kept: what the graph of a compiled forward pass hands to that of backward, by torch's own partitioning.

Host: process time of the same step with a net of the same blocks and tiny tensors on the CPU, in turns with the float one's; launches of
Triton are left out of it (10 to 20 us each by Triton's own account), operations of torch count with what they take for a few numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evidence.speed.steps import ARMS, FLOAT, TINY, Arm, build, training_step
from evidence.speed.timing import environment, ratio, table, take_turns
from qat.kernels import attention, gpu, operators, tiles
from qat.kernels.fused import heads, weight
from qat.kernels.rows import PLAIN

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
ROWS = {name: arm for name, arm in ARMS.items() if not arm.teacher} | {
    "seq_2bit": Arm({}, recipe="seq")
}
BATCHES, ROUNDS = (64, 256), 9
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
}
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}


@dataclass
class Count:
    """Of a step: bytes read and written, operations of torch and launches of Triton, the latter alone."""

    bytes: int = 0
    kernels: int = 0
    triton: int = 0

    def add(self, tensors: list[Tensor]) -> None:
        """One more kernel."""
        self.bytes += sum(size_of(t) for t in tensors)
        self.kernels += 1


def size_of(x: Tensor) -> int:
    """Bytes of the elements that differ in memory."""
    return x.element_size() * math.prod(
        size for size, stride in zip(x.shape, x.stride(), strict=True) if stride
    )


def is_readable(x: Tensor) -> bool:
    """Whether cuBLAS takes a factor where it lies: rows or columns in one piece, at equal distances that do not overlap."""
    (rows, columns), (down, right) = x.shape[-2:], x.stride()[-2:]
    return (right == 1 and down >= max(1, columns)) or (down == 1 and right >= max(1, rows))


class Counting(TorchDispatchMode):
    """Adds up what torch's operations move."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count
        self._cast: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count one operation."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if func.namespace == "prim" or name in _FREE or is_view:
            return out
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in given if name in _PRODUCTS else ():
            if x.ndim > 1 and not is_readable(x):
                self.count.add([x, x])
        read = (
            given[1:]
            if name in {"copy_", "fill_", "zero_"}
            or (kwargs and "out" in kwargs and name == "baddbmm")
            else given
        )
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name.startswith("_fused_adam"):  # parameters and both moments
            written = [x for group in (args[0], args[2], args[3]) for x in group]
        if name == "_softmax" and args[0] is self._cast:  # CUDA's reads half precision itself
            self.count.kernels -= 1
            self.count.bytes -= 2 * size_of(args[0])
        self._cast = out if name == "_to_copy" else None
        self.count.add([*read, *written])
        return out


def _always(value: Any) -> Callable[..., Any]:
    """A function that costs less than a mock."""
    return lambda *args: value


@contextlib.contextmanager
def cuda_branches(count: Count | None = None) -> Generator[None]:
    """Everything goes the way that it goes on CUDA, on tensors of a CPU; our kernels are not run, and counted if there is a `count`."""

    def launch(
        name: str,
        programs: tuple[int, ...],
        tensors: tuple[Tensor | None, ...],
        *numbers: float,
        **constants: Any,
    ) -> None:
        if count is not None:
            count.add([x for x in tensors if x is not None])
            count.triton += 1

    with (
        mock.patch.object(operators, "_kernels_for", _always(gpu)),
        mock.patch.object(attention, "_runs_on", _always(value=True)),
        mock.patch.dict(heads.ROWS, cpu=heads.ROWS["cuda"]),
        mock.patch.object(weight, "SAVED_ON", {"cpu"}),
        mock.patch.object(tiles, "device_type", _always("cpu")),
        mock.patch.object(gpu, "_launch", launch),
        mock.patch.object(heads, "LARGE", 0),
    ):
        PLAIN.add(FakeTensor)
        try:
            yield
        finally:
            PLAIN.discard(FakeTensor)


@contextlib.contextmanager
def without_memory(net: nn.Module, count: Count | None = None) -> Generator[None]:
    """The tensors of a net are replaced by fake ones, and all that it does goes the way of CUDA."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, cuda_branches(count):
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        net._apply(mode.from_tensor)
        yield


def counted(net: nn.Module, batch: int, side: int = 224) -> Count:
    """The second step of a net; the first makes the optimizer's state."""
    count = Count()
    with without_memory(net, count):
        run = training_step(net, torch.randn(batch, 3, side, side), half=True)
        run()
        count.bytes = count.kernels = count.triton = 0
        with Counting(count):
            run()
    return count


def kept(net: nn.Module, batch: int, side: int = 224) -> int:
    """Bytes that a compiled forward pass keeps for backward beside parameters and images, each storage once."""
    storages: dict[int, int] = {}

    def forward(graph: fx.GraphModule, given: Any) -> Any:
        for node in graph.graph.output_node().args[0]:  # type: ignore[union-attr]
            if isinstance(node, fx.Node) and node.op != "placeholder":
                storage = node.meta["val"].untyped_storage()
                storages[storage._cdata] = storage.nbytes()
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    decompositions = {**select_decomp_table(), **operators.FORMULAS}
    compiler = aot_autograd(
        fw_compiler=forward,
        bw_compiler=forward,
        decompositions=decompositions,
        partition_fn=min_cut_rematerialization_partition,
    )
    with without_memory(net), torch.autocast("cpu", torch.bfloat16):
        torch.compile(net, fullgraph=True, backend=compiler)(torch.randn(batch, 3, side, side))
    return sum(storages.values())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(environment())
    few = torch.randn(2, 3, 224, 224)
    for model in args.models:
        for batch in BATCHES:
            counts = {name: counted(build(model, arm, few), batch) for name, arm in ROWS.items()}
            base, rows = counts[FLOAT], []
            for name, one in counts.items():
                shares = (
                    f"{one.bytes / base.bytes:.2f}",
                    f"{one.kernels} ({one.triton})",
                    f"{one.kernels / base.kernels:.2f}",
                )
                rows.append([name, f"{one.bytes / 1e9:.1f}", *shares])
            print(f"\n{model}, batch {batch}, bfloat16 autocast\n")
            print(
                table(["step", "GB moved", "x float", "kernels (Triton)", "x float"], rows),
                flush=True,
            )
    print(f"\nKept for backward by a compiled step, batch {BATCHES[-1]}: GiB (x float)\n")
    memory = {
        name: [kept(build(model, arm, few), BATCHES[-1]) for model in args.models]
        for name, arm in ROWS.items()
    }
    rows = [
        [n, *(f"{a / 2**30:.2f} ({a / b:.2f})" for a, b in zip(own, memory[FLOAT], strict=True))]
        for n, own in memory.items()
    ]
    print(table(["step", *args.models], rows), flush=True)
    images = torch.randn(2, 3, TINY["img_size"], TINY["img_size"])
    steps = {
        name: training_step(build(MODELS[0], arm, images, **TINY), images, half=True)
        for name, arm in ROWS.items()
    }
    with cuda_branches():
        times = take_turns(steps, ROUNDS)
    print("\nHost, 12 blocks\n")
    rows = [
        [name, f"{1000 * statistics.median(one.cpu):.1f}", ratio(one, times[FLOAT])]
        for name, one in times.items()
    ]
    print(table(["step", "ms", "x float: CPU [range], wall"], rows))


if __name__ == "__main__":
    main()
