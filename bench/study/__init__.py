"""Arms x seeds at equal cost: run, read, compare, report."""
