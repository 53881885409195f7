"""The engine against the plain forward, and that a request's answer is its own affair."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from engine_cases import CONFIG, EOS, MODEL, random_request, sharp_model

from persyn_jax import config
from persyn_jax.config import ConfigError
from persyn_jax.models import decoder, rows
from persyn_jax.models.rows import Conversation
from persyn_jax.sampling.config import EngineConfig
from persyn_jax.sampling.engine import Counters, Engine, Piece, Request, ScoreRequest, Scores, join

C = CONFIG.cache_length


@pytest.fixture(scope="module")
def shared_engine():
    return Engine(MODEL, CONFIG)


@pytest.fixture
def engine(shared_engine):
    """Idle, with an empty prefix pool and fresh counters."""
    shared_engine.load_params(MODEL.params)
    shared_engine.counters = Counters()
    return shared_engine


def decode(tokens) -> str:
    return MODEL.tokenizer.decode(list(tokens), skip_special_tokens=True)


class Answers:
    """What steps bring, put together by ticket."""

    def __init__(self):
        self.pieces: dict[int, list[Piece]] = {}

    def add(self, brought: dict) -> None:
        for ticket, piece in brought.items():
            self.pieces.setdefault(ticket, []).append(piece)

    def done(self, requests: dict[int, Request]) -> dict:
        """The finished answers. requests: by ticket."""
        return {
            ticket: join(pieces, len(requests[ticket].tokens))
            for ticket, pieces in self.pieces.items()
            if pieces[-1].finish_reason is not None
        }


def alone(engine: Engine, request: Request):
    """The answer with nobody beside it and nothing to reuse."""
    engine.load_params(MODEL.params)
    return engine.generate([request])[0]


def score(engine: Engine, request: ScoreRequest) -> Scores:
    ticket = engine.submit(request)
    return engine.step()[ticket]


@jax.jit
def forward(params, tokens_1C):
    positions_1C = np.arange(C, dtype=np.int32)[None]
    attend = decoder.attend_causally(np.ones((1, C), np.int32))
    hidden_1CD, _ = decoder.hidden_states(MODEL.config, params, tokens_1C, positions_1C, attend)
    return decoder.logits(MODEL.config, params, hidden_1CD)[0]


def scores(request: Request, answer: list[int], params=MODEL.params) -> np.ndarray:
    """[answer token, V]: what each answer token is the argmax of, from one full forward.

    That is the logits at temperature 0; else logits / temperature + the Gumbel noise of (seed,
    position), for tokens that top-k and top-p keep.
    """
    tokens_1C = np.zeros((1, C), np.int32)
    tokens_1C[0, : len(request.tokens) + len(answer)] = [*request.tokens, *answer]
    first = len(request.tokens)
    logits_CV = np.asarray(forward(params, tokens_1C), np.float64)
    logits_NV = logits_CV[first - 1 : first - 1 + len(answer)]
    if request.temperature == 0:
        return logits_NV
    scaled_NV = logits_NV / request.temperature
    p_NV = np.exp(scaled_NV) / np.exp(scaled_NV).sum(axis=1, keepdims=True)
    for row, p_V in enumerate(p_NV):
        if request.top_k:
            p_V = np.where(p_V >= np.sort(p_V)[-request.top_k], p_V, 0)
            p_V /= p_V.sum()
        likelier_V = np.array([p_V[p_V > p].sum() for p in p_V])
        scaled_NV[row, (likelier_V > request.top_p + 1e-4) | (p_V == 0)] = -np.inf
    key = jax.random.key(np.uint32(request.seed))
    noise = [
        jax.random.gumbel(jax.random.fold_in(key, first + i), (MODEL.config.vocab_size,))
        for i in range(len(answer))
    ]
    return scaled_NV + np.array(noise)


def test_cached_decoding_says_what_the_full_forward_says(engine):
    rng = np.random.default_rng(1)
    requests = [random_request(rng) for _ in range(40)]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        ended = completion.generated_tokens > len(completion.token_ids)
        answer = [*completion.token_ids, *[EOS] * ended]
        score_NV = scores(request, answer)
        chosen_N = score_NV[np.arange(len(answer)), answer]
        np.testing.assert_array_less(score_NV.max(axis=1), chosen_N + 1e-3)


def test_an_answer_does_not_depend_on_neighbours_slots_order_or_reuse(engine):
    rng = np.random.default_rng(2)
    requests = [random_request(rng, max_tokens=6) for _ in range(24)]
    expected = [alone(engine, request) for request in requests]
    scored = [ScoreRequest(request.tokens, top=2) for request in requests]
    expected_scores = [score(engine, request) for request in scored]
    reused, orders = 0, 1000
    for order in range(orders):
        waiting = rng.permutation(len(requests))[: rng.integers(1, 9)].tolist()
        tickets, answers, before = {}, Answers(), engine.counters.reused_tokens
        while waiting or engine.busy:
            if waiting and rng.random() < 0.5:
                index = waiting.pop()
                tickets[engine.submit(requests[index])] = index
                if rng.random() < 0.1:
                    tickets[engine.submit(scored[index])] = index
            answers.add(engine.step())
        for ticket, index in tickets.items():
            pieces = answers.pieces[ticket]
            if isinstance(pieces[0], Scores):
                assert pieces == [expected_scores[index]], f"order {order}"
            else:
                got = join(pieces, len(requests[index].tokens))
                assert got == expected[index], f"order {order}"
        reused += engine.counters.reused_tokens > before
    assert reused > orders / 2, "too little was reused for the test to mean something"


def test_no_request_compiles_anything(engine):
    compiled = []

    def listen(event, *_, **__):
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(1.0)
        assert compiled, "compilations are not seen: the test would mean nothing"
        compiled.clear()
        rng = np.random.default_rng(3)
        engine.generate([random_request(rng) for _ in range(50)])
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, 9]).integers(3, 259, length).tolist())


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 40])
def test_a_prompt_seen_before_is_copied_up_to_its_last_chunk(engine, length):
    request = Request(prompt(length), 4, temperature=1.0)
    first = engine.generate([request])
    assert (engine.counters.prompt_tokens, engine.counters.reused_tokens) == (length, 0)
    assert engine.generate([request]) == first
    reusable = (length - 1) // 8 * 8
    assert engine.counters.reused_tokens == reusable
    assert engine.counters.prompt_tokens == 2 * length - reusable


def test_prompts_that_begin_alike_are_read_once_even_at_the_same_time(engine):
    begin = prompt(24)
    requests = [Request(begin + prompt(5, seed), 3) for seed in range(4)]
    together = engine.generate(requests)
    assert engine.counters.reused_tokens == 3 * 24
    assert together == [alone(engine, request) for request in requests]


def test_a_chunk_is_reused_behind_its_own_beginning_only(engine):
    first, other = (Request(prompt(8, seed) + prompt(10, 9), 8) for seed in (1, 2))
    expected = alone(engine, other)
    engine.load_params(MODEL.params)
    engine.counters = Counters()
    engine.generate([first])
    assert engine.generate([other]) == [expected]
    assert engine.counters.reused_tokens == 0


def test_equal_prompts_of_whole_chunks_do_not_wait_for_each_other(engine):
    request = Request(prompt(8), 1)
    for _ in range(2):
        engine.submit(request)
    assert len(engine.step()) == 2


def test_the_pool_forgets_the_block_unused_longest(engine):
    kept, forgotten = Request(prompt(17, 1), 2), Request(prompt(17, 2), 2)  # two blocks each
    engine.generate([kept, forgotten])
    engine.generate([Request(prompt(9, 3), 1), kept])
    engine.generate([Request(prompt(17, 4), 1)])  # the pool's six places are full, and one more
    before = engine.counters.reused_tokens
    engine.generate([kept])
    assert engine.counters.reused_tokens == before + 16
    engine.generate([forgotten])
    assert engine.counters.reused_tokens == before + 16


def test_a_prompt_of_whole_chunks_read_again_spoils_no_block(engine):
    whole = prompt(16)
    longer = Request(whole + prompt(3, 1), 6, temperature=1.0)
    expected = alone(engine, longer)
    engine.load_params(MODEL.params)
    for seed in range(20):  # `whole`'s last chunk is read each time: the pool has it already
        engine.generate([Request(whole, 1), Request(prompt(16, seed), 1)])
        assert engine.generate([longer]) == [expected]


def test_other_parameters_reuse_nothing_of_the_old_ones(engine):
    request = Request(prompt(40), 8)
    old = engine.generate([request])[0]
    other = sharp_model(seed=1).params
    engine.load_params(other)
    new = engine.generate([request])[0]
    assert engine.counters.reused_tokens == 0
    assert new != old
    answer = list(new.token_ids)
    np.testing.assert_array_equal(scores(request, answer, other).argmax(axis=1), answer)


def test_parameters_do_not_change_under_a_request(engine):
    ticket = engine.submit(Request(prompt(3), 2))
    with pytest.raises(RuntimeError, match="on their way"):
        engine.load_params(MODEL.params)
    engine.cancel(ticket)


def long_answer(engine: Engine, **sampling) -> tuple[Request, list[int]]:
    """A request whose answer of 40 tokens has no EOS."""
    for seed in range(50):
        request = Request(prompt(5), 40, seed=seed, **sampling)
        completion = engine.generate([request])[0]
        if completion.finish_reason == "length":
            return request, list(completion.token_ids)
    raise AssertionError("every answer ended early")


def test_an_answer_ends_before_the_first_stop_text(engine):
    request, tokens = long_answer(engine, temperature=1.5)
    texts = [decode(tokens[:n]) for n in range(41)]
    stops = [
        (i, texts[-1][i : i + width])
        for i in range(len(texts[-1]))
        for width in (1, 2, 3)
        if texts[-1][i : i + width].isascii() and texts[-1][i : i + width]
    ]
    assert len(stops) > 10
    for i, stop in stops:
        completion = engine.generate([dataclasses.replace(request, stop=("never", stop))])[0]
        assert completion.text == texts[-1].split(stop)[0]
        assert len(completion.text) <= i
        assert completion.finish_reason == "stop"
        read = next(n for n in range(41) if stop in texts[n])  # the tokens that spell it included
        assert completion.token_ids == tuple(tokens[:read])
        assert completion.generated_tokens == read


def test_of_several_stop_texts_the_first_in_the_text_counts(engine):
    request, tokens = long_answer(engine, temperature=1.5)
    text = decode(tokens)
    first, second = [i for i, letter in enumerate(text) if letter.isascii()][:2]
    stop = (text[second], text[first])
    completion = engine.generate([dataclasses.replace(request, stop=stop)])[0]
    assert completion.text == text[: min(text.find(letter) for letter in stop)]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 7, 39])
def test_max_tokens_cuts_the_same_answer_short(engine, max_tokens):
    request, tokens = long_answer(engine, temperature=1.0)
    completion = engine.generate([dataclasses.replace(request, max_tokens=max_tokens)])[0]
    assert completion.token_ids == tuple(tokens[:max_tokens])
    assert (completion.finish_reason, completion.generated_tokens) == ("length", max_tokens)


def test_eos_ends_an_answer_and_is_not_part_of_its_text(engine):
    requests = [Request(prompt(4), 50, temperature=9.0, seed=seed) for seed in range(60)]
    completions = engine.generate(requests)
    ended = [c for c in completions if c.finish_reason == "stop"]
    assert ended
    for completion in ended:
        assert EOS not in completion.token_ids
        assert completion.generated_tokens == len(completion.token_ids) + 1
        assert completion.text == decode(completion.token_ids)
    assert all(c.generated_tokens == 50 for c in completions if c.finish_reason == "length")


def test_an_answer_may_fill_the_cache_to_its_last_place(engine):
    request = Request(prompt(C - 5), 5)
    completion = engine.generate([request])[0]
    assert completion.generated_tokens == 5
    answer = list(completion.token_ids)
    np.testing.assert_array_equal(scores(request, answer).argmax(axis=1), answer)


@pytest.mark.parametrize("steps", range(8))
def test_a_cancelled_request_leaves_no_trace(engine, steps):
    rng = np.random.default_rng(5)
    requests = [random_request(rng) for _ in range(7)]  # more than slots: some wait
    expected = [alone(engine, request) for request in requests]
    engine.load_params(MODEL.params)
    tickets = [engine.submit(request) for request in requests]
    answers, of_ticket = Answers(), dict(zip(tickets, requests, strict=True))
    for _ in range(steps):
        answers.add(engine.step())
    done = answers.done(of_ticket)
    cancelled = [ticket for ticket in tickets[::2] if ticket not in done]
    assert cancelled
    for ticket in cancelled:
        engine.cancel(ticket)
    while engine.busy:
        answers.add(engine.step())
    kept = [i for i, ticket in enumerate(tickets) if ticket not in cancelled]
    assert {tickets[i]: expected[i] for i in kept} == answers.done(of_ticket)


def test_counters_count_what_was_done(engine):
    requests = [Request(prompt(9, seed), 7) for seed in range(4)]
    completions = engine.generate(requests)
    counters = engine.counters
    assert counters.prompt_tokens + counters.reused_tokens == 36
    assert counters.decoded_tokens == sum(c.generated_tokens - 1 for c in completions)
    assert counters.decode_steps % CONFIG.decode_steps == 0
    assert 1 < counters.mean_slot_occupancy <= CONFIG.slots
    assert counters.as_dict()["mean_slot_occupancy"] == counters.mean_slot_occupancy


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 1), "the prompt is empty"),
        (Request((1,), 0), "max_tokens is 0"),
        (Request((1,) * 156, 5), "context too long: 156 prompt tokens .* 5 exceed .* 160"),
        (ScoreRequest((1,) * 161), "161 tokens exceed the context length of 160"),
        (ScoreRequest(()), "the prompt is empty"),
        (Request((1, 259), 1), "token ids must be from 0 to 258"),
        (Request((-1,), 1), "token ids must be from 0 to 258"),
    ],
)
def test_an_impossible_request_is_refused(engine, request_, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    assert not engine.busy


def test_a_cache_longer_than_the_models_context_is_refused():
    too_long = EngineConfig(cache_length=4096, prefill_chunk=8)
    with pytest.raises(ConfigError, match=r"cache_length 4096 exceeds .* 2048"):
        Engine(MODEL, too_long)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cache_length": 100, "prefill_chunk": 16}, "cache_length 100 must be a multiple of"),
        ({"prefix_blocks": 7, "prefill_rows": 8}, "prefix_blocks 7 must be at least"),
        ({"slots": 0}, "slots"),
    ],
)
def test_impossible_shapes_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config.validate(EngineConfig, values, where="test")


def test_log_probabilities_are_those_of_the_full_forward(engine):
    rng = np.random.default_rng(6)
    requests = [dataclasses.replace(random_request(rng), logprobs=top) for top in (0, 1, 5, 20) * 3]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        ended = completion.generated_tokens > len(completion.token_ids)
        answer = [*completion.token_ids, *[EOS] * ended]
        greedy = dataclasses.replace(request, temperature=0.0)  # the model's own distribution
        expected_NV = np.asarray(jax.nn.log_softmax(scores(greedy, answer)))
        assert [entry.token for entry in completion.logprobs] == answer
        for entry, expected_V in zip(completion.logprobs, expected_NV, strict=True):
            assert abs(entry.logprob - expected_V[entry.token]) < 1e-3
            assert len(entry.top) == request.logprobs
            values = [value for _, value in entry.top]
            np.testing.assert_allclose(values, -np.sort(-expected_V)[: len(values)], atol=1e-3)
            for token, value in entry.top:
                assert abs(value - expected_V[token]) < 1e-3
            if request.temperature == 0 and entry.top:
                assert entry.top[0] == (entry.token, entry.logprob)  # exactly


def test_scores_are_bitwise_those_of_the_trainers_forward(engine):
    """In float32, at the same shape of rows: what the loss would say of the same tokens."""
    texts = [prompt(length, length) for length in (1, 2, 30, 64, 65, 160)]
    by_trainer = jax.jit(rows.response_log_likelihoods, static_argnums=0)
    params = decoder.unroll(MODEL.params)
    for first, second in itertools.pairwise(texts):
        packed = rows.pack([[Conversation(text[:1], text[1:])] for text in (first, second)], C, C)
        expected = np.asarray(by_trainer(MODEL.config, params, packed))
        tickets = [engine.submit(ScoreRequest(text)) for text in (first, second)]
        told = engine.step()
        for row, (ticket, text) in enumerate(zip(tickets, (first, second), strict=True)):
            assert told[ticket].logprobs[0] is None
            actual = [entry.logprob for entry in told[ticket].logprobs[1:]]
            assert actual == expected[row, : len(text) - 1].tolist()
            assert [entry.token for entry in told[ticket].logprobs[1:]] == list(text[1:])


def test_a_long_prompt_takes_all_rows_at_once(engine):
    ticket = engine.submit(Request(prompt(24), 1))  # three rows of eight
    assert ticket in engine.step()


def test_long_prompts_do_not_stop_answers_that_are_under_way(engine):
    engine.submit(Request(prompt(4), 100, temperature=9.0, seed=3))
    first = engine.submit(Request(prompt(4, 1), 100, temperature=9.0, seed=4))
    engine.step()
    for seed in range(2, 6):  # two in the free slots, two waiting: 19 chunks each
        engine.submit(Request(prompt(150, seed), 1))
    silent = longest = 0
    while engine.waiting:
        brought = engine.step()
        silent = 0 if first in brought else silent + 1
        longest = max(longest, silent)
    assert 0 < longest <= 4
    for ticket in range(first - 1, first + 5):
        engine.cancel(ticket)


@pytest.mark.parametrize(
    ("length", "behind", "steps"),
    [
        (4, 2, 5),  # a row of three: put off for four decoding steps at most
        (20, 2, 1),  # all three rows
        (4, 0, 1),  # nobody else is there to fill the others
    ],
)
def test_a_prompt_waits_for_company_while_more_wait_than_there_are_slots(
    engine, length, behind, steps
):
    running = [
        engine.submit(Request(prompt(4, seed), 100, temperature=9.0, seed=seed))
        for seed in range(3, 7)
    ]
    while not set(running[1:]) <= set(engine.step()):
        pass  # until a step decodes
    engine.cancel(running[0])
    before = engine.submit(Request(prompt(4, 8), 1))
    assert before in engine.step()  # which frees the slot again
    asked = engine.submit(Request(prompt(length, 9), 1))
    others = [engine.submit(Request(prompt(4, 10 + seed), 1)) for seed in range(behind)]
    brought = [set(engine.step()) for _ in range(steps)]
    assert [asked in tickets for tickets in brought] == [False] * (steps - 1) + [True]
    assert all(set(running[1:]) <= tickets for tickets in brought[:-1])
    for ticket in [*running[1:], *others]:
        engine.cancel(ticket)


def test_scoring_and_answering_take_turns(engine):
    answer = engine.submit(Request(prompt(4), 100, temperature=9.0, seed=3))
    scored = [engine.submit(ScoreRequest(prompt(20, seed))) for seed in range(8)]
    brought = [set(engine.step()) for _ in range(8)]
    assert [answer in tickets for tickets in brought] == [False, True] * 4
    assert set().union(*brought) == {answer, *scored}
    engine.cancel(answer)


def test_weights_cut_over_devices_say_the_same(engine):
    """The program of a mesh: heads and features dealt out, sums in another order."""
    cut = Engine(MODEL, dataclasses.replace(CONFIG, tensor=2))
    rng = np.random.default_rng(7)
    requests = [dataclasses.replace(random_request(rng), logprobs=3) for _ in range(12)]
    for a, b in zip(cut.generate(requests), engine.generate(requests), strict=True):
        assert a.token_ids == b.token_ids
        for one, other in zip(a.logprobs, b.logprobs, strict=True):
            assert abs(one.logprob - other.logprob) < 1e-3
    text = cut._programs.decode.as_text()
    assert "all-reduce" in text
    assert "all-to-all" not in text
    kernel = cut._params["layers"][0]["gate"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == kernel.shape[0] // 2
    keys = cut._cache[0][0]
    assert keys.sharding.shard_shape(keys.shape)[2] == keys.shape[2] // 2


def test_bfloat16_halves_weights_and_caches_and_says_nearly_the_same(engine):
    half = Engine(MODEL, dataclasses.replace(CONFIG, dtype="bfloat16"))
    for tree in (half._params, half._cache, half._pool):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(jax.numpy.bfloat16)}
    request = ScoreRequest(prompt(100))
    near, exact = (
        np.array([entry.logprob for entry in score(one, request).logprobs[1:]])
        for one in (half, engine)
    )
    assert 0 < np.abs(near - exact).mean() < 0.3 * exact.std()
    assert half.generate([Request(prompt(9), 5)])[0].generated_tokens == 5


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(9, "needs as many devices, there are 8"), (8, "must divide the model's . key-value heads")],
)
def test_impossible_cuts_are_refused(tensor, message):
    with pytest.raises(ConfigError, match=message):
        Engine(MODEL, dataclasses.replace(CONFIG, tensor=tensor))
