"""Commands on a device. Oracle: the uninterrupted run, bit for bit; the same file and the same command on a CPU.

They need Hydra and Lightning, which the rest of this folder does not.
"""

import pytest
import torch

pytest.importorskip("hydra", reason="Hydra is not installed")
pytest.importorskip("lightning", reason="Lightning is not installed")

import qat  # noqa: E402
from qat.tasks.analyze import analyze  # noqa: E402
from qat.tasks.ptq import ptq  # noqa: E402
from tests.conftest import compose, evaluate, results, train  # noqa: E402
from tests.tasks.test_resume import assert_same_run, killed_at, run  # noqa: E402

ON_DEVICE = ("trainer=gpu", "trainer.precision=bf16-mixed")
WAYS = {
    "eager": ("compile=false",),
    "compiled": ("compile=true",),
    "annealed": (
        "compile=false",
        "callbacks=[default,ema,cga,oscillation]",
        "callbacks.cga.epochs=1",
    ),
    "frozen": ("compile=false", "callbacks=[default,ema,freeze]"),
    "kurtosis, absolute steps, float16": (
        "compile=false",
        "loss.kure=0.1",
        "quant.steps=absolute",
        "trainer.precision=16-mixed",
    ),
    "seq": ("compile=false", "quant=seq_2bit"),
}
# Beside them mixup, dropout, drop path and averaged weights.
GRAPHS = {
    "taught, annealed, clipped": (
        *("loss=kd_features", "quant=seq_2bit", "teacher.ckpt={float}"),
        *("callbacks=[default,ema,cga]", "callbacks.cga.epochs=1", "trainer.gradient_clip_val=0.1"),
    ),
    "scaled, accumulated": (
        *(
            "trainer.precision=16-mixed",
            "data.batch_size=64",
            "trainer.accumulate_grad_batches=2",
            "trainer.limit_train_batches=18",
        ),
    ),
}
# Of images: values between two codes go to the one side or the other, and take along what depends on them.
POINTS = 3.0
TRAINERS = {"there": "trainer=gpu", "here": "trainer=cpu"}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_run(device, way, tmp_path):
    """Mixup, dropout, drop path, averaged weights; stopped between two saves."""
    settings = (*ON_DEVICE, *WAYS[way])
    whole = run(tmp_path / "whole", *settings)
    stopped = killed_at(5, tmp_path / "run", *settings)
    run(stopped, "resume=auto", *settings)
    assert_same_run(stopped, whole)


@pytest.mark.parametrize("way", GRAPHS)
def test_a_resumed_run_of_graphs_is_the_compiled_run(device, way, tmp_path, recorded):
    """Gradients that are added to, outputs and a teacher's features, in memory that a later step overwrites."""
    teacher = run(tmp_path / "float", "quant=fp", *ON_DEVICE, "compile=false")
    teacher = teacher / "checkpoints" / "last.ckpt"
    settings = [*ON_DEVICE, *(one.format(float=teacher) for one in GRAPHS[way])]
    whole = run(tmp_path / "whole", *settings, "compile=true")
    torch._dynamo.utils.counters.clear()
    stopped = killed_at(5, tmp_path / "run", *settings, "compile=graphs")
    run(stopped, "resume=auto", *settings, "compile=graphs")
    assert len(recorded) > 4  # both ways, in both parts of the run
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert_same_run(stopped, whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A float net that reads digits, trained on the device, and its 2-bit twin with it as the teacher."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    folder = tmp_path_factory.mktemp("trained")
    size = (
        "++model.args.embed_dim=48",
        "++model.args.depth=2",
        "data.augment=none",
        "optimizer.lr=2e-3",
        "trainer.max_epochs=8",
    )
    settings = (*ON_DEVICE, *size, "trainer.limit_train_batches=1.0", "compile=false")
    start = train(folder / "float", "quant=fp", *settings) / "checkpoints" / "last.ckpt"
    return start, train(
        folder / "two", "quant=ofq_2bit", "loss=kd", f"ckpt={start}", *settings
    ) / "checkpoints" / "last.ckpt"


def test_training_learns_and_its_file_is_the_same_net_anywhere(trained, tmp_path):
    for number, ckpt in enumerate(trained):
        there, here = (
            evaluate(tmp_path / f"{number} {where}", f"ckpt={ckpt}", trainer)
            for where, trainer in TRAINERS.items()
        )
        assert min(there["top1"], here["top1"]) > 80
        assert there["top1"] == pytest.approx(here["top1"], abs=POINTS)
        assert there["loss"] == pytest.approx(here["loss"], rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        ("ptq=fqvit_w4a8",),
        ("ptq=compensate_w4a4",),
        ("ptq=reconstruct_w4a4", "ptq.reconstruct.steps=50"),
        ("ptq=evolq_w4a8", "search.passes=1", "search.population=3"),
        ("ptq=minmax_w4a8", "search=evolution", "search.passes=1"),
    ],
    ids=lambda settings: settings[0],
)
def test_post_training(trained, settings, tmp_path):
    arguments = (
        f"ckpt={trained[0]}",
        "data.calibration_images=100",
        "ptq.batch=20",
        "report=true",
        *settings,
    )
    for where, trainer in TRAINERS.items():
        ptq(compose("ptq", f"run_dir={tmp_path / where}", trainer, *arguments))
    there, here = (results(tmp_path / where) for where in TRAINERS)
    assert (tmp_path / "there" / "report.html").exists()
    assert there["top1"] == pytest.approx(here["top1"], abs=POINTS)
    assert there["loss"] == pytest.approx(here["loss"], rel=0.15)
    net = qat.load(tmp_path / "there" / "quantized.ckpt")
    assert {p.device.type for p in net.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    "settings",
    [("ptq=reconstruct_w4a4", "ptq.reconstruct.steps=5"), ("ptq=evolq_w4a8", "search.passes=1")],
)
def test_post_training_goes_on_from_its_file(trained, settings, tmp_path, caplog):
    caplog.set_level("INFO")
    found = []
    for resume in ("false", "true"):
        ptq(compose("ptq", f"run_dir={tmp_path}", f"ckpt={trained[0]}", "data.calibration_images=100", "ptq.batch=20", "trainer=gpu",
                    *settings, f"resume={resume}"))  # fmt: skip
        found.append(qat.load(tmp_path / "quantized.ckpt").state_dict())
    assert "resumed after" in caplog.text
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


@pytest.mark.parametrize(
    "settings",
    [
        ("analysis=robustness", "analysis.ratios=3"),
        ("analysis=sensitivity",),
        ("analysis=landscape", "analysis.points=3"),
        ("analysis=weights",),
    ],
    ids=lambda settings: settings[0],
)
def test_analyses(trained, settings, tmp_path):
    paths = f"run_dir={tmp_path}", f"ckpt={trained[1]}"
    analyze(compose("analyze", *paths, "trainer=gpu", "images=40", *settings))
    assert results(tmp_path)["complete"]


def test_a_finished_run_names_the_device(trained):
    machine = results(trained[1].parents[1])
    assert torch.cuda.get_device_name() in str(machine)
