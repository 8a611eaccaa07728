"""Frozen and packed floats in blocks, and of 8 bits. Oracles: the model before freezing, bit for bit; torchao's tensors, torch's E4M3 type."""

import pytest
import safetensors.torch
import torch

import qat
from qat.export.onnx_file import to_onnx
from qat.export.pte import to_pte
from qat.functional.packing import unpack_pairs
from qat.model.cost import size_bytes
from tests import tiny
from tests.errors import usage_error
from tests.model.frozen.test_packed import written
from tests.nets import FAMILIES
from tests.quantizers.test_float_formats import RECIPES
from tests.tiny import identical

MADE = {
    **RECIPES,
    "mxfp8": ("mxfp4", {"bits": 8}),
    "fold": ("mxfp4", {"attention": "qkr", "qk_bias": "fold"}),
}
WEIGHT = "blocks.0.mlp.fc2.weight_quantizer"


def made(name):
    preset, knobs = MADE[name]
    return tiny.quantized(preset, **knobs)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "tiny") for name in MADE),
        *((name, family) for name in ("nvfp4", "fp8") for family in ("vit", "swin", "pvt_v2")),
    ],
)
def test_files_give_the_logits_of_the_net(name, family, tmp_path):
    """To the last bit: NVFP4's scale of a tensor would carry another order of sums in the stem into every block."""
    if family == "tiny":
        net, x = made(name), tiny.images()
    else:
        net, x = FAMILIES[family].quantized(name), FAMILIES[family].images(4)
    expected, frozen = tiny.logits(net, x), qat.freeze(net)
    assert torch.equal(tiny.logits(frozen, x), expected)
    assert abs(size_bytes(frozen) - size_bytes(net)) < 0.02 * size_bytes(net)
    sizes = written(frozen, tmp_path / "net.safetensors")
    assert sum(sizes.values()) == (tmp_path / "net.safetensors").stat().st_size
    for file, saved in (("trained.pt", net), ("frozen.pt", frozen)):
        qat.save(saved, tmp_path / file)
    for file in ("net.safetensors", "trained.pt", "frozen.pt"):
        assert torch.equal(tiny.logits(qat.load(tmp_path / file), x), expected)
    again = qat.load(tmp_path / "net.safetensors").state_dict()
    assert identical(again, frozen.state_dict())


@pytest.mark.parametrize(
    ("name", "tolerance"), [("nvfp4", 1e-5), ("mxfp4", 1e-5), ("qkr", 1e-5), ("fp8", 0.15)]
)
def test_a_frozen_net_of_another_dtype(name, tolerance):
    frozen = qat.freeze(made(name))
    expected = tiny.logits(frozen)
    double = tiny.logits(frozen.double(), tiny.images().double())
    bound = tolerance * expected.abs().max().item()
    torch.testing.assert_close(double.float(), expected, rtol=0, atol=bound)
    half = tiny.logits(frozen.bfloat16(), tiny.images().bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.5 * expected.abs().max()


def test_codes_of_fp8_are_bytes_of_e4m3():
    net = tiny.quantized("fp8")
    frozen = qat.freeze(net).blocks[0].mlp.fc1.weight_quantizer
    numbers = frozen.codes().view(torch.float8_e4m3fn).float() * frozen.scale[:, None]
    assert torch.equal(numbers, net.blocks[0].mlp.fc1.quantized_weight("weight"))


def test_rows_of_an_odd_length(tmp_path):
    x = tiny.randn(2, 3, 8, 8)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 21), torch.nn.Linear(21, 19))
    net = tiny.fitted(layers, x, "nvfp4")
    frozen = qat.freeze(net)
    assert torch.equal(frozen(x), net(x))
    weight = frozen[1].weight_quantizer
    parts = weight.pack()
    assert (parts["qdata"].shape, parts["scale"].shape) == ((19, 11), (19, 2))
    assert torch.equal(unpack_pairs(parts["qdata"], 21), weight.codes())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_torchao_opens_a_weight(name, tmp_path):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    net = made(name)
    written(qat.freeze(net), tmp_path / "net.safetensors")
    file = safetensors.torch.load_file(tmp_path / "net.safetensors")
    parts = {key: file.get(f"{WEIGHT}.{key}") for key in ("qdata", "scale", "per_tensor_scale")}
    if name == "nvfp4":
        theirs = nvfp4.NVFP4Tensor(
            parts["qdata"], parts["scale"], 16, torch.float32, parts["per_tensor_scale"]
        )
    else:
        kind = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
        preference = mx.KernelPreference.EMULATED
        theirs = mx.MXTensor(
            parts["qdata"], parts["scale"], kind, 32, torch.float32, preference, None, False
        )
    ours = net.blocks[0].mlp.fc2.quantized_weight("weight")
    assert theirs.shape == ours.shape
    assert torch.equal(theirs.dequantize(torch.float32), ours)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nvfp4", "blocks.0.attn.v_quantizer has blocks of nvfp4"),
        ("mxfp4_a8", "blocks.0.attn.v_quantizer has blocks of mxfp"),
        ("fp8", "patch_embed.proj.input_quantizer has 8-bit floats"),
    ],
)
@pytest.mark.parametrize("write", [to_onnx, to_pte])
def test_files_for_cpus_are_refused(name, line, write):
    pytest.importorskip("onnxscript")
    with usage_error(f"^format=(onnx|executorch): {line}"):
        write(qat.freeze(made(name)), tiny.images(1))
