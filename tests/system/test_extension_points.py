"""One python file and one yaml add a quantizer, a dataset, a loss term, a callback, a model family. Oracle: doing it."""

import sys
import textwrap

import pytest
import timm.models._registry as timm_registry
import torch
from torch.testing import assert_close

import qat
from qat.nn import swap_registry
from qat.tasks.analyze import analyze
from qat.tasks.export import export
from qat.tasks.train import train as train_task
from tests.commands import run_python
from tests.conftest import ROOT, TINY, compose, evaluate, results, tiny, train
from tests.tiny import randn

FILES = {
    "quantizer": '''
        """Keep the sign and the mean magnitude."""
        import torch
        from qat.quantizers import Quantizer

        class Sign(Quantizer):
            def forward(self, x):
                return x + (x.sign() * x.abs().mean() - x).detach()

            def codes(self, x):
                return x.sign().to(torch.int8)
    ''',
    "half": '''
        """Half steps, learned relative to where they begin: what is outside of a quantizer knows its grid alone."""
        import torch
        from torch import nn
        from qat.functional import mean_abs, round_ste, view_along
        from qat.quantizers import Quantizer, UniformGrid

        class HalfStep(Quantizer):
            def __init__(self, spec):
                super().__init__(spec)
                self.n = 2 ** (spec.bits - 1)
                self.register_buffer("start", None)
                self.register_parameter("ratio", None)

            @property
            def scale(self):
                return self.start * self.ratio.clamp(min=0.05)

            def allocate(self, shape, device):
                super().allocate(shape, device)
                self.start = self.nan_tensor(shape, device)
                self.ratio = nn.Parameter(torch.ones_like(self.start))

            def calibrate(self, x, state):
                self.start.copy_(2 * mean_abs(x.detach(), self.axis) / self.n)

            def forward(self, x):
                step = view_along(self.scale, x.ndim, self.axis)
                return step * (round_ste(x / step - 0.5).clamp(-self.n, self.n - 1) + 0.5)

            def codes(self, x):
                step = view_along(self.scale, x.ndim, self.axis)
                return (x / step - 0.5).round().clamp(-self.n, self.n - 1).to(torch.int8)

            def grid(self, x=None):
                return UniformGrid(qmin=-self.n, qmax=self.n - 1, step=self.scale.detach(), zero_point=-0.5, axis=self.axis)
    ''',
    "dataset": '''
        """Bright images are class 1."""
        import numpy as np
        from qat.data import ImageArrays, ImageData

        class Bright(ImageData):
            def read(self):
                labels = np.arange(32) % 2
                images = np.broadcast_to(labels[:, None, None, None] * 255, (32, 8, 8, 1)).astype(np.uint8)
                return {"train": ImageArrays(images, labels), "val": ImageArrays(images[:8], labels[:8])}
    ''',
    "loss": '''
        """The mean square of the head's weight."""
        from qat.losses import LossTerm

        class HeadDecay(LossTerm):
            def forward(self, step):
                return step.net.head.weight.square().mean()
    ''',
    "callback": '''
        """Count steps."""
        from pathlib import Path
        from lightning.pytorch import Callback

        class Count(Callback):
            def __init__(self, file):
                self.file, self.n = file, 0

            def on_train_batch_end(self, *args):
                self.n += 1

            def on_train_end(self, *args):
                Path(self.file).write_text(str(self.n))
    ''',
    "family": '''
        """A net that is no timm transformer, and the swap that quantizes its layers."""
        from timm.models import register_model
        from torch import nn
        from qat.nn import QuantLinear, Swap, register_swap

        class Gate(nn.Linear):
            def forward(self, x):
                return super().forward(x).sigmoid()

        class QuantGate(QuantLinear):
            def forward(self, x):
                return super().forward(x).sigmoid()

        @register_swap(Gate, "linear")
        def swap_gate(module, context):
            return Swap(QuantGate(module, context.input_quantizer(), context.weight()))

        class GateNet(nn.Module):
            def __init__(self, img_size, in_chans, num_classes, width):
                super().__init__()
                self.num_classes = num_classes
                self.gate = Gate(in_chans * img_size**2, width)
                self.head = nn.Linear(width, num_classes)

            def forward(self, x):
                return self.head(self.gate(x.flatten(1)))

        @register_model
        def gate_net(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
            return GateNet(**kwargs)
    ''',
}
YAMLS = {
    "quant/mine.yaml": """
        defaults: [ofq_noqkr_2bit]
        name: mine
        weight_quantizer: ext_quantizer:Sign
    """,
    "quant/half.yaml": """
        defaults: [ofq_noqkr_2bit]
        name: half
        weight_quantizer: ext_half:HalfStep
        act_quantizer: ext_half:HalfStep
    """,
    "data/mine.yaml": """
        defaults: [digits]
        _target_: ext_dataset.Bright
        num_classes: 2
        batch_size: 16
    """,
    "loss/mine.yaml": """
        defaults: [ce]
        terms:
          decay:
            _target_: ext_loss.HeadDecay
            weight: 0.5
    """,
    "callbacks/mine.yaml": """
        count:
          _target_: ext_callback.Count
          file: ${run_dir}/count.txt
    """,
    "model/mine.yaml": """
        name: gate_net
        pretrained: false
        weights: null
        reset_head: false
        init: full
        imports: [ext_family]
        args:
          img_size: ${data.image_size}
          in_chans: ${data.in_chans}
          num_classes: ${data.num_classes}
          width: 12
    """,
}


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """Write a folder with Python files and configs that Python and Hydra find; return the override."""
    for name, text in FILES.items():
        (tmp_path / f"ext_{name}.py").write_text(textwrap.dedent(text))
    for name, text in YAMLS.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    swaps = dict(swap_registry._SWAPS)
    yield f"hydra.searchpath=[file://{tmp_path}/conf]"
    for name in FILES:
        sys.modules.pop(f"ext_{name}", None)
    swap_registry._SWAPS.clear()
    swap_registry._SWAPS.update(swaps)
    timm_registry._model_entrypoints.pop("gate_net", None)


