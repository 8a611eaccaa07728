"""`python -m evidence.real run_dir=... data.root=CIFAR10 ptq=...`: quantize a trained encoder.

Settings are those of `ptq.py`. The encoder of `evidence.real.weights` gets images of CIFAR-10 at
112 x 112 pixels, 65 tokens. It has no classifier, so its features are judged by a linear probe.
`measure=encoder` measures the largest activations of the float encoder instead, and `measure=small`
those of the small model of the other claims; `measure=inputs` measures which rounded inputs change
the features most. `measure=classifier` saves the first blocks of the encoder with a new classifier
head, for `train.py`.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
import timm
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from evidence.claims.arms import ROOT
from evidence.real.weights import MODEL, build
from qat.data import Cifar10
from qat.model.sites import iter_quantizers
from qat.ptq.compensate import compensate
from qat.ptq.reconstruct import reconstruct
from qat.ptq.runner import Forward, patch_forwards
from qat.ptq.search import logits_of, search
from qat.tasks.conf import CONF
from qat.tasks.ptq_start import build_ptq_recipe, build_reconstruct, build_search
from qat.tasks.results import correct_field, recipe_fields, write_results
from qat.tasks.set_up import set_up
from qat.utils.files import replace_atomically

log = logging.getLogger("qat.evidence.real")
FOLDER = ROOT / "outputs" / "real"
SMALL_NET = ROOT / "evidence/weights/START/float-seed0.pt"
FIT_IMAGES = 5_000
TEST_IMAGES = 2_000
PROFILED_IMAGES = 100
CLASSIFIER_DEPTH = 8
IMAGES = (
    "data=cifar10",
    "data.image_size=112",
    "data.patch_size=14",
    "data.mean=[0.485,0.456,0.406]",
    "data.std=[0.229,0.224,0.225]",
    "data.batch_size=50",
    "data.num_workers=0",
)
# Inputs that `measure=inputs` rounds, by their names in a block.
INPUTS = {
    "qkv": "attn.qkv.input",
    "probs": "attn.probs",
    "fc1": "mlp.fc1.input",
    "fc2": "mlp.fc2.input",
}
# Inverse strengths of the probe's regularization; chosen on float features.
INVERSE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


class Features(NamedTuple):
    """Features (N, 384) and labels (N,) of the images that fit the probe, and of test images."""

    fit: NDArray[np.float32]
    fit_labels: NDArray[np.int64]
    test: NDArray[np.float32]
    test_labels: NDArray[np.int64]


def main(arguments: list[str]) -> None:
    """Quantize and judge features, with overrides of `ptq.py`; or measure, see above."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    overrides = [argument for argument in arguments if not argument.startswith("measure=")]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("ptq", overrides=[*IMAGES, *overrides])
    set_up(cfg)
    settings = {name: value for name, value in cfg.data.items() if name != "_target_"}
    data = Cifar10(**settings)
    encoder = build(FOLDER, data.settings.image_size)
    if "measure=classifier" in arguments:
        save_classifier(cfg, encoder, data)
    elif "measure=encoder" in arguments:
        measure_activations(cfg, "vit_small_patch14", encoder, data)
    elif "measure=inputs" in arguments:
        measure_inputs(cfg, encoder, data)
    elif "measure=small" in arguments:
        small_data = Cifar10(root=cfg.data.root, patch_size=8, num_workers=0)
        measure_activations(cfg, "small", qat.load(SMALL_NET).eval(), small_data)
    else:
        quantize(cfg, encoder, data)


