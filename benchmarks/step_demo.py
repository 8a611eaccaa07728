"""Time of an eager training step of the demo's net (`make demo`) in those of the float step: what a quantizer costs the host.

Run by `make step-demo`. Tensors are small here: 4 tokens of 96 channels for each image, so that calls count and not memory.
Nets take turns in one process, one thread; a ratio is taken within a round, in CPU seconds (`timing.ratio`).
"""

from __future__ import annotations

import argparse
import statistics

import timm
import torch
from torch import nn

import qat
from benchmarks import step_arms, timing

# conf/model/vit_tiny_demo.yaml on conf/data/digits.yaml
SIZE = (1, 8, 8)
ARGS = {"embed_dim": 96, "depth": 4, "num_heads": 3, "global_pool": "avg", "class_token": False}
RECIPES = {"ofq without qkr": ("ofq", {"attention": "standard"}), "ofq": ("ofq", {}), "lsq": ("lsq", {}), "seq": ("seq", {})}


def build(name: str) -> nn.Module:
    """The net, random weights; converted unless it is the float one."""
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=SIZE[1], patch_size=4, in_chans=1, num_classes=10, **ARGS)
    if name != step_arms.FLOAT:
        recipe, knobs = RECIPES[name]
        qat.initialize_scales(qat.convert(net, qat.recipe(recipe, bits=2, **knobs), input_size=SIZE), [torch.randn(16, *SIZE)])
    return net.train()


def main() -> None:
    """Print a table for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 128])
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(timing.environment())
    for size in args.batches:
        batch = torch.randn(size, *SIZE), torch.arange(size) % 10
        steps = {name: step_arms.step(build(name), batch) for name in (step_arms.FLOAT, *RECIPES)}
        times = timing.take_turns(steps, args.rounds)
        base = times[step_arms.FLOAT]
        print(f"\nbatch {size}, W2A2, {args.rounds} rounds: float step {1000 * statistics.median(base.cpu):.1f} ms CPU\n")
        print(
            timing.table(["net", "x float: CPU [range], wall"], [[name, str(timing.ratio(times[name], base))] for name in RECIPES]),
            flush=True,
        )


if __name__ == "__main__":
    main()
