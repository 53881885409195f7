"""Measurements of the parts: what they cost, what the compiler makes of them."""
