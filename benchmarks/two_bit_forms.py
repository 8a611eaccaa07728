"""2-bit weights of StatsQ as INT2 codes with a half step added, against INT4 odd numbers: bytes, time to open, time of an image.

`python benchmarks/two_bit_forms.py [CKPT ...]`: 2-bit checkpoints; behind them DeiT-T and Swin-T with random weights. Both files of a net
are opened and run in turns; a ratio is taken within each turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import qat
from benchmarks.export_table import NETS, SIZE, images_of_the_test_set, random_net, subject_of
from qat.export.graph import INPUT, OUTPUT, to_onnx
from qat.export.session import SESSION_OPTIONS, open_session

FORMS = ("int2", "int4")


def main() -> None:
    """Print a row a net, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ckpt", nargs="*", help="2-bit checkpoints of train.py or ptq.py")
    parser.add_argument("--opened", type=int, default=9, help="times that each file is opened")
    parser.add_argument("--runs", type=int, default=60, help="times that each file is run")
    args = parser.parse_args()
    print("| net | bytes: INT2 | INT4 | INT4 : INT2 | to open, ms: INT2 | INT4 : INT2 | an image, ms: INT2 | INT4 : INT2 |")
    print("|---|---|---|---|---|---|---|---|")
    for ckpt in args.ckpt:
        subject = subject_of(ckpt)
        print_row(ckpt, subject.net, images_of_the_test_set(subject)[0][:1], args.opened, args.runs)
    for name in ("DeiT-T", "Swin-T"):
        print_row(name, random_net(NETS[name], 2), torch.randn(1, *SIZE), args.opened, args.runs)


def print_row(name: str, net: nn.Module, image: Tensor, opened: int, runs: int) -> None:
    """One net in both forms, one thread."""
    frozen = qat.freeze(net)
    files = {form: to_onnx(frozen, image, two_bit=form).SerializeToString() for form in FORMS}
    openers = {form: lambda form=form: open_session(files[form], options=SESSION_OPTIONS, threads=1) for form in FORMS}
    open_ms, open_ratio = in_turns(openers, opened)
    sessions = {form: opener() for form, opener in openers.items()}
    feed = {INPUT: image.numpy()}
    run_ms, run_ratio = in_turns({form: lambda form=form: sessions[form].run([OUTPUT], feed) for form in FORMS}, runs)
    small, large = (len(files[form]) for form in FORMS)
    print(
        f"| {name} | {small:,} | {large:,} | {large / small:.2f} | {open_ms:.0f} | {open_ratio:.2f} | {run_ms:.2f} | {run_ratio:.2f} |",
        flush=True,
    )


def in_turns(calls: Mapping[str, Callable[[], object]], turns: int) -> tuple[float, float]:
    """Medians over turns: milliseconds of the first call, and the second's in the first's; the first turn is left out."""
    first, ratios = [], []
    for turn in range(turns + 1):
        taken = {}
        for name in FORMS if turn % 2 else FORMS[::-1]:
            began = time.perf_counter()
            calls[name]()
            taken[name] = 1e3 * (time.perf_counter() - began)
        if turn:
            first.append(taken["int2"])
            ratios.append(taken["int4"] / taken["int2"])
    return statistics.median(first), statistics.median(ratios)


if __name__ == "__main__":
    main()
