"""Checks of the text an endpoint writes: where it ends, and whether it comes again."""

import itertools
import secrets
from collections.abc import Iterator, Sequence

from persyn_jax.bench.endpoint_ask import (
    PROMPTS,
    Answer,
    Ask,
    Decided,
    Verdict,
    answer_of,
    echo,
    generate,
    numbers,
    together,
    with_logprobs,
)

SAME_LOGPROB = 1e-3
"""Nats by which a logprob may differ when the prompt's beginning is read from a cache."""
SEEDS = (11, 12, 13, 14)


async def max_tokens(ask: Ask) -> Verdict:
    """`max_tokens` is respected, and `finish_reason` says so."""
    for prompt in PROMPTS:
        answer = await generate(ask, prompt, 4)
        if answer.completion_tokens > 4:
            return Verdict("FAIL", f"max_tokens 4 gave {answer.completion_tokens} tokens")
        if answer.completion_tokens == 4 and answer.finish_reason == "length":
            return Verdict("pass", "4 tokens, finish_reason 'length'")
        if answer.finish_reason != "stop":
            return Verdict(
                "FAIL",
                f"{answer.completion_tokens} tokens of 4 end with {answer.finish_reason!r}",
            )
    return Verdict("undecided", "every answer ended by itself before 4 tokens")


async def end_of_text(ask: Ask) -> Verdict:
    """An answer that ends by itself does not show the end's text, and its tokens are counted."""
    ended = 0
    for prompt in PROMPTS:
        chat = {"messages": [{"role": "user", "content": prompt}]}
        for path, fields in (("/chat/completions", chat), ("/completions", {"prompt": prompt})):
            answer = await _answer(ask, path, fields, 96)
            if answer is None or answer.finish_reason != "stop":
                continue
            if leaked := [text for text in ask.eos_texts if text in answer.text]:
                return Verdict("FAIL", f"the answer to {prompt!r} shows {leaked[0]!r}")
            if complaint := await _count_complaint(ask, path, fields, answer):
                return Verdict("FAIL", complaint)
            ended += 1
    if ended == 0:
        return Verdict("undecided", "no answer ended by itself within 96 tokens")
    return Verdict("pass", f"{ended} answers ended by themselves, without the end's text")


async def _count_complaint(ask: Ask, path: str, fields: dict, answer: Answer) -> str | None:
    """What is wrong with the usage of an answer that ended by itself, if anything is.

    As many tokens as counted are enough for its text, and two fewer (one is the end) are not.
    """
    count = answer.completion_tokens
    if count > 96 or count < (1 if answer.text else 0):
        return f"usage counts {count} tokens of 96"
    if count < 4:
        return None
    same = await _answer(ask, path, fields, count)
    fewer = await _answer(ask, path, fields, count - 2)
    if same is None or same.text != answer.text:
        return f"usage counts {count} tokens, but max_tokens {count} gives another text"
    if fewer is None or fewer.finish_reason != "length":
        return f"usage counts {count} tokens, but max_tokens {count - 2} does not cut the answer"
    return None


async def _answer(ask: Ask, path: str, fields: dict, most: int) -> Answer | None:
    """A greedy answer; None where this path is not offered."""
    reply = await ask.post(path, {**fields, "max_tokens": most, "temperature": 0})
    return answer_of(reply.body) if reply.status == 200 else None


async def stop_strings(ask: Ask) -> Verdict:
    """A stop text from inside one token to inside the next ends the answer right before it."""
    tried = 0
    for prompt in PROMPTS:
        whole = await generate(ask, prompt, 24)
        for place, stop in list(_stops(whole.text, await _tokens(ask, prompt)))[:2]:
            tried += 1
            answer = await generate(ask, prompt, 24, stop=[stop])
            if answer.text != whole.text[:place]:
                return Verdict(
                    "FAIL",
                    f"stop {stop!r} in {whole.text[: place + 20]!r} gave {answer.text[-40:]!r}",
                )
            if answer.finish_reason != "stop":
                return Verdict("FAIL", f"stop {stop!r} ended with {answer.finish_reason!r}")
    if tried == 0:
        return Verdict("undecided", "no greedy answer has a text to stop at")
    return Verdict("pass", f"{tried} stop texts across tokens, each left out")


