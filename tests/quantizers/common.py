"""Build quantizers for the tests."""

from qat.quantizers import build_quantizer
from qat.spec import QuantSpec


def build(quantizer, role="input", bits=4, **spec):
    """A quantizer whose scales are not allocated."""
    return build_quantizer(QuantSpec(role, quantizer, bits, **spec))


def allocated(quantizer, x, role="input", bits=4, **spec):
    """A quantizer for inputs like `x` whose scales are NaN."""
    module = build(quantizer, role, bits, **spec)
    module.allocate(x.shape, x.device)
    return module


def calibrated(quantizer, x, role="input", bits=4, **spec):
    """A quantizer with scales from the batch `x`."""
    module = allocated(quantizer, x, role, bits, **spec)
    module.calibrate(x, {})
    return module
