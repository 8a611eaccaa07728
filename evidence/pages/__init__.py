"""Pages and figures, written from claims and records."""
