"""Our Lightning callbacks; `conf/callbacks/` combines them with Lightning's own."""

from qat.callbacks.cga import CGA
from qat.callbacks.ema import EMAWeightAveraging
from qat.callbacks.finite import FiniteCheck
from qat.callbacks.freezing import IterativeFreezing
from qat.callbacks.last import BestCheckpoints, LastCheckpoint
from qat.callbacks.oscillation import Oscillation
from qat.callbacks.preemption import Preemption
from qat.callbacks.progress import EpochLog, GraphSteps, StepLimit, StepSeed

__all__ = [
    "CGA",
    "BestCheckpoints",
    "EMAWeightAveraging",
    "EpochLog",
    "FiniteCheck",
    "GraphSteps",
    "IterativeFreezing",
    "LastCheckpoint",
    "Oscillation",
    "Preemption",
    "StepLimit",
    "StepSeed",
]
