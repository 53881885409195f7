"""Every teacher answers every calibration prompt.

uv run scripts/calibrate.py --config configs/quickstart.yaml
"""

from persyn_jax.pipeline.command import stage_main

if __name__ == "__main__":
    stage_main("Every teacher answers every calibration prompt.", "calibrate")