def test_a_quantizer(tmp_path, extended, refused):
    run = train(tmp_path / "run", extended, "quant=mine")
    net = qat.load(f"{run}/checkpoints/last.ckpt")
    weights = [site for site in qat.iter_quantizers(net) if site.is_weight]
    assert {type(site.quantizer).__name__ for site in weights} == {"Sign"}
    for site in weights:
        assert site.quantizer.codes(site.latent()).unique().tolist() == [-1, 1]
    best = f"ckpt={run}/checkpoints/best.ckpt"
    assert evaluate(tmp_path / "eval", best)["top1"] == results(run)["top1"]
    # In a process of its own, a quantizer of a file is imported only by its user.
    del sys.modules["ext_quantizer"]
    said = refused(compose("eval", best, f"run_dir={tmp_path}/refused"))
    assert "quantizer='ext_quantizer:Sign': must be" in said
    assert "ext_quantizer" not in sys.modules
    again = evaluate(tmp_path / "again", best, "model.imports=[ext_quantizer]")
    assert again["top1"] == results(run)["top1"]


@pytest.fixture
def half_steps(tmp_path, extended):
    """A short run with half steps for weights and activations, oscillations tracked."""
    return train(
        tmp_path / "run",
        extended,
        "quant=half",
        "callbacks=[default,oscillation]",
        "callbacks.oscillation.max_bits=8",
    )


def exported(folder, run, *overrides):
    """Export the last checkpoint, and return the results."""
    checkpoint = f"ckpt={run}/checkpoints/last.ckpt"
    settings = (checkpoint, f"run_dir={folder}", "model.imports=[ext_half]", *overrides)
    export(compose("export", *settings))
    return results(folder)


@pytest.mark.long
def test_what_is_outside_of_a_quantizer_knows_its_grid_alone(tmp_path, half_steps):
    net = qat.load(f"{half_steps}/checkpoints/last.ckpt", imports=["ext_half"])
    assert any(
        (ratio != 1).any() for name, ratio in net.named_parameters() if name.endswith("ratio")
    )
    packed = exported(tmp_path / "packed", half_steps, "format=packed")
    assert packed["agreement"] == 100
    frozen = qat.load(tmp_path / "packed" / "net.safetensors", imports=["ext_half"])
    x = randn(4, 1, 8, 8)
    with torch.no_grad():
        assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-4)
    onnx = exported(
        tmp_path / "onnx", half_steps, "format=onnx", "latency=0"
    )  # compared in onnxruntime
    assert onnx["agreement"] == 100
    oscillations = (half_steps / "oscillation.csv").read_text().splitlines()
    assert len(oscillations) == 2 + sum(site.is_weight for site in qat.iter_quantizers(net))
    assert "in_band" in oscillations[0]


