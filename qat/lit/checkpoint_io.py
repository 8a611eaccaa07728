"""Checkpoints written atomically, read without unpickling anything but plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from qat.errors import UsageError
from qat.files import write_torch

PREVIOUS = {"last.ckpt": "last.prev.ckpt"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """A reader of the path sees the old file or the new one, never half of one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside the path, flush to the disk, rename; the `last.ckpt` that is replaced stays as `last.prev.ckpt`."""
        try:
            write_torch(path, checkpoint, previous=PREVIOUS.get(Path(path).name))
        except (OSError, RuntimeError) as error:  # torch has a RuntimeError for a full disk
            reason = " ".join(str(error).split())
            raise UsageError(f"{path} cannot be written ({reason}); the checkpoint that was there is intact") from error

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: FBT001  (Lightning's signature)
        """Read plain data and tensors; `weights_only` is always on."""
        return torch.load(path, map_location=map_location, weights_only=True)
