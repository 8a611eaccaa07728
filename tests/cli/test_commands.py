"""The commands: arguments, lines on the terminal, exit codes. Oracles: Hydra's own grammar, `conf/`, and the outputs of processes."""

import errno
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import cloudpickle
import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf import DictConfig, OmegaConf

from qat.cli import arguments, commands, corrections, job, mistakes, sweep
from qat.launch import ranks
from qat.tasks import settings
from qat.tasks.conf import options
from tests.commands import run_python, typed
from tests.conftest import ROOT, TINY, compose, results
from tests.errors import usage_error

PARSER = OverridesParser.create()
SEND = (
    "+callbacks.send._target_=tests.callbacks.test_preemption.Send",
    f"+callbacks.send._args_=[0,{int(signal.SIGINT)}]",
)


def command(script, *overrides, cwd):
    """Run one of the root scripts as a process, and return exit code, output and errors."""
    unset = dict.fromkeys(name for name in os.environ if name.startswith(("SLURM", "HYDRA")))
    done = run_python(str(ROOT / script), *overrides, cwd=cwd, **unset, OMP_NUM_THREADS="1")
    return done.returncode, done.stdout, done.stderr


def value(argument):
    return PARSER.parse_override(argument).value()


PATHS = (
    "my photos/cat dog",
    "a=b, c",
    "it's",
    "ends with \\",
    "back\\'slash quote",
    "(1) {3}",
    "#1 & co: 50 %",
    "é\u0301 咖",
    "/plain/p_1.ckpt",
    *("2026_11", "1.10", "1e3", "-1", "+.5", "inf", "True", "."),
)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_what_was_typed(path):
    for key in ("data.root", "+ckpt", "run_dir", "hydra.run.dir", "callbacks.best.dirpath"):
        assert value(arguments.to_hydra([f"{key}={path}"])[0]) == path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("data.root=~/x y", ["data.root='/home of/me/x y'"]),
        ("ckpt=~", ["ckpt='/home of/me'"]),
        ("ckpt=~me/x", ["ckpt='~me/x'"]),
        ("model=hf-hub:a/b", ["model=_hub", "model.name=hf-hub:a/b"]),
        ("quant.overrides={head:{bits:4}}", ["++quant.overrides={head:{bits:4}}"]),
        ("model.args.depth=4", ["++model.args.depth=4"]),
        ("model=resnet26d", ["model=_timm", "model.name=resnet26d"]),
        ("model=timm/resnet18", ["model=_timm", "model.name=resnet18"]),
    ],
)
def test_homes_models_and_new_settings(monkeypatch, given, expected):
    monkeypatch.setenv("HOME", "/home of/me")
    assert arguments.to_hydra([given]) == expected


def test_grammar_and_sweeps():
    for grammar in (
        "model=~x",
        "model=deit_t",
        "model=nope",
        "ckpt='a b'",
        "ckpt=${oc.env:HOME}/a b",
        "ckpt=null",
        "quant.bits=2,3",
        "~logger",
        "ckpt=[a,b]",
    ):
        assert arguments.to_hydra([grammar]) == [grammar]
    assert arguments.to_hydra(["-m", "ckpt=a,b"])[1] == "ckpt=a,b"
    assert value(arguments.to_hydra(["ckpt=a,b"])[0]) == "a,b"


@pytest.mark.parametrize(
    ("given", "elements"),
    [
        (
            "ckpt=[2026_11, a/1.10,'b, 1_0 ',null,1.50]",
            ["2026_11", "a/1.10", "b, 1_0 ", None, "1.50"],
        ),
        ("data.root=2024_01,1.50,x", ["2024_01", "1.50", "x"]),
        ("data.root=choice(1.10, true)", ["1.10", "true"]),
        ("data.root=range(1,3)", [1, 2]),
    ],
)
def test_paths_of_a_list_or_a_sweep_are_what_was_typed(given, elements):
    override = PARSER.parse_override(arguments.to_hydra(["-m", given])[1])
    found = override.sweep_iterator() if override.is_sweep_override() else override.value()
    assert [one.text if isinstance(one, QuotedString) else one for one in found] == elements


