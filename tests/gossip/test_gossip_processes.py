"""Two processes of four devices each give the numbers of one process of eight."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gossip_process import run_own_workers

PROCESSES = 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """What both hold, one after the other, as one process would have it."""
    folder, port = tmp_path_factory.mktemp("processes"), free_port()
    script = Path(__file__).with_name("gossip_process.py")
    outs = [folder / f"{index}.npz" for index in range(PROCESSES)]
    children = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(PROCESSES), str(index), out],
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, out in enumerate(outs)
    ]
    try:
        for child in children:
            _, errors = child.communicate(timeout=200)
            assert child.returncode == 0, errors
    finally:
        for child in children:
            child.kill()
            child.communicate()
    parts = [np.load(out) for out in outs]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0].files}


@pytest.fixture(scope="module")
def of_one_process():
    return run_own_workers()


@pytest.mark.parametrize("what", ["parameters", "sum weights"])
def test_permutations_between_processes_give_the_same_bits(what, of_one_process, of_two_processes):
    name = f"permutations, {what}"
    assert len(of_two_processes[name]) == 8
    np.testing.assert_array_equal(of_two_processes[name], of_one_process[name])


@pytest.mark.parametrize("what", ["parameters", "sum weights"])
def test_exact_means_between_processes_give_the_same_numbers(
    what, of_one_process, of_two_processes
):
    """But for the order in which an all-reduce adds."""
    name = f"means, {what}"
    np.testing.assert_allclose(of_two_processes[name], of_one_process[name], rtol=1e-5, atol=1e-5)
