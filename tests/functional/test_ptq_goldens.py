"""Post-training quantization against Evol-Q's own code. Oracle: tests/goldens/ptq_goldens.npz, made by running it."""

import numpy as np
import torch
from torch.testing import assert_close

from qat import functional as F
from qat.functional import evolution
from tests import golden

PTQ = "ptq_goldens.npz"
EXACT = {"rtol": 1e-6, "atol": 1e-7}
ACTIVATIONS = {"acts", "pos"}


def load(*keys):
    return [golden.tensor(PTQ, key) for key in keys]


def flat(key):
    return golden.tensor(PTQ, key).float().reshape(-1)


def width(kind):
    """Bits and sign of a name like `uint4`."""
    return int(kind[-1]), kind.startswith("int")


@golden.parametrize(PTQ, r"obs/.*")
def test_observer(case):
    _, method, kind, name, mode = case.split("/")
    x = golden.tensor(PTQ, f"in/{name}")
    batches = list(x) if name in ACTIVATIONS else [x]
    axis = None if mode == "layer_wise" else -1 if name in ACTIVATIONS else 0
    bits, signed = width(kind)
    state = None
    for batch in batches:
        state = F.observe(state, batch, axis, method)
    scale, zero_point = F.affine_from_state(
        state, batches[-1], bits, signed=signed, axis=axis, method=method
    )
    assert_close(scale, flat(f"{case}/scale"), **EXACT)
    assert torch.equal(zero_point, flat(f"{case}/zero_point").expand_as(zero_point))
    if len(batches) == 1 and method != "ema":
        assert_close(
            F.affine_scale(x, bits, signed, axis, method), (scale, zero_point), rtol=0, atol=0
        )


def fake_quantized(x, prefix, kind, scale):
    """Codes and values of a case; the in-place variant has to agree with the other one."""
    zero = flat(f"{prefix}/zero_point")
    axis = None if scale.numel() == 1 else 0
    bounds = F.code_range(width(kind)[0], signed=width(kind)[1])
    values = F.fake_quantize_affine(x, scale, zero, *bounds, axis)
    assert torch.equal(F.fake_quantize_affine_(x.clone(), scale, zero, *bounds, axis), values)
    return F.affine_codes(x, scale, zero, *bounds, axis).float(), values


@golden.parametrize(PTQ, r"uniform/u?int\d/(acts|w_lin|w_conv)(/bcorr)?")
def test_fake_quantize_affine(case):
    _, kind, name, *corrected = case.split("/")
    x = golden.tensor(PTQ, f"in/{name}")
    x = x[2] if name == "acts" else x
    codes, values = fake_quantized(x, case, kind, flat(f"{case}/scale"))
    assert torch.equal(codes, golden.tensor(PTQ, f"{case}/int").float())
    values = F.correct_mean_and_std(values, x) if corrected else values
    assert_close(values, golden.tensor(PTQ, f"{case}/dequant"), **EXACT)


@golden.parametrize(PTQ, "perturb")
def test_perturbed_weight(case):
    w = golden.tensor(PTQ, "in/w_lin")
    scale0, zero_point = F.affine_scale(w, 4, False, 0, "omse")
    assert_close(scale0, flat(f"{case}/scale0"), **EXACT)
    assert torch.equal(zero_point, flat(f"{case}/zero_point"))
    noise = torch.from_numpy(np.random.RandomState(7).uniform(-1e-3, 1e-3, len(scale0)))
    scale1 = golden.tensor(PTQ, f"{case}/scale1").reshape(-1)
    assert_close(
        evolution.mutate(flat(f"{case}/scale0").double(), noise),
        scale1.double(),
        rtol=1e-12,
        atol=0,
    )
    codes, values = fake_quantized(w, case, "uint4", scale1.float())
    assert torch.equal(codes, golden.tensor(PTQ, f"{case}/int").float())
    assert_close(values, golden.tensor(PTQ, f"{case}/dequant").float(), **EXACT)
    assert_close(
        F.correct_mean_and_std(values, w),
        golden.tensor(PTQ, f"{case}/dequant_bcorr").float(),
        **EXACT,
    )


@golden.parametrize(PTQ, r"log2/uint\d")
def test_fake_quantize_log2(case):
    bits = int(case[-1])
    x, codes, values = load("log2/in", f"{case}/int", f"{case}/dequant")
    zero = x == 0  # the reference gives NaN there
    expected_codes, expected = (
        torch.where(zero, 2.0**bits - 1, codes),
        torch.where(zero, 0.0, values),
    )
    assert torch.equal(F.log2_codes(x, bits).float(), expected_codes)
    assert torch.equal(F.fake_quantize_log2(x, bits), expected)


@golden.parametrize(PTQ, "lis")
def test_log_int_softmax(case):
    x, scale, out = load(f"{case}/in", f"{case}/scale", f"{case}/out")
    assert torch.equal(F.log_int_softmax(x, scale), out)


@golden.parametrize(PTQ, "intln")
def test_integer_layer_norm(case):
    x, in_scale, out_scale, weight, bias = load(
        *(f"{case}/{key}" for key in ("in", "in_scale", "out_scale", "weight", "bias"))
    )
    out = F.integer_layer_norm(x, in_scale, out_scale, weight, bias)
    assert_close(out, golden.tensor(PTQ, f"{case}/out_int"), **EXACT)
    float_norm = torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, 1e-6)
    assert_close(float_norm, golden.tensor(PTQ, f"{case}/out_fp"), rtol=1e-6, atol=1e-6)


@golden.parametrize(PTQ, r"nce(/T[\d.]+)?")
def test_info_nce(case):
    q, k = (golden.tensor(PTQ, f"nce/{name}").requires_grad_() for name in "qk")
    if case == "nce":
        assert_close(F.info_nce(k, k).detach(), flat("nce/identical_T3")[0], **EXACT)
        assert F.info_nce(q[:1], k[:1]).item() == golden.number(PTQ, "nce/N1_T3") == 0
        return
    loss = F.info_nce(q, k, float(case.partition("/T")[2]))
    assert_close(loss.detach(), flat(f"{case}/loss")[0], **EXACT)
    loss.backward()
    assert_close(q.grad, golden.tensor(PTQ, f"{case}/grad_q"), rtol=1e-5, atol=1e-6)
    assert k.grad is None
