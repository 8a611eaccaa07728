"""Every setting of a composed config, and what somebody could write there by mistake."""

import copy
import math
import re
from dataclasses import dataclass

from omegaconf import OmegaConf, open_dict

REMOVED, EXTRA = "removed", "colour"
# By name, as in the reviewed list of what is allowed; of a value v.
KINDS = {
    "null": lambda v: None,
    "text": lambda v: "x",
    "empty": lambda v: "",
    "true": lambda v: True,
    "negative": lambda v: -1,
    "zero": lambda v: 0,
    "fraction": lambda v: 1.5,
    "huge": lambda v: 10**30,
    "nan": lambda v: math.nan,
    "inf": lambda v: math.inf,
    "list": lambda v: v if isinstance(v, list) else [v],
    "mapping": lambda v: {"a": 1},
}


@dataclass(frozen=True)
class Mutation:
    """A setting and what happens to it.

    Attributes:
        setting: dotted, `optimizer.lr`; of an extra key, the key that is added.
        kind: one of `KINDS`, `removed` or `extra`.
    """

    setting: str
    kind: str

    def __str__(self):
        return f"{self.setting}:{self.kind}"

    def applied(self, cfg):
        """A copy of a config with the mistake in it."""
        changed = copy.deepcopy(cfg)
        parent, _, key = self.setting.rpartition(".")
        with open_dict(changed):
            node = OmegaConf.select(changed, parent) if parent else changed
            if self.kind == REMOVED:
                del node[key]
            else:
                node[key] = 3 if self.kind == "extra" else KINDS[self.kind](plain(cfg, self.setting))
        return changed


def plain(cfg, setting):
    """The value of a setting, interpolations resolved."""
    value = OmegaConf.select(cfg, setting)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def sources(cfg, setting):
    """The setting itself, and those that its value is made of by reference: a message may name what a person would change."""
    node = OmegaConf.to_container(cfg, resolve=False)
    for key in setting.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return [setting, *re.findall(r"\$\{([a-z_0-9.]+)\}", node if isinstance(node, str) else "")]


def leaves(cfg, below=""):
    """Names of all settings that are no groups, `below` one of them or everywhere."""
    node = OmegaConf.select(cfg, below) if below else cfg
    if not OmegaConf.is_dict(node):
        return [below]
    return [leaf for key in node for leaf in leaves(cfg, f"{below}.{key}".lstrip("."))]


def groups(cfg, below=""):
    """Names of all groups likewise, that above all included as the empty name."""
    node = OmegaConf.select(cfg, below) if below else cfg
    if not OmegaConf.is_dict(node):
        return []
    return [below, *(group for key in node for group in groups(cfg, f"{below}.{key}".lstrip(".")))]


def mutations(cfg, below=""):
    """All of them, without those that leave a value as it is."""
    for group in groups(cfg, below):
        if group:
            yield from (Mutation(group, kind) for kind in ("null", "text", "list", REMOVED))
    for leaf in leaves(cfg, below):
        value = plain(cfg, leaf)
        for kind, change in KINDS.items():
            changed = change(value)
            if type(changed) is not type(value) or changed != value:
                yield Mutation(leaf, kind)
        yield Mutation(leaf, REMOVED)
    for group in groups(cfg, below):
        yield Mutation(f"{group}.{EXTRA}".lstrip("."), "extra")
