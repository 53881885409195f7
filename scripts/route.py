"""Chooses one teacher for every prompt.

uv run scripts/route.py --config configs/quickstart.yaml
"""

from persyn_jax.pipeline.command import stage_main

if __name__ == "__main__":
    stage_main("Chooses one teacher for every prompt.", "route")
