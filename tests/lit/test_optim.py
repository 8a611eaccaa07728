"""Optimizer groups and schedules. Oracles: names listed by hand, closed forms of the schedule (spec of the paper's recipes)."""

import copy
import math

import pytest
import timm.optim
import torch
from torch import nn

import qat
from qat.lit import build_optimizer, cosine_schedule, parameter_groups, scheduler_factory
from tests.callbacks.fitting import fit, module
from tests.errors import usage_error
from tests.tiny import DISTILLED, SIZE, identical, vit

WEIGHTS = {
    "patch_embed.proj.weight",
    "blocks.0.attn.proj.weight",
    "blocks.0.mlp.fc1.weight",
    "blocks.0.mlp.fc2.weight",
    "head.weight",
    "head_dist.weight",
}
QKR_WEIGHTS = {"blocks.0.attn.q_weight", "blocks.0.attn.k_weight", "blocks.0.attn.v.weight"}
PLAIN = {
    "cls_token",
    "dist_token",
    "pos_embed",
    "patch_embed.proj.bias",
    "blocks.0.norm1.weight",
    "blocks.0.norm1.bias",
    "blocks.0.norm2.weight",
    "blocks.0.norm2.bias",
    "norm.weight",
    "norm.bias",
    "blocks.0.attn.proj.bias",
    "blocks.0.mlp.fc1.bias",
    "blocks.0.mlp.fc2.bias",
    "head.bias",
    "head_dist.bias",
}


def net(preset, **knobs):
    return qat.convert(vit(DISTILLED, depth=1), qat.recipe(preset, **knobs), input_size=SIZE)


def names(net, groups):
    known = {id(p): name for name, p in net.named_parameters()}
    return {group["name"]: [known[id(p)] for p in group["params"]] for group in groups}


def test_groups_of_a_quantized_net():
    model = net("ofq", bits=2)
    found = names(model, parameter_groups(model, weight_decay=0.1))
    scales = {name for name, _ in model.named_parameters() if name.endswith(".change")}
    offsets = {name for name, _ in model.named_parameters() if "offset" in name}
    assert {
        "blocks.0.attn.product_offset",
        "patch_embed.proj.input_quantizer.offset_before",
    } <= offsets
    assert set(found["decay"]) == WEIGHTS | QKR_WEIGHTS
    assert set(found["no_decay"]) == PLAIN | {"blocks.0.attn.v.bias"} | offsets
    assert set(found["scales"]) == scales


def test_decay_and_rates_of_the_groups():
    optimizer = build_optimizer(net("ofq"), lr=0.01, weight_decay=0.3, scale_lr_factor=0.25)
    found = {g["name"]: (g["weight_decay"], g["lr"]) for g in optimizer.param_groups}
    assert found == {"decay": (0.3, 0.01), "no_decay": (0.0, 0.01), "scales": (0.0, 0.0025)}
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": float("nan")}, r"optimizer\.lr=nan: "),
        ({"scale_lr_factor": 0}, r"optimizer\.scale_lr_factor=0: "),
        (
            {"opt": "adamw", "nesterov": True},
            r"optimizer\.nesterov=True, optimizer\.opt='adamw': ",
        ),
    ],
)
def test_bad_settings_name_themselves(settings, message):
    with usage_error(message):
        build_optimizer(nn.Linear(2, 2), **{"lr": 0.1, "weight_decay": 0.0, **settings})


def optimizer_of(lr, lr_scale=1.0):
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": lr * s, "lr_scale": s}
        for s in (1.0, lr_scale)
    ]
    return torch.optim.SGD(groups, lr=lr)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_cosine_with_warm_up(interval):
    optimizer = optimizer_of(0.1, lr_scale=0.5)
    schedule = cosine_schedule(
        optimizer, periods=20, warmup=5, min_lr=0.01, warmup_lr=0.001, interval=interval
    )
    advance = schedule.step if interval == "epoch" else schedule.step_update
    rates = [optimizer.param_groups[0]["lr"]]
    for t in range(1, 25):
        advance(t)
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(rates[-1] / 2)
    warm = [0.001 + t * (0.1 - 0.001) / 5 for t in range(5)]
    cosine = [0.01 + 0.09 / 2 * (1 + math.cos(math.pi * t / 20)) for t in range(5, 20)]
    assert rates == pytest.approx(warm + cosine + [0.01] * 5)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"interval": "batch"}, r"^scheduler\.interval='batch': "),
        ({"interval": "epoch", "warmup_epochs": 0.5}, r"^scheduler\.warmup_epochs=0\.5: "),
        ({"warmup_epochs": -1}, r"^scheduler\.warmup_epochs=-1: "),
        ({"cooldown_epochs": -1}, r"^scheduler\.cooldown_epochs=-1: "),
        ({"warmup_epochs": 2, "cooldown_epochs": 2}, r"^scheduler\.cooldown_epochs=2: "),
    ],
)
def test_lengths_that_do_not_fit_a_run_are_refused(settings, line):
    with usage_error(line):
        scheduler_factory(**settings)(optimizer_of(0.1), 4, 5)


