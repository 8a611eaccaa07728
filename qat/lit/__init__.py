"""Lightning: the module, its optimizer and schedule, its teacher."""

from qat.lit.module import QATModule
from qat.lit.optim import build_optimizer, cosine_schedule, parameter_groups, scaled_lr
from qat.lit.teacher import Teacher

__all__ = ["QATModule", "Teacher", "build_optimizer", "cosine_schedule", "parameter_groups", "scaled_lr"]
