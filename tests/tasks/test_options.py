"""Switches of how a step is computed. Oracle: the run without the switch."""

import pytest
import torch

import qat
from qat.checkpoint import read_checkpoint
from qat.tasks import options
from tests.conftest import compose, tiny, train
from tests.tiny import images, quantized

# Validation and test then have no incomplete batch, for which the net would be compiled once more.
WHOLE_BATCHES = "data.batch_size=60"


def weights(run_dir):
    return read_checkpoint(run_dir / "checkpoints" / "last.ckpt").state


def test_checkpointing_computes_the_same(tmp_path):
    settings = ("model.args.drop_path_rate=0.3", "++model.args.depth=2")
    plain = train(tmp_path / "plain", *settings)
    saved = train(tmp_path / "saved", "model.grad_checkpointing=true", *settings)
    theirs = weights(plain)
    assert [name for name, value in weights(saved).items() if not torch.equal(value, theirs[name])] == []


def test_checkpointing_switches_the_net():
    net = quantized()
    options.use_grad_checkpointing(compose("train", "model.grad_checkpointing=true", "run_dir=a"), net)
    assert net.grad_checkpointing
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        net.train()(images())
    assert len(kept) < 30  # a block alone keeps as many


def test_a_model_without_checkpointing():
    cfg = compose("train", "model.grad_checkpointing=true", "run_dir=a")
    with pytest.raises(qat.UsageError, match=r"model.grad_checkpointing=true: vit_tiny_patch16_224 cannot do that; allowed is false"):
        options.use_grad_checkpointing(cfg, torch.nn.Linear(2, 2))


def test_compile_is_a_switch():
    with pytest.raises(qat.UsageError, match=r"compile='fast': allowed are true and false"):
        options.check_compiler(compose("train", "compile=fast", "run_dir=a"), torch.device("cpu"))


def test_no_compiler(monkeypatch):
    def broken(*_):
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", lambda _: broken)
    message = r"compile=true: torch cannot compile for cpu here \(no C\+\+ compiler found\); allowed is false"
    with pytest.raises(qat.UsageError, match=message):
        options.check_compiler(compose("train", "compile=true", "run_dir=a"), torch.device("cpu"))


@pytest.mark.slow
def test_a_compiled_quantized_run_is_one_graph(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = train(tmp_path / "run", "compile=true", "callbacks=[default,ema]", WHOLE_BATCHES)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert qat.load(run / "checkpoints" / "best.ckpt")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_settings_are_in_every_train_config():
    cfg = tiny("a")
    assert cfg.compile is False
    assert cfg.model.grad_checkpointing is False
