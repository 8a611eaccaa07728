"""Surgery on timm nets. Oracle: timm's own outputs, weights and parameter counts."""

import copy
import re

import pytest
import timm
import timm.utils
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

import qat
from qat.model.convert import conversion_of
from qat.model.ptq_spec import PtqRecipe
from qat.model.report import conversion_report
from qat.model.transfer import timm_state_dict
from qat.nn import QuantLinear
from tests.errors import usage_error
from tests.nets import FAMILIES
from tests.tiny import (
    DISTILLED,
    KWARGS,
    SIZE,
    VIT,
    convert,
    converted,
    fitted,
    float_recipe,
    images,
    logits,
    parameters,
    quantized,
    randn,
    sites,
    vit,
    with_scales,
)

QUANTIZED = ["ofq", "ofq_noqkr", "lsq", "seq", "minmax"]


def test_distilled_heads_in_training_mode():
    net = vit(DISTILLED).train()
    net.set_distilled_training(True)
    expected = net(images())
    convert(net, float_recipe("qkr"))
    assert net.training
    assert_close(net(images()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", QUANTIZED)
def test_deviates_from_reference_conversion_gives_back_the_net_it_was_given(preset):
    # There the net is copied, the original converted and the copy kept or thrown away.
    net = vit()
    before = dict(net.named_parameters())
    assert convert(net, preset) is net
    after = dict(net.named_parameters())
    new = ("qkv.weight", "qkv.bias") if preset == "ofq" else ()
    for name, parameter in before.items():
        assert name.endswith(new) or after[name] is parameter
    fixed = parameters(net)
    with_scales(net).train()(images()).sum().backward()
    assert parameters(net) == fixed


def test_parameter_count_of_the_papers_net():
    net = timm.create_model("deit_tiny_distilled_patch16_224")
    qat.convert(net, qat.recipe("ofq", bits=2), input_size=(3, 224, 224))
    # The reference has 6,081,569, of which 12 x 576 offsets are dead and 60 clip values constant.
    assert sum(p.numel() for p in net.parameters()) == 6_081_569 - 12 * 576 - 60


def test_report_lists_every_quantizer_and_what_stays_float():
    net = quantized(bits=3)
    report = qat.conversion_report(net)
    assert [(r.module, r.role, r.bits) for r in report.rows] == [
        (s.name.rpartition(".")[0], s.role, s.quantizer.spec.bits) for s in qat.iter_quantizers(net)
    ]
    assert str(report) == report.to_text()
    row = next(r for r in report.rows if (r.module, r.role) == ("blocks.0.attn", "k"))
    assert (row.quantizer, row.axis, row.scales, row.offsets) == ("lsq", -2, 17 * 2, "none")
    norms = {f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)} | {"norm"}
    assert {name for name, cls in report.stays_float if cls == "LayerNorm"} == norms
    owned = {n.rpartition(".")[0] for n, _ in net.named_parameters()}
    listed = {r.module for r in report.rows} | {
        "" if n == "(net)" else n for n, _ in report.stays_float
    }
    assert {n for n in owned if "_quantizer" not in n} <= listed


@pytest.mark.parametrize(
    "wrap",
    [lambda net: net, lambda net: nn.Sequential(net), lambda net: nn.Sequential(qat.freeze(net))],
)
@pytest.mark.parametrize("recipe", ["ofq", "fp"])
def test_converting_twice_is_an_error(wrap, recipe):
    net = quantized()
    with usage_error("the model is already quantized; build a new model"):
        convert(wrap(net), recipe)
    qat.assert_ready(net)


IMAGES_LINE = r"^convert\.input_size=.*: must be"


@pytest.mark.parametrize(
    ("recipe", "size", "line"),
    [
        ("ofq", SIZE, r"^convert: recipe='ofq': must be"),
        *(
            (qat.recipe("ofq"), size, IMAGES_LINE)
            for size in (8, (8, 8), "abc", (1, 8, 0), (1, 8, 8.0))
        ),
    ],
)
def test_arguments_of_another_kind(recipe, size, line):
    with usage_error(line):
        qat.convert(vit(), recipe, input_size=size)


@pytest.mark.parametrize(
    ("name", "changes", "size"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, (3, 224, 224)),
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": (32, 16), "in_chans": 1}, (1, 32, 16)),
        ("vit_tiny_patch16_224", {"depth": 3, "img_size": 64, "features_only": True}, (3, 64, 64)),
        ("resnet18", {"in_chans": 1}, (1, 224, 224)),
    ],
)
def test_a_model_of_timm_knows_the_size_of_its_images(name, changes, size):
    net = qat.convert(timm.create_model(name, **changes), qat.recipe("lsq"))
    assert conversion_of(net).input_size == size


