"""Annealing and oscillation tracking against the papers' own code. Oracle: tests/goldens, made by running it."""

import re
from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat import functional as F
from qat.callbacks import CGA
from qat.lit import QATModule, build_optimizer
from qat.losses import CompositeLoss, CrossEntropy
from tests import golden
from tests.callbacks.fitting import Steps, fit
from tests.golden import OFQ, ofq
from tests.nn.test_goldens import heads_of, renamed

ALIVE = 1e-5  # a gradient below it may be rounding noise
NOISE = 1e-8  # a gradient below it, two steps on end, is


def bits_of(case):
    return int(re.search(r"_[bw](\d)", case).group(1))


class TakeNoise(Callback):
    """Behind the first two steps, gives the case's own values to entries without a true gradient.

    Adam makes steps of up to the learning rate of their rounding noise. In keys, where such an entry is the part of a bias that moves all
    keys alike, the code of another value may flip by it, and the next steps then differ by far more than rounding. The cases hold no
    values of the second step: where both gradients are noise, those midway between the first and the third stand for them.
    """

    def __init__(self, gradients, first, third):
        self.gradients, self.first, self.third = gradients, first, third

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, parameter in pl_module.net.named_parameters():
            gradient, first, third = (
                source[name].reshape(parameter.shape)
                for source in (self.gradients, self.first, self.third)
            )
            if trainer.global_step == 1:
                parameter.data = torch.where(gradient.abs() > ALIVE, parameter.data, first)
            if trainer.global_step == 2:
                noise = (gradient != 0) & (gradient.abs() < NOISE) & (parameter.grad.abs() < NOISE)
                parameter.data = torch.where(noise, (first + third) / 2, parameter.data)


@golden.parametrize(OFQ, r"cga_mask_b\d_br[\d.]+")
def test_mask(case):
    boundary = float(case.partition("_br")[2])
    near = F.near_threshold(ofq(case, "w"), bits_of(case), boundary)
    assert torch.equal(~near, ofq(case, "frozen"))


class Prescribed(LightningModule):
    """One quantized Linear whose weight gets the gradients that the batches say."""

    def __init__(self, weight, bits):
        super().__init__()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight)
        recipe = qat.recipe("ofq", bits=bits, act_quantizer="float")
        self.net = qat.convert(nn.Sequential(linear), recipe, input_size=(1, 1, weight.shape[1]))

    @property
    def weight(self):
        return self.net[0].weight

    def training_step(self, batch, batch_idx):
        return (self.net[0].weight_quantizer(self.weight) * batch[0][0]).sum()

    def configure_optimizers(self):
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.5, weight_decay=0.05)
        return self.optimizer


@golden.parametrize(OFQ, r"cga_weight_b\d")
def test_weight(case):
    n = sum(golden.has(OFQ, f"{case}/grad{t}") for t in range(100))
    expected = [ofq(case, f"w{t}") for t in range(n + 1)]
    for t in range(n):
        assert torch.equal(
            ~F.near_threshold(expected[t], bits_of(case), 0.05), ofq(case, f"frozen{t}")
        )
    module, steps = Prescribed(expected[0].clone(), bits_of(case)), Steps()
    gradients = torch.stack([ofq(case, f"grad{t}") for t in range(n)])
    annealing = CGA(boundary_range=0.05, start_epoch=0, lr=1e-3)
    batches = DataLoader(TensorDataset(gradients))
    fit(module, annealing, steps, data=batches, max_epochs=1)
    for t in range(n):
        after = steps.after[t]["0.weight"]
        frozen = ofq(case, f"frozen{t}")
        assert_close(after, expected[t + 1], rtol=1e-6, atol=1e-6)
        assert torch.equal(after[frozen], steps.before[t]["0.weight"][frozen])
    state = module.optimizer.state[module.weight]
    for name in ("exp_avg", "exp_avg_sq"):
        assert_close(state[name], ofq(case, name), rtol=1e-6, atol=1e-6)


