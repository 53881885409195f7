"""A teacher whose answers are in a file: what rows may look like, and whose answers they are."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persyn_jax.config import ConfigError, validate
from persyn_jax.evaluation.rows import Row
from persyn_jax.pipeline.answer_files import answers_of_file, file_fingerprint, read_answer
from persyn_jax.pipeline.answers import teacher_fingerprint
from persyn_jax.pipeline.calibrate import calibrate
from persyn_jax.pipeline.config import RunConfig
from persyn_jax.pipeline.estimate import estimate
from persyn_jax.pipeline.router_service import find_teachers
from persyn_jax.records import Prompt
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.store import AnswerStore

ASKED = "What  colour is\nthe Sky?"  # the prompts say the same in other letters


def make_prompt(prompt_id: str, *turns: str, split: str = "calibration") -> Prompt:
    return Prompt(
        id=prompt_id,
        messages=[{"role": "user", "content": turn} for turn in turns],
        source="mine",
        split=split,
        answer=None,
        verifier="exact_match",
        source_licence="CC0-1.0",
    )


SKY, SUM = make_prompt("sky", "what colour is the sky?"), make_prompt("sum", "What is 2 + 2?")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def teacher_of(path, name="mine", **values) -> TeacherConfig:
    return TeacherConfig(name=name, answers=path, licence="CC-BY-4.0", **values)


def batch(custom_id, text=None, status=200, error=None, **choice):
    choice = {"index": 0, "finish_reason": "stop", "message": {"content": text}, **choice}
    response = {"status_code": status, "request_id": "r", "body": {"choices": [choice]}}
    return {"id": "batch_1", "custom_id": custom_id, "response": response, "error": error}


USER, SAID = {"role": "user", "content": ASKED}, {"role": "assistant", "content": "Blue."}
FORMS = {
    "id and text": {"id": "sky", "text": "Blue."},
    "id and answer": {"id": "sky", "answer": "Blue.", "meta": [1]},
    "uuid and response": {"uuid": "sky", "response": "Blue."},
    "prompt and response": {"prompt": ASKED, "response": "Blue."},
    "alpaca": {"instruction": "What colour", "input": "is the sky?", "output": "Blue."},
    "messages": {"messages": [{"role": "system", "content": "Be brief."}, USER, SAID]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": "Blue."}]
    },
    "trl texts": {"prompt": ASKED, "completion": "Blue."},
    "trl messages": {"prompt": [USER], "completion": [SAID]},
    "chat batch": batch("sky", "Blue."),
    "text batch": {
        "custom_id": "sky",
        "response": {"status_code": 200, "body": {"choices": [{"text": "Blue."}]}},
    },
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_its_answer_to_its_prompt(tmp_path, form, ending):
    path = tmp_path / f"answers.{ending}"
    if ending == "jsonl":
        write(path, FORMS[form])
    else:
        pq.write_table(pa.Table.from_pylist([FORMS[form]]), path)
    found, missing = answers_of_file(teacher_of(path), [SKY, SUM])
    assert (found.text, found.finish_reason, found.error) == ("Blue.", "stop", None)
    assert (found.prompt_id, found.teacher, found.licence) == ("sky", "mine", "CC-BY-4.0")
    assert (found.usd, found.prompt_tokens, found.completion_tokens) == (0.0, 0, 0)
    assert found.usable
    assert (missing.prompt_id, missing.finish_reason, missing.usable) == ("sum", "error", False)
    assert missing.error == f"{path}: has no answer to it"


def test_several_turns_are_compared_together(tmp_path):
    prompt = make_prompt("talk", "Hi", "And you?")
    turns = [("user", "hi"), ("assistant", "Hello"), ("user", "and  you?"), ("assistant", "Fine.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    assert answers_of_file(teacher_of(path), [prompt])[0].text == "Fine."


def test_a_cut_off_or_empty_answer_is_not_usable(tmp_path):
    rows = {"id": "sky", "text": "Bl", "finish_reason": "length"}, {"id": "sum", "text": " "}
    cut, empty = answers_of_file(teacher_of(write(tmp_path / "a.jsonl", *rows)), [SKY, SUM])
    assert (cut.finish_reason, cut.usable, empty.usable) == ("length", False, False)


def test_a_batch_entry_that_failed_says_why_and_a_later_answer_takes_its_place(tmp_path):
    failed = [batch("sky", status=500), batch("sum", error={"message": "busy"})]
    path = write(tmp_path / "a.jsonl", *failed)
    sky, total = answers_of_file(teacher_of(path), [SKY, SUM])
    assert (sky.finish_reason, sky.error) == ("error", f"{path}:1: status 500")
    assert "busy" in total.error
    write(path, *failed, batch("sky", "Blue."), batch("sky", status=500))
    assert answers_of_file(teacher_of(path), [SKY])[0].text == "Blue."


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"id": "sky"}], r"a.jsonl:1: holds no answer: none of messages, .* custom_id with resp"),
        ([{"text": "Blue."}], "a.jsonl:1: says not what it answers: neither id, prompt_id, uuid"),
        ([{"messages": [USER]}], "a.jsonl:1: the last turn must be the assistant's"),
        ([{"messages": [{"role": "user"}]}], "a.jsonl:1: a turn must have `role` and `content`"),
        ([{"id": "sky", "text": 5}], "a.jsonl:1: a turn must have"),
        ([{"custom_id": "sky", "response": {"status_code": 200}}], "a.jsonl:1: response: has no b"),
        (
            [{"id": "sky", "prompt": "What is 2 + 2?", "text": "4"}],
            "a.jsonl:1: has the id of prompt 'sky', and another text as its prompt",
        ),
        (
            [{"id": "sky", "text": "Blue."}, {"prompt": ASKED, "text": "Red."}],
            r"a.jsonl:2: a second answer to prompt 'sky', after .*a.jsonl:1",
        ),
    ],
)
def test_a_row_that_cannot_be_understood_is_named(tmp_path, rows, complaint):
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(ConfigError, match=complaint):
        answers_of_file(teacher_of(path), [SKY, SUM])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.jsonl: no such file of answers"):
        answers_of_file(teacher_of(tmp_path / "nowhere.jsonl"), [SKY])


def test_what_follows_the_last_turn_is_the_answer():
    """`read_answer` leaves the rest of the row aside."""
    found = read_answer(Row("r", {"prompt": "a", "completion": "b", "label": True}))
    assert (found.question, found.text) == ("a", "b")


def no_service():
    raise AssertionError("a service was started though nobody is asked")


def run_calibrate(folder, teachers, prompts):
    with AnswerStore(folder / "answers.sqlite") as store:
        found = calibrate(prompts, teachers, None, store, ClientConfig(budget_usd=0), no_service)
        assert store.count() == 0
    return found


def test_calibration_takes_everything_from_files_and_asks_nobody(tmp_path):
    first = write(tmp_path / "first.jsonl", *({"id": p.id, "text": p.id} for p in (SUM, SKY)))
    second = write(tmp_path / "second.jsonl", {"id": "sky", "text": "Azure."})
    teachers = [teacher_of(first, "first"), teacher_of(second, "second")]
    found = run_calibrate(tmp_path, teachers, [SKY, SUM])
    assert [(a.prompt_id, a.teacher, a.text) for a in found.answers] == [
        ("sky", "first", "sky"),
        ("sky", "second", "Azure."),
        ("sum", "first", "sum"),
        ("sum", "second", ""),
    ]
    assert found.summary == {"answers": 4, "failed_answers": 1, "measured": {"asked": {}}}
    assert len({answer.key for answer in found.answers}) == 4


def test_a_file_without_any_of_the_answers_stops_with_one_line(tmp_path):
    path = write(tmp_path / "other.jsonl", {"id": "elsewhere", "text": "Blue."})
    with pytest.raises(ConfigError, match=r"other.jsonl: answers none of the 2 calibration prompt"):
        run_calibrate(tmp_path, [teacher_of(path)], [SKY, SUM])


def test_the_fingerprint_is_that_of_the_bytes(tmp_path):
    one = teacher_of(write(tmp_path / "one.jsonl", {"id": "sky", "text": "Blue."}), "one")
    same = teacher_of(write(tmp_path / "same.jsonl", {"id": "sky", "text": "Blue."}), "same")
    other = teacher_of(write(tmp_path / "other.jsonl", {"id": "sky", "text": "Red."}), "other")
    marks = [teacher_fingerprint(teacher, None) for teacher in (one, same, other)]
    assert marks[0] == marks[1] == file_fingerprint(one.answers) != marks[2]


def config_of(*teachers: dict) -> RunConfig:
    values = {
        "run": {"name": "own"},
        "sources": {"mine": {"kind": "file", "path": "prompts.jsonl"}},
        "teachers": list(teachers),
        "student": {"weights": "random:tiny"},
    }
    return validate(RunConfig, values, "run.yaml")


FILED = {"name": "a", "answers": "a.jsonl", "licence": "MIT"}


def test_teachers_with_files_need_no_service():
    assert config_of(FILED, {**FILED, "name": "b", "model": "m"}).service is None
    with pytest.raises(
        ConfigError, match=r"'b' has no base_url, no file of answers, and .* no serv"
    ):
        config_of(FILED, {"name": "b", "licence": "MIT"})


def test_a_file_of_answers_costs_nothing_and_cannot_be_asked():
    train = make_prompt("train", "Why?", split="train")
    filed = {"name": "b", "answers": "b.jsonl", "licence": "MIT"}
    found = estimate(config_of(FILED, filed), [SKY, SUM, train])
    assert (found.answers_generated, found.answers_generate_then_select) == (0, 0)
    assert found.tokens["calibrate"] == found.tokens["generate"] == 0 < found.tokens["score"]
    asked = {"name": "b", "base_url": "http://x/v1", "model": "m", "licence": "MIT"}
    found = estimate(config_of(FILED, asked), [SKY, SUM, train])
    assert (found.answers_generated, found.answers_generate_then_select) == (2 + 1, 3)
    with pytest.raises(ConfigError, match="teacher 'a': has a file of answers and no endpoint"):
        find_teachers(config_of(FILED, filed), ["a", "b"], no_service)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_url", "http://x/v1"),
        ("api_key_env", "KEY"),
        ("system", "Be brief."),
        ("examples", [{"question": "q", "answer": "a"}]),
        ("sampling", {"max_tokens": 9}),
        ("usd_per_million_prompt_tokens", 1.0),
    ],
)
def test_what_only_an_endpoint_needs_is_refused_beside_a_file(key, value):
    with pytest.raises(ConfigError, match=f"teacher 'b': has a file of answers, .* remove {key}"):
        config_of(FILED, {**FILED, "name": "b", "model": "m", key: value})


def test_a_licence_is_required_all_the_same():
    with pytest.raises(ConfigError, match=r"teachers.1.licence: is required"):
        config_of(FILED, {"name": "b", "answers": "b.jsonl"})
