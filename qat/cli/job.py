"""A job as text, for the processes that a command starts: the task, its config, and what Hydra knows of it. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, SCMode


def serialize_job(task: str, cfg: DictConfig) -> str:
    """YAML of a task and its config; references stay references."""
    hydra_cfg: Any = HydraConfig.instance().cfg
    if hydra_cfg is not None:
        hydra_cfg = OmegaConf.to_container(hydra_cfg, structured_config_mode=SCMode.DICT, enum_to_str=True)
        for part in ("launcher", "sweeper"):  # those of plugins are of types that only they know
            hydra_cfg["hydra"][part] = {"_target_": hydra_cfg["hydra"][part]["_target_"]}
    return OmegaConf.to_yaml(OmegaConf.create({"task": task, "cfg": OmegaConf.to_container(cfg), "hydra_cfg": hydra_cfg}))


def deserialize_job(text: str) -> tuple[str, DictConfig]:
    """The task and the config; Hydra's config of the job is in force from here on."""
    read: Any = OmegaConf.to_container(OmegaConf.create(text))
    if read["hydra_cfg"] is not None:
        read["hydra_cfg"]["hydra"]["mode"] = RunMode[read["hydra_cfg"]["hydra"]["mode"] or "RUN"]
        HydraConfig.instance().cfg = OmegaConf.create(read["hydra_cfg"])
    cfg = OmegaConf.create(read["cfg"])
    OmegaConf.set_struct(cfg, value=True)
    return read["task"], cfg
