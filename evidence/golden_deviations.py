"""Print the largest difference from the papers' own code, by family: `make golden-deviations`.

The script runs the comparisons of the golden tests, and records the absolute differences instead of
failing.
"""

from __future__ import annotations

from types import ModuleType

from torch.utils._pytree import tree_leaves

import tests.functional.test_goldens as functions
import tests.functional.test_ptq_goldens as ptq_functions
import tests.nn.test_goldens as modules
from tests import golden

OFQ = "ofq_goldens.npz"
PTQ = "ptq_goldens.npz"
FAMILIES: dict[str, tuple[ModuleType, str, str, str]] = {
    "StatsQ, forward and scale": (
        functions,
        "test_statsq",
        OFQ,
        r"statsq(2d|3d|_ties|_zero_row|_qk).*",
    ),
    "LSQ, forward and gradients": (functions, "test_lsq", OFQ, r"lsq_.*"),
    "LSQ, first scale": (functions, "test_lsq_first_scale", OFQ, r"lsq_.*"),
    "QK product, with gradients": (functions, "test_qkr_product", OFQ, r"qkr_product_b\d"),
    "distillation loss": (functions, "test_distillation_loss", OFQ, r"kd_loss_.*"),
    "min-max scales": (ptq_functions, "test_observer", PTQ, r"obs/minmax/.*"),
    "affine fake quantization": (
        ptq_functions,
        "test_fake_quantize_affine",
        PTQ,
        r"uniform/u?int\d/(acts|w_lin|w_conv)",
    ),
    "learning rates": (functions, "test_learning_rate_per_epoch", OFQ, r"lr_.*"),
    "modules, with gradients": (modules, "test_output_and_gradients", OFQ, modules.FAMILIES),
}


def largest(module: ModuleType, test: str, file: str, pattern: str) -> tuple[int, float]:
    """Number of cases of a family, and the largest difference in its test."""
    differences = [0.0]

    def record(actual: object, golden_value: object, **_: object) -> None:
        pairs = zip(tree_leaves(actual), tree_leaves(golden_value), strict=True)
        for ours, theirs in pairs:
            expected = theirs.detach().double().reshape(ours.shape)
            differences.append((ours.detach().double() - expected).abs().max().item())

    assert_close = module.assert_close
    module.assert_close = record
    try:
        cases = golden.cases(file, pattern)
        for case in cases:
            getattr(module, test)(case)
    finally:
        module.assert_close = assert_close
    return len(cases), max(differences)


if __name__ == "__main__":
    for name, family in FAMILIES.items():
        count, deviation = largest(*family)
        print(f"{name:28}  {count:3d} cases  {deviation:.1e}")
