"""What post-training quantization might do and does not: accuracy on CIFAR-10's validation images with it and without.

`PYTHONPATH=. python benchmarks/ptq_trials.py --root CIFAR10 --bits 4`. The net is that of results/START, the recipe `ptq=compensate_w4a4`
at the bits asked for, the images 1000 of training; "compensated" is behind `qat.ptq.compensate`.

- AdaLog (arXiv 2407.12951): probabilities on powers of 2^(-1/tau), and zero; tau and the largest value give the least error of probs @ v.
- Basis (as in SpinQuant, arXiv 2405.16406): the residual stream in another orthogonal basis, one that keeps the mean, which LayerNorm
  takes away: the float net's function stays, and nothing is added at run time. `--save FILE` keeps that net, to train from.
- Hadamard (QuaRot, arXiv 2404.00456): what enters the second Linear of an MLP is rotated in blocks of 128, its weights likewise.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.data import Cifar10
from qat.model.checkpoint import read_checkpoint
from qat.model.convert import convert
from qat.model.sites import iter_quantizers
from qat.ptq.calibrate import calibrate
from qat.ptq.compensate import compensate

START = Path(__file__).resolve().parents[1] / "results" / "START" / "float-seed0.pt"
TAUS, HIGHEST = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5), (1.0, 0.9, 0.8, 0.7, 0.5)
BLOCK = 128
SHRINKS = torch.linspace(1, 0.2, 41).tolist()
LOOKED_AT = 3  # batches of 100 images that the trials' own grids come from
Trial = Callable[[nn.Module, list[Tensor], int], str]


@torch.no_grad()
def seen(net: nn.Module, module: nn.Module, batches: list[Tensor]) -> Tensor:
    """What enters a module."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for batch in batches:
        net(batch)
    handle.remove()
    return torch.cat(found)


def log_grid(p: Tensor, tau: float, highest: float, bits: int) -> Tensor:
    """Powers of 2^(-1/tau) of `highest`; the last code is zero."""
    code = torch.round(-tau * torch.log2((p / highest).clamp(min=1e-12))).clamp(0, 2**bits - 1)
    return torch.where(code == 2**bits - 1, 0.0, highest * torch.exp2(-code / tau))


def adalog(net: nn.Module, batches: list[Tensor], bits: int) -> str:
    """Probabilities of all attentions on their best log grids."""
    sites = {site.role + site.name.rpartition(".")[0]: site.quantizer for site in iter_quantizers(net)}
    errors = []
    for attention in (key[len("probs") :] for key in list(sites) if key.startswith("probs")):
        quantizer = sites["probs" + attention]
        p, v = seen(net, quantizer, batches), seen(net, sites["v" + attention], batches)
        v = v.unflatten(-1, (p.shape[1], -1)).transpose(1, 2)
        before = float((quantizer(p) @ v - p @ v).square().mean() / (p @ v).var())
        grids = [
            functools.partial(log_grid, tau=tau, highest=share * float(p.max()), bits=bits)
            for tau, share in itertools.product(TAUS, HIGHEST)
        ]
        after, best = min(((float((grid(p) @ v - p @ v).square().mean() / (p @ v).var()), n) for n, grid in enumerate(grids)))
        quantizer.forward = grids[best]
        errors.append(f"{before:.4f}->{after:.4f}")
    return "error of probs @ v, of its variance: " + " ".join(errors)


def rotated(x: Tensor) -> Tensor:
    """Its last dimension in blocks of `BLOCK`, each times Hadamard's matrix."""
    matrix = torch.ones(1, 1)
    while len(matrix) < BLOCK:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (x.unflatten(-1, (-1, BLOCK)) @ (matrix / BLOCK**0.5)).flatten(-2)


