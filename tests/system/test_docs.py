"""Every command and Python example of the documentation is run, on small nets and data. Oracle: exit codes, files that come out.

What a test cannot have is replaced, and named here: placeholders by small files, GPUs by the CPU, fetched weights by random ones, long
runs by two batches. As they stand, all settings of a command are composed by Hydra before that.
"""

import pkgutil
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import qat
from qat.model.metadata import describe
from qat.model.packed import write_packed
from qat.nn import swap_registry
from qat.tasks import build
from tests.commands import typed
from tests.conftest import ROOT, compose, write_cifar
from tests.data.files import write_folder, write_image

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = {
    "train.py": "train",
    "eval.py": "eval",
    "ptq.py": "ptq",
    "analyze.py": "analyze",
    "export.py": "export",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(python (?:train|eval|ptq|analyze|export)\.py [^`]*)`")
# tests/cli/test_commands.py: the same commands where the package is installed.
INSTALLED = re.compile(r"^qat (train|eval|ptq|analyze|export)\b")
# What takes longer than all else: compilers, exports, databases.
HEAVY = ("compile=true", "export.py", "mlflow", "wandb")
# Pages with many commands, of kinds that other pages have too.
LONG = (
    "quickstart.md",
    "troubleshooting.md",
    "files.md",
    "training.md",
    "deployment.md",
    "ptq.md",
    "analysis.md",
    "sweeps.md",
    "methods.md",
    "cluster.md",
    "recipes.md",
)
# What only a machine with GPUs or a cluster has.
DEVICES = re.compile(
    r"trainer=|trainer\.(devices|strategy|num_nodes)=|hydra/launcher=|hydra\.launcher\."
)
TINY_NET = ("++model.args.embed_dim=24", "++model.args.depth=1", "++model.args.num_heads=3")
SHORT = {
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 2,
    "trainer.limit_val_batches": 2,
    "trainer.limit_test_batches": 2,
    "scheduler.warmup_epochs": 0,
    "scheduler.cooldown_epochs": 0,
    "data.calibration_images": 8,
    "data.batch_size": 8,
    "data.num_workers": 0,
    "report": "false",  # tests/tasks/test_report.py has runs with one
}


def fenced(page, *languages):
    return [code for language, code in FENCE.findall(page.read_text()) if language in languages]


def commands(page):
    """The commands of a page as they are typed, without the word `python`, in their order."""
    lines = [
        INSTALLED.sub(r"python \1.py", line)
        for code in fenced(page, "", "bash", "sh")
        for line in code.replace("\\\n", " ").splitlines()
    ]
    prose = FENCE.sub("", page.read_text())
    found = [
        line for line in lines if line.startswith(tuple(f"python {script}" for script in SCRIPTS))
    ]
    return [shlex.split(line, comments=True)[1:] for line in [*found, *INLINE.findall(prose)]]


def cases():
    """Each page once for all that is quick, and once for all that is heavy."""
    for page in PAGES:
        for heavy in (False, True):
            found = [
                command
                for command in commands(page)
                if any(word in one for one in command for word in HEAVY) == heavy
            ]
            if found:
                marks = [pytest.mark.long] if heavy or page.name in LONG else []
                yield pytest.param(page, found, id=f"{page.name}{' heavy' * heavy}", marks=marks)


def write_named(page, folder):
    """Files of a reader that the page shows: blocks whose first line is a comment with a path."""
    for block in fenced(page, "python", "yaml"):
        if (named := re.match(r"# ([\w/]+\.(?:py|yaml))\n", block)) is not None:
            path = folder / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory, float_run, run_4bit):
    """What placeholders stand for."""
    root = tmp_path_factory.mktemp("shelf")
    write_image(root / "photos" / "a.png", 30, 40)
    write_image(root / "photos" / "b" / "c.jpg", 40, 30)
    return {
        "cifar10": write_cifar(root / "cifar10"),
        "imagefolder": write_folder(root / "folder"),
        "imagenet": write_folder(root / "imagenet", classes=("n01440764", "n02012849")),
        "PHOTOS": root / "photos",
        "best.ckpt": float_run / "checkpoints" / "best.ckpt",
        "float": float_run,
        "quantized": run_4bit,
        "weights": root,
    }


def prints_only(command):
    return not {"--help", "--cfg"}.isdisjoint(command)


def settings(command):
    """The arguments that are settings, as a dictionary; flags of Hydra and their values are none."""
    return dict(
        argument.split("=", 1)
        for argument in command
        if "=" in argument and not argument.startswith("-")
    )


def data_of(said):
    """The data that a command names, or whose experiment does."""
    experiment = said.get("experiment", "") if "data.root" in said else ""
    return said.get("data") or (
        "imagefolder"
        if not experiment
        else "cifar10"
        if experiment.startswith("cifar10")
        else "imagenet"
    )


def filled_in(command, shelf):
    """The command with things in place of placeholders."""
    said = settings(command)
    data = data_of(said)
    things = {"FOLDER": shelf.get(data), "IMAGENET": shelf["imagenet"], "PHOTOS": shelf["PHOTOS"]}
    things["PATH"] = shelf["best.ckpt"]
    return [
        f"{key}{sign}{things.get(value, value)}"
        for key, sign, value in (argument.partition("=") for argument in command)
    ]


def composed(script, overrides):
    """The config of the settings as they stand; of lists in a sweep the first."""
    parsed = OverridesParser.create().parse_overrides([one for one in overrides if "=" in one])
    single = [
        f"{one.input_line.partition('=')[0]}={next(one.sweep_string_iterator())}"
        if one.is_sweep_override()
        else one.input_line
        for one in parsed
    ]
    own = [f"hydra.searchpath=[file://{Path.cwd()}/conf]"] if "--config-dir" in overrides else []
    return compose(SCRIPTS[script], *own, *single)


def with_weights(command, cfg, shelf):
    """Random weights in a file in place of fetched ones, or of the placeholder FILE; a teacher has those of the command before."""
    if OmegaConf.select(cfg, "teacher.pretrained"):
        command = [*command, "teacher.pretrained=false", f"teacher.ckpt={shelf['weights']}/w.pt"]
    wants_file = settings(command).get("model.weights") == "FILE"
    if not wants_file and not OmegaConf.select(cfg, "model.pretrained"):
        return command
    # A file has a head as timm's have, here with as many classes as the data.
    kept = [one for one in command if not one.startswith(("model.pretrained=", "model.weights="))]
    small = [
        re.sub("^experiment=evolq.*", "data=imagenet", one)
        for one in kept
        if "=" in one and not one.startswith(("ptq", "search"))
    ]
    start = build.build_start(compose("train", *small, *TINY_NET, "model.pretrained=false"))
    torch.save(start.net.state_dict(), shelf["weights"] / "w.pt")
    return [*kept, *TINY_NET, "model.pretrained=false", f"model.weights={shelf['weights']}/w.pt"]


def provide(command, shelf, folder):
    """Runs that a command starts from and that no command before it has made: a float one where the name says so, else a 4-bit one."""
    said = settings(command)
    files = [
        path.strip("[]'")
        for name in ("ckpt", "teacher.ckpt")
        for path in said.get(name, "").split(",")
        if path
    ]
    wanted = [Path(path).parts[:-2] for path in files if "/checkpoints/" in path] + [
        Path(said[name]).parts for name in ("run",) if name in said
    ]
    if "sweep" in said and not (folder / said["sweep"]).exists():
        shutil.copytree(shelf["quantized"], folder / said["sweep"] / "0")
    for parts in wanted:
        run = folder.joinpath(*parts)
        is_float = parts[-1].startswith(("fp", "float")) or "analysis.float_bits" in said
        if not run.exists():
            shutil.copytree(shelf["float" if is_float else "quantized"], run)


def shortened(command, shelf):
    """What is run in place of a documented command, after its own settings have been composed."""
    script, *arguments = filled_in(command, shelf)
    said = settings(arguments)
    if prints_only(command):
        return command
    cfg = composed(script, arguments)
    arguments = [one for one in arguments if not DEVICES.match(one)] + few_classes(said, shelf)
    arguments = with_weights(arguments, cfg, shelf)
    if script == "eval.py":
        return [
            script,
            *arguments,
            *(() if "predict" in said else ("trainer.limit_test_batches=2",)),
        ]
    if script == "analyze.py":
        few = ["analysis.points=3"] if said.get("analysis") == "landscape" else []
        return (
            [script, *arguments]
            if {"run", "sweep"} & said.keys()
            else [script, *arguments, *few, "images=4", "data.batch_size=4"]
        )
    if script == "export.py":
        return [script, *arguments, "images=4", "latency=1"]
    if script == "ptq.py":
        few = (
            ["ptq.reconstruct.steps=2", "ptq.reconstruct.batch=4"]
            if "reconstruct" in said.get("ptq", "")
            else []
        )
        return [
            script,
            *arguments,
            *few,
            "data.calibration_images=4",
            "ptq.batch=4",
            "trainer.limit_test_batches=2",
            "report=false",
        ]
    fixed = (
        any(one in arguments for one in TINY_NET)
        or "model.args.depth" in said
        or said.get("model", "").startswith("resnet")
    )
    net = () if fixed else TINY_NET
    arguments = [two_values(one) for one in arguments] + (
        ["hydra.sweeper.n_trials=2"] if "hparams_search" in said else []
    )
    phases = [
        f"{key}=1" for key in said if key.startswith("callbacks.") and key.endswith(".epochs")
    ]
    return [script, *arguments, *net, *phases, *(f"{key}={value}" for key, value in SHORT.items())]


def two_values(argument):
    """Of a list in a sweep the first two values."""
    key, sign, value = argument.partition("=")
    return (
        f"{key}{sign}{','.join(value.split(',')[:2])}"
        if re.fullmatch(r"[\w.,]+", value)
        else argument
    )


def few_classes(said, shelf):
    """The classes that the small files have in place of those of a dataset that is known to have more."""
    if data_of(said) == "cifar10":
        return ["data.num_classes=4"]
    return ["data.num_classes=2"] if str(shelf["imagenet"]) == said.get("data.root") else []


@pytest.mark.parametrize(("page", "wanted"), list(cases()))
def test_commands_do_what_they_should(page, wanted, shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_named(page, tmp_path)
    (tmp_path / "zoo").symlink_to(ROOT / "zoo")
    before = shelf["best.ckpt"].parents[1]
    for number, command in enumerate(wanted):
        # RUN is the directory of the run before.
        command = [one.replace("=RUN/", f"={before}/") for one in command]
        said = settings(command)
        run_dir = said.get("run_dir", f"runs/number{number}")
        if command[0] in {"analyze.py", "export.py"}:
            provide(command, shelf, tmp_path)
        arguments = shortened(command, shelf) + (
            [] if "run_dir" in said else [f"run_dir={run_dir}"]
        )
        code, out = typed(*(one.replace("$PWD", str(tmp_path)) for one in arguments), cwd=tmp_path)
        assert code == 0, (
            f"python {shlex.join(command)}\nrun as {shlex.join(arguments)}\n{out[-3000:]}"
        )
        outputs = {path.name for path in (tmp_path / run_dir).rglob("*")}
        expected = {"predictions.csv", "results.json"} if "predict" in said else {"results.json"}
        if command[0] == "analyze.py":
            expected = {"results.json", "report.html"}
        if remade := said.get("run") or said.get("sweep"):  # has no outputs of its own
            outputs, expected = (
                {path.name for path in (tmp_path / remade).iterdir()},
                {"report.html"},
            )
        assert prints_only(command) or outputs >= expected, shlex.join(command)
        before = run_dir


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("page", "code"),
    [
        pytest.param(page, code, id=f"{page.name}-{i}")
        for page in PAGES
        for i, code in enumerate(fenced(page, "python"))
    ],
)
def test_python_examples_run(page, code, tmp_path, monkeypatch, shelf):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(swap_registry, "_SWAPS", dict(swap_registry._SWAPS))
    for package in re.findall(r"^(?:from|import) .*(accelerate|transformers)", code, re.MULTILINE):
        pytest.importorskip(package)
    write_named(page, tmp_path)
    for name in ("net.ckpt", "runs/4bit/checkpoints/best.ckpt", "PHOTOS/cat.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(shelf["best.ckpt"].read_bytes())
    write_image(tmp_path / "PHOTOS" / "cat.jpg", 40, 30)
    frozen = qat.freeze(qat.load(f"{shelf['quantized']}/checkpoints/best.ckpt"))
    write_packed(frozen, tmp_path / "net.safetensors", describe(frozen))
    # Twelve blocks take a minute to export.
    code = code.replace(
        'create_model("deit_tiny_patch16_224"', 'create_model("deit_tiny_patch16_224", depth=1'
    )
    # What an example leaves to its reader.
    exec(compile(code, page.name, "exec"), {"batches": [torch.randn(2, 3, 224, 224)]})


def test_there_are_commands_and_examples():
    # An extraction that finds nothing would pass everything above.
    assert len(commands(ROOT / "docs" / "training.md")) > 10
    assert len(commands(ROOT / "README.md")) >= 4
    assert fenced(ROOT / "README.md", "python")


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "evidence").rglob("*.md"))], ids=lambda page: page.name
)
def test_links_and_make_targets_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) - targets == set()


