"""The model being trained: loading, packing, and the DeepSpeed engine around it."""
