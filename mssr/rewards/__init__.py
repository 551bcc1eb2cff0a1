"""Grades responses: extracts the answer, compares it as mathematics in a killable process, and checks the format."""
