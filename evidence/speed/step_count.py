"""Bytes, kernels and host time of a CUDA training step, counted without a GPU, relative to float.

Run it with `make step-count`. The counted step is forward, loss, backward and fused AdamW in
bfloat16 autocast, on fake tensors, which have shapes but no memory, in the code branches for CUDA.
An operation of torch counts as a kernel that reads its inputs and writes its outputs once; a view
is not counted. A factor of a product that cuBLAS cannot read in its layout is copied first. Our
Triton kernels count when they are launched. Fused attention is one operation forward and one
backward. Caches, and fusion by a compiler, are not modelled.

Memory: tensors that a compiled forward pass saves for backward, with torch's own partitioning.

Host time: CPU time of the same step with the same blocks and tiny tensors on the CPU, in turns with
the float model. Launches of Triton are not included (10 to 20 us each, as Triton reports). The time
of torch's operations is their time on tensors of a few numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
from collections.abc import Callable, Generator, Sequence
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
from qat.kernels.rows import PLAIN_CLASSES

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
ROWS = {name: arm for name, arm in ARMS.items() if not arm.teacher} | {
    "seq_2bit": Arm({}, recipe="seq")
}
BATCHES = (64, 256)
ROUNDS = 9
# Operations that move no bytes.
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
    """Bytes read and written in a step, all kernels, and the Triton kernels among them."""

    bytes: int = 0
    kernels: int = 0
    triton: int = 0

    def add(self, tensors: list[Tensor]) -> None:
        """Count a kernel that reads or writes the tensors."""
        self.bytes += sum(size_of(t) for t in tensors)
        self.kernels += 1


def size_of(x: Tensor) -> int:
    """Bytes in memory; expanded dimensions count once."""
    return x.element_size() * math.prod(
        size for size, stride in zip(x.shape, x.stride(), strict=True) if stride
    )


def is_readable(x: Tensor) -> bool:
    """True if cuBLAS can read a factor without a copy: contiguous rows or columns, no overlap."""
    num_rows, num_columns = x.shape[-2:]
    row_stride, column_stride = x.stride()[-2:]
    has_whole_rows = column_stride == 1 and row_stride >= max(1, num_columns)
    has_whole_columns = row_stride == 1 and column_stride >= max(1, num_rows)
    return has_whole_rows or has_whole_columns


class Counting(TorchDispatchMode):
    """Counts the bytes and kernels of torch's operations."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count
        self._cast: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count one operation."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "prim" or name in _FREE or _returns_view(func):
            return out
        inputs = _tensors((args, kwargs))
        if name in _PRODUCTS:
            for x in inputs:
                if x.ndim > 1 and not is_readable(x):
                    self.count.add([x, x])
        has_out = bool(kwargs) and "out" in kwargs
        if name in {"copy_", "fill_", "zero_"} or (has_out and name == "baddbmm"):
            inputs = inputs[1:]  # the first input is only written
        outputs = _tensors(out)
        if name.startswith("_fused_adam"):
            parameters, _, first_moments, second_moments = args[:4]
            outputs = [*parameters, *first_moments, *second_moments]
        if name == "_softmax" and args[0] is self._cast:
            # CUDA's softmax reads half precision itself.
            self.count.kernels -= 1
            self.count.bytes -= 2 * size_of(args[0])
        self._cast = out if name == "_to_copy" else None
        self.count.add([*inputs, *outputs])
        return out


def _returns_view(func: Any) -> bool:
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _always(value: Any) -> Callable[..., Any]:
    """A constant function, which takes less time than a mock."""
    return lambda *args: value


@contextlib.contextmanager
def cuda_branches(count: Count | None = None) -> Generator[None]:
    """Run the code branches for CUDA on CPU tensors; our kernels are counted, but do not run."""

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
        mock.patch.dict(heads.ROW_MULTIPLES, cpu=heads.ROW_MULTIPLES["cuda"]),
        mock.patch.object(weight, "SAVED_ON", {"cpu"}),
        mock.patch.object(tiles, "device_type", _always("cpu")),
        mock.patch.object(gpu, "_launch", launch),
        mock.patch.object(heads, "MIN_IN_PLACE", 0),
    ):
        PLAIN_CLASSES.add(FakeTensor)
        try:
            yield
        finally:
            PLAIN_CLASSES.discard(FakeTensor)


