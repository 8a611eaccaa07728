"""Segmentation with a quantized backbone, in plain PyTorch: discs, squares and triangles on textures, drawn on the fly.

A small ViT of timm (`features_only=True`) and a head of two convolutions are trained in float. From these weights the float net and its
quantized twins, whose backbones `qat.convert` has quantized, take as many steps again, on the same images. All are evaluated on the same
test images.

python examples/segmentation.py --bits 4 2 --steps 200 --seed 0
"""

import argparse
import copy
import math
import tempfile
import time

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat

NAMES = ("background", "disc", "square", "triangle")
SIZE, PATCH, WIDTH, BATCH = 32, 4, 64, 32
TEST_SEED, TEST_IMAGES = 2**32, 512


def rotated(n: int, unit: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Coordinates (n, H, W) about a random point of each image, turned by a random angle, in units of `unit` (n,)."""
    place = torch.rand(2, n, 1, 1, generator=generator) * 1.6 - 0.8
    angle = torch.rand(n, 1, 1, generator=generator) * 2 * math.pi
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, SIZE)], indexing="ij")
    x, y = x - place[0], y - place[1]
    unit = unit[:, None, None]
    return (x * angle.cos() + y * angle.sin()) / unit, (y * angle.cos() - x * angle.sin()) / unit


def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, H, W) and the class of each pixel (n, H, W): waves and noise, two bars of clutter, up to two shapes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    wave, _ = rotated(n, uniform(0.03, 0.15, n), generator)
    image = uniform(-1, 1, n, 3, 1, 1) + uniform(-0.3, 0.3, n, 3, 1, 1) * wave.sin()[:, None]
    label = torch.zeros(n, SIZE, SIZE, dtype=torch.long)
    hues = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    for _ in range(2):
        u, v = rotated(n, uniform(0.04, 0.08, n), generator)
        bar = ((u.abs() < 1) & (v.abs() < 8))[:, None]
        hue = hues[torch.randint(4, (n,), generator=generator)]
        image = torch.where(bar, uniform(-1, 1, n, 3, 1, 1) + 1.5 * hue[:, :, None, None], image)
    for _ in range(2):
        u, v = rotated(n, uniform(0.35, 0.6, n), generator)
        third = 2 * math.pi / 3
        sides = torch.stack([u * math.cos(k * third) + v * math.sin(k * third) for k in range(3)])
        within = torch.stack([
            u.square() + v.square() < 1,
            torch.maximum(u.abs(), v.abs()) < 0.85,
            sides.amax(0) < 0.6,
        ])
        kind = torch.randint(4, (n,), generator=generator)  # 0: none
        inside = within[(kind - 1).clamp(min=0), torch.arange(n)] & (kind > 0)[:, None, None]
        image = torch.where(
            inside[:, None], uniform(-1, 1, n, 3, 1, 1) + 1.5 * hues[kind][:, :, None, None], image
        )
        label = torch.where(inside, kind[:, None, None], label)
    return image + 0.1 * torch.randn(image.shape, generator=generator), label


class Segmenter(nn.Module):
    """A ViT's maps after its second and its last block, and two convolutions that give every pixel of a patch its scores."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {
            "img_size": SIZE,
            "patch_size": PATCH,
            "embed_dim": WIDTH,
            "depth": 4,
            "num_heads": 2,
        }
        self.backbone = timm.create_model(
            "vit_tiny_patch16_224", features_only=True, out_indices=(1, 3), **sizes
        )
        scores = nn.Conv2d(WIDTH, len(NAMES) * PATCH**2, 1)
        self.head = nn.Sequential(
            nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1), nn.GELU(), scores, nn.PixelShuffle(PATCH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to scores (B, classes, H, W)."""
        return self.head(torch.cat(self.backbone(x), dim=1))


def train(net: nn.Module, steps: int, lr: float, seed: int) -> nn.Module:
    """AdamW with a cosine schedule; step i sees the images of (seed, i), whatever the net."""
    keep = qat.no_weight_decay(net)
    groups = [
        {
            "params": [p for name, p in net.named_parameters() if name not in keep],
            "weight_decay": 0.05,
        },
        {"params": [p for name, p in net.named_parameters() if name in keep], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=max(steps, 2), pct_start=0.1
    )
    net.train()
    for step in range(steps):
        image, label = draw(BATCH, seed * 2**20 + step)
        loss = F.cross_entropy(net(image), label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def iou(net: nn.Module) -> Tensor:
    """Intersection over union of each class (classes,) on the test images, in percent."""
    image, label = draw(TEST_IMAGES, TEST_SEED)
    found = torch.cat([net(part).argmax(1) for part in image.split(BATCH)])
    confusion = (
        torch
        .bincount(label.flatten() * len(NAMES) + found.flatten(), minlength=len(NAMES) ** 2)
        .view(len(NAMES), -1)
        .double()
    )
    hits = confusion.diagonal()
    return 100 * hits / (confusion.sum(0) + confusion.sum(1) - hits)


def packed_bytes(net: Segmenter) -> int:
    """Bytes of the backbone's packed file, and of the head's float32 weights."""
    with tempfile.TemporaryDirectory() as folder:
        size = (qat.save_pretrained(net.backbone, folder) / "model.safetensors").stat().st_size
    return size + 4 * sum(p.numel() for p in net.head.parameters())


def main() -> None:
    """Train, quantize, train again, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bits",
        type=int,
        nargs="+",
        default=[4, 2],
        help="of weights and activations; one quantized net for each",
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="in float, and as many again of each net"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and of the training images"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = train(Segmenter(), args.steps, 3e-3, args.seed)
    nets = {"float": copy.deepcopy(start)}
    for bits in args.bits:
        net = copy.deepcopy(start)
        qat.convert(net.backbone, qat.recipe("ofq", bits=bits), input_size=(3, SIZE, SIZE))
        qat.initialize_scales(
            net.backbone, [draw(BATCH, args.seed * 2**20 + step)[0] for step in range(4)]
        )
        nets[f"W{bits}A{bits}"] = net
    print(
        f"{'net':<8}{'mean IoU':>10}"
        + "".join(f"{name:>12}" for name in NAMES)
        + f"{'bytes':>12}{'seconds':>9}"
    )
    for name, net in {"start": start, **nets}.items():
        began = time.perf_counter()
        if name != "start":
            train(net, args.steps, 1e-3, args.seed + 1)
        each = iou(net)
        row = f"{name:<8}{each.mean():>10.2f}" + "".join(f"{value:>12.2f}" for value in each)
        print(f"{row}{packed_bytes(net):>12,}{time.perf_counter() - began:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
