"""Time an evaluation of a search over scales, relative to a float forward pass of its images.

Run it with `make search-cost`: DeiT-T or DeiT-S, W4A8 in FQ-ViT's placement, 100 images as one
batch, one thread. All evaluations take turns and are timed in CPU seconds, so that a busy machine
slows all of them alike; the printed ratios are medians over the rounds.

    exact    the search's own evaluation, which caches the layers before the first changed scale;
             mean over all blocks
    plain    a whole forward pass of the same quantized model, without a cache

`identical`: exact and plain have the same fitness of 20 images, bit for bit, for a candidate of
every block.
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
    """Scales of a block, with the noise of a search."""
    vector = evaluator.vectors[block]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(vector.read()), generator=generator, dtype=torch.float64)
    return (vector.read() + (2 * noise - 1) * vector.radius(None)).abs()


def one_round(
    net: nn.Module, twin: nn.Module, images: Tensor, evaluator: Evaluator
) -> dict[str, float]:
    """Mean CPU seconds of each kind of evaluation, in turns."""
    plain, _ = timed(lambda: logits_of(twin, images, MICRO_BATCH))
    float_seconds = []
    exact = []
    for block, vector in reversed(evaluator.vectors.items()):
        # The float forward pass is timed before every block, because the load of the machine may
        # change within a round.
        float_seconds.append(timed(lambda: logits_of(net, images, MICRO_BATCH))[0])
        start = vector.read()
        vector.write(candidate(evaluator, block))
        exact.append(timed(lambda block=block: evaluator.fitness(block))[0])
        vector.write(start)
    return {
        "float": statistics.mean(float_seconds),
        "exact": statistics.mean(exact),
        "plain": plain,
    }


def identical(net: nn.Module, twin: nn.Module, images: Tensor) -> bool:
    """True if exact and plain agree bit for bit, for a candidate of every block."""
    targets = logits_of(net, images, MICRO_BATCH)
    evaluator = Evaluator(twin, [images], [targets], SearchSettings())
    all_equal = True
    for block, vector in reversed(evaluator.vectors.items()):
        start = vector.read()
        vector.write(candidate(evaluator, block))
        exact = evaluator.fitness(block)
        plain = float(info_nce(logits_of(twin, images, MICRO_BATCH), targets).double())
        vector.write(start)
        all_equal = all_equal and exact == plain
    return all_equal


@torch.no_grad()
def main() -> None:
    """Time and compare the evaluations, and print the results."""
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
    evaluator.fitness(next(reversed(evaluator.vectors)))  # fills the cache, and warms up
    rounds = [one_round(net, twin, images, evaluator) for _ in range(args.rounds)]
    print(environment())
    print(
        f"{args.model}, {args.images} images, micro-batches of {MICRO_BATCH}, {args.rounds} rounds"
    )
    for name in rounds[0]:
        seconds = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[name] / times["float"] for times in rounds)
        print(f"{name:6s} {seconds:8.3f} s  {ratio:.3f}")
    print(f"identical {str(identical(net, twin, images[: 2 * MICRO_BATCH])).lower()}")


if __name__ == "__main__":
    main()
