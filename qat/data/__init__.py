"""Datasets, as LightningDataModules."""

from qat.data.image_data import ImageData
from qat.data.image_transform import image_transform
from qat.data.imagefolder import ImageFolder, ImageNet
from qat.data.parquet import HfParquet
from qat.data.settings import DataSettings
from qat.data.small_sets import Cifar10, Digits, FashionMnist
from qat.data.sources import ImageArrays
from qat.data.timm_data import Timm
from qat.data.transforms import BatchMixup

__all__ = [
    "BatchMixup",
    "Cifar10",
    "DataSettings",
    "Digits",
    "FashionMnist",
    "HfParquet",
    "ImageArrays",
    "ImageData",
    "ImageFolder",
    "ImageNet",
    "Timm",
    "image_transform",
]
