"""DoReFa's weights. Oracle: golden cases, and values by hand."""

import torch
from torch.testing import assert_close

from qat.analysis.requantize import requantize
from qat.functional.dorefa import dorefa
from qat.quantizers import LSQ
from qat.spec import QuantSpec
from tests import golden
from tests.tiny import randn

PTQ = "ptq_goldens.npz"


@golden.parametrize(PTQ, r"(kure/)?dorefa/w\d")
def test_goldens(case):
    w, bits = golden.tensor(PTQ, "kure/in/normal"), int(case[-1])
    for name, expected in golden.below(PTQ, case).items():
        ratio = float(name.partition("/")[0].removeprefix("ratio"))
        assert_close(dorefa(w, bits, ratio), expected, rtol=0, atol=1e-6)


def test_zeros_stay():
    assert torch.equal(dorefa(torch.zeros(3), 2, 2.0), torch.zeros(3))


def test_deviates_from_reference_ratios_are_of_the_step_and_codes_are_clamped():
    w = randn(4, 500)
    # There a ratio is one of the inverse step, and 2 bits have more than 4 levels once it is above 1.
    assert len(dorefa(w, 2, 1.3).unique()) > 4
    quantizer = LSQ(QuantSpec("weight", "lsq", 2, axis=0))
    quantizer.scale = torch.nn.Parameter(torch.full((4,), 0.5))
    finer, coarser = (
        requantize(quantizer, w, resize=resize).unique()
        for resize in (lambda step: step / 2, lambda step: 2 * step)
    )
    assert finer.tolist() == [-0.5, -0.25, 0.0, 0.25]
    assert coarser.tolist() == [-2.0, -1.0, 0.0, 1.0]
