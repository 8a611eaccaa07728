"""Files of ExecuTorch. Oracle: the model, run by torch."""

import pytest
import torch

import qat
from qat.export import pte
from qat.export.pte import to_pte, write_pte
from qat.export.runtimes import EXECUTORCH, open_session, session_logits
from tests import tiny
from tests.errors import usage_error
from tests.export.test_onnx_file import NO_INTEGERS
from tests.model.frozen.test_freeze import made


@pytest.mark.parametrize("name", NO_INTEGERS)
def test_what_xnnpack_cannot_hold_is_one_line(name):
    with usage_error(r"^format=executorch: \S+_quantizer must have one scale"):
        to_pte(qat.freeze(made(NO_INTEGERS[name])), tiny.images(1))


def test_a_net_with_other_outputs_than_logits_is_refused():
    class Encoder(torch.nn.Module):
        def forward(self, image):
            return {"pooler_output": image.mean((1, 2, 3)), "last_hidden_state": image}

    with usage_error("^format=executorch: .* must be logits$"):
        to_pte(Encoder(), tiny.images(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        qat.recipe("deploy_w4a8"),
        pytest.param(qat.recipe("deploy_w8a8"), marks=pytest.mark.long),
        pytest.param(qat.recipe("deploy_w4a4", weight_quantizer="statsq"), marks=pytest.mark.long),
    ],
    ids=["w4a8", "w8a8", "half steps"],
)
def test_a_file_gives_the_logits_of_the_net(recipe, tmp_path, monkeypatch):
    pytest.importorskip("executorch.runtime")
    net, x, path = made(recipe), tiny.images(32, 1), tmp_path / "net.pte"
    frozen = qat.freeze(net)
    checked, about = write_pte(path, frozen, net, [x])
    assert checked.problem is None
    assert about["float_products"] == ["patch_embed.proj", "blocks.*.attn"]
    assert about["outside_xnnpack"]["native_layer_norm"] == 5
    apart = (session_logits(open_session(path, EXECUTORCH), x, batch=1) - frozen(x)).abs().amax(1)
    assert (apart < 1e-5).float().mean() > 0.8  # the codes of the net, but for values on thresholds
    monkeypatch.setattr(pte, "to_pte", lambda *_: (path.read_bytes(), {}))
    net.head.bias.data += torch.linspace(0, 10, 10)
    assert "an output differs by" in write_pte(path, frozen, net, [x])[0].problem
