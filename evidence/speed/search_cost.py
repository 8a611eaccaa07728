"""How long one evaluation of the calibration images takes during a search over scales, in float forwards of the same images.

Run by `make search-cost`: DeiT-T or DeiT-S, W4A8 in FQ-ViT's placement, 100 images as one batch, one thread. Everything is timed in turns,
round after round, in CPU seconds, so that a busy machine disturbs all alike; medians of ratios within a round are printed.

    exact    the search's own evaluation: what runs before the first scale that changes is remembered. The mean over all blocks.
    plain    a whole forward of the same quantized net, nothing remembered.

`identical`: exact and plain give the same fitness of 20 images, bit for bit, for a candidate of every block.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import timm
import torch
from torch import Tensor, nn

import qat
from evidence.speed.timing import environment, timed
from qat.functional.infonce import info_nce
from qat.model.ptq_spec import PtqRecipe
from qat.ptq import calibrate
from qat.ptq.search import Evaluator, SearchSettings, logits_of

MICRO_BATCH = SearchSettings().micro_batch


def candidate(evaluator: Evaluator, block: str) -> Tensor:
    """Scales of a block with noise as large as that of a search."""
    vector = evaluator.vectors[block]
    noise = torch.rand(
        len(vector.read()), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return (vector.read() + (2 * noise - 1) * vector.radius(None)).abs()


def one_round(
    net: nn.Module, twin: nn.Module, images: Tensor, evaluator: Evaluator
) -> dict[str, float]:
    """Mean seconds of the process for every kind of evaluation, in turns."""
    plain, of_float, exact = timed(lambda: logits_of(twin, images, MICRO_BATCH))[0], [], []
    for block, vector in reversed(evaluator.vectors.items()):
        # The float forward is timed before every block: the machine may be busier at the end of a round than at its start.
        of_float.append(timed(lambda: logits_of(net, images, MICRO_BATCH))[0])
        start = vector.read()
        vector.write(candidate(evaluator, block))
        exact.append(timed(lambda block=block: evaluator.fitness(block))[0])
        vector.write(start)
    return {"float": statistics.mean(of_float), "exact": statistics.mean(exact), "plain": plain}


def identical(net: nn.Module, twin: nn.Module, images: Tensor) -> bool:
    """Do exact and plain agree to the last bit, for a candidate of every block?"""
    targets = logits_of(net, images, MICRO_BATCH)
    evaluator, same = Evaluator(twin, [images], [targets], SearchSettings()), []
    for block, vector in reversed(evaluator.vectors.items()):
        start = vector.read()
        vector.write(candidate(evaluator, block))
        same.append(
            evaluator.fitness(block)
            == float(info_nce(logits_of(twin, images, MICRO_BATCH), targets).double())
        )
        vector.write(start)
    return all(same)


@torch.no_grad()
def main() -> None:
    """Time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = timm.create_model(args.model).eval()
    images = torch.randn(args.images, *net.default_cfg["input_size"])
    recipe = PtqRecipe(bits=4, residual_observer="ptf")
    twin = qat.convert(copy.deepcopy(net), recipe, input_size=tuple(images.shape[1:])).eval()
    calibrate(twin, images.split(20)[:2])
    evaluator = Evaluator(twin, [images], [logits_of(net, images, MICRO_BATCH)], SearchSettings())
    evaluator.fitness(next(reversed(evaluator.vectors)))  # fills what is remembered, and warms up
    found = [one_round(net, twin, images, evaluator) for _ in range(args.rounds)]
    print(
        f"{environment()}\n{args.model}, {args.images} images, micro-batches of {MICRO_BATCH}, {args.rounds} rounds"
    )
    for name in found[0]:
        ratio = statistics.median(took[name] / took["float"] for took in found)
        print(f"{name:6s} {statistics.median(took[name] for took in found):8.3f} s  {ratio:.3f}")
    print(f"identical {str(identical(net, twin, images[: 2 * MICRO_BATCH])).lower()}")


if __name__ == "__main__":
    main()