def test_a_path_that_yaml_has_read_as_a_number_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nrun_dir: 1.10\n"
    )
    code, out = typed("train.py", "-cd", "conf", "experiment=mine", cwd=tmp_path)
    assert (code, out) == (
        "error: run_dir=1.1: must be a path, in quotes where it looks like a number",
        "",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


# As other tools name it, and what it is here.
CORRECTED = [
    ("epochs=3", "trainer.max_epochs=3"),
    ("lr=0.01", "optimizer.lr=0.01"),
    ("data=.", "data=imagefolder data.root=."),
    ("data=/my photos/all", "data=imagefolder data.root=/my photos/all"),
    ("data.path=photos", "data.root=photos"),
    ("data.img_size=32", "data.image_size=32"),
    ("model.num_classes=3", "data.num_classes=3"),
    ("model=nets/a.pth", "ckpt=nets/a.pth"),
    ("checkpoint=a.ckpt", "ckpt=a.ckpt"),
    ("teacher=a.ckpt", "teacher.ckpt=a.ckpt"),
    ("optimizer=adam", "optimizer.opt=adam"),
    ("quant.weight_bits=4", "quant.bits=4"),
    ("quant=w4a4", "quant=deploy_w4a4 or quant=seq_4bit or quant=minmax_4bit"),
    ("quant=int8", "quant=deploy_w8a8 or quant=minmax_8bit"),
    ("quant=none", "quant=fp"),
    ("logger=null", "~logger"),
    ("callbacks=null", "~callbacks"),
]
LINES = [
    ("--epochs 3", "--epochs 3: must be trainer.max_epochs=3"),
    ("--batch-size=8", "--batch-size=8: must be data.batch_size=8"),
    ("--seed 1", "--seed 1: must be seed=1"),
    ("--lr=1e-3", "--lr=1e-3: must be optimizer.lr=1e-3"),
    ("-m seed=1", "seed=1: options such as -m must come before all settings"),
    ("--overwrite seed=1", "--overwrite: must be overwrite=VALUE"),
    ("model.pretrainde=true", "model.pretrainde: unknown; closest: pretrained"),
    ("warmup=1", "warmup: unknown; closest: scheduler.warmup_lr, scheduler.warmup_epochs"),
    *((typed, f"{typed}: must be {instead}") for typed, instead in CORRECTED),
    ("model=deit_tiny", f"model=deit_tiny: unknown; closest: deit_t{mistakes.ANY_MODEL}"),
    ("quant=ofq_9bit", "quant=ofq_9bit: unknown; closest: ofq_4bit, ofq_3bit, ofq_2bit"),
    ("trainer=foo", "trainer=foo: unknown; must be one of cpu, ddp, fsdp, gpu, slurm"),
    ("seed=x", "seed: Value 'x' of type 'str' could not be converted to Integer"),
    (
        "compile=[1]",
        "compile: Value '[1]' of type 'list' is incompatible with type hint 'Union[bool, str]'",
    ),
    ("run_dir=", "run_dir='': must be a non-empty string"),
    (
        "run_dir=file/run",
        "run_dir='file/run': must be a folder that exists or can be created (Not a directory)",
    ),
]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("argument", "line"), LINES, ids=[argument for argument, _ in LINES])
def test_what_cannot_be_composed_is_one_line_and_leaves_no_trace(tmp_path, argument, line):
    (tmp_path / "file").touch()
    words = argument.split() if argument.startswith("-") else [argument]
    code, out = typed("train.py", "run_dir=run", *words, cwd=tmp_path)
    assert (out or code) in {f"error: {line}\n", f"error: {line}"}
    assert code
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["train", "eval", "ptq", "analyze", "export"])
def test_corrections_name_settings_that_there_are(command):
    """Those of training stand in each config, but only `train.py` shows and uses them."""
    settings = set(corrections._our_names(command).values())
    choices = ["data=digits", "model=deit_t", "run_dir=a"]
    compose(command, *choices, *(f"{name}=1" for name in settings - {"run_dir"}))
    assert ("trainer.max_epochs" in settings) is (command == "train")
    assert settings >= {"ckpt", "run_dir", "data.batch_size", "model.name"}


