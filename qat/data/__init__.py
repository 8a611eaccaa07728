"""Datasets as LightningDataModules, one file each."""

from qat.data.base import DataSettings, ImageArrays, ImageData
from qat.data.cifar import Cifar10
from qat.data.digits import Digits

__all__ = ["Cifar10", "DataSettings", "Digits", "ImageArrays", "ImageData"]
