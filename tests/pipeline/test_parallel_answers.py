"""Files with many teachers' answers in a row, taken apart into prompts and files of answers."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax.config import ConfigError, validate
from persyn_jax.evaluation.sources import SourceConfig, load_prompts
from persyn_jax.pipeline.calibrate import calibrate
from persyn_jax.pipeline.parallel_answers import config_lines, import_parallel
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.store import AnswerStore

SCORE = "Skywork-Reward-Llama-3.1-8B"
ZOO = [
    {
        "uuid": f"u{n}",
        "instruction": f"Question {n}?",
        "gemma-2-2b-it": {"content": f"gemma {n}", SCORE: n / 2},
        "meta/Llama 3": {"content": f"llama {n}", SCORE: -n / 2},
    }
    for n in range(3)
]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json"])
def test_magpie_zoo_becomes_prompts_and_a_file_a_teacher(tmp_path, ending):
    files = [write(tmp_path / f"{n}.{ending}", ZOO[n : n + 2]) for n in (0, 2)]
    imported = import_parallel(files, tmp_path / "out")
    assert lines(tmp_path / "out" / "prompts.jsonl") == [
        {"id": f"u{n}", "prompt": f"Question {n}?"} for n in range(3)
    ]
    assert imported.answers == {"gemma-2-2b-it": 3, "meta/Llama 3": 3}
    assert lines(tmp_path / "out" / "answers" / "meta_Llama_3.jsonl") == [
        {"id": f"u{n}", "text": f"llama {n}", "scores": {SCORE: -n / 2}} for n in range(3)
    ]
    assert imported.prompts == 3


@pytest.mark.parametrize(
    "answers",
    [
        {"small": "It is 4.", "large": "4"},
        {
            "responses": [
                {"model": "small", "response": "It is 4."},
                {"model": "large", "text": "4"},
            ]
        },
        {"answers": {"small": "It is 4.", "large": {"content": "4"}}},
        {"small": {"response": "It is 4."}, "large": {"response": "4"}, "level": {"grade": 3}},
    ],
    ids=["columns of text", "list", "mapping", "columns of structs"],
)
def test_mathematics_comes_with_its_reference_answer(tmp_path, answers):
    row = {"problem": "2 + 2?", "solution": 4, "source": "gsm8k", **answers}
    import_parallel([write(tmp_path / "math.jsonl", [row])], tmp_path / "out")
    assert lines(tmp_path / "out" / "prompts.jsonl") == [
        {"id": "000000", "prompt": "2 + 2?", "answer": "4"}
    ]
    written = {path.stem: lines(path) for path in (tmp_path / "out" / "answers").iterdir()}
    assert written == {
        "small": [{"id": "000000", "text": "It is 4."}],
        "large": [{"id": "000000", "text": "4"}],
    }


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"a": "x"}], "bad.jsonl:1: has no prompt: none of instruction, prompt"),
        ([{"prompt": "x"}], "bad.jsonl:1: has no answer of any teacher"),
        ([{"prompt": "x", "responses": [{"text": "y"}]}], "bad.jsonl:1: an answer says not whose"),
        ([ZOO[0], ZOO[0]], "bad.jsonl:2: id 'u0' is also that of .*bad.jsonl:1"),
        ([{"prompt": "x", "a b": "1", "a_b": "2"}], "teachers 'a b' and 'a_b': both would be"),
    ],
)
def test_what_cannot_be_imported_is_named_and_leaves_no_file(tmp_path, rows, complaint):
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ConfigError, match=complaint):
        import_parallel([path], tmp_path / "out")
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == []


def test_the_config_lines_are_yaml_that_lacks_counts_and_licences(tmp_path):
    imported = import_parallel([write(tmp_path / "zoo.jsonl", ZOO)], tmp_path / "out")
    values = yaml.safe_load("\n".join(config_lines("magpie_zoo", imported)))
    assert values["sources"]["magpie_zoo"]["path"] == str(tmp_path / "out" / "prompts.jsonl")
    assert values["teachers"][1] == {
        "name": "meta/Llama 3",
        "answers": str(tmp_path / "out" / "answers" / "meta_Llama_3.jsonl"),
        "licence": None,
    }
    with pytest.raises(ConfigError, match="licence"):
        validate(TeacherConfig, values["teachers"][0], "config.yaml")


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
tables = st.lists(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), text, min_size=1), min_size=1, max_size=5
)


@settings(max_examples=25)
@given(tables)
def test_imported_answers_come_out_of_calibration_exactly_once(tmp_path_factory, table):
    """Every answer that was there, and an error in the place of every one that was not."""
    folder = tmp_path_factory.mktemp("imported")
    rows = [
        {"id": f"id-{n}", "prompt": f"Prompt {n}", "responses": [
            {"model": model, "response": said} for model, said in answers.items()
        ]}
        for n, answers in enumerate(table)
    ]  # fmt: skip
    imported = import_parallel([write(folder / "rows.jsonl", rows)], folder / "out")
    counts = {"calibration": len(rows), "train": 0, "eval": 0}
    source = {"kind": "file", "path": str(imported.prompts_file), "counts": counts}
    sources = validate(dict[str, SourceConfig], {"mine": source}, "here")
    teachers = [
        TeacherConfig(name=name, answers=path, licence="MIT")
        for name, path in imported.files.items()
    ]
    with AnswerStore(folder / "answers.sqlite") as store:
        prompts = load_prompts(sources, seed=0)
        found = calibrate(prompts, teachers, None, store, ClientConfig(), lambda: ("", "")).answers
    got = sorted((a.prompt_id, a.teacher, a.text) for a in found if a.error is None)
    assert got == sorted(
        (f"id-{n}", model, said)
        for n, answers in enumerate(table)
        for model, said in answers.items()
    )
    assert len(found) == len(rows) * len(teachers)
