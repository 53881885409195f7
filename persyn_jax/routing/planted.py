"""Synthetic teachers of which the truth is known, to test what a router study finds.

Each prompt is a direction (its features). A teacher's quality and learnability on it are linear in
them, plus a constant of its own, plus noise that no router can know. The student gains
(1 - alpha) * quality + alpha * learnability, with a planted alpha; nobody but a test sees the gain.
"""

from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from persyn_jax.config import config_class
from persyn_jax.routing.rewards import combine
from persyn_jax.routing.strategies import Calibration
from persyn_jax.streams import numpy_stream


@config_class
class PlantedConfig:
    """The size of the planted world, and what there is to find in it."""

    teachers: Annotated[int, Field(ge=2)] = 5
    dimensions: Annotated[int, Field(ge=1)] = 8
    """Of a prompt's features."""
    sources: Annotated[int, Field(ge=1)] = 4
    """A prompt's source is the direction range that its features fall in."""
    between_teachers: Annotated[float, Field(ge=0)] = 0.5
    """Spread of the teachers' constants: what the best constant teacher has to offer. 0: none."""
    within_prompts: Annotated[float, Field(ge=0)] = 1.0
    """Spread that depends on the prompt: what routing has to offer. 0: no gain to find."""
    noise: Annotated[float, Field(ge=0)] = 0.5
    """Spread that depends on the answer alone, so that only the oracle knows it."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Weight of learnability in the gain."""


class Planted(NamedTuple):
    """N prompts of a planted world, with what is seen of them and what is true."""

    feature_ND: np.ndarray
    source_N: list[str]
    quality_NM: np.ndarray
    """float64: of each teacher's answer, of any size and sign."""
    learnability_NM: np.ndarray
    """float64, likewise."""
    gain_NM: np.ndarray
    """float64: what the student gains from each answer."""
    expected_gain_NM: np.ndarray
    """float64: the gain without the noise, all that can be known from the prompt."""


def planted(config: PlantedConfig, prompts: int, seed: int, draw: int = 0) -> Planted:
    """`prompts` prompts of the world of `seed`; another `draw` gives other prompts of it.

    The teachers depend on config and seed alone.
    """
    world = numpy_stream(seed, "planted world")
    shape = config.dimensions, config.teachers
    scale = config.within_prompts / np.sqrt(config.dimensions)
    weight_TDM = scale * world.normal(size=(2, *shape))
    constant_TM = config.between_teachers * world.normal(size=(2, config.teachers))

    rng = numpy_stream(seed, "planted prompts", draw)
    feature_ND = rng.normal(size=(prompts, config.dimensions))
    expected_TNM = feature_ND @ weight_TDM + constant_TM[:, None]
    term_TNM = expected_TNM + config.noise * rng.normal(size=expected_TNM.shape)
    angle_N = np.arctan2(feature_ND[:, -1], feature_ND[:, 0]) / (2 * np.pi) % 1
    return Planted(
        feature_ND=feature_ND,
        source_N=[f"source {int(angle * config.sources)}" for angle in angle_N],
        quality_NM=term_TNM[0],
        learnability_NM=term_TNM[1],
        gain_NM=combine(term_TNM[0], term_TNM[1], config.alpha),
        expected_gain_NM=combine(expected_TNM[0], expected_TNM[1], config.alpha),
    )


def as_calibration(world: Planted) -> Calibration:
    """What a study sees if its reward is the gain."""
    return Calibration(world.gain_NM, world.source_N, world.feature_ND)
