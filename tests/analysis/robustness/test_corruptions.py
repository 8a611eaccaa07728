"""Worse images. Oracle: values by hand, scipy's Gaussian filter, and moments of the noise."""

import math

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.testing import assert_close

from qat.analysis.robustness.corruptions import (
    KINDS,
    LEVELS,
    SEVERITIES,
    Corruption,
    blur,
    brightened,
    corrupted,
    flattened,
    jpeg,
    level_of,
    pixelated,
)

NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")


def pixels(n=3, channels=1, height=8, width=8, seed=0):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 5, 7), (1, 2, 2)])
def test_images_of_any_size_keep_shape_and_range(kind, shape):
    x = pixels(2, *shape)
    before = x.clone()
    for severity in SEVERITIES:
        found = corrupted(x, kind, severity)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        assert found.min() >= 0
        assert found.max() <= 1
        assert x[0].numel() < 10 or not torch.equal(found, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_looks_the_same_in_any_batch(kind):
    x = pixels(5, 3)
    apart = torch.cat([corrupted(part, kind, 3) for part in x.split([1, 3, 1])])
    # One image at a time, torch may sum in another order.
    assert_close(corrupted(x, kind, 3), apart, rtol=0, atol=0 if kind in NOISES else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_more_severe_is_further_from_the_image(kind):
    x = blur(pixels(4, 3, 32, 32), 2.0)
    far = [(corrupted(x, kind, severity) - x).abs().mean().item() for severity in SEVERITIES]
    assert far == sorted(far)
    assert far[0] < far[-1]
    assert len(LEVELS[kind]) == len(SEVERITIES)


@pytest.mark.parametrize("kind", NOISES)
def test_noise_depends_on_seed_and_image(kind):
    x = pixels(2, 1, 16, 16)
    same = torch.cat([x[:1], x[:1], x[1:]])
    found = corrupted(same, kind, 5, seed=1)
    assert torch.equal(found[0], found[1])
    assert not torch.equal((found - same)[0], (found - same)[2])
    assert torch.equal(found, corrupted(same, kind, 5, seed=1))
    assert not torch.equal(found, corrupted(same, kind, 5, seed=2))


def test_kinds_do_not_share_their_noise():
    x = torch.full((1, 1, 64, 64), 0.5)
    noise = [(corrupted(x, kind, 3) - x).flatten() for kind in NOISES]
    correlations = torch.corrcoef(torch.stack(noise))[*torch.triu_indices(3, 3, 1)]
    assert correlations.abs().max() < 4 / 64  # four standard deviations


def test_gaussian_noise_has_its_standard_deviation():
    found = corrupted(torch.full((1, 1, 200, 200), 0.5), "gaussian_noise", 1) - 0.5
    assert found.mean().abs() < 4 * 0.08 / 200
    assert found.std().item() == pytest.approx(0.08, rel=0.02)


def test_shot_noise_counts_photons():
    x = torch.full((1, 1, 200, 200), 0.25)
    found = corrupted(x, "shot_noise", 2)
    assert_close(found * 25, (found * 25).round())
    # A Poisson number has its mean as variance.
    assert found.mean().item() == pytest.approx(0.25, abs=4 * 0.1 / 200)
    assert found.var().item() == pytest.approx(0.25 / 25, rel=0.05)
    assert corrupted(torch.zeros(1, 1, 8, 8), "shot_noise", 5).abs().max() == 0


def test_impulse_noise_strikes_its_share_black_or_white():
    x = torch.full((1, 1, 200, 200), 0.5)
    found = corrupted(x, "impulse_noise", 4)
    shares = [(found == value).float().mean().item() for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.085, 0.83, 0.085], abs=4 * math.sqrt(0.17 * 0.83) / 200)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("shape", [(32, 32), (12, 20)])
def test_blur_is_a_gaussian_filter(sigma, shape):
    x = pixels(1, 3, *shape)
    radius = min(math.ceil(4 * sigma), min(shape) - 1)
    # scipy's radius; `mirror` does not repeat the edge.
    expected = gaussian_filter(x.double().numpy(), sigma, axes=(2, 3), radius=radius, mode="mirror")
    assert_close(blur(x, sigma), torch.from_numpy(expected).float(), rtol=0, atol=1e-6)


def test_a_blur_scales_with_the_image_and_shows_on_small_ones():
    assert level_of("gaussian_blur", 3, 224) == 3.0
    assert level_of("gaussian_blur", 5, 448) == 12.0
    assert level_of("gaussian_blur", 3, 32) == 0.7
    assert level_of("contrast", 3, 32) == level_of("contrast", 3, 224) == 0.2


def test_brightness_by_hand():
    colour = torch.tensor([0.2, 0.4, 0.1]).view(1, 3, 1, 1)
    # The value goes from 0.4 to 0.7, the other channels along with it.
    assert_close(brightened(colour, 0.3), torch.tensor([0.35, 0.7, 0.175]).view(1, 3, 1, 1))
    assert brightened(torch.zeros(1, 3, 1, 1), 0.3).flatten().tolist() == pytest.approx([0.3] * 3)
    assert brightened(torch.tensor([0.9, 0.45, 0.0]).view(1, 3, 1, 1), 0.5).flatten().tolist() == pytest.approx([1.0, 0.5, 0.0])
    grey = pixels(2)
    assert_close(brightened(grey, 0.25), (grey + 0.25).clamp(max=1))


def test_contrast_by_hand():
    x = torch.tensor([[0.0, 1.0], [0.5, 0.5]]).expand(1, 3, 2, 2) * torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1)
    expected = torch.tensor([[0.4, 0.6], [0.5, 0.5]]).expand(1, 3, 2, 2) * torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1)
    assert_close(flattened(x, 0.2), expected)


def test_pixelate_by_hand():
    x = torch.arange(16.0).view(1, 1, 4, 4) / 16
    blocks = torch.tensor([[2.5, 4.5], [10.5, 12.5]]) / 16
    assert torch.equal(pixelated(x, 0.5)[0, 0], blocks.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(pixelated(x, 0.1), torch.full_like(x, 7.5 / 16))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_flat_images_and_loses_detail(channels):
    flat = torch.full((2, channels, 16, 16), 128 / 255)
    assert torch.equal(jpeg(flat, 7), flat)
    x = pixels(2, channels, 16, 16)
    errors = [(jpeg(x, quality) - x).abs().mean().item() for quality in (95, 25, 7)]
    assert errors[0] < errors[1] < errors[2]
    assert_close(jpeg(x, 10) * 255, (jpeg(x, 10) * 255).round())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_images_are_changed_as_pixels(kind, channels):
    mean, std = [0.3, 0.4, 0.5][:channels], [0.2, 0.25, 0.5][:channels]
    shape = (-1, 1, 1)
    x = (pixels(3, channels) - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    seen = (x * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)
    found = Corruption(kind, 3, mean, std, seed=4)(x)
    back = found * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    assert_close(back, corrupted(seen, kind, 3, seed=4), rtol=0, atol=1e-6)
