"""Names what is on an image, with a file of `export.py format=onnx` alone: onnxruntime, Pillow and numpy, no torch.

python examples/classify.py net.onnx cat.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "TIFF",
    "WEBP",
)  # a PostScript file would be run by Ghostscript
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
    """An image as the net saw images, (1, C, H, W) float32: cropped to a square, or squeezed into it where there is no `crop_pct`."""
    if image.mode[0] in "IF":  # more than 8 bits, which Pillow would cut off at 255
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 2**16 - 1:
            sys.exit(
                f"error: the image has 32 bits per pixel (mode {image.mode}) and no defined white level; save it with 8 or 16"
            )
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    image = image.convert("L" if len(mean) == 1 else "RGB")
    if crop_pct is None:
        image = image.resize((size, size), INTERPOLATIONS["bicubic"])
    else:
        scaled = int(size / crop_pct)
        sides = {
            "center": [int(scaled * side / min(image.size)) for side in image.size],
            "squash": [scaled, scaled],
            "border": [round(scaled * side / max(image.size)) for side in image.size],
        }[crop_mode]
        around = (
            tuple(round(255 * value) for value in mean) if crop_mode == "border" else None
        )  # black
        square = Image.new(image.mode, (size, size), around or 0)
        place = tuple(
            (size - side) // 2 if side < size else -round((side - size) / 2) for side in sides
        )
        square.paste(image.resize(sides, INTERPOLATIONS[interpolation]), place)
        image = square
    pixels = np.asarray(image, dtype=np.float32).reshape(size, size, -1) / 255
    pixels = (pixels - np.float32(mean)) / np.float32(std)
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def main(path: str, image: str) -> None:
    """Print the five likeliest classes."""
    options = onnxruntime.SessionOptions()
    # A file of format.cpu=fast needs this on an x86 processor without VNNI; docs/deployment.md.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "vnni" not in cpuinfo.read_text():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # What the file says of itself: treatment of images, names of classes.
    said = {
        key: json.loads(value)
        for key, value in session.get_modelmeta().custom_metadata_map.items()
        if key.startswith("qat.")
    }
    (logits,) = session.run(
        ["logits"],
        {"image": prepare(Image.open(image, formats=FORMATS), **said["qat.preprocessing"])},
    )
    shares = np.exp(logits[0] - logits[0].max())
    shares /= shares.sum()
    names = said["qat.classes"] or [str(i) for i in range(len(shares))]
    for i in np.argsort(-shares)[:5]:
        print(f"{100 * shares[i]:5.1f} %  {names[i]}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/classify.py FILE.onnx IMAGE")
    main(*sys.argv[1:])
