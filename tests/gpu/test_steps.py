"""Training steps without Lightning: none waits for the device, each compiles as one graph, and a run that is resumed is the run.

Oracle: the driver's own word on synchronization; the uninterrupted run, bit for bit.
"""

import copy

import pytest
import torch
from torch.testing import assert_close

import qat
from evidence.speed.steps import ARMS, TINY, build, teacher_of
from qat.functional.confidence import near_threshold
from qat.lit.compiled import CompiledCall
from qat.lit.optim import build_optimizer
from qat.losses import CompositeLoss, CrossEntropy, Dampening, Distillation, Kure, StepContext
from qat.model.entry_freezer import EntryFreezer
from qat.quantizers import StatsQ
from qat.utils.files import read_torch, write_torch

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
        loss = self.backward()
        self.update()
        return loss

    def backward(self, scale=lambda loss: loss):
        followed = None if self.teacher is None else self.teacher(self.images)
        with torch.autocast(self.device.type, torch.bfloat16):
            context = StepContext(self.call(self.images), self.target, followed, self.net)
            loss, _ = self.loss(context)
        scale(loss).backward()
        return loss.detach()

    def update(self, step=lambda optimizer: optimizer.step()):
        if self.anneals:
            frozen = []
            for site in qat.iter_quantizers(self.net):
                if site.role == "weight" and isinstance(site.quantizer, StatsQ):
                    weight, bits = site.owner.weight, site.quantizer.spec.bits
                    frozen.append((weight, ~near_threshold(weight, bits, 0.005)))
            self.freezer.freeze(frozen)
        step(self.optimizer)
        self.optimizer.zero_grad()

    def state(self):
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}


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


def course(device, *, graphs, terms, scaled, accumulated):
    """Losses, weights, their average and moments of six steps: graphs are warmed up in the first, recorded in the second, then replayed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = Run(
        device,
        terms=terms,
        anneals=True,
        call=lambda net: CompiledCall(net, net, cuda_graphs=graphs),
    )
    if run.teacher is not None:
        run.teacher.compile(cuda_graphs=graphs)
    average = torch.optim.swa_utils.AveragedModel(
        run.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    scaler, losses = torch.amp.GradScaler(device.type, enabled=scaled), []
    for number in range(6 * accumulated):
        torch.compiler.cudagraph_mark_step_begin()
        losses.append(run.backward(scaler.scale))
        if (number + 1) % accumulated:
            for parameter in run.net.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()
            continue
        scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.net.parameters(), 0.1)
        run.update(scaler.step)
        scaler.update()
        average.update_parameters(run.net)
    return {"losses": torch.stack(losses), **run.net.state_dict(), **average.state_dict()} | {
        f"{key} {index}": moment
        for index, state in run.optimizer.state_dict()["state"].items()
        for key, moment in state.items()
    }


WAYS = {
    "plain": ("ce", False, 1),
    "taught": ("kd", False, 1),
    "scaled": ("ce", True, 1),
    "accumulated": ("ce", False, 2),
    "all": ("kd", True, 2),
}


@pytest.mark.parametrize(("terms", "scaled", "accumulated"), WAYS.values(), ids=WAYS)
def test_steps_of_graphs_are_compiled_ones(device, terms, scaled, accumulated, recorded):
    torch.use_deterministic_algorithms(
        mode=True, warn_only=True
    )  # else both are compiled with what was fastest when they were
    try:
        expected, found = (
            course(device, graphs=graphs, terms=terms, scaled=scaled, accumulated=accumulated)
            for graphs in (False, True)
        )
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert len(recorded) >= 2 + (terms == "kd")  # forward, backward, teacher
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert expected["losses"].unique().numel() > 5


@pytest.mark.parametrize("anneals", [False, True], ids=["free", "annealed"])
def test_a_resumed_run_is_the_run(anywhere, tmp_path, anneals):
    def three_steps(run):
        for _ in range(3):
            run.step()

    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        whole, resumed = Run(anywhere, anneals=anneals), Run(anywhere, anneals=anneals)
        start = copy.deepcopy(whole.state())
        three_steps(whole)
        write_torch(tmp_path / "state.pt", whole.state())
        three_steps(whole)
        state = read_torch(tmp_path / "state.pt", map_location=anywhere)
        resumed.net.load_state_dict(state["net"])
        resumed.optimizer.load_state_dict(state["optimizer"])
        three_steps(resumed)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    ours, theirs = resumed.state(), whole.state()
    assert_close(ours["net"], theirs["net"], rtol=0, atol=0)
    assert any(not torch.equal(start["net"][name], value) for name, value in theirs["net"].items())
    moments = ours["optimizer"]["state"], theirs["optimizer"]["state"]
    assert_close(*moments, rtol=0, atol=0)
