"""Evidence for the numbers in README.md and docs/, and the scripts that measure them.

`claims/` describes runs and makes them, `records/` has their results, `pages/` is written from
both. `speed/` and `gpu/` measure time and memory, `peers/` trains with other libraries, and `logs/`
has the output of these and other scripts.
"""
