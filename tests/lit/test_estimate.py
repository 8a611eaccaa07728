"""What a run will cost. Oracles: bytes counted by hand, the module before the measurement."""

import copy

import pytest
import torch
from torch import nn

from qat.lit import QATModule, Teacher
from qat.lit.estimate import measure_step
from qat.losses import CompositeLoss, CrossEntropy, Distillation
from tests.tiny import SIZE, quantized, vit

CPU = torch.device("cpu")


def measure(net, teacher=None, **settings):
    terms = {"ce": CrossEntropy()} | ({"kd": Distillation()} if teacher else {})
    module = QATModule(net.train(), CompositeLoss(terms), num_classes=10, teacher=Teacher(teacher) if teacher else None)
    return module, measure_step(module, SIZE, batch_size=16, num_classes=10, device=CPU, **settings)


class TwoLayers(nn.Module):
    """Saves for its backward pass: images (64 floats), relu's output (32), and for the loss the log-probabilities (10) and a class id."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)).relu())


def test_bytes_of_a_net_by_hand():
    _, cost = measure(TwoLayers())
    weights = 4 * (64 * 32 + 32 + 32 * 10 + 10)
    assert cost.weight_bytes == 4 * weights  # themselves, gradients, two moments
    floats = 64 + 32 + 10
    assert floats * 4 <= cost.saved_bytes <= floats * 4 + 8 + 4  # and a class id, and the mean's total weight shared by 8 images


def test_the_optimizer_and_the_teacher_count():
    weights = sum(p.numel() for p in vit().parameters()) * 4
    assert measure(vit(), opt="sgd")[1].weight_bytes == 3 * weights
    assert measure(vit(), teacher=vit())[1].weight_bytes == 5 * weights


def test_training_takes_longer_than_evaluation():
    _, cost = measure(vit(depth=4))
    assert cost.train_s > cost.eval_s > 0


@pytest.mark.parametrize("make", [vit, quantized, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout())])
def test_nothing_is_left_behind(make):
    net = make()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    module, _ = measure(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert module.training


def test_checkpointing_saves_memory():
    net = vit(depth=4)
    full = measure(net)[1].saved_bytes
    net.set_grad_checkpointing(enable=True)
    assert measure(net)[1].saved_bytes < full / 2
