"""Post-training quantization: calibration, and a search over the scales."""

from qat.ptq.calibrate import Calibration, calibrate, in_float

__all__ = ["Calibration", "calibrate", "in_float"]
