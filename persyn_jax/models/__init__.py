"""Models as pure functions over a parameter pytree. The only room that imports flax."""