@contextlib.contextmanager
def without_memory(net: nn.Module, count: Count | None = None) -> Generator[None]:
    """Replace the tensors of a model by fake tensors, and run the code branches for CUDA."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, cuda_branches(count):
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            net._apply(mode.from_tensor)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
        yield


def counted(net: nn.Module, batch: int, side: int = 224) -> Count:
    """Count the second step of a model; the first step creates the optimizer's state."""
    count = Count()
    with without_memory(net, count):
        run = training_step(net, torch.randn(batch, 3, side, side), half=True)
        run()
        count.bytes = count.kernels = count.triton = 0
        with Counting(count):
            run()
    return count


def bytes_for_backward(net: nn.Module, batch: int, side: int = 224) -> int:
    """Bytes that a compiled forward pass saves for backward, without parameters and images."""
    storages: dict[int, int] = {}

    def record(graph: fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.output_node().args[0]:  # type: ignore[union-attr]
            if isinstance(node, fx.Node) and node.op != "placeholder":
                storage = node.meta["val"].untyped_storage()
                storages[storage._cdata] = storage.nbytes()
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    decompositions = {**select_decomp_table(), **operators.DECOMPOSITIONS}
    compiler = aot_autograd(
        fw_compiler=record,
        bw_compiler=record,
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
    calibration = torch.randn(2, 3, 224, 224)
    for model in args.models:
        for batch in BATCHES:
            print(f"\n{model}, batch {batch}, bfloat16 autocast\n")
            print(counts_table(model, batch, calibration), flush=True)
    print(f"\nKept for backward by a compiled step, batch {BATCHES[-1]}: GiB (x float)\n")
    print(memory_table(args.models, calibration), flush=True)
    print("\nHost, 12 blocks\n")
    print(host_table())


def counts_table(model: str, batch: int, calibration: Tensor) -> str:
    """A table of the bytes and kernels of each row's step."""
    counts = {name: counted(build(model, arm, calibration), batch) for name, arm in ROWS.items()}
    base = counts[FLOAT]
    lines = []
    for name, count in counts.items():
        lines.append([
            name,
            f"{count.bytes / 1e9:.1f}",
            f"{count.bytes / base.bytes:.2f}",
            f"{count.kernels} ({count.triton})",
            f"{count.kernels / base.kernels:.2f}",
        ])
    return table(["step", "GB moved", "x float", "kernels (Triton)", "x float"], lines)


def memory_table(models: Sequence[str], calibration: Tensor) -> str:
    """A table of the bytes that a compiled step saves for backward, by row and model."""
    memory: dict[str, list[int]] = {}
    for name, arm in ROWS.items():
        nets = (build(model, arm, calibration) for model in models)
        memory[name] = [bytes_for_backward(net, BATCHES[-1]) for net in nets]
    lines = []
    for name, sizes in memory.items():
        line = [name]
        for size, base in zip(sizes, memory[FLOAT], strict=True):
            line.append(f"{size / 2**30:.2f} ({size / base:.2f})")
        lines.append(line)
    return table(["step", *models], lines)


def host_table() -> str:
    """A table of the CPU time of each row's step with tiny tensors."""
    images = torch.randn(2, 3, TINY["img_size"], TINY["img_size"])
    steps = {}
    for name, arm in ROWS.items():
        steps[name] = training_step(build(MODELS[0], arm, images, **TINY), images, half=True)
    with cuda_branches():
        times = take_turns(steps, ROUNDS)
    lines = []
    for name, timing in times.items():
        milliseconds = f"{1000 * statistics.median(timing.cpu):.1f}"
        lines.append([name, milliseconds, ratio(timing, times[FLOAT])])
    return table(["step", "ms", "x float: CPU [range], wall"], lines)


if __name__ == "__main__":
    main()
