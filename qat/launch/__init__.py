"""Processes of a run, the scheduler they run under, and the run directory."""
