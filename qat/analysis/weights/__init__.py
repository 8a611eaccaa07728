"""Distributions of weights and activations, and advice on them."""

from qat.analysis.weights.weights import WeightAnalysis

__all__ = ["WeightAnalysis"]
