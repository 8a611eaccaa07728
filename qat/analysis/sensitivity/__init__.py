"""What each part of a net loses at fewer bits, and which bits a budget buys."""

from qat.analysis.sensitivity.sensitivity import Sensitivity

__all__ = ["Sensitivity"]
