"""A continuous-batching sampling engine: fixed slots, static shapes, shared prefixes read once.

`Engine.step` does one unit of work (read some chunks of waiting prompts, decode a few tokens in
every slot, or score some rows); the caller decides in which thread. `Engine.generate` runs a list
of requests to the end.
"""

from collections import deque
from dataclasses import asdict, dataclass, field

import jax
import numpy as np

from persyn_jax.config import ConfigError
from persyn_jax.models import decoder
from persyn_jax.models.decoder import Params
from persyn_jax.models.weights import Model
from persyn_jax.sampling import programs
from persyn_jax.sampling.answer_text import AnswerText
from persyn_jax.sampling.compiled import (
    compile_programs,
    no_blocks,
    no_rows,
    no_slots,
    sampling,
)
from persyn_jax.sampling.config import EngineConfig
from persyn_jax.sampling.placement import Placement
from persyn_jax.sampling.prefix_pool import PrefixPool, block_hashes
from persyn_jax.sampling.requests import (
    Completion,
    Piece,
    Request,
    ScoreRequest,
    Scores,
    TokenLogprob,
    join,
)

# Prompts are read first, since every step of decoding costs the same however many slots it serves.
# But once half of the slots in use decode, they wait for so many reading steps at most.
_PREFILLS_IN_A_ROW = 4
# A prefill costs the same however few of its rows are in use. While more requests wait than there
# are slots, it is put off until its rows are full, for so many decoding steps at most.
_DECODES_BEFORE_PREFILL = 4


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
    scored_tokens: int = 0
    """Tokens of score requests."""

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
    text: AnswerText
    read: int = 0
    """Prompt tokens whose keys and values stand in the cache."""
    newest: int = 0
    """The newest token of the answer."""
    generated: int = 0

    @property
    def prefilling(self) -> bool:
        return self.read < len(self.request.tokens)


@dataclass
class _Chunk:
    """A row of a prefill: a chunk of the prompt in a slot."""

    index: int
    slot: _Slot
    start: int


@dataclass
class _Waiting:
    answers: deque[_Slot] = field(default_factory=deque)
    scores: deque[tuple[int, ScoreRequest]] = field(default_factory=deque)


