"""Two processes of four devices train as one process of eight does, and go on from each other."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from training_process import train

PROCESSES = 2


def by_processes(folder: Path) -> list[list[dict]]:
    """The rows of metrics that each process saw."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    script = Path(__file__).with_name("training_process.py")
    children = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(PROCESSES), str(index), folder],
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(PROCESSES)
    ]
    try:
        for child in children:
            _, errors = child.communicate(timeout=250)
            assert child.returncode == 0, errors
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return [json.loads((folder / f"{index}.json").read_text()) for index in range(PROCESSES)]


def assert_same_training(found: list[dict], expected: list[dict]) -> None:
    """To the bit, but for the consensus distance, which is summed over all devices.

    Two devices of a worker add two numbers, which has one order, and a permutation adds nothing.
    """
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key.startswith(("consensus", "measured_contraction", "estimated")):
                assert value == pytest.approx(other[key], rel=1e-4, abs=1e-12), key
            else:
                assert value == other[key], key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, rows of metrics) of one process."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(folder)


def test_two_processes_train_as_one(alone, tmp_path):
    _, expected = alone
    first, second = by_processes(tmp_path)
    assert first == second
    assert len(first) == 6
    assert_same_training(first, expected)


def test_two_processes_go_on_from_the_checkpoint_of_one(alone, tmp_path):
    """The older of its two; the newer is damaged, which only the first process looks at."""
    folder, expected = alone
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    manifests = sorted((tmp_path / "checkpoints").glob("*.manifest.json"))
    assert [path.name[:8] for path in manifests] == ["00000002", "00000004"]
    manifests[-1].write_text("{}")
    first, second = by_processes(tmp_path)
    assert first == second
    assert_same_training(first, expected[2:])
