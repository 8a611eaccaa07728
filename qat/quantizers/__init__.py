"""Quantizers as modules; most of them call functions of `qat.functional`."""

from qat.quantizers.affine import Affine, DynamicMinMax, MinMax
from qat.quantizers.block_floats import BlockFloat, FloatGrid
from qat.quantizers.dorefa import DoReFa, SquashedGrid
from qat.quantizers.fp8 import Fp8, Fp8Grid
from qat.quantizers.grid import Grid, UniformGrid
from qat.quantizers.log2 import Log2
from qat.quantizers.lsq import LSQ, AutoSignLSQ
from qat.quantizers.quantizer import Float, Quantizer
from qat.quantizers.registry import build_quantizer, register
from qat.quantizers.seq import SEQ
from qat.quantizers.shifted import Shifted
from qat.quantizers.statsq import ActStatsQ, StatsQ, StatsQRMS

__all__ = [
    "LSQ",
    "SEQ",
    "ActStatsQ",
    "Affine",
    "AutoSignLSQ",
    "BlockFloat",
    "DoReFa",
    "DynamicMinMax",
    "Float",
    "FloatGrid",
    "Fp8",
    "Fp8Grid",
    "Grid",
    "Log2",
    "MinMax",
    "Quantizer",
    "Shifted",
    "SquashedGrid",
    "StatsQ",
    "StatsQRMS",
    "UniformGrid",
    "build_quantizer",
    "register",
]
