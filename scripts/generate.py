"""The chosen teacher answers each prompt.

uv run scripts/generate.py --config configs/quickstart.yaml
"""

from persyn_jax.pipeline.command import stage_main

if __name__ == "__main__":
    stage_main("The chosen teacher answers each prompt.", "generate")
