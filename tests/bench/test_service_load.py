"""The load studies, short: what must hold in them holds in a few seconds too."""

import asyncio
from pathlib import Path

import pytest

from persyn_jax import config
from persyn_jax.bench import service_load as load
from persyn_jax.sampling.process import running_service

CONFIG = config.load(
    load.LoadConfig,
    Path(__file__).parents[2] / "configs" / "service_load.yaml",
    ["seconds=3", "departures=30", "new_tokens=100"],
)


@pytest.fixture(scope="module")
def url():
    with running_service(CONFIG.service, "cpu") as url:
        yield url


def test_overload_is_refused_and_the_rest_is_answered(url):
    found = asyncio.run(load.overload(url, CONFIG))
    assert found.rejected > 0
    assert found.other_statuses == 0
    assert 0 < found.answers_per_second < found.offered_per_second / 2
    assert found.rejection_p50_ms < 1000 / found.unloaded_answers_per_second * 20
    assert found.memory_growth_mb < 64


def test_those_who_leave_take_no_slot_along_and_change_nothing(url):
    found = asyncio.run(load.departures(url, CONFIG))
    assert found.left >= 30
    assert found.bystander_answers > 0
    assert found.bystander_answers_changed == 0
    assert found.still_running == 0
    assert found.answers_at_once_afterwards == CONFIG.service.engine.slots
