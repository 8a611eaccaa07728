"""Loss terms, composed in config."""

from qat.losses.compose import CompositeLoss, LossTerm, StepContext
from qat.losses.dampening import Dampening
from qat.losses.distillation import Distillation
from qat.losses.features import FeatureDistillation
from qat.losses.kure import Kure
from qat.losses.task import CrossEntropy

__all__ = ["CompositeLoss", "CrossEntropy", "Dampening", "Distillation", "FeatureDistillation", "Kure", "LossTerm", "StepContext"]
