"""`analysis=cost`. Oracle: `qat.model.cost.cost` of nets converted here; counts by hand for one block of width 32."""

import pytest
import torch

import qat
from qat.analysis.cost.cost import CostAnalysis, module_kinds, without_qkr
from qat.model.cost import cost, matmuls, module_costs
from tests.analysis.common import KINDS, is_as_before, net_of, state, studied
from tests.nets import FAMILIES, families
from tests.tiny import SIZE, vit

TOKENS, WIDTH, HEADS, HIDDEN, CLASSES = 17, 32, 2, 128, 10


def quantized(preset="ofq", **knobs):
    return qat.convert(vit(depth=1), qat.recipe(preset, **knobs), input_size=SIZE)


def table(found, name):
    (rows,) = [t.rows for t in found.tables if t.name == name]
    return rows


def totals(found):
    return {
        (row["net"], row["variant"]): tuple(row.get(key) for key in ("parameters in training", "bytes", "MACs", "bit operations"))
        for row in table(found, "cost")
    }


def numbers(net, size=SIZE):
    found = cost(net, size)
    return found.n_params, found.size_bytes, found.macs, found.bitops


def assert_sums(net, size):
    """Modules add up to sums that are taken over the net as a whole."""
    parts = module_costs(net, size)
    assert len({part.module for part in parts}) == len(parts)
    assert {part.module for part in parts} <= {name for name, _ in net.named_modules()}
    assert sum(part.n_params for part in parts) == sum(p.numel() for p in net.parameters())
    products = list(matmuls(net, size))
    assert sum(part.macs for part in parts) == sum(product.macs for product in products) == cost(net, size).macs
    assert sum(part.bitops for part in parts) == sum(p.macs * p.bits[0] * p.bits[1] for p in products) == cost(net, size).bitops
    coded = [site for site in qat.iter_quantizers(net) if site.is_weight and site.quantizer.spec.bits < 32]
    assert sum(part.code_bytes for part in parts) == sum(-(-s.latent().numel() * s.quantizer.spec.bits // 8) for s in coded)
    fields = (sum(getattr(part, f"{kind}_bytes") for part in parts) for kind in ("code", "scale", "offset", "float"))
    assert sum(fields) == sum(part.size_bytes for part in parts) == cost(net, size).size_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_modules_add_up(kind):
    assert_sums(net_of(kind), SIZE)


@pytest.mark.parametrize("family", families())
def test_modules_of_every_family_add_up(family):
    chosen = FAMILIES[family]
    net = qat.convert(chosen.build(), qat.recipe("ofq", bits=3, attention=chosen.attention), input_size=chosen.input_size)
    assert_sums(net, chosen.input_size)


def test_one_block_by_hand():
    parts = {part.module: part for part in module_costs(quantized(bits=2), SIZE)}
    attention = parts["blocks.0.attn"]
    folded = HEADS * WIDTH * WIDTH
    assert attention.code_bytes == folded // 4
    # A step per row of the folded matrix (made from the weights), per token, per token and head; probabilities, per query; values.
    assert attention.scale_bytes == 4 * (HEADS * WIDTH + TOKENS + TOKENS * HEADS + TOKENS + WIDTH)
    assert attention.offset_bytes == 4 * (2 * WIDTH + HEADS * WIDTH + 2 * WIDTH)  # input, product, values
    assert attention.float_bytes == 0
    assert [(p.macs, p.bits, p.of_activations) for p in attention.products] == [
        (HEADS * TOKENS * WIDTH**2, (2, 2), False),
        (TOKENS**2 * HEADS * WIDTH, (2, 2), True),
        (TOKENS**2 * WIDTH, (2, 2), True),
    ]
    fc1 = parts["blocks.0.mlp.fc1"]
    assert (fc1.code_bytes, fc1.scale_bytes, fc1.offset_bytes, fc1.float_bytes) == (
        HIDDEN * WIDTH // 4,
        4 * (HIDDEN + TOKENS),
        4 * 2 * WIDTH,
        4 * HIDDEN,
    )
    assert (fc1.macs, fc1.bitops) == (TOKENS * WIDTH * HIDDEN, 4 * TOKENS * WIDTH * HIDDEN)
    assert parts[""].float_bytes == 4 * (WIDTH + TOKENS * WIDTH)  # class token, position embedding
    assert parts["norm"].float_bytes == 4 * 2 * WIDTH


def test_compared_with_float_and_without_reparameterization():
    net = net_of("ofq2")
    before = state(net)
    found = totals(CostAnalysis().outcome([studied(net)], []))
    assert is_as_before(net, before)
    assert found == {
        ("net", "as it is"): numbers(net),
        ("net", "in float"): numbers(vit()),
        ("net", "without QKR"): numbers(net_of("noqkr")),
    }


@pytest.mark.parametrize(("kind", "variants"), [("lsq4", 2), ("ptq4", 2), ("fold", 3), ("minmax", 2)])
def test_only_what_has_it_is_compared_without_it(kind, variants):
    found = CostAnalysis().outcome([studied(net_of(kind))], [])
    assert len(table(found, "cost")) == variants
    assert all(row["note"] == "" for row in table(found, "cost"))


def test_nets_that_are_built_to_compare_leave_the_generator_alone():
    net, before = net_of("ofq2"), torch.get_rng_state()
    assert len(totals(CostAnalysis().outcome([studied(net)], []))) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_reparameterization_in_some_blocks():
    rules = {"overrides": {"blocks.0.*": {"attention": "qkr"}, "blocks.1.*": {"bits": 8}}}
    chosen = qat.recipe("ofq_noqkr", bits=2, **rules)
    changed = without_qkr(chosen)
    assert changed.overrides == {"blocks.0.*": {"attention": "standard"}, "blocks.1.*": {"bits": 8}}
    assert chosen.overrides["blocks.0.*"] == {"attention": "qkr"}
    assert without_qkr(qat.recipe("ofq_noqkr", bits=2)) is None
    mixed = without_qkr(qat.recipe("ofq", overrides={"blocks.1.attn": {"attention": "float"}}))
    assert (mixed.attention, mixed.overrides) == ("standard", {"blocks.1.attn": {"attention": "float"}})


def test_a_float_net_is_compared_with_nothing():
    found = CostAnalysis().outcome([studied(vit())], [])
    assert [row["variant"] for row in table(found, "cost")] == ["as it is"]
    assert {d.name for d in found.drawings} == {"cost_bytes", "cost_bitops"}


def test_a_net_that_cannot_be_built_again_says_why():
    net = quantized(bits=2)
    del net._model_args
    found = CostAnalysis().outcome([studied(net)], [])
    notes = {row["variant"]: row["note"] for row in table(found, "cost")}
    assert notes["as it is"] == ""
    for variant in ("in float", "without QKR"):
        assert notes[variant].startswith("cannot be built: save: this net does not say how timm built it")
    assert "bytes" not in [r for r in table(found, "cost") if r["variant"] == "in float"][0]


def test_kinds_add_up_and_tell_products_from_weights():
    net = quantized(bits=2)
    found = CostAnalysis().outcome([studied(net)], [])
    rows = {row["kind"]: row for row in table(found, "cost_kinds") if row["variant"] == "as it is"}
    assert sum(row["bytes"] for row in rows.values()) == cost(net, SIZE).size_bytes
    assert sum(row["bit operations"] for row in rows.values()) == cost(net, SIZE).bitops
    assert rows["attention products"]["MACs"] == TOKENS**2 * WIDTH * (HEADS + 1)
    assert rows["attention weights"]["MACs"] == TOKENS * WIDTH**2 * (HEADS + 1 + 1)  # folded matrix, values, projection
    assert rows["MLP"]["MACs"] == 2 * TOKENS * WIDTH * HIDDEN
    assert rows["head"]["MACs"] == WIDTH * CLASSES
    assert (rows["norms"]["bytes"], rows["norms"]["MACs"]) == (4 * 3 * 2 * WIDTH, 0)
    modules = table(found, "cost_modules")
    assert sum(row["bytes"] for row in modules) == cost(net, SIZE).size_bytes


def test_kinds_of_a_swin():
    chosen = FAMILIES["swin"]
    kinds = module_kinds(chosen.build())
    assert kinds["patch_embed.proj"] == "patch embedding"
    assert kinds["layers.0.blocks.0.attn.qkv"] == "attention weights"
    assert kinds["layers.1.downsample.reduction"] == "other"
    assert kinds["layers.0.blocks.1.mlp.fc2"] == "MLP"
    assert kinds["head.fc"] == "head"


def test_pictures_leave_out_what_would_dwarf_the_rest():
    nets = [studied(quantized(bits=2), "two"), studied(vit(depth=1), "plain")]
    found = CostAnalysis().outcome(nets, [])
    bitops = next(d for d in found.drawings if d.name == "cost_bitops")
    labels = [text.get_text() for text in bitops.figure.axes[0].get_yticklabels()]
    assert labels == ["two", "two, without QKR"]
    assert f"plain: {cost(vit(depth=1), SIZE).bitops / 1e6:.3g} M bit operations" in bitops.alt
