"""Scores every calibration answer: quality, and learnability for this student.

uv run scripts/score.py --config configs/quickstart.yaml
"""

from persyn_jax.pipeline.command import stage_main

if __name__ == "__main__":
    stage_main(
        "Scores every calibration answer: quality, and learnability for this student.", "score"
    )
