"""Sharing nets. Oracles: the net that was saved, timm's own reader of the hub's cache, a hub that is not there."""

import json
import math
import re
import time
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import yaml
from torch.testing import assert_close

import qat
from qat.model import pretrained
from tests.commands import typed
from tests.conftest import ROOT, TINY, results
from tests.data.files import write_folder
from tests.errors import usage_error
from tests.tiny import logits, randn, vit

RESULTS = {
    "top1": 74.125,
    "top5": 98.0,
    "images": 360,
    "split": "test",
    "data": "digits",
    "git_commit": "abc",
    "weights": "/a/machine/path",
}


@pytest.fixture
def net(run_4bit):
    return qat.load(run_4bit / "checkpoints" / "best.ckpt")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Puts a folder into the hub's local cache under a name; nothing can be fetched."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub")
    )
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked the hub"))

    def put(name):
        root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        (root / "snapshots" / ("0" * 40)).mkdir(parents=True)
        return root / "snapshots" / ("0" * 40)

    return put


def test_a_folder_gives_the_net_again(tmp_path, net):
    folder = qat.save_pretrained(net, tmp_path / "net", results=RESULTS, license="mit")
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
    }
    again = qat.from_pretrained(folder)
    x = randn(4, 1, 8, 8)
    with torch.no_grad():
        assert_close(again(x), net(x), rtol=1e-4, atol=1e-4)
    image = (torch.rand(8, 8, 1, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    assert_close(qat.transform(again)(image), qat.transform(net)(image))


def test_the_card_says_what_was_measured_and_no_path(tmp_path, net):
    folder = qat.save_pretrained(net, tmp_path / "net", results=RESULTS, license="mit")
    size = (folder / "model.safetensors").stat().st_size
    said = (folder / "README.md").read_text()
    for part in (
        "license: mit",
        "`ofq`: weights 4 bit, activations 4 bit",
        "top1 74.125, top5 98.0, images 360, split test, data digits",
    ):
        assert part in said
    assert f"{size:,} bytes" in said
    # Until it is on PyPI, as README has it.
    command = re.search(r"In a clone .*`pip install ([^`]*)`", said)[1]
    assert command.replace("-e .", "-e '.[export]'") in (ROOT / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["size_bytes"], config["recipe"]["bits"]) == (
        "vit_tiny_patch16_224",
        size,
        4,
    )
    for path in folder.iterdir():
        assert b"/a/machine" not in path.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()


def test_a_float_net_and_a_net_of_no_known_accuracy(tmp_path):
    net = vit()
    folder = qat.save_pretrained(net, tmp_path / "net")
    assert torch.equal(logits(qat.from_pretrained(folder)), logits(net))
    card = (folder / "README.md").read_text()
    assert "| Accuracy | not measured |" in card
    assert "quantized" not in card


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("hfds//home/alice/secret", "hfds/secret"),
        ("hfds/alice/photos", "hfds/alice/photos"),
        ("/home/alice/photos/", "photos/"),
        ("~/photos", "photos"),
        ("../../alice/photos", "photos"),
        (r"C:\Users\alice\photos", "photos"),
        ("file:///home/alice/photos", "file:photos"),
    ],
)
def test_data_have_names_and_no_paths(tmp_path, net, name, public):
    folder = qat.save_pretrained(
        net,
        tmp_path / "net",
        data={**net.qat_data, "name": name, "more": [{"a": name}]},
        results={"data": name},
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["data"]["name"], config["data"]["more"], config["results"]["data"]) == (
        public,
        [{"a": public}],
        public,
    )
    assert qat.load(folder / "model.safetensors").qat_data["name"] == public


def test_a_model_of_transformers_does_not_say_where_it_came_from(tmp_path):
    pytest.importorskip("transformers")
    config = {
        "model_type": "vit",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "_name_or_path": "/home/me/secret/vit",
    }
    net = timm.create_model(
        "transformers_classifier",
        architecture="ViTForImageClassification",
        config=config,
        num_classes=3,
    )
    qat.save_pretrained(net, tmp_path)
    for path in tmp_path.iterdir():
        assert b"secret" not in path.read_bytes()


def test_the_text_of_a_stranger_is_no_markup(tmp_path, net):
    evil = "a|<script>alert(1)</script>\n\n# b ![c](//d) `e` *f*"
    results = {"top1": 50.0, "split": evil, "data": evil}
    folder = qat.save_pretrained(
        net,
        tmp_path / "net",
        data={**net.qat_data, "_target_": evil},
        results=results,
        license=f"mit\ntags: [{evil}]",
    )
    plain = qat.save_pretrained(
        net, tmp_path / "plain", results={"top1": 50.0, "split": "a", "data": "a"}, license="mit"
    )
    said, expected = (
        (place / "README.md").read_text().partition("\n---\n") for place in (folder, plain)
    )
    assert yaml.safe_load(said[0].strip("-"))["tags"] == ["quantization", "vision"]
    assert [line.count("|") for line in said[2].splitlines()] == [
        line.count("|") for line in expected[2].splitlines()
    ]
    assert not set("<>![*") & set(said[2].partition("```")[0])
    for value in (math.nan, "<b>"):
        with usage_error(r"save_pretrained: results.top1=.*: must be a number of at least 0"):
            qat.save_pretrained(net, tmp_path / "net", results={"top1": value})


