"""The algorithms as pure functions: advantages, value tracker, prompt sampling."""
