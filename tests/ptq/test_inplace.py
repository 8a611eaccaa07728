"""Which quantizers may write over their input. Oracle: the whole forward without it, bit for bit, and nets made to go wrong."""

import copy

import pytest
import torch
from torch import nn

import qat
from qat.model.blocks import find_blocks
from qat.model.ptq_spec import PtqRecipe
from qat.ptq import calibrate
from qat.ptq.block_cache import trace
from qat.ptq.inplace import overwriting
from qat.ptq.patching import patched
from tests import tiny


def ptq(placement):
    net = qat.convert(tiny.vit(), PtqRecipe(bits=4, placement=placement), input_size=tiny.SIZE)
    calibrate(net, [tiny.images()])
    return net


def prefixes(net):
    traced = trace(net, find_blocks(net), tiny.images(1))
    return {name for prefix in traced.prefixes.values() for name in prefix}


# Read again: the image, the position embedding, and q, k of one tensor that the quantizers of k and v read next.
@pytest.mark.parametrize(
    ("placement", "spared"),
    [
        ("fqvit", {"positions_quantizer", "patch_embed.proj.input_quantizer"}),
        ("inputs", {"patch_embed.proj.input_quantizer", "attn.q_quantizer", "attn.k_quantizer"}),
    ],
)
def test_all_but_those_whose_input_is_read_again(placement, spared):
    net = ptq(placement)
    found = overwriting(net, prefixes(net), tiny.images(2))
    left = {s.name for s in qat.iter_quantizers(net) if not s.is_weight and s.quantizer not in found}
    assert {name.removeprefix("blocks.0.").removeprefix("blocks.1.") for name in left} == spared
    images, before = tiny.images(5), copy.deepcopy(net.state_dict())
    whole = tiny.logits(net, images)
    with patched(found):
        assert torch.equal(tiny.logits(net, images), whole)
        assert torch.equal(tiny.logits(net, images), whole)
    assert torch.equal(images, tiny.images(5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_gradients_take_the_way_that_has_them():
    net = ptq("fqvit")
    images = tiny.images(2).requires_grad_()
    with patched(overwriting(net, prefixes(net), tiny.images(2))):
        net(images).sum().backward()
    assert images.grad.abs().max() > 0


class Net(nn.Module):
    """Two Linears with something between them that a subclass says."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.between(x)


class Once(Net):
    def between(self, x):
        return self.second(x)


class Residual(Net):
    def between(self, x):
        return x + self.second(x)


class View(Net):
    """What reads it again has another shape, and its own name."""

    def between(self, x):
        flat = x.view(-1)
        return self.second(x) + flat.view(-1, 8)


class Expanded(Net):
    """Rows that share their memory."""

    def between(self, x):
        return self.second(x[:1].expand(3, -1))


@pytest.mark.parametrize(("cls", "may"), [(Once, True), (Residual, False), (View, False), (Expanded, False)])
def test_who_reads_again_is_seen(cls, may):
    torch.manual_seed(0)
    net = qat.convert(cls().eval(), PtqRecipe(placement="inputs"), input_size=tiny.SIZE)
    calibrate(net, [tiny.images()])
    assert (net.second.input_quantizer in overwriting(net, [], tiny.images(2))) is may
    # Somebody keeps what the first one gave.
    assert net.second.input_quantizer not in overwriting(net, ["first"], tiny.images(2))
