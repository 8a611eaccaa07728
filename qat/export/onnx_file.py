"""Write a quantized model as an ONNX file of standard operators: `qat.export_onnx`.

For target `cpu`, products of quantized tensors become products of 8-bit codes where the scales
allow it, and a run on an image computes the constants (`plan.py`). For target `tensorrt`, TensorRT
finds these products itself. Operators are written while torch traces the model (`write.py`), and
the graph is then simplified (`rewrite.py`). Finally, the file is compared with the model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.export.check import CheckResult, check_onnx
from qat.export.codes import OPSETS, TENSORRT, store_weights
from qat.export.plan import Planner
from qat.export.runtimes import INPUT, quiet
from qat.export.write import (
    CODES,
    SITE,
    TensorRT,
    Writer,
    call_name,
    compute_in_half,
    copy_unfused,
    write_in_graph,
)
from qat.model.convert import check_input, conversion_of
from qat.model.freeze import freeze
from qat.model.frozen import is_frozen
from qat.model.metadata import data_of, describe, recorded_constructor
from qat.model.transform import data_config
from qat.nn import named_outputs
from qat.utils.files import check_not_folder, replace_atomically
from qat.utils.probing import copy_net
from qat.utils.validate import check_bool, check_choice

if TYPE_CHECKING:
    import onnx
    import onnx_ir

    from qat.data.settings import DataSettings

# Gelu needs opset 20. All graphs are written in this opset. If a stored type needs a later opset,
# only the number in the file is raised, because opsets up to 25 only add types and attributes to
# operators. For opset 21 and later, torch would write GroupNormalization, which onnxruntime runs as
# nine operators on a CPU.
MIN_OPSET = 20
MAX_CONSTANT_ELEMENTS = 4096  # larger constants are folded only if the file does not grow
TWO_BIT_WIDTHS = {"int4": 4, "int2": 2}
CPUS = ("any", "fast")
# If no images are passed, a file is compared with its model on this many images of noise.
NUM_NOISE_IMAGES = 16


@dataclass(frozen=True)
class OnnxSettings:
    """Settings of an ONNX file.

    Attributes:
        dynamic_batch: True = the file takes any number of images; False = one image at a time.
        target: `cpu` writes products of integers for onnxruntime and OpenVINO, `tensorrt` writes
            QuantizeLinear and DequantizeLinear.
        two_bit: `int4` stores 2-bit weights in INT4, which OpenVINO reads; `int2` stores them in
            INT2, in half the bytes. Only for target `cpu`.
        cpu: processors for target `cpu`: `any`, or `fast` for processors with VNNI and for ARM.
        precision: type of float tensors for target `tensorrt`: `fp16` or `fp32`.
    """

    dynamic_batch: bool = True
    target: str = "cpu"
    two_bit: str = "int4"
    cpu: str = "any"
    precision: str = "fp16"

    def __post_init__(self) -> None:
        check_bool("dynamic_batch", self.dynamic_batch)
        check_choice("format.target", self.target, ("cpu", "tensorrt"))
        check_choice("format.two_bit", self.two_bit, tuple(TWO_BIT_WIDTHS))
        check_choice("format.cpu", self.cpu, CPUS)
        check_choice("format.precision", self.precision, ("fp16", "fp32"))


def export_onnx(
    net: nn.Module,
    path: str | Path,
    *,
    images: Tensor | None = None,
    dynamic_batch: bool = True,
    target: str = "cpu",
    two_bit: str = "int4",
    cpu: str = "any",
    precision: str = "fp16",
) -> CheckResult:
    """Write a quantized model to an ONNX file, and keep the file if it agrees with the model.

    The input is `image` (B, C, H, W), the output `logits` (B, classes), both float32. Models of
    Transformers have the outputs of `qat.nn.named_outputs`. Docs: docs/deployment.md.

    Args:
        net: a converted model that is calibrated or trained, or a result of `qat.freeze`; not
            changed.
        path: the file; an existing file is replaced.
        images: preprocessed images (B, C, H, W) of the model's input size; None = noise, which is a
            weaker check, because the logits of the classes are then close to each other.
        dynamic_batch: True = the file takes any number of images; False = one image at a time.
        target: `cpu` (products of integers, for onnxruntime and OpenVINO) or `tensorrt`
            (QuantizeLinear and DequantizeLinear around products).
        two_bit: type of 2-bit weights for target `cpu`: `int4`, or `int2`, which takes half the
            bytes but cannot be read by OpenVINO.
        cpu: `any` = correct on every processor; `fast` = write products of 8-bit codes as uint8
            times int8, which saturate on x86 without VNNI.
        precision: type of float tensors for target `tensorrt`: `fp16` or `fp32`.

    Returns:
        The comparison of file and model; its method `to_text()` describes it in words.

    Raises:
        UsageError: a setting is not allowed, `path` is a folder, the outputs have no names, the
            model is not quantized, its scales are not set, the images do not fit, the target does
            not support the model, torch cannot export it, onnx is not installed, or the written
            file disagrees with the model; the file is then kept as `<path>.rejected`.

    Examples:
        >>> net = timm.create_model("deit_tiny_patch16_224")  # doctest: +SKIP
        >>> net = qat.convert(net, qat.recipe("deploy_w8a8"))  # doctest: +SKIP
        >>> net = qat.initialize_scales(net, [images])  # doctest: +SKIP
        >>> qat.export_onnx(net, "net.onnx", images=images)  # doctest: +SKIP
    """
    from qat.data.image_transform import data_settings  # noqa: PLC0415  (imports Lightning)

    require_installed("onnx")
    settings = OnnxSettings(dynamic_batch, target, two_bit, cpu, precision)
    conversion = conversion_of(net)
    if conversion is None:
        raise UsageError(
            "export_onnx: the model is not quantized; "
            "call qat.convert(model, qat.recipe(...)) first"
        )
    input_size = conversion.input_size
    if images is None:
        images = torch.randn(
            NUM_NOISE_IMAGES, *input_size, generator=torch.Generator().manual_seed(0)
        )
    if tuple(images.shape[1:]) != input_size or not len(images) or not images.isfinite().all():
        raise UsageError(
            f"images of shape {tuple(images.shape)}: must have shape (N, *{input_size}) with N at "
            "least 1, and only finite numbers"
        )
    # Transformers' own `float` method refuses quantized models.
    net = nn.Module.float(copy_net(net).cpu())
    frozen = net if is_frozen(net) else freeze(net)
    outputs = check_input(frozen, input_size)
    if not outputs:
        raise UsageError(
            "export_onnx: the model returns several tensors without names; "
            "must be a classifier, which returns (1, classes), or a model of Transformers"
        )
    name, kwargs = recorded_constructor(frozen)
    meta = describe(frozen, model=name or type(frozen).__name__, model_kwargs=kwargs or {})
    meta["preprocessing"] = None
    is_square = input_size[1] == input_size[2]
    if is_square and (data_of(net) or hasattr(net, "pretrained_cfg")):
        with contextlib.suppress(UsageError):  # the file need not say how images are prepared
            meta["preprocessing"] = preprocessing(data_settings(data_config(net)))
    batches = [images.cpu().float()]

    def write(unchecked: Path) -> CheckResult:
        return write_onnx(unchecked, frozen, net, meta, batches, settings)

    return write_checked(Path(path), write)


def write_checked(target: Path, write: Callable[[Path], CheckResult]) -> CheckResult:
    """Write a file under a temporary name, and rename it to `target` if it agrees with the model.

    Args:
        target: the file.
        write: function that writes a file at a path and compares the file with the model.

    Raises:
        UsageError: `target` is a folder, or the written file disagrees with the model; the file is
            then kept as `<target>.rejected`.
    """
    check_not_folder(target)
    unchecked_path = target.with_name(f".unchecked.{target.name}")
    rejected_path = target.with_name(f"{target.name}.rejected")
    unchecked_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = write(unchecked_path)
        if result.problem is not None:
            unchecked_path.replace(rejected_path)
            raise UsageError(
                f"file={str(target)!r}: the written file does not agree with the model "
                f"({result.problem}); kept as {rejected_path}"
            )
        rejected_path.unlink(missing_ok=True)
        unchecked_path.replace(target)
    finally:
        unchecked_path.unlink(missing_ok=True)
    return result


def write_onnx(
    path: Path,
    frozen: nn.Module,
    net: nn.Module,
    meta: Mapping[str, Any],
    images: Sequence[Tensor],
    settings: OnnxSettings,
) -> CheckResult:
    """Write an ONNX file, and compare it with its model.

    Args:
        path: the file.
        frozen: the model to write.
        net: the model that was frozen, or `frozen` itself.
        meta: result of `qat.model.metadata.describe`, with an additional entry `preprocessing`
            (None = unknown, for example for images that are not square).
        images: (B, C, H, W) each.
        settings: settings of the file.

    Returns:
        The comparison; `CheckResult.problem` is set if the file disagrees with the model.

    Raises:
        UsageError: see `to_onnx` and `check_onnx`.
    """
    import onnx  # noqa: PLC0415  (an extra)

    model = to_onnx(frozen, images[0][:1], settings)
    metadata = {
        "qat": {key: meta[key] for key in ("format_version", "model", "recipe", "input_size")},
        "qat.classes": list(meta.get("classes") or []),
    }
    if meta["preprocessing"] is not None:
        metadata["qat.preprocessing"] = meta["preprocessing"]
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(model, texts)
    model.producer_name = "qat"
    with replace_atomically(path) as temporary:
        onnx.save(model, str(temporary))
    return check_onnx(net, path, images)


def preprocessing(settings: DataSettings) -> dict[str, Any]:
    """Preprocessing as recorded in a file: size, mean, std, interpolation, crop_pct, crop_mode."""
    return {
        "size": settings.image_size,
        "mean": list(settings.mean),
        "std": list(settings.std),
        "interpolation": settings.interpolation or "bicubic",
        "crop_pct": settings.crop_pct,
        "crop_mode": settings.crop_mode or "center",
    }


def require_installed(form: str) -> None:
    """Raise `UsageError` unless the libraries for a format (onnx, executorch) are installed."""
    extra = form
    libraries: tuple[str, ...] = (form,)
    if form == "onnx":
        extra = "export"
        libraries = ("onnx", "onnxruntime", "onnxscript")
    for name in libraries:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"format={form}: {name} is not installed; pip install -e '.[{extra}]'")


@quiet()
@torch.no_grad()
def to_onnx(
    net: nn.Module, image: Tensor, settings: OnnxSettings = OnnxSettings()
) -> onnx.ModelProto:
    """Translate a frozen model to a graph of standard operators.

    Args:
        net: result of `qat.freeze`; not changed.
        image: (1, C, H, W), an image of the model's input size.
        settings: settings of the file.

    Returns:
        The ONNX model: input `image` (B, C, H, W), outputs of `qat.nn.named_outputs`, float32.

    Raises:
        UsageError: the target does not support this model, or torch cannot export it.
    """
    import onnx  # noqa: PLC0415  (an extra)

    from qat.export.rewrite import (  # noqa: PLC0415  (an extra)
        narrow_weights,
        separate_divisions,
        simplify,
    )

    net = copy_unfused(net)
    names = _name_outputs(net, image)
    is_tensorrt = settings.target == "tensorrt"
    if is_tensorrt:
        stored = store_weights(TENSORRT, net, min_width=8)
        write_in_graph(net, stored, TensorRT(net, stored))
        if settings.precision == "fp16":
            compute_in_half(net)
    else:
        stored = store_weights("onnx", net, TWO_BIT_WIDTHS[settings.two_bit], settings.cpu)
        planner = Planner(net, settings.cpu)
        write_in_graph(net, stored, planner)
        net(image)
        writer = Writer(net, planner)
        # Constants of the graph must be buffers of the net. `nn.Sequential` would call the writer.
        owner = next(module for module in net.modules() if not isinstance(module, nn.Sequential))
        owner.onnx = writer
        write_in_graph(net, stored, writer)
        net.register_forward_pre_hook(writer.restart)
    model = _trace(net, image, names, dynamic_batch=settings.dynamic_batch)
    if not is_tensorrt:
        separate_divisions(model)
    simplify(model)
    narrow_weights(model, stored)
    opset = max([MIN_OPSET, *(OPSETS[weight.width] for weight in stored.values())])
    model.opset_imports[""] = opset
    proto = _to_proto(model)
    opset_id = onnx.helper.make_opsetid("", opset)
    min_version = onnx.helper.find_min_ir_version_for([opset_id])
    proto.ir_version = max(proto.ir_version, min_version)
    onnx.checker.check_model(proto, full_check=True)
    return proto


@quiet()
@torch.no_grad()
def export_float(net: nn.Module, image: Tensor, *, dynamic_batch: bool = True) -> onnx.ModelProto:
    """Translate any model to ONNX, for one or any number of images; `image` is (1, C, H, W).

    Raises:
        UsageError: torch cannot export the model.
    """
    net = copy_unfused(net)
    names = _name_outputs(net, image)
    return _to_proto(_trace(net, image, names, dynamic_batch=dynamic_batch))


def _name_outputs(net: nn.Module, image: Tensor) -> list[str]:
    """Return the names of a model's outputs; make the model return a tensor or a tuple."""
    out = net(image)
    if not isinstance(out, Tensor):
        net.register_forward_hook(lambda _, __, output: tuple(named_outputs(output).values()))
    return list(named_outputs(out))


