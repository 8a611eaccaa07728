"""Attention of Transformers' models. Oracles: their own sdpa, torch's, and the config before."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat.nn import HeadProducts, SwapContext
from tests.errors import usage_error
from tests.hf_models import KINDS, REFUSED, are_equal, outputs
from tests.tiny import float_recipe, parameters, randn

VIT = KINDS["ViTForImageClassification"]
# Masks, positions, cross attention, windows, shared keys; the others take longer than they add.
SHORT = {
    "ViTForImageClassification",
    "BeitForImageClassification",
    "DINOv3ViTModel",
    "CLIPVisionModel",
    "ConditionalDetrForObjectDetection",
    "EomtForUniversalSegmentation",
    "SwinForImageClassification",
    "SegformerForSemanticSegmentation",
    "Mask2FormerForUniversalSegmentation",
}
# In float32, they amplify the last bits of a product a hundredfold.
AMPLIFYING = {"DFineForObjectDetection", "RfDetrForObjectDetection"}
ALL = [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in KINDS]


def products(net):
    """Names of the attentions with quantizers."""
    return [name for name, module in net.named_modules() if isinstance(module, HeadProducts)]


@pytest.mark.parametrize("name", ALL)
def test_without_rounding_nothing_changes(name):
    kind = KINDS[name]
    dtype, tolerance = (torch.double, 1e-9) if name in AMPLIFYING else (torch.float, 1e-5)
    net, x = kind.build().to(dtype), kind.images().to(dtype)
    plain = outputs(net, x)
    qat.convert(net, float_recipe("standard"), input_size=kind.input_size)
    assert products(net) or name not in SHORT
    for ours, theirs in zip(outputs(net, x), plain, strict=True):
        assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_a_mask_in_float32_with_images_in_double():
    """On a CPU, torch's sdpa reads such a mask as if it were double, so the oracle is eager."""
    kind = KINDS["EomtForUniversalSegmentation"]
    net, x = kind.build().double(), kind.images().double()
    net.set_attn_implementation("eager")
    plain = outputs(net, x)
    qat.convert(net, float_recipe("standard"), input_size=kind.input_size)
    for ours, theirs in zip(outputs(net, x), plain, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # eager's softmax is float32


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_products_are_those_of_torch(groups, mask):
    layer = HeadProducts(SwapContext(float_recipe("standard"), "block"))
    query, key, value = randn(2, 4, 5, 6), randn(2, 4 // groups, 7, 6), randn(2, 4 // groups, 7, 3)
    kept = randn(2, 1, 5, 7, seed=1) > 0
    kept[..., 0] = True
    masks = {"bool": kept, "additive": randn(2, 4, 5, 7, seed=2)}
    out, probs = layer(query, key, value, masks.get(mask), 0.3)
    theirs = F.scaled_dot_product_attention(
        query, key, value, masks.get(mask), scale=0.3, enable_gqa=True
    )
    assert_close(out, theirs.transpose(1, 2), rtol=0, atol=1e-6)
    assert_close(probs.sum(-1), torch.ones(2, 4, 5))


def test_probabilities_that_it_returns_are_quantized():
    net = VIT.quantized(bits=2)
    x, seen = VIT.images(), []
    for module in net.modules():
        if isinstance(module, HeadProducts):
            module.probs_quantizer.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        attentions = net(x, output_attentions=True).attentions
    assert are_equal([*attentions], seen)
    scales = attentions[0].movedim(2, 0).flatten(1)
    assert max(len(row.unique()) for row in scales) <= 4


@pytest.mark.parametrize("mode", [True, False])
def test_it_is_deterministic_and_takes_keywords(mode):
    net, x = VIT.quantized(bits=4).train(mode), VIT.images()
    assert torch.equal(net(x).logits, net(pixel_values=x).logits)
    net(x, labels=torch.zeros(2).long()).loss.backward()
    quantizer = net.vit.layers[0].attention.quantized.q_quantizer
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


def test_float_attention_keeps_the_implementation():
    net = VIT.converted(attention="float", bits=4)
    assert products(net) == []
    assert {net.config._attn_implementation, net.vit.config._attn_implementation} == {"sdpa"}


def test_a_rule_keeps_one_attention_in_float():
    net = VIT.converted(bits=4, overrides={"vit.layers.0.attention": {"attention": "float"}})
    assert products(net) == ["vit.layers.1.attention.quantized"]


def test_other_models_of_the_config_do_not_change():
    config = VIT.config()
    before, (net, other) = config.to_dict(), (VIT.cls(config).eval() for _ in range(2))
    plain = outputs(other, VIT.images())
    qat.convert(net, qat.recipe("seq"), input_size=VIT.input_size)
    assert config.to_dict() == before
    assert config._attn_implementation == other.config._attn_implementation == "sdpa"
    assert are_equal(outputs(other, VIT.images()), plain)


@pytest.mark.parametrize(
    ("knobs", "size", "message"),
    [
        ({"attention": "qkr"}, 32, "attention='qkr': .* must be one of standard, float"),
        ({"overrides": {"nope": {"bits": 8}}}, 32, r"overrides\['nope'\]: must match"),
        ({}, 64, r"input_size=\(3, 64, 64\): the model does not accept images"),
    ],
)
def test_a_failed_conversion_leaves_nothing(knobs, size, message):
    net = VIT.build()
    config, before = net.config, copy.deepcopy(net.config.to_dict())
    tensors, names = parameters(net), [*net.named_modules()]
    plain = outputs(net, VIT.images())
    with usage_error(message):
        qat.convert(net, qat.recipe("seq", **knobs), input_size=(3, size, size))
    assert net.config is net.vit.config is config
    assert config.to_dict() == before
    assert config._attn_implementation == "sdpa"
    assert (parameters(net), [*net.named_modules()]) == (tensors, names)
    assert are_equal(outputs(net, VIT.images()), plain)


TAKES = {
    "Siglip2VisionModel": "takes pixel_values, pixel_attention_mask, spatial_shapes; must be",
    "VideoMAEForVideoClassification": "does not accept images",
    "VJEPA2Model": "takes pixel_values_videos",
    "BertModel": "takes input_ids; must be a model that takes only pixel_values$",
    "CLIPModel": "takes input_ids; .* only pixel_values; convert model.vision_model$",
}


@pytest.mark.parametrize("name", TAKES)
def test_models_that_take_other_inputs(name):
    with usage_error(TAKES[name]):
        REFUSED[name].converted()


@pytest.mark.parametrize(
    ("activation", "is_unsigned"),
    [
        ("quick_gelu", True),
        ("gelu_new", True),
        ("gelu_fast", True),
        ("gelu", True),
        ("mish", False),
    ],
)
def test_activations_of_the_package(activation, is_unsigned):
    net = KINDS["CLIPVisionModel"].build(hidden_act=activation)
    qat.convert(net, qat.recipe("lsq"), input_size=VIT.input_size)
    unsigned = [s.layer for s in qat.iter_quantizers(net) if not s.quantizer.spec.signed]
    assert ("encoder.layers.0.mlp.fc2" in unsigned) == is_unsigned


class Wrapper(nn.Module):
    """A module of one's own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(pixel_values=F.interpolate(x, scale_factor=0.5)).logits


def test_a_model_in_another_module():
    model = VIT.build()
    net = qat.convert(Wrapper(model), qat.recipe("seq", bits=4), input_size=(3, 64, 64))
    assert len(products(net)) == 2
    bits = {site.layer: site.quantizer.spec.bits for site in qat.iter_quantizers(net)}
    assert (bits["model.classifier"], bits["model.vit.layers.0.mlp.fc1"]) == (8, 4)
    qat.initialize_scales(net, [randn(2, 3, 64, 64)])
    assert net(randn(2, 3, 64, 64)).shape == (2, 5)


def test_adapters_stay_in_float():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    net = peft.get_peft_model(VIT.build(), config)
    qat.convert(net, qat.recipe("seq", bits=4), input_size=VIT.input_size)
    layers = {site.layer.removeprefix("base_model.model.") for site in qat.iter_quantizers(net)}
    assert "vit.layers.0.attention.q_proj.base_layer" in layers
    assert not any("lora" in layer for layer in layers)
    in_float = [name for name, _ in qat.conversion_report(net).stays_float]
    assert sum("lora_A" in name for name in in_float) == 4
    qat.initialize_scales(net, [VIT.images()])
    net(pixel_values=VIT.images(), labels=torch.zeros(2).long()).loss.backward()
    trained = {name for name, p in net.named_parameters() if "lora" in name and p.grad is not None}
    assert len(trained) == 8


def test_layers_that_a_model_calls_from_a_list():
    net = KINDS["Mask2FormerForUniversalSegmentation"].converted(bits=4)
    layers = {site.layer.rpartition(".mask_embedder.")[2] for site in qat.iter_quantizers(net)}
    assert {"0.0", "1.0", "2.0"} <= layers
