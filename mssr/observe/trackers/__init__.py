"""Experiment trackers, which show a run's metrics: TensorBoard, Weights & Biases, MLflow, Trackio, SwanLab."""