def _trace(
    net: nn.Module, image: Tensor, names: list[str], *, dynamic_batch: bool
) -> onnx_ir.Model:
    from onnxscript import optimizer  # noqa: PLC0415  (an extra)
    from onnxscript.function_libs.torch_lib.ops.core import aten_all  # noqa: PLC0415  (an extra)

    images = image
    dynamic_shapes = None
    if dynamic_batch:
        # Torch would fix a batch size of 1.
        images = image.expand(2, -1, -1, -1).contiguous()
        dynamic_shapes = ({0: torch.export.Dim("batch")},)
    try:
        program: Any = torch.onnx.export(
            net,
            (images,),
            dynamo=True,
            opset_version=MIN_OPSET,
            dynamic_shapes=dynamic_shapes,
            input_names=[INPUT],
            output_names=names,
            # Torch has no translation for this operator, which is only part of an assertion.
            custom_translation_table={torch.ops.aten._is_all_true.default: aten_all},
            verbose=False,
            optimize=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = str(error.__cause__ or error)[:300]
        raise UsageError(f"format=onnx: torch cannot export this model: {cause}") from error

    shape = program.model.graph.inputs[0].shape
    if dynamic_batch and isinstance(shape[0], int):
        raise UsageError(
            "dynamic_batch=True: torch fixes the number of images of this model; must be False"
        )

    def should_fold(node: onnx_ir.Node) -> bool | None:
        """False for codes of weights, which must stay integers; None = the optimizer decides."""
        for value in node.inputs:
            if value and (value.name or "").endswith(CODES):
                return False
        return None

    # Do not fold constants that would make the file larger, such as outer products of two vectors;
    # runtimes compute them when they open the file.
    optimizer.optimize_ir(
        program.model, output_size_limit=MAX_CONSTANT_ELEMENTS, should_fold=should_fold
    )
    return program.model


def _to_proto(model: onnx_ir.Model) -> onnx.ModelProto:
    """Convert a graph to a file's content: name quantizers, and remove source code locations.

    In a small model, these locations, which torch adds, take more bytes than the weights.
    """
    import onnx_ir  # noqa: PLC0415  (an extra)
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass  # noqa: PLC0415

    names: set[str] = set()
    for node in model.graph:
        if SITE in node.metadata_props:
            node.name = call_name(node.metadata_props[SITE], names)
            names.add(node.name)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    ClearMetadataAndDocStringPass()(model)
    proto = onnx_ir.to_proto(model)
    del proto.graph.value_info[:]
    return proto
