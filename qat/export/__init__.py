"""Frozen nets in files of other programs."""
