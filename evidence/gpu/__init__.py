"""Measurements on a CUDA device, in commands of nine minutes: `python -m evidence.gpu`.

See evidence/gpu/README.md. The package needs neither Hydra nor Lightning.
"""
