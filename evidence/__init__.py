"""Evidence for the numbers in README.md and docs/, and the scripts that measure them.

`claims/` describes and executes runs, `records/` contains their results, and `pages/` is written
from both. `speed/` and `gpu/` measure time and memory, `peers/` trains with other libraries, and
`logs/` contains the output of these and other scripts.
"""
