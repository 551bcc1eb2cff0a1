"""Data: rows of any source, rows to prompts, prompts to steps."""
