"""Trackers: TensorBoard, MLflow or a class of the user's own get one call a round."""
