"""Quantizers by name. Oracle: the class, or the message about an unknown name."""

import pytest

from qat.quantizers import LSQ, Float, Shifted, build_quantizer, register, registry
from qat.spec import QuantSpec
from tests.errors import usage_error
from tests.quantizers.common import build

SOURCE = """
import torch
from qat.quantizers import Quantizer

class Half(Quantizer):
    def forward(self, x):
        return torch.round(2 * x) / 2
    def codes(self, x):
        return torch.round(2 * x).to(torch.int16)

class NotOne(torch.nn.Module):
    pass

class WithoutCodes(Quantizer):
    def forward(self, x):
        return x

half = Half
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "plugged_quantizers.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "plugged_quantizers"


def test_offsets_wrap():
    made = build("lsq", offsets="both")
    assert type(made) is Shifted
    assert type(made.quantizer) is LSQ


def test_unknown_name_lists_what_there_is():
    names = "affine, dorefa, float, fp8, fp8_held, log2, lsq, minmax, minmax_dynamic, mxfp, nvfp4"
    with usage_error(f"quantizer='lsqq': must be one of {names}"):
        build("lsqq")


def test_register_makes_a_name(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
    register("mine")(Float)
    assert type(build_quantizer(QuantSpec("input", "mine", 4))) is Float


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="quantizer 'lsq' is already registered"):
        register("lsq")(Float)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_anywhere:Half", "No module named 'no_such_module_anywhere'"),
        ("plugged_quantizers:Nothing", "no attribute 'Nothing'"),
        ("plugged_quantizers:NotOne", "qat.quantizers.Quantizer"),
        ("plugged_quantizers:WithoutCodes", "forward and codes"),
        ("qat.quantizers:Quantizer", "forward and codes"),
        ("math:pi", "qat.quantizers.Quantizer"),
    ],
)
def test_paths_that_lead_nowhere(plugin, name, said):
    with usage_error(f"quantizer='{name}'.*{said}"):
        build(name)
