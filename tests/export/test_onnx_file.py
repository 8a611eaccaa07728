"""ONNX files. Oracle: the model, run by torch."""

import collections
import gc
import json
import math
import os
import signal

import onnx
import onnx.reference
import onnxruntime
import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

import qat
from qat.export import check
from qat.export.check import check_onnx, graph_codes
from qat.export.onnx_file import OnnxSettings, to_onnx
from qat.export.runtimes import (
    ONNXRUNTIME,
    OPENVINO,
    has_openvino,
    milliseconds,
    open_session,
    session_logits,
)
from qat.functional.packing import unpack_codes
from qat.model.frozen import FrozenActivation
from tests import tiny
from tests.errors import usage_error
from tests.export.graphs import constants_of, makers_of, nodes_of
from tests.model.frozen.test_freeze import RECIPES, made, trained
from tests.nets import FAMILIES

DEPLOY = {name: qat.recipe(name) for name in ("deploy_w8a8", "deploy_w4a8", "deploy_w4a4")}
LOG2 = {"bits": 4, "softmax_bits": 4, "softmax_quantizer": "log2", "bias_correction": True}
PTQ = {
    "log2": ("deit", LOG2),
    "log2_swin": ("swin", LOG2),
    "ptf": (
        "deit",
        {"bits": 4, "act_observer": "omse", "residual_observer": "ptf"},
    ),  # a scale for each channel of the residual stream
    "token": ("deit", {"bits": 8, "act_scales": "token"}),
    "two_bits": (
        "deit",
        {"bits": 2},
    ),  # codes of a convolution that its kernel for integers does not take
    "shared": ("deit", {}),  # the embedding of positions, which all images share, is quantized
}


def often(one, names):
    """The test of every change; others are long."""
    return [name if name == one else pytest.param(name, marks=pytest.mark.long) for name in names]


def file(frozen, image, path, **settings):
    model = to_onnx(frozen, image, OnnxSettings(**settings))
    onnx.save(model, path)
    return model


def assert_agrees(net, path, images, **settings):
    file(qat.freeze(net), images[:1], path, **settings)
    done = check_onnx(net, path, [images])
    assert {name: found.problem for name, found in done.agreement.items()} == dict.fromkeys(
        done.agreement
    )
    assert set(done.agreement) == {ONNXRUNTIME, *([OPENVINO] if has_openvino() else [])}
    assert done.agreement[ONNXRUNTIME].images == len(images)


@pytest.fixture
def net():
    return tiny.fitted(tiny.vit(depth=1), tiny.images(), "deploy_w8a8")


@pytest.mark.slow
@pytest.mark.parametrize("name", often("ofq_2bit", RECIPES | DEPLOY))
def test_a_file_gives_the_answers_of_the_net(name, tmp_path):
    assert_agrees(made((RECIPES | DEPLOY)[name]), tmp_path / "net.onnx", tiny.images(32, 1))


@pytest.mark.long
def test_a_graph_may_end_in_a_mean_over_the_tokens(tmp_path):
    net = tiny.vit(num_classes=0, global_pool="avg", fc_norm=False)
    assert_agrees(
        tiny.fitted(net, tiny.images(), "deploy_w8a8"), tmp_path / "net.onnx", tiny.images(4)
    )


@pytest.mark.long
def test_data_of_another_kind_are_not_described(tmp_path, net):
    qat.save(net, tmp_path / "net.ckpt", data={"image_size": 16, "note": "x"})
    loaded = qat.load(tmp_path / "net.ckpt")
    assert qat.export_onnx(loaded, tmp_path / "net.onnx").problem is None


@pytest.mark.long
def test_a_query_bias_beside_a_folded_matrix_in_float(tmp_path):
    net = tiny.vit(depth=1)
    torch.nn.init.normal_(net.blocks[0].attn.qkv.bias)
    rules = {"*.attn": {"weight_quantizer": "float"}}
    recipe = qat.recipe("ofq", bits=4, qk_bias="fold", overrides=rules)
    assert_agrees(tiny.fitted(net, tiny.images(), recipe), tmp_path / "net.onnx", tiny.images(8, 1))


