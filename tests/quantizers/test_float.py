"""The identity quantizer. Oracle: its input."""

import pytest

from qat.utils.validate import FLOAT_BITS
from tests.quantizers.common import allocated
from tests.tiny import randn


def test_hands_on_the_very_tensor():
    x = randn(2, 3)
    assert allocated("float", x, bits=FLOAT_BITS)(x) is x


def test_has_no_codes():
    x = randn(2, 3)
    with pytest.raises(TypeError, match="float quantizer of role 'input' has no integer codes"):
        allocated("float", x, bits=FLOAT_BITS).codes(x)
