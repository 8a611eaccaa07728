"""Commands: each module named like a command has one function of the same name.

Hydra configs do not go below these modules.
"""
