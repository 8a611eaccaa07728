"""Other libraries in the place of our nets. Oracle: what `train.py` does with the same overrides; codes counted; errors by hand."""

import csv
import importlib.util
import json

import pytest
import timm
import torch
from torch import nn

from qat.errors import UsageError
from qat.lit.optim import parameter_groups
from studies.peer_nets import PEERS, FakeQuantConv2d, fitting, quantized
from studies.peers import composed, main, train
from tests.conftest import TINY
from tests.conftest import train as train_ours

LEARNED = {"brevitas": 3, "torchao": 1, "torch_ao": 4}  # parameters beside each layer's own


def vit():
    """A net of two blocks with 16 tokens, and two batches of images."""
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    return net, [torch.randn(8, 3, 32, 32) for _ in range(2)]


def levels(x):
    """How many values there are; two that differ by less than a rounding error are one."""
    ordered = x.double().flatten().sort().values
    return 1 + int((ordered.diff() > 1e-5 * x.abs().max()).sum())


def fed(net, images):
    """What each layer multiplies, by its name: input and weight."""
    names = {id(module): name for name, module in net.named_modules()}
    found, at = {}, []

    class Look(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in {nn.functional.linear, nn.functional.conv2d}:
                found.setdefault(names[at[-1]], [getattr(one, "value", one).detach() for one in args[:2]])
            return function(*args, **(kwargs or {}))

    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(lambda module, args: at.append(id(module)))
    with torch.no_grad(), Look():
        net.eval()(images)
    return found


@pytest.fixture(scope="module", params=PEERS)
def made(request):
    """A library, its 2-bit net, images."""
    for package in {PEERS[request.param].package} - {"torch"}:
        pytest.importorskip(package)
    net, batches = vit()
    return request.param, quantized(request.param, net, batches, 2), batches


def test_inner_layers_have_four_levels_and_the_ends_more(made):
    library, net, batches = made
    found = fed(net, batches[0])
    assert len(found) == 2 * 4 + 2
    for name, (x, weight) in found.items():
        rows = x.flatten(0, -2) if library == "torchao" else x.reshape(1, -1)  # a range a token
        counts = [max(map(levels, rows)), max(map(levels, weight.flatten(1)))]
        if name in {"head", "patch_embed.proj"}:
            assert min(counts) > 4
            assert max(counts) <= 256
        else:
            assert counts == [4, 4]


def test_learned_steps_get_a_gradient_and_no_weight_decay(made):
    library, net, batches = made
    float_names = {name for name, _ in vit()[0].named_parameters()}
    learned = {name: one for name, one in net.named_parameters() if name not in float_names}
    assert float_names <= {name for name, _ in net.named_parameters()}
    assert len(learned) == LEARNED[library] * (2 * 4 + (1 if library == "torchao" else 2))
    (decay,) = (group for group in parameter_groups(net, weight_decay=0.1) if group["weight_decay"])
    decayed = {id(one) for one in decay["params"]}
    assert id(net.blocks[0].mlp.fc1.weight) in decayed
    assert not decayed & {id(one) for one in [*learned.values(), net.pos_embed, net.cls_token]}
    net.train()(batches[0]).square().mean().backward()
    assert [name for name, one in learned.items() if one.grad is None] == []
    moving = [one for name, one in learned.items() if not name.endswith("zero_point")]
    assert sum(bool(one.grad.any()) for one in moving) > 0.9 * len(moving)


def test_the_step_that_fits_best_is_found_among_forty():
    rows = torch.stack([torch.tensor([-1.0, 0.0, 1.0, 2.0]) * 0.6, torch.tensor([-2.0, -1.0, 0.0, 1.0])])
    step, zero = fitting(rows, torch.tensor([-0.6, -2.0]), torch.tensor([1.2, 1.0]), 0, 3)
    assert torch.allclose(step, torch.tensor([0.6, 1.0]))
    assert zero.tolist() == [1, 2]
    # One value far out is not worth the error of all others: a step of the whole range, 40 / 3, would make nothing of them.
    far = torch.cat([torch.linspace(-1, 1, 2000), torch.tensor([40.0])])[None]
    assert fitting(far, torch.tensor([-1.0]), torch.tensor([40.0]), 0, 3)[0].item() < 41 / 3


def test_a_convolution_keeps_all_but_its_values():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(FakeQuantConv2d(conv, nn.Identity(), nn.Identity())(x), conv(x))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bits=2"], "library='': must be one of qat, brevitas, torchao, torch_ao"),
        (["library=brevitas"], "bits=None: must be a whole number, for brevitas, torchao, torch_ao; of qat quant=... says them"),
        (["library=qat", "bits=2"], "bits='2': must be a whole number, for brevitas, torchao, torch_ao; of qat quant=... says them"),
        (["library=torchao", "bits=2", "quant=ofq_2bit"], "quant: only qat reads it; library=torchao has bits=..."),
        (["library=qat", "sed=1"], "Could not override 'sed'. To append to your config use +sed=1"),
    ],
)
def test_settings_that_do_not_go_together(arguments, line, capsys):
    assert main(arguments) == 1
    assert capsys.readouterr().err == f"error: {line}\n"


def test_bits_and_libraries_that_are_not_there():
    net, batches = vit()
    with pytest.raises(UsageError, match="bits='5': must be one of 2, 3, 4, 8"):
        quantized("torch_ao", net, batches, 5)
    if importlib.util.find_spec("brevitas") is None:
        with pytest.raises(UsageError, match="library='brevitas': No module named 'brevitas'; `make peers` installs it"):
            quantized("brevitas", net, batches, 2)


@pytest.mark.parametrize("loss", ["kd", "kd_features"])
def test_our_own_net_ends_as_with_train_py(tmp_path, float_run, loss):
    same = ("quant=ofq_2bit", f"loss={loss}", f"ckpt={float_run}/checkpoints/best.ckpt")
    train_ours(tmp_path / "ours", *same)
    theirs = train(*composed(["library=qat", *TINY, f"run_dir={tmp_path}/theirs", *same]))
    ours = json.loads((tmp_path / "ours" / "results.json").read_text())
    for key in ("quant", "seed", "split", "top1", "top5", "loss", "val_top1", "top1_fp"):
        assert theirs[key] == ours[key], key


def test_a_run_leaves_results_and_is_not_repeated(tmp_path, float_run, caplog):
    same = ("loss=kd", f"ckpt={float_run}/checkpoints/best.ckpt", "trainer.max_epochs=2", f"run_dir={tmp_path}/run")
    arguments = ["library=torch_ao", "bits=4", *TINY, *same]
    left = tmp_path / "run" / "checkpoints" / "best.ckpt"
    left.parent.mkdir(parents=True)
    left.write_text("of a run that was cut short")
    assert main(arguments) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["command"], results["quant"], results["bits"], results["seed"]) == ("peers", "torch_ao_4bit", 4, 0)
    assert {"python", "qat", "torch"} <= set(results["versions"])
    assert results["what"].startswith("Linears: W4 per channel, learned step; A4 per tensor")
    assert results["saved_mb"] > 0
    assert results["peak_rss_mb"] > 100
    assert 0 < results["step_cpu_seconds"] < 60
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert max(float(row["val/top1"]) for row in rows if row["val/top1"]) == pytest.approx(results["val_top1"])
    written = (tmp_path / "run" / "results.json").stat().st_mtime_ns
    with caplog.at_level("INFO", "qat.studies"):
        assert main(arguments) == 0
    assert "has results already" in caplog.text
    assert (tmp_path / "run" / "results.json").stat().st_mtime_ns == written
