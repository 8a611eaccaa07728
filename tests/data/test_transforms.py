"""Augmentation. Oracles: closed forms on images with known pixels."""

import numpy as np
import torch
from torch.testing import assert_close

from qat.data.image_data import DataSettings
from qat.data.sampler import isolated_rng
from qat.data.transforms import eval_transform, train_transform


def settings(chans=1, **changes):
    fixed = {"image_size": 8, "patch_size": 4, "in_chans": chans, "num_classes": 10, "mean": [0.25] * chans, "std": [0.5] * chans}
    return DataSettings(**{**fixed, **changes})


def test_evaluation_scales_and_normalises_each_channel():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[2, 5] = (255, 51, 0)
    transform = eval_transform(settings(3, mean=[0.0, 0.2, 0.5], std=[1.0, 0.5, 0.25]))
    out = transform(image)
    assert not transform.is_random
    assert out.dtype == torch.float32
    assert_close(out[:, 2, 5], torch.tensor([1.0, 0.0, -2.0]), rtol=0, atol=1e-6)
    assert_close(out[:, 0, 0], torch.tensor([0.0, -0.4, -2.0]), rtol=0, atol=1e-6)


def test_none_is_the_evaluation_transform():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    transform = train_transform(settings(augment="none"))
    assert not transform.is_random
    assert torch.equal(transform(image), eval_transform(settings())(image))


def test_light_shifts_by_an_eighth_or_what_is_asked_for_and_flips():
    # One bright pixel in the middle: it can only move by one, and change columns 3 and 4 when flipped.
    image = np.zeros((8, 8, 1), dtype=np.uint8)
    image[3, 3] = 255

    def places(hflip, **more):
        transform = train_transform(settings(augment="light", hflip=hflip, **more))
        found = set()
        for i in range(300):
            with isolated_rng(i):
                found.add(tuple((transform(image)[0] > 0).nonzero()[0].tolist()))
        return found

    assert places(0.0) == {(r, c) for r in (2, 3, 4) for c in (2, 3, 4)}
    assert places(1.0) == {(r, 7 - c) for r in (2, 3, 4) for c in (2, 3, 4)}
    assert places(0.0, shift=2) == {(r, c) for r in range(1, 6) for c in range(1, 6)}
    assert places(1.0, shift=0) == {(3, 4)}


def test_timm_runs_on_grey_and_colour_images():
    rng = np.random.default_rng(0)
    for chans in (1, 3):
        image = rng.integers(0, 256, (8, 8, chans), dtype=np.uint8)
        transform = train_transform(settings(chans, augment="timm"))
        seen = []
        for i in range(200):  # every operation of RandAugment comes up
            with isolated_rng(i):
                seen.append(transform(image))
        assert all(out.shape == (chans, 8, 8) for out in seen)
        assert all(out.isfinite().all() for out in seen)
        assert torch.stack(seen).std(0).min() > 0


def test_timm_flips_as_often_as_it_is_told():
    # Bright on the left: on average over crops and colours it stays there, unless every image is flipped.
    image = np.zeros((8, 8, 1), dtype=np.uint8)
    image[:, :4] = 255
    left_minus_right = {}
    for hflip in (0.0, 1.0):
        transform = train_transform(settings(augment="timm", hflip=hflip))
        total = torch.zeros(8, 8)
        for i in range(200):
            with isolated_rng(i):
                total += transform(image)[0]
        left_minus_right[hflip] = (total[:, :4].mean() - total[:, 4:].mean()).item() / 200
    assert left_minus_right[0.0] > 0.3
    assert left_minus_right[1.0] < -0.3
