"""Advantages, value tracker, prompt sampling, shaping: pure functions and one table of algorithms."""
