"""Strategies by name."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from qat.lit.strategies import SyncBatchNorms, choose_strategy


@pytest.mark.parametrize(
    ("name", "searches"),
    [
        ("ddp", False),
        ("ddp_find_unused_parameters_false", False),
        ("ddp_find_unused_parameters_true", True),
    ],
)
def test_no_form_of_ddp_sends_buffers(name, searches):
    """Where one process has a batch more than another in a validation, a broadcast in each forward would wait for ever."""
    options = choose_strategy(name, 2)._ddp_kwargs
    assert options["find_unused_parameters"] is searches
    assert options.get("broadcast_buffers", options.get("forward_sync_buffers")) is False


def test_synchronized_batch_norms_keep_activations_and_go_back():
    """Oracle: the outputs of the net before; parameters and statistics that training changes meanwhile come back."""
    net = nn.ModuleDict({"net": nn.Sequential(BatchNormAct2d(3), nn.BatchNorm2d(3))}).eval()
    x = torch.randn(2, 3, 4, 4)
    before, classes, plugin = (
        net["net"](x),
        [type(module) for module in net.modules()],
        SyncBatchNorms(),
    )
    synced = plugin.apply(net)
    assert all(isinstance(module, nn.SyncBatchNorm) for module in synced["net"])
    assert torch.equal(synced["net"](x), before)
    synced["net"][0].running_mean = synced["net"][0].running_mean + 1
    after = synced["net"](x)
    assert not torch.equal(after, before)
    reverted = plugin.revert(synced)
    assert [type(module) for module in reverted.modules()] == classes
    assert torch.equal(reverted["net"](x), after)