@pytest.mark.long
def test_a_compiled_net_whose_layers_hold_tensors_of_a_forward_with_gradients(tmp_path):
    net = FAMILIES["levit"].quantized("deploy_w8a8").eval()
    net(FAMILIES["levit"].images(4))
    checked = qat.export_onnx(torch.compile(net, backend="eager"), tmp_path / "net.onnx")
    assert checked.problem is None


@pytest.mark.long
def test_fused_attention_of_five_axes(tmp_path):
    net = timm.create_model(
        "hiera_tiny_224",
        img_size=64,
        embed_dim=24,
        num_heads=1,
        stages=(1, 1),
        q_pool=1,
        mask_unit_size=(4, 4),
        num_classes=5,
    )
    images = torch.randn(4, 3, 64, 64)
    assert_agrees(tiny.fitted(net, images, "deploy_w8a8"), tmp_path / "net.onnx", images)


@pytest.mark.long
def test_a_convolution_between_two_quantizers_keeps_its_weights(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=5, channels=(8, 8, 8, 8), stem_width=8)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data[0] *= 20
    net.fc.weight.data *= 0.001
    images = torch.randn(8, 3, 32, 32)
    assert_agrees(tiny.fitted(net, images, "deploy_w8a8"), tmp_path / "net.onnx", images)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "attention", "bits"),
    [
        ("deit_distilled", "qkr", 2),
        ("swin", "qkr", 2),
        ("swin", "standard", 3),
        ("beit", "qkr", 4),
        ("eva02", "standard", 2),
    ],
)
def test_families(name, attention, bits, tmp_path):
    net = trained(FAMILIES[name].quantized(bits=bits, attention=attention))
    assert_agrees(net, tmp_path / "net.onnx", FAMILIES[name].images(6, 1))


@pytest.mark.long
@pytest.mark.parametrize("name", often("two_bits", PTQ))
def test_post_training_quantization(name, tmp_path):
    family, knobs = FAMILIES[PTQ[name][0]], PTQ[name][1]
    net = tiny.fitted(family.build(), family.images(8), qat.PtqRecipe(**knobs))
    # OpenVINO is wrong about a product of a convolution and a quantizer for any number of images.
    assert_agrees(net, tmp_path / "net.onnx", family.images(8, 1), dynamic_batch=False)


@pytest.mark.long
def test_a_zero_point_has_the_shape_of_its_scale():
    """Of a weight with one of each, of whose outputs each channel is divided by a step size."""
    net = tiny.vit()
    for block in net.blocks:
        block.attn.qkv.weight.data += 0.5
    recipe = qat.PtqRecipe(bits=4, placement="inputs", weight_scales="tensor")
    frozen = qat.freeze(tiny.fitted(net, tiny.images(), recipe))
    model = to_onnx(frozen, tiny.images(1))
    shapes = {name: array.shape for name, array in constants_of(model).items()}
    nodes = nodes_of(model, "DequantizeLinear")
    inputs = [node.input for node in nodes if len(node.input) == 3]
    assert [shapes[scale] for _, scale, zero in inputs if shapes[zero] == (96,)] == [(96,), (96,)]
    assert all(shapes[scale] == shapes[zero] for _, scale, zero in inputs)


@pytest.mark.long
def test_a_stem_of_convolutions_keeps_its_layout_in_onnxruntime(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_r_s16_p8_224", img_size=64, embed_dim=24, depth=1, num_heads=3, num_classes=10
    )
    images = torch.randn(8, 3, 64, 64)
    assert_agrees(tiny.fitted(net, images, "deploy_w4a8"), tmp_path / "net.onnx", images)
    model = onnx.load(tmp_path / "net.onnx")
    assert model.opset_import[0].version == 21
    assert nodes_of(model, "GroupNormalization") == []
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(tmp_path / "changed.onnx")
    onnxruntime.InferenceSession(
        str(tmp_path / "net.onnx"), settings, providers=["CPUExecutionProvider"]
    )
    changed = onnx.load(tmp_path / "changed.onnx")
    makers = makers_of(changed)
    (pool,) = nodes_of(changed, "MaxPool")
    assert makers[pool.input[0]].op_type == "Pad"
    convolutions = nodes_of(changed, "Conv")
    assert [makers.get(node.input[1]) for node in convolutions] == [None, None]


