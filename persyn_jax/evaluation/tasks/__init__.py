"""Task files of ours for lm-eval, which reads them with `--include_path`; nothing here imports it.

    persyn_generated  the run's own eval prompts
    svamp             SVAMP; svamp_local reads it from a file
    livebench         the part of LiveBench that is scored by rule; livebench_local from a file

A task that reads a file finds it as NAME.jsonl in the folder that lm-eval runs in.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