def test_an_unknown_setting_is_answered_with_settings_that_the_command_uses(tmp_path):
    code, out = typed("eval.py", "run_dir=run", "epochs=3", cwd=tmp_path)
    names = "ckpt, ckpt_act_bits, ckpt_bits, ckpt_format, data, kernels, logger, model, predict"
    line = f"error: epochs: unknown; must be one of {names}, report, run_dir, seed, split, trainer"
    assert line in (out or code)


def test_an_argument_that_is_right_needs_no_correction():
    given = [
        "data=digits",
        "data.root=x",
        "quant=seq_2bit",
        "quant.bits=4",
        "~logger",
        "callbacks=[default,ema]",
        "model.args.depth=4",
    ]
    assert corrections.suggest_correction(given, "train") is None


@pytest.mark.parametrize("name", ["bits", "w_bits", "ptq.w_bits", "quant.bits"])
def test_corrections_of_ptq_name_its_own_settings(name):
    assert corrections.suggest_correction([f"{name}=4"], "ptq") == f"{name}=4: must be ptq.bits=4"
    assert corrections.suggest_correction([f"{name}=4"], "eval") is None


@pytest.mark.sample(1)
@pytest.mark.parametrize("wish", [["debug=fast"], []])
def test_the_traceback_comes_through_where_it_is_wanted(tmp_path, monkeypatch, wish):
    if not wish:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with usage_error(r"^quant\.bits=9"):
        typed("train.py", *TINY, "quant.bits=9", *wish, "run_dir=run", cwd=tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed."),
            "DataLoader worker (pid 12) is killed by signal: Killed.; mem",
        ),
        (
            RuntimeError("received 0 items of ancdata"),
            "too many open files; lower data.num_workers",
        ),
        (OSError(errno.EMFILE, "Too many open files", "x"), "too many open files"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            "x: cannot be read or written (No space left on device)",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "a file: cannot be read or written (No space left on device)",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            "x: cannot be read or written (Permission denied)",
        ),
        (
            RuntimeError("Early stopping conditioned on metric `x`"),
            "Early stopping conditioned on metric `x`",
        ),
        (
            RuntimeError("Connection closed by peer [1.2.3.4]\nmore"),
            "another process of this run has ended: Connection closed by peer [1.2.3.4] more",
        ),
        (RuntimeError("shape mismatch"), None),
    ],
)
def test_a_machine_that_is_in_the_way_is_no_bug_of_ours(error, said):
    line = mistakes.error_line(error)
    assert line is None if said is None else line.startswith(said)


def test_a_reader_that_is_gone_costs_no_tracebacks(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "write", mock.Mock(side_effect=BrokenPipeError))
    commands.TerminalHandler().handle(logging.makeLogRecord({"msg": "epoch 1"}))
    assert capsys.readouterr().err == ""


