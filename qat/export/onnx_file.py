"""A quantized net as an ONNX file of standard operators, checked against it: `qat.export_onnx`.

Every product of quantized tensors is one of codes of 8 bits: what it adds to them is planned on an image (`plan.py`),
written down while torch traces the net (`write.py`), and simplified (`rewrite.py`).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.export.check import INPUT, OUTPUT, Checked, check_onnx, quiet
from qat.export.codes import OPSETS, store_weights
from qat.export.plan import Planner
from qat.export.write import CODES, SITE, TensorRT, Writer, unfused, write_in_graph
from qat.model.convert import check_input, conversion_of
from qat.model.freeze import freeze
from qat.model.frozen import is_frozen
from qat.model.metadata import describe
from qat.model.transform import data_config
from qat.utils.files import check_not_folder, replacing
from qat.utils.probing import copied
from qat.utils.validate import check_bool, check_choice

if TYPE_CHECKING:
    import onnx
    import onnx_ir

    from qat.data.settings import DataSettings

# Gelu needs 20. A graph is written in this one, and its number raised where a stored type needs more: up to 25 operators got
# new types and attributes alone. From 21 on torch would write GroupNormalization, which onnxruntime runs in nine operators on a CPU.
LOWEST_OPSET = 20
LARGEST_CONSTANT = 4096
TWO_BIT = {"int4": 4, "int2": 2}
CPUS = ("any", "fast")
# Of noise, on which a file is checked where there are no others.
IMAGES = 16


@dataclass(frozen=True)
class OnnxSettings:
    """How a file is written.

    Attributes:
        dynamic_batch: any number of images.
        target: `cpu`, products on integers for onnxruntime and OpenVINO, or `tensorrt`, QuantizeLinear and DequantizeLinear.
        cpu: for which processors, with target `cpu`: `any`, or `fast`, for those with VNNI and for ARM.
        two_bit: `int4` stores weights of 2 bits in INT4, which OpenVINO reads, `int2` in INT2: half the bytes. Only for `cpu`.
    """

    dynamic_batch: bool = True
    target: str = "cpu"
    two_bit: str = "int4"
    cpu: str = "any"

    def __post_init__(self) -> None:
        check_bool("dynamic_batch", self.dynamic_batch)
        check_choice("format.target", self.target, ("cpu", "tensorrt"))
        check_choice("format.two_bit", self.two_bit, tuple(TWO_BIT))
        check_choice("format.cpu", self.cpu, CPUS)


def export_onnx(
    net: nn.Module,
    path: str | Path,
    *,
    images: Tensor | None = None,
    dynamic_batch: bool = True,
    target: str = "cpu",
    two_bit: str = "int4",
    cpu: str = "any",
) -> Checked:
    """Write a quantized net to an ONNX file, run both on the same images, and give the file its name if they agree.

    Its input is `image` (B, C, H, W), its output `logits` (B, classes), float32. docs/deployment.md

    Args:
        net: converted and calibrated or trained, or of `qat.freeze`; stays as it is.
        path: the file; one that is there is replaced.
        images: (B, C, H, W) of the net's input size, prepared as it takes them; None = noise, on which a net decides by little.
        dynamic_batch: any number of images, or one at a time.
        target: `cpu` (products on integers, onnxruntime and OpenVINO) or `tensorrt` (QuantizeLinear and DequantizeLinear around products).
        two_bit: `int4` or `int2`, which takes half the bytes and OpenVINO does not read.
        cpu: `any` = right on every processor, `fast` = products of 8-bit codes as uint8 times int8, which saturate on x86 without VNNI.

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

    require_installed("onnx")
    settings = OnnxSettings(dynamic_batch, target, two_bit, cpu)
    done = conversion_of(net)
    if done is None:
        raise UsageError(
            "export_onnx: the model is not quantized; call qat.convert(model, qat.recipe(...)) first"
        )
    if images is None:
        images = torch.randn(IMAGES, *done.input_size, generator=torch.Generator().manual_seed(0))
    if tuple(images.shape[1:]) != done.input_size or not len(images) or not images.isfinite().all():
        raise UsageError(
            f"images of {tuple(images.shape)}: must be (at least 1, *{done.input_size}), all numbers finite"
        )
    net = copied(net).cpu().float()
    frozen = net if is_frozen(net) else freeze(net)
    shape = check_input(frozen, done.input_size)
    if shape is None or len(shape) != 2:
        raise UsageError(
            f"export_onnx: the model returns {shape or 'several tensors'} for an image; must be a classifier, which returns (1, classes)"
        )
    is_square = done.input_size[1] == done.input_size[2]
    meta = describe(frozen) | {
        "preprocessing": preprocessing(data_settings(data_config(net))) if is_square else None
    }
    return write_checked(
        Path(path),
        lambda unchecked: write_onnx(
            unchecked, frozen, net, meta, [images.cpu().float()], settings
        ),
    )


def write_checked(target: Path, write: Callable[[Path], Checked]) -> Checked:
    """Write, compare, and only then give a file its name.

    Raises:
        UsageError: `target` is a folder, or what was written disagrees; it is kept as `<target>.rejected`.
    """
    check_not_folder(target)
    unchecked = target.with_name(f".unchecked.{target.name}")
    unchecked.parent.mkdir(parents=True, exist_ok=True)
    try:
        checked = write(unchecked)
        problem, rejected = checked.problem, target.with_name(f"{target.name}.rejected")
        if problem is not None:
            unchecked.replace(rejected)
            raise UsageError(
                f"file={str(target)!r}: the written file does not agree with the checkpoint ({problem}); kept as {rejected}"
            )
        rejected.unlink(missing_ok=True)
        unchecked.replace(target)
    finally:
        unchecked.unlink(missing_ok=True)
    return checked


