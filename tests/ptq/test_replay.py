"""Assignments run from the first block that differs. Oracle: plain forwards; calls that are counted."""

import pytest
import timm
import torch

import qat
from qat.model.blocks import find_blocks
from qat.ptq.block_cache import trace, verified
from qat.ptq.distributed import Ranks
from qat.ptq.fitness import Evaluator, logits_of, plain_fitness
from qat.ptq.replay import Replay
from qat.ptq.widths import Widths
from tests.ptq.bit_nets import calibrated, settings
from tests.ptq.searching import batches
from tests.ptq.test_block_cache import SWIN

TOP = (8,) * 10
# Stem, then four layers of each block, then the head.
STARTS = (-1, 0, 0, 0, 0, 1, 1, 1, 1, 1)


def made(net, targets, **knobs):
    chosen = settings(micro_batch=3, **knobs).engine()
    images = batches()[0][:2]
    traced = verified(net, trace(net, find_blocks(net), images[:1]), images)
    widths = Widths(net, ("*",), traced.order)
    evaluator = Evaluator(net, batches(), targets, chosen, traced, Ranks())
    return Replay(net, evaluator, widths, traced), chosen


def assignments(n):
    drawn = torch.randint(4, (n, 10), generator=torch.Generator().manual_seed(3))
    some = [tuple((2, 3, 4, 8)[i] for i in row) for row in drawn.tolist()]
    # Neighbours, so that inputs of blocks are used again.
    return [TOP, *[(*TOP[:i], 2, *TOP[i + 1 :]) for i in (9, 7, 3, 0, 6)], *some, (*some[-1][:8], 2, 2)]


@pytest.mark.parametrize("cache_gib", [4.0, 0.0])
@pytest.mark.parametrize("knobs", [{}, {"bias_correction": True}])
def test_fitness_is_that_of_plain_forwards_bit_for_bit(cache_gib, knobs):
    net, targets = calibrated(**knobs)
    replay, chosen = made(net, targets, cache_gib=cache_gib)
    with replay.evaluator.active():
        found = [replay.fitness(bits).fitness for bits in assignments(4)]
    for bits, fitness in zip(assignments(4), found, strict=True):
        replay.widths.write(bits)
        assert plain_fitness(net, batches(), targets, chosen) == fitness
    assert len(set(found)) == len(found)


def test_layers_know_their_block():
    net, targets = calibrated()
    replay, _ = made(net, targets)
    assert replay.starts == STARTS
    assert replay.blocks == ("blocks.0", "blocks.1")
    assert [replay.first_changed(TOP, (*TOP[:i], 2, *TOP[i + 1 :])) for i in (0, 3, 9)] == [-1, 0, 1]
    late, early, stem = (*TOP[:9], 2), (8, 2, *TOP[2:]), (2, *TOP[1:])
    assert replay.ordered(TOP, [stem, early, late]) == [late, early, stem]


def test_blocks_in_front_of_a_change_do_not_run():
    net, targets = calibrated()
    replay, _ = made(net, targets)
    calls = []
    for name in replay.blocks:  # what is inside: a block that gives back what it gave before is called all the same
        net.get_submodule(f"{name}.attn.qkv").register_forward_hook(lambda *_, name=name: calls.append(name))
    whole = len(replay.evaluator.micro_batches)

    def counted(bits):
        calls.clear()
        replay.fitness(bits)
        return [calls.count(name) // whole for name in replay.blocks]

    with replay.evaluator.active():
        children = [(*TOP[:9], 2), (*TOP[:4], 2, *TOP[5:])]
        replay.prepare(TOP, children * 3)
        assert replay.made == TOP
        assert [counted(bits) for bits in children] == [[0, 1], [1, 1]]
        # The stem changes: one whole forward, whose inputs of blocks serve the next one.
        assert counted((2, *TOP[1:])) == [1, 1]
        assert counted((2, *TOP[1:9], 2)) == [0, 1]
        # A forward only pays where it saves more than it takes.
        replay.prepare(TOP, children[:1])
        assert replay.made == (2, *TOP[1:])


def test_a_pyramid_has_layers_between_its_blocks():
    """A reduction of Swin runs behind the last block of its stage, and in front of the next one."""
    net = timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()
    images = [torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))]
    targets = [logits_of(net, images[0], 4)]
    qat.convert(net, qat.PtqRecipe(bits=8), input_size=(1, 32, 32))
    qat.ptq.calibrate(net, images)
    net.eval()
    chosen = settings(micro_batch=2).engine()
    traced = verified(net, trace(net, find_blocks(net), images[0][:1]), images[0][:2])
    widths = Widths(net, ("*",), traced.order)
    replay = Replay(net, Evaluator(net, images, targets, chosen, traced, Ranks()), widths, traced)
    top = (8,) * len(widths.names)
    between = [i for i, name in enumerate(widths.names) if "downsample" in name]
    assert between
    for i in between:
        behind = widths.names[i + 1].rpartition(".blocks.")[0]
        start = replay.blocks[replay.starts[i]]
        assert replay.starts[i + 1] == replay.starts[i] + 1
        assert not start.startswith(f"{behind}.blocks")
    children = [(*top[:i], 2, *top[i + 1 :]) for i in (*between, 0, len(top) - 1, between[0] - 1)]
    with replay.evaluator.active():
        replay.prepare(top, children * 9)
        found = [replay.fitness(bits).fitness for bits in children]
    for bits, fitness in zip(children, found, strict=True):
        widths.write(bits)
        assert plain_fitness(net, images, targets, chosen) == fitness
    assert len(set(found)) == len(found)
