"""Torchvision's Swin in timm's. Oracle: torchvision's own forward pass."""

import pytest
import torch
import torchvision
from torch.testing import assert_close

from qat.model.checkpoint import read_checkpoint
from qat.model.start import from_state
from tests.tiny import randn


@pytest.mark.parametrize("depths", [[2, 1, 1, 1], [1, 2, 1, 1]])
def test_logits_are_torchvisions(tmp_path, depths):
    torch.manual_seed(0)
    shape = {"embed_dim": 24, "depths": depths, "num_heads": [1, 2, 3, 6], "num_classes": 5}
    theirs = torchvision.models.SwinTransformer(
        patch_size=[4, 4], window_size=[7, 7], stochastic_depth_prob=0.0, **shape
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    kwargs = {"embed_dim": 24, "depths": depths, "num_heads": (1, 2, 3, 6), "num_classes": 5}
    state = read_checkpoint(tmp_path / "swin.pth", fmt="timm").state
    start = from_state(
        "swin_tiny_patch4_window7_224", kwargs, state, origin="swin.pth", keep_head=False
    )
    x = randn(1, 3, 224, 224, seed=1)
    with torch.no_grad():
        assert_close(start.net.eval()(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert not any("new head" in note for note in start.notes)
