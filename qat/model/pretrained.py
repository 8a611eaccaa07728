"""Nets in the form in which timm and Hugging Face share them: a folder with weights, `config.json` and a model card."""

from __future__ import annotations

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
from qat.model.bounds import check_net
from qat.model.convert import conversion_of
from qat.model.freeze import freeze
from qat.model.frozen import is_frozen
from qat.model.metadata import describe
from qat.model.packed import write_packed
from qat.model.storage import FETCHING_ARGS, check_loads, load
from qat.utils.files import json_text, write_text
from qat.utils.text import json_object
from qat.utils.validate import check_images, check_number

PREFIX = "hf-hub:"  # timm's, before `user/name`
WEIGHTS, CONFIG = "model.safetensors", "config.json"
LIBRARY = "vit-qat"  # what `config.json` of a net of ours says of itself
INSTALL = (
    f"In a clone of the repository of {LIBRARY} (it is not on PyPI yet): "
    "`pip install -c constraints.txt -e . --config-settings editable_mode=compat`"
)
TIMEOUT_S = 4
_PATH = re.compile(r"(?<![\w.])(?:[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\])(?:.*[/\\](?=.))?", re.DOTALL)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_cached(repository: str, names: tuple[str, ...]) -> str | None:
    """The first of some files of a repository that is in the local cache."""
    return next(
        (
            path
            for name in names
            if isinstance(path := huggingface_hub.try_to_load_from_cache(repository, name), str)
        ),
        None,
    )


def require_host(address: str, origin: str, missing: str, instead: str) -> None:
    """Ask whether a host responds: the hub's own client would retry in silence for most of a minute.

    Raises:
        UsageError: it does not within 4 s. `origin: missing and ... cannot be reached (why); instead`.
    """
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(
            urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S
        ):
            pass
    except urllib.error.HTTPError:  # it responds
        pass
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(
            f"{origin}: {missing} and {address} cannot be reached ({error}); {instead}"
        ) from error


def fetch(repository: str, origin: str) -> Path:
    """A local folder with `config.json` and `model.safetensors` of a repository; nothing else is fetched.

    Args:
        repository: `user/name`.
        origin: how a message calls it.

    Raises:
        UsageError: it is no such name, its files are not cached and cannot be fetched, or its config asks for other files.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"{origin}: must be user/name of a repository of the hub")
    if not all(find_cached(repository, (name,)) for name in (CONFIG, WEIGHTS)):
        missing = f"{repository} is not in the local cache"
        require_host(
            huggingface_hub.constants.ENDPOINT,
            origin,
            missing,
            "a folder that was downloaded elsewhere works too",
        )
        try:
            huggingface_hub.snapshot_download(repository, allow_patterns=[CONFIG, WEIGHTS])
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{origin}: cannot be fetched ({' '.join(str(error).split())[:200]}); a private one needs a token (hf auth login)"
            ) from error
    folder = Path(str(find_cached(repository, (CONFIG,)))).parent
    config = json_object(folder / CONFIG)
    arguments = config.get("model_args") or {}
    try:
        if not isinstance(arguments, dict) or FETCHING_ARGS & arguments.keys():
            raise ValueError("its arguments would read something else")
        if "${" in json.dumps(config):
            raise ValueError("it holds '${', which would be resolved as a setting")
        pretrained_cfg = config.get("pretrained_cfg") or {}
        if not isinstance(pretrained_cfg, dict):
            pretrained_cfg = {}
        check_images("pretrained_cfg", pretrained_cfg)
        if not is_ours(folder) and timm.is_model(name := str(config.get("architecture"))):
            with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
                names = file.keys()
                shapes = {
                    name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                    for name in names
                }
            pretrained_size = pretrained_cfg.get("input_size")
            check_net(name, arguments, shapes, pretrained_size=pretrained_size)
    except (ValueError, safetensors.SafetensorError) as error:
        raise UsageError(f"{origin}: {CONFIG} cannot be used ({error})") from error
    return folder


def is_ours(folder: Path) -> bool:
    """True for what `save_pretrained` has written."""
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
    """Write a net for others: `model.safetensors` (packed codes, as `export.py format=packed` writes), `config.json`, a model card.

    A quantized net is frozen first: what is written is what is deployed, without the float weights; `qat.save` keeps those. No
    path of this machine is written.

    Args:
        net: of `qat.load`, or converted with its scales set; or a float net of timm.
        folder: is made; files of these names in it are replaced.
        results: accuracy as it was measured, in the words of `results.json`: `top1`, `top5` (%), `images`, `split`, `data`.
        data: see `qat.save`.
        classes: see `qat.save`.
        license: of the weights, as the hub spells it.
        source: what the card tells its reader to load: `user/name`, or a file.

    Returns:
        The folder.

    Raises:
        UsageError: see `qat.save` and `qat.freeze`; a result is no number.
    """
    place = Path(folder)
    given = results or {}
    measured = {
        key: given[key]
        for key in ("top1", "top5", "images", "split", "data")
        if given.get(key) is not None
    }
    for key in {"top1", "top5", "images"} & measured.keys():
        check_number(f"save_pretrained: results.{key}", measured[key], 0)
    place.mkdir(parents=True, exist_ok=True)
    frozen = net if is_frozen(net) or conversion_of(net) is None else freeze(net)
    meta = describe(frozen, data=data, classes=classes)
    if meta["data"]:
        meta["data"] = _without_paths({
            key: value for key, value in meta["data"].items() if key != "root"
        })
    write_packed(frozen, place / WEIGHTS, meta)
    check_loads(place / WEIGHTS)
    config = {
        "library_name": LIBRARY,
        "architecture": meta["model"]["name"],
        "model_args": meta["model"]["kwargs"],
        "num_classes": getattr(net, "num_classes", None),
        "label_names": meta["classes"],
        **{key: meta[key] for key in ("format_version", "input_size", "recipe", "data")},
        "size_bytes": (place / WEIGHTS).stat().st_size,
        "results": _without_paths(measured),
    }
    write_text(place / CONFIG, json_text(config))
    write_text(place / "README.md", _card(net, config, license, source))
    return place


def _without_paths(value: Any) -> Any:
    """Plain data, a path in it cut down to its last part."""
    if isinstance(value, dict):
        return {_without_paths(key): _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(entry) for entry in value]
    return _PATH.sub("", value) if isinstance(value, str) else value


def _words(text: object) -> str:
    """A stranger's text as words of Markdown: no markup, no HTML, no second line."""
    return re.sub(
        r"[^\w .,%()+-]", lambda found: f"&#{ord(found[0])};", " ".join(str(text).split())
    )


