"""An ONNX file of a net, checked against it, from Python: `qat.export_onnx`."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.export.artefact import Written, kept
from qat.export.check import Checked, check_onnx
from qat.export.graph import TARGETS, OnnxSettings, check_size, require_onnx, to_onnx
from qat.export.stored_weights import TWO_BIT
from qat.model.checkpoint import describe
from qat.model.convert import check_input, conversion_of
from qat.model.frozen import freeze, is_frozen
from qat.model.transform import data_config
from qat.utils.files import replacing
from qat.utils.probing import probing
from qat.utils.validate import check_choice

if TYPE_CHECKING:
    import onnx

    from qat.data.settings import DataSettings

# Of noise, on which a file is checked where there are no others.
IMAGES = 16


def export_onnx(
    net: nn.Module,
    path: str | Path,
    *,
    images: Tensor | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    target: str = "cpu",
    two_bit: str = "int4",
) -> Checked:
    """Write a quantized net to an ONNX file, run both on the same images, and give the file its name if they agree.

    Its input is `image` (B, C, H, W), its output `logits` (B, classes), float32. docs/deployment.md

    Args:
        net: converted and calibrated or trained, or of `qat.freeze`; stays as it is.
        path: the file, `*.onnx`; one that is there is replaced.
        images: (B, C, H, W) of the net's input size, prepared as it takes them; None = noise, on which a net decides by little.
        dynamic_batch: any number of images, or one at a time.
        dynamic_size: images of any size, of a net that takes them.
        target: `cpu` (products on integers, onnxruntime and OpenVINO) or `tensorrt` (QuantizeLinear and DequantizeLinear around products).
        two_bit: `int4` or `int2`, which takes half the bytes and OpenVINO does not read.

    Returns:
        How far net and file agree, as text by `to_text()`.

    Raises:
        UsageError: the net is no classifier or not quantized, its scales are not set, the images do not fit, the target cannot hold it,
            onnx is not installed, or what was written disagrees; it is then kept as `<path>.rejected`.

    Examples:
        >>> net = qat.convert(timm.create_model("deit_tiny_patch16_224"), qat.recipe("deploy_w8a8"))  # doctest: +SKIP
        >>> qat.export_onnx(qat.initialize_scales(net, [images]), "net.onnx", images=images)  # doctest: +SKIP
    """
    from qat.data.image_transform import data_settings  # noqa: PLC0415  (brings Lightning with it)

    require_onnx()
    check_choice("target", target, TARGETS)
    check_choice("two_bit", two_bit, tuple(TWO_BIT))
    place = Path(path)
    if place.suffix != ".onnx":
        raise UsageError(f"path={str(place)!r}: must end in .onnx")
    done = conversion_of(net)
    if done is None:
        raise UsageError("export_onnx: a float net; qat.convert(net, qat.recipe(...)) quantizes it")
    if images is not None:
        _check_images(images, done.input_size, any_size=dynamic_size)
    net, frozen = _on_cpu(net)
    _check_is_classifier(frozen, done.input_size)
    if dynamic_size:
        check_size(frozen)
    settings = OnnxSettings(dynamic_batch, dynamic_size, target, two_bit)
    images = torch.randn(IMAGES, *done.input_size, generator=torch.Generator().manual_seed(0)) if images is None else images.cpu().float()
    meta = describe(frozen) | {"preprocessing": preprocessing(data_settings(data_config(net))) if _is_square(done.input_size) else None}
    with probing(net, ()):
        return kept(place, lambda file: Written(write_onnx(file, frozen, net, meta, [images], settings)[1], "")).checked


def _is_square(input_size: tuple[int, int, int]) -> bool:
    return input_size[1] == input_size[2]


def _on_cpu(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A net and what it is frozen to, on the CPU in float32, for plan, graph and comparison; the net of the caller stays as it is."""
    if any(t.device.type != "cpu" or (t.is_floating_point() and t.dtype != torch.float32) for t in net.state_dict().values()):
        net = copy.deepcopy(net).cpu().float()
    return net, net if is_frozen(net) else freeze(net)


def _check_images(images: Tensor, input_size: tuple[int, int, int], *, any_size: bool) -> None:
    shape = tuple(images.shape)
    takes = (input_size[0], *shape[2:]) if any_size else input_size
    if len(shape) != 4 or shape[1:] != takes or 0 in shape or not images.is_floating_point():
        size = f"{input_size[0]}, height, width" if any_size else ", ".join(map(str, input_size))
        raise UsageError(f"images: {images.dtype} of {shape}; must be floating-point of (at least 1, {size})")


def _check_is_classifier(net: nn.Module, input_size: tuple[int, int, int]) -> None:
    shape = check_input(net, input_size)
    if shape is None or len(shape) != 2:
        gives = "several tensors" if shape is None else f"(1, {', '.join(map(str, shape[1:]))})"
        raise UsageError(f"export_onnx: the net gives {gives} for an image; only classifiers are written, which give (1, classes)")


def write_onnx(
    path: Path, frozen: nn.Module, net: nn.Module, meta: Mapping[str, Any], images: Sequence[Tensor], settings: OnnxSettings
) -> tuple[onnx.ModelProto, Checked]:
    """Write a file, run it beside its net.

    Args:
        path: the file.
        frozen: what is written.
        net: what it was frozen from, or itself; in evaluation mode.
        meta: of `qat.model.checkpoint.describe`, and `preprocessing`; None = not to be said, as for images that are not square.
        images: (B, C, H, W) each.
        settings: of the file.
    """
    import onnx  # noqa: PLC0415  (an extra)

    model = to_onnx(frozen, images[0][:1], settings)
    describe_file(model, meta)
    with replacing(path) as temporary:
        onnx.save(model, str(temporary))
    return model, check_onnx(frozen, net, path, images)


def describe_file(model: onnx.ModelProto, meta: Mapping[str, Any]) -> None:
    """Write into a model what its user needs: names of classes, treatment of images; and what net it is."""
    said = {
        "qat": {key: meta[key] for key in ("format_version", "model", "recipe", "input_size")},
        "qat.classes": list(meta.get("classes") or []),
        "qat.preprocessing": meta["preprocessing"],
    }
    model.producer_name = "qat"
    for key, value in said.items():
        if value is None:
            continue
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)


def preprocessing(settings: DataSettings) -> dict[str, Any]:
    """What is to be done to an image: size, mean, std, interpolation, crop_pct."""
    return {
        "size": settings.image_size,
        "mean": list(settings.mean),
        "std": list(settings.std),
        "interpolation": settings.interpolation or "bicubic",
        "crop_pct": settings.crop_pct,
    }
