"""The command line: compose the config, apply overrides, and print mistakes as one line."""
