"""Writes report.html and report.json of a finished run.

uv run scripts/report.py --config configs/quickstart.yaml
"""

from persyn_jax.pipeline.command import stage_main

if __name__ == "__main__":
    stage_main("Writes report.html and report.json of a finished run.", "report")
