"""What kurtosis regularization does to post-training quantization of weights at 2 and 3 bits, and to 2-bit training, over seeds.

Run by `make kure-seeds`. A float net goes on for some epochs with and without the term, all else equal; both are quantized by the commands'
own code with activations in float. With `--qat-epochs` 2-bit nets are trained from the float net with the term on the folded query-key
matrix, on its factors, and without it. Each command runs in this process.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
from pathlib import Path

import torch
from in_process import run

import qat
from qat.functional import kurtoses
from qat.losses.masters import find_masters

SETS = {
    "digits": (),
    # Patches of 8 pixels and a quarter of the images an epoch: what two cores can do.
    "cifar10": ("data=cifar10", "data.patch_size=8", "trainer.limit_train_batches=0.25", "data.num_workers=0", "data.augment=none"),
}
# What happens to the float net, and from which one it starts.
NETS = {
    "float": None,
    "longer": ("loss.kure=0",),
    "kure": ("loss.kure=1",),
    "kure 0.3": ("loss.kure=0.3",),
    "kure sum": ("loss.kure=1", "loss.kure_reduction=sum"),
}
# Weights alone, on symmetric grids, the first and the last layer at 8 bits.
WEIGHTS_ONLY = ("ptq.act_quantizer=float", "ptq.act_bits=32", "ptq.stem_bits=8", "ptq.head_bits=8", "ptq.weight_signed=true")
GRIDS = list(itertools.product((3, 2), ("tensor", "channel"), ("minmax", "mse")))
QAT_ARMS = {"none": ("loss.kure=0",)} | {
    qk: ("loss.kure=1", "loss.kure_reduction=sum", f"loss.kure_qk={qk}") for qk in ("product", "factors")
}


def kurtosis_of(checkpoint: Path, qk: str = "product") -> torch.Tensor:
    """Kurtosis of every layer that the term acts on, (L,)."""
    net = qat.load(checkpoint)
    with torch.no_grad():
        return kurtoses(master.of(net) for master in find_masters(net, "loss.kure", qk=qk))


def near_zero(checkpoint: Path) -> float:
    """Share of weights within 0.3 standard deviations of the mean of their layer: 0.236 of normal ones, 0.173 of uniform ones."""
    net = qat.load(checkpoint)
    with torch.no_grad():
        weights = [master.of(net) for master in find_masters(net, "loss.kure")]
        shares = [((w - w.mean()).abs() < 0.3 * w.std()).float().mean() for w in weights]
    return torch.stack(shares).mean().item()


def run_seed(folder: Path, seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Float nets, then every grid on each of them; figures by net."""
    shared = (*SETS[args.data], f"seed={seed}", *([f"data.root={args.root}"] if args.root else []))
    run("train", folder / "fp", *shared, "experiment=demo_fp", f"trainer.max_epochs={args.epochs}")
    found: dict[str, dict[str, float]] = {}
    for net in args.nets:
        settings = NETS[net]
        run_dir = folder / ("fp" if settings is None else net.replace(" ", "_"))
        if settings is not None:
            start = (f"ckpt={folder}/fp/checkpoints/last.ckpt", f"trainer.max_epochs={args.fine_epochs}", *settings)
            run("train", run_dir, *shared, "experiment=demo_kure", *start)
        found[net] = measure(run_dir, shared)
    return found


def measure(run_dir: Path, shared: tuple[str, ...]) -> dict[str, float]:
    """Kurtosis and accuracy of the last weights of a run, in float and on every grid."""
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    values = kurtosis_of(checkpoint)
    figures = {"kurtosis": values.mean().item(), "lowest": values.min().item(), "highest": values.max().item()}
    figures |= {"near zero, %": 100 * near_zero(checkpoint)}
    data = tuple(setting for setting in shared if setting.startswith(("seed", "data.root", "data.num_workers")))
    for bits, scales, observer in GRIDS:
        grid = (f"ptq.bits={bits}", f"ptq.weight_scales={scales}", f"ptq.weight_observer={observer}")
        name = f"W{bits} {scales} {observer}"
        place = run_dir.parent / f"ptq_{run_dir.name}_{name.replace(' ', '_')}"
        done = run("ptq", place, *data, f"ckpt={checkpoint}", "ptq=minmax_w4a8", *WEIGHTS_ONLY, *grid)
        figures |= {name: done["top1"], "float": done["top1_fp"]}
    return figures


def train_qat(folder: Path, seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """2-bit nets from the float one; accuracy and kurtosis by arm."""
    shared = (*SETS[args.data], f"seed={seed}", *([f"data.root={args.root}"] if args.root else []))
    recipe = ("quant=ofq_2bit", "loss=kd", "data.augment=none", "optimizer.lr=1e-3", "callbacks.best=null")
    found = {}
    for arm, settings in QAT_ARMS.items():
        run_dir = folder / f"qat_{arm}"
        start = (f"ckpt={folder}/fp/checkpoints/last.ckpt", f"trainer.max_epochs={args.qat_epochs}")
        done = run("train", run_dir, *shared, *recipe, *start, *settings)
        checkpoint = run_dir / "checkpoints" / "last.ckpt"
        product, both = kurtosis_of(checkpoint), kurtosis_of(checkpoint, "both")
        found[arm] = {"top1": done["top1"], "kurtosis": product.mean().item(), "highest": product.max().item(), "all": both.max().item()}
    return found


def table(by_seed: list[dict[str, dict[str, float]]]) -> None:
    """Figures in rows, arms in columns, mean and sample deviation over the seeds."""
    arms = list(by_seed[0])
    print(f"{'':20}" + "".join(f"{arm:>20}" for arm in arms))
    for key in by_seed[0][arms[0]]:
        cells = []
        for arm in arms:
            values = [figures[arm][key] for figures in by_seed]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):8.2f} +- {spread:5.2f}")
        print(f"{key:20}" + "".join(f"{cell:>20}" for cell in cells))


def main() -> None:
    """Run everything that is not there yet, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=sorted(SETS), default="digits")
    parser.add_argument("--root", help="folder of the images")
    parser.add_argument("--epochs", type=int, default=50, help="of the float net")
    parser.add_argument("--fine-epochs", type=int, default=60, help="with and without the term")
    parser.add_argument("--qat-epochs", type=int, default=0, help="of the 2-bit nets; 0 = none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS), metavar="NET", help="of the comparison; float first")
    parser.add_argument("--out", type=Path, default=Path("outputs/kure"))
    args = parser.parse_args()
    logging.disable(logging.INFO)
    folder = (args.out / args.data).absolute()
    table([run_seed(folder / f"seed{seed}", seed, args) for seed in args.seeds])
    if args.qat_epochs:
        table([train_qat(folder / f"seed{seed}", seed, args) for seed in args.seeds])


if __name__ == "__main__":
    main()
