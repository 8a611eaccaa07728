"""Write frozen models to files that other programs run."""
