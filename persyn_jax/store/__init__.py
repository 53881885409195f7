"""All that is written to disk: record files, the answer store, run folders, stage manifests.

    files       one file, whole or not at all; JSON; hashes
    tables      records as Parquet
    answers     the answer store, shared by runs
    run_folder  runs/NAME: folders, the lock, metrics.jsonl
    stages      stage manifests: is this stage finished, and with what?

Whatever goes wrong with a file ends in one `ConfigError` that names it.
"""

from persyn_jax.store.answers import AnswerStore, StoredAnswer, answer_key
from persyn_jax.store.files import (
    read_json,
    sha256_of,
    write_bytes,
    write_json,
    write_text,
    writing,
    writing_jsonl,
)
from persyn_jax.store.run_folder import (
    append_metrics,
    hold,
    prepare,
    read_metrics,
    truncate_metrics,
)
from persyn_jax.store.stages import (
    Fingerprints,
    Manifest,
    adopt,
    discard,
    finish,
    finished,
    read_manifest,
)
from persyn_jax.store.tables import iterate_records, read_records, write_records

__all__ = [
    "AnswerStore",
    "Fingerprints",
    "Manifest",
    "StoredAnswer",
    "adopt",
    "answer_key",
    "append_metrics",
    "discard",
    "finish",
    "finished",
    "hold",
    "iterate_records",
    "prepare",
    "read_json",
    "read_manifest",
    "read_metrics",
    "read_records",
    "sha256_of",
    "truncate_metrics",
    "write_bytes",
    "write_json",
    "write_records",
    "write_text",
    "writing",
    "writing_jsonl",
]
