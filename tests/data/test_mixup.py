"""Mixup and cutmix. Oracles: timm's `Mixup` from the same seed, and closed forms on constant images."""

import random

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch.testing import assert_close

from qat.data import BatchMixup, DataSettings, Digits
from qat.data.sampler import isolated_rng
from qat.data.transforms import MIXING_STREAM
from qat.losses import CrossEntropy, StepContext
from tests.data.files import DIGITS
from tests.errors import usage_error
from tests.tiny import randn


def mixing(**changes):
    return BatchMixup(DataSettings(**{**DIGITS, "mixup": 0.8, "cutmix": 1.0, "seed": 3, **changes}))


def batch(n=8, chans=2, size=10):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, chans, size, size + 3, generator=generator), torch.randint(
        10, (n,), generator=generator
    )


@pytest.mark.parametrize(
    ("mixup", "cutmix", "prob"), [(0.8, 0, 1.0), (0, 1.0, 1.0), (0.8, 1.0, 1.0), (0.8, 1.0, 0.5)]
)
def test_images_and_targets_are_timms(mixup, cutmix, prob):
    ours = mixing(mixup=mixup, cutmix=cutmix, mixup_prob=prob, mixup_switch_prob=0.4)
    options = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "prob": prob, "switch_prob": 0.4}
    timms = Mixup(**options, label_smoothing=0.0, num_classes=10)
    images, target = batch()
    for step in range(20):
        found = ours(images, target, epoch=0, step=step, rank=1)
        with isolated_rng(3, step, 1, MIXING_STREAM):
            expected = timms(images.clone(), target)
        assert_close(found[0], expected[0], rtol=0, atol=1e-6)
        assert_close(found[1], expected[1], rtol=0, atol=1e-6)


def test_draws_are_a_function_of_seed_step_and_rank_alone():
    images, target = batch()

    def mixed(seed=3, global_seed=0, **place):
        for seeding in (random.seed, np.random.seed, torch.manual_seed):
            seeding(global_seed)
        return mixing(seed=seed)(images, target, **{"epoch": 0, "step": 5, "rank": 0, **place})[0]

    first = mixed()
    assert torch.equal(mixed(global_seed=1), first)
    assert torch.equal(mixed(epoch=7), first)
    for other in (mixed(seed=4), mixed(step=6), mixed(rank=1)):
        assert not torch.equal(other, first)


def test_generators_and_the_callers_images_stay_as_they_are():
    images, target = batch()
    before = images.clone()
    state = np.random.get_state()[1].copy()
    mixed, _ = mixing()(images, target, epoch=0, step=1)
    assert torch.equal(images, before)
    assert not torch.equal(mixed, before)
    assert np.array_equal(np.random.get_state()[1], state)


def test_nothing_is_mixed_from_the_epoch_on_that_says_so():
    images, target = batch()
    ours = mixing(mixup_off_epoch=2)
    assert ours(images, target, epoch=1, step=0)[1].shape == (8, 10)
    for epoch in (2, 3):
        same, ids = ours(images, target, epoch=epoch, step=0)
        assert same is images
        assert ids is target
    assert mixing()(images, target, epoch=10**6, step=0)[1].shape == (8, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_keep_their_dtype_and_targets_are_float32(dtype):
    images, target = batch()
    mixed, shares = mixing()(images.to(dtype), target, epoch=0, step=2)
    assert mixed.dtype == dtype
    assert shares.dtype == torch.float32
    exact, exact_shares = mixing()(images, target, epoch=0, step=2)
    assert_close(mixed.float(), exact, rtol=0, atol=0.05)
    assert torch.equal(shares, exact_shares)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_in_the_loss_is_timms_smoothing_of_targets(smoothing):
    images, target = batch()
    logits = randn(8, 10, seed=1)
    _, shares = mixing()(images, target, epoch=0, step=4)
    found = CrossEntropy(label_smoothing=smoothing)(
        StepContext(logits, shares, None, torch.nn.Identity())
    )
    timms = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=10)
    with isolated_rng(3, 4, 0, MIXING_STREAM):
        _, smoothed = timms(images.clone(), target)
    assert_close(found, SoftTargetCrossEntropy()(logits, smoothed), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", ["mixup", "cutmix"])
def test_an_odd_batch_size_trains_no_mixed_batches_but_evaluates(alpha):
    data = Digits(**DIGITS, batch_size=25, **{alpha: 1.0})
    with usage_error(
        r"^data\.batch_size=25: must be even",
    ):
        data.batch_mixup()
    assert sum(len(target) for _, target in data.test_dataloader()) == 360
    assert Digits(**DIGITS, batch_size=25).batch_mixup() is None
    (whole,) = Digits(
        **DIGITS, batch_size=1258, **{alpha: 1.0}
    ).train_dataloader()  # one more than there are
    with usage_error(r"^data\.mixup, data\.cutmix: .* 1257$"):
        mixing()(*whole, epoch=0, step=0)