def rates(net, groups):
    """Factor on the learning rate of every parameter by name."""
    known = {id(p): name for name, p in net.named_parameters()}
    return {known[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def test_a_schedule_shorter_than_its_unit_is_one_unit():
    schedule = cosine_schedule(
        build_optimizer(nn.Linear(2, 2), lr=0.1, weight_decay=0.0), periods=0, min_lr=0.01
    )
    assert [schedule._get_lr(epoch)[0] for epoch in range(3)] == [0.1, 0.01, 0.01]


def test_layer_decay_needs_layers_that_timm_numbers():
    with usage_error(r"^optimizer\.layer_decay=0\.5: .* Linear"):
        parameter_groups(nn.Linear(2, 2), weight_decay=0.0, layer_decay=0.5)


def test_layer_decay_is_timms():
    model = vit(DISTILLED, depth=2)
    theirs = rates(model, timm.optim.param_groups_layer_decay(model, layer_decay=0.6))
    assert rates(
        model, parameter_groups(model, weight_decay=0.1, layer_decay=0.6)
    ) == pytest.approx(theirs)
    assert sorted(set(theirs.values())) == pytest.approx([
        0.6**3,
        0.6**2,
        0.6,
        1.0,
    ])  # embedding, first block, second block and norm, heads


@pytest.mark.parametrize(
    ("opt", "options", "fused"),
    [
        ("adamw", {}, True),
        ("adam", {}, True),
        ("adamw", {"fused": False}, False),
        ("sgd", {}, None),
    ],
)
def test_one_operation_updates_all_parameters_where_torch_has_it(opt, options, fused):
    optimizer = build_optimizer(vit(), opt=opt, lr=1e-3, weight_decay=0.05, **options)
    assert {group.get("fused") for group in optimizer.param_groups} == {fused}
    # Lightning clips the gradients of those alone that leave scaling to it.
    assert optimizer._step_supports_amp_scaling is False


def step_with_gradients(optimizer, net, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize(
    "groups_name_it", [True, False], ids=["fused=None in the file", "no word of it in the file"]
)
@pytest.mark.parametrize("opt", ["adamw", "adam"])
def test_a_state_from_before_the_fused_form_goes_on_bit_for_bit(opt, groups_name_it):
    """As torch restores it: a group of the file brings its own form along. Oracle: the optimizer that wrote it, going on."""
    old = vit()
    writer = build_optimizer(old, opt=opt, lr=1e-2, weight_decay=0.05, fused=None)
    for seed in range(3):
        step_with_gradients(writer, old, seed)
    state, net = copy.deepcopy(writer.state_dict()), copy.deepcopy(old)
    for group in state["param_groups"]:
        assert group["fused"] is None
        if not groups_name_it:
            del group["fused"]
    optimizer = build_optimizer(net, opt=opt, lr=1e-2, weight_decay=0.05)
    assert optimizer.param_groups[0]["fused"] is True
    optimizer.load_state_dict(state)
    assert not any(group["fused"] for group in optimizer.param_groups)
    for seed in range(3, 6):
        step_with_gradients(writer, old, seed)
        step_with_gradients(optimizer, net, seed)
    assert identical(net.parameters(), old.parameters())
    assert {entry["step"].item() for entry in optimizer.state.values()} == {6.0}


def test_fused_steps_clip_gradients_under_autocast():
    learner = module(vit(), lr=1e-3, weight_decay=0.0)
    before = learner.net.head.weight.detach().clone()
    fit(learner, max_epochs=1, precision="bf16-mixed", gradient_clip_val=1.0)
    assert not torch.equal(learner.net.head.weight, before)


def test_another_form_of_the_optimizer_may_be_chosen():
    optimizer = build_optimizer(nn.Linear(2, 2), lr=1e-3, weight_decay=0.0, foreach=True)
    assert not optimizer.param_groups[0]["fused"]
