"""Options that change how a step is computed. Oracle: the run without the option."""

import re

import pytest
import torch

import qat
from qat.tasks import fit
from tests.conftest import compose, train
from tests.errors import usage_error
from tests.tiny import images, quantized


def test_checkpointing_switches_the_net():
    net = quantized()
    fit.use_less_memory(compose("train", "model.grad_checkpointing=true", "run_dir=a"), net)
    assert net.grad_checkpointing
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        net.train()(images())
    large = [size for size in kept if size > 64]  # than steps and their parts
    assert len(large) < 30  # a block alone keeps as many


@pytest.mark.parametrize("asked", ["true", "graphs", "auto"])
def test_no_compiler(asked, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", lambda _: broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fit, "compile_in_place", lambda *_, **__: pytest.fail("compiled"))
    cfg = compose("train", f"compile={asked}", "trainer.accelerator=auto", "run_dir=a")
    why = "torch cannot compile for cpu here (no C++ compiler found)"
    if asked == "auto":
        fit.compile_nets(cfg, torch.nn.Linear(2, 2), None)
        assert caplog.messages == [f"compile=auto: the model is not compiled: {why}"]
        return
    with usage_error(re.escape(f"compile={asked}: {why}; must be false")):
        fit.compile_nets(cfg, torch.nn.Linear(2, 2), None)


@pytest.mark.long
def test_a_compiled_quantized_run_is_two_graphs(tmp_path, caplog):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with caplog.at_level("INFO", "qat"):
        run = train(tmp_path / "run", "compile=true", "callbacks=[default,ema]")
    # That of the check for a compiler, training, and evaluation, which validation and test share; none for the last images of a set.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]
    assert qat.load(f"{run}/checkpoints/best.ckpt")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("memory", ["recompute", "save"])
def test_a_compiler_saves_memory_if_asked(memory, monkeypatch):
    asked, net = [], torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(
        fit, "compile_in_place", lambda net, recompute, **_: asked.append((net, recompute))
    )
    fit.compile_nets(compose("train", "compile=true", f"++memory={memory}", "run_dir=a"), net, None)
    assert asked == [(net, memory == "recompute")]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", True),
        ("trainer.accelerator=cpu", False),
        ("compile=false", False),
        ("trainer.accelerator=cpu compile=true", True),
        ("compile=graphs", "graphs"),
        ("trainer=fsdp", False),
    ],
)
def test_auto_compiles_on_cuda(typed, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = compose("train", "trainer=gpu", "run_dir=a", *typed.split())
    assert fit.compile_mode(cfg) == expected
