"""The smallest net of each timm family that still has all its parts, for tests and for docs/models.md."""

from dataclasses import dataclass, field

import pytest
import timm
import torch

import qat
from tests.tiny import randn, shake

_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
_SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


class Convertible:
    """A small model by `build()`, for square images of `size` pixels."""

    preset = "ofq"

    def images(self, n=2, seed=0):
        """Random images with both signs."""
        return randn(n, 3, self.size, self.size, seed=seed)

    @property
    def input_size(self):
        """What `convert` wants to know."""
        return (3, self.size, self.size)

    def converted(self, recipe=None, **knobs):
        """A quantized net, scales NaN: by a recipe, or by the preset of this name."""
        recipe = recipe or self.preset
        if isinstance(recipe, str):
            recipe = qat.recipe(recipe, **knobs)
        return qat.convert(self.build(), recipe, input_size=self.input_size)

    def quantized(self, recipe=None, **knobs):
        """A quantized net with scales from data."""
        return qat.initialize_scales(self.converted(recipe, **knobs), [self.images(4)])


@dataclass(frozen=True)
class Family(Convertible):
    """A family of timm.

    Attributes:
        title: what people call it, with the names that timm gives its members.
        name: of one member in timm.
        kwargs: that make it small.
        size: of its images.
        qkr: whether query-key reparameterization holds.
    """

    title: str
    name: str
    kwargs: dict = field(default_factory=dict)
    size: int = 32
    qkr: bool = True

    def build(self, **changes):
        """The net in eval mode, every parameter drawn so that none is zero."""
        torch.manual_seed(0)
        return shake(
            timm.create_model(self.name, **{"num_classes": 10, **self.kwargs, **changes})
        ).eval()

    @property
    def attention(self):
        """The best form of attention that holds."""
        return "qkr" if self.qkr else "standard"


def _vit(title, name, size=32, qkr=True, **changes):
    return Family(title, name, {"img_size": size, **_VIT, **changes}, size, qkr)


ATTENTIONS = {
    "vit": _vit("ViT (`vit_*`), CLIP", "vit_tiny_patch16_224"),
    "vit_reg": _vit("ViT with register tokens (`vit_*_reg*`)", "vit_betwixt_patch16_reg4_gap_256"),
    "vit_qk_norm": _vit(
        "ViT with normalized queries and keys", "vit_tiny_patch16_224", qkr=False, qk_norm=True
    ),
    "deit": _vit("DeiT (`deit_*`)", "deit_tiny_patch16_224"),
    "deit_distilled": _vit(
        "DeiT, distilled (`deit_*_distilled_*`)", "deit_tiny_distilled_patch16_224"
    ),
    "deit3": _vit("DeiT-III (`deit3_*`)", "deit3_small_patch16_224"),
    "dinov2": _vit("DINOv2 (`vit_*_dinov2`)", "vit_small_patch14_reg4_dinov2", patch_size=16),
    "dinov2_giant": _vit(
        "DINOv2 giant (`vit_giant_*_dinov2`)", "vit_giant_patch14_dinov2", patch_size=16
    ),
    "siglip": _vit("SigLIP (`vit_*_siglip_*`)", "vit_base_patch16_siglip_224"),
    "relpos": _vit(
        "ViT with relative positions (`vit_relpos_*`, `vit_srelpos_*`)",
        "vit_relpos_medium_patch16_cls_224",
    ),
    "eva02": _vit(
        "EVA, EVA-02 (`eva_*`, `eva02_*`)", "eva02_tiny_patch14_224", qkr=False, patch_size=16
    ),
    "dinov3": _vit("DINOv3 (`vit_*_dinov3`)", "vit_small_patch16_dinov3", qkr=False),
    "pe": _vit("Perception Encoder (`vit_pe_*`)", "vit_pe_core_tiny_patch16_384", qkr=False),
    "qwen3": _vit("Qwen3's encoder (`qwen3_vit_*`)", "qwen3_vit_88m", qkr=False),
    "deepseek": _vit(
        "DeepSeek's encoder (`deepseek_vit_*`)",
        "deepseek_vit_412m",
        qkr=False,
        patch_size=16,
        depth=1,
    ),
    "beit": _vit("BEiT (`beit_*`, `beitv2_*`)", "beit_base_patch16_224"),
    "swin": Family("Swin (`swin_*`)", "swin_tiny_patch4_window7_224", {"img_size": 32, **_SWIN}),
    "swinv2": Family(
        "Swin v2 (`swinv2_*`)", "swinv2_tiny_window8_256", {"img_size": 32, **_SWIN}, qkr=False
    ),
}
GENERIC = {
    "swinv2_cr": Family(
        "Swin v2, cr (`swinv2_cr_*`)", "swinv2_cr_tiny_224", {"img_size": 32, **_SWIN}
    ),
    "convnext": Family(
        "ConvNeXt (`convnext_*`)",
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)},
    ),
    "levit": Family(
        "LeViT (`levit_*`)",
        "levit_128s",
        {
            "img_size": 64,
            "embed_dim": (16, 24, 32),
            "key_dim": 8,
            "num_heads": (2, 3, 4),
            "depth": (1, 1, 1),
        },
        64,
    ),
    "xcit": _vit("XCiT (`xcit_*`)", "xcit_nano_12_p16_224"),
    "cait": _vit("CaiT (`cait_*`)", "cait_xxs24_224"),
    "mobilevit": Family("MobileViT (`mobilevit_*`)", "mobilevit_xxs"),
    "hiera": Family(
        "Hiera (`hiera_*`)",
        "hiera_tiny_224",
        {"img_size": 64, "embed_dim": 16, "stages": (1, 1, 1, 1)},
        64,
    ),
    "pvt_v2": Family(
        "PVT v2 (`pvt_v2_*`)",
        "pvt_v2_b0",
        {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 32), "num_heads": (1, 1, 2, 2)},
    ),
}
FAMILIES = ATTENTIONS | GENERIC
# One of each form of attention; the others take the same paths.
OFTEN = {"vit", "deit_distilled", "dinov3", "beit", "swin", "swinv2", "siglip", "xcit"}


def families():
    """Names as parameters of a test: those that are not run at every change are marked."""
    return [
        name if name in OFTEN else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES
    ]
