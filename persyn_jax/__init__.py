"""persyn_jax: small language models that learn from many large ones, trained by gossip, in JAX.

Array names carry their shape as a suffix, one letter an axis; inside `shard_map` the worker axis W
is gone:

    W workers     B batch (rows)   T tokens of a row   R response tokens of a row   D model width
    V vocabulary  H query heads    K key/value heads   E width of a head            L layers
    M teachers    N prompts        S slots of the sampling engine                   C cache length

Records and NumPy live in the rooms `routing`, `evaluation` and `store`; JAX in `models`, `gossip`,
`training` and `sampling`. `from persyn_jax import gossip` stands alone and knows nothing of
language models.
"""

__version__ = "0.1.0"
