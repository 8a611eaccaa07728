"""Files that name a class of Transformers. Oracle: the model that was saved."""

import pytest
import torch

import qat
from tests.errors import usage_error
from tests.hf_models import KINDS, are_equal, outputs, transformers

VIT = KINDS["ViTForImageClassification"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["ViTForImageClassification", "LevitForImageClassification"])
def test_files_give_the_model_again(name, tmp_path):
    kind = KINDS[name]
    net, x = kind.quantized(bits=4), kind.images()
    qat.save(net, tmp_path / "net.ckpt")
    assert are_equal(outputs(qat.load(tmp_path / "net.ckpt"), x), outputs(net, x))
    frozen = qat.freeze(net)
    qat.save(frozen, tmp_path / "frozen.ckpt")
    assert are_equal(outputs(qat.load(tmp_path / "frozen.ckpt"), x), outputs(frozen, x))
    packed = qat.from_pretrained(qat.save_pretrained(net, tmp_path / "packed"))
    assert are_equal(outputs(packed, x), outputs(frozen, x))


def test_a_float_model(tmp_path):
    net = VIT.build()
    qat.save(net, tmp_path / "net.ckpt")
    again = qat.load(tmp_path / "net.ckpt")
    assert type(again) is VIT.cls
    assert are_equal(outputs(again, VIT.images()), outputs(net, VIT.images()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "Nope"}, "transformers has no model 'Nope'"),
        ({"architecture": "pipeline"}, "transformers has no model 'pipeline'"),
        ({"architecture": "AutoModel"}, "transformers has no model 'AutoModel'"),
        ({"architecture": "models.vit"}, "transformers has no model 'models.vit'"),
        ({"hidden_size": 10**9}, "much larger than"),
        ({"num_hidden_layers": 10**5}, "much larger than"),
        ({"hidden_act": "nope"}, "hidden_act|nope"),
    ],
)
def test_a_file_that_asks_for_something_else(changes, message, tmp_path):
    path = tmp_path / "net.ckpt"
    qat.save(VIT.build(), path)
    content = torch.load(path)
    kwargs = content["qat"]["model"]["kwargs"]
    kwargs["config"] |= {name: v for name, v in changes.items() if name != "architecture"}
    kwargs["architecture"] = changes.get("architecture", kwargs["architecture"])
    torch.save(content, path)
    with usage_error(message) as caught:
        qat.load(path)
    assert "\n" not in str(caught.value)


def test_code_that_a_config_names_is_not_run(tmp_path):
    net = VIT.build()
    net.config.auto_map = {"AutoModelForImageClassification": "evil--evil.Evil"}
    qat.save(net, tmp_path / "net.ckpt")
    assert type(qat.load(tmp_path / "net.ckpt")) is VIT.cls


def test_a_class_of_ones_own_is_not_saved(tmp_path):
    class Own(transformers.ViTForImageClassification):
        pass

    with usage_error("does not record how timm built it"):
        qat.save(Own(VIT.config()), tmp_path / "net.ckpt")
