"""ONNX files. Oracle: the net itself, run by torch; onnxruntime without any change of the graph, with all of them."""

import collections

import onnx
import onnxruntime
import pytest
import timm
import torch

import qat
from qat.export.check import check_onnx
from qat.export.graph import OnnxSettings, check_size, to_onnx
from qat.export.session import LEVELS, OPENVINO, Transparent, has_openvino, logits_of, milliseconds, open_session
from qat.functional.packing import unpack_codes
from qat.model.frozen import FrozenActivation
from tests import tiny
from tests.model.frozen.test_freeze import RECIPES, made, trained
from tests.nets import FAMILIES


def file(frozen, image, path, **settings):
    model = to_onnx(frozen, image, OnnxSettings(**settings))
    onnx.save(model, path)
    return model


def assert_agrees(net, path, images, **settings):
    frozen = qat.freeze(net)
    file(frozen, images[0][:1], path, **settings)
    done = check_onnx(frozen, net, path, images)
    assert [text for level in done.agreement if (text := done.differs(level))] == []
    assert set(done.agreement) == {*LEVELS, *([OPENVINO] if has_openvino() else [])}
    return done


def often(one, names):
    """The test of every change; others are long."""
    return [name if name == one else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", often("ofq_2bit", RECIPES))
def test_a_file_gives_the_answers_of_the_net(name, tmp_path):
    done = assert_agrees(made(RECIPES[name]), tmp_path / "net.onnx", [tiny.images(16, seed) for seed in range(1, 3)])
    assert done.agreement["ORT_ENABLE_BASIC"].images == 32


FORMS = [("deit_distilled", "qkr", 2), ("swin", "qkr", 2), ("swin", "standard", 3), ("beit", "qkr", 4), ("eva02", "standard", 2)]


@pytest.mark.long
@pytest.mark.parametrize(("name", "attention", "bits"), FORMS)
def test_families(name, attention, bits, tmp_path):
    family = FAMILIES[name]
    net = qat.convert(family.build(), qat.recipe("ofq", bits=bits, attention=attention), input_size=family.input_size)
    trained(qat.initialize_scales(net, [family.images(4)]))
    assert_agrees(net, tmp_path / "net.onnx", [family.images(6, 1)])


@pytest.mark.long
@pytest.mark.parametrize("name", ["deit", "swin"])
def test_post_training_quantization(name, tmp_path):
    family = FAMILIES[name]
    recipe = qat.PtqRecipe(bits=4, act_bits=8, softmax_bits=4, softmax_quantizer="log2", bias_correction=True)
    net = qat.convert(family.build(), recipe, input_size=family.input_size)
    qat.ptq.calibrate(net, [family.images(8)])
    done = assert_agrees(net.eval(), tmp_path / "net.onnx", [family.images(16, 1)], dynamic_batch=False)
    found = done.agreement["ORT_ENABLE_BASIC"]
    assert found.ties == found.flipped


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        # A scale for each channel of the residual stream.
        pytest.param({"bits": 4, "act_bits": 8, "act_observer": "omse", "residual_observer": "ptf"}, marks=pytest.mark.long),
        pytest.param({"bits": 8, "act_bits": 8, "act_scales": "token"}, marks=pytest.mark.long),
        {"bits": 2, "act_bits": 8},  # codes of a convolution that its kernel for integers does not take
    ],
    ids=["ptf", "token", "two_bits"],
)
def test_scales_of_other_shapes(knobs, tmp_path):
    net = qat.convert(FAMILIES["deit"].build(), qat.PtqRecipe(**knobs), input_size=FAMILIES["deit"].input_size)
    qat.ptq.calibrate(net, [FAMILIES["deit"].images(4)])
    # OpenVINO is wrong about a product of a convolution and a quantizer for any number of images.
    assert_agrees(net.eval(), tmp_path / "net.onnx", [FAMILIES["deit"].images(4, 1)], dynamic_batch=False)


@pytest.mark.long
def test_what_all_images_share_is_compared_once(tmp_path):
    net = qat.convert(FAMILIES["deit"].build(), qat.PtqRecipe(), input_size=FAMILIES["deit"].input_size)
    qat.ptq.calibrate(net, [FAMILIES["deit"].images(4)])
    frozen = qat.freeze(net.eval())
    file(frozen, FAMILIES["deit"].images(1), tmp_path / "net.onnx", dynamic_batch=False)
    done = check_onnx(frozen, frozen, tmp_path / "net.onnx", [FAMILIES["deit"].images(3, 1)])
    assert done.problem is None
    assert done.agreement["ORT_ENABLE_BASIC"].images == 3


