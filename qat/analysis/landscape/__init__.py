"""The loss around a net, on a plane of its scales or weights."""

from qat.analysis.landscape.landscape import Landscape

__all__ = ["Landscape"]