def test_other_models_are_told_the_size_of_their_images():
    with usage_error(r"^convert\.input_size=None: must be \(channels, "):
        qat.convert(nn.Sequential(nn.Linear(4, 4)), qat.recipe("lsq"))


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", ["ofq", "lsq", "deploy_w8a8"])
def test_a_net_on_the_meta_device_is_filled_by_a_state_dict(recipe):
    with torch.device("meta"):
        net = timm.create_model(VIT, **KWARGS)
    convert(net, recipe)
    assert all(parameter.is_meta for parameter in net.parameters())
    full = quantized(recipe)
    line = r"^\w+: is on the meta device"
    for use in (logits, with_scales):
        with usage_error(line):
            use(net)
    net.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(logits(net), logits(full))


def test_tensors_that_no_state_dict_fills_are_named():
    family = FAMILIES["swin"]
    with torch.device("meta"):
        net = timm.create_model(family.name, **family.kwargs, num_classes=10)
    full = family.build()
    for model in (net, full):
        qat.convert(model, qat.recipe("lsq"), input_size=family.input_size)
    qat.initialize_scales(full, [family.images()])
    net.load_state_dict(full.state_dict(), assign=True)
    with usage_error(r"relative_position_index: is on the meta device"):
        logits(net, family.images())


@pytest.mark.sample(3)
@pytest.mark.parametrize("recipe", ["ofq", "lsq", "minmax"])
@pytest.mark.parametrize("use", [logits, qat.freeze, nn.Module.train])
def test_images_of_another_size_are_refused_in_one_line(recipe, use):
    net = vit(dynamic_img_size=True)
    with_scales(convert(net, recipe))
    net = net if use is logits else use(net)
    with usage_error(r"input_size.*act_scales=tensor"):
        net(randn(2, 1, 12, 12))
    net(images())


def test_one_scale_for_the_tensor_takes_images_of_any_size():
    net = with_scales(convert(vit(dynamic_img_size=True), "lsq", act_scales="tensor"))
    assert logits(net, randn(2, 1, 12, 12)).isfinite().all()


@pytest.mark.parametrize(
    ("size", "knobs", "changes"),
    [
        ((1, 9, 9), {}, {}),
        ((3, 8, 8), {}, {}),
        ((1, 16, 16), {}, {}),
        (SIZE, {"overrides": {"nothing": {"bits": 2}}}, {}),
        (SIZE, {}, {"qk_norm": True}),
    ],
    ids=["size", "channels", "twice the size", "rule", "norm"],
)
def test_a_refused_net_is_as_it_was(size, knobs, changes):
    net = vit(**changes).train()
    modules, before = list(net.named_modules()), parameters(net)
    with usage_error(
        "^quant\\." if size == SIZE else rf"input_size=\({', '.join(map(str, size))}\): "
    ):
        qat.convert(net, qat.recipe("ofq", **knobs), input_size=size)
    assert list(net.named_modules()) == modules
    assert parameters(net) == before
    assert net.training
    assert conversion_of(convert(net, "lsq")).recipe.name == "lsq"


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return x @ self.weight


def test_unknown_modules_stay_float():
    net = nn.Sequential(nn.Flatten(1, 2), Unknown(), nn.Linear(4, 4), nn.LayerNorm(4))
    unknown = net[1]
    qat.convert(net, qat.recipe("ofq"), input_size=(1, 3, 4))
    assert net[1] is unknown
    assert qat.conversion_report(net).stays_float == (("1", "Unknown"), ("3", "LayerNorm"))