async def _tokens(ask: Ask, prompt: str) -> list[str]:
    """The tokens of a greedy answer; none where there are no logprobs to tell."""
    try:
        return (await with_logprobs(ask, prompt, 24)).tokens
    except Decided:
        return []


def _stops(text: str, tokens: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(place, stop text): each from the middle of a token to the middle of the next, found first
    at its place. Without tokens, eight characters from within a word on, which are never one."""
    if "".join(tokens)[: len(text)] != text or not text:
        starts = [
            place for place in range(1, len(text) - 8) if text[place - 1 : place + 1].isalpha()
        ]
        spans = [(place, place + 8) for place in starts if " " in text[place : place + 8]]
    else:
        spans, start = [], 0
        for token, following in itertools.pairwise(tokens):
            end = start + len(token)
            if len(token) > 1 and len(following) > 1:
                spans.append((end - 1, end + 1))
            start = end
    for start, end in spans:
        stop = text[start:end]
        if start > 0 and len(stop) == end - start and text.find(stop) == start and stop.strip():
            yield start, stop


async def seed_replay(ask: Ask) -> Verdict:
    """At temperature 1 a seed gives its text again, and another seed another text."""
    texts = []
    for seed in SEEDS:
        first, second = [
            (await generate(ask, PROMPTS[5], 24, temperature=1, seed=seed)).text for _ in range(2)
        ]
        if first != second:
            return Verdict("FAIL", f"seed {seed} gave {first[:30]!r}, then {second[:30]!r}")
        texts.append(first)
    if len(set(texts)) == 1:
        return Verdict("FAIL", f"{len(SEEDS)} seeds all gave {texts[0][:40]!r}")
    return Verdict("pass", f"{len(set(texts))} texts from {len(SEEDS)} seeds, each the same again")


async def batch_order(ask: Ask) -> Verdict:
    """A greedy answer is the same alone and among others, in whatever order they come."""
    alone = [(await generate(ask, prompt, 16)).text for prompt in PROMPTS]
    forth = await together(*(generate(ask, prompt, 16) for prompt in PROMPTS))
    back = await together(*(generate(ask, prompt, 16) for prompt in reversed(PROMPTS)))
    different = sum(
        len({one, first.text, second.text}) > 1
        for one, first, second in zip(alone, forth, reversed(back), strict=True)
    )
    evidence = f"{different} of {len(PROMPTS)} greedy answers depend on what else is asked"
    return Verdict("FAIL" if different else "pass", evidence)


async def prefix_cache(ask: Ask) -> Verdict:
    """What a prompt gives does not change once its beginning has been read before.

    The beginning is a new one in every run, so that the first reading is a cold one.
    """
    try:
        return await _cold_and_warm(ask, repeats=40)
    except Decided:
        return await _cold_and_warm(ask, repeats=8)  # the first may exceed a small context


async def _cold_and_warm(ask: Ask, repeats: int) -> Verdict:
    shared = f"Note {secrets.token_hex(4)}. " + "The list of the days goes on and on. " * repeats
    first, other = shared + "And the last word is", shared + "But there is one more thing:"
    cold = await _reading(ask, first)
    await _reading(ask, other)
    warm = await _reading(ask, first)
    if cold[0] != warm[0]:
        return Verdict("FAIL", f"greedy text {cold[0][:30]!r}, with a warm cache {warm[0][:30]!r}")
    if len(cold[1]) != len(warm[1]):
        return Verdict("FAIL", f"{len(cold[1])} logprobs, with a warm cache {len(warm[1])}")
    if not cold[1]:
        return Verdict("pass", "same greedy text; there is no echo to compare logprobs by")
    apart = max(abs(a - b) for a, b in zip(cold[1], warm[1], strict=True))
    state = "pass" if apart <= SAME_LOGPROB else "FAIL"
    return Verdict(state, f"same greedy text; logprobs at most {apart:.2g} nats apart")


async def _reading(ask: Ask, prompt: str) -> tuple[str, list[float]]:
    """(greedy text, logprobs of the echoed prompt, or none where there is no echo)."""
    text = (await generate(ask, prompt, 16)).text
    try:
        return text, numbers(await echo(ask, prompt))
    except Decided:
        return text, []
