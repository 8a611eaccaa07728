"""Composition roots: the only code that sees a Hydra config. Each command is one module with one function of the same name."""
