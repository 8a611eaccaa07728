"""Block reconstruction. Oracle: losses that fall, runs that were cut in two and end as whole ones, and the float net's own outputs."""

import pytest
import torch

import qat
from qat.ptq import reconstruct as module
from qat.ptq.reconstruct import ReconstructSettings, reconstruct
from tests import tiny
from tests.callbacks.fitting import differing
from tests.nets import FAMILIES
from tests.ptq.fitting import calibrated, error, pair
from tests.ptq.searching import changed, state

IMAGES = tiny.images(48)
SETTINGS = ReconstructSettings(steps=12, batch=16, lr=1e-3, scale_lr=1e-2)
UNITS = ["patch_embed.proj", "blocks.0", "blocks.1", "head"]


def test_the_logits_of_other_images_come_closer():
    net, reference = pair(method="reconstruct")
    before = error(net, reference, tiny.images(64, 9))
    done = reconstruct(
        net, reference, IMAGES, ReconstructSettings(steps=40, batch=16, lr=2e-3, scale_lr=1e-2)
    )
    assert (done["units"], done["steps"], done["images"]) == (4, 40, 48)
    assert error(net, reference, tiny.images(64, 9)) < 0.8 * before


def test_weights_biases_and_all_steps_of_quantizers_are_learned_and_nothing_else():
    net, reference = pair(method="reconstruct")
    before, float_before = state(net), state(reference)
    reconstruct(net, reference, IMAGES, SETTINGS)
    trained = changed(before, net)
    layers = {f"{layer}.{kind}" for layer in layers_of(net) for kind in ("weight", "bias")}
    scales = {f"{site.name}.scale" for site in qat.iter_quantizers(net)}
    assert scales <= trained <= layers | scales
    assert not differing(state(reference), float_before)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("seed", [20261127, 2**31 - 1])
def test_a_large_seed(seed):
    settings = ReconstructSettings(steps=1, batch=4, seed=seed)
    assert reconstruct(*pair(method="reconstruct"), IMAGES[:4], settings)["units"] == 4


def layers_of(net):
    return [site.name.rpartition(".")[0] for site in qat.iter_quantizers(net) if site.is_weight]


def test_a_run_that_is_killed_ends_as_a_whole_one(tmp_path, monkeypatch):
    whole, reference = pair(method="reconstruct")
    reconstruct(whole, reference, IMAGES, SETTINGS)
    net, _ = pair(method="reconstruct")
    save, saved = module.Progress.save, []

    def killed(self, state):
        saved.append(list(state["units"]))
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(self, state)

    monkeypatch.setattr(module.Progress, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(net, reference, IMAGES, SETTINGS, run_dir=tmp_path)
    again, _ = pair(method="reconstruct")
    reconstruct(again, reference, IMAGES, SETTINGS, run_dir=tmp_path, resume=True)
    assert saved[2:4] == [UNITS[:3], UNITS[:3]]
    assert not differing(state(again), state(whole))
    lines = (tmp_path / "reconstruct.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["unit", *UNITS]


@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "units"), [("deit_distilled", 5), ("swin", 7)])
def test_other_families(name, units):
    reference = FAMILIES[name].build()
    images = FAMILIES[name].images(48)
    net = calibrated(reference, images)
    before = error(net, reference, images)
    assert reconstruct(net, reference, images, SETTINGS)["units"] == units
    assert error(net, reference, images) < before


def test_a_backbone():
    reference = FAMILIES["vit"].build(features_only=True, out_indices=(0, 1))
    images = FAMILIES["vit"].images(16)
    net = calibrated(reference, images)

    @torch.no_grad()
    def error_of_maps():
        maps = zip(net(images), reference(images), strict=True)
        return sum(float((ours - theirs).square().mean()) for ours, theirs in maps)

    before = error_of_maps()
    reconstruct(net, reference, images, ReconstructSettings(steps=20, batch=8))
    assert error_of_maps() < before


def test_a_unit_is_trained_on_what_the_quantized_net_gives_it(monkeypatch):
    """Also after quantizers that stand beside modules, as those of an attention pool do."""
    reference = FAMILIES["siglip"].build(depth=1)
    images = FAMILIES["siglip"].images(8)
    net = calibrated(reference, images)
    fit, units = module._fit_unit, []

    def inputs(unit, run):
        seen = []
        handle = net.get_submodule(unit).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].clone())
        )
        found = run()
        handle.remove()
        return seen[-1], found

    def compared(ours, theirs, unit, *rest):
        with torch.no_grad():
            expected, _ = inputs(unit, lambda: net(images))
        got, found = inputs(unit, lambda: fit(ours, theirs, unit, *rest))
        assert torch.equal(got, expected), unit
        units.append(unit)
        return found

    monkeypatch.setattr(module, "_fit_unit", compared)
    reconstruct(net, reference, images, ReconstructSettings(steps=1, batch=8))
    assert "attn_pool.proj" in units
