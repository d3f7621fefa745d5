"""Training on a CPU: faster projections, and how long a step takes."""
