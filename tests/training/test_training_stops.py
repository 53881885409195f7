"""How a training ends before its time: SIGTERM, and a step that never finishes."""

import os
import signal
import subprocess
import sys
import time

from persyn_jax.training.loop import stop_on_sigterm, watchdog


def test_sigterm_asks_to_stop_and_is_itself_again_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stops:
        assert not stops()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops()
    assert signal.getsignal(signal.SIGTERM) is before


STUCK = """
import time
from persyn_jax import mesh
from persyn_jax.training.loop import watchdog
mesh.start_platform("cpu", 1)
with watchdog(0.5) as begins:
    time.sleep(1)  # compiling: nothing is watched yet
    for step in range(1, 4):
        begins(step)
        time.sleep(0.2)
    begins(4)
    time.sleep(60)
"""


def test_a_stuck_step_ends_the_process_and_names_rank_and_step():
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50
    )
    assert time.monotonic() - began < 40
    assert ended.returncode == 1
    assert ended.stderr.strip() == (
        "error: rank 0: training step 4 has not finished in 0.5 s (training.step_seconds): a "
        "process or a device is stuck; the same command goes on from the last checkpoint"
    )


def test_a_training_that_ends_in_time_is_let_be():
    with watchdog(0.2) as begins:
        begins(1)
    time.sleep(0.4)
