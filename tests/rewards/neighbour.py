"""What `behaviour.py` imports from its folder."""

VALUE = 0.75
