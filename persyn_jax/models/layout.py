"""How the chips of a mesh share a decoder's parameters and work."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

GATHERED = "gathered"
"""`jax.ad_checkpoint.checkpoint_name` of parameters that a layout has gathered."""


class Layout(NamedTuple):
    """Parameters arrive as each chip holds them, batches are the chip's own rows.

    `training.sharded` makes them.
    """

    gather: Callable[[str, Any], Any]
    """(part, parameters) -> the parameters that this chip works with; of `layers`, one layer's."""
    parts: int
    """Among how many chips heads and feed-forward features are divided."""
    sum_parts: Callable[[jax.Array], jax.Array]
    """Sums what those chips contribute to a layer's output."""
    share: Callable[[Any], Any]
    """This chip's share of arrays [B, R] that those chips all hold."""
    total: Callable[[jax.Array], jax.Array]
    """Sums over all chips that work on one batch."""


WHOLE = Layout(
    gather=lambda part, params: params,
    parts=1,
    sum_parts=lambda x: x,
    share=lambda tree: tree,
    total=lambda x: x,
)
"""One chip has it all."""