class FakeApi:
    def __init__(self, error=None):
        self.calls, self.files, self.error = [], {}, error

    def create_repo(self, repository, **options):
        self.calls.append((repository, options))
        if self.error:
            raise self.error

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return f"https://hub/{repo_id}"


def test_what_is_uploaded_is_what_is_saved(tmp_path, net):
    api = FakeApi()
    address = qat.push_to_hub(net, "me/net", private=True, api=api, results=RESULTS)
    assert address == "https://hub/me/net"
    assert api.calls == [("me/net", {"private": True, "exist_ok": True})]
    folder = qat.save_pretrained(net, tmp_path / "net", results=RESULTS, source="me/net")
    assert 'qat.from_pretrained("me/net")' in api.files["README.md"].decode()
    # safetensors writes its metadata in an order that changes.
    assert {name: sorted(content) for name, content in api.files.items()} == {
        path.name: sorted(path.read_bytes()) for path in folder.iterdir()
    }


def test_without_a_connection(net, monkeypatch, cache):
    began = time.monotonic()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with usage_error(r"^push_to_hub: 'me/net': .*HF_HUB_OFFLINE"):
        qat.push_to_hub(net, "me/net")
    with usage_error("^from_pretrained: 'me/net': "):
        qat.from_pretrained("me/net")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "../etc/passwd", "hf-hub:me/net"])
def test_what_is_neither_a_folder_nor_a_name_is_named(source):
    with usage_error(rf"^from_pretrained: '{source}': must be "):
        qat.from_pretrained(source)


def test_a_repository_of_ours(tmp_path, net, cache):
    qat.save_pretrained(net, cache("me/net"))
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert_close(qat.from_pretrained("me/net")(x), net(x), rtol=1e-4, atol=1e-4)
    code, out = typed("eval.py", "model=hf-hub:me/net", "run_dir=eval", cwd=tmp_path)
    assert code == 0, out
    assert results(tmp_path / "eval")["quant"] == "ofq_4bit"
    for other in ("ckpt", "model.weights"):
        code, out = typed(
            "eval.py", "model=hf-hub:me/net", f"{other}=other.ckpt", "run_dir=eval", cwd=tmp_path
        )
        assert (code, f"{other}='other.ckpt': must be null" in out) == (1, True)


@pytest.mark.long
def test_a_float_net_of_timm(tmp_path, cache):
    folder = cache("timm/tiny")
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=7, **kwargs)
    safetensors.torch.save_file(teacher.state_dict(), folder / "model.safetensors")
    described = {
        "input_size": [3, 32, 32],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "model_args": kwargs,
        "pretrained_cfg": described,
    }
    (folder / "config.json").write_text(json.dumps(config))
    data = write_folder(tmp_path / "folder")
    arguments = (
        "data=imagefolder",
        f"data.root={data}",
        "data.num_classes=2",
        "data.image_size=32",
        "data.batch_size=8",
        "report=false",
        "run_dir=run",
    )
    few = [one for one in TINY if "model" not in one]
    torch.save(teacher.state_dict(), tmp_path / "own.pt")
    code, out = typed(
        "train.py",
        "model=hf-hub:timm/tiny",
        "model.weights=own.pt",
        *arguments,
        *few,
        "run_dir=own",
        cwd=tmp_path,
    )
    assert (code, "weights of model.weights='own.pt'" in out) == (0, True), out
    code, out = typed("train.py", "model=hf-hub:timm/tiny", *arguments, *few, cwd=tmp_path)
    assert code == 0, out
    assert (
        f"weights of model.weights='{folder}/model.safetensors'; new head for 2 classes (the file has 7)"
        in out
    )
    recorded = (tmp_path / "run" / "config.yaml").read_text()
    assert "name: vit_tiny_patch16_224" in recorded
    assert "- 0.25" in recorded  # of images, by pretrained_cfg
    assert qat.load(
        tmp_path / "run" / "checkpoints" / "last.ckpt"
    ).patch_embed.proj.weight.shape == (24, 3, 8, 8)
    with usage_error("qat.save_pretrained did not write its config.json"):
        qat.from_pretrained("timm/tiny")


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("asks", "said"),
    [
        (
            {"model_args": {"pretrained_cfg": {"url": "http://elsewhere"}}},
            "model_args must be an object without",
        ),
        ({"model_args": {"weight_init": "${oc.env:HOME}"}}, r"the config contains '\$\{'"),
        ({"model_args": {"img_size": 100_000}}, "the model is much larger "),
        ({"model_args": {"depth": 100_000}}, "the model is much larger "),
        (
            {
                "model_args": {"pos_embed": "none", "dynamic_img_size": True},
                "pretrained_cfg": {"input_size": [3, 8000, 8000]},
            },
            r"an image of \(3, 8000, 8000\) takes much more memory",
        ),
        ({"pretrained_cfg": {"std": [0.5, 0.5, 0]}}, r"pretrained_cfg.std=\[0.5, 0.5, 0\]: must"),
        ({"pretrained_cfg": {"mean": ["${oc.env:HOME}", 0, 0]}}, r"the config contains '\$\{'"),
    ],
)
def test_a_config_that_would_read_more_is_refused(cache, asks, said):
    folder = cache("bad/net")
    safetensors.torch.save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", **asks}
    (folder / "config.json").write_text(json.dumps(config))
    with usage_error(rf"model=x: config.json cannot be used \({said}"):
        pretrained.fetch("bad/net", "model=x")
