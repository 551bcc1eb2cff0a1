"""What a run leaves to look at: metrics, a live display, curves, sampled rollouts. Nothing here touches training."""
