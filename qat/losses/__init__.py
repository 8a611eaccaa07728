"""Loss terms, from which the config composes a loss."""

from qat.losses.compose import CompositeLoss, LossTerm, StepContext
from qat.losses.outputs import CrossEntropy, Distillation, FeatureDistillation
from qat.losses.weights import Dampening, Kure

__all__ = [
    "CompositeLoss",
    "CrossEntropy",
    "Dampening",
    "Distillation",
    "FeatureDistillation",
    "Kure",
    "LossTerm",
    "StepContext",
]
