"""The smallest model of each kind of Transformers' vision models, for tests and docs/transformers_models.md."""

import operator
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.nets import Convertible
from tests.tiny import identical, shake

transformers = pytest.importorskip("transformers")

_PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_VIT = {**_PLAIN, "image_size": 32, "patch_size": 8}
_LABELS = {"num_labels": 5}
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
_STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
_RESNET = {"model_type": "resnet", "embedding_size": 8, "layer_type": "basic", **_STAGES}
_DETR = {
    "backbone_config": {**_RESNET, "out_features": ["stage4"]},
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 6,
}
_THREE_STAGES = {"out_features": ["stage2", "stage3", "stage4"]}
_RT_BACKBONE = {**_RESNET, "model_type": "rt_detr_resnet", **_THREE_STAGES}
_RT_DETR = {
    "backbone_config": _RT_BACKBONE,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 16, 32],
    "encoder_layers": 1,
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_queries": 6,
    "num_denoising": 0,
    "anchor_image_size": None,
    "hidden_expansion": 0.5,
}
_MASK_DECODER = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_attention_heads": 2,
    "num_queries": 6,
}
_FOUR_SWIN = {
    "model_type": "swin",
    "image_size": 64,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


@dataclass(frozen=True)
class Kind(Convertible):
    """A class of Transformers.

    Attributes:
        title: name that users know.
        architecture: the class.
        settings: of its config.
        size: of the images.
    """

    title: str
    architecture: str
    settings: dict = field(default_factory=dict)
    size: int = 32

    preset = "seq"

    @property
    def cls(self):
        """The class itself."""
        return operator.attrgetter(self.architecture)(transformers)

    def config(self, **changes):
        """A config of its own."""
        return self.cls.config_class.from_dict({**self.settings, "dtype": "float32", **changes})

    def build(self, **changes):
        """The model in eval mode, every parameter drawn so that none is zero."""
        torch.manual_seed(0)
        return shake(self.cls(self.config(**changes))).eval()


def outputs(model, x, **options):
    """All tensors that a model returns, in eval mode."""
    torch.manual_seed(0)  # ViT-MAE draws its mask
    with torch.no_grad():
        leaves = tree_leaves(dict(model.eval()(x, **options)))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def are_equal(ours, theirs):
    """True if tensors are equal to the bit."""
    return len(ours) == len(theirs) > 0 and identical(ours, theirs)


KINDS = {
    kind.architecture: kind
    for kind in (
        Kind("ViT", "ViTForImageClassification", {**_VIT, **_LABELS}),
        Kind("DeiT, distilled", "DeiTForImageClassificationWithTeacher", {**_VIT, **_LABELS}),
        Kind(
            "BEiT",
            "BeitForImageClassification",
            {**_VIT, **_LABELS, "use_relative_position_bias": True},
        ),
        Kind("Data2Vec", "Data2VecVisionForImageClassification", {**_VIT, **_LABELS}),
        Kind("DINOv2", "Dinov2ForImageClassification", {**_VIT, **_LABELS}),
        Kind("DINOv2 with registers", "Dinov2WithRegistersModel", _VIT),
        Kind("DINOv3", "DINOv3ViTModel", {**_VIT, "num_register_tokens": 2}),
        Kind("CLIP", "CLIPVisionModel", _VIT),
        Kind(
            "CLIP with projection", "CLIPVisionModelWithProjection", {**_VIT, "projection_dim": 16}
        ),
        Kind("SigLIP", "SiglipVisionModel", _VIT),
        Kind("AIMv2", "Aimv2VisionModel", _VIT),
        Kind("I-JEPA", "IJepaModel", _VIT),
        Kind("ViT-MSN", "ViTMSNModel", _VIT),
        Kind(
            "ViT-MAE",
            "ViTMAEModel",
            _VIT,
        ),
        Kind(
            "DPT",
            "DPTForDepthEstimation",
            {
                **_VIT,
                "num_hidden_layers": 4,
                "backbone_out_indices": [0, 1, 2, 3],
                "neck_hidden_sizes": [8, 8, 16, 16],
                "fusion_hidden_size": 16,
                "reassemble_factors": [4, 2, 1, 0.5],
            },
        ),
        Kind(
            "YOLOS",
            "YolosForObjectDetection",
            {
                **_VIT,
                **_LABELS,
                "image_size": [32, 32],
                "num_detection_tokens": 4,
            },
        ),
        Kind(
            "ViTPose",
            "VitPoseForPoseEstimation",
            {
                "backbone_config": {
                    **_VIT,
                    "model_type": "vitpose_backbone",
                    "image_size": [32, 32],
                    "patch_size": [8, 8],
                    "out_features": ["stage2"],
                },
                "num_labels": 3,
            },
        ),
        Kind("DETR", "DetrForObjectDetection", {**_DETR, **_LABELS}, 64),
        Kind("Conditional DETR", "ConditionalDetrForObjectDetection", {**_DETR, **_LABELS}, 64),
        Kind(
            "Deformable DETR",
            "DeformableDetrForObjectDetection",
            {
                **_DETR,
                **_LABELS,
                "backbone_config": {**_RESNET, **_THREE_STAGES},
                "num_feature_levels": 3,
                "decoder_layers": 2,
            },
            64,
        ),
        Kind("RT-DETR", "RTDetrForObjectDetection", {**_RT_DETR, **_LABELS}, 64),
        Kind("RT-DETRv2", "RTDetrV2ForObjectDetection", {**_RT_DETR, **_LABELS}, 64),
        Kind(
            "D-FINE",
            "DFineForObjectDetection",
            {
                **_RT_DETR,
                **_LABELS,
                "encode_proj_layers": [2],
                "num_feature_levels": 3,
                "decoder_n_points": [2, 2, 2],
                "max_num_bins": 8,
                "backbone_config": {
                    "model_type": "hgnet_v2",
                    "hidden_sizes": [16, 16, 16, 32],
                    "stem_channels": [3, 8, 8],
                    "stage_in_channels": [8, 16, 16, 16],
                    "stage_mid_channels": [8, 8, 8, 8],
                    "stage_out_channels": [16, 16, 16, 32],
                    "stage_num_blocks": [1, 1, 1, 1],
                    "stage_downsample": [False, True, True, True],
                    "stage_light_block": [False, False, True, True],
                    "stage_kernel_size": [3, 3, 3, 3],
                    "stage_numb_of_layers": [1, 1, 1, 1],
                    **_THREE_STAGES,
                },
            },
            64,
        ),
        Kind(
            "RF-DETR",
            "RfDetrForObjectDetection",
            {
                **_LABELS,
                "backbone_config": {
                    **_VIT,
                    "model_type": "rf_detr_dinov2",
                    "num_windows": 1,
                    "out_features": ["stage2"],
                    "image_size": 64,
                },
                "d_model": 32,
                "decoder_layers": 1,
                "decoder_self_attention_heads": 2,
                "decoder_cross_attention_heads": 2,
                "decoder_ffn_dim": 64,
                "num_queries": 6,
                "group_detr": 1,
                "hidden_expansion": 0.5,
            },
            64,
        ),
        Kind(
            "MaskFormer",
            "MaskFormerForInstanceSegmentation",
            {
                **_LABELS,
                "backbone_config": _FOUR_SWIN,
                "decoder_config": {"model_type": "detr", **_DETR},
                "mask_feature_size": 32,
                "fpn_feature_size": 32,
            },
            64,
        ),
        Kind(
            "Mask2Former",
            "Mask2FormerForUniversalSegmentation",
            {
                **_LABELS,
                **_MASK_DECODER,
                "backbone_config": _FOUR_SWIN,
            },
            64,
        ),
        Kind(
            "EoMT",
            "EomtForUniversalSegmentation",
            {
                **_VIT,
                **_LABELS,
                "num_blocks": 1,
                "num_queries": 4,
                "num_upscale_blocks": 1,
                "num_register_tokens": 1,
            },
        ),
        Kind(
            "SegFormer",
            "SegformerForSemanticSegmentation",
            {
                **_LABELS,
                **_STAGES,
                "num_attention_heads": [1, 2, 2, 2],
                "decoder_hidden_size": 16,
            },
            64,
        ),
        Kind("Swin", "SwinForImageClassification", {**_SWIN, **_LABELS, "image_size": 32}),
        Kind("Swin v2", "Swinv2ForImageClassification", {**_SWIN, **_LABELS, "image_size": 32}),
        Kind(
            "PVT v2",
            "PvtV2ForImageClassification",
            {
                **_LABELS,
                "image_size": 32,
                **_STAGES,
                "num_attention_heads": [1, 2, 2, 2],
                "mlp_ratios": [2, 2, 2, 2],
            },
        ),
        Kind(
            "Hiera",
            "HieraForImageClassification",
            {
                **_LABELS,
                "image_size": [32, 32],
                "embed_dim": 16,
                "depths": [1, 1],
                "num_heads": [1, 2],
                "patch_size": [3, 3],
                "patch_stride": [2, 2],
                "patch_padding": [1, 1],
                "num_query_pool": 1,
                "query_stride": [2, 2],
                "masked_unit_size": [4, 4],
                "masked_unit_attention": [True, False],
                "embed_dim_multiplier": 2.0,
            },
        ),
        Kind(
            "ConvNeXt V2",
            "ConvNextV2ForImageClassification",
            {
                **_LABELS,
                "image_size": 32,
                **_STAGES,
            },
        ),
        Kind(
            "MobileViT",
            "MobileViTForImageClassification",
            {
                **_LABELS,
                "image_size": 64,
                "hidden_sizes": [16, 16, 32],
                "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
                "num_attention_heads": 2,
            },
            64,
        ),
        Kind(
            "LeViT",
            "LevitForImageClassification",
            {
                **_LABELS,
                "image_size": 64,
                "hidden_sizes": [16, 16, 32],
                "num_attention_heads": [1, 2, 2],
                "depths": [1, 1, 1],
                "key_dim": [8, 8, 8],
                "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
            },
            64,
        ),
        Kind(
            "SAM",
            "SamVisionModel",
            {
                **_VIT,
                "output_channels": 8,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 64,
            },
        ),
    )
}
REFUSED = {
    kind.architecture: kind
    for kind in (
        Kind("SigLIP 2", "Siglip2VisionModel", {**_PLAIN, "patch_size": 8, "num_patches": 16}),
        Kind("VideoMAE", "VideoMAEForVideoClassification", {**_VIT, **_LABELS, "num_frames": 2}),
        Kind(
            "V-JEPA 2",
            "VJEPA2Model",
            {
                **_VIT,
                "crop_size": 32,
                "pred_hidden_size": 32,
                "pred_num_attention_heads": 2,
                "pred_num_hidden_layers": 1,
            },
        ),
        Kind(
            "Qwen2-VL",
            "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
            {"embed_dim": 32, "depth": 1, "num_heads": 2, "hidden_size": 32},
        ),
        Kind("BERT", "BertModel", _PLAIN),
        Kind("CLIP with text", "CLIPModel", {"vision_config": _VIT, "text_config": _PLAIN}),
    )
}
