"""What a search over bits gains over equal bits at the same size, over calibration seeds.

Selection is by the fitness on calibration images; test accuracy is read at the end of each run. The float net is the same for all seeds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from pathlib import Path

from in_process import cell, run

SEARCH = ("search=bits", "search.front_points=0")
ARMS = {
    **{f"W{bits}": (f"ptq.bits={bits}",) for bits in (2, 3, 4, 8)},
    **{f"{bits} bits on average, infonce": (*SEARCH, f"search.average_bits={bits}") for bits in (2.5, 3, 4)},
    **{f"{bits} bits on average, kl": (*SEARCH, f"search.average_bits={bits}", "search.fitness=kl") for bits in (2.5, 3, 4)},
}


def main() -> None:
    """Run what is not there yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, help="a float net trained on digits: train.py experiment=demo_fp")
    parser.add_argument("--ptq", default="fqvit_w4a8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1000, help="of the calibration, and of an evaluation in the search")
    parser.add_argument("--generations", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("outputs/bits"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    found: dict[str, list[dict]] = {arm: [] for arm in args.arms}
    for seed in args.seeds:
        folder = args.out.absolute() / args.ptq / f"seed{seed}"
        for arm in args.arms:
            name = f"{arm.replace(',', '').replace(' ', '_')}_{args.images}_{args.generations}"
            shared = (f"seed={seed}", f"ckpt={args.ckpt}", f"ptq={args.ptq}", f"data.calibration_images={args.images}")
            length = (f"search.generations={args.generations}",) if "search=bits" in ARMS[arm] else ()
            found[arm].append(run("ptq", folder / name, *shared, *ARMS[arm], *length))
    print(f"{'':32}{'kB':>16}{'top-1':>18}{'loss':>20}{'fitness':>24}{'evaluations':>14}{'seconds':>18}")
    for arm, results in found.items():
        searches = [r["search"] for r in results if r.get("search")]
        row = [cell([r["size_bytes"] / 1e3 for r in results], ".1f"), cell([r["top1"] for r in results], ".2f")]
        row += [cell([r["loss"] for r in results], ".4f"), cell([s["fitness"] for s in searches], ".5f") if searches else ""]
        row += [f"{statistics.mean(s['evaluations'] for s in searches):.0f}" if searches else ""]
        row += [cell([s["seconds"] for s in searches], ".0f") if searches else ""]
        print(f"{arm:32}" + "".join(f"{value:>{width}}" for value, width in zip(row, (16, 18, 20, 24, 14, 18), strict=True)))


if __name__ == "__main__":
    main()
