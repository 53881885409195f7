"""The conformance kit against a model whose probabilities are exact, with one mistake at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scripted_model

from persyn_jax.bench import endpoint_checks, endpoint_text
from persyn_jax.bench.endpoint_checks import CHECKS, Row, check_endpoint, failed, table_line
from persyn_jax.config import ConfigError

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_endpoint.py"


def verdicts(fault: str | None = None, without: tuple[str, ...] = ()) -> dict[str, Row]:
    with scripted_model.serving(fault, without) as url:
        _, rows = check_endpoint(url, None, None, None, lambda row: None)
    return {row.name: row for row in rows}


def script(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_sound_endpoint_passes_everything(tmp_path):
    with scripted_model.serving() as url:
        done = script(url, "--json", str(tmp_path / "verdicts.json"))
    assert (done.returncode, done.stderr) == (0, "")
    written = json.loads((tmp_path / "verdicts.json").read_text())
    names = ["list of models", *(name for name, _ in CHECKS)]
    assert [row["name"] for row in written["verdicts"]] == names
    assert {row["state"] for row in written["verdicts"]} == {"pass"}
    assert (written["url"], written["model"], written["passed"]) == (url, "tiny", True)
    assert done.stdout.splitlines() == [table_line(Row(**row)) for row in written["verdicts"]]


@pytest.mark.parametrize(("fault", "check", "evidence"), [
    ("early", "echo off by one", "holds the logprob of the next token"),
    ("late", "echo off by one", "holds the logprob of the token before"),
    ("permuted", "echo off by one", "at no shift equal"),
    ("no logprobs", "echo with logprobs", "0 logprobs for 11 prompt tokens"),
    ("echo ignored", "echo with logprobs", "echo is silently ignored"),
    ("end not counted", "echo counts the end", "19 logprobs for 19 prompt tokens and 1 generated"),
    ("constant", "better than chance", "0 of 16"),
    ("end shown", "end of text", "shows '</s>'"),
    ("stop at tokens", "stop strings", "gave"),
    ("seed", "seed replay", "seed 11 gave"),
    ("one seed", "seed replay", "4 seeds all gave"),
    ("batch", "batch order", "of 8 greedy answers depend"),
    ("prefix cache", "prefix cache", "with a warm cache"),
    ("characters split", "streaming", "a character is split"),
    ("no usage", "streaming", "no usage"),
    ("no done", "streaming", "not [DONE]"),
    ("logit_bias ignored", "logit_bias", "silently ignored"),
    ("n ignored", "n: 2", "1 choices"),
    ("any model", "unknown model", "status 200"),
    ("crash", "invalid fields", "status 500"),
])  # fmt: skip
def test_each_mistake_fails_its_own_check_and_no_other(fault, check, evidence):
    rows = verdicts(fault)
    assert failed(list(rows.values())) == [check]
    assert evidence in rows[check].evidence


@pytest.mark.parametrize(("fault", "checks"), [
    ("rounded top", ["greedy maximum", "greedy maximum of echo"]),
    ("usage", ["max_tokens", "end of text"]),
])  # fmt: skip
def test_mistakes_that_two_checks_see(fault, checks):
    assert failed(list(verdicts(fault).values())) == checks


def test_what_depends_on_a_broken_echo_is_undecided():
    rows = verdicts("no logprobs")
    undecided = {name for name, row in rows.items() if row.state == "undecided"}
    assert undecided == {
        "echo off by one",
        "greedy maximum of echo",
        "echo counts the end",
        "echo with max_tokens 0",
        "better than chance",
    }


def test_model_that_knows_nothing_is_undecided_and_not_wrong():
    """Its logprobs are sound, and say of sensible text what they say of nonsense."""
    row = verdicts("random weights")["better than chance"]
    assert row.state == "undecided"
    assert "right for a model that knows nothing" in row.evidence


def test_what_is_honestly_refused_is_no_failure():
    rows = verdicts(without=("echo", "logprobs", "logit_bias", "n", "stream", "seed"))
    assert failed(list(rows.values())) == []
    assert rows["echo with logprobs"] == Row(
        "echo with logprobs",
        "not offered",
        "/completions echo logprobs: status 400: echo is not offered",
    )
    states = {name: row.state for name, row in rows.items()}
    assert states["logit_bias"] == states["n: 2"] == "pass"
    assert states["streaming"] == states["seed replay"] == "not offered"
    assert states["stop strings"] == "pass"


@pytest.mark.parametrize("fault", ["early", "late", None])
def test_shift_is_found_by_text_where_there_are_no_token_ids(fault):
    rows = verdicts(fault, without=("token ids", "return_token_ids"))
    assert failed(list(rows.values())) == (["echo off by one"] if fault else [])
    assert "token ids" not in rows["echo with logprobs"].evidence


def test_endpoint_with_chat_alone_is_checked_by_chat():
    rows = verdicts(without=("completions",))
    states = {name: row.state for name, row in rows.items()}
    assert failed(list(rows.values())) == []
    assert {states[name] for name in ("streaming", "stop strings", "batch order")} == {"pass"}
    assert states["echo with logprobs"] == "not offered"


def test_endpoint_without_chat_is_checked_by_completions():
    rows = verdicts(without=("chat/completions",))
    assert {name for name, row in rows.items() if row.state != "pass"} == {"chat completion"}
    assert rows["chat completion"].state == "not offered"


def test_failure_exits_with_1_and_names_the_check():
    with scripted_model.serving("n ignored") as url:
        done = script(url)
    assert done.returncode == 1
    assert done.stderr == "error: failed: n: 2\n"


def test_bad_input_exits_with_2_and_one_line(tmp_path):
    with scripted_model.serving() as url:
        cases = [
            (["nowhere"], "'nowhere': must begin with http:// or https:// and a host"),
            (["http://127.0.0.1:9/v1"], "cannot be reached"),
            ([url, "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
            ([url, "--tokenizer", str(tmp_path)], str(tmp_path)),
        ]
        for words, complaint in cases:
            done = script(*words)
            assert (done.returncode, done.stdout) == (2, "")
            (line,) = done.stderr.splitlines()
            assert complaint in line


def test_unexpected_answers_are_failures_and_not_a_crash():
    """Every response is JSON of the wrong kind."""
    for body in (b"[]", b"{}", b'"x"', b'{"choices": [3], "usage": []}', b"<html>"):
        with scripted_model.serving(body) as url:
            _, rows = check_endpoint(url, "tiny", None, None, lambda row: None)
        assert rows[0].state == "FAIL"
        assert "pass" not in {row.state for row in rows if row.name.startswith("echo")}
        assert rows[1].state == "FAIL"


def test_no_model_listed_and_none_named_is_bad_input():
    with scripted_model.serving(b"{}") as url, pytest.raises(ConfigError, match="--model"):
        check_endpoint(url, None, None, None, lambda row: None)


def test_stop_texts_lie_across_two_tokens_and_come_first_at_their_place():
    tokens = [" the", " big", " o", "ld", " big", " c", "i", "ty"]
    text = "".join(tokens)
    stops = list(endpoint_text._stops(text, tokens))
    ends = {sum(map(len, tokens[:n])) for n in range(1, len(tokens))}
    assert stops
    for place, stop in stops:
        assert text.index(stop) == place
        assert place + 1 in ends
        assert len(stop) == 2
    for place, stop in endpoint_text._stops("some words without any tokens", []):
        assert "some words without any tokens".index(stop) == place


def test_table_has_one_line_for_each_check():
    assert len({name for name, _ in endpoint_checks.CHECKS}) == len(CHECKS)
    assert "\n" not in table_line(Row("n", "FAIL", "evidence"))
