"""Functions without state: tensors in, tensors out. Only `fake_quantize_affine_` changes its input.

`axis` is the dimension along which scales differ; None = one scale for the tensor. The functions of
DoReFa, of packing and of the evolutionary search are not exported here: import them from
`qat.functional.dorefa`, `qat.functional.packing` and `qat.functional.evolution`.
"""

from qat.functional.affine import (
    affine_codes,
    affine_from_range,
    code_range,
    correct_mean_and_std,
    fake_quantize_affine,
    fake_quantize_affine_,
    min_max,
)
from qat.functional.block_floats import block_float, block_float_codes
from qat.functional.confidence import near_threshold
from qat.functional.distillation import distillation_loss, feature_distance, soft_cross_entropy
from qat.functional.fp8 import fp8, fp8_codes, fp8_scale
from qat.functional.infonce import info_nce, logit_fitness
from qat.functional.int_layer_norm import integer_layer_norm
from qat.functional.kurtosis import kure_loss, kurtoses, kurtosis
from qat.functional.log2 import fake_quantize_log2, log2_codes, log_int_softmax
from qat.functional.lsq import (
    half_step_init_scale,
    lsq,
    lsq_codes,
    lsq_init_scale,
    min_reliable_step,
    mse_init_scale,
    relative_step,
)
from qat.functional.observers import RangeState, affine_from_state, affine_scale, observe
from qat.functional.oscillation import (
    FreezingState,
    OscillationState,
    freezing_step,
    oscillation_step,
    replace_frozen,
)
from qat.functional.qkr import fold_q_bias, fold_qk
from qat.functional.statsq import (
    statsq,
    statsq_codes,
    statsq_codes_with_scale,
    statsq_rms_scale,
    statsq_scale,
    statsq_with_scale,
)
from qat.functional.ste import mean_abs, round_ste, view_along

__all__ = [
    "FreezingState",
    "OscillationState",
    "RangeState",
    "affine_codes",
    "affine_from_range",
    "affine_from_state",
    "affine_scale",
    "block_float",
    "block_float_codes",
    "code_range",
    "correct_mean_and_std",
    "distillation_loss",
    "fake_quantize_affine",
    "fake_quantize_affine_",
    "fake_quantize_log2",
    "feature_distance",
    "fold_q_bias",
    "fold_qk",
    "fp8",
    "fp8_codes",
    "fp8_scale",
    "freezing_step",
    "info_nce",
    "integer_layer_norm",
    "kure_loss",
    "kurtoses",
    "kurtosis",
    "log2_codes",
    "log_int_softmax",
    "logit_fitness",
    "lsq",
    "lsq_codes",
    "half_step_init_scale",
    "min_reliable_step",
    "relative_step",
    "lsq_init_scale",
    "mse_init_scale",
    "mean_abs",
    "min_max",
    "near_threshold",
    "observe",
    "oscillation_step",
    "round_ste",
    "soft_cross_entropy",
    "statsq",
    "statsq_codes",
    "statsq_codes_with_scale",
    "statsq_rms_scale",
    "statsq_scale",
    "statsq_with_scale",
    "view_along",
    "replace_frozen",
]
