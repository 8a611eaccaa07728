"""What only a CUDA device can answer, in commands of nine minutes: `python -m evidence.gpu`, evidence/gpu/README.md.

Needs neither Hydra nor Lightning.
"""
