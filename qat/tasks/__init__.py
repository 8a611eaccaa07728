"""Commands: `train`, `evaluate`, `ptq`, `analyze` and `export`, each in a module of the same name.

Only this package and `qat.cli` get Hydra configs.
"""
