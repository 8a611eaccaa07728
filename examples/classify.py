"""Classify an image with a file of `export.py format=onnx`: onnxruntime, Pillow, numpy, no torch.

python examples/classify.py net.onnx cat.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

# Without PostScript, which Ghostscript would run.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def prepare(
    image: Image.Image,
    size: int,
    mean: list[float],
    std: list[float],
    interpolation: str,
    crop_pct: float | None,
    crop_mode: str = "center",
) -> np.ndarray:
    """Preprocess an image as in evaluation; the arguments are the file's `qat.preprocessing`.

    Returns:
        (1, C, H, W) float32: cropped to a square, or resized to one without `crop_pct`.
    """
    image = to_8bit(image).convert("L" if len(mean) == 1 else "RGB")
    if crop_pct is None:
        image = image.resize((size, size), INTERPOLATIONS["bicubic"])
    else:
        sides = resized_sides(image, int(size / crop_pct), crop_mode)
        image = image.resize(sides, INTERPOLATIONS[interpolation])
        border = 0
        if crop_mode == "border":
            border = tuple(round(255 * value) for value in mean)
        square = Image.new(image.mode, (size, size), border)
        corner = [centred(side, size, crop_mode) for side in sides]
        square.paste(image, (corner[0], corner[1]))
        image = square
    pixels = np.asarray(image, dtype=np.float32).reshape(size, size, -1) / 255
    pixels = (pixels - np.float32(mean)) / np.float32(std)
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def to_8bit(image: Image.Image) -> Image.Image:
    """Scale an image of 16 bits to 8 bits, since Pillow would clip it at 255."""
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 2**16 - 1:
        sys.exit(
            f"error: the image has 32 bits per pixel (mode {image.mode}) and no defined white "
            "level; save the image with 8 or 16 bits"
        )
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def resized_sides(image: Image.Image, size: int, crop_mode: str) -> tuple[int, int]:
    """Width and height before cropping.

    `size` is the length of the shorter side, of both sides (`squash`) or of the longer side
    (`border`).
    """
    width, height = image.size
    if crop_mode in {"center", "center_floor"}:
        shorter = min(width, height)
        return int(size * width / shorter), int(size * height / shorter)
    if crop_mode == "border":
        longer = max(width, height)
        return round(size * width / longer), round(size * height / longer)
    return size, size


def centred(side: int, size: int, crop_mode: str) -> int:
    """The first coordinate of a side that is centred in `size` pixels."""
    if side < size:
        return (size - side) // 2
    if crop_mode == "center_floor":
        return -((side - size) // 2)
    return -round((side - size) / 2)


def main(path: str, image: str) -> None:
    """Print the five likeliest classes."""
    options = onnxruntime.SessionOptions()
    # A file of format.cpu=fast needs this on an x86 processor without VNNI; docs/deployment.md.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "vnni" not in cpuinfo.read_text():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    preprocessing = json.loads(metadata["qat.preprocessing"])
    pixels = prepare(Image.open(image, formats=FORMATS), **preprocessing)
    (logits,) = session.run(["logits"], {"image": pixels})
    probabilities = np.exp(logits[0] - logits[0].max())
    probabilities /= probabilities.sum()
    names = json.loads(metadata["qat.classes"]) or list(map(str, range(len(probabilities))))
    for i in np.argsort(-probabilities)[:5]:
        print(f"{100 * probabilities[i]:5.1f} %  {names[i]}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/classify.py FILE.onnx IMAGE")
    main(*sys.argv[1:])
