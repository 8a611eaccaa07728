"""Processes of a run, the scheduler they run under, and who may write into a run directory."""
