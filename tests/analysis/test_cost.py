"""`analysis=cost`. Oracle: `qat.model.cost.cost` of nets converted here; counts by hand for one block of width 32."""

import dataclasses

import pytest
import torch

import qat
from qat.analysis import NO_IMAGES
from qat.analysis.cost import CostAnalysis, module_kinds
from qat.model.cost import cost, matmuls, module_costs
from tests.analysis.common import KINDS, is_as_before, net_of, state, studied
from tests.nets import FAMILIES, families
from tests.tiny import SIZE, convert, vit

TOKENS, WIDTH, HEADS, HIDDEN, CLASSES = 17, 32, 2, 128, 10


def quantized(preset="ofq", **knobs):
    return convert(vit(depth=1), preset, **knobs)


def analysed(*nets):
    return CostAnalysis().run(nets, NO_IMAGES)


def assert_sums(net, size):
    """Modules add up to sums that are taken over the net as a whole."""
    parts = module_costs(net, size)
    assert len({part.module for part in parts}) == len(parts)
    assert {part.module for part in parts} <= {name for name, _ in net.named_modules()}
    assert sum(part.n_params for part in parts) == sum(p.numel() for p in net.parameters())
    products = list(matmuls(net, size))
    assert (
        sum(part.macs for part in parts)
        == sum(product.macs for product in products)
        == cost(net, size).macs
    )
    assert (
        sum(part.bitops for part in parts)
        == sum(p.macs * p.bits[0] * p.bits[1] for p in products)
        == cost(net, size).bitops
    )
    coded = [
        site
        for site in qat.iter_quantizers(net)
        if site.is_weight and site.quantizer.spec.bits < 32
    ]
    assert sum(part.code_bytes for part in parts) == sum(
        -(-s.latent().numel() * s.quantizer.spec.bits // 8) for s in coded
    )
    fields = (
        sum(getattr(part, f"{kind}_bytes") for part in parts)
        for kind in ("code", "scale", "offset", "float")
    )
    assert sum(fields) == sum(part.size_bytes for part in parts) == cost(net, size).size_bytes


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", KINDS)
def test_modules_add_up(kind):
    assert_sums(net_of(kind), SIZE)


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", families())
def test_modules_of_every_family_add_up(family):
    chosen = FAMILIES[family]
    net = chosen.converted(bits=3, attention=chosen.attention)
    assert_sums(net, chosen.input_size)


def test_the_net_in_float_is_beside_it():
    net = net_of("ofq2")
    before, generator = state(net), torch.get_rng_state()
    found = analysed(studied(net)).summary
    assert is_as_before(net, before)
    assert torch.equal(torch.get_rng_state(), generator)
    in_float = dataclasses.asdict(cost(vit(), SIZE))
    assert found == {"net": {**dataclasses.asdict(cost(net, SIZE)), "in_float": in_float}}
    assert analysed(studied(vit(), "float")).summary == {"float": in_float}
    del net._model_args  # then nobody knows how timm built it
    assert "in_float" not in analysed(studied(net)).summary["net"]


def test_kinds_add_up_and_tell_products_from_weights():
    net = quantized(bits=2)
    found = analysed(studied(net))
    kinds, modules = (table.rows for table in found.tables)
    rows = {row["kind"]: row for row in kinds}
    for table in (kinds, modules):
        assert sum(row["bytes"] for row in table) == cost(net, SIZE).size_bytes
        assert sum(row["bit operations"] for row in table) == cost(net, SIZE).bitops
    assert rows["attention products"]["MACs"] == TOKENS**2 * WIDTH * (HEADS + 1)
    assert rows["attention weights"]["MACs"] == TOKENS * WIDTH**2 * (
        HEADS + 1 + 1
    )  # folded matrix, values, projection
    assert rows["MLP"]["MACs"] == 2 * TOKENS * WIDTH * HIDDEN
    assert rows["head"]["MACs"] == WIDTH * CLASSES
    assert (rows["norms"]["bytes"], rows["norms"]["MACs"]) == (4 * 3 * 2 * WIDTH, 0)
    (fc1,) = [row for row in modules if row["module"] == "blocks.0.mlp.fc1"]
    assert (fc1["kind"], fc1["bits of operands"]) == ("MLP", "2 x 2")
    (drawing,) = found.drawings
    widths = sum(bar.get_width() for bar in drawing.figure.axes[0].patches)
    assert widths == pytest.approx(cost(net, SIZE).size_bytes / 1e6)


def test_kinds_of_a_swin():
    kinds = module_kinds(FAMILIES["swin"].build())
    assert kinds["patch_embed.proj"] == "patch embedding"
    assert kinds["layers.0.blocks.0.attn.qkv"] == "attention weights"
    assert kinds["layers.1.downsample.reduction"] == "other"
    assert kinds["layers.0.blocks.1.mlp.fc2"] == "MLP"
    assert kinds["head.fc"] == "head"


def test_kinds_of_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    kinds = module_kinds(transformers.ViTModel(config))
    assert kinds["layers.0.attention.q_proj"] == "attention weights"
    assert kinds["layers.0.mlp.fc1"] == "MLP"
