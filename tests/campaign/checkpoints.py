"""Files that are no checkpoint, or one that is damaged, of another net, or made to do harm. Each function changes a good file in place."""

import copy
import os
from collections.abc import Callable
from typing import Any

import safetensors.torch
import timm
import torch


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


def dangerous_torch(path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "more": Payload(path.parent / "made")}, path)


# Each other kind of damage is a case of tests/model/test_checkpoint.py.
UNREADABLE: dict[str, Callable[..., Any]] = {
    "cut to 95 %": cut(0.95),
    "torch with a payload": dangerous_torch,
    "a tensor": saved(lambda content: torch.zeros(3)),
    "only an optimizer": saved(
        lambda content: {"qat": content["qat"], "optimizer_states": content["optimizer_states"]}
    ),
}

# Of files that can be read: what they say of themselves, or hold, is wrong.
WRONG: dict[str, Callable[..., Any]] = {
    "weights of another net": weights(
        lambda state: {f"net.{k}": v for k, v in timm.create_model("test_vit").state_dict().items()}
    ),
    "model=null": meta("model", value=None),
    "model.name=unknown": meta("model", "name", value="vit_nope"),
    "recipe=3": meta("recipe", value=3),
    "recipe.colour": meta("recipe", value=lambda recipe: recipe | {"colour": 3}),
    "recipe of another kind": meta("recipe", "attention", value="float"),
    "input_size=[1,8]": meta("input_size", value=[1, 8]),
    "data=3": meta("data", value=3),
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
