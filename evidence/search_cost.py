"""How long one evaluation of the calibration images takes during a search over scales, in float forwards of the same images.

Run by `make search-cost`: DeiT-T or DeiT-S, W4A8 in FQ-ViT's placement, 100 images as one batch, one thread. Everything is timed in turns,
round after round, so that a busy machine disturbs all alike; ratios are taken within a round, and their medians are printed.

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
from evidence.timing import environment, timed
from qat.functional.infonce import info_nce
from qat.model.ptq_spec import PtqRecipe
from qat.ptq import calibrate
from qat.ptq.search import Evaluator, SearchSettings, logits_of

MICRO_BATCH = SearchSettings().micro_batch
Seconds = tuple[float, float]  # of the process, by the clock


def candidate(evaluator: Evaluator, block: str) -> Tensor:
    """Scales of a block with noise as large as that of a search."""
    vector = evaluator.vectors[block]
    noise = torch.rand(len(vector.read()), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (vector.read() + (2 * noise - 1) * vector.radius(None)).abs()


def one_round(net: nn.Module, twin: nn.Module, images: Tensor, evaluator: Evaluator) -> dict[str, Seconds]:
    """Mean times of every kind of evaluation, in turns."""
    took: dict[str, list[Seconds]] = {"float": [], "exact": []}
    took["plain"] = [timed(lambda: logits_of(twin, images, MICRO_BATCH))]
    for block in reversed(evaluator.vectors):
        # The float forward is timed before every block: the machine may be busier at the end of a round than at its start.
        took["float"].append(timed(lambda: logits_of(net, images, MICRO_BATCH)))
        vector, start = evaluator.vectors[block], evaluator.vectors[block].read()
        vector.write(candidate(evaluator, block))
        took["exact"].append(timed(lambda block=block: evaluator.fitness(block)))
        vector.write(start)
    took["float at once"] = [timed(lambda: logits_of(net, images, len(images)))]
    return {name: (statistics.mean(s[0] for s in seconds), statistics.mean(s[1] for s in seconds)) for name, seconds in took.items()}


def identical(net: nn.Module, twin: nn.Module, images: Tensor) -> bool:
    """Do exact and plain agree to the last bit on some of the images, for a candidate of every block?"""
    targets = logits_of(net, images, MICRO_BATCH)
    evaluator = Evaluator(twin, [images], [targets], SearchSettings())
    same = []
    for block, vector in reversed(evaluator.vectors.items()):
        start = vector.read()
        vector.write(candidate(evaluator, block))
        same.append(evaluator.fitness(block) == float(info_nce(logits_of(twin, images, MICRO_BATCH), targets).double()))
        vector.write(start)
    return all(same)


def ratios(found: list[dict[str, Seconds]], base: str, clock: int) -> str:
    """What everything takes, in float forwards: the median over rounds of the ratio within a round."""
    return " ".join(f"{name} {statistics.median(r[name][clock] / r[base][clock] for r in found):.3f}" for name in ("exact", "plain"))


@torch.no_grad()
def main() -> None:
    """Time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bias-correction", action="store_true", help="as ptq=evolq_w4a8 has it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net = timm.create_model(args.model).eval()
    images = torch.randn(args.images, *net.default_cfg["input_size"])
    recipe = PtqRecipe(bits=4, residual_observer="ptf", bias_correction=args.bias_correction)
    twin = qat.convert(copy.deepcopy(net), recipe, input_size=tuple(images.shape[1:])).eval()
    calibrate(twin, images.split(20)[:2])
    evaluator = Evaluator(twin, [images], [logits_of(net, images, MICRO_BATCH)], SearchSettings())
    evaluator.fitness(next(reversed(evaluator.vectors)))  # fills what is remembered, and warms up
    found = [one_round(net, twin, images, evaluator) for _ in range(args.rounds)]
    print(f"{environment()}\n{args.model}, {args.images} images, micro-batches of {MICRO_BATCH}, {args.rounds} rounds")
    for name in found[0]:
        cpu, wall = (statistics.median(r[name][clock] for r in found) for clock in (0, 1))
        print(f"{name:14s} {wall:8.3f} s {cpu:8.3f} s CPU")
    print(f"whole batch at once: {ratios(found, 'float at once', 1)}\nCPU time: {ratios(found, 'float', 0)}")
    print(ratios(found, "float", 1), f"identical {str(identical(net, twin, images[: 2 * MICRO_BATCH])).lower()}")


if __name__ == "__main__":
    main()
