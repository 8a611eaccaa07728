"""Bytes, multiply-accumulates and bit operations of nets."""

from qat.analysis.cost.cost import CostAnalysis

__all__ = ["CostAnalysis"]
