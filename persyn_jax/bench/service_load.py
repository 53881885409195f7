"""What the service does under ten times the load it can bear, and when clients leave.

Both studies run against a service of their own, over real connections. Their figures belong to the
machine; what must hold on any is said in `Overload` and `Departures`.
"""

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import numpy as np
from pydantic import Field

from persyn_jax.config import config_class
from persyn_jax.sampling.config import ServiceConfig


@config_class
class LoadConfig:
    """What is served, and how it is pressed."""

    service: ServiceConfig
    seconds: Annotated[float, Field(gt=0)] = 60.0
    """Of the overload; a sixth of it measures the unloaded service before."""
    overload: Annotated[float, Field(gt=1)] = 10.0
    """Requests that arrive for each one that can be answered."""
    new_tokens: Annotated[int, Field(ge=1)] = 200
    departures: Annotated[int, Field(ge=1)] = 2000
    bystanders: Annotated[int, Field(ge=1)] = 4
    """Requests that stay, beside those that leave."""
    seed: Annotated[int, Field(ge=0)] = 0


class Overload(NamedTuple):
    """Rejections must be quick (p99 under 50 ms), goodput at least 0.9 of that without overload,
    and memory bounded."""

    unloaded_answers_per_second: float
    offered_per_second: float
    answers_per_second: float
    goodput: float
    """Answers per second, of those without overload."""
    rejected: int
    rejection_p50_ms: float
    rejection_p99_ms: float
    other_statuses: int
    memory_growth_mb: float
    """Of the service, during the overload."""


class Departures(NamedTuple):
    """No slot is lost, and those who stay notice nothing."""

    left: int
    bystander_answers: int
    bystander_answers_changed: int
    still_running: float
    """Requests that the service counts a moment after the last has left: 0."""
    answers_at_once_afterwards: int
    """As many as there are slots."""


async def overload(url: str, config: LoadConfig) -> Overload:
    """First as many requests at a time as there are slots, then `overload` times as many."""
    async with _client() as http:
        slots = config.service.engine.slots
        await asyncio.gather(*[_ask(http, url, config, seed) for seed in range(slots)])  # warm
        unloaded = await _closed_loop(http, url, config, 2 * slots, config.seconds / 6)
        before = _service_memory_mb()
        offered = config.overload * unloaded
        tasks, began = [], time.monotonic()
        for number in range(round(offered * config.seconds)):
            await asyncio.sleep(max(0.0, began + number / offered - time.monotonic()))
            tasks.append(asyncio.create_task(_ask(http, url, config, number)))
        outcomes = await asyncio.gather(*tasks)
        seconds = time.monotonic() - began
        growth = _service_memory_mb() - before
    rejected = np.array([took for status, took, _ in outcomes if status == 429] or [np.nan])
    answered = sum(status == 200 for status, _, _ in outcomes)
    p50, p99 = np.percentile(1000 * rejected, [50, 99])
    return Overload(
        unloaded_answers_per_second=unloaded,
        offered_per_second=len(outcomes) / config.seconds,
        answers_per_second=answered / seconds,
        goodput=answered / seconds / unloaded,
        rejected=sum(status == 429 for status, _, _ in outcomes),
        rejection_p50_ms=float(p50),
        rejection_p99_ms=float(p99),
        other_statuses=sum(status not in (200, 429) for status, _, _ in outcomes),
        memory_growth_mb=growth,
    )


async def departures(url: str, config: LoadConfig) -> Departures:
    """Clients that leave at a random moment, in the midst of a few that stay."""
    rng = np.random.default_rng(config.seed)
    async with _client() as http:
        alone = [(await _ask(http, url, config, seed))[2] for seed in range(config.bystanders)]
        leaving, changed, answers = True, 0, 0

        async def stay(seed: int) -> None:
            nonlocal changed, answers
            while leaving:
                status, _, text = await _ask(http, url, config, seed)
                if status == 200:
                    answers, changed = answers + 1, changed + (text != alone[seed])

        async def leave(seed: int, moment: float, streams: bool) -> None:
            asked = asyncio.create_task(_ask(http, url, config, seed, stream=streams))
            await asyncio.sleep(moment)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

        staying = [asyncio.create_task(stay(seed)) for seed in range(config.bystanders)]
        slots = config.service.engine.slots
        together = max(1, slots + config.service.max_waiting - config.bystanders)
        for first in range(0, config.departures, together):
            moments = rng.exponential(0.1, together)
            await asyncio.gather(
                *[leave(first + i, moment, bool(i % 2)) for i, moment in enumerate(moments)]
            )
        leaving = False
        await asyncio.gather(*staying)
        await asyncio.sleep(1.0)
        running = await _under_way(http, url)
        last = await asyncio.gather(*[_ask(http, url, config, seed) for seed in range(slots)])
    return Departures(
        left=-(-config.departures // together) * together,
        bystander_answers=answers,
        bystander_answers_changed=changed,
        still_running=running,
        answers_at_once_afterwards=sum(status == 200 for status, _, _ in last),
    )


def _client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(timeout=600, limits=limits, trust_env=False)


async def _closed_loop(
    http: httpx.AsyncClient, url: str, config: LoadConfig, workers: int, seconds: float
) -> float:
    """Answers per second when each of `workers` asks again as soon as it is answered."""
    began, done = time.monotonic(), 0

    async def work(number: int) -> None:
        nonlocal done
        while time.monotonic() < began + seconds:
            status, _, _ = await _ask(http, url, config, number)
            done += status == 200  # not in the line above: that would forget what others counted

    await asyncio.gather(*[work(number) for number in range(workers)])
    return done / (time.monotonic() - began)


async def _ask(
    http: httpx.AsyncClient, url: str, config: LoadConfig, seed: int, stream: bool = False
) -> tuple[int, float, str]:
    """(status, seconds, text); the text of a stream is not looked at."""
    body: dict[str, Any] = {
        "model": config.service.name,
        "prompt": f"prompt {seed % 7}",
        "max_tokens": config.new_tokens,
        "temperature": 1.0,
        "seed": seed,
        "stream": stream,
    }
    began = time.monotonic()
    async with http.stream("POST", f"{url}/completions", json=body) as reply:
        data = await reply.aread()
    took = time.monotonic() - began
    whole = reply.status_code == 200 and not stream
    return reply.status_code, took, json.loads(data)["choices"][0]["text"] if whole else ""


async def _under_way(http: httpx.AsyncClient, url: str) -> float:
    lines = (await http.get(url.removesuffix("/v1") + "/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("persyn_num_requests"))


def _service_memory_mb() -> float:
    """Resident memory of this process's children and theirs, on Linux."""

    def children(process: int) -> list[int]:
        lists = Path(f"/proc/{process}/task").glob("*/children")
        own = [int(child) for listed in lists for child in listed.read_text().split()]
        return own + [grandchild for child in own for grandchild in children(child)]

    pages = [
        int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in children(os.getpid())
    ]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6
