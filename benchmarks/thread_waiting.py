"""How OpenMP's threads wait for each other, and what it costs where the cores have something else to do.

Run by `make thread-waiting`. Every setting is a process of its own that takes turns with the others; steps of a 2-bit net with QKR, all
threads. "busy" = as many loops that never end as there are cores. By the clock; ratios within a round to threads that spin.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Generator

import torch

from benchmarks import timing
from benchmarks.timing import table

SETTINGS = {
    "spinning, the default of GNU's OpenMP": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
# Model, image size, images in a batch, steps in a turn, rounds.
NETS = {"demo": (("vit_tiny_patch16_224", 32, 64), 4, 11), "DeiT-T": (("deit_tiny_patch16_224", 224, 2), 1, 5)}
DEMO = {"embed_dim": 96, "depth": 4, "num_heads": 3, "global_pool": "avg", "class_token": False, "patch_size": 4}


def serve(net: str) -> None:
    """A process of a setting: for each line on standard input so many steps, and on standard output the seconds they took."""
    import timm

    import qat
    from benchmarks.step_arms import step

    (name, side, batch), count, _ = NETS[net]
    torch.manual_seed(0)
    images, target = torch.randn(batch, 3, side, side), torch.arange(batch) % 10
    model = timm.create_model(name, img_size=side, num_classes=10, **(DEMO if net == "demo" else {}))
    quantized = qat.convert(model, qat.recipe("ofq", bits=2), input_size=(3, side, side))
    run = step(qat.initialize_scales(quantized, [images]).train(), (images, target))
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(count):
            run()
        print((time.perf_counter() - began) / count, flush=True)


@contextlib.contextmanager
def busy(loops: int) -> Generator[None]:
    """Processes that use a core each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compare(net: str) -> list[list[str]]:
    """Rows of the table of a net."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--serve", net],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=known | threads | settings,
        )
        for name, settings in SETTINGS.items()
    }

    def ask(process: subprocess.Popen[str]) -> float:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return float(process.stdout.readline())  # type: ignore[union-attr]

    def turns(count: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in processes}
        for _ in range(count):
            for name, process in processes.items():
                found[name].append(ask(process))
        return found

    rounds = NETS[net][2]
    turns(2)
    idle = turns(rounds)
    with busy(os.cpu_count() or 1):
        loaded = turns(rounds)
    for process in processes.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
    base = next(iter(SETTINGS))
    images = NETS[net][0][2]
    rows = []
    for name in SETTINGS:
        cells = []
        for found in (idle, loaded):
            ratios = sorted(one / other for one, other in zip(found[name], found[base], strict=True))
            cells += [
                f"{images / statistics.median(found[name]):.0f}",
                f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
            ]
        rows.append([net, name, *cells, f"{statistics.median(loaded[name]) / statistics.median(idle[name]):.1f}"])
    return rows


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", choices=NETS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    print(timing.environment(), flush=True)
    head = ["net", "threads wait by", "idle, images/s", "step to spinning", "busy, images/s", "step to spinning", "busy step to idle"]
    for net in NETS:
        print(table(head, compare(net)) + "\n", flush=True)


if __name__ == "__main__":
    main()
