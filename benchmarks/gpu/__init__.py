"""What only a CUDA device can answer, in commands of nine minutes: `python -m benchmarks.gpu`, docs/gpu.md.

Needs neither Hydra nor Lightning.
"""
