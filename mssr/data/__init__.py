"""Reads rows from files or the hub, turns rows into prompts, and chooses the prompts of each step."""
