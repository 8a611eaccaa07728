"""`qat train ...`: the console script. Oracle: what `python train.py ...` does."""

import json
import shlex
import signal

import cloudpickle
import hydra
import pytest

from qat.cli import commands, sweep
from tests.commands import typed
from tests.conftest import TINY, results


def test_trains_as_the_script_does(tmp_path):
    code, out = typed("qat", "train", *TINY, "report=false", "run_dir=run", cwd=tmp_path)
    assert code == 0, out
    assert (tmp_path / "run" / "train.log").exists()
    code, out = typed("train.py", *TINY, "report=false", "run_dir=again", cwd=tmp_path)
    assert code == 0, out
    assert json.loads((tmp_path / "run" / "command.json").read_text())["program"] == "qat train"
    assert json.loads((tmp_path / "again" / "command.json").read_text())["program"] == "python train.py"
    same = ("command", "quant", "top1", "loss", "size_bytes", "versions")
    assert [results(tmp_path / "run")[key] for key in same] == [results(tmp_path / "again")[key] for key in same]


def test_says_how_it_goes_on_in_its_own_words(tmp_path):
    code, out = typed("qat", "train", "--help", cwd=tmp_path)
    assert (code, out.splitlines()[0].split(" [")[0]) == (0, "qat train")
    spot = ("+callbacks.send._target_=tests.callbacks.test_preemption.Send", f"+callbacks.send._args_=[0,{int(signal.SIGINT)}]")
    code, out = typed("qat", "train", *TINY, *spot, "report=false", "run_dir=run", cwd=tmp_path)
    assert code == 130, out
    assert f"go on with: qat train {shlex.join(TINY)}" in out


def test_a_sweep(tmp_path):
    code, out = typed("qat", "train", "-m", *TINY, "report=false", "seed=1,2", "run_dir=sweep", cwd=tmp_path)
    assert code == 0, out
    assert [results(tmp_path / "sweep" / job)["seed"] for job in ("0", "1")] == [1, 2]


def test_a_conf_and_a_module_beside_the_run(tmp_path):
    (tmp_path / "beside_the_run.py").write_text("from qat.losses import CrossEntropy\n\n\nclass Mine(CrossEntropy):\n    pass\n")
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "mine.yaml").write_text("terms:\n  ce:\n    _target_: beside_the_run.Mine\n")
    arguments = ("--config-dir", "conf", "loss=mine", *TINY, "report=false", "run_dir=run")
    code, out = typed("qat", "train", *arguments, cwd=tmp_path)
    assert code == 0, out
    assert "beside_the_run.Mine" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_config_path_counts_from_the_present_folder(tmp_path):
    code, out = typed("qat", "train", *TINY, "report=false", "run_dir=run", cwd=tmp_path)
    assert code == 0, out
    for flags in (("--config-path", "run"), ("--config-path=run",)):
        code, out = typed("qat", "train", *flags, "--config-name", "config", "run_dir=again", "--cfg", "job", cwd=tmp_path)
        assert code == 0, out
        assert "embed_dim: 24" in out


def test_lists_its_commands(tmp_path):
    assert typed("qat", cwd=tmp_path) == (0, commands.usage())
    assert all(f"qat {name} " in commands.usage() for name in (*commands.TASKS, "version"))
    code, out = typed("qat", "version", cwd=tmp_path)
    assert (code, out.partition(" ")[0]) == (0, "vit-qat")
    assert "torch" in out
    code, out = typed("qat", "trian", "quant=fp", cwd=tmp_path)
    assert (code, out) == (1, "error: qat trian: must be one of train, eval, ptq, analyze, export, version\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qat e", "eval export"),
        ("qat train quant=seq_", "quant=seq_2bit quant=seq_3bit quant=seq_4bit"),
        ("qat ptq trainer=s", "trainer=slurm"),
    ],
)
def test_the_shell_completes(tmp_path, monkeypatch, line, expected):
    monkeypatch.setenv("COMP_LINE", line)
    code, out = typed("qat", "-sc", "query=bash", cwd=tmp_path)
    assert (code, out.split()) == (0, expected.split())


def test_the_shell_is_told_to_ask(tmp_path):
    code, out = typed("qat", "-sc", "install=bash", cwd=tmp_path)
    assert code == 0
    assert out.splitlines()[-1].endswith(" hydra_bash_completion qat")


def test_a_job_of_a_cluster_needs_no_script(monkeypatch):
    """submitit and joblib hand over the function that Hydra calls. Oracle: it is whole without the module that made it."""
    found = []
    monkeypatch.setattr(hydra, "main", lambda **_: lambda function: found.append(function) or (lambda: None))
    monkeypatch.setattr(commands.sys, "argv", ["qat"])
    monkeypatch.setattr(sweep, "failures", [])  # of tests before this one
    assert commands.run("train") == 0
    called = []
    monkeypatch.setattr(commands.entry, "run", lambda *job: called.append(job))
    cloudpickle.loads(cloudpickle.dumps(found[0]))("config")
    assert called == [("train", "config")]
    assert found[0].__module__ == "train"


def namesake(folder, *files):
    info = folder / "qat-9.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qat\nVersion: 9.1\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in (*files, "qat-9.1.dist-info/METADATA")))


def test_another_project_of_that_name_is_named(tmp_path, monkeypatch):
    namesake(tmp_path, "qat/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    code, out = typed("qat", "train", "--cfg", "job", cwd=tmp_path)
    assert code == 0
    assert out.splitlines()[0].startswith(
        "warning: another project, qat 9.1, is installed into the same folder 'qat' as vit-qat; pip uninst"
    )


def test_an_editable_install_is_no_other_project(tmp_path, monkeypatch):
    namesake(tmp_path, "__editable__.qat-9.1.pth")
    monkeypatch.syspath_prepend(tmp_path)
    assert commands.namesake() is None
