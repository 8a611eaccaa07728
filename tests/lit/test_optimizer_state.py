"""The optimizer state of a checkpoint under parameter names. Oracle: the optimizer that wrote it."""

import pytest
import torch

import qat
from qat.lit import build_optimizer
from qat.lit.optimizer_state import parameter_names, read_optimizer_state, with_optimizer_state
from qat.model.checkpoint import describe
from tests.callbacks.fitting import Steps, differing, fit, module
from tests.conftest import tiny
from tests.tiny import images, quantized, vit


def adamw(net):
    return build_optimizer(net, lr=0.1, weight_decay=0.5)


def written(folder, net, **settings):
    """A training checkpoint of a net, and the state of its optimizer by parameter name."""
    learner = module(net, describe=describe(net), **settings)
    trainer = fit(learner, max_epochs=1)
    trainer.save_checkpoint(folder / "run.ckpt")
    state = trainer.optimizers[0].state
    return str(folder / "run.ckpt"), {n: dict(state[p]) for n, p in learner.net.named_parameters() if p in state}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return written(tmp_path_factory.mktemp("finished"), quantized(bits=2))


def assert_same_state(found, expected):
    assert set(found) == set(expected)
    for name, entry in expected.items():
        assert differing(found[name], entry) == [], name


def test_names(finished):
    path, state = finished
    assert {"step", "exp_avg", "exp_avg_sq"} == set(state["blocks.0.mlp.fc1.weight"])
    assert_same_state(read_optimizer_state(path), state)


def test_names_of_groups_by_layer(tmp_path):
    def by_layer(net):
        return build_optimizer(net, lr=0.01, weight_decay=0.5, layer_decay=0.7)

    path, state = written(tmp_path, quantized(bits=2), optimizer=by_layer)
    assert_same_state(read_optimizer_state(path), state)
    net = qat.load(path)
    names = {id(p): name for name, p in net.named_parameters()}
    assert parameter_names(net, by_layer=True) == [[names[id(p)] for p in group["params"]] for group in by_layer(net).param_groups]
    assert parameter_names(net, by_layer=True) != parameter_names(net)


def test_an_optimizer_goes_on_with_moments_but_its_own_rates(finished):
    path, state = finished
    net = qat.load(path).train()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    make, note = with_optimizer_state(adamw, path, net)
    assert note == f"optimizer state of {len(state)} of {len(before)} parameters taken"
    assert len(state) == len(before)
    assert differing(dict(net.named_parameters()), before) == []
    assert all(p.grad is None for p in net.parameters())
    optimizer = make(net)
    assert_same_state({n: optimizer.state[p] for n, p in net.named_parameters()}, state)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.5), (0.1, 0.0), (0.1, 0.0)]


def test_a_run_of_its_own_steps_as_the_first_would_have(finished):
    path, _ = finished
    going_on, fresh = Steps(), Steps()
    net = qat.load(path)
    make, _ = with_optimizer_state(adamw, path, net)
    fit(module(net, optimizer=make), going_on, max_epochs=1, limit_train_batches=1)
    fit(module(net, optimizer=adamw), fresh, max_epochs=1, limit_train_batches=1)
    assert differing(going_on.before[0], fresh.before[0]) == []

    # AdamW by hand: fifth step with the moments of the first four.
    name = "blocks.0.mlp.fc1.weight"
    entry, gradient, start = finished[1][name], going_on.gradients[0][name], going_on.before[0][name]
    first, second = 0.9 * entry["exp_avg"] + 0.1 * gradient, 0.999 * entry["exp_avg_sq"] + 0.001 * gradient.square()
    step = (first / (1 - 0.9**5)) / ((second / (1 - 0.999**5)).sqrt() + 1e-8)
    torch.testing.assert_close(going_on.after[0][name], start * (1 - 0.1 * 0.5) - 0.1 * step)
    assert not torch.allclose(fresh.after[0][name], going_on.after[0][name])


def test_by_name_and_not_by_place(finished):
    # Another recipe has other parameters in other places; what both have goes on, the others begin with nothing.
    path, state = finished
    net = quantized("ofq_noqkr", bits=2).train()
    make, note = with_optimizer_state(adamw, path, net)
    optimizer, parameters = make(net), dict(net.named_parameters())
    taken = {name for name, p in parameters.items() if p in optimizer.state}
    assert taken == {n for n, p in parameters.items() if n in state and state[n]["exp_avg"].shape == p.shape}
    assert note == f"optimizer state of {len(taken)} of {len(parameters)} parameters taken"
    assert "blocks.0.mlp.fc1.weight" in taken
    assert "blocks.0.attn.qkv.weight" not in taken
    assert_same_state({n: optimizer.state[parameters[n]] for n in taken}, {n: state[n] for n in taken})
    net(images()).square().sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


def test_files_without_a_state(tmp_path):
    net = quantized(bits=2)
    qat.save(net, tmp_path / "net.ckpt")
    torch.save(vit().state_dict(), tmp_path / "timm.pth")
    stateless, _ = written(tmp_path, net, optimizer=lambda n: torch.optim.SGD(n.parameters(), lr=0.1))
    for path in (tmp_path / "net.ckpt", tmp_path / "timm.pth", stateless):
        message = r"ckpt_optimizer=true: ckpt='.*' holds no optimizer state; last\.ckpt and best\.ckpt of a training run do"
        with pytest.raises(qat.UsageError, match=message):
            with_optimizer_state(adamw, str(path), net)


def test_another_optimizer(finished):
    def sgd(net):
        return build_optimizer(net, opt="sgd", lr=0.1, weight_decay=0.0, momentum=0.9)

    message = "is of an optimizer that keeps exp_avg, exp_avg_sq, step; optimizer.opt is one that keeps momentum_buffer"
    with pytest.raises(qat.UsageError, match=message):
        with_optimizer_state(sgd, finished[0], quantized(bits=2))


def test_another_net(finished):
    with pytest.raises(qat.UsageError, match="holds the state of none of this net's parameters"):
        with_optimizer_state(adamw, finished[0], torch.nn.Linear(2, 2))


def test_parameters_that_did_not_train(tmp_path):
    net = quantized(bits=2)
    net.patch_embed.requires_grad_(requires_grad=False)
    path, _ = written(tmp_path, net)
    with pytest.raises(qat.UsageError, match="holds the state of other parameters than those of its net"):
        read_optimizer_state(path)


def test_as_a_run(tmp_path, run_4bit, caplog):
    from qat.tasks.train import train

    caplog.set_level("INFO")
    checkpoint = run_4bit / "checkpoints" / "last.ckpt"
    settings = ("quant=ofq_4bit", f"ckpt={checkpoint}", "ckpt_optimizer=true", "callbacks=[default,cga]", "callbacks.cga.start_epoch=0")
    train(tiny(tmp_path / "run", *settings))
    assert "parameters taken" in caplog.text
    states = [torch.load(p / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0] for p in (run_4bit, tmp_path / "run")]
    steps = [max(entry["step"].item() for entry in state["state"].values()) for state in states]
    assert steps == [2, 4]


def test_a_state_without_a_checkpoint(tmp_path, refused):
    line = refused("train", tiny(tmp_path / "run", "ckpt_optimizer=true"))
    assert line == "error: ckpt_optimizer=true: there is no checkpoint to take it from; set ckpt=PATH"
