"""Claims, a yaml file each: their runs, and the records of those."""
