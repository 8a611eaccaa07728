"""Pure functions: tensors in, tensors out, no state. `axis` is the dimension that keeps scales of its own, None = one scale."""

from qat.functional.affine import affine_codes, affine_from_range, affine_scale, code_range, fake_quantize_affine, min_max
from qat.functional.distillation import distillation_loss, soft_cross_entropy
from qat.functional.lsq import lsq, lsq_codes, lsq_init_scale
from qat.functional.qkr import fold_q_bias, fold_qk
from qat.functional.statsq import statsq, statsq_codes, statsq_codes_with_scale, statsq_scale, statsq_with_scale
from qat.functional.ste import mean_abs, round_ste, view_along

__all__ = [
    "affine_codes",
    "affine_from_range",
    "affine_scale",
    "code_range",
    "distillation_loss",
    "fake_quantize_affine",
    "fold_q_bias",
    "fold_qk",
    "lsq",
    "lsq_codes",
    "lsq_init_scale",
    "mean_abs",
    "min_max",
    "round_ste",
    "soft_cross_entropy",
    "statsq",
    "statsq_codes",
    "statsq_codes_with_scale",
    "statsq_scale",
    "statsq_with_scale",
    "view_along",
]
