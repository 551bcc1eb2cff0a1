"""Studies: compare arms x seeds at equal cost."""
