"""Files that name a class of Transformers. Oracles: the model that was saved, and the parts that a name tells."""

import re

import pytest
import torch

import qat
from qat.lit.optim import parameter_groups
from qat.nn.hf_constructor import TransformersClassifier
from tests.errors import usage_error
from tests.hf_models import KINDS, are_equal, outputs, transformers
from tests.tiny import fitted, identical, shake

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
    assert f"`{name}` of Transformers" in (tmp_path / "packed" / "README.md").read_text()


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
    with usage_error(message):
        qat.load(path)


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


def classifier(name):
    """A quantized model of `model=hf`."""
    kind = KINDS[name]
    torch.manual_seed(0)
    net = shake(TransformersClassifier(name, kind.config().to_dict(), 5))
    return fitted(net, kind.images(4), "seq", bits=4)


def backward(net, x):
    """Gradients of a training step, and the count of tensors that it stores."""
    torch.manual_seed(0)  # Swin drops paths
    net.zero_grad()
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: stored.append(0) or tensor, lambda tensor: tensor
    ):
        loss = net.train()(x).square().sum()
    loss.backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None], len(stored)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "SwinForImageClassification"])
def test_checkpointing_computes_the_same(name):
    net, x = classifier(name), KINDS[name].images()
    plain, n_plain = backward(net, x)
    net.set_grad_checkpointing()
    gradients, n_stored = backward(net, x)
    assert identical(gradients, plain)
    assert n_stored < n_plain / 2
    net.set_grad_checkpointing(enable=False)
    assert backward(net, x)[1] == n_plain


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "ViTForImageClassification",
            ("vit.embeddings", "vit.layers.0", "vit.layers.1|vit.layernorm", "classifier"),
        ),
        (
            "SwinForImageClassification",
            (
                "swin.embeddings",
                r"swin.encoder.layers.0.(blocks.0|downsample)",
                "swin.encoder.layers.1.blocks.0|swin.layernorm",
                "classifier",
            ),
        ),
    ],
)
def test_layer_decay(name, parts):
    net = classifier(name)
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = parameter_groups(net, weight_decay=0.1, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        part = parts[int(group["name"][len("layer")])]
        assert group["lr_scale"] == 0.5 ** (3 - parts.index(part))
        assert all(re.match(f"model.({part})", names[p]) for p in group["params"]), group["name"]


def test_layer_decay_needs_blocks():
    net = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    )
    with usage_error("layer_decay=0.5: the layers of ResNetFor.* cannot be numbered"):
        parameter_groups(net, weight_decay=0.1, layer_decay=0.5)


def test_the_images_of_a_nested_config():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"vision_config": {**sizes, "image_size": 32, "patch_size": 8}}
    net = TransformersClassifier("SiglipForImageClassification", config, 5, in_chans=1)
    assert net.pretrained_cfg["input_size"] == (1, 32, 32)
    assert net(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