@pytest.mark.long
def test_reports_of_a_quantizer_know_its_grid_alone(tmp_path, half_steps):
    for name in ("weights", "oscillation"):
        overrides = (
            f"ckpt={half_steps}/checkpoints/last.ckpt",
            f"analysis={name}",
            "model.imports=[ext_half]",
        )
        analyze(compose("analyze", *overrides, f"run_dir={tmp_path}/{name}"))
    (found,) = results(tmp_path / "weights")["summary"].values()
    assert found["quantized_weights"] == found["weights"]
    # Of what no grid is known, neither is.
    assert 0 < found["near_threshold_percent"] < 100 * 2 * 0.005
    assert 0 < found["clipped_percent"] < 50


def test_a_dataset(tmp_path, extended, refused):
    run = train(tmp_path / "run", extended, "data=mine")
    found = results(run)
    assert (found["data"], found["split"]) == ("bright", "val")
    assert qat.load(f"{run}/checkpoints/last.ckpt").num_classes == 2
    best = f"ckpt={run}/checkpoints/best.ckpt"
    again = evaluate(tmp_path / "eval", extended, "data=mine", best)
    assert again["top1"] == found["top1"]
    # Of a dataset of one's own, evaluation has to be told.
    said = refused(compose("eval", best, f"run_dir={tmp_path}/unnamed"))
    assert "was trained on 'ext_dataset.Bright', which is not a dataset of qat" in said


def test_a_loss_term(tmp_path, extended):
    run = train(tmp_path / "run", extended, "loss=mine")
    header, *_ = (run / "metrics.csv").read_text().splitlines()
    assert {"train/loss_ce", "train/loss_decay"} <= set(header.split(","))


def test_a_callback(tmp_path, extended):
    run = train(tmp_path / "run", extended, "callbacks=[default,mine]")
    assert (run / "count.txt").read_text() == "2"
    assert (run / "checkpoints" / "best.ckpt").exists()


def test_a_model_family(tmp_path, extended):
    # timm and the registry of swaps learn of a file when it is imported: the model's yaml names it.
    args = [o for o in TINY if "model.args" not in o]
    run = f"run_dir={tmp_path}/run"
    train_task(compose("train", extended, *args, "model=mine", "quant=ofq_2bit", run))
    net = qat.load(f"{tmp_path}/run/checkpoints/last.ckpt")
    assert type(net.gate).__name__ == "QuantGate"
    assert {site.name for site in qat.iter_quantizers(net) if site.is_weight} == {
        "gate.weight_quantizer",
        "head.weight_quantizer",
    }
    with torch.no_grad():
        assert net(torch.zeros(1, 1, 8, 8)).isfinite().all()
    again = evaluate(
        tmp_path / "eval",
        f"ckpt={tmp_path}/run/checkpoints/best.ckpt",
        "model.imports=[ext_family]",
    )
    assert again["top1"] == results(tmp_path / "run")["top1"]


@pytest.mark.long
def test_all_at_once_from_the_command_line(tmp_path, extended):
    overrides = [
        "quant=mine",
        "data=mine",
        "loss=mine",
        "callbacks=[default,mine]",
        *TINY,
        "run_dir=run",
    ]
    script = str(ROOT / "train.py")
    done = run_python(
        script,
        "--config-dir",
        "conf",
        *overrides,
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "count.txt").read_text() == "2"
    assert (results(tmp_path / "run")["data"], results(tmp_path / "run")["recipe"]["name"]) == (
        "bright",
        "mine",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quant.weight_quantizer=ext_quantizer:Nope", "quantizer='ext_quantizer:Nope'"),
        ("quant.weight_quantizer=ext_nope:Sign", "quantizer='ext_nope:Sign'"),
        (
            "quant.weight_quantizer=ext_loss:HeadDecay",
            "must be a subclass of qat.quantizers.Quantizer",
        ),
        ("data._target_=ext_nope.Bright", "ext_nope.Bright"),
        ("loss.terms.ce._target_=ext_nope.Term", "ext_nope.Term"),
        ("callbacks.epoch_log._target_=ext_nope.Callback", "ext_nope.Callback"),
    ],
)
def test_a_class_that_is_not_there_is_named(tmp_path, extended, refused, override, message):
    assert message in refused(tiny(tmp_path / "run", override))
