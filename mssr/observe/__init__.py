"""Metrics, live display, curves and sampled rollouts of a run. Nothing here changes training."""
