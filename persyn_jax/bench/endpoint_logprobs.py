"""Checks of what an endpoint says about probabilities: what log-likelihood tasks rely on."""

from math import comb
from statistics import mean
from typing import NamedTuple

from persyn_jax.bench.endpoint_ask import (
    PROMPTS,
    Answer,
    Ask,
    Decided,
    Verdict,
    echo,
    echo_complaint,
    generate,
    gives_token_ids,
    numbers,
    prompt_ids,
    refuse,
    sound_echo,
    with_logprobs,
)

NEW_TOKENS = 8
SAME_LOGPROB = 0.1
"""Mean difference in nats of one token's logprob, read in a prompt and when it was generated: half
precision and other kernels give up to about this."""
CHANCE = 0.05
"""Share of endpoints that know nothing which would pass the chance check all the same."""

# (prompt, sensible continuation, nonsense of about the same length)
PAIRS = (
    ("The capital of France is", " the city of Paris.", " city. the Paris of"),
    ("The sun rises in the", " east and sets in the west.", " and west the sets east in."),
    ("Monday, Tuesday, Wednesday,", " Thursday, Friday", " qworp, zzyvx kt"),
    ("January, February, March,", " April, May, June", " Jnpxu, Mba, Qleru"),
    ("1, 2, 3, 4, 5, 6,", " 7, 8, 9, 10, 11, 12", " 11, 7, 12, 9, 8, 10"),
    ("2, 4, 6, 8, 10,", " 12, 14, 16, 18, 20", " 18, 12, 20, 16, 14"),
    ("10, 9, 8, 7, 6,", " 5, 4, 3, 2, 1", " 2, 5, 1, 4, 3"),
    ("a b c d e f g", " h i j k l m n", " m h n k i l j"),
    ("apple apple apple apple", " apple apple apple", " xplqe gwroe zmvta"),
    ("yes no yes no yes no", " yes no yes no", " oyn sye noe sny"),
    ("red blue red blue red", " blue red blue red", " kvte drw ublx ode"),
    ("Once upon a time there was", " a little girl who lived", " lived who girl a little"),
    ("Thank you very much for", " your help with this.", " this your. with help"),
    ("I would like to drink a", " cup of tea, please.", " of, please tea cup."),
    ("The cat sat on the mat and the dog sat on", " the floor.", " floor the."),
    ("Water is made of hydrogen and", " oxygen.", " gxnyoe."),
)


async def echo_logprobs(ask: Ask) -> Verdict:
    """The prompt's logprobs, for a string and for token ids."""
    answer = await echo(ask, PROMPTS[0])
    if not answer.text.startswith(PROMPTS[0]):
        raise Decided("FAIL", f"echo is silently ignored: the text begins {answer.text[:30]!r}")
    if complaint := echo_complaint(answer):
        return Verdict("FAIL", complaint)
    evidence = f"{answer.prompt_tokens} prompt tokens and 1 generated, the first null"
    ids = await prompt_ids(ask, PROMPTS[0])
    if ids is None:
        return Verdict("pass", evidence)
    reply = await ask.post("/completions", {"prompt": ids, "max_tokens": 1})
    if reply.status != 200:
        return Verdict("pass", f"{evidence}; token ids are not taken: {reply.message}")
    answer = await echo(ask, ids)
    if answer.prompt_tokens != len(ids):
        return Verdict("FAIL", f"{len(ids)} token ids count as {answer.prompt_tokens}")
    if complaint := echo_complaint(answer):
        return Verdict("FAIL", f"token ids: {complaint}")
    return Verdict("pass", f"{evidence}; the same for token ids")


class _Compared(NamedTuple):
    """A generated token: its logprob then, and what its place and the ones beside it say later."""

    generated: float
    early: float
    same: float
    late: float


async def off_by_one(ask: Ask) -> Verdict:
    """A token's logprob in a prompt is the one it had when it was generated, not its neighbour's.

    `early` is the entry one place before the token's own, `late` the one after.
    """
    compared: list[_Compared] = []
    for prompt in PROMPTS:
        ids = await prompt_ids(ask, prompt) if await gives_token_ids(ask) else None
        if ids is None:
            answer = await with_logprobs(ask, prompt, NEW_TOKENS)
            compared += _compare(answer, await sound_echo(ask, prompt + answer.text))
        else:
            answer = await with_logprobs(ask, ids, NEW_TOKENS, return_token_ids=True)
            compared += _compare(answer, await sound_echo(ask, ids + (answer.token_ids or [])))
    if len(compared) < NEW_TOKENS:
        return Verdict("undecided", "answers were too short, or their text is cut into new tokens")
    distance = {
        name: mean(abs(getattr(c, name) - c.generated) for c in compared)
        for name in ("early", "same", "late")
    }
    beside = min(distance["early"], distance["late"])
    at_place = f"{distance['same']:.2g} nats apart on average at {len(compared)} tokens"
    if distance["same"] <= SAME_LOGPROB:
        if beside <= distance["same"] + 1e-6:
            return Verdict("undecided", "neighbours have equal logprobs, so no shift would show")
        return Verdict("pass", at_place)
    if beside > SAME_LOGPROB:
        return Verdict(
            "FAIL", f"generated and echoed logprobs are {at_place}, and at no shift equal"
        )
    if distance["early"] < distance["late"]:
        return Verdict("FAIL", "shifted by one: each entry holds the logprob of the next token")
    return Verdict("FAIL", "shifted by one: each entry holds the logprob of the token before")


