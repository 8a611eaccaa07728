"""Datasets as LightningDataModules."""

from qat.data.arrays import ImageArrays
from qat.data.digits import Digits
from qat.data.image_data import ImageData
from qat.data.image_transform import image_transform
from qat.data.imagefolder import ImageFolder, ImageNet
from qat.data.mixup import BatchMixup
from qat.data.parquet import HfParquet
from qat.data.settings import DataSettings
from qat.data.timm_data import Timm
from qat.data.torchvision_data import Cifar10, FashionMnist

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
