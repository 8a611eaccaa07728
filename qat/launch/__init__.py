"""The processes of a run, their scheduler, and the run directory."""
