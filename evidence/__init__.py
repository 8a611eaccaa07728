"""Evidence for what the papers claim: runs described in `claims/`, their records, the pages made of both; and what speed is measured by."""
