"""Training steps without Lightning: none waits for the device, each compiles as one graph. Oracle: the driver's own word on synchronisation."""

import pytest
import torch

import qat
from evidence.speed.steps import ARMS, TINY, build, teacher_of
from qat.functional.confidence import near_threshold
from qat.lit.compiled import CompiledCall
from qat.lit.optim import build_optimizer
from qat.losses import CompositeLoss, CrossEntropy, Dampening, Distillation, Kure, StepContext
from qat.model.entry_freezer import EntryFreezer
from qat.quantizers import StatsQ

MODEL, BATCH = "deit_tiny_patch16_224", 4
TERMS = {
    "ce": lambda: {"ce": CrossEntropy()},
    "kure": lambda: {"ce": CrossEntropy(), "kure": Kure()},
    "dampening": lambda: {"ce": CrossEntropy(), "dampening": Dampening()},
    "kd": lambda: {"kd": Distillation()},
}


class Run:
    """A tiny quantized net in training."""

    def __init__(self, device, arm="ofq", terms="ce", *, anneals=False, call=None):
        self.device, self.anneals = device, anneals
        torch.manual_seed(0)
        self.images = torch.randn(BATCH, 3, TINY["img_size"], TINY["img_size"], device=device)
        self.target = torch.arange(BATCH, device=device)
        self.net = build(MODEL, ARMS[arm], self.images, **TINY, depth=1)
        self.call = self.net if call is None else call(self.net)
        self.teacher = (
            teacher_of(MODEL, ARMS["ofq + teacher"], self.images, **TINY, depth=1)
            if terms == "kd"
            else None
        )
        self.loss = CompositeLoss(TERMS[terms]())
        self.loss.prepare(self.net)
        self.optimizer = build_optimizer(self.net, lr=1e-3, weight_decay=0.05, fused=True)
        self.freezer = EntryFreezer()
        self.freezer.attach([self.optimizer])

    def step(self):
        followed = None if self.teacher is None else self.teacher(self.images)
        with torch.autocast(self.device.type, torch.bfloat16):
            context = StepContext(self.call(self.images), self.target, followed, self.net)
            loss, _ = self.loss(context)
        loss.backward()
        if self.anneals:
            frozen = []
            for site in qat.iter_quantizers(self.net):
                if site.role == "weight" and isinstance(site.quantizer, StatsQ):
                    weight, bits = site.owner.weight, site.quantizer.spec.bits
                    frozen.append((weight, ~near_threshold(weight, bits, 0.005)))
            self.freezer.freeze(frozen)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@pytest.mark.parametrize("anneals", [False, True], ids=["free", "annealed"])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("arm", ["ofq", "ofq without qkr"])
def test_no_step_waits_for_the_device(device, arm, terms, anneals):
    run = Run(device, arm, terms, anneals=anneals)
    for _ in range(2):  # the first ones load kernels and make the optimizer's state
        run.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [run.step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("arm", ["linears", "ofq without qkr", "ofq"])
def test_a_step_is_one_graph(device, arm):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = Run(device, arm, call=lambda net: CompiledCall(net, net))
    assert torch.stack([run.step() for _ in range(3)]).isfinite().all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
