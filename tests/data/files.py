"""Small files in the formats that datasets come in."""

import gzip
import pickle
import struct

import numpy as np
from PIL import Image

from qat.data import DataSettings
from qat.data.encoded import decoded
from qat.data.parquet import ParquetImages

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def settings(chans=3, **changes):
    """Those of images of 8 x 8 pixels of two classes."""
    fixed = {"image_size": 8, "patch_size": 4, "in_chans": chans, "num_classes": 2, "mean": [0.5] * chans, "std": [0.25] * chans}
    return DataSettings(**{**fixed, "cache": False, **changes})


def read_parquet(files, chans=3, **changes):
    """All images of parquet files, decoded."""
    return decoded(ParquetImages(files), settings(chans, **changes))


def write_idx(path, array):
    """An idx file of unsigned bytes, gzipped if its name says so."""
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion_mnist(root, train=40, test=10, suffix=".gz"):
    """Random images of four classes; gives the arrays back."""
    rng = np.random.default_rng(0)
    made = {}
    for prefix, n in (("train", train), ("t10k", test)):
        made[prefix] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n) % 4
        write_idx(root / f"{prefix}-images-idx3-ubyte{suffix}", made[prefix][0])
        write_idx(root / f"{prefix}-labels-idx1-ubyte{suffix}", made[prefix][1])
    return made


def text(value):
    """A `str` of Python 2 in a pickle."""
    return b"T" + struct.pack("<I", len(value)) + value


def python2_batch(data, labels):
    """The bytes that Python 2's cPickle wrote for a batch: byte strings, `numpy.core.multiarray`, protocol 2."""
    n, length = data.shape
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"M" + struct.pack("<H", n) + b"M" + struct.pack("<H", length) + b"\x86"
    state = b"(K\x01" + shape + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"batch_label") + text(b"a batch") + text(b"labels") + numbers + text(b"data") + array + state + b"u."


def write_cifar_batches(root, n=8):
    """The six files of `cifar-10-batches-py` with random images of four classes; gives (N, 32, 32, 3) and labels by file name."""
    rng = np.random.default_rng(0)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    made = {}
    for name in BATCHES:
        pixels = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        made[name] = pixels, [i % 4 for i in range(n)]
        (folder / name).write_bytes(python2_batch(pixels.transpose(0, 3, 1, 2).reshape(n, -1), made[name][1]))
    return made


def python3_batch(data, labels, protocol=2):
    """The same as today's Python writes it."""
    return pickle.dumps({b"data": data, b"labels": labels}, protocol=protocol)


def write_image(path, height, width, value=None, seed=0):
    """An image file of one colour, or a random one; gives the path back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels if value is None else np.full_like(pixels, value)).save(path)
    return path


def write_folder(root, splits=(("train", 20), ("val", 4)), classes=("ant", "bee"), size=None):
    """An image folder; images are of different sizes unless one is given, JPEG and PNG in turns."""
    for split, n in splits:
        for c, name in enumerate(classes):
            for i in range(n):
                height, width = (size, size) if size else (12 + i % 5, 18 - i % 3)
                write_image(root / split / name / f"{i:03}.{('png', 'JPEG')[i % 2]}", height, width, seed=1000 * c + i)
    return root