def quantize(cfg: DictConfig, encoder: nn.Module, data: Cifar10) -> None:
    """Quantize the encoder, judge its features, and write `results.json`."""
    start = time.monotonic()
    float_features = _float_features(encoder, data)
    batches = data.calibration_batches(cfg.ptq.batch)
    recipe = build_ptq_recipe(cfg)
    if recipe is None:
        raise qat.UsageError("ptq=keep: must be a recipe for a float model")
    net = qat.convert(copy.deepcopy(encoder), recipe, input_size=data.input_size).eval()
    qat.ptq.calibrate(net, batches)
    if recipe.method in {"compensate", "reconstruct"}:
        compensate(net, encoder, batches)
    settings = build_reconstruct(cfg, recipe.method)
    if settings is not None:
        images = torch.cat(batches)
        reconstruct(net, encoder, images, settings, run_dir=cfg.run_dir, resume=bool(cfg.resume))
    search_settings = build_search(cfg)
    if search_settings is not None:
        with torch.no_grad():
            targets = [logits_of(encoder, batch, search_settings.micro_batch) for batch in batches]
        search(net, batches, targets, search_settings, run_dir=cfg.run_dir, resume=bool(cfg.resume))
    features = _features(net, data)
    float_probe = _fit_probe(float_features)
    own_probe = _fit_probe(features, float_probe[-1].C)
    cosine = F.cosine_similarity(torch.tensor(features.test), torch.tensor(float_features.test))
    is_correct = own_probe.predict(features.test) == features.test_labels
    write_results(
        cfg,
        command="real",
        model="vit_small_patch14",
        **recipe_fields(recipe),
        split="test",
        images=TEST_IMAGES,
        top1=_accuracy(own_probe, features),
        top1_fp=_accuracy(float_probe, float_features),
        top1_float_probe=_accuracy(float_probe, features),
        cosine=cosine.mean().item(),
        **correct_field(torch.tensor(is_correct)),
        wall_seconds=round(time.monotonic() - start, 1),
    )


def save_classifier(cfg: DictConfig, encoder: nn.Module, data: Cifar10) -> None:
    """Save the first blocks of the encoder with a random head, and write `results.json`."""
    settings = data.settings
    torch.manual_seed(cfg.seed)
    net = timm.create_model(
        MODEL,
        img_size=settings.image_size,
        num_classes=settings.num_classes,
        depth=CLASSIFIER_DEPTH,
    )
    # The encoder has more blocks, and no head.
    net.load_state_dict(encoder.state_dict(), strict=False)
    path = Path(cfg.run_dir) / "checkpoints" / "best.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    qat.save(net, path)
    write_results(cfg, command="real", model="vit_small_patch14", quant="fp")


def measure_activations(cfg: DictConfig, name: str, net: nn.Module, data: Cifar10) -> None:
    """Measure the inputs of modules in all blocks of a float model, and write `results.json`."""
    curves = {}
    for layer, by_block in _largest(net, data).items():
        curves[layer] = list(enumerate(by_block))
    write_results(
        cfg, command="real", model=name, quant="fp", images=PROFILED_IMAGES, curves=curves
    )


@torch.no_grad()
def measure_inputs(cfg: DictConfig, encoder: nn.Module, data: Cifar10) -> None:
    """Round one input of one block at a time, and write `results.json`.

    Its curves are the cosines of the changed features and the float features, both minus the mean
    float feature, by block. In `fc2_patches`, the class token stays in float.
    """
    recipe = build_ptq_recipe(cfg)
    if recipe is None:
        raise qat.UsageError("ptq=keep: must be a recipe for a float model")
    net = qat.convert(copy.deepcopy(encoder), recipe, input_size=data.input_size).eval()
    qat.ptq.calibrate(net, data.calibration_batches(cfg.ptq.batch))
    quantizers = {site.name: site.quantizer for site in iter_quantizers(net)}
    images = _test_images(data)
    float_features = encoder(images)
    mean = float_features.mean(0)

    def cosine(quantizer: nn.Module, forward: Forward) -> float:
        forwards: dict[nn.Module, Forward] = {other: _unchanged for other in quantizers.values()}
        with patch_forwards(forwards | {quantizer: forward}):
            features = net(images)
        return F.cosine_similarity(features - mean, float_features - mean).mean().item()

    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in (*INPUTS, "fc2_patches")}
    blocks: Any = encoder.blocks
    for block in range(len(blocks)):
        for name, place in INPUTS.items():
            quantizer = quantizers[f"blocks.{block}.{place}_quantizer"]
            curves[name].append((block, cosine(quantizer, quantizer.forward)))
        quantizer = quantizers[f"blocks.{block}.{INPUTS['fc2']}_quantizer"]
        forward = functools.partial(_round_patches, quantizer.forward)
        curves["fc2_patches"].append((block, cosine(quantizer, forward)))
    write_results(
        cfg,
        command="real",
        model="vit_small_patch14",
        **recipe_fields(recipe),
        images=PROFILED_IMAGES,
        curves=curves,
    )


