"""A continuous-batching sampling engine: a fixed number of slots, static shapes, shared prefixes read once.

`Engine.step` does one unit of work (read one chunk of waiting prompts, or decode a few tokens in every slot); the caller
decides in which thread. `Engine.generate` runs a list of requests to the end.
"""

import functools
import hashlib
from collections import OrderedDict, deque
from dataclasses import asdict, dataclass, field

import jax
import numpy as np
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
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""


@dataclass(frozen=True)
class Completion:
    """An answer. `token_ids` leaves out EOS; `finish_reason` is `stop` (EOS or a stop text) or `length`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    """With EOS, if it was generated."""


@dataclass
class Counters:
    """What the engine has done since it started."""

    decode_steps: int = 0
    decoded_tokens: int = 0
    """Tokens that became part of an answer, first tokens (they come from prefill) not counted."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix pool."""

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
    """Slots, caches and a queue around the compiled programs. Not thread-safe: one thread drives it."""

    def __init__(self, model: Model, config: EngineConfig):
        self.config = config
        self.tokenizer = model.tokenizer
        self.counters = Counters()
        shape = model.config
        self._cache = programs.empty_cache(shape, config.slots, config.cache_length)
        self._pool = programs.empty_cache(shape, config.prefix_blocks, config.prefill_chunk)
        self.load_params(model.params)
        self._slots: list[_Slot | None] = [None] * config.slots
        self._waiting: deque[_Slot] = deque()
        self._tickets = 0
        self._prefill = jax.jit(
            functools.partial(programs.prefill, shape), donate_argnums=(1, 2)
        )
        self._decode = jax.jit(
            functools.partial(programs.decode, shape, config.decode_steps), donate_argnums=1
        )
        self._load_blocks = jax.jit(programs.load_blocks, donate_argnums=0)

    def load_params(self, params: Params) -> None:
        """Takes over parameters (stacked) of the same shape; what the pool has read of the old ones is forgotten."""
        self._params = None  # before the new ones come: both may not fit
        self._params = decoder.unroll(jax.tree.map(jax.numpy.asarray, params))
        self._pool_blocks: OrderedDict[bytes, int] = OrderedDict()  # oldest use first

    @property
    def compiled_programs(self) -> int:
        """Programs compiled so far: three when everything has been used once, and never more."""
        jitted = (self._prefill, self._decode, self._load_blocks)
        return sum(function._cache_size() for function in jitted)

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or on its way."""
        return bool(self._waiting) or any(slot is not None for slot in self._slots)

    def check(self, request: Request) -> None:
        """Raises ValueError, in one line, for a request that can never be served."""
        room = self.config.cache_length
        if not request.tokens:
            raise ValueError("the prompt is empty")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}; must be at least 1")
        if len(request.tokens) + request.max_tokens > room:
            raise ValueError(
                f"context too long: {len(request.tokens)} prompt tokens + max_tokens {request.max_tokens} "
                f"exceed the context length of {room}"
            )

    def submit(self, request: Request) -> int:
        """Queues a request. Returns the ticket under which `step` will hand out its completion."""
        self.check(request)
        self._tickets += 1
        hashes = _block_hashes(request.tokens, self.config.prefill_chunk)
        self._waiting.append(_Slot(self._tickets, request, hashes))
        return self._tickets

    def cancel(self, ticket: int) -> None:
        """Forgets a request, wherever it is; its slot is free at once."""
        self._waiting = deque(slot for slot in self._waiting if slot.ticket != ticket)
        self._slots = [None if s is not None and s.ticket == ticket else s for s in self._slots]

    def warm_up(self) -> None:
        """Compiles every program, then forgets what it did."""
        chunk = self.config.prefill_chunk
        tokens = (1,) * min(2 * chunk, self.config.cache_length - 2)
        for _ in range(2):  # the second time the first chunk is loaded from the pool
            self.generate([Request(tokens, max_tokens=2)])
        self.counters = Counters()

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

    def generate(self, requests: list[Request]) -> list[Completion]:
        """Answers all requests, in their order."""
        tickets = [self.submit(request) for request in requests]
        done: dict[int, Completion] = {}
        while self.busy:
            done.update(self.step())
        return [done[ticket] for ticket in tickets]

    def _prefill_step(self) -> dict[int, Completion]:
        c = self.config
        chosen: list[tuple[int, _Slot]] = []
        in_this_call: set[bytes] = set()
        for index, slot in enumerate(self._slots):
            if slot is None or not slot.prefilling or len(chosen) == c.prefill_rows:
                continue
            self._load_known_prefix(index, slot)
            block = self._next_block(slot)
            if block is not None and block in in_this_call:
                continue  # another row reads the same text now: wait and copy it
            if block is not None:
                in_this_call.add(block)
            chosen.append((index, slot))

        rows, sampling = self._rows(chosen)
        self._cache, self._pool, tokens = self._prefill(
            self._params, self._cache, self._pool, rows, sampling
        )
        tokens = np.asarray(tokens)
        done = {}
        for row, (index, slot) in enumerate(chosen):
            slot.read += int(rows.length[row])
            self.counters.prompt_tokens += int(rows.length[row])
            if not slot.prefilling:
                done |= self._append(index, slot, [int(tokens[row])])
        return done

    def _rows(self, chosen: list[tuple[int, _Slot]]) -> tuple[programs.PrefillRows, programs.Sampling]:
        c = self.config
        tokens = np.zeros((c.prefill_rows, c.prefill_chunk), np.int32)
        unused = np.full(c.prefill_rows, c.slots, np.int32)
        rows = programs.PrefillRows(
            tokens=tokens,
            slot=unused,
            start=np.zeros(c.prefill_rows, np.int32),
            length=np.ones(c.prefill_rows, np.int32),
            store=np.full(c.prefill_rows, c.prefix_blocks, np.int32),
        )
        for row, (index, slot) in enumerate(chosen):
            chunk = slot.request.tokens[slot.read : slot.read + c.prefill_chunk]
            tokens[row, : len(chunk)] = chunk
            rows.slot[row], rows.start[row], rows.length[row] = index, slot.read, len(chunk)
            block = self._next_block(slot)
            if block is not None:
                rows.store[row] = self._pool_slot(block)
        return rows, _sampling([slot.request for _, slot in chosen], c.prefill_rows)

    def _next_block(self, slot: _Slot) -> bytes | None:
        """Hash of the chunk the slot reads next; None if that chunk is not a full one."""
        index = slot.read // self.config.prefill_chunk
        return slot.block_hashes[index] if index < len(slot.block_hashes) else None

    def _pool_slot(self, block: bytes) -> int:
        """A place in the pool for `block`: a free one, else that of the block unused for longest."""
        if len(self._pool_blocks) < self.config.prefix_blocks:
            place = len(self._pool_blocks)
        else:
            _, place = self._pool_blocks.popitem(last=False)
        self._pool_blocks[block] = place
        return place

    def _load_known_prefix(self, index: int, slot: _Slot) -> None:
        """Copies the chunks that the pool already has. The prompt's last token is always read, for its logits."""
        c = self.config
        blocks = np.full(c.cache_length // c.prefill_chunk, c.prefix_blocks, np.int32)
        first = slot.read // c.prefill_chunk
        reusable = (len(slot.request.tokens) - 1) // c.prefill_chunk
        end = first
        while end < reusable and slot.block_hashes[end] in self._pool_blocks:
            self._pool_blocks.move_to_end(slot.block_hashes[end])
            blocks[end] = self._pool_blocks[slot.block_hashes[end]]
            end += 1
        if end > first:
            self._cache = self._load_blocks(self._cache, self._pool, np.int32(index), blocks)
            slot.read = end * c.prefill_chunk
            self.counters.reused_tokens += (end - first) * c.prefill_chunk

    def _decode_step(self) -> dict[int, Completion]:
        c = self.config
        active = [(index, slot) for index, slot in enumerate(self._slots) if slot is not None]
        token = np.zeros(c.slots, np.int32)
        position = np.zeros(c.slots, np.int32)
        requests = [Request((0,), 1)] * c.slots
        for index, slot in active:
            token[index] = slot.answer[-1]
            position[index] = len(slot.request.tokens) + len(slot.answer) - 1
            requests[index] = slot.request
        self._cache, tokens = self._decode(
            self._params, self._cache, token, position, _sampling(requests, c.slots)
        )
        tokens = np.asarray(tokens)
        self.counters.decode_steps += c.decode_steps
        done = {}
        for index, slot in active:
            before = len(slot.answer)
            done |= self._append(index, slot, tokens[:, index].tolist())
            self.counters.decoded_tokens += len(slot.answer) - before
        return done

    def _append(self, index: int, slot: _Slot, tokens: list[int]) -> dict[int, Completion]:
        """Adds tokens to the answer until it ends; frees the slot then."""
        request = slot.request
        for token in tokens:
            slot.answer.append(token)
            if token == self.tokenizer.eos_token_id:
                return self._finish(index, slot, slot.answer[:-1], "stop")
            if request.stop:
                text = self._text(slot.answer)
                if any(stop in text for stop in request.stop):
                    return self._finish(index, slot, slot.answer, "stop")
            if len(slot.answer) == request.max_tokens:
                return self._finish(index, slot, slot.answer, "length")
        return {}

    def _finish(self, index: int, slot: _Slot, answer: list[int], reason: str) -> dict[int, Completion]:
        self._slots[index] = None
        text = self._text(answer)
        ends = [place for stop in slot.request.stop if (place := text.find(stop)) >= 0]
        if ends:
            text = text[: min(ends)]
        completion = Completion(
            text, tuple(answer), reason, len(slot.request.tokens), len(slot.answer)
        )
        return {slot.ticket: completion}

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _sampling(requests: list[Request], rows: int) -> programs.Sampling:
    """The requests' sampling parameters, padded with greedy rows."""
    padded = requests + [Request((0,), 1)] * (rows - len(requests))
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
