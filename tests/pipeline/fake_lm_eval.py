"""Stands in for lm-eval 0.4.13: takes its command line and writes what it writes, as recorded.

It answers all items rightly, but `before` only those of even number. Tasks without a file of data
end as lm-eval does without a hub. Every call is a line of calls.jsonl beside the run folder.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

STAMP = "2026-11-27T07-33-59.572537"
NO_HUB = (
    "ConnectionError: Couldn't reach 'openai/gsm8k' on the Hub "
    f"({os.environ.get('FAKE_HUB', 'OfflineModeIsEnabled')})"
)
NO_PACKAGE = "ModuleNotFoundError: No module named 'langdetect'"
SHOWN_FILTERS = ("strict-match", "last-number")  # two, as of gsm8k; the first finds nothing


def main() -> None:
    parser = argparse.ArgumentParser()
    for word in ("model", "model_args", "tasks", "include_path", "output_path", "batch_size"):
        parser.add_argument(f"--{word}")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--gen_kwargs")
    parser.add_argument("--log_samples", action="store_true")
    parser.add_argument("--apply_chat_template", action="store_true")
    given = parser.parse_args()
    here = Path.cwd()
    model = here.parent.name
    with Path(os.environ["FAKE_CALLS"]).open("a") as calls:
        calls.write(json.dumps({**vars(given), "examined": model}) + "\n")
    if given.tasks == os.environ.get("FAKE_FAILS"):
        sys.exit("RuntimeError: 400, message='Bad Request'")
    if given.tasks in ("gsm8k", "ifeval"):
        said = {"gsm8k": NO_HUB, "ifeval": NO_PACKAGE}[given.tasks]
        sys.exit(f"Traceback (most recent call last):\n  File ...\n{said}")
    rows = [json.loads(line) for line in Path(f"{given.tasks}.jsonl").read_text().splitlines()]
    samples = [
        sample(number, row, kind, model)
        for kind in ((*SHOWN_FILTERS,) if given.tasks == "svamp_local" else ("none",))
        for number, row in enumerate(rows[: given.limit])
    ]
    folder = here / given.output_path / "student"
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in samples)
    (folder / f"samples_{given.tasks}_{STAMP}.jsonl").write_text(lines)
    version = os.environ.get("FAKE_VERSION", "0.4.13")
    (folder / f"results_{STAMP}.json").write_text(json.dumps({"lm_eval_version": version}))


def sample(number: int, row: dict, kind: str, model: str) -> dict:
    right = (model != "before" or number % 2 == 0) and kind != "strict-match"
    text = str(row.get("answer", row.get("Answer"))) if right else "no"
    return {
        "doc_id": number,
        "doc": row,
        "target": "b",
        "arguments": {"gen_args_0": {"arg_0": "a?", "arg_1": {"until": []}}},
        "resps": [[f"{text}\nSo there."]],
        "filtered_resps": [text],
        "filter": kind,
        "metrics": ["exact_match"],
        "doc_hash": hashlib.sha256(json.dumps(row).encode()).hexdigest(),
        "prompt_hash": "5289f1df",
        "target_hash": "3e23e816",
        "exact_match": float(right),
    }


if __name__ == "__main__":
    main()
