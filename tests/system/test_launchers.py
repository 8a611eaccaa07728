"""The presets for sweeps on a cluster: the batch script that submitit would hand in. Oracle: what sbatch's manual asks for."""

import hydra
import pytest
from omegaconf import OmegaConf

from tests.conftest import ROOT

PRESETS = sorted(path.stem for path in (ROOT / "conf" / "hydra" / "launcher").glob("*.yaml"))
# Numbers of nodes; tasks, GPUs and CPUs of a task on each.
OPTIONS = ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task")
EXPECTED = {
    "slurm": ("1", "1", "1", "8"),
    "slurm_1gpu": ("1", "1", "1", "8"),
    "slurm_8gpu": ("1", "8", "8", "8"),
    "slurm_2x8gpu": ("2", "8", "8", "8"),
    "slurm_cpu": ("1", "1", None, "4"),
}


def with_hydra(*overrides):
    """The config of a training run with Hydra's own part."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("train", list(overrides), return_hydra_config=True)


def launcher(preset):
    cfg = with_hydra(f"hydra/launcher={preset}", "run_dir=sweep")
    cfg.hydra.job.name = "train"  # which Hydra takes from the script
    cfg.hydra.sweep.dir = "sweep"
    return OmegaConf.to_container(cfg.hydra.launcher, resolve=True)


def batch_script(preset):
    """Options of sbatch, and the lines behind them, that come of a preset; as the plugin hands its fields to submitit."""
    slurm = pytest.importorskip("submitit.slurm.slurm")
    fields = launcher(preset)
    names = slurm.SlurmExecutor._equivalence_dict()
    ours = {
        names.get(name, name): value
        for name, value in fields.items()
        if name not in {"_target_", "submitit_folder", "max_num_timeout"}
    }
    ours["mem"] = None if ours["mem"] is None else slurm._convert_mem(ours["mem"])
    text = slurm._make_sbatch_string("COMMAND", fields["submitit_folder"], **ours)
    lines = text.splitlines()
    options = [
        line.removeprefix("#SBATCH --").partition("=")
        for line in lines
        if line.startswith("#SBATCH")
    ]
    return {name: value.strip("'") for name, _, value in options}, [
        line for line in lines if not line.startswith("#")
    ]


@pytest.mark.sample(1)
@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_asks_for(preset):
    options, lines = batch_script(preset)
    assert tuple(options.get(name) for name in OPTIONS) == EXPECTED[preset]
    expected = {
        "signal": "USR1@120",
        "requeue": "",
        "open-mode": "append",
        "time": "1440",
        "job-name": "train",
    }
    assert expected.items() <= options.items()
    assert not {"partition", "constraint", "account", "qos", "mem"} & set(options)
    # Since 22.05 srun does not take this number from the job.
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in lines
    assert any(line.startswith("srun ") for line in lines)