def affine(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """On the uniform grid from `low` to `high` with a zero point."""
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    zero = torch.round(-low / step)
    return ((torch.round(x / step) + zero).clamp(0, 2**bits - 1) - zero) * step


def symmetric_rows(weight: Tensor, bits: int) -> Tensor:
    """Each row on the symmetric grid of its least squared error."""
    top = 2 ** (bits - 1)
    steps = [weight.abs().amax(1, keepdim=True) * share / (top - 1) for share in SHRINKS]
    candidates = torch.stack([(weight / step).round().clamp(-top, top - 1) * step for step in steps])
    best = (candidates - weight).square().sum(2, keepdim=True).argmin(0, keepdim=True)
    return candidates.gather(0, best.expand(1, *weight.shape))[0]


def hadamard(net: nn.Module, batches: list[Tensor], bits: int) -> str:
    """The second Linear of every MLP on what is rotated."""
    errors = []
    for block in net.blocks:  # type: ignore[union-attr]
        linear: nn.Linear = block.mlp.fc2  # type: ignore[union-attr,assignment]
        x = rotated(seen(net, linear, batches))
        ranges = [(x.min() * share, x.max() * share) for share in SHRINKS]
        low, high = min(ranges, key=lambda ends: float((affine(x, *ends, bits) - x).square().mean()))

        def forward(x: Tensor, linear: nn.Linear = linear, low: Tensor = low, high: Tensor = high) -> Tensor:
            return F.linear(affine(rotated(x), low, high, bits), symmetric_rows(rotated(linear.weight.detach()), bits), linear.bias)

        errors.append(f"{float((affine(x, low, high, bits) - x).square().mean() / x.var()):.4f}")
        linear.forward = forward  # type: ignore[method-assign]
    return "error of fc2's input, of its variance: " + " ".join(errors)


@torch.no_grad()
def in_another_basis(net: nn.Module) -> nn.Module:
    """The same function: every writer to the residual stream is turned, every reader takes in its norm and turns back; float64 between."""
    width: int = net.embed_dim  # type: ignore[assignment]
    mean = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    draws = torch.randn(2, width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rest = torch.linalg.qr(torch.cat([mean, draws[0, :, 1:]], 1))[0][:, 1:]
    turn = mean @ mean.T + rest @ torch.linalg.qr(draws[1, 1:, 1:])[0] @ rest.T

    def write(layer: nn.Module) -> None:
        layer.weight.copy_((turn @ layer.weight.double().flatten(1)).view_as(layer.weight))
        layer.bias.copy_(turn @ layer.bias.double())

    def read(layer: nn.Module, norm: nn.Module) -> None:
        layer.bias.add_((layer.weight.double() @ norm.bias.double()).float())
        layer.weight.copy_((layer.weight.double() * norm.weight.double()) @ turn.T)
        norm.weight.fill_(1)
        norm.bias.zero_()

    write(net.patch_embed.proj)
    net.pos_embed.copy_(net.pos_embed.double() @ turn.T)
    for block in net.blocks:  # type: ignore[union-attr]
        read(block.attn.qkv, block.norm1)
        read(block.mlp.fc1, block.norm2)
        write(block.attn.proj)
        write(block.mlp.fc2)
    read(net.head, net.fc_norm)
    return net


@torch.no_grad()
def top1(net: nn.Module, data: Cifar10) -> float:
    """Of the validation images, in percent."""
    hits = [net(images).argmax(1) == labels for images, labels in data.val_dataloader()]
    return 100 * float(torch.cat(hits).float().mean())


def main() -> None:
    """Print a line for every trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of CIFAR-10")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--save", help="file for the net in another basis")
    args = parser.parse_args()
    meta = read_checkpoint(START).meta
    if args.save:
        turned = in_another_basis(qat.load(START))
        qat.save(turned, args.save, model=meta["model"]["name"], model_kwargs=meta["model"]["kwargs"], data=meta["data"])
        return
    stored = {key: value for key, value in meta["data"].items() if key != "_target_"}
    data = Cifar10(**{**stored, "root": args.root, "calibration_images": 1000, "num_workers": 0})
    batches = list(data.calibration_batches(100))
    grid = {"placement": "inputs", "method": "compensate", "weight_signed": True, "weight_observer": "mse", "act_observer": "mse"}
    outer = {"stem_bits": 8, "head_bits": 8, "outer_act_bits": 8}
    recipe = qat.PtqRecipe(bits=args.bits, act_bits=args.bits, **grid, **outer)
    trials: dict[str, Trial] = {"none": lambda *_: "", "basis": lambda *_: "", "AdaLog": adalog, "Hadamard": hadamard}
    for name, trial in trials.items():
        reference = (in_another_basis(qat.load(START)) if name == "basis" else qat.load(START)).eval()
        net = convert(copy.deepcopy(reference), recipe, input_size=data.input_size)
        calibrate(net, batches)
        said = trial(net, batches[:LOOKED_AT], args.bits)
        calibrated = top1(net, data)
        compensate(net, reference, batches)
        print(f"W{args.bits}A{args.bits} {name}: calibrated {calibrated:.2f}, compensated {top1(net, data):.2f} {said}", flush=True)


if __name__ == "__main__":
    main()
