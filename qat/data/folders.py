"""The folder that `data.root` names."""

from __future__ import annotations

from pathlib import Path

from qat.errors import UsageError


def data_folder(root: str | None, holds: str) -> Path:
    """`root` as a path.

    Args:
        root: the setting.
        holds: what a user has to put there, in words.

    Raises:
        UsageError: it is not set, or no folder.
    """
    if root is None:
        raise UsageError(f"data.root is not set: give the folder that holds {holds}")
    if not Path(root).is_dir():
        raise UsageError(f"data.root={root!r}: no such folder")
    return Path(root)
