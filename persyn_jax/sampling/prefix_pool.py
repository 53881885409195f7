"""Which chunks of recently read prompts the prefix pool holds, and where."""

import hashlib
from collections import OrderedDict

import numpy as np


def block_hashes(tokens: tuple[int, ...], chunk: int) -> list[bytes]:
    """Of every full chunk of a prompt: a hash over all tokens up to the chunk's end."""
    digest = hashlib.sha256()
    hashes = []
    for start in range(0, len(tokens) - chunk + 1, chunk):
        digest.update(np.asarray(tokens[start : start + chunk], np.int32).tobytes())
        hashes.append(digest.digest())
    return hashes


class PrefixPool:
    """The places 0, 1, ... of a pool of blocks; a new block takes the place unused longest."""

    def __init__(self, places: int):
        self._size = places
        self._places: OrderedDict[bytes, int] = OrderedDict()  # oldest use first

    def __contains__(self, block: bytes) -> bool:
        return block in self._places

    def use(self, block: bytes) -> int | None:
        """The place where the block stands, now used last; None if it is not there."""
        if block in self._places:
            self._places.move_to_end(block)
        return self._places.get(block)

    def add(self, block: bytes) -> int:
        """The place for a new block: a free one, else that of the block unused longest."""
        if len(self._places) < self._size:
            place = len(self._places)
        else:
            _, place = self._places.popitem(last=False)
        self._places[block] = place
        return place

    def clear(self) -> None:
        """Forgets all blocks."""
        self._places.clear()
