"""Eight host devices on the CPU, strict rank promotion, no deadlines (the first call compiles).

All that a test run compiles lies in one folder while it lasts, or in the one that the environment
names: most tests, and the processes that they start, need programs that another one has compiled
before.
"""

import os
import tempfile

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("persyn", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("persyn")


def pytest_configure(config):
    """xdist's processes begin after this, and like those that tests start inherit the variables."""
    if "PYTEST_XDIST_WORKER" in os.environ or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="persyn-programs-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """Fails, never skips, when the multi-device tests could not mean what they say."""
    assert jax.device_count() == 8, f"the tests need 8 host devices, got {jax.device_count()}"
