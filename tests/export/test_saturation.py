"""Products of codes on processors that add two products of uint8 and int8 in 16 bits. Oracle: those sums, in NumPy."""

import numpy as np
import onnx
import pytest

import qat
from qat.export.onnx_file import OnnxSettings, to_onnx
from qat.export.runtimes import ONNXRUNTIME, open_session
from tests import tiny
from tests.export.graphs import constants_of, makers_of, nodes_of
from tests.export.test_onnx_file import DEPLOY
from tests.model.frozen.test_freeze import RECIPES, made


@pytest.fixture(scope="module")
def net_8bit():
    """A net whose weights use the whole range of their codes."""
    net = made(DEPLOY["deploy_w8a8"])
    for module in net.modules():
        if getattr(module, "weight_quantizer", None) is not None:
            module.weight_quantizer.scale.data /= 4
    return net


def products(model, images):
    """Codes of the factors of every integer product, as a session on images computes them."""
    makers = makers_of(model)
    factors = []
    for node in nodes_of(model, "MatMul"):
        sources = [makers.get(name) for name in node.input]
        is_integer = all(
            source is not None and source.op_type == "DequantizeLinear" for source in sources
        )
        if is_integer:
            factors.append([source.input[0] for source in sources])
    names = sorted({name for pair in factors for name in pair})
    constants = constants_of(model)
    computed = [name for name in names if name not in constants]
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    session = open_session(shown.SerializeToString(), ONNXRUNTIME)
    values = constants | dict(zip(computed, session(computed, images.numpy()), strict=True))
    return [(values[left], values[right]) for left, right in factors]


def saturated(left, right):
    """How many sums of two neighbouring products do not fit 16 bits."""
    if left.dtype != np.uint8 or right.dtype != np.int8:
        return 0
    left, right = left.astype(np.int32), right.astype(np.int32)
    count = 0
    for k in range(0, left.shape[-1] - 1, 2):
        sums = (
            left[..., :, k, None] * right[..., k, None, :]
            + left[..., :, k + 1, None] * right[..., k + 1, None, :]
        )
        count += int(((sums > 32767) | (sums < -32768)).sum())
    return count


def count_saturated(net, cpu):
    images = tiny.images(4, 1)
    factors = products(to_onnx(qat.freeze(net), images[:1], OnnxSettings(cpu=cpu)), images)
    assert len(factors) > 4
    return sum(saturated(left, right) for left, right in factors)


@pytest.mark.long
@pytest.mark.parametrize("name", [*DEPLOY, "ofq_2bit"])
def test_no_product_saturates_in_a_file_for_any_processor(name):
    assert count_saturated(made((RECIPES | DEPLOY)[name]), "any") == 0


@pytest.mark.long
def test_codes_of_the_whole_range(net_8bit):
    assert count_saturated(net_8bit, "any") == 0
    assert count_saturated(net_8bit, "fast") > 0
