"""Eight host devices on the CPU, strict rank promotion, no deadlines (the first call compiles)."""

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("persyn", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("persyn")


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """Fails, never skips, when the multi-device tests could not mean what they say."""
    assert jax.device_count() == 8, f"the tests need 8 host devices, got {jax.device_count()}"
