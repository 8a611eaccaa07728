"""Accuracy under other step sizes, bit-widths, quantizers and corrupted images."""

from qat.analysis.robustness.robustness import Robustness

__all__ = ["Robustness"]
