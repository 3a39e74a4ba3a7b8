"""HTTP handling common to all dialects."""
