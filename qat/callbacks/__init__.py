"""Lightning callbacks of our own; `conf/callbacks/` composes them with Lightning's."""

from qat.callbacks.best import BestCheckpoint
from qat.callbacks.cga import CGA
from qat.callbacks.compiling import CompileWatch
from qat.callbacks.early_stop import EarlyStopping
from qat.callbacks.ema import EMAWeightAveraging
from qat.callbacks.epoch_log import EpochLog
from qat.callbacks.finite import FaultGuard
from qat.callbacks.freezing import IterativeFreezing
from qat.callbacks.last import LastCheckpoint
from qat.callbacks.oscillation import Oscillation
from qat.callbacks.preemption import Preemption
from qat.callbacks.progress import terminal_progress
from qat.callbacks.step_limit import StepLimit
from qat.callbacks.step_seed import StepSeed
from qat.callbacks.stopwatch import Stopwatch
from qat.callbacks.throughput import Throughput

__all__ = [
    "CGA",
    "BestCheckpoint",
    "CompileWatch",
    "EMAWeightAveraging",
    "EarlyStopping",
    "EpochLog",
    "FaultGuard",
    "IterativeFreezing",
    "LastCheckpoint",
    "Oscillation",
    "Preemption",
    "StepLimit",
    "StepSeed",
    "Stopwatch",
    "Throughput",
    "terminal_progress",
]