def test_the_command_line_with_another_run_dir_gives_the_same_again(tmp_path):
    """In a folder with a conf and a module of its own."""
    (tmp_path / "beside_the_run.py").write_text(
        "from qat.losses import CrossEntropy\n\n\nclass Mine(CrossEntropy):\n    pass\n"
    )
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "mine.yaml").write_text(
        "terms:\n  ce:\n    _target_: beside_the_run.Mine\n"
    )
    for name in ("run", "again"):
        code, out = typed(
            "qat",
            "train",
            "--config-dir",
            "conf",
            "loss=mine",
            *TINY,
            "report=false",
            f"run_dir={name}",
            cwd=tmp_path,
        )
        assert code == 0, out
    first, again = results(tmp_path / "run"), results(tmp_path / "again")
    assert [first[key] for key in ("quant", "top1", "loss", "versions")] == [
        again[key] for key in ("quant", "top1", "loss", "versions")
    ]
    assert first["command_line"].startswith("qat train loss=mine ")
    recorded = (tmp_path / "run" / "config.yaml").read_text()
    assert "beside_the_run.Mine" in recorded
    assert "${" not in recorded


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", settings.COMMANDS)
def test_help_has_a_phrase_for_each_setting_and_the_groups_of_its_command(tmp_path, name):
    code, out = typed(f"{name}.py", "--help", cwd=tmp_path)
    assert code == 0
    groups, lines = (
        part.splitlines()
        for part in out.partition("Any value")[0].split("Settings and their defaults")
    )
    own = {
        one
        for default in OmegaConf.load(ROOT / "conf" / f"{name}.yaml").defaults
        if isinstance(default, DictConfig)
        for one in default
    }
    assert {line.partition(":")[0] for line in groups if ": " in line} == {
        one for one in own if one.isidentifier()
    }
    silent = [line.strip() for line in lines if re.match(r" *\w+: ", line) and " # " not in line]
    # A value of another setting, a class, a group that is off.
    assert [
        line
        for line in silent
        if not re.search(r"\$\{|^_target_|^(logger: null|analysis: null|search: {})", line)
    ] == []
    assert ("optimizer:" in lines) == (name == "train")
    assert any(line.startswith("  max_epochs:") for line in lines) == (name == "train")
    experiments = [line for line in groups if line.startswith("experiment: ")]
    own = {"train": [(True, False)], "ptq": [(False, True)]}.get(name, [])
    assert [("demo_fp" in line, "evolq_w4a8" in line) for line in experiments] == own


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "groups", "expected"),
    [
        (
            "models",
            ["model"],
            [
                r"model=deit_t +deit_tiny_patch16_224",
                r"model=vit_tiny_demo +vit_tiny_patch16_224\. A ViT small enough .*",
            ],
        ),
        (
            "recipes",
            ["quant", "ptq"],
            [
                r"quant=deploy_w4a8 +weights 4 bit lsq, activations 8 bit lsq, .*",
                r"quant=statsq_2bit +weights 2 bit statsq, activations float, .*",
                r"ptq=reconstruct_w2a4 +weights 2 .* activations 4 bit affine, .*",
                r"ptq=keep +No conversion and no calibration: .*",
            ],
        ),
    ],
)
def test_names_are_listed_with_what_they_are(tmp_path, name, groups, expected):
    code, out = typed("qat", name, cwd=tmp_path)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:-1]] == [
        f"{group}={choice}" for group in groups for choice in options(group)
    ]
    assert [line for line in expected if not re.search(f"^{line}$", out, re.MULTILINE)] == []


@pytest.mark.long
def test_lists_its_commands_and_choices(tmp_path):
    code, out = typed("qat", cwd=tmp_path)
    assert code == 0
    assert all(f"qat {name} " in out for name in commands.COMMANDS)
    code, out = typed("qat", "version", cwd=tmp_path)
    assert (code, out.partition(" ")[0]) == (0, "vit-qat")
    assert typed("qat", "trian", cwd=tmp_path) == (
        1,
        "error: qat trian: must be one of train, eval, ptq, analyze, export, models, recipes, version\n",
    )
    code, out = typed("qat", "train", "--help", cwd=tmp_path)
    assert (code, out.splitlines()[0].split(" [")[0]) == (0, "qat train")
    assert "quant: deploy_w4a4, deploy_w4a8, deploy_w8a8, fp, fp8_w8a8, lsq_2bit" in out
    assert "_common" not in out
    assert not list(tmp_path.iterdir())