@pytest.fixture(scope="module")
def two_bit(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    frozen = qat.freeze(made(RECIPES["ofq_2bit"]))
    return frozen, file(frozen, tiny.images(1), path), path


@pytest.mark.long
def test_only_standard_operators(two_bit):
    frozen, model, _ = two_bit
    assert [
        entry.domain
        for entry in model.opset_import
        if entry.domain not in {"", "pkg.onnxscript.torch_lib.common"}
    ] == []
    assert {node.domain for node in model.graph.node} == {""}
    counts = collections.Counter(node.op_type for node in model.graph.node)
    assert counts["QuantizeLinear"] == 16  # image, head, and seven in each of two blocks
    # Both factors of 17 products (head, and eight in each of two blocks); the image; ...
    assert counts["DequantizeLinear"] == 30
    assert [entry for node in model.graph.node for entry in node.metadata_props] == []
    outputs, codes = graph_codes(model, ONNXRUNTIME)(tiny.images(1))
    assert set(codes) == {site.name for site in qat.iter_quantizers(frozen) if not site.is_weight}
    assert_close(outputs["logits"], frozen(tiny.images(1)), rtol=0, atol=1e-5)


@pytest.mark.long
def test_factors_of_scores_and_offsets_of_norms_are_in_other_constants(two_bit):
    _, model, _ = two_bit
    makers = makers_of(model)
    for node in nodes_of(model, "Add", "Mul"):
        maker = makers.get(node.input[0])
        foldable = {"Mul": "Mul", "Add": "LayerNormalization"}[node.op_type]
        assert maker is None or maker.op_type != foldable


@pytest.mark.long
def test_weights_are_stored_at_their_width(two_bit):
    frozen, model, _ = two_bit
    kinds = collections.Counter(tensor.data_type for tensor in model.graph.initializer)
    assert kinds[onnx.TensorProto.INT4] == 10
    tensor = next(
        t
        for t in model.graph.initializer
        if t.name == "blocks.0.mlp.fc1.weight_quantizer.onnx_codes.stored"
    )
    assert list(tensor.dims) == [32, 128]  # transposed: (in, out)
    assert len(tensor.raw_data) == 32 * 128 // 2
    odd = unpack_codes(
        torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.uint8), 4, (32, 128), signed=True
    )
    assert torch.equal(
        odd.T, 2 * tiny.sites(frozen)["blocks.0.mlp.fc1.weight_quantizer"].quantizer.codes() + 1
    )


@pytest.mark.long
def test_any_number_of_images(two_bit):
    frozen, _, path = two_bit
    session = open_session(path)
    for n in (1, 2, 7):
        assert_close(
            session_logits(session, tiny.images(n)), frozen(tiny.images(n)), rtol=0, atol=1e-5
        )
    found = milliseconds({"a": session, "b": session}, tiny.images(1), 3)
    assert set(found) == {"a", "b"}
    assert all(0 < time < 1000 for time in found.values())


def test_a_file_that_was_changed_does_not_pass(two_bit, tmp_path):
    frozen, model, _ = two_bit
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = next(
        t
        for t in changed.graph.initializer
        if "blocks.1.mlp.fc1.weight_quantizer.onnx_codes" in t.name
    )
    tensor.raw_data = bytes(255 - byte for byte in tensor.raw_data)
    onnx.save(changed, tmp_path / "net.onnx")
    problem = check_onnx(frozen, tmp_path / "net.onnx", [tiny.images(4)]).problem
    assert problem.startswith(
        "onnxruntime: codes of blocks.1.mlp.fc2.input_quantizer differ for values that are not on a threshold; same class on "
    )


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attention", ["qkr", "standard"])
@pytest.mark.parametrize("name", ["deit", "swin"])
def test_torch_exports_frozen_nets(name, attention, dynamic):
    family = FAMILIES[name]
    frozen = qat.freeze(family.quantized(bits=2, attention=attention))
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    program = torch.export.export(frozen, (family.images(3),), strict=True, dynamic_shapes=shapes)
    for n in (1, 3, 5) if dynamic else (3,):
        assert torch.equal(program.module()(family.images(n)), frozen(family.images(n)))


