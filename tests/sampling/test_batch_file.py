"""Batch files as data: cut short anywhere, larger than memory should hold, written by vLLM."""

import json
import tracemalloc

import pytest
from batch_server import GOOD, entry
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.sampling import batch_file


@given(data=st.data())
def test_output_cut_anywhere_loses_the_last_line_only(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    lines = [batch_file.answer_row(f"q{n}\ud800", 200, None, GOOD) for n in range(4)]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    with open(path, "rb") as file:
        held = batch_file.read_output(file, path)
    ends = [sum(map(len, lines[: n + 1])) for n in range(4)]
    complete = [n for n, end in enumerate(ends) if cut >= end - 1]  # only "\n" may be missing
    assert list(held.outcomes) == [f"q{n}\ud800" for n in complete]
    assert held.whole_bytes == (min(cut, ends[complete[-1]]) if complete else 0)
    assert held.ends_line == (cut + 1 not in ends)


def test_memory_does_not_grow_with_the_bodies(tmp_path):
    """200 entries of half a megabyte: read one at a time."""
    source = tmp_path / "in.jsonl"
    with open(source, "w") as file:
        for n in range(200):
            body = {"prompt": f"q{n}", "padding": "x" * 500_000}
            file.write(json.dumps(entry(f"q{n}", body=body)) + "\n")
    tracemalloc.start()
    assert len(batch_file.check_input(source)) == 200
    for read in batch_file.read_entries(source):
        assert read.url == "/v1/completions"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize(("row", "outcome"), [
    ({"response": {"status_code": 200, "request_id": "vllm-batch-1", "body": GOOD}}, "answered"),
    ({"response": {"status_code": 400, "request_id": "vllm-batch-1", "body": None},
      "error": {"message": "too long", "code": 400}}, "refused"),
    ({"response": {"status_code": 503, "request_id": "r", "body": {}}, "error": {}}, "failed"),
    ({"response": {"status_code": 404, "request_id": "r", "body": {}}}, "failed"),
    ({"response": None, "error": {"code": "no_response", "message": "m"}}, "failed"),
])  # fmt: skip
def test_newest_row_of_an_entry_counts_whoever_wrote_it(tmp_path, row, outcome):
    older = batch_file.error_row("a", "no_response", "down")
    newest = json.dumps({"id": "vllm-1", "custom_id": "a", "error": None} | row).encode() + b"\n"
    (tmp_path / "out.jsonl").write_bytes(older + newest)
    with open(tmp_path / "out.jsonl", "rb") as file:
        held = batch_file.read_output(file, tmp_path / "out.jsonl")
    assert held.outcomes == {"a": outcome}
