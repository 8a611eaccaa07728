"""Readable results: a page for each run, and a table of several runs.

Import the modules of this package only to write a page or a table.
"""
