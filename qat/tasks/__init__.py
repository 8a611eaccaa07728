"""Commands: each module named like a command has one function of the same name.

Modules outside this package do not get Hydra configs.
"""