class Repeated(nn.Module):
    """One layer under two names of a parent and one of another."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(4, 4)
        self.layers, self.other = nn.Sequential(layer, nn.ReLU(), layer), nn.ModuleList([layer])

    def forward(self, x):
        return self.other[0](self.layers(x.flatten(1, 2)))


class OfAVector(nn.Module):
    """Scales the channels of an image by a Linear of a learned vector."""

    def __init__(self):
        super().__init__()
        self.vector = nn.Parameter(torch.randn(5))
        self.modulation = nn.Linear(5, 3)

    def forward(self, x):
        return x * self.modulation(self.vector)[:, None, None]


@pytest.mark.parametrize("recipe", ["ofq_2bit", "minmax_4bit", "seq_4bit"])
def test_a_vector_has_one_scale(recipe):
    net = qat.convert(OfAVector(), qat.recipe(recipe), input_size=(3, 4, 4))
    images = torch.randn(2, 3, 4, 4)
    qat.initialize_scales(net, [images])
    assert net.modulation.input_quantizer.num_stored_scales <= 1
    net(images).sum().backward()
    assert net.vector.grad.isfinite().all()


def test_a_layer_is_one_layer_under_all_its_names():
    float_net = Repeated()
    net = qat.convert(copy.deepcopy(float_net), qat.recipe("lsq"), input_size=(1, 3, 4))
    assert isinstance(net.layers[0], QuantLinear)
    assert net.layers[0] is net.layers[2] is net.other[0]
    assert list(sites(net)) == ["layers.0.input_quantizer", "layers.0.weight_quantizer"]
    assert_close(timm_state_dict(net), float_net.state_dict(), rtol=0, atol=0)


def test_rules_for_one_block_stay_there():
    net = quantized(bits=2, overrides={"blocks.1.*": {"bits": 4, "act_bits": 3}})
    bits = {name: s.quantizer.spec.bits for name, s in sites(net).items()}
    for name, site in sites(net).items():
        inside = {"weight": 4, "qk": 4}.get(site.role, 3) if name.startswith("blocks.1.") else 2
        assert bits[name] == (inside if name.startswith("blocks") else 8)
    weight = sites(net)["blocks.1.mlp.fc1.weight_quantizer"]
    assert weight.quantizer.codes(weight.latent()).unique().tolist() == list(range(-8, 8))


@pytest.mark.parametrize(
    "pattern", ["blocks.7.*", "nothing", "blocks.0", "norm", "blocks.0.attn.qkv"]
)
def test_a_rule_that_changes_nothing_is_an_error(pattern):
    with usage_error(rf"^quant.overrides\[{re.escape(repr(pattern))}\]: must match "):
        converted(overrides={pattern: {"bits": 8}})


def test_a_converted_net_can_be_copied():
    net = quantized()
    twin = copy.deepcopy(net)
    assert torch.equal(logits(twin), logits(net))
    with torch.no_grad():
        twin.head.bias.add_(1)
    assert_close(logits(twin), logits(net) + 1)
    assert conversion_of(twin) == conversion_of(net)


def test_hooks_and_attributes_stay_where_they_were_put():
    net, seen = vit(), []
    layer, attention = net.blocks[0].mlp.fc1, net.blocks[1].attn
    layer.tag = attention.tag = layer._tag = "mine"
    handles = [
        layer.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__)),
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(type(module).__name__), with_kwargs=True
        ),
        attention.register_full_backward_hook(lambda module, into, out: seen.append("backward")),
        layer.register_state_dict_post_hook(
            lambda module, state, prefix, local: seen.append("state")
        ),
    ]
    with_scales(convert(net, "ofq"))
    seen.clear()
    net(images().requires_grad_()).sum().backward()
    net.state_dict()
    assert seen == ["QuantLinear", "QkrVitAttention", "backward", "state"]
    assert (
        net.blocks[0].mlp.fc1.tag == net.blocks[0].mlp.fc1._tag == net.blocks[1].attn.tag == "mine"
    )
    for handle in handles:
        handle.remove()
    logits(net)
    net.state_dict()
    assert len(seen) == 4


class Adapted(nn.Linear):
    """What adapter libraries put in place of a Linear."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias, self.a = (
            base.weight,
            base.bias,
            nn.Parameter(torch.randn(base.out_features, base.in_features) / 9),
        )

    def forward(self, x):
        return super().forward(x) + nn.functional.linear(x, self.a)


