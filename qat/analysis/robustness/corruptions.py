"""Images made worse: noise, blur, light, coarse pixels. Kinds and severities: Hendrycks and Dietterich, arXiv 1903.12261.

The levels are those of their code for ImageNet-C (224 pixels). Lengths shrink with the image; for small images a blur is at least that of
their CIFAR-10-C (32 pixels), where the scaled one would do nothing.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

# Levels of severity 1 to 5.
LEVELS: dict[str, tuple[float, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "shot_noise": (60, 25, 12, 5, 3),  # photons of a white pixel
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of black and white values
    "gaussian_blur": (1, 2, 3, 4, 6),  # standard deviation in pixels of 224
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to HSV's value
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # share of the contrast that is left
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # share of the side that is left
    "jpeg": (25, 18, 15, 10, 7),  # quality
}
KINDS = tuple(LEVELS)
SEVERITIES = (1, 2, 3, 4, 5)
JPEG_CHANNELS = (1, 3)
_FULL_SIDE = 224
# Blur of CIFAR-10-C, pixels.
_LEAST_BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)
# Beyond this many standard deviations a Gaussian is left out.
_BLUR_REACH = 4.0

Draw = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Corruption:
    """One kind of damage to images as a net sees them; for `Point.images`.

    What is random is a function of the seed, the kind and the image alone: neither batches nor devices matter, and equal images look the
    same.

    Attributes:
        kind: one of `KINDS`.
        severity: 1 to 5.
        mean, std: per channel: how the images were normalised.
        seed: of all noise.
    """

    kind: str
    severity: int
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    seed: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) in, such images out."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        pixels = (images * std + mean).clamp(0, 1)
        return (corrupted(pixels, self.kind, self.severity, self.seed) - mean) / std


def level_of(kind: str, severity: int, side: int) -> float:
    """The strength in force for images of a side; of a blur in their pixels."""
    level = LEVELS[kind][severity - 1]
    return level if kind != "gaussian_blur" else max(level * side / _FULL_SIDE, _LEAST_BLUR[severity - 1])


def corrupted(pixels: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Damaged pixels.

    Args:
        pixels: (B, C, H, W) in [0, 1], any number of channels (jpeg: 1 or 3).
        kind: one of `KINDS`.
        severity: 1 to 5.
        seed: of the noise.

    Returns:
        The shape, dtype and range of `pixels`.
    """
    level = level_of(kind, severity, min(pixels.shape[-2:]))
    if kind in _NOISES:
        return _each(pixels, functools.partial(_NOISES[kind], level=level), f"{seed} {kind}").clamp(0, 1)
    return _SMOOTH[kind](pixels, level).clamp(0, 1)


def _each(pixels: Tensor, noise: Draw, salt: str) -> Tensor:
    """Images one by one, each with a generator seeded by what it shows; drawn on the CPU."""
    there = pixels.detach().float().cpu()
    made = [
        noise(image, torch.Generator().manual_seed(zlib.crc32(image.contiguous().numpy(), zlib.crc32(salt.encode())))) for image in there
    ]
    return torch.stack(made).to(pixels)


def gaussian_noise(image: Tensor, generator: torch.Generator, level: float) -> Tensor:
    """Normal noise on every value of (C, H, W)."""
    return image + level * torch.randn(image.shape, generator=generator)


def shot_noise(image: Tensor, generator: torch.Generator, level: float) -> Tensor:
    """Photons counted: a Poisson number with expectation `level * image`, over `level`."""
    return torch.poisson(image * level, generator) / level


def impulse_noise(image: Tensor, generator: torch.Generator, level: float) -> Tensor:
    """Salt and pepper: a share `level` of the values is 0 or 1, with equal chances."""
    struck, white = torch.rand((2, *image.shape), generator=generator)
    return torch.where(struck < level, (white < 0.5).to(image.dtype), image)


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, mirrored at the edges; `sigma` in pixels."""
    side = 2 * min(math.ceil(_BLUR_REACH * sigma), min(pixels.shape[-2:]) - 1) + 1
    # One direction after the other: for a wide blur many times faster than both at once.
    for kernel in ([side, 1], [1, side]):
        pixels = functional.gaussian_blur(pixels, kernel, [sigma, sigma])
    return pixels


def brightened(pixels: Tensor, added: float) -> Tensor:
    """Add to the value of HSV, the largest channel; hue and saturation stay."""
    value = pixels.amax(1, keepdim=True)
    wanted = (value + added).clamp(0, 1)
    return torch.where(value > 0, pixels * (wanted / value.clamp(min=torch.finfo(pixels.dtype).tiny)), wanted)


def flattened(pixels: Tensor, share: float) -> Tensor:
    """A share of the contrast around the mean of each channel of each image."""
    mean = pixels.mean((-2, -1), keepdim=True)
    return (pixels - mean) * share + mean


def pixelated(pixels: Tensor, share: float) -> Tensor:
    """Area averages on a share of the side (whole pixels, one at least), each blown up to a block."""
    sides = pixels.shape[-2:]
    small = [max(int(side * share), 1) for side in sides]
    coarse = torch.nn.functional.interpolate(pixels, size=small, mode="area")
    return torch.nn.functional.interpolate(coarse, size=sides, mode="nearest-exact")


def jpeg(pixels: Tensor, quality: float) -> Tensor:
    """Written as JPEG files and read again, 8 bits a value."""
    whole = (pixels.detach().float().cpu() * 255).round().to(torch.uint8)
    return functional.jpeg(whole, int(quality)).to(pixels) / 255


_NOISES: dict[str, Callable[..., Tensor]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
}
_SMOOTH: dict[str, Callable[[Tensor, float], Tensor]] = {
    "gaussian_blur": blur,
    "brightness": brightened,
    "contrast": flattened,
    "pixelate": pixelated,
    "jpeg": jpeg,
}
