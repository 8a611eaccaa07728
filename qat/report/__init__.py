"""Results of runs for people: a page for each run, a table of several.

Import its modules only to write one.
"""
