"""Mixup and cutmix of a training batch with timm's `Mixup`, as functions of (seed, step, rank).

Papers: mixup arXiv 1710.09412, cutmix arXiv 1905.04899.
"""

from __future__ import annotations

import torch
from timm.data.mixup import Mixup
from torch import Tensor

from qat.data.sampler import isolated_rng
from qat.data.settings import DataSettings
from qat.errors import UsageError

# Keeps these draws apart from those of augmentation, whose numbers are (seed, epoch, index).
STREAM = 0x6D6978


class BatchMixup:
    """Blends each image of a batch with the one opposite (first with last), and their classes.

    Smoothing of labels is the loss's: cross-entropy smooths probabilities as timm smooths one-hot classes.

    Args:
        settings: with `mixup*`, `cutmix`, `num_classes` and `seed`.
    """

    def __init__(self, settings: DataSettings) -> None:
        self.seed, self.off_epoch = settings.seed, settings.mixup_off_epoch
        self._mixup = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            prob=settings.mixup_prob,
            switch_prob=settings.mixup_switch_prob,
            mode=settings.mixup_mode,
            label_smoothing=0.0,
            num_classes=settings.num_classes,
        )

    def __call__(self, images: Tensor, target: Tensor, *, epoch: int, step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Mix one batch; `images` stays as it is.

        Args:
            images: (B, C, H, W), float, B even.
            target: (B,), class ids.
            epoch: that is under way.
            step: number of the batch since training began.
            rank: of the process.

        Returns:
            Images of the same dtype and probabilities (B, K), float32; the arguments themselves in an epoch without mixing.

        Raises:
            UsageError: B is odd.
        """
        if self.off_epoch and epoch >= self.off_epoch:
            return images, target
        if len(images) % 2:
            raise UsageError(f"data.batch_size: mixup and cutmix need an even number of images in a batch, got {len(images)}")
        exact = torch.promote_types(images.dtype, torch.float32)  # timm gives shares of classes the dtype of the images
        with isolated_rng(self.seed, step, rank, STREAM):
            mixed, shares = self._mixup(images.to(exact, copy=True), target)
        return mixed.to(images.dtype), shares
