"""ONNX files of Transformers' models. Oracle: the model itself, run by torch."""

import onnx
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import qat
from qat.export.check import TOLERANCE, compare
from qat.export.runtimes import open_session, session_outputs
from tests.errors import usage_error
from tests.export.graphs import makers_of, nodes_of
from tests.tiny import fitted, randn

transformers = pytest.importorskip("transformers")

WIDTH = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


def classifier():
    config = transformers.ViTConfig(**WIDTH, num_labels=5)
    return transformers.ViTForImageClassification(config)


def encoder():
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**WIDTH))


def detector():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", out_features=["stage1"]
    )
    config = transformers.DetrConfig(
        backbone_config=backbone,
        num_queries=5,
        num_labels=3,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    return transformers.DetrForObjectDetection(config)


def images(n):
    return randn(n, 3, 16, 16, seed=n)


def quantized(build, recipe="deploy_w8a8"):
    torch.manual_seed(0)
    return fitted(build(), images(8), recipe)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:convert.*stay in float")
@pytest.mark.parametrize(
    ("build", "names", "text"),
    [
        (classifier, ["logits"], "same class on 3 of 3 images"),
        (
            encoder,
            ["last_hidden_state", "pooler_output"],
            "cosine at least 1.000000, outputs apart by up ",
        ),
        (detector, ["logits", "pred_boxes"], "same class on 3 of 3 images, boxes of matched "),
    ],
)
def test_outputs_have_names_and_those_of_the_model(build, names, text, tmp_path):
    net = quantized(build)
    path = tmp_path / "net.onnx"
    checked = qat.export_onnx(net, path, images=images(3))
    assert checked.agreement["onnxruntime"].to_text().startswith(text)
    assert [output.name for output in onnx.load(path).graph.output] == names
    outputs = session_outputs(open_session(path), names, images(2))
    with torch.no_grad():
        expected = net(images(2))
    for name in names:
        assert_close(outputs[name], expected[name], rtol=0, atol=TOLERANCE)


@pytest.mark.long
def test_outputs_for_tensorrt_are_float32(tmp_path):
    path = tmp_path / "net.onnx"
    qat.export_onnx(quantized(encoder), path, images=images(3), target="tensorrt")
    types = [output.type.tensor_type.elem_type for output in onnx.load(path).graph.output]
    assert types == [onnx.TensorProto.FLOAT] * 2


@pytest.mark.long
def test_products_of_attention_are_on_integers(tmp_path):
    qat.export_onnx(quantized(classifier), tmp_path / "net.onnx", images=images(1))
    model = onnx.load(tmp_path / "net.onnx")
    makers, products = makers_of(model), nodes_of(model, "MatMul")
    assert len(products) == 9  # six layers and two products of the attention; the head
    for node in products:
        for name in node.input:
            while makers[name].op_type in {"Transpose", "Reshape"}:
                name = makers[name].input[0]
            assert makers[name].op_type == "DequantizeLinear"


@pytest.mark.long
def test_an_operator_that_cannot_be_exported_is_named(tmp_path):
    net = quantized(classifier)
    net.classifier.register_forward_hook(lambda _, __, out: torch.special.bessel_j0(out))
    with usage_error("format=onnx: torch cannot export this model: .*bessel_j0"):
        qat.export_onnx(net, tmp_path / "net.onnx", images=images(1))
    assert list(tmp_path.iterdir()) == []


class Returns(nn.Module):
    """Returns these outputs."""

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, _):
        return self.outputs


def detections():
    boxes = torch.rand(2, 30, 4, generator=torch.Generator().manual_seed(0))
    return {"logits": boxes @ torch.ones(4, 3) + torch.eye(3)[0], "pred_boxes": boxes}


def test_queries_are_compared_in_any_order():
    flipped = {name: output.flip(1) for name, output in detections().items()}
    agreement = compare(Returns(**detections()), lambda _: flipped, None, [images(2)])
    assert (agreement.same_top1, agreement.num_differing, agreement.boxes) == (2, 0, 0)
    repeated = {name: output[:, [0, *range(29)]] for name, output in flipped.items()}
    # Each query has a partner of its own: one of the file cannot stand for two of the model.
    agreement = compare(Returns(**repeated), lambda _: flipped, None, [images(2)])
    assert agreement.num_differing == 2
    flipped["pred_boxes"][1, 0, 0] += 0.01
    flipped["logits"][1, 0, 2] += 9
    agreement = compare(Returns(**detections()), lambda _: flipped, None, [images(2)])
    assert (agreement.same_top1, agreement.num_differing) == (1, 1)


def test_embeddings_are_equal_within_a_share_of_their_largest_number():
    embeddings = randn(2, 8)
    scaled = 100 * embeddings / embeddings.abs().max()
    nearly = scaled + torch.tensor([[0.5 * 100 * TOLERANCE], [2 * 100 * TOLERANCE]])
    agreement = compare(
        Returns(pooler_output=scaled), lambda _: {"pooler_output": nearly}, None, [images(2)]
    )
    assert agreement.num_differing == 1
    assert 0.999 < agreement.cosine < 1
    assert agreement.relative_error == pytest.approx(2 * TOLERANCE, rel=0.01)
