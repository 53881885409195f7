"""Stage route: the router chooses one teacher for every prompt."""

from collections.abc import Sequence

import numpy as np

from persyn_jax.models import router
from persyn_jax.models.decoder import Params
from persyn_jax.records import Prompt, Route
from persyn_jax.routing.strategies import route_by_router


def route(
    prompts: Sequence[Prompt], state_ND: np.ndarray, head: Params, teachers: Sequence[str]
) -> list[Route]:
    """The teacher with the highest Bradley-Terry coefficient for each prompt; ties to the first.

    state_ND: the backbone's pooled state of each prompt, float32.
    """
    coefficient_NM = np.asarray(router.coefficients(head, state_ND))
    chosen_N = route_by_router(coefficient_NM)
    top_N2 = -np.sort(-coefficient_NM, axis=1)[:, :2]
    return [
        Route(
            prompt_id=prompt.id,
            coefficients=[float(coefficient) for coefficient in coefficient_M],
            teacher=teachers[chosen],
            margin=float(top_2[0] - top_2[1]),
        )
        for prompt, coefficient_M, chosen, top_2 in zip(
            prompts, coefficient_NM, chosen_N, top_N2, strict=True
        )
    ]
