"""Files, shards and checks that every part of the package may use."""
