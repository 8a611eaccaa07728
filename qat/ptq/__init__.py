"""Post-training quantization: calibration, compensation, reconstruction, and scale search."""

from qat.ptq.calibrate import Calibration, calibrate, in_float

__all__ = ["Calibration", "calibrate", "in_float"]