def test_a_job_of_a_cluster_needs_no_script(monkeypatch):
    """submitit and joblib hand over the function that Hydra calls. Oracle: it is whole without the module that made it."""
    found, called = [], []
    monkeypatch.setattr(
        hydra, "main", lambda **_: lambda function: found.append(function) or (lambda: None)
    )
    monkeypatch.setattr(commands.sys, "argv", ["qat"])
    monkeypatch.setattr(sweep, "failures", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert commands.run("train") == 0
    carried = cloudpickle.dumps(found[0])
    monkeypatch.setattr(job, "run_task", lambda cfg, **_: called.append(cfg))
    monkeypatch.setattr(
        commands.HydraConfig, "get", lambda: OmegaConf.create({"runtime": {"choices": {}}})
    )
    cloudpickle.loads(carried)("config")
    assert (called, found[0].__module__) == (["config"], "train")


@pytest.mark.parametrize(("job", "form"), [("4711", "slurm-4711"), ("", "%Y-%m-%d_%H-%M-%S")])
def test_the_run_directory_is_named_by_the_job_or_the_date(monkeypatch, job, form):
    monkeypatch.setenv("SLURM_JOB_ID", job)
    assert time.strptime(compose("eval").run_dir, f"outputs/eval/{form}")


def interrupted(cwd, moment, *arguments):
    """Run a command, and press Ctrl-C when a text is on the terminal: the signal goes to all processes. Gives exit code and output."""
    run = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = ""
    while moment not in said and (line := run.stdout.readline()):
        said += line
    os.killpg(run.pid, signal.SIGINT)
    rest, _ = run.communicate(timeout=120)
    return run.returncode, said + rest


def test_ctrl_c_while_a_command_starts_is_one_line(tmp_path):
    # Python names each import after it: before the first of the command's own, Ctrl-C is Python's.
    code, said = interrupted(
        tmp_path, "qat.launch.startup\n", "-X", "importtime", ROOT / "train.py", "run_dir=run"
    )
    assert code == 130
    assert re.fullmatch(
        r"stopped by Ctrl-C.*\n",
        "".join(line for line in said.splitlines(True) if not line.startswith("import time:")),
    )


def test_a_stopped_run_says_how_it_goes_on(tmp_path):
    given = (
        *TINY,
        "quant.overrides={blocks.0.*:{bits:8}}",
        "report=false",
        "trainer.limit_train_batches=3",
        *SEND,
    )
    code, said = typed("train.py", *given, "resume=auto", "run_dir=my run", cwd=tmp_path)
    assert code == 130
    command = re.search(
        r"stopped by Ctrl-C after training step 1: last.ckpt written; to resume: (.*)", said
    )[1]
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    assert words == [*given, "resume=auto", f"run_dir={tmp_path / 'my run'}"]
    code, said = typed(script, *words, cwd=tmp_path)
    assert code == 0, said
    assert "resumed at training step 1 from" in said


@pytest.mark.parametrize(
    ("argv", "typed_words", "program"),
    [
        ("/clone/train.py a=1", ".venv/bin/python train.py a=1", ".venv/bin/python train.py"),
        ("/clone/train.py", "python train.py", "python train.py"),
        ("/clone/train.py -m a=1", "python -X dev -m train -m a=1", "python -X dev -m train"),
        ("/clone/train.py a=1", "python -m pytest", "python train.py"),
        ("env/bin/qat a=1", "env/bin/python env/bin/qat train a=1", "env/bin/qat train"),
        ("/on/path/qat a=1", "python /on/path/qat train a=1", "qat train"),
    ],
)
def test_the_program_is_what_was_typed(monkeypatch, argv, typed_words, program):
    monkeypatch.setattr(sys, "argv", argv.split())
    monkeypatch.setattr(sys, "orig_argv", typed_words.split())
    monkeypatch.setattr(commands.shutil, "which", lambda _: "/on/path/qat")
    assert commands._program("train") == program.split()


@pytest.mark.parametrize("launcher", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", None])
def test_a_command_to_resume_can_be_pasted(monkeypatch, launcher):
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", ranks.LOCK_FILE):
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "1")
    kept = ["qat", "train", "-m", "seed=1,2", "data.root=it's here", "optimizer.lr=choice(1,2)"]
    hint = job._resume_hint([*kept, "++resume=true", "run_dir=${seed}"], "/runs/a b")
    if launcher:
        assert hint == "the same command resumes with resume=auto run_dir=/runs/a b"
        return
    text, _, command = hint.partition(": ")
    assert text == "to resume"
    assert shlex.split(command) == [*kept, "resume=auto", "run_dir=/runs/a b"]


def test_a_run_that_stops_before_it_begins_is_repeated(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    cfg = compose("train", f"run_dir={tmp_path}", "overwrite=true")
    hints = []
    monkeypatch.setattr(job.slurm, "end_preempted", lambda *given: hints.append(given[-1]) or 130)
    state = job.run_dir.RunDirState(tmp_path)
    job._end_stopped_run(cfg, job.Preempted(signal.SIGINT), state, ["qat", "train"])
    assert hints == ["the same command repeats the run"]


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_ends_a_sweep(tmp_path):
    given = ["seed=1,2", "trainer.max_epochs=50", "report=false"]
    words = [ROOT / "train.py", *given, "run_dir=run", "-m"]
    code, said = interrupted(tmp_path, "epoch 2/", *words)
    assert code == 130
    assert "Traceback" not in said
    (command,) = re.findall(
        r"stopped by Ctrl-C after training step \d+: last.ckpt written; to resume: (.*)\n", said
    )
    words = [sys.executable, str(ROOT / "train.py"), "-m", *given]
    assert shlex.split(command) == [*words, "resume=auto", f"run_dir={tmp_path / 'run'}"]
    assert not (tmp_path / "run" / "1").exists()


DDP = (*TINY[:3], "trainer=ddp", "trainer.accelerator=cpu", "report=false", "run_dir=run")


@pytest.mark.long
def test_several_processes(tmp_path):
    """Two processes, of which the first says what is wrong, the second too if it lives so long; then right ones; then in a sweep."""
    code, out, err = command("train.py", *DDP, "optimizer.lr=-1", cwd=tmp_path)
    assert code == 1, out + err
    wrong = "optimizer.lr=-1: must be a number above 0"
    assert f"error: {wrong}" in out.splitlines()
    assert {*out.splitlines()} <= {f"error: {wrong}", f"error in process 1: {wrong}"}
    assert "FAILED" not in err
    assert results(tmp_path / "run")["error"] == "optimizer.lr=-1: must be a number above 0"
    code, out, err = command("train.py", *DDP, *TINY[3:], cwd=tmp_path)
    assert code == 0, out + err
    assert (out.count("global batch 128"), out.count("epoch 1/1"), err) == (1, 1, "")
    assert results(tmp_path / "run")["top1"] is not None
    code, out, err = command("train.py", "-m", *DDP, "seed=1,2", "run_dir=sweep", cwd=tmp_path)
    assert (code, err) == (1, f"error: {sweep.SEVERAL_PROCESSES.format(2)}\n")
    assert "submitit" in err


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_and_a_kill_end_all_processes(tmp_path):
    code, said = interrupted(
        tmp_path, "epoch 2/500", ROOT / "train.py", *DDP, "trainer.max_epochs=500"
    )
    assert code == 130, said
    assert "Traceback" not in said
    assert said.count("stopped by Ctrl-C after training step") == 1
    given = (*DDP, "trainer.max_epochs=500", "resume=true")
    run = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *given], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    while "resumed at training step" not in run.stdout.readline():
        assert run.poll() is None
    children = [
        int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    ]
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(children) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