def test_the_names_of_the_equations_are_in_their_files():
    lines = (ROOT / "docs" / "equations.md").read_text().splitlines()
    files, rows = [], [line.split(" | ") for line in lines if ".py" in line or "| same" in line]
    assert len(rows) > 30
    for *_, names, places in rows:
        files = (files if "same" in places else []) + re.findall(r"`(\S+\.py)`", places)
        code = "".join((ROOT / "qat" / path).read_text() for path in files)
        words = [
            name
            for one in re.findall(r"`([^`]+)`", names)
            for name in re.findall(r"[A-Za-z_]\w*", one)
        ]
        assert [name for name in words if name not in code] == [], places


def test_names_in_texts_exist():
    metadata = {"qat.classes", "qat.preprocessing"}
    sources = [path for folder in ("qat", "evidence") for path in (ROOT / folder).rglob("*.py")]
    names = set()
    for path in [*PAGES, *sources]:
        names |= set(re.findall(r"`(qat(?:\.\w+)+)`", path.read_text(encoding="utf-8")))
    assert len(names) > 50
    for name in names - metadata:
        pkgutil.resolve_name(name)


def test_the_readme_says_of_the_demo_what_its_log_does():
    log = (ROOT / "evidence" / "logs" / "demo-seeds.log").read_text()
    scores = re.findall(r"│ W\d+ A\d+ *│ *([\d.]+) ±", log.rpartition("results  ")[2])
    assert len(scores) == 3
    said = re.search(
        r"float ([\d.]+) %, 2-bit ([\d.]+) %, and ([\d.]+) % for a float model",
        (ROOT / "README.md").read_text(),
    )
    assert list(said.groups()) == scores