@pytest.mark.slow
def test_a_stem_of_convolutions_keeps_its_layout_in_onnxruntime(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, embed_dim=24, depth=1, num_heads=3, num_classes=10)
    images = torch.randn(8, 3, 64, 64)
    net = qat.initialize_scales(qat.convert(net, qat.recipe("deploy_w4a8"), input_size=(3, 64, 64)), [images]).eval()
    assert_agrees(net, tmp_path / "net.onnx", [images])
    model = onnx.load(tmp_path / "net.onnx")
    assert (model.opset_import[0].version, "GroupNormalization" in {node.op_type for node in model.graph.node}) == (21, False)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(tmp_path / "changed.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), settings, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "changed.onnx").graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    assert [makers[node.input[0]] for node in graph.node if node.op_type == "MaxPool"] == ["Pad"]
    assert [makers.get(node.input[1]) for node in graph.node if node.op_type == "Conv"] == [None, None]


@pytest.fixture(scope="module")
def two_bit(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    frozen = qat.freeze(made(RECIPES["ofq_2bit"]))
    return frozen, file(frozen, tiny.images(1), path), path


@pytest.mark.long
def test_only_standard_operators(two_bit):
    _, model, _ = two_bit
    assert [entry.domain for entry in model.opset_import if entry.domain not in {"", "pkg.onnxscript.torch_lib.common"}] == []
    assert {node.domain for node in model.graph.node} == {""}
    counts = collections.Counter(node.op_type for node in model.graph.node)
    assert counts["QuantizeLinear"] == 16  # image, head, and seven in each of two blocks
    # Both factors of 17 products (head, and eight in each of two blocks); the image; ...
    assert counts["DequantizeLinear"] == 30
    assert [node.op_type for node in model.graph.node if "patch_embed.proj.weight_quantizer.onnx_codes" in node.input] == ["Cast"]
    assert [entry for node in model.graph.node for entry in node.metadata_props] == []


def test_weights_are_stored_at_their_width(two_bit):
    frozen, model, _ = two_bit
    kinds = collections.Counter(tensor.data_type for tensor in model.graph.initializer)
    assert kinds[onnx.TensorProto.INT4] == 10
    tensor = next(t for t in model.graph.initializer if t.name == "blocks.0.mlp.fc1.weight_quantizer.onnx_codes.stored")
    assert list(tensor.dims) == [32, 128]  # turned: (in, out)
    assert len(tensor.raw_data) == 32 * 128 // 2
    odd = unpack_codes(torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.uint8), 4, (32, 128), signed=True)
    assert torch.equal(odd.T, 2 * tiny.sites(frozen)["blocks.0.mlp.fc1.weight_quantizer"].quantizer.codes() + 1)


def test_any_number_of_images(two_bit):
    frozen, _, path = two_bit
    session = open_session(path)
    for n in (1, 2, 7):
        torch.testing.assert_close(logits_of(session, tiny.images(n)), frozen(tiny.images(n)), rtol=0, atol=1e-5)


@pytest.mark.long
def test_one_image_at_a_time(tmp_path):
    frozen = qat.freeze(made(RECIPES["ofq_2bit"]))
    file(frozen, tiny.images(1), tmp_path / "net.onnx", dynamic_batch=False)
    session = open_session(tmp_path / "net.onnx")
    assert session.batch == 1
    torch.testing.assert_close(logits_of(session, tiny.images(3)), frozen(tiny.images(3)), rtol=0, atol=1e-5)
    done = check_onnx(frozen, frozen, tmp_path / "net.onnx", [tiny.images(3)])
    assert done.problem is None
    assert done.agreement["ORT_ENABLE_BASIC"].images == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(qat.PtqRecipe(bits=4, act_bits=8, placement="inputs"), marks=pytest.mark.long),
        qat.recipe("seq", act_scales="tensor", offsets=False),  # half steps: sums over tokens, whose number is free
    ],
    ids=["zero points", "half steps"],
)
def test_images_of_any_size(recipe, tmp_path):
    net = qat.convert(tiny.vit(dynamic_img_size=True, depth=1), recipe, input_size=tiny.SIZE)
    (qat.ptq.calibrate if isinstance(recipe, qat.PtqRecipe) else qat.initialize_scales)(net, [tiny.images()])
    frozen = qat.freeze(net.eval())
    check_size(frozen)
    file(frozen, tiny.images(1), tmp_path / "net.onnx", dynamic_size=True)
    sizes = ((8, 8), (16, 8), (12, 20))
    images = [torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(0)) for size in sizes]
    done = check_onnx(frozen, net, tmp_path / "net.onnx", images)
    assert done.problem is None
    assert done.agreement["ORT_ENABLE_BASIC"].images == 9


