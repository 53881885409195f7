"""The client's bench, on few requests: it measures what it says."""

import json
import runpy
import sys
from pathlib import Path

import httpx
import pytest

from persyn_jax.bench.mock_endpoint import mock_endpoint
from persyn_jax.sampling.config import ClientConfig

ROOT = Path(__file__).parents[2]


def test_every_request_is_answered_and_stored(tmp_path, monkeypatch, capfd):
    summary = tmp_path / "speed.json"
    words = ["requests=200", "client.concurrency=7", "--json", str(summary)]
    monkeypatch.setattr(sys, "argv", ["client_speed.py", *words])
    runpy.run_path(str(ROOT / "scripts" / "client_speed.py"), run_name="__main__")
    speed = json.loads(summary.read_text())
    assert speed["stored"] == speed["requests"] == 200
    assert speed["requests_per_second"] * speed["seconds"] == pytest.approx(200)
    assert speed["config"]["client"]["concurrency"] == 7
    assert speed["config"]["client"]["attempts"] == ClientConfig().attempts
    # No more than 7 at once, each of which takes the endpoint 0.02 s.
    assert speed["seconds"] > 200 / 7 * 0.02
    assert "200 answers stored" in capfd.readouterr().out


def test_the_mock_endpoint_counts_what_it_is_asked_even_in_pieces():
    with mock_endpoint(0.0) as url, httpx.Client() as http:
        body = json.dumps({"messages": [{"role": "user", "content": "é"}]}).encode()
        for content in (body, iter([body])):
            length = {"Content-Length": str(len(body))}
            reply = http.post(f"{url}/chat/completions", content=content, headers=length).json()
            assert reply["choices"][0]["finish_reason"] == "stop"
        assert http.get(f"{url}/asked").json() == {"é": 2}
