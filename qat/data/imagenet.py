"""ImageNet (ILSVRC 2012) as an image folder."""

from __future__ import annotations

import re
from pathlib import Path

from timm.data import ImageNetInfo

from qat.data.imagefolder import ImageFolder, classes_folder
from qat.errors import UsageError


class ImageNet(ImageFolder):
    """`root/train/<wnid>/*` and `root/{val,validation}/<wnid>/*`; class ids of pretrained heads are those of the sorted wnids.

    Validation images alone are enough to evaluate a net.
    """

    def classes(self, root: Path) -> list[str]:
        """Sorted wnids.

        Raises:
            UsageError: a folder is not named by its wnid: other names have another order, and a pretrained head would be wrong.
        """
        names = super().classes(root)
        for name in names:
            if not re.fullmatch(r"n\d{8}", name):
                raise UsageError(
                    f"{classes_folder(root) / name}: is no wnid like n01440764; other class names are read by data=imagefolder"
                )
        return names

    def named_classes(self) -> list[str] | None:
        """In words, as timm has them for a wnid; without `data.root` for all 1000."""
        info = ImageNetInfo()
        known = info.label_names()
        words = {wnid: info.label_name_to_description(wnid) for wnid in known}
        wnids = super().named_classes() or (known if self.settings.num_classes == len(known) else [])
        return [words.get(wnid, wnid) for wnid in wnids] or None
