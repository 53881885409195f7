"""The check of a pod, on 8 host devices, on one device, and on 2 processes of 4 devices each."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from persyn_jax import config
from persyn_jax.bench import check_pod
from persyn_jax.bench.check_pod import CheckPodConfig, Workers, all_workers, run_checks
from persyn_jax.mesh import make_mesh

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "check_pod.py"
QUICK = CheckPodConfig(platform="cpu", rounds=60, dimension=512)


@pytest.fixture(scope="module")
def on_eight_devices():
    return list(run_checks(QUICK, all_workers()))


def test_all_checks_pass_on_eight_devices(on_eight_devices):
    assert all_workers().count == 8
    assert len(on_eight_devices) == 6
    assert [check.name for check in on_eight_devices if not check.passed] == []


def test_workers_that_share_the_only_device_pass_too_with_the_same_numbers(on_eight_devices):
    workers = Workers(8, make_mesh(1))
    assert workers.share_a_device
    assert_same_numbers(list(run_checks(QUICK, workers)), on_eight_devices)


def test_an_odd_number_of_workers_passes():
    checks = list(run_checks(QUICK, Workers(5, make_mesh(5))))
    assert [check.name for check in checks if not check.passed] == []


def broken(monkeypatch, name, function):
    """Names of the checks that fail when a part of `gossip` is replaced."""
    monkeypatch.setattr(check_pod.gossip, name, function)
    return {check.name for check in run_checks(QUICK, Workers(8, make_mesh(1))) if not check.passed}


def test_messages_that_go_astray_are_noticed(monkeypatch):
    def receive(tree, branch, bank, axis_name):
        return jax.lax.ppermute(tree, axis_name, [(w, (w + 1) % 8) for w in range(8)])

    assert broken(monkeypatch, "receive", receive) == {
        "messages that differ from NumPy's permutation"
    }


def rule(change):
    """GoSGD whose update is changed by change(params, state, params before)."""
    gosgd = check_pod.gossip.gosgd

    def make(exchange):
        mixing = gosgd(exchange)

        def update(updates, mix_state, params, round):
            return change(*mixing.update(updates, mix_state, params, round), params + updates)

        return mixing._replace(update=update)

    return make


def test_weights_that_leak_are_noticed(monkeypatch):
    def leaking(params, state, before):
        return params, state._replace(sum_weight=state.sum_weight * np.float32(0.999))

    assert "change of the total sum weight" in broken(monkeypatch, "gosgd", rule(leaking))


def test_parameters_that_leak_are_noticed(monkeypatch):
    def leaking(params, state, before):
        return params * np.float32(0.999), state

    assert "drift of the weighted mean" in broken(monkeypatch, "gosgd", rule(leaking))


def test_an_exchange_that_mixes_too_little_is_noticed(monkeypatch):
    def lazy(params, state, before):
        return 0.8 * params + 0.2 * before, state

    failed = broken(monkeypatch, "gosgd", rule(lazy))
    assert "consensus distance under random updates" in failed
    assert any(name.startswith("contraction a round") for name in failed)


def test_two_processes_come_to_the_verdict_of_one(tmp_path, on_eight_devices):
    """As on two hosts: each shows 4 devices, only the first prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # Speed of compilation, not of the program, is what counts here.
    flags = "--xla_backend_optimization_level=0"
    words = ["--quick", "host_devices=4", "--coordinator", address, "--processes", "2"]
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *words, "--process", str(p), "--json", f"{p}.json"],
            cwd=tmp_path,
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for p in range(2)
    ]
    outputs = [process.communicate(timeout=250) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"]
    summary = json.loads((tmp_path / "0.json").read_text())
    assert outputs[0][0].endswith(json.dumps(summary, indent=2) + "\n")
    assert "passed" not in outputs[1][0]
    assert summary["passed"] is True
    assert (summary["devices"], summary["processes"], summary["workers"]) == (8, 2, 8)
    loaded = config.validate(CheckPodConfig, summary["config"], "summary")
    assert dataclasses.replace(QUICK, host_devices=4).rounds == loaded.rounds
    found = [check_pod.Check(**check) for check in summary["checks"]]
    assert_same_numbers(found, on_eight_devices)
    times = {time["rule"]: time for time in summary["step_times"]}
    assert list(times) == ["no gossip", "gossip", "all-reduce"]
    assert times["no gossip"]["ratio"] == 1
    assert all(0 < time["fastest_ms"] <= time["median_ms"] for time in times.values())
    assert set(summary["versions"]) >= {"python", "jax", "jaxlib"}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--platform", "npu"], "platform"),
        (["rounds=1"], "rounds"),
        (["--coordinator", "127.0.0.1:1"], "number of processes"),
    ],
)
def test_bad_input_ends_with_one_line_and_2(tmp_path, words, complaint):
    result = subprocess.run(
        [sys.executable, SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert complaint in line.lower()


def assert_same_numbers(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.name, one.expected, one.passed) == (other.name, other.expected, other.passed)
        assert one.measured == pytest.approx(other.measured, rel=1e-4, abs=1e-7)
