"""From rewards to routes and a verdict on them. NumPy on records, no JAX."""
