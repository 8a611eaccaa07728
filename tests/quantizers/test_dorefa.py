"""DoReFa as a module. Oracle: the pure function, and the gradient of the formula without its rounding."""

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.functional.dorefa import dorefa, squash
from qat.losses.weights import Dampening
from tests import tiny
from tests.errors import usage_error
from tests.losses.common import step
from tests.quantizers.common import allocated

RECIPE = qat.recipe("deploy_w4a8", weight_quantizer="dorefa")


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5), (4, 3, 2, 2)])
def test_values_codes_and_grid_agree(bits, shape):
    w = 0.1 * tiny.randn(*shape)
    made = allocated("dorefa", w, role="weight", bits=bits)
    codes, grid = made.codes(w), made.grid(w)
    assert_close(made(w), dorefa(w, bits))
    assert torch.equal(grid.dequantize(codes), made(w))
    assert torch.equal(grid.to_code_coordinates(w).round(), codes.float())
    assert grid.qmin <= codes.min()
    assert codes.max() <= grid.qmax
    assert [end.item() for end in grid.ends()] == pytest.approx([-1, 1])


def test_the_gradient_passes_the_rounding_and_nothing_else():
    w, upstream = tiny.randn(4, 6).requires_grad_(), tiny.randn(4, 6, seed=1)
    allocated("dorefa", w, role="weight", bits=2)(w).backward(upstream)
    (expected,) = torch.autograd.grad(squash(w), w, upstream)
    assert_close(w.grad, expected)


def test_losses_in_the_unit_of_the_weights_refuse_it():
    net = qat.convert(tiny.vit(), RECIPE, input_size=tiny.SIZE)
    with usage_error("max_bits=4: "):
        Dampening()(step(net))


def test_activations_have_no_such_quantizer():
    with usage_error(r"^quant\.act_quantizer='dorefa': must be one of "):
        qat.recipe("lsq", act_quantizer="dorefa")
