"""Where weights and activations live, and in what precision."""
