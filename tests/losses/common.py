"""A training step without outputs, for loss terms on weights."""

import torch

from qat.losses import StepContext


def step(net, progress=1.0):
    return StepContext(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), None, net, progress)
