"""Checkpoints written atomically, read without unpickling anything but plain data, and only if they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from qat.errors import UsageError
from qat.utils.files import read_torch, write_torch

PREVIOUS = {"last.ckpt": "last.prev.ckpt"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """A reader of the path sees the old file or the new one, never half of one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside the path, flush to the disk, rename; the `last.ckpt` that is replaced stays as `last.prev.ckpt`."""
        try:
            write_torch(path, checkpoint, previous=PREVIOUS.get(Path(path).name))
        except (OSError, RuntimeError) as error:
            if "DataLoader worker" in str(error):  # torch raises that wherever the process is when one of them dies
                raise
            reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
            raise UsageError(f"{path} cannot be written ({reason}); the checkpoint that was there is intact") from error

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: FBT001  (Lightning's signature)
        """Read plain data and tensors of a file whose checksums fit; `weights_only` is always on."""
        try:
            checkpoint: dict[str, Any] = read_torch(path, map_location=map_location)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror or error})") from error
        return checkpoint
