"""ImageNet (ILSVRC 2012) as an image folder."""

from __future__ import annotations

import re
from pathlib import Path

from qat.data.imagefolder import ImageFolder
from qat.errors import UsageError


class ImageNet(ImageFolder):
    """`root/train/<wnid>/*` and `root/{val,validation}/<wnid>/*`; class ids of pretrained heads are those of the sorted wnids."""

    def classes(self, root: Path) -> list[str]:
        """Sorted wnids.

        Raises:
            UsageError: a folder is not named by its wnid: other names have another order, and a pretrained head would be wrong.
        """
        names = super().classes(root)
        for name in names:
            if not re.fullmatch(r"n\d{8}", name):
                raise UsageError(f"{root / 'train' / name}: is no wnid like n01440764; other class names are read by data=imagefolder")
        return names
