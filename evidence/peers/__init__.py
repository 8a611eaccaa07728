"""Quantization-aware training with other libraries, for comparison."""