def _unchanged(x: Tensor) -> Tensor:
    return x


def _round_patches(forward: Forward, x: Tensor) -> Tensor:
    """Round all tokens except the first, the class token; x is (B, N, C)."""
    return torch.cat([x[:, :1], forward(x)[:, 1:]], dim=1)


def _test_images(data: Cifar10) -> Tensor:
    return torch.cat([images for images, _ in data.sample("test", PROFILED_IMAGES)])


def _float_features(encoder: nn.Module, data: Cifar10) -> Features:
    """Features of the float encoder, which are computed once and then read from a file."""
    path = FOLDER / f"float-features-{data.settings.image_size}.npz"
    if not path.exists():
        features = _features(encoder, data)
        with replace_atomically(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **features._asdict())
    with np.load(path) as arrays:
        return Features(*(arrays[name] for name in Features._fields))


@torch.no_grad()
def _features(net: nn.Module, data: Cifar10) -> Features:
    parts: list[NDArray[Any]] = []
    for split, count in (("train", FIT_IMAGES), ("test", TEST_IMAGES)):
        outputs = []
        labels = []
        for images, batch_labels in data.sample(split, count):
            outputs.append(net(images))
            labels.append(batch_labels)
        parts.append(torch.cat(outputs).numpy())
        parts.append(torch.cat(labels).numpy())
        log.info("features of %d images of %s", count, split)
    return Features(*parts)


def _fit_probe(features: Features, inverse_strength: float | None = None) -> Pipeline:
    """Logistic regression on normalized features.

    Args:
        features: features and labels.
        inverse_strength: of the regularization; None = the best of `INVERSE_STRENGTHS` on a fifth
            of the fitted images, which are left out for this choice.
    """
    if inverse_strength is None:
        num_left_out = len(features.fit) // 5
        accuracies = {}
        for candidate in INVERSE_STRENGTHS:
            probe = _probe(candidate)
            probe.fit(features.fit[num_left_out:], features.fit_labels[num_left_out:])
            left_out = features.fit[:num_left_out]
            accuracies[candidate] = probe.score(left_out, features.fit_labels[:num_left_out])
        inverse_strength = max(accuracies, key=accuracies.__getitem__)
        log.info("accuracy of the probe by inverse strength of regularization: %s", accuracies)
    return _probe(inverse_strength).fit(features.fit, features.fit_labels)


def _probe(inverse_strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=inverse_strength, max_iter=2000))


def _accuracy(probe: Pipeline, features: Features) -> float:
    """Top-1 on the test images, in percent."""
    return 100 * float(probe.score(features.test, features.test_labels))


@torch.no_grad()
def _largest(net: Any, data: Cifar10) -> dict[str, list[float]]:
    """Largest magnitude over root mean square, by block, of the inputs of three modules."""
    largest: dict[str, list[float]] = {"block": [], "qkv": [], "fc2": []}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            largest[name].append((x.abs().max() / x.square().mean().sqrt()).item())

        return hook

    for block in net.blocks:
        block.register_forward_pre_hook(record("block"))
        block.attn.qkv.register_forward_pre_hook(record("qkv"))
        block.mlp.fc2.register_forward_pre_hook(record("fc2"))
    net(_test_images(data))
    return largest


if __name__ == "__main__":
    main(sys.argv[1:])
