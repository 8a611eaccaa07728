"""Claims, one yaml file each, with their runs and the records of the runs."""
