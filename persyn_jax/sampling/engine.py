"""A continuous-batching sampling engine: fixed slots, static shapes, shared prefixes read once.

`Engine.step` does one unit of work (read one chunk of waiting prompts, or decode a few tokens in
every slot); the caller decides in which thread. `Engine.generate` runs a list of requests to the
end.
"""

import functools
import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models import decoder
from persyn_jax.models.decoder import Params
from persyn_jax.models.weights import Model
from persyn_jax.sampling import programs
from persyn_jax.sampling.config import EngineConfig


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it."""

    tokens: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """Taken modulo 2**32."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""


@dataclass(frozen=True)
class Completion:
    """An answer."""

    text: str
    """Up to the first stop text; without EOS."""
    token_ids: tuple[int, ...]
    """All generated tokens but EOS: those that spell a stop text, or go on after it, included."""
    finish_reason: str
    """`stop` (EOS or a stop text) or `length` (`max_tokens` reached)."""
    prompt_tokens: int
    generated_tokens: int
    """With EOS, if it was generated."""


@dataclass
class Counters:
    """What the engine has done since it started."""

    decode_steps: int = 0
    decoded_tokens: int = 0
    """Tokens that became part of an answer; first tokens (they come from prefill) not counted."""
    prompt_tokens: int = 0
    """Prompt tokens that were read."""
    reused_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix pool instead."""

    @property
    def mean_slot_occupancy(self) -> float:
        """Useful tokens per decode step: at most the number of slots."""
        return self.decoded_tokens / max(self.decode_steps, 1)

    def as_dict(self) -> dict[str, float]:
        """All of them by name."""
        return asdict(self) | {"mean_slot_occupancy": self.mean_slot_occupancy}


@dataclass
class _Slot:
    """A request on its way."""

    ticket: int
    request: Request
    block_hashes: list[bytes]
    """Of every full chunk of the prompt, each over all tokens up to the chunk's end."""
    read: int = 0
    """Prompt tokens whose keys and values stand in the cache."""
    answer: list[int] = field(default_factory=list)

    @property
    def prefilling(self) -> bool:
        return self.read < len(self.request.tokens)


