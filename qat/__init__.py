"""Quantize vision transformers of timm or Transformers, with or without training.

Names are loaded on first use, so that commands answer `--help` without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat import functional as functional
    from qat import ptq as ptq
    from qat.errors import UsageError as UsageError
    from qat.export.onnx_file import export_onnx as export_onnx
    from qat.interop import load_ofq_checkpoint as load_ofq_checkpoint
    from qat.model.convert import convert as convert
    from qat.model.freeze import freeze as freeze
    from qat.model.pretrained import from_pretrained as from_pretrained
    from qat.model.pretrained import push_to_hub as push_to_hub
    from qat.model.pretrained import save_pretrained as save_pretrained
    from qat.model.ptq_spec import PtqRecipe as PtqRecipe
    from qat.model.report import conversion_report as conversion_report
    from qat.model.scales import assert_ready as assert_ready
    from qat.model.scales import initialize_scales as initialize_scales
    from qat.model.sites import Site as Site
    from qat.model.sites import iter_quantizers as iter_quantizers
    from qat.model.sites import no_weight_decay as no_weight_decay
    from qat.model.start import load_float as load_float
    from qat.model.storage import load as load
    from qat.model.storage import save as save
    from qat.model.transform import transform as transform
    from qat.nn.attention import set_execution as set_execution
    from qat.spec import QuantRecipe as QuantRecipe
    from qat.spec import QuantSpec as QuantSpec
    from qat.spec import recipe as recipe

__version__ = "0.1.0"

_NAMES = {
    "qat.errors": ("UsageError",),
    "qat.export.onnx_file": ("export_onnx",),
    "qat.interop": ("load_ofq_checkpoint",),
    "qat.model.storage": ("load", "save"),
    "qat.model.convert": ("convert",),
    "qat.model.freeze": ("freeze",),
    "qat.model.pretrained": ("from_pretrained", "push_to_hub", "save_pretrained"),
    "qat.model.ptq_spec": ("PtqRecipe",),
    "qat.model.report": ("conversion_report",),
    "qat.model.scales": ("assert_ready", "initialize_scales"),
    "qat.model.start": ("load_float",),
    "qat.model.sites": ("Site", "iter_quantizers", "no_weight_decay"),
    "qat.model.transform": ("transform",),
    "qat.nn.attention": ("set_execution",),
    "qat.spec": ("QuantRecipe", "QuantSpec", "recipe"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*sorted(_HOME), "functional", "ptq"]  # noqa: PLE0604  (names only)


def __getattr__(name: str) -> Any:
    if name in {"functional", "ptq"}:
        return importlib.import_module(f"qat.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
