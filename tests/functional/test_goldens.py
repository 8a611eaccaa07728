"""Pure functions against the papers' own code. Oracle: tests/goldens, made by running it."""

import math

import torch
from torch.testing import assert_close

from qat import functional as F
from qat.lit.optim import cosine_schedule
from tests import golden
from tests.golden import OFQ, ofq

FORWARD = {"rtol": 1e-6, "atol": 1e-6}
GRADIENT = {"rtol": 1e-5, "atol": 1e-5}


def bits_of(case: str) -> int:
    if golden.has(OFQ, f"{case}/bits"):
        return int(golden.number(OFQ, f"{case}/bits"))
    return int(case.partition("_b")[2][:1] or 2)


@golden.parametrize(OFQ, r"statsq(2d|3d|_ties|_zero_row|_qk).*")
def test_statsq(case):
    w = ofq(case, "w").requires_grad_()
    bits = bits_of(case)
    out = F.statsq(w, bits)
    expected = ofq(case, "out").nan_to_num(0.0)  # the reference gives NaN for an all-zero row
    assert_close(out, expected, **FORWARD)
    if golden.has(OFQ, f"{case}/scale"):
        assert_close(F.statsq_scale(w).flatten(), ofq(case, "scale").flatten(), **FORWARD)
    if golden.has(OFQ, f"{case}/upstream"):
        out.backward(ofq(case, "upstream"))
        assert torch.equal(w.grad, ofq(case, "grad_w"))


def lsq_axis(case: str) -> int | None:
    axes = {
        "token3d": 1,
        "token4d": 2,
        "softmax4d": 2,
        "channel3d": 2,
        "2d": 0,
        "tensor": None,
        "weight2d": 0,
        "conv4d": 0,
        "image": 1,
    }
    return axes[case.split("_")[1]]


@golden.parametrize(OFQ, r"lsq_.*")
def test_lsq(case):
    axis = lsq_axis(case)
    qmin, qmax = (int(t) for t in ofq(case, "thd"))
    x = ofq(case, "x").requires_grad_()
    s = ofq(case, "s").requires_grad_()
    out = F.lsq(x, s, qmin, qmax, axis)
    assert_close(out, ofq(case, "out"), **FORWARD)
    out.backward(ofq(case, "upstream"))
    assert_close(x.grad, ofq(case, "grad_x"), **GRADIENT)
    assert_close(s.grad, ofq(case, "grad_s"), **GRADIENT)


@golden.parametrize(OFQ, r"lsq_.*")
def test_lsq_first_scale(case):
    qmin, qmax = (int(t) for t in ofq(case, "thd"))
    scale = F.lsq_init_scale(ofq(case, "x_init"), qmin, qmax, lsq_axis(case))
    factor = 0.5 if "image_unsigned" in case else 1.0  # images have factor 2 whatever the sign
    assert_close(scale * factor, ofq(case, "s_init"), **FORWARD)


@golden.parametrize(OFQ, r"qkr_product_b\d")
def test_qkr_product(case):
    wq = ofq(case, "wq").requires_grad_()
    wk = ofq(case, "wk").requires_grad_()
    heads = ofq(case, "product").shape[0] // wq.shape[1]
    product = F.fold_qk(wq, wk, heads)
    assert_close(product, ofq(case, "product"), **FORWARD)
    out = F.statsq(product, bits_of(case.replace("product", "")))
    assert_close(out, ofq(case, "out"), **FORWARD)
    out.backward(ofq(case, "upstream"))
    assert_close(wq.grad, ofq(case, "grad_wq"), **GRADIENT)
    assert_close(wk.grad, ofq(case, "grad_wk"), **GRADIENT)


@golden.parametrize(OFQ, r"kd_loss_.*")
def test_distillation_loss(case):
    single = golden.has(OFQ, f"{case}/student")
    names = (
        ("student", "student", "teacher")
        if single
        else ("student_cls", "student_dist", "teacher_cls")
    )
    inputs = {name: ofq(case, name).requires_grad_() for name in set(names)}
    loss = F.distillation_loss(*(inputs[name] for name in names), ofq(case, "target"))
    assert_close(loss.detach(), ofq(case, "loss"), **FORWARD)
    loss.backward()
    for name, value in inputs.items():
        if golden.has(OFQ, f"{case}/grad_{name}"):
            assert_close(value.grad, ofq(case, f"grad_{name}"), **GRADIENT)


@golden.parametrize(OFQ, r"lr_.*")
def test_learning_rate_per_epoch(case):
    expected = ofq(case, "lr_per_epoch").double()
    warmup = 5 if math.isclose(expected[0].item(), 1e-6, rel_tol=1e-3) else 0
    peak = 1e-6 + warmup * (expected[1].item() - 1e-6) if warmup else expected[0].item()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule = cosine_schedule(
        optimizer, periods=300, warmup=warmup, min_lr=1e-5, warmup_lr=1e-6, interval="epoch"
    )
    got = []
    for epoch in range(len(expected)):
        schedule.step(epoch)
        got.append(optimizer.param_groups[0]["lr"])
    assert_close(torch.tensor(got, dtype=torch.float64), expected, rtol=1e-6, atol=1e-12)