@pytest.mark.long
@pytest.mark.parametrize("name", often("deploy_w4a4", DEPLOY))
def test_what_tensorrt_asks_for(name, tmp_path):
    net = made(DEPLOY[name])
    frozen = qat.freeze(net)
    model = file(frozen, tiny.images(1), tmp_path / "net.onnx", target="tensorrt")
    constants = constants_of(model)
    makers = makers_of(model)
    pairs = nodes_of(model, "QuantizeLinear")
    assert len(pairs) == sum(isinstance(module, FrozenActivation) for module in frozen.modules())
    for node in pairs:
        _, step, zero = node.input
        assert (constants[step].shape, constants[zero].dtype, int(constants[zero])) == (
            (),
            "int8",
            0,
        )
    products = nodes_of(model, "MatMul", "Gemm", "Conv")
    factors = [name for node in products for name in node.input[:2]]
    seen = {makers[name].op_type for name in factors}
    assert seen <= {"DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Gather", "Split"}
    assert {
        makers[name].op_type for name in factors if "weight" in "".join(makers[name].input)
    } == {"DequantizeLinear"}
    assert check_onnx(net, tmp_path / "net.onnx", [tiny.images(16, 1)]).problem is None


NO_INTEGERS = {
    "token": qat.recipe("ofq", bits=2, offsets=False),
    "unsigned": qat.recipe("lsq", bits=8, act_scales="tensor"),
    "offsets": qat.recipe("lsq", bits=4, act_scales="tensor", offsets=True),
}


@pytest.mark.parametrize(
    "recipe",
    [
        *NO_INTEGERS.values(),
        qat.recipe("seq", bits=4, act_scales="tensor", offsets=False),
        qat.recipe("deploy_w8a8", weight_quantizer="statsq"),
    ],
    ids=[*NO_INTEGERS, "half steps", "weights"],
)
def test_what_tensorrt_cannot_have_is_one_line(recipe):
    with usage_error(r"^format.target=tensorrt: \S+_quantizer must have one scale"):
        to_onnx(qat.freeze(made(recipe)), tiny.images(1), OnnxSettings(target="tensorrt"))


FP32 = {"target": "tensorrt", "precision": "fp32"}


@pytest.mark.long
@pytest.mark.parametrize("knobs", [{}, {"attention": "standard"}], ids=["float", "standard"])
def test_floats_of_8_bits_for_tensorrt(knobs, tmp_path):
    net = tiny.quantized("fp8", **knobs)
    model = file(qat.freeze(net), tiny.images(1), tmp_path / "net.onnx", **FP32)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = nodes_of(model, "QuantizeLinear")
    activations = [site for site in qat.iter_quantizers(net) if not site.is_weight]
    assert len(pairs) == sum(not site.quantizer.is_float for site in activations)
    for node in pairs:
        _, step, zero = (constants.get(name) for name in node.input)
        site = tiny.sites(net)[node.name]
        assert onnx.numpy_helper.to_array(step) == site.quantizer.scale.item()
        assert zero.data_type == onnx.TensorProto.FLOAT8E4M3FN
    weights = [
        t for t in constants.values() if t.data_type == onnx.TensorProto.FLOAT8E4M3FN and t.dims
    ]
    assert len(weights) == len(tiny.sites(net)) - len(activations)
    images = tiny.images(16, 1)
    checked = check_onnx(net, tmp_path / "net.onnx", [images]).agreement[ONNXRUNTIME]
    assert (checked.problem, checked.same_top1) == (None, 16)
    # Onnx's own evaluator has no fast kernels, and no faults in common with them.
    evaluator = onnx.reference.ReferenceEvaluator(model)
    (logits,) = evaluator.run(None, {"image": images[:2].numpy()})
    assert_close(torch.from_numpy(logits), tiny.logits(net, images[:2]), rtol=0, atol=1e-4)


