"""Training: the objective, the loop, optimisers, the run folder, metrics and metadata."""
