"""Models of other libraries. Oracle: counted codes; errors by hand; the table of a run."""

import csv
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from evidence.peers.__main__ import main
from evidence.peers.nets import fitting, quantized
from evidence.peers.parq import optimizer_factory
from qat.lit.optim import build_optimizer, parameter_groups
from tests.conftest import TINY, results
from tests.nets import FAMILIES


def test_layers_have_few_levels_and_learned_steps_no_weight_decay():
    torch.manual_seed(0)
    net = FAMILIES["vit"].build()
    weights = set(net.parameters())
    batches = [FAMILIES["vit"].images(8, seed) for seed in range(2)]
    net = quantized("torch_ao", net, batches, 2)
    levels = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(
                lambda module, args, _, name=name: levels.update({
                    name: [len(args[0].unique()), module.weight]
                })
            )
    net(batches[0]).square().mean().backward()
    assert len(levels) == 2 * 4 + 2
    for name, (inputs, weight) in levels.items():
        rows = max(len(row.unique()) for row in weight.flatten(1))
        assert (
            (min(inputs, rows) > 4)
            if name in {"head", "patch_embed.proj"}
            else (inputs <= 4 and rows <= 4)
        )
    learned = {one for one in net.parameters() if one not in weights}
    assert len(learned) == 4 * len(levels)
    assert all(one.grad is not None for one in learned)
    (decay,) = (group for group in parameter_groups(net, weight_decay=0.1) if group["weight_decay"])
    assert not learned & set(decay["params"])
    assert weights & set(decay["params"])


@pytest.mark.parametrize("library", ["parq", "parq_hard"])
def test_parq_moves_weights_to_their_levels(library):
    torch.manual_seed(0)
    images = FAMILIES["vit"].images(8, 0)
    net = quantized(library, FAMILIES["vit"].build(), [images], 2)
    build = partial(build_optimizer, lr=1e-3, weight_decay=0.1)
    trainer = SimpleNamespace(estimated_stepping_batches=4)
    optimizer = optimizer_factory(library, build, 2, trainer)(net)
    seen = []

    def closure():
        seen.append(net.blocks[0].mlp.fc1.weight.detach().clone())
        optimizer.zero_grad()
        net(images).square().mean().backward()

    for _ in range(5):
        optimizer.step(closure)
    assert max(len(row.unique()) for row in seen[-1]) <= 4
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            num_levels = max(len(row.unique()) for row in module.weight.flatten(1))
            assert (num_levels > 4) == (name in {"head", "patch_embed.proj"})


def test_the_step_that_fits_best_is_found_among_forty():
    rows = torch.stack([
        torch.tensor([-1.0, 0.0, 1.0, 2.0]) * 0.6,
        torch.tensor([-2.0, -1.0, 0.0, 1.0]),
    ])
    step, zero = fitting(rows, torch.tensor([-0.6, -2.0]), torch.tensor([1.2, 1.0]), 0, 3)
    assert torch.allclose(step, torch.tensor([0.6, 1.0]))
    assert zero.tolist() == [1, 2]


def test_a_run_that_was_cut_short_begins_anew_and_leaves_results(tmp_path, float_run):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "best.ckpt").write_text("of a run that was cut short")
    main([
        "library=torch_ao",
        "bits=4",
        *TINY,
        "loss=kd",
        f"ckpt={float_run}/checkpoints/best.ckpt",
        f"run_dir={tmp_path}/run",
    ])
    found = results(tmp_path / "run")
    expected = {"command": "peers", "quant": "torch_ao_4bit", "bits": 4, "seed": 0}
    assert expected.items() <= found.items()
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert max(float(row["val/top1"]) for row in rows if row["val/top1"]) == pytest.approx(
        found["val_top1"]
    )
