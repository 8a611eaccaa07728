"""Nets that other code has trained, read into ours."""

from qat.interop.ofq import OfqNet, is_ofq, load_ofq_checkpoint, net_from_ofq

__all__ = ["OfqNet", "is_ofq", "load_ofq_checkpoint", "net_from_ofq"]
