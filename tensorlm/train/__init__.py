"""Training: the loop, the step, the engine. Exports nothing: the engine imports DeepSpeed."""
