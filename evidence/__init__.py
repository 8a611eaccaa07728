"""Evidence for what the papers claim: runs described in `claims/`, their records in `results/`, and the page made of both."""
