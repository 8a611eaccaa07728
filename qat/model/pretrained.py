"""Nets in the form in which timm and Hugging Face share them: a folder with weights, `config.json` and a model card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import nn

from qat.errors import UsageError
from qat.model import hub
from qat.model.checkpoint import describe, load
from qat.model.convert import conversion_of
from qat.model.cost import cost
from qat.model.frozen import freeze, is_frozen
from qat.model.frozen.packed import write_packed
from qat.utils.files import json_text, write_text


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
        UsageError: the folder is a file; see also `qat.save` and `qat.freeze`.
    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise UsageError(f"save_pretrained: {str(place)!r} is a file; must be a folder")
    measured = {key: (results or {})[key] for key in ("top1", "top5", "images", "split", "data") if (results or {}).get(key) is not None}
    place.mkdir(parents=True, exist_ok=True)
    frozen = net if is_frozen(net) or conversion_of(net) is None else freeze(net)
    meta = describe(frozen, data=data, classes=classes)
    if meta["data"]:
        meta["data"] = {key: value for key, value in meta["data"].items() if key != "root"}
    write_packed(frozen, place / hub.WEIGHTS, meta)
    size = (place / hub.WEIGHTS).stat().st_size
    config = {
        "library_name": hub.LIBRARY,
        "format_version": meta["format_version"],
        "architecture": meta["model"]["name"],
        "model_args": meta["model"]["kwargs"],
        "num_classes": getattr(net, "num_classes", None),
        "input_size": meta["input_size"],
        "label_names": meta["classes"],
        "recipe": meta["recipe"],
        "data": meta["data"],
        "size_bytes": size,
        "results": measured,
    }
    write_text(place / hub.CONFIG, json_text(config))
    write_text(place / "README.md", _card(net, config, license, source))
    return place


def _card(net: nn.Module, config: Mapping[str, Any], license: str, source: str) -> str:
    """The model card: what the net is, how good, how large, how to load it (`source`: `user/name`, or a file)."""
    done, results = conversion_of(net), config["results"]
    is_file = source.endswith(".safetensors")
    n_params = cost(net, done.input_size).n_params if done is not None else sum(p.numel() for p in net.parameters())
    recipe = None if done is None or done.recipe.name == "fp" else done.recipe
    accuracy = "not measured"
    if results.get("top1") is not None:
        top5 = f", top-5 {results['top5']:.2f} %" if results.get("top5") is not None else ""
        images = f" of {results['images']:,} images" if results.get("images") else ""
        accuracy = f"top-1 {results['top1']:.2f} %{top5}{images}{' (' + results['split'] + ')' if results.get('split') else ''}"
    rows = {
        "Architecture": f"`{config['architecture']}` of timm, {n_params:,} parameters",
        "Recipe": "float" if recipe is None else f"`{recipe.name}`: weights {recipe.bits} bit, activations {recipe.act_bits} bit",
        "Data": str(results.get("data") or (config["data"] or {}).get("_target_", "").rpartition(".")[2].lower() or "not stated"),
        "Accuracy": accuracy,
        "Size": f"{config['size_bytes']:,} bytes",
    }
    data = huggingface_hub.ModelCardData(
        library_name=hub.LIBRARY,
        license=license,
        pipeline_tag=f"image-{'feature-extraction' if config['model_args'].get('features_only') else 'classification'}",
        tags=["quantization", "vision"],
    )
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    load = f'qat.load("{source}")' if is_file else f'qat.from_pretrained("{source}")'
    command = f"On the command line: `qat eval {'ckpt=' if is_file else 'model=' + hub.PREFIX}{source} predict=PHOTOS`."
    return f"""---
{data.to_yaml()}
---

# {config["architecture"]}, quantized

| | |
|---|---|
{table}

`pip install {hub.LIBRARY}`, then:

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
    if not Path(source).is_dir() and not hub.is_repository(str(source)):
        raise UsageError(f"{origin}: must be a folder of save_pretrained, or user/name of the hub")
    folder = Path(source) if Path(source).is_dir() else hub.fetch(str(source), origin)
    if not hub.is_ours(folder):
        hint = f"; timm reads its own: timm.create_model('{hub.PREFIX}user/name', pretrained=True)"
        raise UsageError(f"{origin}: its {hub.CONFIG} is not of qat.save_pretrained{hint}")
    return load(folder / hub.WEIGHTS, imports=imports)


def push_to_hub(net: nn.Module, repository: str, *, private: bool = False, api: Any = None, **saving: Any) -> str:
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
    if not hub.is_repository(repository):
        raise UsageError(f"{origin}: must be user/name")
    if api is None:
        if huggingface_hub.get_token() is None:
            raise UsageError(f"{origin}: no token; hf auth login stores one, HF_TOKEN=... gives one")
        hub.require_host(huggingface_hub.constants.ENDPOINT, origin, "nothing was uploaded", "save_pretrained writes a folder")
        api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory(prefix="qat-") as folder:
        save_pretrained(net, folder, source=repository, **saving)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload with {hub.LIBRARY}")
        except (OSError, ValueError) as error:
            raise UsageError(f"{origin}: the hub refuses ({hub.first_line(error)})") from error
    return str(getattr(done, "commit_url", done))