def write_onnx(
    path: Path,
    frozen: nn.Module,
    net: nn.Module,
    meta: Mapping[str, Any],
    images: Sequence[Tensor],
    settings: OnnxSettings,
) -> Checked:
    """Write a file, run it beside its net.

    Args:
        path: the file.
        frozen: what is written.
        net: what it was frozen from, or itself.
        meta: of `qat.model.metadata.describe`, and `preprocessing`; None = none is stated, as for images that are not square.
        images: (B, C, H, W) each.
        settings: of the file.
    """
    import onnx  # noqa: PLC0415  (an extra)

    model = to_onnx(frozen, images[0][:1], settings)
    about = {key: meta[key] for key in ("format_version", "model", "recipe", "input_size")}
    props = {
        "qat": about,
        "qat.classes": list(meta.get("classes") or []),
        "qat.preprocessing": meta["preprocessing"],
    }
    onnx.helper.set_model_props(
        model, {key: json.dumps(value) for key, value in props.items() if value is not None}
    )
    model.producer_name = "qat"
    with replacing(path) as temporary:
        onnx.save(model, str(temporary))
    return check_onnx(net, path, images)


def preprocessing(settings: DataSettings) -> dict[str, Any]:
    """What is to be done to an image: size, mean, std, interpolation, crop_pct, crop_mode."""
    return {
        "size": settings.image_size,
        "mean": list(settings.mean),
        "std": list(settings.std),
        "interpolation": settings.interpolation or "bicubic",
        "crop_pct": settings.crop_pct,
        "crop_mode": settings.crop_mode or "center",
    }


def require_installed(form: str) -> None:
    """Raise `UsageError` unless what writes and runs files of a format, `onnx` or `executorch`, is installed."""
    extra = "export" if form == "onnx" else form
    for name in ("onnx", "onnxruntime", "onnxscript") if form == "onnx" else (form,):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"format={form}: {name} is not installed; pip install -e '.[{extra}]'")


@quiet()
@torch.no_grad()
def to_onnx(
    net: nn.Module, image: Tensor, settings: OnnxSettings = OnnxSettings()
) -> onnx.ModelProto:  # noqa: B008  (frozen)
    """Write a frozen net down in standard operators.

    Args:
        net: of `qat.freeze`; stays as it is.
        image: (1, C, H, W), of the size that the net takes.
        settings: how.

    Returns:
        The model: input `image` (B, C, H, W), output `logits` (B, classes), float32.

    Raises:
        UsageError: the target cannot have this net, or torch cannot export it.
    """
    import onnx  # noqa: PLC0415  (an extra)

    from qat.export.rewrite import divide_apart, narrow_weights, simplify  # noqa: PLC0415  (an extra)

    net, is_tensorrt = unfused(net), settings.target == "tensorrt"
    stored = store_weights(
        "onnx",
        net,
        8 if is_tensorrt else TWO_BIT[settings.two_bit],
        "fast" if is_tensorrt else settings.cpu,
    )
    if is_tensorrt:
        write_in_graph(net, stored, TensorRT(net, stored))
    else:
        planner = Planner(net, settings.cpu)
        write_in_graph(net, stored, planner)
        net(image)
        writer = net.onnx = Writer(net, planner)
        write_in_graph(net, stored, writer)
        net.register_forward_pre_hook(writer.restart)
    model = _trace(net, image, dynamic_batch=settings.dynamic_batch)
    if not is_tensorrt:
        divide_apart(model)
    simplify(model)
    narrow_weights(model, stored)
    model.opset_imports[""] = opset = max(
        LOWEST_OPSET, *(OPSETS[one.width] for one in stored.values())
    )
    proto = _to_proto(model)
    proto.ir_version = max(
        proto.ir_version, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


@quiet()
@torch.no_grad()
def export_float(net: nn.Module, image: Tensor) -> onnx.ModelProto:
    """Any net in ONNX, for any number of images, by torch's exporter."""
    return _to_proto(_trace(unfused(net), image, dynamic_batch=True))


def _trace(net: nn.Module, image: Tensor, *, dynamic_batch: bool) -> onnx_ir.Model:
    from onnxscript import optimizer  # noqa: PLC0415  (an extra)

    # An example of one image would be taken for a net of one image.
    images = image.expand(2, -1, -1, -1).contiguous() if dynamic_batch else image
    try:
        program: Any = torch.onnx.export(
            net,
            (images,),
            dynamo=True,
            opset_version=LOWEST_OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic_batch else None,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
            optimize=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise UsageError(
            f"format=onnx: torch cannot export this model: {' '.join(str(cause).split())[:300]}"
        ) from error

    def should_fold(node: onnx_ir.Node) -> bool | None:
        """False of the codes of a weight, which would be stored as float numbers; None = the optimizer decides."""
        return (
            False
            if any(value and (value.name or "").endswith(CODES) for value in node.inputs)
            else None
        )

    # Constants that grow, as an outer product of two vectors, are for the runtime to work out when it opens the file.
    optimizer.optimize_ir(
        program.model, output_size_limit=LARGEST_CONSTANT, should_fold=should_fold
    )
    return program.model


def _to_proto(model: onnx_ir.Model) -> onnx.ModelProto:
    """Name quantizers, and take out what torch notes of its own source code: in a small net more bytes than the weights."""
    import onnx_ir  # noqa: PLC0415  (an extra)
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass  # noqa: PLC0415

    for node in model.graph:
        node.name = node.metadata_props.get(SITE, node.name)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    ClearMetadataAndDocStringPass()(model)
    proto = onnx_ir.to_proto(model)
    del proto.graph.value_info[:]
    return proto
