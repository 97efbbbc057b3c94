"""A stage's process: starting children, stopping, saying how far the work is."""
