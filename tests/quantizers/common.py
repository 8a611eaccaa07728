"""Building blocks of the quantizer tests."""

from qat.quantizers import build_quantizer
from qat.spec import QuantSpec


def build(quantizer, role="input", bits=4, **spec):
    """A quantizer without state."""
    return build_quantizer(QuantSpec(role, quantizer, bits, **spec))


def allocated(quantizer, x, role="input", bits=4, **spec):
    """A quantizer shaped for `x`, scales NaN."""
    made = build(quantizer, role, bits, **spec)
    made.allocate(x.shape, x.device)
    return made


def calibrated(quantizer, x, role="input", bits=4, **spec):
    """A quantizer with scales from one batch."""
    made = allocated(quantizer, x, role, bits, **spec)
    made.calibrate(x, {})
    return made
