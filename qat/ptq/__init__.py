"""Post-training quantization: calibration, compensation, reconstruction, a search over scales."""

from qat.ptq.calibrate import Calibration, calibrate, in_float

__all__ = ["Calibration", "calibrate", "in_float"]