def small_vit(case):
    """The net of a case with its state: the patch embedding float, the rest quantized."""
    theirs = golden.below(OFQ, f"{case}/sd0")
    state, image = renamed(theirs), ofq(case, "x0").shape[1:]
    dim, _, patch, _ = theirs["patch_embed.proj.weight"].shape
    settings = {
        "img_size": image[1],
        "patch_size": patch,
        "embed_dim": dim,
        "depth": sum(name.endswith("mlp.fc1.weight") for name in theirs),
        "num_heads": heads_of(theirs),
        "mlp_ratio": theirs["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "num_classes": theirs["head.weight"].shape[0],
    }
    net = VisionTransformer(**settings, norm_layer=partial(nn.LayerNorm, eps=1e-5))
    net.pretrained_cfg = {"first_conv": "patch_embed.proj", "classifier": "head"}
    unquantized = {
        "bits": 32,
        "act_bits": 32,
        "weight_quantizer": "float",
        "act_quantizer": "float",
    }
    attention = "qkr" if "qkr" in case else "standard"
    recipe = qat.recipe(
        "ofq",
        bits=bits_of(case),
        attention=attention,
        steps="absolute",
        overrides={"patch_embed.proj": unquantized},
    )
    qat.convert(net, recipe, input_size=tuple(image))
    net.load_state_dict(
        {name: value.reshape(net.state_dict()[name].shape) for name, value in state.items()},
        strict=True,
    )
    return net


@golden.parametrize(OFQ, r"cga_step_(qkr|plain)_w\d")
def test_net(case):
    number = partial(golden.number, OFQ)
    net, steps = small_vit(case), Steps()
    optimizer = partial(build_optimizer, lr=0.5, weight_decay=number(f"{case}/weight_decay"))
    (decayed, *_) = optimizer(net).param_groups
    names = {id(p): name for name, p in net.named_parameters()}
    theirs = {str(name): torch.zeros(()) for name in golden._arrays(OFQ)[f"{case}/decay_names"]}
    assert {names[id(p)] for p in decayed["params"]} == set(renamed(theirs))

    images = torch.cat([ofq(case, f"x{t}") for t in range(3)])
    target = torch.cat([ofq(case, f"y{t}") for t in range(3)])
    gradients, *theirs = (
        renamed(golden.below(OFQ, f"{case}/{part}")) for part in ("grad0", "param1", "param3")
    )
    module = QATModule(
        net.train(), CompositeLoss({"ce": CrossEntropy()}), num_classes=5, optimizer=optimizer
    )
    annealing = CGA(
        boundary_range=number(f"{case}/boundary_range"),
        start_epoch=0,
        lr=number(f"{case}/lr"),
        qk="reference",
    )
    batches = DataLoader(TensorDataset(images, target), batch_size=len(images) // 3)
    noise = TakeNoise(gradients, *theirs)
    fit(module, annealing, steps, noise, data=batches, max_epochs=1)

    assert set(gradients) == set(steps.gradients[0])
    for name, gradient in gradients.items():
        found = steps.gradients[0][name]
        assert_close(
            found,
            gradient.reshape(found.shape),
            rtol=1e-4,
            atol=1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for t, expected in zip((1, 3), theirs, strict=True):
        for name, found in steps.after[t - 1].items():
            alive = gradients[name].reshape(found.shape).abs() > ALIVE
            value = expected[name].reshape(found.shape)
            assert_close(
                found[alive],
                value[alive],
                rtol=1e-5,
                atol=1e-5,
                msg=lambda m, n=name, t=t: f"{n} after step {t}: {m}",
            )


@golden.parametrize(OFQ, r"osc_\w+")
def test_tracker(case):
    x, momentum, threshold = (ofq(case, k) for k in ("x_int", "momentum", "threshold"))
    state = frozen = None
    for t, raw in enumerate(x):
        codes = F.replace_frozen(frozen, raw)
        assert torch.equal(codes, ofq(case, "out")[t])
        state = F.oscillation_step(state, codes, float(momentum))
        frozen = F.freezing_step(frozen, codes, state.frequency, float(threshold), float(momentum))
        assert torch.equal(state.frequency, ofq(case, "ema")[t])
    assert torch.equal(state.flips, ofq(case, "total"))
    if golden.has(OFQ, f"{case}/frozen"):
        assert torch.equal(frozen.frozen, ofq(case, "frozen"))
        assert torch.equal(frozen.codes, ofq(case, "frozen_x_int"))
        assert torch.equal(frozen.mean, ofq(case, "ema_x_int"))
