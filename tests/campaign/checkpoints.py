"""Files that are no checkpoint, or one that is damaged, of another net, or made to do harm. Each function changes a good file in place."""

import copy
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import safetensors.torch
import timm
import torch

WEIGHT = "net.blocks.0.mlp.fc1.weight"


class Payload:
    """What must never run."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def cut(keep):
    """All but the beginning is lost: a share of the file, or so many bytes at its end."""

    def change(path):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep) if keep >= 0 else keep])

    return change


def written(content):
    """Bytes in place of a checkpoint."""
    return lambda path: path.write_bytes(content)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")


def compressed(path):
    """A small file that unpacks to a large one."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        archive.writestr("archive/data/999", bytes(10**8))


def nested(depth):
    return [nested(depth - 1)] if depth else 1.0


def saved(make):
    """What `make` gives of the checkpoint's content, saved by torch."""

    def change(path):
        torch.save(make(torch.load(path, weights_only=True)), path)

    return change


def edited(*keys, value):
    """The checkpoint with another value at a place in it."""

    def make(content):
        content = copy.copy(content)
        node = content
        for key in keys[:-1]:
            node[key] = copy.copy(node[key])
            node = node[key]
        node[keys[-1]] = value(node[keys[-1]]) if isinstance(value, Callable) else value
        return content

    return saved(make)


def meta(*keys, value):
    return edited("qat", *keys, value=value)


def weights(change):
    """The checkpoint with other weights."""
    return edited("state_dict", value=change)


def nan(state):
    return state | {WEIGHT: torch.full_like(state[WEIGHT], torch.nan)}


def without_a_weight(state):
    return {name: tensor for name, tensor in state.items() if name != WEIGHT}


def other_shape(state):
    return state | {WEIGHT: torch.zeros(5, 7)}


def dangerous_torch(path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "more": Payload(path.parent / "made")}, path)


def dangerous_pickle(path):
    path.write_bytes(pickle.dumps(Payload(path.parent / "made")))


def dangerous_meta(path):
    torch.save(
        torch.load(path, weights_only=True) | {"qat": {"model": Payload(path.parent / "made")}},
        path,
    )


UNREADABLE: dict[str, Callable[..., Any]] = {
    "cut to a half": cut(0.5),
    "cut to 95 %": cut(0.95),
    "empty": written(b""),
    "a bit flipped": flipped,
    "a zip of something else": zipped,
    "compressed": compressed,
    "pickle with a payload": dangerous_pickle,
    "torch with a payload": dangerous_torch,
    "payload in what it says of itself": dangerous_meta,
    "a tensor": saved(lambda content: torch.zeros(3)),
    "no tensors": saved(lambda content: {"state_dict": {"a": 1}}),
    "only an optimizer": saved(
        lambda content: {"qat": content["qat"], "optimizer_states": content["optimizer_states"]}
    ),
}

# Of files that can be read: what they say of themselves, or hold, is wrong.
WRONG: dict[str, Callable[..., Any]] = {
    "NaN among the weights": weights(nan),
    "a weight missing": weights(without_a_weight),
    "a weight of another shape": weights(other_shape),
    "no weights at all": weights(lambda state: {}),
    "weights of another net": weights(
        lambda state: {f"net.{k}": v for k, v in timm.create_model("test_vit").state_dict().items()}
    ),
    "format_version=99": meta("format_version", value=99),
    "model=null": meta("model", value=None),
    "model.name=unknown": meta("model", "name", value="vit_nope"),
    "model.name=hub:": meta("model", "name", value="hf-hub:nobody/nothing"),
    "kwargs.checkpoint_path": meta(
        "model", "kwargs", value=lambda kwargs: kwargs | {"checkpoint_path": "/etc/passwd"}
    ),
    "kwargs.colour": meta("model", "kwargs", value=lambda kwargs: kwargs | {"colour": 3}),
    "kwargs.depth=1e9": meta("model", "kwargs", "depth", value=10**9),
    "kwargs.embed_dim=99984": meta("model", "kwargs", "embed_dim", value=99984),
    "recipe=3": meta("recipe", value=3),
    "recipe.bits=99": meta("recipe", "bits", value=99),
    "recipe.weight_quantizer=a module that would run": meta(
        "recipe", "weight_quantizer", value="this:X"
    ),
    "recipe.colour": meta("recipe", value=lambda recipe: recipe | {"colour": 3}),
    "recipe of another kind": meta("recipe", "attention", value="float"),
    "input_size=[1,8]": meta("input_size", value=[1, 8]),
    "data=3": meta("data", value=3),
    "data nested 150 deep": meta("data", "mean", value=nested(150)),
    "data of another package": meta("data", "_target_", value="os.system"),
    "data that is a term": meta("data", "root", value="${oc.env:HOME}"),
    "data that hides a name": meta("data", "mean", value=[{"_target_": "os.system"}]),
    "data.num_classes=12": meta("data", "num_classes", value=12),
}

# What a run goes on from is more than weights.
STOPPED: dict[str, Callable[..., Any]] = {
    "no loops": saved(lambda content: {k: v for k, v in content.items() if k != "loops"}),
    "no optimizer_states": saved(
        lambda content: {k: v for k, v in content.items() if k != "optimizer_states"}
    ),
    "optimizer_states of fewer groups": edited(
        "optimizer_states", 0, "param_groups", value=lambda groups: groups[:1]
    ),
}


def cut_safetensors(path):
    safetensors.torch.save_file({"a": torch.zeros(300)}, path)
    cut(0.7)(path)
