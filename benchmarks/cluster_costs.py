"""What OFQ's published rows would cost on eight GPUs: arithmetic from measured step ratios and published float throughput. Prints a table.

Run by `make cluster-costs RATIOS="deit_t=2.2 deit_s=2.4 swin_t=3.2"`, the ratios being those of `make step-time`: student with QKR and
teacher in the step, in float steps. What is assumed is in the constants below.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

# Training images a second of the float nets on an RTX 3090 with mixed precision. Source: huggingface/pytorch-image-models, 5e7d47c,
# results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv.
IMAGES_A_SECOND = {"deit_t": 2248.67, "deit_s": 1028.80, "swin_t": 648.69}
PARAMETERS = {"deit_t": 5.9e6, "deit_s": 22.4e6, "swin_t": 28.3e6}
BATCH = {"deit_t": 140, "deit_s": 100, "swin_t": 64}
# GB/s of memory: nets this small are bound by it. Sources: data sheets of the RTX 3090, the A100 80 GB SXM and the H100 SXM.
BANDWIDTH = {"RTX 3090": 936, "A100": 2039, "H100": 3350}
IMAGENET, EPOCHS, GPUS = 1_281_167, 340, 8
DECODED = 175  # training images a second and core, `make decode-rate`, RandAugment and random erasing
LINK = 200e9  # bytes a second that an all-reduce moves between the GPUs of a node; and between nodes:
NETWORK = 25e9


@dataclass
class Cost:
    """A row of the table, for one kind of GPU."""

    rate: float
    hours: float
    cores: float
    reduce_ms: float
    step_ms: float


def cost(model: str, gpu: str, ratio: float) -> Cost:
    """Rate of all GPUs in images a second, hours of both stages, cores that decode as fast, milliseconds of an all-reduce and of a step."""
    single = IMAGES_A_SECOND[model] * BANDWIDTH[gpu] / BANDWIDTH["RTX 3090"] / ratio
    rate = GPUS * single
    moved = 2 * (GPUS - 1) / GPUS * 4 * PARAMETERS[model]
    return Cost(rate, IMAGENET * EPOCHS / rate / 3600, rate / DECODED, 1000 * moved / LINK, 1000 * BATCH[model] / single)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ratios", nargs="+", help="deit_t=2.4 ...")
    args = parser.parse_args()
    print("| net | GPU | ratio | images/s on 8 | hours, both stages | GPU-hours | cores that decode as fast | all-reduce, ms of a step |")
    print("|---|---|---|---|---|---|---|---|")
    for model, ratio in (pair.split("=") for pair in args.ratios):
        for gpu in ("A100", "H100"):
            one = cost(model, gpu, float(ratio))
            cells = (model, gpu, ratio, f"{one.rate:,.0f}", f"{one.hours:.0f}", f"{GPUS * one.hours:.0f}", f"{one.cores:.0f}")
            print("|", " | ".join(cells), f"| {one.reduce_ms:.1f} of {one.step_ms:.0f} |")
    print()
    for model in IMAGES_A_SECOND:
        moved = 2 * 4 * PARAMETERS[model]
        print(f"{model}: an all-reduce over the network moves {moved / 1e6:.0f} MB a node and step, {1000 * moved / NETWORK:.1f} ms")


if __name__ == "__main__":
    main()
