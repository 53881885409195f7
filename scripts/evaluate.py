"""The student answers the eval prompts, before and after training.

uv run scripts/evaluate.py --config configs/quickstart.yaml
"""

from persyn_jax.pipeline.command import stage_main

if __name__ == "__main__":
    stage_main("The student answers the eval prompts, before and after training.", "evaluate")
