"""Write small files in the formats of datasets."""

import hashlib
import pickle
import struct

import numpy as np
from PIL import Image

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
# Settings of most tests: images of 8 x 8 pixels in colour, two classes.
SETTINGS = {
    "image_size": 8,
    "patch_size": 4,
    "in_chans": 3,
    "num_classes": 2,
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
}
GREY = {"in_chans": 1, "mean": [0.5], "std": [0.25]}
# The bundled digits.
DIGITS = {
    "image_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "mean": [0.25],
    "std": [0.5],
}


def rows(images, labels):
    """Pixels and label of each image, sorted."""
    return sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def write_fashion_mnist(root, train=40, test=10):
    """Write random images of four classes as torchvision unpacks them; return the arrays."""
    rng = np.random.default_rng(0)
    made = {}
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, n in (("train", train), ("t10k", test)):
        made[prefix] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n) % 4
        for kind, array in zip(("images-idx3", "labels-idx1"), made[prefix], strict=True):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(
                header + array.astype(np.uint8).tobytes()
            )
    return made


def write_cifar_batches(root, n=8):
    """Write `cifar-10-batches-py` with random images of four classes.

    Returns:
        Images (N, 32, 32, 3) and labels of each file, and the checksum of each file.
    """
    rng = np.random.default_rng(0)
    made = {}
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in BATCHES:
        made[name] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), [i % 4 for i in range(n)]
        content = {
            "data": made[name][0].transpose(0, 3, 1, 2).reshape(n, -1),
            "labels": made[name][1],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b", "c", "d"]}))
    return made, {
        path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()
    }


def write_image(path, height, width, value=None, seed=0):
    """Write an image of one colour, or else a random image; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels if value is None else np.full_like(pixels, value)).save(path)
    return path


def write_folder(root, splits=(("train", 20), ("val", 4)), classes=("ant", "bee"), size=None):
    """Write an image folder with JPEG and PNG files, of several sizes if `size` is None."""
    for split, n in splits:
        for c, name in enumerate(classes):
            for i in range(n):
                height, width = (size, size) if size else (12 + i % 5, 18 - i % 3)
                write_image(
                    root / split / name / f"{i:03}.{('png', 'JPEG')[i % 2]}",
                    height,
                    width,
                    seed=1000 * c + i,
                )
    return root
