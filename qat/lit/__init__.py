"""The LightningModule, and its optimizer, schedule and teacher, which do not need Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qat.lit.optim import (
    build_optimizer,
    cosine_schedule,
    parameter_groups,
    scaled_lr,
    scheduler_factory,
)
from qat.lit.teacher import Teacher

if TYPE_CHECKING:
    from qat.lit.module import QATModule as QATModule

__all__ = [
    "QATModule",
    "Teacher",
    "build_optimizer",
    "cosine_schedule",
    "parameter_groups",
    "scaled_lr",
    "scheduler_factory",
]


def __getattr__(name: str) -> Any:
    if name != "QATModule":
        raise AttributeError(f"module 'qat.lit' has no attribute {name!r}")
    from qat.lit.module import QATModule  # imported only here, because it needs Lightning

    return QATModule