class Engine:
    """Slots, caches and a queue around a few compiled programs. Not thread-safe: one thread drives.

    The programs are compiled here, once for all: a call with any other shape would be an error.
    Raises ConfigError when the model cannot take contexts of `config.cache_length`, or cannot be
    cut over `config.tensor` devices.
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
        self._placement = Placement(self._shape, config)
        self._slots: list[_Slot | None] = [None] * config.slots
        self._waiting = _Waiting()
        self._tickets = 0
        self._prefills_in_a_row = self._decodes_in_a_row = 0
        self._scored_last = False
        self._cache = self._empty(config.slots, config.cache_length)
        self._pool = self._empty(config.prefix_blocks, config.prefill_chunk)
        self.load_params(model.params)
        self._programs = compile_programs(
            self._shape, config, self._placement, self._params, self._cache, self._pool
        )

    def _empty(self, rows: int, length: int) -> programs.Cache:
        return self._placement.cache(
            programs.empty_cache(self._shape, rows, length, self.config.dtype)
        )

    def load_params(self, params: Params) -> None:
        """Takes over parameters (stacked) of the same shape, and forgets what the old ones read.

        Raises RuntimeError while requests are on their way.
        """
        if self.busy:
            raise RuntimeError("parameters cannot change under requests that are on their way")
        self._params: Params = {}  # before the new ones come: both may not fit
        self._params = self._placement.params(decoder.unroll(params), self.config.dtype)
        self._known = PrefixPool(self.config.prefix_blocks)

    @property
    def waiting(self) -> int:
        """Requests that nobody works on yet."""
        return len(self._waiting.answers) + len(self._waiting.scores)

    @property
    def running(self) -> int:
        """Slots in use."""
        return sum(slot is not None for slot in self._slots)

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or on its way."""
        return self.waiting + self.running > 0

    def check(self, request: Request | ScoreRequest) -> None:
        """Raises ValueError, in one line, for a request that can never be served."""
        tokens, room = request.tokens, self.config.cache_length
        if not tokens:
            raise ValueError("the prompt is empty")
        if not 0 <= min(tokens) <= max(tokens) < self._shape.vocab_size:
            raise ValueError(f"token ids must be from 0 to {self._shape.vocab_size - 1}")
        if isinstance(request, ScoreRequest):
            if not self.config.score_rows:
                raise ValueError("scoring is not offered here: engine.score_rows is 0")
            if len(tokens) > room:
                raise ValueError(f"{len(tokens)} tokens exceed the context length of {room}")
            return
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}, must be at least 1")
        if len(tokens) + request.max_tokens > room:
            raise ValueError(
                f"context too long: {len(tokens)} prompt tokens + max_tokens "
                f"{request.max_tokens} exceed the context length of {room}"
            )

    def submit(self, request: Request | ScoreRequest) -> int:
        """Queues a request. Returns the ticket under which `step` will hand out what comes of it.

        Raises ValueError as `check`.
        """
        self.check(request)
        self._tickets += 1
        if isinstance(request, ScoreRequest):
            self._waiting.scores.append((self._tickets, request))
        else:
            hashes = block_hashes(request.tokens, self.config.prefill_chunk)
            text = AnswerText(self.tokenizer, request.stop)
            self._waiting.answers.append(_Slot(self._tickets, request, hashes, text))
        return self._tickets

    def cancel(self, ticket: int) -> None:
        """Forgets a request, wherever it is; its slot is free at once."""
        w = self._waiting
        w.answers = deque(slot for slot in w.answers if slot.ticket != ticket)
        w.scores = deque(entry for entry in w.scores if entry[0] != ticket)
        self._slots = [None if s is not None and s.ticket == ticket else s for s in self._slots]

    def generate(self, requests: list[Request]) -> list[Completion]:
        """Answers all requests, in their order. For an engine that nobody else submits to."""
        tickets = [self.submit(request) for request in requests]
        pieces: dict[int, list[Piece]] = {ticket: [] for ticket in tickets}
        while self.busy:
            for ticket, piece in self.step().items():
                assert isinstance(piece, Piece)
                pieces[ticket].append(piece)
        return [
            join(pieces[ticket], len(request.tokens))
            for ticket, request in zip(tickets, requests, strict=True)
        ]

    def step(self) -> dict[int, Piece | Scores]:
        """One unit of work. Returns what it added to answers, by ticket."""
        for index, slot in enumerate(self._slots):
            if slot is None and self._waiting.answers:
                self._slots[index] = self._waiting.answers.popleft()
        in_use = [slot for slot in self._slots if slot is not None]
        self._scored_last = bool(self._waiting.scores) and not (in_use and self._scored_last)
        if self._scored_last:
            return dict(self._score_step())
        if self._reads_next(in_use):
            self._prefills_in_a_row += 1
            self._decodes_in_a_row = 0
            return dict(self._prefill_step())
        self._prefills_in_a_row = 0
        self._decodes_in_a_row += 1
        return dict(self._decode_step()) if in_use else {}

    def _reads_next(self, in_use: list[_Slot]) -> bool:
        """Whether the next step reads prompts; else it decodes."""
        lengths = [len(slot.request.tokens) - slot.read for slot in in_use if slot.prefilling]
        decoding = len(in_use) - len(lengths)
        if decoding < len(lengths):
            return True
        chunks = sum(-(-length // self.config.prefill_chunk) for length in lengths)
        full = chunks >= self.config.prefill_rows
        patient = self._waiting.answers and self._decodes_in_a_row < _DECODES_BEFORE_PREFILL
        due = full or not patient
        return bool(lengths) and due and self._prefills_in_a_row < _PREFILLS_IN_A_ROW

    def _score_step(self) -> dict[int, Scores]:
        """The rows that have waited longest, as many as fit: those of the first one's length."""
        c, queue = self.config, self._waiting.scores
        length = self._score_length(queue[0][1])
        chosen = [entry for entry in queue if self._score_length(entry[1]) == length]
        chosen = chosen[: c.score_rows]
        tokens_BT, length_B = (
            np.zeros((c.score_rows, length), np.int32),
            np.ones(c.score_rows, np.int32),
        )
        for row, (_, request) in enumerate(chosen):
            tokens_BT[row, : len(request.tokens)] = request.tokens
            length_B[row] = len(request.tokens)
        told = jax.tree.map(
            np.asarray, self._programs.score[length](self._params, tokens_BT, length_B)
        )
        tickets = {ticket for ticket, _ in chosen}
        self._waiting.scores = deque(entry for entry in queue if entry[0] not in tickets)
        self.counters.scored_tokens += int(length_B[: len(chosen)].sum())
        return {
            ticket: Scores(
                (
                    None,
                    *(
                        _logprob(told, (row, place), request.top)
                        for place in range(1, len(request.tokens))
                    ),
                )
            )
            for row, (ticket, request) in enumerate(chosen)
        }

    def _score_length(self, request: ScoreRequest) -> int:
        return next(length for length in self._programs.score if length >= len(request.tokens))

    def _prefill_step(self) -> dict[int, Piece]:
        chosen = self._choose_prefills()
        rows, sampling = self._prefill_rows(chosen)
        self._cache, self._pool, drawn = self._programs.prefill(
            self._params, self._cache, self._pool, rows, sampling
        )
        drawn = jax.tree.map(np.asarray, drawn)
        pieces = {}
        for row, chunk in enumerate(chosen):
            slot, length = chunk.slot, int(rows.length[row])
            slot.read = chunk.start + length
            self.counters.prompt_tokens += length
            if not slot.prefilling:
                first = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], drawn)
                pieces[slot.ticket] = self._append(chunk.index, slot, first)
        return pieces

    def _choose_prefills(self) -> list[_Chunk]:
        """The chunks that are read now, once what the pool knows has been copied into the slots.

        Who came first is served first, with as many successive chunks as there are rows.
        """
        c = self.config
        chosen: list[_Chunk] = []
        reading: set[bytes] = set()
        waiting = [(i, s) for i, s in enumerate(self._slots) if s is not None and s.prefilling]
        for index, slot in sorted(waiting, key=lambda entry: entry[1].ticket):
            if len(chosen) == c.prefill_rows:
                break
            self._load_known_prefix(index, slot)
            for start in range(slot.read, len(slot.request.tokens), c.prefill_chunk):
                block = self._block(slot, start)
                last = start + c.prefill_chunk >= len(slot.request.tokens)
                if len(chosen) == c.prefill_rows or (block in reading and not last):
                    break  # another row reads the same text now: wait and copy it
                if block is not None:
                    reading.add(block)
                chosen.append(_Chunk(index, slot, start))
        return chosen

    def _prefill_rows(self, chosen: list[_Chunk]) -> tuple[programs.PrefillRows, programs.Sampling]:
        rows = no_rows(self.config)
        for row, chunk in enumerate(chosen):
            end = chunk.start + self.config.prefill_chunk
            text = chunk.slot.request.tokens[chunk.start : end]
            rows.tokens[row, : len(text)] = text
            rows.slot[row], rows.start[row], rows.length[row] = chunk.index, chunk.start, len(text)
            block = self._block(chunk.slot, chunk.start)
            if block is not None and block not in self._known:
                rows.store[row] = self._known.add(block)
        requests = [chunk.slot.request for chunk in chosen]
        return rows, sampling(requests, self.config.prefill_rows)

    def _block(self, slot: _Slot, start: int) -> bytes | None:
        """Hash of the chunk that begins there; None if it is not a full one."""
        index = start // self.config.prefill_chunk
        return slot.block_hashes[index] if index < len(slot.block_hashes) else None

    def _load_known_prefix(self, index: int, slot: _Slot) -> None:
        """Copies the chunks that the pool has, but for the last: its logits are needed."""
        chunk = self.config.prefill_chunk
        blocks, first = no_blocks(self.config), slot.read // chunk
        end, last = first, (len(slot.request.tokens) - 1) // chunk
        while end < last and (place := self._known.use(slot.block_hashes[end])) is not None:
            blocks[end] = place
            end += 1
        if end > first:
            self._cache = self._programs.load_blocks(
                self._cache, self._pool, np.int32(index), blocks
            )
            slot.read = end * chunk
            self.counters.reused_tokens += (end - first) * chunk

    def _decode_step(self) -> dict[int, Piece]:
        active = [(i, s) for i, s in enumerate(self._slots) if s is not None and not s.prefilling]
        self._cache, drawn = self._programs.decode(
            self._params, self._cache, *self._decode_rows(active)
        )
        self.counters.decode_steps += self.config.decode_steps
        drawn = jax.tree.map(np.asarray, drawn)  # [steps, S, ...]
        pieces = {}
        for index, slot in active:
            own = jax.tree.map(lambda leaf, index=index: leaf[:, index], drawn)
            piece = pieces[slot.ticket] = self._append(index, slot, own)
            self.counters.decoded_tokens += piece.generated_tokens
        return pieces

    def _decode_rows(
        self, active: list[tuple[int, _Slot]]
    ) -> tuple[np.ndarray, np.ndarray, programs.Sampling]:
        """Each slot's newest token and its position; slots that do not decode write nowhere."""
        token_S, position_S = no_slots(self.config)
        requests = [_IDLE] * self.config.slots
        for index, slot in active:
            token_S[index] = slot.newest
            position_S[index] = len(slot.request.tokens) + slot.generated - 1
            requests[index] = slot.request
        return token_S, position_S, sampling(requests, self.config.slots)

    def _append(self, index: int, slot: _Slot, drawn: programs.Tokens) -> Piece:
        """Adds drawn tokens [N] to the answer until it ends; then frees the slot."""
        request, eos = slot.request, self.tokenizer.eos_token_id
        text, reason, count = "", None, 0
        for token in drawn.token.tolist():
            count += 1
            slot.newest, slot.generated = token, slot.generated + 1
            if token == eos:
                reason = "stop"
                break
            text += slot.text.push(token)
            if slot.text.stopped:
                reason = "stop"
                break
            if slot.generated == request.max_tokens:
                reason = "length"
                break
        if reason is not None:
            self._slots[index] = None
            if not slot.text.stopped:
                text += slot.text.finish()
                reason = "stop" if slot.text.stopped else reason
        told = None
        if request.logprobs is not None:
            told = tuple(_logprob(drawn, (place,), request.logprobs) for place in range(count))
        ids = drawn.token[: count - (slot.newest == eos)].tolist()
        return Piece(text, tuple(ids), told, count, reason)


_IDLE = Request(tokens=(0,), max_tokens=1)


def _logprob(told: programs.Tokens, place: tuple[int, ...], top: int) -> TokenLogprob:
    tokens, values = told.top[place][:top].tolist(), told.top_logprob[place][:top].tolist()
    return TokenLogprob(
        token=int(told.token[place]),
        logprob=float(told.logprob[place]),
        top=tuple(zip(tokens, values, strict=True)),
    )