def test_a_net_of_one_size_is_not_written_for_any():
    net = timm.create_model("beit_base_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=5)
    qat.convert(net, qat.recipe("deploy_w8a8"), input_size=(3, 16, 16))
    frozen = qat.freeze(qat.initialize_scales(net, [torch.randn(4, 3, 16, 16)]).eval())
    with pytest.raises(qat.UsageError, match="dynamic_size=true: this net takes images of one size; must be false"):
        check_size(frozen)


def test_only_steps_of_tokens_count_them():
    def frozen(**knobs):
        net = qat.convert(tiny.vit(dynamic_img_size=True, depth=1), qat.PtqRecipe(placement="inputs", **knobs), input_size=tiny.SIZE)
        qat.ptq.calibrate(net, [tiny.images()])
        return qat.freeze(net.eval())

    check_size(frozen(act_scales="channel"))
    with pytest.raises(qat.UsageError, match=r"attn\.v_quantizer has a scale for each of 17 positions; .* ptq\.act_scales=tensor"):
        check_size(frozen(act_scales="token"))


def test_quantizers_are_called_what_they_are(two_bit):
    frozen, model, _ = two_bit
    logits, seen = Transparent(model).run(tiny.images(4))
    assert set(seen) == {site.name for site in qat.iter_quantizers(frozen) if not site.is_weight}
    torch.testing.assert_close(logits, frozen(tiny.images(4)), rtol=0, atol=1e-5)


def test_a_file_that_was_changed_does_not_pass(two_bit, tmp_path):
    frozen, model, _ = two_bit
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = next(t for t in changed.graph.initializer if "blocks.1.mlp.fc1.weight_quantizer.onnx_codes" in t.name)
    tensor.raw_data = bytes(255 - byte for byte in tensor.raw_data)
    onnx.save(changed, tmp_path / "net.onnx")
    problem = check_onnx(frozen, frozen, tmp_path / "net.onnx", [tiny.images(4)]).problem
    assert problem == "ORT_ENABLE_BASIC: codes of blocks.1.mlp.fc2.input_quantizer differ away from a threshold"


def test_sessions_are_timed_in_turns(two_bit):
    _, _, path = two_bit
    found = milliseconds({"a": open_session(path), "b": open_session(path)}, tiny.images(1), 3)
    assert set(found) == {"a", "b"}
    assert all(0 < time < 1000 for time in found.values())


def test_mistakes_are_one_line():
    net = made(RECIPES["ofq_2bit"])
    with pytest.raises(qat.UsageError, match="to_onnx: the net is not frozen"):
        to_onnx(net, tiny.images(1))


def _torch_exports(name, attention, *, dynamic):
    family = FAMILIES[name]
    net = qat.convert(family.build(), qat.recipe("ofq", bits=2, attention=attention), input_size=family.input_size)
    frozen = qat.freeze(qat.initialize_scales(net, [family.images(4)]))
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    program = torch.export.export(frozen, (family.images(3),), strict=True, dynamic_shapes=shapes)
    for n in (1, 3, 5) if dynamic else (3,):
        assert torch.equal(program.module()(family.images(n)), frozen(family.images(n)))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_exports_a_frozen_net(dynamic):
    _torch_exports("deit", "qkr", dynamic=dynamic)


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("name", "attention"), [("deit", "standard"), ("swin", "qkr"), ("swin", "standard")])
def test_torch_exports_other_frozen_nets(name, attention, dynamic):
    _torch_exports(name, attention, dynamic=dynamic)


DEPLOY = ("deploy_w8a8", "deploy_w4a8", "deploy_w4a4")


@pytest.mark.slow
@pytest.mark.parametrize("name", often("deploy_w8a8", DEPLOY))
def test_recipes_to_deploy(name, tmp_path):
    done = assert_agrees(made(qat.recipe(name)), tmp_path / "net.onnx", [tiny.images(16, 1)])
    assert done.agreement["ORT_ENABLE_ALL"].images == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", often("deploy_w4a4", DEPLOY))
def test_what_tensorrt_asks_for(name, tmp_path):
    net = made(qat.recipe(name))
    frozen = qat.freeze(net)
    model = file(frozen, tiny.images(1), tmp_path / "net.onnx", target="tensorrt")
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) == sum(isinstance(module, FrozenActivation) for module in frozen.modules())
    for node in pairs:
        _, step, zero = node.input
        assert (constants[step].shape, constants[zero].dtype, int(constants[zero])) == ((), "int8", 0)
    factors = [name for node in model.graph.node if node.op_type in {"MatMul", "Gemm", "Conv"} for name in node.input[:2]]
    seen = {makers[name].op_type for name in factors}
    assert seen <= {"DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Gather", "Split"}
    assert {makers[name].op_type for name in factors if "weight" in "".join(makers[name].input)} == {"DequantizeLinear"}
    assert check_onnx(frozen, net, tmp_path / "net.onnx", [tiny.images(16, 1)]).problem is None


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (qat.recipe("ofq", bits=2, offsets=False), r"blocks.0.attn.v_quantizer has 32 steps; must be one, as with quant.act_scales=tensor"),
        (qat.recipe("lsq", bits=8, act_scales="tensor"), r"_quantizer has codes up to 255, which int8 has not"),
        (qat.recipe("seq", bits=4, act_scales="tensor", offsets=False), r"_quantizer has a zero point, or half steps; must be symmetric"),
        (qat.recipe("lsq", bits=4, act_scales="tensor", offsets=True), r"has an offset behind it; must be a net with quant.offsets=false"),
        (qat.recipe("deploy_w8a8", weight_quantizer="statsq"), r"weight_quantizer has codes with a zero point; must be symmetric"),
    ],
    ids=["token", "unsigned", "half steps", "offsets", "weights"],
)
def test_what_tensorrt_cannot_have_is_one_line(recipe, said):
    with pytest.raises(qat.UsageError, match=rf"format.target=tensorrt: .*{said}"):
        to_onnx(qat.freeze(made(recipe)), tiny.images(1), OnnxSettings(target="tensorrt"))
