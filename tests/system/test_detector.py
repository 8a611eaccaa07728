"""A detector of Transformers from end to end. Oracle: the float model, trained as long."""

import copy

import pytest
import torch

import qat

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("faster_coco_eval")

SIZE = 64
SQUARE, DISC, TRIANGLE = range(3)
STEPS = 600
LR = 1e-3
# For both models that are trained further. At 1e-3, 4 bits cost 3 points instead of 1.
FURTHER_LR = 4e-3


def shape(kind, x, y, side):
    """A mask of one shape in a square box."""
    rows = torch.arange(SIZE)[:, None] - y + 0.5
    columns = torch.arange(SIZE) - x + 0.5
    inside = (rows > 0) & (rows < side) & (columns > 0) & (columns < side)
    if kind == DISC:
        inside &= (columns - side / 2) ** 2 + (rows - side / 2) ** 2 <= (side / 2) ** 2
    if kind == TRIANGLE:
        inside &= (columns - side / 2).abs() * 2 <= rows
    return inside


def scene(seed):
    """An image with one to three coloured shapes, and their classes and boxes."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    image = 0.15 * torch.randn(3, SIZE, SIZE, generator=generator)
    kinds, boxes = [], []
    for _ in range(integer(1, 4)):
        side = integer(14, 30)
        x, y = integer(0, SIZE - side), integer(0, SIZE - side)
        kind = integer(0, 3)
        colour = (1 + torch.rand(3, generator=generator)) * (1 if integer(0, 2) else -1)
        image[:, shape(kind, x, y, side)] = colour[:, None]
        kinds.append(kind)
        boxes.append([(x + side / 2) / SIZE, (y + side / 2) / SIZE, side / SIZE, side / SIZE])
    labels = {"class_labels": torch.tensor(kinds), "boxes": torch.tensor(boxes)}
    return {"pixel_values": image, "labels": labels}


def collate(scenes):
    return {
        "pixel_values": torch.stack([scene["pixel_values"] for scene in scenes]),
        "labels": [scene["labels"] for scene in scenes],
    }


def build():
    """An RT-DETRv2 of 1.5 M parameters."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrV2Config(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        d_model=96,
        encoder_hidden_dim=96,
        encoder_in_channels=[64, 96, 128],
        encoder_ffn_dim=192,
        encoder_layers=1,
        encoder_attention_heads=4,
        decoder_in_channels=[96, 96, 96],
        decoder_layers=2,
        decoder_ffn_dim=192,
        decoder_attention_heads=4,
        decoder_n_points=2,
        hidden_expansion=0.5,
        num_queries=20,
        num_denoising=20,
        num_labels=3,
        anchor_image_size=None,
    )
    return transformers.RTDetrV2ForObjectDetection(config)


def fit(model, scenes, folder, steps, lr):
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=1e-4,
        max_grad_norm=0.1,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=scenes, data_collator=collate)
    trainer.train()
    return model.eval()


@torch.no_grad()
def mean_average_precision(model, scenes):
    """In percent, at overlaps of 0.5 to 0.95."""
    detection = pytest.importorskip("torchmetrics.detection")
    metric = detection.MeanAveragePrecision(box_format="cxcywh", backend="faster_coco_eval")
    for start in range(0, len(scenes), 32):
        batch = collate(scenes[start : start + 32])
        out = model(batch["pixel_values"])
        scores, classes = out.logits.sigmoid().max(-1)
        found = [
            {"boxes": boxes * SIZE, "scores": score, "labels": label}
            for boxes, score, label in zip(out.pred_boxes, scores, classes, strict=True)
        ]
        there = [
            {"boxes": labels["boxes"] * SIZE, "labels": labels["class_labels"]}
            for labels in batch["labels"]
        ]
        metric.update(found, there)
    return 100 * float(metric.compute()["map"])


@pytest.mark.long
def test_a_detector_at_four_bits_is_nearly_as_precise_as_in_float(tmp_path):
    """Numbers of queries differ between training and evaluation: one step size per tensor."""
    transformers.set_seed(0)
    scenes = [scene(seed) for seed in range(2000)]
    others = [scene(10**6 + seed) for seed in range(256)]
    start = fit(build(), scenes, tmp_path, 4 * STEPS, LR)
    control = fit(copy.deepcopy(start), scenes, tmp_path, STEPS, FURTHER_LR)
    recipe = qat.recipe("lsq", bits=4, act_scales="tensor", step_init="mse")
    model = qat.convert(copy.deepcopy(start), recipe, input_size=(3, SIZE, SIZE))
    qat.initialize_scales(model, [collate(scenes[:64])["pixel_values"]])
    fit(model, scenes, tmp_path, STEPS, FURTHER_LR)
    in_float = mean_average_precision(control, others)
    assert in_float > 60
    # Measured with one thread: 81.3 in float, 80.4 at 4 bits.
    assert mean_average_precision(model, others) > in_float - 2
    images = collate(others[:8])["pixel_values"]
    path = tmp_path / "net.onnx"
    checked = qat.export_onnx(model, path, images=images, dynamic_batch=False)
    agreement = checked.agreement["onnxruntime"]
    assert agreement.same_top1 == 8
    assert agreement.boxes < 1e-4
