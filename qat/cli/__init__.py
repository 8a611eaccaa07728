"""The command line: composition of the config, overrides, and mistakes made into lines."""
