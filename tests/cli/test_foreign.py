"""`config.yaml` of somebody's run as input of a command. Oracle: what a run of ours writes is taken; nothing that it names is imported."""

import pytest
import yaml
from omegaconf import OmegaConf

from qat.cli.foreign import check_repeated
from qat.cli.repeat import recorded
from qat.errors import UsageError
from tests.commands import typed
from tests.conftest import TINY, compose

AGAIN = ("--config-dir", "run", "--config-name", "config")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Writes the config of a run, changed, into `run/config.yaml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()

    def write(change=lambda content: None):
        content = OmegaConf.to_container(OmegaConf.create(recorded(compose("train", *TINY, "run_dir=/a", "logger=[csv,mlflow]"))))
        change(content)
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "run"

    return write


def test_what_a_run_has_written_is_taken(run):
    run()
    check_repeated([*AGAIN, "run_dir=b"])
    check_repeated([f"--config-path={run()}", "-cn", "config.yaml", "-m", "seed=1,2"])
    run(lambda c: c["callbacks"].update(stop={"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/top1"}))
    check_repeated([*AGAIN, "run_dir=b"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["callbacks"].update(x={"_target_": "os.system", "command": "x"}), "callbacks.x._target_='os.system' must be built in"),
        (lambda c: c["callbacks"].update(x={"_target_": ["os.system"]}), "callbacks.x._target_=\"['os.system']\" must be built in"),
        (lambda c: c["callbacks"].update(x={"_target_": "lightning.pytorch.callbacks.timer.os.system"}), "must be built in"),
        (lambda c: c["trainer"].update(plugins=[{"_target_": "evil.X"}]), "trainer.plugins.0._target_='evil.X' must be built in"),
        (lambda c: c["quant"].update(weight_quantizer="evil:X"), "quant.weight_quantizer='evil:X' must be built in, or of a module"),
        (lambda c: c["quant"].update(overrides={"a.b": {"act_quantizer": "evil:X"}}), "act_quantizer='evil:X' must be built in"),
        (lambda c: c["model"].update(imports=["evil"]), "model.imports.0='evil' must be built in, or of a module of the command line"),
        (lambda c: c["model"].update(imports="evil"), "model.imports='evil' must be built in"),
        (lambda c: c.update(seed="${oc.env:HOME}"), "must be as a run has written it: it has references"),
        (lambda c: c["follows"].update(seed="@{oc.env:HOME}"), "seed must not call 'oc.env'"),
        (lambda c: c["follows"].update(seed="@{oc.select:a,@{ oc.decode:x}}"), "seed must not call 'oc.decode'"),
        (lambda c: c.update(follows=["seed"]), "must be as a run has written it"),
        (lambda c: c.update(hydra={"job_logging": {"handlers": {"a": {"()": "os.system"}}}}), "must be as a run has written it"),
        (lambda c: c["defaults"].append({"evil": "x"}), "must be as a run has written it"),
        (lambda c: c.pop("defaults"), "must be as a run has written it"),
    ],
)
def test_what_names_other_code_is_refused(run, change, said):
    path = run(change) / "config.yaml"
    with pytest.raises(UsageError, match="^" + "run/config.yaml: ") as refused:
        check_repeated([*AGAIN, "run_dir=b"])
    assert said in str(refused.value)
    assert path.is_file()


def test_modules_that_the_command_line_names_are_taken(run):
    run(lambda c: (c["callbacks"].update(x={"_target_": "mine.Count"}), c["model"].update(imports=["mine"])))
    check_repeated([*AGAIN, "run_dir=b", "model.imports=[mine]"])
    with pytest.raises(UsageError, match=r"hint|model.imports=\[mine\]"):
        check_repeated([*AGAIN, "run_dir=b", "model.imports=[min]"])


def test_config_files_beside_it_are_refused(run):
    folder = run() / "hydra" / "job_logging"
    folder.mkdir(parents=True)
    (folder / "qat.yaml").write_text("version: 1\n")
    with pytest.raises(UsageError, match="must not have config files beside it"):
        check_repeated([*AGAIN, "run_dir=b"])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a: [", b"[" * 10**4, b"- 1"])
def test_a_damaged_file_is_one_line(run, content):
    (run() / "config.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=r"^run/config.yaml: (cannot be read|must be as)") as refused:
        check_repeated(AGAIN)
    assert "\n" not in str(refused.value)


def test_configs_of_the_user_are_left_alone(run):
    (run(lambda c: c["model"].update(imports=["mine"])) / "config.yaml").rename("run/mine.yaml")
    check_repeated(["--config-dir", "run", "--config-name", "mine"])
    check_repeated(["--config-dir", "run", "experiment=mine"])
    check_repeated(["--cfg", "job", "--config-dir"])


def test_a_command_runs_nothing_of_it(run, tmp_path):
    run(lambda c: c["callbacks"].update(x={"_target_": "os.mkdir", "path": str(tmp_path / "made")}))
    code, out = typed("train.py", *AGAIN, "run_dir=again", cwd=tmp_path)
    assert code == 1 or "error: run/config.yaml" in str(code)
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "again").exists()
    assert "Traceback" not in out
