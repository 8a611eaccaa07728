"""Lightning callbacks of our own; `conf/callbacks/` composes them with Lightning's."""

from qat.callbacks.cga import CGA
from qat.callbacks.epoch_log import EpochLog
from qat.callbacks.finite import StopOnNaN
from qat.callbacks.freezing import IterativeFreezing
from qat.callbacks.last import LastCheckpoint
from qat.callbacks.oscillation import Oscillation
from qat.callbacks.progress import terminal_progress
from qat.callbacks.step_seed import StepSeed
from qat.callbacks.throughput import Throughput

__all__ = [
    "CGA",
    "EpochLog",
    "IterativeFreezing",
    "LastCheckpoint",
    "Oscillation",
    "StepSeed",
    "StopOnNaN",
    "Throughput",
    "terminal_progress",
]
