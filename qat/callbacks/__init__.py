"""Lightning callbacks of our own; `conf/callbacks/` composes them with Lightning's."""

from qat.callbacks.epoch_log import EpochLog
from qat.callbacks.last import LastCheckpoint
from qat.callbacks.progress import terminal_progress
from qat.callbacks.step_seed import StepSeed
from qat.callbacks.throughput import Throughput

__all__ = ["EpochLog", "LastCheckpoint", "StepSeed", "Throughput", "terminal_progress"]
