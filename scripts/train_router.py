"""Trains the router and says whether it beats the best constant teacher.

uv run scripts/train_router.py --config configs/quickstart.yaml
"""

from persyn_jax.pipeline.command import stage_main

if __name__ == "__main__":
    stage_main(
        "Trains the router and says whether it beats the best constant teacher.", "train_router"
    )
