"""Share models as timm and Hugging Face do: a folder of weights, `config.json` and a card."""

from __future__ import annotations

import difflib
import http.client
import json
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import timm
import torch
from torch import nn

from qat.errors import UsageError
from qat.model.bounds import OTHER_ERRORS, check_net
from qat.model.convert import conversion_of
from qat.model.freeze import freeze
from qat.model.frozen import is_frozen
from qat.model.metadata import describe
from qat.model.packed import write_packed
from qat.model.storage import FETCHING_ARGS, check_loads, load
from qat.nn.hf_constructor import model_config, package, transformers_model, without_origin
from qat.utils.files import json_text, write_text
from qat.utils.text import json_object
from qat.utils.validate import check_choice, check_images, check_number

PREFIX = "hf-hub:"  # timm's prefix for repositories `user/name`
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"  # preprocessing for Transformers' models
# The Hub's task for Transformers classes whose names contain a word; for others: `FEATURES`.
HUB_TASKS = {
    "ImageClassification": "image-classification",
    "ObjectDetection": "object-detection",
    "Segmentation": "image-segmentation",
    "DepthEstimation": "depth-estimation",
    "PoseEstimation": "keypoint-detection",
}
FEATURES = "image-feature-extraction"
LIBRARY = "vit-qat"  # `library_name` in the `config.json` of our models
INSTALL = (
    f"In a clone of the repository of {LIBRARY} (it is not on PyPI yet): "
    "`pip install -c constraints.txt -e . --config-settings editable_mode=compat`"
)
TIMEOUT_S = 4
# The folders of a path that begins with /, \, ~, ./, ../ or a drive such as C:/.
_PATH_PREFIX = re.compile(
    r"(?<![\w.])(?:[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\])(?:.*[/\\](?=.))?", re.DOTALL
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_cached(repository: str, names: tuple[str, ...]) -> str | None:
    """Path of the first of these files of a repository that is in the local cache, if any."""
    for name in names:
        path = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return path
    return None


def require_host(address: str, origin: str, problem: str, advice: str) -> None:
    """Check that a host responds; the client of the hub would retry silently for a minute.

    Raises:
        UsageError: the host does not respond within 4 s, or HF_HUB_OFFLINE is set. The message is
            `origin: problem and address cannot be reached (reason); advice`.
    """
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        return  # even an error code is a response
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UsageError(
            f"{origin}: {problem} and {address} cannot be reached ({error}); {advice}"
        ) from error


def fetch(repository: str, origin: str) -> Path:
    """Return a local folder with `config.json` and `model.safetensors` of a repository.

    Files that are not in the local cache are downloaded, with the image processor's config if there
    is one.

    Args:
        repository: `user/name`.
        origin: name of the repository in error messages.

    Raises:
        UsageError: `repository` does not have the form `user/name`, the files are not cached and
            cannot be downloaded, or the config is invalid, would load other files or build a model
            that is much larger than the weights.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"{origin}: must be user/name, a repository on the hub")
    if not all(find_cached(repository, (name,)) for name in (CONFIG, WEIGHTS)):
        _download(repository, origin)
    for name in (CONFIG, WEIGHTS):
        if find_cached(repository, (name,)) is None:
            raise UsageError(f"{origin}: the repository has no {name}")
    folder = Path(str(find_cached(repository, (CONFIG,)))).parent
    try:
        _check_config(folder)
    except (ValueError, safetensors.SafetensorError) as error:
        raise UsageError(f"{origin}: {CONFIG} cannot be used ({error})") from error
    return folder


def _local_folder(source: str, origin: str) -> Path:
    """Return the folder `source`, or the local folder of the repository `source`, see `fetch`."""
    if Path(source).is_dir():
        return Path(source)
    if not _REPOSITORY.fullmatch(source):
        raise UsageError(f"{origin}: must be an existing folder, or user/name on the hub")
    return fetch(source, origin)


def _download(repository: str, origin: str) -> None:
    require_host(
        huggingface_hub.constants.ENDPOINT,
        origin,
        f"{repository} is not in the local cache",
        "a folder that was downloaded elsewhere works too",
    )
    try:
        huggingface_hub.snapshot_download(repository, allow_patterns=[CONFIG, WEIGHTS, PROCESSOR])
    except (OSError, ValueError) as error:
        reason = str(error)[:200]
        raise UsageError(
            f"{origin}: cannot be downloaded ({reason}); "
            "a private repository needs a token (hf auth login)"
        ) from error


def _check_config(folder: Path) -> None:
    """Raise `ValueError` if an untrusted config is invalid or could do harm.

    It must not load other files, contain settings (`${...}`) or build a huge model. (`load` checks
    the size of our own models.)
    """
    config = json_object(folder / CONFIG)
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, dict) or FETCHING_ARGS & arguments.keys():
        raise ValueError(
            f"model_args must be an object without {', '.join(sorted(FETCHING_ARGS))}, "
            "which load other files"
        )
    if "${" in json.dumps(config):
        raise ValueError("the config contains '${', which would be resolved as a setting")
    image_config = config.get("pretrained_cfg") or {}
    if not isinstance(image_config, dict):
        image_config = {}
    check_images("pretrained_cfg", image_config)
    architecture = str(config.get("architecture"))
    if not is_ours(folder) and timm.is_model(architecture):
        _check_size(folder, architecture, arguments, image_config.get("input_size"))


def _check_size(
    folder: Path, name: str, arguments: Mapping[str, Any], input_size: Sequence[int] | None = None
) -> None:
    """Raise `ValueError` if a model is much larger than the weights in an untrusted folder."""
    shapes = {}
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        names = file.keys()
        for tensor_name in names:
            shapes[tensor_name] = torch.empty(
                file.get_slice(tensor_name).get_shape(), device="meta"
            )
    check_net(name, arguments, shapes, pretrained_size=input_size)


def transformers_folder(
    name: str, origin: str, architecture: str | None, changes: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Return a local folder with an image classifier of Transformers, and arguments to build it.

    Args:
        name: a folder that Transformers' `save_pretrained` wrote, or `user/name` on the hub.
        origin: name of the folder in error messages.
        architecture: name of the model class; None = the image classifier that the config names,
            or else the first one of its `model_type`.
        changes: settings that replace those of the config, also in nested configs.

    Returns:
        The folder (see `fetch`), and the arguments `architecture` and `config` of
        `TransformersClassifier`.

    Raises:
        UsageError: see `fetch`; or a file is missing or cannot be used, the config belongs to
            another kind of model, or `architecture` or `changes` do not fit the config.
    """
    folder = _local_folder(name, origin)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UsageError(f"{origin}: has no {file}")
    config = json_object(folder / CONFIG)
    arguments: dict[str, Any] = {}
    try:
        if not config:
            raise ValueError("it must be a JSON object")
        _check_config(folder)
        arguments["architecture"] = _classifier_class(config, architecture)
        arguments["config"] = config
        known = model_config(arguments["architecture"], config).to_dict()
        _check_size(folder, transformers_model.__name__, arguments)
        arguments["config"] = _changed_config(config, changes, known, "model.args.config")
        with torch.device("meta"):
            transformers_model(**arguments)
    except UsageError:
        raise
    except (*OTHER_ERRORS, ValueError, safetensors.SafetensorError) as error:
        file = WEIGHTS if isinstance(error, safetensors.SafetensorError) else CONFIG
        reason = str(error)[:300]
        changed = f" with {dict(changes)}" if changes else ""
        raise UsageError(f"{origin}: {file}{changed} cannot be used ({reason})") from error
    return folder, arguments


def _changed_config(
    config: Mapping[str, Any], changes: Mapping[str, Any], known: Mapping[str, Any], setting: str
) -> dict[str, Any]:
    """A config with changed settings; `known` has all settings of the config's class."""
    changed = dict(config)
    for key, value in changes.items():
        if key not in known:
            closest = ", ".join(difflib.get_close_matches(key, known)) or "none"
            raise UsageError(
                f"{setting}.{key}={value!r}: unknown setting of model_type "
                f"{known['model_type']!r}; closest: {closest}"
            )
        changed[key] = value
        is_config = isinstance(known[key], dict) and "model_type" in known[key]
        if is_config and isinstance(value, Mapping):
            inner = config.get(key) or {}
            changed[key] = _changed_config(inner, value, known[key], f"{setting}.{key}")
    return changed


def _classifier_class(config: Mapping[str, Any], architecture: str | None) -> str:
    """Name of Transformers' image classifier class for a config, even the config of an encoder."""
    if config.get("quantization_config"):
        raise ValueError("the model is already quantized; use from_pretrained of transformers")
    model_type = config.get("model_type")
    names = package().models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    classes = names.get(model_type, ())
    classes = [classes] if isinstance(classes, str) else list(classes)
    if not classes:
        raise ValueError(f"transformers has no image classifier of model_type {model_type!r}")
    if architecture is not None:
        check_choice("model.args.architecture", architecture, tuple(classes))
        return architecture
    for name in config.get("architectures") or ():
        if name in classes:
            return str(name)
    return str(classes[0])


def is_ours(folder: Path) -> bool:
    """True if our `save_pretrained` wrote the folder."""
    return json_object(folder / CONFIG).get("library_name") == LIBRARY


def save_pretrained(
    net: nn.Module,
    folder: str | os.PathLike[str],
    *,
    results: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    license: str = "other",
    source: str = "user/name",
) -> Path:
    """Write a model to share: `model.safetensors`, `config.json` and a model card.

    The weights are packed as by `export.py format=packed`. A quantized model is frozen first, so
    its float weights are not in the files; `qat.save` would store them. Paths in `data` and
    `results` are written without their folders.

    Args:
        net: a model from `qat.load`, a converted model whose scales are set, or a float model of
            timm or Transformers.
        folder: the folder to write to. It is created if necessary; existing files are replaced.
        results: measured accuracy for the card, with keys as in `results.json`: `top1`, `top5` (%),
            `images`, `split`, `data`.
        data: see `qat.save`.
        classes: see `qat.save`.
        license: license of the weights, as the hub spells it.
        source: `user/name` or a folder, for `qat.from_pretrained` in the card's example; or a
            `.safetensors` file, for `qat.load`.

    Returns:
        The folder.

    Raises:
        UsageError: see `qat.save` and `qat.freeze`; or `top1`, `top5` or `images` of `results` is
            not a number of at least 0.
    """
    folder = Path(folder)
    measured = {}
    for key in ("top1", "top5", "images", "split", "data"):
        if results is not None and results.get(key) is not None:
            measured[key] = results[key]
    for key in ("top1", "top5", "images"):
        if key in measured:
            check_number(f"save_pretrained: results.{key}", measured[key], 0)
    folder.mkdir(parents=True, exist_ok=True)
    is_deployable = is_frozen(net) or conversion_of(net) is None
    frozen = net if is_deployable else freeze(net)
    meta = describe(frozen, data=data, classes=classes)
    meta["model"]["kwargs"] = without_origin(meta["model"]["kwargs"])
    if meta["data"]:
        meta["data"].pop("root", None)
        meta["data"] = _strip_paths(meta["data"])
    write_packed(frozen, folder / WEIGHTS, meta)
    check_loads(folder / WEIGHTS)
    config = {
        "library_name": LIBRARY,
        "architecture": meta["model"]["name"],
        "model_args": meta["model"]["kwargs"],
        "num_classes": getattr(net, "num_classes", None),
        "label_names": meta["classes"],
        **{key: meta[key] for key in ("format_version", "input_size", "recipe", "data")},
        "size_bytes": (folder / WEIGHTS).stat().st_size,
        "results": _strip_paths(measured),
    }
    write_text(folder / CONFIG, json_text(config))
    write_text(folder / "README.md", _model_card(net, config, license, source))
    return folder


def _strip_paths(value: Any) -> Any:
    """Copy plain data without the folders of paths in its texts (see `_PATH_PREFIX`)."""
    if isinstance(value, dict):
        return {_strip_paths(key): _strip_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strip_paths(entry) for entry in value]
    if isinstance(value, str):
        return _PATH_PREFIX.sub("", value)
    return value


def _escape_markdown(text: object) -> str:
    """Make untrusted text safe for Markdown: escape markup and HTML, and remove line breaks."""
    line = " ".join(str(text).split())
    return re.sub(r"[^\w .,%()+-]", lambda match: f"&#{ord(match[0])};", line)


def _hub_task(model_args: Mapping[str, Any]) -> str:
    """The Hub's name for the task of a model of timm, or of a class of Transformers."""
    hf_class = model_args.get("architecture")
    if hf_class is not None:
        return next((task for part, task in HUB_TASKS.items() if part in hf_class), FEATURES)
    return FEATURES if model_args.get("features_only") else HUB_TASKS["ImageClassification"]


def _model_card(net: nn.Module, config: Mapping[str, Any], license: str, source: str) -> str:
    """The model card: architecture, recipe, accuracy, size, and how to load the model."""
    conversion = conversion_of(net)
    recipe = "float"
    if conversion is not None:
        bits = f"weights {conversion.recipe.bits} bit, activations {conversion.recipe.act_bits} bit"
        recipe = f"`{_escape_markdown(conversion.recipe.name)}`: {bits}"
    results = [f"{key} {_escape_markdown(value)}" for key, value in config["results"].items()]
    dataset = (config["data"] or {}).get("_target_", "not stated")
    architecture = f"`{_escape_markdown(config['architecture'])}` of timm"
    hf_class = config["model_args"].get("architecture")
    if hf_class is not None:
        architecture = f"`{_escape_markdown(hf_class)}` of Transformers"
    rows = {
        "Architecture": architecture,
        "Recipe": recipe,
        "Data": _escape_markdown(dataset),
        "Accuracy": ", ".join(results) or "not measured",
        "Packed file": f"{config['size_bytes']:,} bytes",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    data = huggingface_hub.ModelCardData(
        library_name=LIBRARY,
        license=license,
        pipeline_tag=_hub_task(config["model_args"]),
        tags=["quantization", "vision"],
    )
    if source.endswith(".safetensors"):
        load_call = f'qat.load("{source}")'
        setting = f"ckpt={source}"
    else:
        load_call = f'qat.from_pretrained("{source}")'
        setting = f"model={PREFIX}{source}"
    command = f"On the command line: `qat eval {setting} predict=PHOTOS`."
    return f"""---
{data.to_yaml()}
---

# {_escape_markdown(hf_class or config["architecture"])}{", quantized" if conversion else ""}

| | |
|---|---|
{table}

{INSTALL}, then:

```python
import qat

net = {load_call}
image = qat.transform(net)("photo.jpg")
out = net(image[None])
```

{command}
"""


def from_pretrained(source: str | os.PathLike[str], *, imports: Sequence[str] = ()) -> nn.Module:
    """Load a model that `save_pretrained` wrote, in eval mode.

    Nothing in its files is imported or executed.

    Args:
        source: a folder, or `user/name` on the hub, which is downloaded unless it is in the local
            cache.
        imports: see `qat.load`.

    Raises:
        ImportError: one of `imports` cannot be imported.
        UsageError: see `qat.load`; or there is no such model, it cannot be downloaded (without a
            connection, the error is raised within 5 s), or `save_pretrained` did not write it.
    """
    origin = f"from_pretrained: {str(source)!r}"
    folder = _local_folder(str(source), origin)
    if not is_ours(folder):
        raise UsageError(
            f"{origin}: qat.save_pretrained did not write its {CONFIG}; timm.create_model "
            "loads models of timm, AutoModel.from_pretrained those of Transformers"
        )
    return load(folder / WEIGHTS, imports=imports)


def push_to_hub(
    net: nn.Module, repository: str, *, private: bool = False, api: Any = None, **saving: Any
) -> str:
    """Write a model as `save_pretrained` does, and upload it.

    Args:
        net: see `save_pretrained`.
        repository: `user/name`; it is created if it does not exist.
        private: True = only the owner can see a new repository.
        api: a `huggingface_hub.HfApi`; None = a new one with the token of `hf auth login` or
            HF_TOKEN.
        saving: additional arguments of `save_pretrained`.

    Returns:
        The address of the upload.

    Raises:
        UsageError: see `save_pretrained`; or `repository` does not have the form `user/name`, there
            is no token or connection, or the hub rejects the upload.
    """
    origin = f"push_to_hub: {repository!r}"
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"{origin}: must be user/name")
    if api is None:
        require_host(
            huggingface_hub.constants.ENDPOINT,
            origin,
            "nothing was uploaded",
            "save_pretrained writes a folder",
        )
        api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory(prefix="qat-") as folder:
        save_pretrained(net, folder, source=repository, **saving)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"Upload with {LIBRARY}"
            )
        except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:
            reason = str(error)[:200]
            raise UsageError(f"{origin}: the hub rejected the upload ({reason})") from error
    return str(getattr(commit, "commit_url", commit))