HALF = {
    "fp8": lambda: tiny.quantized("fp8"),
    "int8": lambda: tiny.quantized("deploy_w8a8", attention="float"),
    "int8 attention": lambda: tiny.quantized("deploy_w8a8"),
    "swin": lambda: FAMILIES["swin"].quantized("fp8"),
}


def types_of_values(model):
    """Types of all values and constants by name, found by onnx's shape inference."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        types[value.name] = value.type.tensor_type.elem_type
    missing = {name for node in inferred.node for name in node.output} - types.keys()
    assert not missing
    return {name: onnx.TensorProto.DataType.Name(kind) for name, kind in types.items()}


@pytest.mark.long
@pytest.mark.parametrize("name", often("fp8", HALF))
def test_files_for_tensorrt_are_float16_but_for_image_and_logits(name, tmp_path):
    net = HALF[name]().eval()
    images = tiny.images(16, 1) if name != "swin" else FAMILIES["swin"].images(16)
    model = file(qat.freeze(net), images[:1], tmp_path / "net.onnx", target="tensorrt")
    types = types_of_values(model)
    assert {value for value, kind in types.items() if kind == "FLOAT"} == {"image", "logits"}
    codes = "FLOAT8E4M3FN" if name in {"fp8", "swin"} else "INT8"
    for node in nodes_of(model, "QuantizeLinear", "DequantizeLinear"):
        x, scale = (types[value] for value in node.input[:2])
        assert {x, scale, types[node.output[0]]} == {"FLOAT16", codes}
    for node in nodes_of(model, "LayerNormalization"):  # its sums are in float32 by default
        assert not any(
            attribute.name == "stash_type" and attribute.i != 1 for attribute in node.attribute
        )
    if "attention" not in name:  # so that TensorRT can fuse the attention
        makers = makers_of(model)
        weights = [value for value in types if value.endswith("onnx_codes")]
        assert len(weights) == len(nodes_of(model, "QuantizeLinear"))
        sources = [makers[node.input[0]] for node in nodes_of(model, "Softmax")]
        assert all(source.op_type != "DequantizeLinear" for source in sources)
    checked = check_onnx(net, tmp_path / "net.onnx", [images]).agreement[ONNXRUNTIME]
    assert checked.problem is None
    assert 0 < checked.relative_error < 0.15


def test_scales_that_float16_cannot_hold_are_one_line():
    net = tiny.quantized("fp8")
    tiny.sites(net)["head.input_quantizer"].quantizer.set_scale(torch.tensor([1e-6]))
    with usage_error(
        "^format.precision=fp16: the step size of head.input_quantizer \\(1.0e-06\\) is below"
    ):
        to_onnx(qat.freeze(net), tiny.images(1), OnnxSettings(target="tensorrt"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "change", "problem"),
    [
        ({"target": "tensorrt"}, reversed, "of its largest value; must be at most"),
        (FP32, lambda codes: [0x38] * len(codes), "codes of blocks.0.mlp.fc2.input_quantizer"),
    ],
    ids=["float16", "float32"],
)
def test_a_file_with_another_weight_is_a_problem(settings, change, problem, tmp_path):
    net = tiny.quantized("fp8")
    model = file(qat.freeze(net), tiny.images(1), tmp_path / "net.onnx", **settings)
    weight = next(t for t in model.graph.initializer if "mlp.fc1" in t.name and t.dims)
    weight.raw_data = bytes(change(weight.raw_data))
    onnx.save(model, tmp_path / "net.onnx")
    assert problem in check_onnx(net, tmp_path / "net.onnx", [tiny.images(4, 1)]).problem


def test_one_type_in_a_file_for_tensorrt():
    deploy = {"weight_quantizer": "lsq", "act_quantizer": "lsq", "act_scales": "tensor"}
    net = tiny.quantized("fp8", fits_int8=True, overrides={"blocks.0.*": deploy})
    with usage_error(r"^format.target=tensorrt: head\S+ has 8-bit floats and blocks.0\S+ integers"):
        to_onnx(qat.freeze(net), tiny.images(1), OnnxSettings(target="tensorrt"))


def test_a_net_converted_in_python(net, tmp_path):
    path = tmp_path / "new" / "net.onnx"
    net.train()
    net.blocks[0].eval()
    before = [module.training for module in net.modules()]
    x = tiny.images(4)
    checked = qat.export_onnx(net, path, images=x, dynamic_batch=False)
    assert (checked.problem, checked.agreement["onnxruntime"].images) == (None, 4)
    assert [module.training for module in net.modules()] == before
    found = session_logits(open_session(path), x, batch=1)
    assert_close(found, net.eval()(x), rtol=0, atol=1e-4)
    model = onnx.load(path)
    values = [*model.graph.input, *model.graph.output]
    assert [value.name for value in values] == ["image", "logits"]
    said = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert (said["qat.preprocessing"]["size"], said["qat"]["recipe"]["name"]) == (8, "deploy")


def test_a_net_that_timm_did_not_build(tmp_path):
    layers = [nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(32, 10)]
    net = nn.Sequential(*layers).eval()
    x = tiny.randn(8, 3, 8, 8)
    qat.convert(net, DEPLOY["deploy_w8a8"], input_size=(3, 8, 8))
    qat.initialize_scales(net, [x])
    checked = qat.export_onnx(net, tmp_path / "net.onnx", images=x)
    assert checked.problem is None
    metadata = onnx.load(tmp_path / "net.onnx").metadata_props
    stored = {entry.key: json.loads(entry.value) for entry in metadata}
    assert stored["qat"]["model"] == {"name": "Sequential", "kwargs": {}}


class PositionsAfterNorm(nn.Module):
    """As many tokens as channels, and a learned number for each token that is added after a norm."""

    def __init__(self):
        super().__init__()
        # Not fewer: OpenVINO crashes on a norm of 4 channels if oneDNN is limited to AVX2.
        self.patches, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.positions = nn.Parameter(torch.arange(16.0).view(1, 16, 1))
        self.mlp, self.head = nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.mlp(self.norm(tokens) + self.positions).mean(1))


def test_a_constant_of_each_token_stays_outside_a_norm(tmp_path):
    net, x = PositionsAfterNorm().eval(), tiny.randn(8, 3, 16, 16)
    qat.convert(net, qat.recipe("lsq", bits=8), input_size=(3, 16, 16))
    qat.initialize_scales(net, [x])
    assert qat.export_onnx(net, tmp_path / "net.onnx", images=x).problem is None


@pytest.mark.long
def test_a_net_in_float64(net, tmp_path):
    net.double()
    assert (
        qat.export_onnx(net, tmp_path / "net.onnx", images=tiny.images(4).double()).problem is None
    )


@pytest.mark.parametrize(
    ("shape", "value"),
    [((1, 8, 8), 0.0), ((2, 1, 16, 8), 0.0), ((0, 1, 8, 8), 0.0), ((2, 1, 8, 8), torch.nan)],
)
def test_images_that_do_not_fit(net, tmp_path, shape, value):
    with usage_error(
        r"images of shape \(.*\): must have shape \(N, \*\(1, 8, 8\)\) with N at least 1"
    ):
        qat.export_onnx(net, tmp_path / "net.onnx", images=torch.full(shape, value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_images_that_are_not_square(tmp_path):
    images = torch.randn(8, 1, 8, 16)
    net = tiny.fitted(tiny.vit(depth=1, img_size=(8, 16)), images, "deploy_w8a8")
    checked = qat.export_onnx(qat.freeze(net), tmp_path / "net.onnx")
    assert checked.agreement["onnxruntime"].images == 16  # of noise
    keys = {entry.key for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert {"qat", "qat.preprocessing"} & keys == {"qat"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target": "gpu"}, "^format.target='gpu': must be"),
        ({"two_bit": "int3"}, "^format.two_bit='int3': must be"),
        ({"dynamic_batch": "no"}, "dynamic_batch='no': must be"),
        ({"net": tiny.vit()}, "^export_onnx: the model is not quantized"),
    ],
    ids=["target", "two bits", "batch", "float"],
)
def test_mistakes(net, given, said, tmp_path):
    with usage_error(said):
        qat.export_onnx(**{"net": net, "path": tmp_path / "net.onnx"} | given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_an_error_of_openvino_is_reported_and_rejects_no_file(net, tmp_path, monkeypatch):
    def broken(model, runtime, **given):
        if runtime == OPENVINO:
            raise RuntimeError(
                "Exception from src/core.cpp:117:\nException from src/plugin.cpp:54:\n[Add] failed:\nindex '0' out of range\n\n"
            )
        return open_session(model, runtime, **given)

    # A signal after OpenVINO has run arrives.
    file(qat.freeze(net), tiny.images(1), tmp_path / "net.onnx")
    assert check_onnx(net, tmp_path / "net.onnx", [tiny.images(4)]).problem is None
    gc.collect()
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]

    monkeypatch.setattr(check, "has_openvino", lambda: True)
    monkeypatch.setattr(check, "open_session", broken)
    checked = check_onnx(net, tmp_path / "net.onnx", [tiny.images(4)])
    assert (checked.problem, checked.agreement["onnxruntime"].problem) == (None, None)
    assert (
        checked.to_text().splitlines()[-1]
        == "not for OpenVINO: it fails ([Add] failed: index '0' out of range)"
    )


def test_a_runtime_that_is_not_what_its_graph_gives_has_a_problem(net):
    net = net.eval()
    x = tiny.images(10)
    found = check.compare(
        net, lambda x: net(x) + 1, lambda: lambda image: check.outputs_and_codes(net, image), [x]
    )
    assert (
        found.problem
        == "on 10 of 10 images, the output differs from that of the file's graph run operator by operator"
    )
    assert (found.same_top1, found.num_differing, found.max_error) == (10, 10, 0.0)


def test_values_on_thresholds_are_not_a_problem(net):
    """A runtime may round all of them the other way: what counts is how much the model changes."""
    net = net.eval()
    (image_quantizer,) = [
        site.quantizer
        for site in qat.iter_quantizers(net)
        if site.name.startswith("patch_embed") and not site.is_weight
    ]
    codes = tiny.images(10).div(image_quantizer.scale.detach()).round()
    x = (codes + 0.5) * image_quantizer.scale.detach()

    def graph(image):
        return check.outputs_and_codes(net, image)

    found = check.compare(net, lambda x: net(x * (1 - 1e-6)), lambda: graph, [x])
    assert found.num_differing > 5
    assert (found.problem, found.num_unexplained) == (None, 0)


def test_nan_in_any_output_is_a_difference(net):
    class Pair(torch.nn.Module):
        def forward(self, x):
            return {"pooled": net(x), "features": x}

    def broken(x):
        return {"pooled": net(x), "features": x * torch.nan}

    found = check.compare(Pair().eval(), broken, None, [tiny.images(2)])
    assert math.isnan(found.relative_error)
    assert math.isnan(found.cosine)


@pytest.mark.parametrize(("factor", "num_unexplained"), [(1.01, 0), (1.06, 10)])
def test_rounding_explains_at_most_a_twentieth(net, factor, num_unexplained, monkeypatch):
    monkeypatch.setattr(check, "_effect_of_rounding", lambda net, image: 1.0)
    net = net.eval()

    def graph(image):
        return check.outputs_and_codes(net, image)

    found = check.compare(net, lambda x: factor * net(x), lambda: graph, [tiny.images(10)])
    assert found.num_unexplained == num_unexplained
