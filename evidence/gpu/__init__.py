"""Measurements on a CUDA device, in commands of nine minutes: `python -m evidence.gpu`.

See evidence/gpu/README.md. Needs neither Hydra nor Lightning.
"""
