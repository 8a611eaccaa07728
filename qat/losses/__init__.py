"""Loss terms, composed in config."""

from qat.losses.compose import CompositeLoss, LossTerm
from qat.losses.context import StepContext
from qat.losses.dampening import Dampening
from qat.losses.distillation import Distillation
from qat.losses.task import CrossEntropy

__all__ = ["CompositeLoss", "CrossEntropy", "Dampening", "Distillation", "LossTerm", "StepContext"]
