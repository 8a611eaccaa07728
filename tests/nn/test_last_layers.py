"""Layers that are heads and stems. Oracle: the forward methods of Transformers' classes, read by hand."""

import pytest
import torch

import qat
from tests.hf_models import KINDS

HEADS = {
    "ViTForImageClassification": "classifier",
    "DeiTForImageClassificationWithTeacher": "cls_classifier distillation_classifier",
    "Dinov2WithRegistersModel": "",
    "CLIPVisionModelWithProjection": "visual_projection",
    "YolosForObjectDetection": "bbox_predictor.layers.2 class_labels_classifier.layers.2",
    "EomtForUniversalSegmentation": "class_predictor mask_head.fc3 upscale_block.block.0.conv2",
    "SegformerForSemanticSegmentation": "decode_head.classifier",
}
STEMS = {
    "Dinov2WithRegistersModel": "embeddings.patch_embeddings.projection",
    "SegformerForSemanticSegmentation": "segformer.stages.0.patch_embeddings.proj",
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_and_stems_have_bits_of_their_own(name):
    net = KINDS[name].converted(bits=4, head_bits=7, stem_bits=6)
    layers = {7: set(), 6: set(), 4: set()}
    for site in qat.iter_quantizers(net):
        layers[site.quantizer.spec.bits].add(site.layer)
    assert layers[7] == set(HEADS[name].split())
    assert len(layers[6]) == 1
    assert STEMS.get(name, "patch_embed") in layers[6].pop()


def test_heads_are_found_in_inference_mode():
    with torch.inference_mode():
        net = KINDS["ViTForImageClassification"].converted(bits=4, head_bits=7)
    assert net.classifier.weight_quantizer.spec.bits == 7


@pytest.mark.long
def test_heads_inside_of_a_base_model():
    net = KINDS["RTDetrV2ForObjectDetection"].converted(bits=4, head_bits=7)
    heads = {site.layer for site in qat.iter_quantizers(net) if site.quantizer.spec.bits == 7}
    of_decoder = {
        f"model.decoder.{kind}.1{end}"
        for kind, end in (("class_embed", ""), ("bbox_embed", ".layers.2"))
    }
    assert of_decoder | {"model.enc_score_head", "model.enc_bbox_head.layers.2"} <= heads
