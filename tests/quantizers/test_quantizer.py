"""Properties of all built-in quantizers."""

import dataclasses

import pytest
import torch

import qat
from qat.quantizers import build_quantizer
from tests.quantizers.common import allocated, calibrated
from tests.tiny import randn

WITH_SCALES = ["lsq", "minmax"]


@pytest.mark.parametrize("quantizer", WITH_SCALES)
@pytest.mark.parametrize("offsets", ["none", "before", "both"])
def test_nan_until_initialized(quantizer, offsets):
    x = randn(2, 3, 4)
    made = allocated(quantizer, x, axis=-2, offsets=offsets)
    assert made(x).isnan().all()
    made.calibrate(x, {})
    assert made(x).isfinite().all()


@pytest.mark.parametrize("quantizer", WITH_SCALES)
@pytest.mark.parametrize(("axis", "n"), [(-1, 4), (-2, 3), (1, 3), (None, 1)])
def test_one_scale_per_slice(quantizer, axis, n):
    made = allocated(quantizer, randn(2, 3, 4), axis=axis)
    assert made.scale.shape == (n,)
    assert made.num_stored_scales == made.num_scales(torch.Size((7, 3, 4))) == n


@pytest.mark.parametrize("quantizer", WITH_SCALES)
def test_deviates_from_reference_an_axis_never_means_the_batch(quantizer):
    # There a position-wise quantizer on (B, C) has one scale per image of the batch.
    made = allocated(quantizer, randn(8, 4), axis=-2)
    assert made.axis is None
    assert made.num_stored_scales == 1
    made.calibrate(randn(8, 4), {})
    assert made(randn(5, 4)).shape == (5, 4)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "statsq", "minmax_dynamic", "float"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offsets", ["none", "both"])
def test_shape_and_dtype_of_the_input_come_out(quantizer, dtype, offsets):
    x = randn(2, 3, 4).to(dtype)
    out = calibrated(quantizer, x, axis=-2, offsets=offsets)(x)
    assert (out.shape, out.dtype) == (x.shape, dtype)


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "minmax_dynamic", "statsq", "float"])
@pytest.mark.parametrize(
    ("role", "shape"), [("image", (2, 3, 8, 8)), ("input", (2, 5, 8)), ("weight", (6, 8))]
)
def test_deviates_from_reference_no_device_is_asked_for(quantizer, role, shape):
    # "meta" stands for an accelerator: a net may be there before it is converted.
    recipe = qat.recipe("ofq", weight_quantizer="lsq", act_quantizer="lsq", bits=8)
    if role == "weight":
        spec = recipe.weight_spec("block")
    else:
        spec = recipe.act_spec(role, "stem" if role == "image" else "block")
    made = build_quantizer(dataclasses.replace(spec, quantizer=quantizer))
    made.allocate(torch.Size(shape), torch.device("meta"))
    assert {t.device.type for t in (*made.parameters(), *made.buffers())} <= {"meta"}
