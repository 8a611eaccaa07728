"""Weights that oscillate between two codes during training."""

from qat.analysis.oscillation.oscillation import OscillationAnalysis

__all__ = ["OscillationAnalysis"]
