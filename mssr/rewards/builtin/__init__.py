"""Reward functions that come with the package, one a file, found by name: `reward.function: choice`.

Each has the form of a user's own and runs in the same workers. `check`, where a function has it, is called once with the
options when the function is loaded, and refuses wrong values.
"""
