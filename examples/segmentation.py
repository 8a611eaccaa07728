"""Segmentation with a quantized backbone, in plain PyTorch: shapes on textures, drawn on the fly.

A small ViT of timm (`features_only=True`) and a head of two convolutions are trained in float. From
these weights, the float model and copies with backbones quantized by `qat.convert` train for as
many steps again, all on the same new images. All are evaluated on the same test images.

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
SIZE = 32
PATCH = 4
WIDTH = 64
BATCH = 32
TEST_SEED = 2**32
TEST_IMAGES = 512
# Colours (R, G, B) that the shapes of each class tend to.
HUES = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers in [low, high)."""
    return low + (high - low) * torch.rand(*shape, generator=generator)


def rotated(unit: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Coordinates (n, H, W) around a random point of each image, rotated by a random angle.

    Args:
        unit: (n,), length of a unit of the coordinates; an image has a width of 2.
        generator: source of random numbers.
    """
    n = len(unit)
    centre = torch.rand(2, n, 1, 1, generator=generator) * 1.6 - 0.8
    angle = torch.rand(n, 1, 1, generator=generator) * 2 * math.pi
    side = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(side, side, indexing="ij")
    x = x - centre[0]
    y = y - centre[1]
    unit = unit.view(n, 1, 1)
    u = (x * angle.cos() + y * angle.sin()) / unit
    v = (y * angle.cos() - x * angle.sin()) / unit
    return u, v


def colors(hue: Tensor, generator: torch.Generator) -> Tensor:
    """Random colours (n, 3, 1, 1) near hues (n, 3)."""
    return uniform(-1, 1, (len(hue), 3, 1, 1), generator) + 1.5 * hue.view(-1, 3, 1, 1)


def draw_bar(image: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, 3, H, W) with a bar, which belongs to the background."""
    n = len(image)
    u, v = rotated(uniform(0.04, 0.08, (n,), generator), generator)
    is_inside = (u.abs() < 1) & (v.abs() < 8)
    hue = HUES[torch.randint(4, (n,), generator=generator)]
    return torch.where(is_inside.unsqueeze(1), colors(hue, generator), image)


def draw_shape(image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 3, H, W) and classes of pixels (n, H, W) with one more shape, or with none."""
    n = len(image)
    u, v = rotated(uniform(0.35, 0.6, (n,), generator), generator)
    third = 2 * math.pi / 3
    sides = torch.stack([u * math.cos(k * third) + v * math.sin(k * third) for k in range(3)])
    disc = u.square() + v.square() < 1
    square = torch.maximum(u.abs(), v.abs()) < 0.85
    triangle = sides.amax(0) < 0.6
    shapes = torch.stack([disc, square, triangle])
    kind = torch.randint(4, (n,), generator=generator)  # 0 = no shape
    shape_of_kind = shapes[(kind - 1).clamp(min=0), torch.arange(n)]
    pixel_kind = kind.view(n, 1, 1)
    is_inside = shape_of_kind & (pixel_kind > 0)
    image = torch.where(is_inside.unsqueeze(1), colors(HUES[kind], generator), image)
    label = torch.where(is_inside, pixel_kind, label)
    return image, label


def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw images with waves and noise, two bars as clutter, and up to two shapes.

    Returns:
        Images (n, 3, H, W) and the class of each pixel (n, H, W).
    """
    generator = torch.Generator().manual_seed(seed)
    wave, _ = rotated(uniform(0.03, 0.15, (n,), generator), generator)
    color = uniform(-1, 1, (n, 3, 1, 1), generator)
    contrast = uniform(-0.3, 0.3, (n, 3, 1, 1), generator)
    image = color + contrast * wave.sin().unsqueeze(1)
    label = torch.zeros(n, SIZE, SIZE, dtype=torch.long)
    for _ in range(2):
        image = draw_bar(image, generator)
    for _ in range(2):
        image, label = draw_shape(image, label, generator)
    return image + 0.1 * torch.randn(image.shape, generator=generator), label


class Segmenter(nn.Module):
    """Two convolutions on the feature maps of a ViT after its second and its last block.

    They compute the scores of all pixels of a patch.
    """

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
            nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1),
            nn.GELU(),
            scores,
            nn.PixelShuffle(PATCH),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to scores (B, classes, H, W)."""
        return self.head(torch.cat(self.backbone(x), dim=1))


def train(net: nn.Module, steps: int, lr: float, seed: int) -> nn.Module:
    """Train with AdamW and a cosine schedule; step i has the images of (seed, i) for any model."""
    not_decayed_names = qat.no_weight_decay(net)
    decayed = []
    not_decayed = []
    for name, parameter in net.named_parameters():
        (not_decayed if name in not_decayed_names else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": 0.05},
        {"params": not_decayed, "weight_decay": 0.0},
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
    predicted = torch.cat([net(part).argmax(1) for part in image.split(BATCH)])
    pairs = label.flatten() * len(NAMES) + predicted.flatten()
    counts = torch.bincount(pairs, minlength=len(NAMES) ** 2)
    confusion = counts.view(len(NAMES), -1).double()
    hits = confusion.diagonal()
    return 100 * hits / (confusion.sum(0) + confusion.sum(1) - hits)


def packed_bytes(net: Segmenter) -> int:
    """Bytes of the backbone's packed file, and of the head's float32 weights."""
    with tempfile.TemporaryDirectory() as folder:
        size = (qat.save_pretrained(net.backbone, folder) / "model.safetensors").stat().st_size
    return size + 4 * sum(p.numel() for p in net.head.parameters())


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bits_help = "of weights and activations; one quantized model for each"
    steps_help = "in float, and as many again for each model"
    seed_help = "of the weights and of the training images"
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2], help=bits_help)
    parser.add_argument("--steps", type=int, default=200, help=steps_help)
    parser.add_argument("--seed", type=int, default=0, help=seed_help)
    return parser.parse_args()


def main() -> None:
    """Train, quantize, train again, and print a table."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    start = train(Segmenter(), args.steps, 3e-3, args.seed)
    nets = {"start": start, "float": copy.deepcopy(start)}
    for bits in args.bits:
        net = copy.deepcopy(start)
        qat.convert(net.backbone, qat.recipe("ofq", bits=bits), input_size=(3, SIZE, SIZE))
        batches = [draw(BATCH, args.seed * 2**20 + step)[0] for step in range(4)]
        qat.initialize_scales(net.backbone, batches)
        nets[f"W{bits}A{bits}"] = net
    class_names = "".join(f"{name:>12}" for name in NAMES)
    print(f"{'net':<8}{'mean IoU':>10}{class_names}{'bytes':>12}{'seconds':>9}")
    for name, net in nets.items():
        start_time = time.perf_counter()
        if name != "start":
            train(net, args.steps, 1e-3, args.seed + 1)
        class_iou = iou(net)
        values = "".join(f"{value:>12.2f}" for value in class_iou)
        row = f"{name:<8}{class_iou.mean():>10.2f}{values}{packed_bytes(net):>12,}"
        print(f"{row}{time.perf_counter() - start_time:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
