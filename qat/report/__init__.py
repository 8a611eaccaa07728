"""Reports of results: a page for each run or sweep, and a table of several runs.

Only code that writes a page or a table should import the modules of this package, because they
import matplotlib.
"""