def _compare(answer: Answer, echoed: Answer) -> list[_Compared]:
    """The generated tokens of `answer` in the echo of prompt + answer; none if it has others."""
    tokens = list(answer.tokens)
    while not answer.token_ids and tokens and "".join(tokens) != answer.text:
        tokens.pop()  # EOS has a logprob, and no text
    end = echoed.prompt_tokens
    start = end - len(tokens)
    if start < 2 or echoed.tokens[start:end] != tokens:
        return []
    values = [0.0, *numbers(echoed)]
    return [
        _Compared(float(value or 0.0), *values[place - 1 : place + 2])
        for place, value in zip(range(start, end), answer.logprobs, strict=False)
    ]


async def greedy_maximum(ask: Ask) -> Verdict:
    """A greedy token's logprob equals the maximum of its top logprobs, as floats."""
    count = 0
    for prompt in PROMPTS[:3]:
        answer = await with_logprobs(ask, prompt, NEW_TOKENS)
        if len(answer.tops) != len(answer.logprobs):
            return Verdict("FAIL", "there is not one top_logprobs for each logprob")
        for place, (value, top) in enumerate(zip(answer.logprobs, answer.tops, strict=True)):
            if not top or value != max(top.values()):
                found = max(top.values()) if top else "nothing"
                return Verdict("FAIL", f"token {place} of an answer: {value!r}, top {found!r}")
            count += 1
    return Verdict("pass", f"exactly equal at {count} generated tokens")


async def greedy_maximum_of_echo(ask: Ask) -> Verdict:
    """The same for an echoed greedy token, which is how clients tell that a text is greedy."""
    count = 0
    for prompt in PROMPTS[:3]:
        echoed = await sound_echo(ask, prompt)
        if len(echoed.tops) != len(echoed.logprobs):
            return Verdict("FAIL", "there is not one top_logprobs for each logprob")
        for place, top in list(enumerate(echoed.tops))[1:]:
            value = echoed.logprobs[place]
            if not top or value is None or value > max(top.values()):
                return Verdict("FAIL", f"token {place} of an echo: {value!r}, top {top!r:.60}")
        if echoed.logprobs[-1] != max(echoed.tops[-1].values()):
            return Verdict("FAIL", f"the generated token: {echoed.logprobs[-1]!r} is not its top")
        count += len(echoed.tops) - 1
    return Verdict("pass", f"holds at {count} echoed tokens")


async def end_counted(ask: Ask) -> Verdict:
    """The one token that echo generates has an entry, also when it is the end of the text."""
    await sound_echo(ask, PROMPTS[0])
    for prompt in PROMPTS:
        answer = await generate(ask, prompt, 96)
        if answer.finish_reason != "stop":
            continue
        echoed = await echo(ask, prompt + answer.text)
        if echoed.finish_reason != "stop":
            continue  # the text was cut into other tokens
        if complaint := echo_complaint(echoed):
            return Verdict("FAIL", f"when the generated token is the end: {complaint}")
        return Verdict("pass", f"{len(echoed.logprobs)} entries with the end as the last")
    return Verdict("undecided", "no answer ended by itself, so the end was never the next token")


async def no_new_token(ask: Ask) -> Verdict:
    """`max_tokens: 0` with echo, where it is offered, scores the prompt and adds nothing."""
    fields = {"echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
    reply = await ask.post("/completions", {"prompt": PROMPTS[0], **fields})
    refuse(reply, "echo with max_tokens 0")
    one = await sound_echo(ask, PROMPTS[0])
    body = reply.body if isinstance(reply.body, dict) else {}
    logprobs = ((body.get("choices") or [{}])[0].get("logprobs") or {}).get("token_logprobs") or []
    if len(logprobs) != one.prompt_tokens:
        return Verdict("FAIL", f"{len(logprobs)} logprobs for {one.prompt_tokens} prompt tokens")
    return Verdict("pass", f"{len(logprobs)} entries, one for each prompt token")


async def chance_level(ask: Ask) -> Verdict:
    """Sensible text is likelier than nonsense: made-up logprobs are at 50 %."""
    right = ties = 0
    for prompt, sensible, nonsense in PAIRS:
        likely = await _continuation_logprob(ask, prompt, sensible)
        unlikely = await _continuation_logprob(ask, prompt, nonsense)
        right += likely > unlikely
        ties += likely == unlikely
    share = f"{right} of {len(PAIRS)} sensible continuations are the likelier ones"
    by_chance = sum(comb(len(PAIRS), k) for k in range(right, len(PAIRS) + 1)) / 2 ** len(PAIRS)
    if by_chance < CHANCE:
        return Verdict("pass", f"{share} (p = {by_chance:.2g})")
    if ties > len(PAIRS) // 2:
        return Verdict("FAIL", f"{share}, and {ties} pairs have equal logprobs")
    shift = await off_by_one(ask)
    if shift.state == "FAIL":
        return Verdict("FAIL", f"{share}, and the logprobs are not sound: {shift.evidence}")
    return Verdict("undecided", f"{share}: right for a model that knows nothing")


async def _continuation_logprob(ask: Ask, prompt: str, continuation: str) -> float:
    """Mean logprob of the continuation's tokens, found from the end: there may be a BOS."""
    echoed = await sound_echo(ask, prompt + continuation)
    start = end = echoed.prompt_tokens
    while start > 1 and len("".join(echoed.tokens[start:end])) < len(continuation):
        start -= 1
    return mean([0.0, *numbers(echoed)][start:end])
