"""Mixup and cutmix of a training batch with timm's `Mixup`, as functions of (seed, step, rank).

Papers: mixup arXiv 1710.09412, cutmix arXiv 1905.04899.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torch import Tensor

from qat.data.sampler import isolated_numpy
from qat.errors import UsageError

if TYPE_CHECKING:
    from qat.data.settings import DataSettings

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
        self._mixup = _BatchedMixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            prob=settings.mixup_prob,
            switch_prob=settings.mixup_switch_prob,
            mode=settings.mixup_mode,
            label_smoothing=0.0,
            num_classes=settings.num_classes,
        )

    def is_on(self, epoch: int) -> bool:
        """False from `mixup_off_epoch` on."""
        return self.off_epoch == 0 or epoch < self.off_epoch

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
        if not self.is_on(epoch):
            return images, target
        if len(images) % 2:
            raise UsageError(f"data.batch_size: mixup and cutmix need an even number of images in a batch, got {len(images)}")
        with isolated_numpy(self.seed, step, rank, STREAM):
            return self._mixup(images.clone(), target)


class _BatchedMixup(Mixup):
    """timm's mixup; its modes `pair` and `elem` in a few operations on the batch, where timm has several for each image.

    timm's also wait for the device, to which they copy the factors. Draws, pixels and targets are timm's.
    """

    def _mix_elem(self, x: Tensor) -> Tensor:
        return self._mix_each(x, *self._draw(x, len(x)))

    def _mix_pair(self, x: Tensor) -> Tensor:
        factors, boxes = self._draw(x, len(x) // 2)
        return self._mix_each(x, np.concatenate([factors, factors[::-1]]), np.concatenate([boxes, boxes[::-1]]))

    def _draw(self, x: Tensor, number: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Per image (n, 2): share of its class, factor of its pixels; and (n, 4): first and last row and column that cutmix replaces."""
        shares, use_cutmix = self._params_per_elem(number)
        boxes = np.zeros((number, 4), dtype=np.int64)
        for i in np.flatnonzero(use_cutmix & (shares != 1)):
            boxes[i], shares[i] = cutmix_bbox_and_lam(x.shape, shares[i], correct_lam=self.correct_lam)
        return np.stack([shares, np.where(use_cutmix, 1, shares)], axis=1).astype(np.float32), boxes

    @staticmethod
    def _mix_each(x: Tensor, factors: NDArray[Any], boxes: NDArray[Any]) -> Tensor:
        """Mix in place; gives the share of each image's own class, (B, 1)."""
        shares, pixels = (torch.from_numpy(factors[:, i].copy()).to(x.device, non_blocking=True) for i in (0, 1))
        top, bottom, left, right = torch.from_numpy(boxes.T.copy()).to(x.device, non_blocking=True)[..., None, None, None]
        rows = torch.arange(x.shape[-2], device=x.device)[:, None]
        columns = torch.arange(x.shape[-1], device=x.device)
        is_replaced = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        opposite, own = x.flip(0), pixels.to(x.dtype)[:, None, None, None]
        x.copy_(torch.where(is_replaced, opposite, opposite.lerp(x, own)))
        return shares[:, None]
