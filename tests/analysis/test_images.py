"""Images that every evaluation sees. Oracle: accuracy and cross-entropy counted here over all images at once."""

import pytest
import torch
from torch.nn import functional as F

from qat.analysis import ImageSet
from qat.data import Digits
from tests import tiny
from tests.analysis.common import image_set

DIGITS = {"image_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "mean": [0.3051], "std": [0.3759]}


def whole(images):
    return (torch.cat(parts) for parts in zip(*images.batches, strict=True))


@pytest.mark.parametrize("batch", [1, 7, 24, 100])
def test_scores_do_not_depend_on_batches(batch):
    net, images = tiny.vit(), image_set(24, batch)
    found, (x, target) = images.score(net), whole(images)
    logits = tiny.logits(net, x)
    assert found["top1"] == pytest.approx(100 * (logits.argmax(-1) == target).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)


def test_logits_in_half_precision_are_counted_in_single():
    logits = torch.tensor([[300.0, 0.0], [0.0, 1.0]], dtype=torch.float16)
    images = ImageSet([(torch.zeros(2, 1, 2, 2), torch.tensor([1, 1]))], "test")
    found = images.score(lambda _: logits)
    assert (found["top1"], found["loss"]) == (50.0, pytest.approx((300 + torch.log1p(torch.exp(torch.tensor(-1.0)))).item() / 2))


@pytest.mark.parametrize(
    ("count", "expected"), [(4, [0, 90, 180, 270]), (7, [i * 360 // 7 for i in range(7)]), (360, range(360)), (9999, range(360))]
)
def test_a_sample_is_spread_over_its_split(count, expected):
    data = Digits(**DIGITS, batch_size=64)
    images = ImageSet([*data.sample("test", count)], "test")
    everything = torch.cat([x for x, _ in data.test_dataloader()])
    x, target = whole(images)
    assert torch.equal(x, everything[list(expected)])
    assert torch.equal(target, torch.cat([t for _, t in data.test_dataloader()])[list(expected)])
