"""Whether products of integer codes would pay in the forward pass: each Linear of a block in bfloat16, in int8 and in float8.

Every step of OFQ lies outside of the summed dimension - one a token on the left, one an output on the right - so the product of
dequantized factors is that of the codes, times a row and a column of steps, plus a bias; codes of up to 4 bits are exact in both formats.
Making the codes is not counted: it is one pass over memory, as making the dequantized factors is. Forward is a third of a Linear's
products, so what all of them gain is bounded by 3 t / (2 t + t'), t and t' being the times of the product in bfloat16 and of codes.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor

from benchmarks.gpu.clock import median_ms
from benchmarks.gpu.kernels import relative_error
from benchmarks.gpu.records import Row, failure
from benchmarks.timing import table

WAYS = ("bfloat16", "int8", "float8")
TRY = ((64, 32, 48),)


def shapes_of(model: str, batch: int) -> list[tuple[int, int, int]]:
    """Tokens, inputs and outputs of the Linears of a block, each shape once."""
    with torch.device("meta"):
        net = timm.create_model(model)
    tokens = batch * net.pos_embed.shape[1]
    linears = [m for m in net.blocks[0].modules() if isinstance(m, torch.nn.Linear)]
    values = (net.embed_dim, net.embed_dim)  # v alone, under query-key reparameterization
    return sorted({(tokens, *size) for size in [values, *((m.in_features, m.out_features) for m in linears)]})


def _scaled(product: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return (product * rows * columns).to(torch.bfloat16)


def ways(shape: tuple[int, int, int], device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The product of a token's codes and a weight's, three ways; rows and columns of steps are on the outside."""
    m, k, n = shape
    left = torch.randint(-2, 2, (m, k), device=device, dtype=torch.int8)
    right = torch.randint(-3, 4, (n, k), device=device, dtype=torch.int8)  # odd numbers stand for StatsQ's half steps
    rows, columns = torch.rand(m, 1, device=device) + 0.5, torch.rand(1, n, device=device) + 0.5
    dequantized = (left * rows).to(torch.bfloat16), (right * columns.t()).to(torch.bfloat16)
    eights = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
    scaled = torch.compile(_scaled) if device.type == "cuda" else _scaled
    return {
        "bfloat16": lambda: torch.nn.functional.linear(*dequantized),
        "int8": lambda: scaled(torch._int_mm(left, right.t()), rows, columns),
        "float8": lambda: torch._scaled_mm(*eights, scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16),
    }


def product(shape: tuple[int, int, int], device: torch.device) -> Row:
    """Milliseconds of each product, or why there are none; and how far its result is from bfloat16's."""
    torch.manual_seed(0)
    runs, row = ways(shape, device), Row(shape=shape)
    expected = runs["bfloat16"]().float()
    for way, run in runs.items():
        try:
            row[way] = {"error": relative_error(run(), expected), "ms": median_ms(run, device)}
        except Exception as error:  # not every device has every product
            row[way] = failure(error)
    return row


class Products:
    """Measures the Linears of a model.

    Args:
        model: timm's name.
        batch: images.
        dry_run: a small product on the CPU instead.
    """

    def __init__(self, model: str, batch: int, *, dry_run: bool) -> None:
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.shapes = TRY if dry_run else shapes_of(model, batch)

    def measure(self) -> Row:
        """All of them."""
        return {"products": [product(shape, self.device) for shape in self.shapes]}


def report(row: Row) -> str:
    """Markdown."""
    rows = []
    for one in row["products"]:
        base, cells = one["bfloat16"]["ms"], []
        for way in WAYS[1:]:
            t = one[way].get("ms")
            cells += ["not here", "", ""] if t is None else [f"{t:.3f}", f"{base / t:.2f}", f"{3 * base / (2 * base + t):.2f}"]
        rows.append([" x ".join(map(str, one["shape"])), f"{base:.3f}", *cells])
    head = ["tokens x in x out", "bfloat16, ms"]
    head += [f"{way}{what}" for way in WAYS[1:] for what in (", ms", ", times faster", ": bound for training")]
    return table(head, rows)
