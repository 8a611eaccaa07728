"""One scale for a feature map against one per column, on a small Swin at 2 bits and scikit-learn's digits: `make map-scales`.

Per seed: a float net, then from its weights a 2-bit net for each choice of `map_scales`. Prints loss at conversion, then top-1 % and loss
of 397 held-out digits after training. Four seeds take about 8 minutes on one quiet core.
"""

from __future__ import annotations

import argparse
import copy

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import qat

BATCH, HELD_OUT, WEIGHT_DECAY = 64, 397, 0.05
FLOAT_LR, QUANT_LR = 3e-3, 1e-3
Split = tuple[Tensor, Tensor]


def digits() -> tuple[Split, Split]:
    """Normalised images (n, 1, 8, 8) and classes, for training and held out."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    images, target = (images - images.mean()) / images.std(), torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, train = order[-HELD_OUT:], order[:-HELD_OUT]
    return (images[train], target[train]), (images[held_out], target[held_out])


def swin(seed: int) -> nn.Module:
    """Two stages of two blocks: maps of 8 x 8 and 4 x 4, windows of 4 x 4."""
    torch.manual_seed(seed)
    shape = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=8, patch_size=1, in_chans=1, num_classes=10, **shape)


def fit(net: nn.Module, split: Split, epochs: int, lr: float, seed: int) -> nn.Module:
    """AdamW, one cycle of the learning rate; weights of two and more dimensions decay."""
    images, target = split
    groups = [[p for p in net.parameters() if (p.ndim > 1) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": WEIGHT_DECAY}, {"params": groups[1], "weight_decay": 0.0}], lr=lr)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH)[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), target[batch]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def judge(net: nn.Module, split: Split) -> tuple[float, float]:
    """Top-1 in percent, and cross-entropy."""
    logits = net.eval()(split[0])
    return (logits.argmax(1) == split[1]).float().mean().item() * 100, F.cross_entropy(logits, split[1]).item()


def main(seeds: int, float_epochs: int, epochs: int) -> None:
    """Print one line a seed and choice."""
    train, held_out = digits()
    for seed in range(seeds):
        plain = fit(swin(seed), train, float_epochs, FLOAT_LR, seed)
        print(f"seed {seed}  float   top-1 {judge(plain, held_out)[0]:.2f}", flush=True)
        for map_scales in ("tensor", "column"):
            net = qat.convert(copy.deepcopy(plain), qat.recipe("ofq", bits=2, map_scales=map_scales), input_size=(1, 8, 8))
            _, before = judge(qat.initialize_scales(net, [train[0][:256]]), held_out)
            top1, loss = judge(fit(net, train, epochs, QUANT_LR, seed), held_out)
            print(
                f"seed {seed}  {map_scales}  loss at conversion {before:.2f}, after training top-1 {top1:.2f} loss {loss:.3f}", flush=True
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("seeds", 4), ("float-epochs", 20), ("epochs", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    main(**vars(parser.parse_args()))
