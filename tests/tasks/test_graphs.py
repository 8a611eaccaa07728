"""`compile=graphs` without CUDA: nets that give what they give in memory which the next step overwrites. Oracle: the eager run."""

import logging

import pytest
import torch
from torch import nn

import qat
from qat.callbacks import GraphSteps
from qat.lit.compiled import CompiledCall, compile_in_place
from qat.tasks import fit
from tests.callbacks.fitting import Steps, batches, differing, module, net
from tests.callbacks.fitting import fit as fit_lightning
from tests.conftest import compose
from tests.tasks.test_resume import assert_same_run, killed_at, run


class Graphs:
    """In the place of `torch.compile`: what calls and backward passes give lies in one place each, and is gone once a step begins."""

    def __init__(self):
        self.options, self.places, self.steps = [], {}, 0

    def compile(self, function, **settings):
        self.options.append(settings.get("options", {}))
        owner, kept = getattr(function, "__self__", function), object()
        for number, parameter in enumerate(
            owner.parameters() if isinstance(owner, nn.Module) else ()
        ):
            if parameter.requires_grad:
                parameter.register_hook(
                    lambda gradient, number=number: self.put((kept, number), gradient)
                )

        class Put(torch.autograd.Function):
            @staticmethod
            def forward(_, x):
                return self.put((kept, "out", x.shape), x)

            @staticmethod
            def backward(_, gradient):
                return gradient

        return lambda given: Put.apply(function(given))

    def put(self, place, value):
        self.places.setdefault(place, torch.empty_like(value)).copy_(value.detach())
        return self.places[place].detach()

    def begin(self):
        self.steps += 1
        for place in self.places.values():
            place.fill_(torch.nan)


@pytest.fixture
def graphs(monkeypatch):
    made = Graphs()
    monkeypatch.setattr(torch, "compile", made.compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", made.begin)
    return made


@pytest.mark.parametrize(
    ("asked", "expected"), [("graphs", True), ("true", False), ("auto", False)]
)
def test_nets_and_callbacks_of_a_run(asked, expected, graphs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = compose("train", f"compile={asked}", "trainer.accelerator=auto", "run_dir=a")
    teacher = qat.lit.Teacher(nn.Linear(2, 2))
    fit.compile_nets(cfg, nn.Linear(2, 2), teacher)
    assert [options["triton.cudagraphs"] for options in graphs.options[1:]] == [
        expected
    ] * 2  # the first is a try
    assert (
        any(isinstance(callback, GraphSteps) for callback in fit.build_callbacks(cfg)) is expected
    )


@pytest.mark.parametrize("copies", [True, False])
def test_what_a_call_gives_stays_as_it_is_a_copy(copies, graphs):
    linear = nn.Linear(3, 2)
    call = CompiledCall(linear, linear, cuda_graphs=copies)
    found = []
    for x in (torch.ones(4, 3), torch.zeros(4, 3)):
        graphs.begin()
        found.append((call(x), linear(x)))
    assert [torch.equal(ours, theirs) for ours, theirs in found] == [copies, True]


def gradients(*callbacks, compiled=False, **settings):
    """Of each step: two epochs of 16 images, and a validation of each."""
    learner, steps = module(net()), Steps()
    if compiled:
        compile_in_place(learner.net, cuda_graphs=True)
    fit_lightning(learner, steps, *callbacks, data=batches(), **settings)
    return steps.gradients


@pytest.mark.sample(1)
@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_gradients_of_a_step(accumulated, graphs):
    settings = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 0.5}
    expected = gradients(**settings)
    ours = gradients(GraphSteps(), compiled=True, **settings)
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert differing(a, b) == []
    assert graphs.steps == 8  # two epochs of four batches


def test_validation_and_test_begin_steps(graphs):
    learner = module(net())
    compile_in_place(learner.net, cuda_graphs=True)
    trainer = fit_lightning(learner, GraphSteps(), data=None, num_sanity_val_steps=0)
    assert graphs.steps == 8
    trainer.validate(learner, batches(), verbose=False)
    assert graphs.steps == 12
    trainer.test(learner, batches(8), verbose=False)
    assert graphs.steps == 14


@pytest.mark.long
@pytest.mark.parametrize(
    "typed",
    [
        "callbacks=[default,ema,cga] callbacks.cga.epochs=1 trainer.gradient_clip_val=0.1",
        "data.batch_size=64 trainer.accumulate_grad_batches=2 trainer.limit_train_batches=18 trainer.precision=bf16-mixed",
        "loss=kd_features quant=seq_2bit teacher.ckpt={float}/checkpoints/last.ckpt",
    ],
    ids=["averaged, annealed, clipped", "accumulated in bfloat16", "with a teacher"],
)
def test_a_resumed_run_is_the_eager_run(typed, tmp_path, monkeypatch, graphs, float_run):
    settings = typed.replace("{float}", str(float_run)).split()
    eager = run(tmp_path / "eager", *settings)
    assert not graphs.steps
    monkeypatch.setattr(fit, "compile_mode", lambda _: "graphs")
    ours = killed_at(5, tmp_path / "ours", *settings)
    run(ours, "resume=auto", *settings)
    assert graphs.steps > 18
    assert_same_run(ours, eager)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "skipping cudagraphs due to mutated inputs (2 instances). Found from : \n   File net.py",
            "mutated inputs (2 instances)",
        ),
        ("skipping cudagraphs due to cpu device (arg0_1)", "cpu device (arg0_1)"),
        (
            "disabling cudagraphs due to incompatible op aten.x Found from: \n",
            "incompatible op aten.x",
        ),
    ],
)
def test_why_a_step_has_no_graph_is_one_line_once(said, reason, graphs, caplog):
    linear = nn.Linear(2, 2)
    CompiledCall(linear, linear, cuda_graphs=True)
    theirs = logging.getLogger("torch._inductor.cudagraph_utils.__cudagraphs")
    for _ in range(2):
        theirs.warning(said)
    assert caplog.messages == [
        f"compile=graphs: part of the training step runs without CUDA graphs: {reason}"
    ]
