"""Forward passes that begin at a module. Oracle: the whole forward pass, bit for bit."""

import dataclasses

import pytest
import torch
from torch import nn

from qat.model.sites import find_blocks
from qat.ptq.runner import Runner
from tests import tiny
from tests.nets import FAMILIES
from tests.ptq.searching import WEIGHTS, batches, quantized

RELPOS = dataclasses.replace(FAMILIES["relpos"], name="vit_relpos_small_patch16_rpn_224")
SHARED = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}
NETS = {
    "deit_distilled": (FAMILIES["deit_distilled"], {}),
    "swin": (FAMILIES["swin"], {}),
    # A bias that all blocks share is made before them.
    "relpos": (RELPOS, {"rel_pos_dim": 16, "shared_rel_pos": True}),
    "beit": (FAMILIES["beit"], SHARED),
}


def runner(net, parts, limit=float("inf"), entry=""):
    return Runner(
        net,
        {name: [name + entry] for name in find_blocks(net)},
        parts,
        limit,
        needs_net_output=True,
    )


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_every_block_leads_to_the_same_logits_and_what_comes_before_does_not_run(name, caplog):
    family, changes = NETS[name]
    images = family.images(5)
    net = tiny.fitted(family.build(**changes), images, "minmax", weight_quantizer=WEIGHTS)
    parts, calls = images.split(2), []
    whole, runs = [net(part) for part in parts], runner(net, parts)
    first = next(iter(find_blocks(net)))
    net.get_submodule(first).mlp.register_forward_hook(lambda *_: calls.append(1))
    for block in reversed(find_blocks(net)):
        with runs.at(block):
            calls.clear()
            assert all(torch.equal(runs(i), logits) for i, logits in enumerate(whole))
            assert len(calls) == (len(parts) if block == first else 0)
    assert "cannot run" not in caplog.text
    assert not any("forward" in module.__dict__ for module in net.modules())


@torch.no_grad()
def test_inputs_are_remembered_once_for_all_blocks_or_as_far_as_memory_goes():
    """Of a block: its 17 tokens of 32 channels; before all blocks, the 16 patches."""
    net, _ = quantized()
    parts, ran = batches(), []
    whole = [net(part) for part in parts]
    enough = sum(len(part) for part in parts) * (2 * 17 + 16) * 32 * 4
    for limit, fills in ((enough, 1), (enough - 1, 2), (0, 2)):
        runs = runner(net, parts, limit)
        handle = net.patch_embed.proj.register_forward_hook(lambda *_: ran.append(1))
        ran.clear()
        for block in ("blocks.1", "blocks.0"):
            with runs.at(block):
                assert all(torch.equal(runs(i), logits) for i, logits in enumerate(whole))
        assert len(ran) == fills * len(parts)
        handle.remove()


@torch.no_grad()
def test_what_runs_in_the_block_before_its_entry_is_remembered_too(monkeypatch):
    net, _ = quantized()
    parts = batches()
    runs, quantizer = (
        runner(net, parts, entry=".mlp.fc2.weight_quantizer"),
        net.blocks[1].mlp.fc2.weight_quantizer,
    )
    with runs.at("blocks.1"):
        pass
    quantizer.scale.mul_(1.3)
    whole = [net(part) for part in parts]
    for name in ("norm1", "attn", "norm2", "mlp.act", "mlp.fc2.input_quantizer"):
        monkeypatch.setattr(
            net.get_submodule(f"blocks.1.{name}"), "forward", lambda *_: pytest.fail("runs")
        )
    with runs.at("blocks.1"):
        assert all(torch.equal(runs(i), logits) for i, logits in enumerate(whole))


class PassesNone(nn.Module):
    """A block that returns a second value, None, as some blocks of Transformers do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, mask=None):
        return self.linear(x), mask


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(64, 8)
        self.blocks = nn.ModuleList(PassesNone() for _ in range(3))

    def forward(self, x):
        x, mask = self.stem(x.flatten(1)), None
        for block in self.blocks:
            x, mask = block(x, mask)
        return x


@torch.no_grad()
def test_a_block_may_return_none_beside_its_output(caplog):
    net, images = Pairs(), tiny.images(3)
    runs = Runner(net, {f"blocks.{i}": [f"blocks.{i}"] for i in range(3)}, [images])
    expected = net(images)
    assert caplog.messages == []
    for i in range(3):
        with runs.at(f"blocks.{i}"):
            assert torch.equal(runs(0), expected)


class Again(nn.Module):
    """A net that looks at the output of its first block again after the last."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(64, 8)
        self.blocks = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        x = seen = self.blocks[0](self.stem(x.flatten(1)))
        return self.blocks[2](self.blocks[1](x)) + seen


@torch.no_grad()
def test_a_block_that_cannot_be_run_from_is_run_from_the_start(caplog):
    net, images = Again(), tiny.images(3)
    runs = runner(net, [images])
    assert caplog.messages == [
        f"blocks.{i}: the output is not the same when the model starts there; "
        "the whole model runs instead"
        for i in (2, 1)
    ]
    with runs.at("blocks.2"):
        assert torch.equal(runs(0), net(images))
    expected = runs.output("blocks.2", 0)
    runs = Runner(net, {"blocks.2": ["blocks.2"]}, [images])
    with runs.at("blocks.2"):
        assert torch.equal(runs.output("blocks.2", 0)[1], expected[1])
    assert len(caplog.messages) == 2
