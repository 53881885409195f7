"""Training: one pure step for router and student, under gossip. Knows nothing of teachers."""