def with_parameter(layer):
    layer.gain = nn.Parameter(torch.ones(()))
    return layer


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x, **rest: 2 * forward(x, **rest)
    return layer


MORE = {
    "adapter": Adapted,
    "pruned bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "parameter": with_parameter,
    "patched": patched,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "normalized": torch.nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("way", MORE)
@pytest.mark.parametrize("recipe", ["ofq", "ofq_noqkr", "lsq"])
def test_layers_that_are_more_than_a_linear_stay_float_or_are_refused(way, recipe):
    net = vit()
    for parent, name in ((net.blocks[0].mlp, "fc1"), (net.blocks[1].attn, "qkv")):
        setattr(parent, name, MORE[way](getattr(parent, name)))
    own = {name for name, _ in net.named_parameters()}
    if recipe == "ofq":
        with usage_error(
            r"^quant\.attention='qkr': this model's qkv, which would be split, is a \w+ "
        ):
            convert(net, recipe)
        assert {name for name, _ in net.named_parameters()} == own
        return
    convert(net, recipe)
    assert own <= {name for name, _ in net.named_parameters()}
    floats = dict(conversion_report(net).stays_float)
    assert {"blocks.0.mlp.fc1", "blocks.1.attn.qkv"} <= {
        name.removesuffix(".parametrizations.weight") for name in floats
    }
    assert "blocks.0.mlp.fc2" not in floats


WRAPPED = {
    "sequential": lambda net: nn.Sequential(nn.Identity(), net),
    "data parallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("way", WRAPPED)
def test_first_and_last_layers_of_a_net_are_found_in_what_stands_around_it(way):
    def bits(net):
        return {name: site.quantizer.spec.bits for name, site in sites(net).items()}

    found = bits(convert(WRAPPED[way](vit()), bits=2))
    expected = bits(converted(bits=2))
    assert {name.partition(".")[2]: width for name, width in found.items()} == expected


@pytest.mark.parametrize("recipe", ["ofq", "ofq_noqkr"])
def test_what_was_added_to_an_attention_stays(recipe):
    net = vit()
    attention = net.blocks[0].attn
    attention.gain = nn.Parameter(torch.ones(()))
    attention.branch = nn.Linear(2, 2)
    attention.register_buffer("mask", torch.ones(1))
    state = convert(net, recipe).state_dict()
    assert {f"blocks.0.attn.{name}" for name in ("gain", "branch.weight", "mask")} <= state.keys()
    assert net.blocks[0].attn.gain is attention.gain


def test_an_attention_whose_forward_was_replaced_stays_as_it_is():
    net = vit()
    attention = patched(net.blocks[0].attn)
    convert(net, "ofq")
    assert net.blocks[0].attn is attention


def test_reparameterization_loses_no_hook():
    net = vit()
    net.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: 2 * out)
    with usage_error(
        r"^quant\.attention='qkr': this model's qkv, which would be split, is a \w+ .*hooks"
    ):
        convert(net, "ofq")


@pytest.mark.parametrize("recipe", ["ofq", "ofq_noqkr"])
def test_a_hook_in_a_pool_that_nothing_takes_apart_stays(recipe):
    net, calls = timm.create_model("vit_base_patch16_siglip_224", **KWARGS), []
    net.attn_pool.kv.register_forward_hook(lambda *_: calls.append(1))
    fitted(net, images(2), recipe)
    calls.clear()
    net(images(2))
    assert calls == [1]


DROPPING = [
    (VIT, KWARGS),
    ("eva02_tiny_patch14_224", KWARGS),
    ("hiera_tiny_224", {"num_classes": 5, "in_chans": 1, "img_size": 224}),
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("model", "changes"), DROPPING, ids=[name for name, _ in DROPPING])
def test_dropped_tokens_have_no_scales_of_their_own(model, changes):
    size = (1, changes["img_size"], changes["img_size"])
    net = timm.create_model(model, **changes, patch_drop_rate=0.5)
    with usage_error(r"^model\.args\.patch_drop_rate=0\.5: .*quant\.act_scales=tensor$"):
        qat.convert(net, qat.recipe("lsq"), input_size=size)
    fitted(net, randn(2, *size), "lsq", act_scales="tensor").train()(
        randn(2, *size)
    ).sum().backward()
    assert next(iter(qat.iter_quantizers(net))).owner.weight.grad.isfinite().all()


def test_a_net_that_dropped_tokens_is_quantized_after_training():
    recipe = PtqRecipe(act_scales="token")
    assert conversion_of(convert(vit(patch_drop_rate=0.5), recipe)).recipe == recipe


def test_a_quantized_net_is_not_reparameterized():
    net = timm.create_model("repvgg_a0", num_classes=5)
    qat.convert(net, qat.recipe("lsq", bits=4), input_size=(3, 32, 32))
    with usage_error("reparameterize first, then convert"):
        timm.utils.reparameterize_model(net)


@pytest.mark.parametrize("recipe", ["ofq", "ofq_noqkr", "seq"])
def test_no_weights_share_their_storage(tmp_path, recipe):
    net = quantized(recipe)
    save_model(net, str(tmp_path / "net.safetensors"))
    again = converted(recipe)
    load_model(again, str(tmp_path / "net.safetensors"))
    assert torch.equal(logits(again), logits(net))


@pytest.mark.parametrize("tie", ["layer", "weight"])
def test_a_tied_qkv_is_refused_under_qkr_and_stays_tied_elsewhere(tie):
    net = vit()
    first, second = (block.attn for block in net.blocks)
    if tie == "layer":
        second.qkv = first.qkv
    else:
        second.qkv.weight = first.qkv.weight
    with usage_error(r"^quant\.attention='qkr': this model ties qkv to another layer"):
        convert(net, "ofq")
    assert (net.blocks[0].attn, net.blocks[1].attn) == (first, second)
    convert(net, "ofq", attention="standard")
    assert net.blocks[0].attn.qkv.weight is net.blocks[1].attn.qkv.weight


class OtherAttention(nn.Module):
    """Attention of a class without a swap: torch's, torch's encoder, or by functions only."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed = nn.Conv2d(1, 16, 2, 2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        if self.kind == "torch":
            x = self.attention(x, x, x, need_weights=False)[0]
        elif self.kind == "encoder":
            x = self.encoder(x)
        else:
            x = torch.einsum("...nm,...mc->...nc", torch.bmm(x, x.mT).softmax(-1), x)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("kind", "recipe", "expected"),
    [
        ("torch", qat.recipe("lsq"), r"95\.. % .*: attention \(MultiheadAttention\)$"),
        ("torch", qat.recipe("lsq", attention="float"), r": attention \(MultiheadAttention\)$"),
        ("encoder", qat.recipe("lsq"), r": encoder.self_attn \(MultiheadAttention\)$"),
        ("functions", qat.recipe("lsq"), r": \(net\) \(OtherAttention\)$"),
        ("functions", qat.recipe("lsq", attention="float"), None),
        ("functions", qat.recipe("statsq"), None),
        ("functions", PtqRecipe(placement="inputs"), r"\(OtherAttention\)$"),
    ],
)
def test_a_warning_names_attentions_that_stay_float(kind, recipe, expected, recwarn):
    convert(OtherAttention(kind), recipe)
    messages = [str(w.message) for w in recwarn if str(w.message).startswith("convert:")]
    assert len(messages) == bool(expected)
    assert all(re.search(expected, message) for message in messages)


def test_torchs_encoder_layer_does_not_go_around_its_quantizers():
    net = with_scales(convert(OtherAttention("encoder"), "lsq", bits=2)).eval()
    assert_close(logits(net), net(images()).detach())


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["hiera", "vit", "swinv2"])
def test_a_net_that_is_read_back_is_not_warned_of_again(name, tmp_path, recwarn):
    net = FAMILIES[name].converted("lsq")
    assert len(recwarn) == (name == "hiera")
    qat.save(net, tmp_path / "net.ckpt")
    qat.load(tmp_path / "net.ckpt")
    assert len(recwarn) == (name == "hiera")
