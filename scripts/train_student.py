"""Fine-tunes the student on the routed answers, by workers that gossip.

uv run scripts/train_student.py --config configs/quickstart.yaml
"""

from persyn_jax.pipeline.command import stage_main

if __name__ == "__main__":
    stage_main(
        "Fine-tunes the student on the routed answers, by workers that gossip.", "train_student"
    )
