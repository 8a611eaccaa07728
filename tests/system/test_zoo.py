"""The models in `zoo/`. Oracles: their cards; integer arithmetic of onnxruntime."""

import json
import os
import re

import pytest
import safetensors
import torch

import qat
from tests.commands import typed
from tests.conftest import ROOT, results
from tests.tiny import randn

ZOO = ROOT / "zoo"
BITS = {"cifar10_w2a2": (2, 2), "cifar10_w4a4": (4, 4), "cifar10_w8a8": (8, 8)}


def images(n=8):
    return randn(n, 3, 32, 32)


@pytest.fixture(params=[name for name in BITS if (ZOO / f"{name}.safetensors").exists()])
def name(request):
    return request.param


@pytest.fixture
def net(name):
    return qat.load(ZOO / f"{name}.safetensors")


def test_each_has_a_card_and_nothing_else_is_here():
    names = {path.stem for path in ZOO.iterdir()}
    assert names <= set(BITS)
    assert "cifar10_w2a2" in names
    assert {path.name for path in ZOO.iterdir()} == {
        f"{name}.{suffix}" for name in names for suffix in ("safetensors", "md")
    }


def test_is_small_and_names_no_machine(name):
    path = ZOO / f"{name}.safetensors"
    assert path.stat().st_size < 1_000_000
    with safetensors.safe_open(str(path), framework="pt") as file:
        said = json.loads(file.metadata()["qat"])
    assert said["data"].get("root") is None
    text = json.dumps(said) + (ZOO / f"{name}.md").read_text()
    assert not re.search(r"(?<![\w.])/(?!\w+\.)(root|work|home|tmp|mnt|data|Users)\b", text)


def test_the_card_is_of_the_file(name, net):
    assert net.qat_classes[:2] == ["airplane", "automobile"]
    card = (ZOO / f"{name}.md").read_text()
    weights, activations = BITS[name]
    assert f"weights {weights} bit, activations {activations} bit" in card
    assert f"{(ZOO / f'{name}.safetensors').stat().st_size:,} bytes" in card
    assert re.search(r"top-1 7\d\.\d\d %, top-5 9\d\.\d\d % of 10,000 images \(test\)", card)
    assert f'qat.load("zoo/{name}.safetensors")' in card
    assert "quant=seq" not in card or "quant.offset_init=zero" in card  # the default then


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "blocks"),
    [("cifar10_w2a2", 1), *[pytest.param(name, 6, marks=pytest.mark.long) for name in BITS]],
)
def test_computes_the_same_on_integers(net, blocks, tmp_path):
    x = images()
    net.blocks = net.blocks[:blocks]
    checked = qat.export_onnx(net, tmp_path / "net.onnx", images=x)
    assert (checked.problem, checked.agreement["onnxruntime"].images) == (None, 8)
    # Sums in another order bring a value that lies on a threshold to its other side: in few images.
    assert checked.agreement["onnxruntime"].num_differing <= 2
    with torch.no_grad():
        assert net(x).std() > 0.5  # a trained net is sure of something, even of noise


@pytest.mark.skipif(
    "QAT_CIFAR10" not in os.environ, reason="QAT_CIFAR10 names the folder of CIFAR-10"
)
@pytest.mark.long
def test_has_the_accuracy_of_its_card(tmp_path, name):
    code, out = typed(
        "eval.py",
        f"ckpt={ZOO / name}.safetensors",
        f"data.root={os.environ['QAT_CIFAR10']}",
        "run_dir=run",
        cwd=tmp_path,
    )
    assert code == 0, out
    assert f"top-1 {results(tmp_path / 'run')['top1']:.2f} %" in (ZOO / f"{name}.md").read_text()
