"""Running a net from a block on. Oracle: the whole forward, bit for bit."""

import pytest
import timm
import torch
from torch import nn

import qat
from qat.model.blocks import find_blocks
from qat.model.ptq_spec import PtqRecipe
from qat.ptq import calibrate
from qat.ptq.block_cache import PrefixCache, trace, verified
from qat.ptq.search_settings import TARGETS
from qat.ptq.vector import scale_vectors
from tests import tiny
from tests.ptq.searching import WEIGHTS, batches, quantized

SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "in_chans": 1, "num_classes": 10}
BEIT = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 3, "num_heads": 2, "in_chans": 1, "num_classes": 10}
FAMILIES = {
    "vit_tiny_patch16_224": tiny.KWARGS,
    "deit_tiny_distilled_patch16_224": tiny.KWARGS,
    "swin_tiny_patch4_window7_224": SWIN,
    # A bias that all blocks share is made in front of them.
    "vit_relpos_small_patch16_rpn_224": {**BEIT, "rel_pos_dim": 16, "shared_rel_pos": True},
    "beit_base_patch16_224": {**BEIT, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
}


def images_for(kwargs, n=5):
    return torch.randn(n, 1, kwargs["img_size"], kwargs["img_size"], generator=torch.Generator().manual_seed(0))


def cached(net, parts, limit=float("inf")):
    return PrefixCache(net, trace(net, find_blocks(net), parts[0][:1]), parts, limit)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_block_leads_to_the_same_logits(name):
    images = images_for(FAMILIES[name])
    net = tiny.shake(timm.create_model(name, **FAMILIES[name])).eval()
    qat.convert(net, qat.recipe("minmax", weight_quantizer=WEIGHTS), input_size=tuple(images.shape[1:]))
    qat.initialize_scales(net, [images])
    parts = images.split(2)
    cache, whole = cached(net, parts), [net(part) for part in parts]
    assert set(cache.trace.prefixes) == set(find_blocks(net))
    calls = []
    first = next(iter(find_blocks(net).values()))
    handle = first.mlp.register_forward_hook(lambda *_: calls.append(1))
    for block in reversed(list(find_blocks(net))):
        with cache.replaying(block):
            calls.clear()
            for cache.at, part in enumerate(parts):
                assert torch.equal(net(part), whole[cache.at])
            assert len(calls) == (len(parts) if find_blocks(net)[block] is first else 0)
    handle.remove()
    assert verified(net, cache.trace, images) == cache.trace
    vectors = scale_vectors(net, TARGETS, cache.trace.order)
    owners = {site.name.removesuffix(".weight_quantizer") for vector in vectors.values() for site in vector.sites}
    assert owners == {f"{block}.attn.{layer}" for block in find_blocks(net) for layer in ("qkv", "proj")}
    assert not any("forward" in module.__dict__ for module in net.modules())


@torch.no_grad()
def test_a_prefix_is_remembered_once_for_all_blocks_or_as_far_as_memory_goes():
    net, _ = quantized()
    parts, ran = batches(), []
    net.patch_embed.register_forward_hook(lambda *_: ran.append(1))
    whole = [net(part) for part in parts]
    for limit, fills in ((float("inf"), 1), (0, 2)):
        cache = cached(net, parts, limit)
        ran.clear()
        for block in ("blocks.1", "blocks.0"):
            cache.hold(block)
            assert len(cache.held) == (1 if limit == 0 else 2 if block == "blocks.1" else len(cache.held))
        assert len(ran) == fills * len(parts)
        with cache.replaying("blocks.0"):
            assert all(torch.equal(net(part), whole[i]) for i, part in enumerate(parts) if [setattr(cache, "at", i)])


@torch.no_grad()
def test_what_memory_holds_is_counted_in_bytes():
    """Of a ViT: the input of the block, and what the patch embedding gave, for every image; 16 patches, the class token, 32 channels."""
    net, _ = quantized()
    parts = batches()
    images = sum(len(part) for part in parts)
    tokens, patches = 17 * 32 * 4 * images, 16 * 32 * 4 * images
    cache = cached(net, parts)
    assert set(cache.trace.needed("blocks.1")) == {"patch_embed", "blocks.0"}
    assert cache.trace.bytes_for(["blocks.1"]) * images == tokens + patches
    enough = cache.trace.bytes_for(["blocks.0", "blocks.1"]) * images
    for limit, held in ((enough, 2), (enough - 1, 1)):
        cache = cached(net, parts, limit)
        cache.hold("blocks.1")
        assert len(cache.held) == held


def inner_trace(net, image, targets=TARGETS):
    traced = trace(net, find_blocks(net), image)
    vectors = scale_vectors(net, targets, traced.order)
    return traced.entering({name: [site.name for site in vector.sites] for name, vector in vectors.items()}), traced, vectors


def ptq_vit(**knobs):
    net = qat.convert(tiny.vit(), PtqRecipe(bits=4, **knobs), input_size=tiny.SIZE)
    calibrate(net, [tiny.images()])
    return net.eval()


def swin():
    net = tiny.shake(timm.create_model("swin_tiny_patch4_window7_224", **SWIN)).eval()
    qat.convert(net, qat.recipe("minmax", weight_quantizer=WEIGHTS), input_size=(1, 32, 32))
    return qat.initialize_scales(net, [images_for(SWIN)])


# Net, targets, what is remembered of the last block, what does not run in it.
INNER = {
    "vit": (quantized, TARGETS, {"attn.qkv.input_quantizer"}, {"norm1"}),
    "vit mlp": (quantized, ("mlp.fc2.weight",), {"mlp.fc2.input_quantizer"}, {"norm1", "attn", "norm2", "mlp.act"}),
    "vit fqvit": (ptq_vit, TARGETS, {"attn.qkv.input_quantizer"}, {"norm1"}),
    "swin": (swin, TARGETS, {"attn.qkv.input_quantizer"}, {"norm1"}),
    "qkr": (lambda: tiny.quantized("ofq", weight_quantizer=WEIGHTS), ("attn.qk",), {"attn.input_quantizer"}, {"norm1"}),
}


@pytest.mark.parametrize("case", INNER)
@torch.no_grad()
def test_what_runs_in_the_block_before_the_first_scale_that_changes_is_remembered_too(case, monkeypatch):
    build, targets, remembered, spared = INNER[case]
    net = build()
    net = net[0] if isinstance(net, tuple) else net.eval()
    images = images_for(SWIN) if case == "swin" else tiny.images(5)
    parts = images.split(2)
    inner, traced, vectors = inner_trace(net, parts[0][:1], targets)
    assert verified(net, traced, parts[0], inner) == inner
    cache, last = PrefixCache(net, inner, parts, float("inf")), list(vectors)[-1]
    held = {name.removeprefix(f"{last}.") for name in inner.needed(last) if name.startswith(f"{last}.")}
    assert remembered <= held
    assert inner.bytes_for(vectors) > traced.bytes_for(vectors)
    for block in reversed(vectors):
        vector, ran = vectors[block], []
        cache.hold(block)
        start = vector.read()
        vector.write(start * 1.3)
        whole = [net(part) for part in parts]
        assert not torch.equal(whole[0], replayed(cache, block, parts, vector, start)[0])
        for name in spared:
            monkeypatch.setattr(net.get_submodule(f"{block}.{name}"), "forward", lambda *_, found=(ran, name): found[0].append(found[1]))
        assert all(map(torch.equal, replayed(cache, block, parts, vector, start * 1.3), whole))
        assert not ran
        monkeypatch.undo()
        vector.write(start)


def replayed(cache, block, parts, vector, scales):
    """Logits of every part with these scales."""
    vector.write(scales)
    found = []
    with cache.replaying(block):
        for cache.at, part in enumerate(parts):
            found.append(cache.net(part))
    return found


@torch.no_grad()
def test_a_norm_that_reads_a_scale_behind_it_runs():
    """The integer norm is made for the step of the quantizer behind it; with its scale as a target, the prefix ends at the block."""
    net = ptq_vit(layernorm="integer")
    inner, traced, _ = inner_trace(net, tiny.images(1), ("attn.qkv.input",))
    assert inner.prefixes == traced.prefixes
    inner, traced, _ = inner_trace(net, tiny.images(1), ("attn.qkv.weight",))
    assert inner.prefixes["blocks.1"] == (*traced.prefixes["blocks.1"], "blocks.1.norm1", "blocks.1.attn.qkv.input_quantizer")


@torch.no_grad()
def test_blocks_alone_are_remembered_where_memory_has_no_room_for_more():
    net, _ = quantized()
    inner, traced, vectors = inner_trace(net, tiny.images(1))
    sites = {name: [site.name for site in vector.sites] for name, vector in vectors.items()}
    enough = inner.bytes_for(sites)
    # Of each block its input, and its norm's output after the quantizer: 17 tokens of 32 channels; the 16 patches.
    assert enough - traced.bytes_for(sites) == 2 * 17 * 32 * 4
    assert traced.entering(sites, enough) == inner
    assert traced.entering(sites, enough - 1) == traced


class Again(nn.Module):
    """A net that looks at the input of its second block again behind the last, past all modules."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(64, 8)
        self.blocks = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x.flatten(1))
        seen = [x]
        for block in self.blocks:
            x = block(x)
            seen.append(x)
        return self.head(x + seen[1])


@torch.no_grad()
def test_what_is_read_again_behind_a_block_is_remembered():
    net, images = Again(), tiny.images(3)
    traced = trace(net, find_blocks(net), images[:1])
    assert traced.prefixes["blocks.2"] == ("stem", "blocks.0", "blocks.1")
    # The stem changes the shape of its input, the blocks do not; the first one is read again.
    assert traced.needed("blocks.2") == ("stem", "blocks.0", "blocks.1")
    assert traced.needed("blocks.1") == ("stem", "blocks.0")
    assert verified(net, traced, images) == traced


class Told(nn.Linear):
    """Puts its input into a list that it shares with others."""

    def __init__(self, told):
        super().__init__(8, 8)
        self.told = told

    def forward(self, x):
        self.told.append(x.sum())
        return super().forward(x)


class Hidden(nn.Module):
    """A net whose blocks tell it something past all outputs."""

    def __init__(self):
        super().__init__()
        self.told = []
        self.stem = nn.Linear(64, 8)
        self.blocks = nn.Sequential(*[Told(self.told) for _ in range(3)])

    def forward(self, x):
        self.told.clear()
        return self.blocks(self.stem(x.flatten(1))) + sum(self.told)


@torch.no_grad()
def test_a_block_that_cannot_be_run_from_is_run_from_the_start(caplog):
    net = Hidden()
    traced = trace(net, find_blocks(net), tiny.images(1))
    assert traced.prefixes["blocks.2"] == ("stem", "blocks.0", "blocks.1")
    checked = verified(net, traced, tiny.images(3))
    assert checked.prefixes == {"blocks.0": ("stem",), "blocks.1": (), "blocks.2": ()}
    assert "blocks.2 cannot be run from its input" in caplog.text
    cache = PrefixCache(net, checked, [tiny.images(3)], 0)
    with cache.replaying("blocks.2"):
        assert torch.equal(net(tiny.images(3)), net.forward(tiny.images(3)))


def test_the_outermost_blocks_in_the_order_of_the_net():
    net = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    assert list(find_blocks(net)) == ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"]
    assert find_blocks(nn.Linear(2, 2)) == {}