def _card(net: nn.Module, config: Mapping[str, Any], license: str, source: str) -> str:
    """The model card: what the net is, how good, how large, how to load it (`source`: `user/name`, or a file)."""
    done, results = conversion_of(net), config["results"]
    is_file = source.endswith(".safetensors")
    recipe = None if done is None else done.recipe
    rows = {
        "Architecture": f"`{_words(config['architecture'])}` of timm",
        "Recipe": "float"
        if recipe is None
        else f"`{_words(recipe.name)}`: weights {recipe.bits} bit, activations {recipe.act_bits} bit",
        "Data": _words((config["data"] or {}).get("_target_", "not stated")),
        "Accuracy": ", ".join(f"{key} {_words(value)}" for key, value in results.items())
        or "not measured",
        "Packed file": f"{config['size_bytes']:,} bytes",
    }
    data = huggingface_hub.ModelCardData(
        library_name=LIBRARY,
        license=license,
        pipeline_tag=f"image-{'feature-extraction' if config['model_args'].get('features_only') else 'classification'}",
        tags=["quantization", "vision"],
    )
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    load = f'qat.load("{source}")' if is_file else f'qat.from_pretrained("{source}")'
    command = f"On the command line: `qat eval {'ckpt=' if is_file else 'model=' + PREFIX}{source} predict=PHOTOS`."
    return f"""---
{data.to_yaml()}
---

# {_words(config["architecture"])}, quantized

| | |
|---|---|
{table}

{INSTALL}, then:

```python
import qat

net = {load}
image = qat.transform(net)("photo.jpg")
out = net(image[None])
```

{command}
"""


def from_pretrained(source: str | os.PathLike[str], *, imports: Sequence[str] = ()) -> nn.Module:
    """A net of `save_pretrained`, in eval mode. Nothing in its files is imported or executed.

    Args:
        source: a folder, or `user/name` of the hub, from the local cache where it is in it.
        imports: see `qat.load`.

    Raises:
        ImportError: one of `imports` cannot be imported.
        UsageError: there is no such net, it cannot be fetched (within 5 s where there is no connection), or it is not of `save_pretrained`.
    """
    origin = f"from_pretrained: {str(source)!r}"
    folder = Path(source) if Path(source).is_dir() else fetch(str(source), origin)
    if not is_ours(folder):
        raise UsageError(
            f"{origin}: its {CONFIG} is not of qat.save_pretrained; timm.create_model reads those of timm"
        )
    return load(folder / WEIGHTS, imports=imports)


def push_to_hub(
    net: nn.Module, repository: str, *, private: bool = False, api: Any = None, **saving: Any
) -> str:
    """Write a net as `save_pretrained` does and upload it.

    Args:
        net: see `save_pretrained`.
        repository: `user/name`; is made where it is not there.
        private: seen by its owner alone.
        api: a `huggingface_hub.HfApi`; None = one with the token of `hf auth login` or HF_TOKEN.
        saving: further arguments of `save_pretrained`.

    Returns:
        The address of what was uploaded.

    Raises:
        UsageError: no such name, no token, no connection, or the hub refuses.
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
            done = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"Upload with {LIBRARY}"
            )
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{origin}: the hub refuses ({' '.join(str(error).split())[:200]})"
            ) from error
    return str(getattr(done, "commit_url", done))
