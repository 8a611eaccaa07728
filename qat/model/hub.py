"""Files of the Hugging Face hub: from the local cache, or fetched once their host has responded."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub

from qat.errors import UsageError
from qat.utils.files import check_model_arguments
from qat.utils.text import json_object

PREFIX = "hf-hub:"  # timm's, before `user/name`
WEIGHTS, CONFIG = "model.safetensors", "config.json"
LIBRARY = "vit-qat"  # what `config.json` of a net of ours says of itself
TIMEOUT_S = 4
GATEWAY_ERRORS = {407, 502, 503, 504}  # a proxy says that it cannot get there
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Arguments of a net that would read or fetch further files.
FETCHING_ARGS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def is_repository(name: object) -> bool:
    """True for `user/name`."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None


def cached(repository: str, names: tuple[str, ...]) -> str | None:
    """The first of some files of a repository that is in the local cache."""
    return next((path for name in names if isinstance(path := huggingface_hub.try_to_load_from_cache(repository, name), str)), None)


def require_host(address: str, origin: str, missing: str, instead: str) -> None:
    """Ask whether a host responds: the hub's own client would retry in silence for most of a minute.

    Raises:
        UsageError: it does not within 4 s. `origin: missing and ... cannot be reached (why); instead`.
    """
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S):
            pass
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code not in GATEWAY_ERRORS:
            return
        raise UsageError(f"{origin}: {missing} and {address} cannot be reached ({error}); {instead}") from error


def first_line(error: Exception) -> str:
    """What an error of the hub's client says first."""
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def fetch(repository: str, origin: str) -> Path:
    """A local folder with `config.json` and `model.safetensors` of a repository; nothing else is fetched.

    Args:
        repository: `user/name`.
        origin: how a message calls it.

    Raises:
        UsageError: it is no such name, its files are not cached and cannot be fetched, or its config asks for other files.
    """
    if not is_repository(repository):
        raise UsageError(f"{origin}: must be user/name of a repository of the hub")
    if not all(cached(repository, (name,)) for name in (CONFIG, WEIGHTS)):
        missing = f"{repository} is not in the local cache"
        require_host(huggingface_hub.constants.ENDPOINT, origin, missing, "a folder that was downloaded elsewhere works too")
        try:
            huggingface_hub.snapshot_download(repository, allow_patterns=[CONFIG, WEIGHTS])
        except (OSError, ValueError) as error:
            raise UsageError(f"{origin}: cannot be fetched ({first_line(error)}); a private one needs a token (hf auth login)") from error
    folder = Path(str(cached(repository, (CONFIG,)))).parent
    config = json_object(folder / CONFIG)
    arguments = config.get("model_args") or {}
    try:
        if not isinstance(arguments, dict) or FETCHING_ARGS & arguments.keys():
            raise ValueError("its arguments would read something else")
        check_model_arguments(arguments)
        if "${" in json.dumps(config):
            raise ValueError("it holds '${', which would be resolved as a setting")
    except ValueError as error:
        raise UsageError(f"{origin}: {CONFIG} cannot be used ({error})") from error
    return folder


def is_ours(folder: Path) -> bool:
    """True for what `save_pretrained` has written."""
    return json_object(folder / CONFIG).get("library_name") == LIBRARY
