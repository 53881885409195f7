"""Fine-tunes the student on the routed answers, by workers that gossip.

uv run scripts/train_student.py --config configs/quickstart.yaml

On several hosts, start it on each, with a run folder that all of them see: with `--distributed`
where JAX can find out by itself who is there (TPU slices, Slurm, Open MPI), else with
`--coordinator`, `--processes` and `--process`.
"""

from persyn_jax.pipeline.command import stage_main

if __name__ == "__main__":
    stage_main(
        "Fine-tunes the student on the routed answers, by workers that gossip.",
        "train_student",
        by_processes=True,
    )
