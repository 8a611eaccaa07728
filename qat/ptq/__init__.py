"""Post-training quantization: calibration, and a search over the scales."""

from qat.ptq.calibrate import Calibration, calibrate, in_float
from qat.ptq.observers import Observer

__all__ = ["Calibration", "Observer", "calibrate", "in_float"]
