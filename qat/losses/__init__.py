"""Loss terms, composed in config."""

from qat.losses.compose import CompositeLoss, LossTerm, StepContext
from qat.losses.dampening import Dampening
from qat.losses.kure import Kure
from qat.losses.outputs import CrossEntropy, Distillation, FeatureDistillation

__all__ = ["CompositeLoss", "CrossEntropy", "Dampening", "Distillation", "FeatureDistillation", "Kure", "LossTerm", "StepContext"]
