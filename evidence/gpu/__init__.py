"""What only a CUDA device can answer, in commands of nine minutes: `python -m evidence.gpu`, docs/gpu.md.

Needs neither Hydra nor Lightning.
"""