class Engine:
    """Slots, caches and a queue around three compiled programs. Not thread-safe: one thread drives.

    The programs are compiled here, once for all: a call with any other shape would be an error.
    Raises ConfigError when the model cannot take contexts of `config.cache_length`.
    """

    def __init__(self, model: Model, config: EngineConfig):
        if config.cache_length > model.config.max_positions:
            raise ConfigError(
                f"cache_length {config.cache_length} exceeds the model's context length of "
                f"{model.config.max_positions}"
            )
        self.config = config
        self.tokenizer = model.tokenizer
        self.counters = Counters()
        self._shape = model.config
        self._slots: list[_Slot | None] = [None] * config.slots
        self._waiting: deque[_Slot] = deque()
        self._tickets = 0
        self._cache = programs.empty_cache(self._shape, config.slots, config.cache_length)
        self._pool = programs.empty_cache(self._shape, config.prefix_blocks, config.prefill_chunk)
        self.load_params(model.params)
        self._compile()

    def _compile(self) -> None:
        rows, row_sampling = self._prefill_rows([])
        token_S, position_S, slot_sampling = self._decode_rows([])
        self._prefill = _compiled(
            functools.partial(programs.prefill, self._shape),
            (1, 2),
            (self._params, self._cache, self._pool, rows, row_sampling),
        )
        self._decode = _compiled(
            functools.partial(programs.decode, self._shape, self.config.decode_steps),
            (1,),
            (self._params, self._cache, token_S, position_S, slot_sampling),
        )
        self._load_blocks = _compiled(
            programs.load_blocks,
            (0,),
            (self._cache, self._pool, np.int32(0), self._no_blocks()),
        )

    def load_params(self, params: Params) -> None:
        """Takes over parameters (stacked) of the same shape, and forgets what the old ones read.

        Raises RuntimeError while requests are on their way.
        """
        if self.busy:
            raise RuntimeError("parameters cannot change under requests that are on their way")
        self._params: Params | None = None  # before the new ones come: both may not fit
        self._params = decoder.unroll(jax.tree.map(jax.numpy.asarray, params))
        # Where in the pool each block stands, oldest use first. Its places 0, 1, ... fill in turn.
        self._pool_places: OrderedDict[bytes, int] = OrderedDict()

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or on its way."""
        return bool(self._waiting) or any(slot is not None for slot in self._slots)

    def check(self, request: Request) -> None:
        """Raises ValueError, in one line, for a request that can never be served."""
        tokens, room = request.tokens, self.config.cache_length
        if not tokens:
            raise ValueError("the prompt is empty")
        if not 0 <= min(tokens) <= max(tokens) < self._shape.vocab_size:
            raise ValueError(f"token ids must be from 0 to {self._shape.vocab_size - 1}")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}, must be at least 1")
        if len(tokens) + request.max_tokens > room:
            raise ValueError(
                f"context too long: {len(tokens)} prompt tokens + max_tokens "
                f"{request.max_tokens} exceed the context length of {room}"
            )

    def submit(self, request: Request) -> int:
        """Queues a request. Returns the ticket under which `step` will hand out its completion.

        Raises ValueError as `check`.
        """
        self.check(request)
        self._tickets += 1
        hashes = _block_hashes(request.tokens, self.config.prefill_chunk)
        self._waiting.append(_Slot(self._tickets, request, hashes))
        return self._tickets

    def cancel(self, ticket: int) -> None:
        """Forgets a request, wherever it is; its slot is free at once."""
        self._waiting = deque(slot for slot in self._waiting if slot.ticket != ticket)
        self._slots = [None if s is not None and s.ticket == ticket else s for s in self._slots]

    def generate(self, requests: list[Request]) -> list[Completion]:
        """Answers all requests, in their order. For an engine that nobody else submits to."""
        tickets = [self.submit(request) for request in requests]
        done: dict[int, Completion] = {}
        while self.busy:
            done |= self.step()
        return [done[ticket] for ticket in tickets]

    def step(self) -> dict[int, Completion]:
        """One unit of work. Returns the completions that it finished, by ticket."""
        for index, slot in enumerate(self._slots):
            if slot is None and self._waiting:
                self._slots[index] = self._waiting.popleft()
        if any(slot is not None and slot.prefilling for slot in self._slots):
            return self._prefill_step()
        if any(slot is not None for slot in self._slots):
            return self._decode_step()
        return {}

    def _prefill_step(self) -> dict[int, Completion]:
        chosen = self._choose_prefills()
        rows, sampling = self._prefill_rows(chosen)
        self._cache, self._pool, token_R = self._prefill(
            self._params, self._cache, self._pool, rows, sampling
        )
        done = {}
        tokens = np.asarray(token_R).tolist()
        for (index, slot), length, token in zip(chosen, rows.length, tokens, strict=False):
            slot.read += int(length)
            self.counters.prompt_tokens += int(length)
            if not slot.prefilling:
                done |= self._append(index, slot, [token])
        return done

    def _choose_prefills(self) -> list[tuple[int, _Slot]]:
        """The slots that read a chunk now, once what the pool knows has been copied into them."""
        chosen: list[tuple[int, _Slot]] = []
        reading: set[bytes] = set()
        for index, slot in enumerate(self._slots):
            if slot is None or not slot.prefilling or len(chosen) == self.config.prefill_rows:
                continue
            self._load_known_prefix(index, slot)
            block = self._next_block(slot)
            last = slot.read + self.config.prefill_chunk >= len(slot.request.tokens)
            if block in reading and not last:
                continue  # another row reads the same text now: wait and copy it
            if block is not None:
                reading.add(block)
            chosen.append((index, slot))
        return chosen

    def _prefill_rows(
        self, chosen: list[tuple[int, _Slot]]
    ) -> tuple[programs.PrefillRows, programs.Sampling]:
        c = self.config
        tokens = np.zeros((c.prefill_rows, c.prefill_chunk), np.int32)
        slots = np.full(c.prefill_rows, c.slots, np.int32)  # none
        start, length = np.zeros(c.prefill_rows, np.int32), np.ones(c.prefill_rows, np.int32)
        store = np.full(c.prefill_rows, c.prefix_blocks, np.int32)  # nowhere
        for row, (index, slot) in enumerate(chosen):
            chunk = slot.request.tokens[slot.read : slot.read + c.prefill_chunk]
            tokens[row, : len(chunk)] = chunk
            slots[row], start[row], length[row] = index, slot.read, len(chunk)
            block = self._next_block(slot)
            if block is not None and block not in self._pool_places:
                store[row] = self._new_pool_place(block)
        rows = programs.PrefillRows(tokens, slots, start, length, store)
        return rows, _sampling([slot.request for _, slot in chosen], c.prefill_rows)

    def _next_block(self, slot: _Slot) -> bytes | None:
        """Hash of the chunk the slot reads next; None if that chunk is not a full one."""
        index = slot.read // self.config.prefill_chunk
        return slot.block_hashes[index] if index < len(slot.block_hashes) else None

    def _new_pool_place(self, block: bytes) -> int:
        """The pool's place for a new block: a free one, else that of the block unused longest.

        The pool has a place for each prefill row, so no block of one call takes another's place.
        """
        if len(self._pool_places) < self.config.prefix_blocks:
            place = len(self._pool_places)
        else:
            _, place = self._pool_places.popitem(last=False)
        self._pool_places[block] = place
        return place

    def _load_known_prefix(self, index: int, slot: _Slot) -> None:
        """Copies the chunks that the pool has, but for the last: its logits are needed."""
        chunk = self.config.prefill_chunk
        blocks, first = self._no_blocks(), slot.read // chunk
        end, last = first, (len(slot.request.tokens) - 1) // chunk
        while end < last and slot.block_hashes[end] in self._pool_places:
            self._pool_places.move_to_end(slot.block_hashes[end])
            blocks[end] = self._pool_places[slot.block_hashes[end]]
            end += 1
        if end > first:
            self._cache = self._load_blocks(self._cache, self._pool, np.int32(index), blocks)
            slot.read = end * chunk
            self.counters.reused_tokens += (end - first) * chunk

    def _no_blocks(self) -> np.ndarray:
        c = self.config
        return np.full(c.cache_length // c.prefill_chunk, c.prefix_blocks, np.int32)

    def _decode_step(self) -> dict[int, Completion]:
        active = [(index, slot) for index, slot in enumerate(self._slots) if slot is not None]
        self._cache, tokens = self._decode(self._params, self._cache, *self._decode_rows(active))
        self.counters.decode_steps += self.config.decode_steps
        token_SK = np.asarray(tokens).T.tolist()
        done = {}
        for index, slot in active:
            before = len(slot.answer)
            done |= self._append(index, slot, token_SK[index])
            self.counters.decoded_tokens += len(slot.answer) - before
        return done

    def _decode_rows(
        self, active: list[tuple[int, _Slot]]
    ) -> tuple[np.ndarray, np.ndarray, programs.Sampling]:
        """Each slot's newest token and its position; slots that are not in use write nowhere."""
        c = self.config
        token_S, position_S = (
            np.zeros(c.slots, np.int32),
            np.full(c.slots, c.cache_length, np.int32),
        )
        requests = [_IDLE] * c.slots
        for index, slot in active:
            token_S[index] = slot.answer[-1]
            position_S[index] = len(slot.request.tokens) + len(slot.answer) - 1
            requests[index] = slot.request
        return token_S, position_S, _sampling(requests, c.slots)

    def _append(self, index: int, slot: _Slot, tokens: list[int]) -> dict[int, Completion]:
        """Adds tokens to the answer until it ends; then frees the slot and drops the rest."""
        request = slot.request
        for token in tokens:
            slot.answer.append(token)
            if token == self.tokenizer.eos_token_id:
                return self._finish(index, slot, "stop")
            if request.stop and _first_stop(self._text(slot.answer), request.stop) is not None:
                return self._finish(index, slot, "stop")
            if len(slot.answer) == request.max_tokens:
                return self._finish(index, slot, "length")
        return {}

    def _finish(self, index: int, slot: _Slot, reason: str) -> dict[int, Completion]:
        self._slots[index] = None
        ended = slot.answer[-1] == self.tokenizer.eos_token_id
        answer = slot.answer[:-1] if ended else slot.answer
        text = self._text(answer)
        completion = Completion(
            text=text[: _first_stop(text, slot.request.stop)],
            token_ids=tuple(answer),
            finish_reason=reason,
            prompt_tokens=len(slot.request.tokens),
            generated_tokens=len(slot.answer),
        )
        return {slot.ticket: completion}

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


_IDLE = Request(tokens=(0,), max_tokens=1)


def _compiled(function: Callable, donated: tuple[int, ...], arguments: tuple) -> Any:
    return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()


def _sampling(requests: list[Request], rows: int) -> programs.Sampling:
    """The requests' sampling parameters, padded with greedy rows."""
    padded = requests + [_IDLE] * (rows - len(requests))
    return programs.Sampling(
        temperature=np.array([request.temperature for request in padded], np.float32),
        top_p=np.array([request.top_p for request in padded], np.float32),
        seed=np.array([request.seed % 2**32 for request in padded], np.uint32),
    )


def _block_hashes(tokens: tuple[int, ...], chunk: int) -> list[bytes]:
    digest = hashlib.sha256()
    hashes = []
    for start in range(0, len(tokens) - chunk + 1, chunk):
        digest.update(np.asarray(tokens[start : start + chunk], np.int32).tobytes())
        hashes.append(digest.digest())
    return hashes


def _first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first of the stop texts begins; None if there is none."""
    return min((place for wanted in stop if (place := text.find(wanted)) >= 0), default=None)
