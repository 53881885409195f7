import dataclasses
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persyn_jax.config import ConfigError, config_class, to_values, validate
from persyn_jax.evaluation.sources import SourceConfig, load_prompts

LETTERS = {
    "kind": "reasoning_gym",
    "task": "letter_counting",
    "settings": {"min_words": 2, "max_words": 4},
    "counts": {"calibration": 10, "train": 20, "eval": 5},
}
SUMS = {
    "kind": "reasoning_gym",
    "task": "chain_sum",
    "settings": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "counts": {"calibration": 20, "train": 60, "eval": 30},
}


@config_class
class Config:
    sources: dict[str, SourceConfig]


def sources(**given):
    return validate(Config, {"sources": given}, "run.yaml").sources


def contents(prompts):
    return [prompt.messages[-1]["content"] for prompt in prompts]


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def file_source(path, **given):
    return {"kind": "file", "path": str(path), **given}


def counts(calibration, train, eval_):
    return {"calibration": calibration, "train": train, "eval": eval_}


# Generated sources


def test_generated_prompts_carry_a_question_its_answer_and_their_counts():
    prompts = load_prompts(sources(letters=LETTERS), seed=0)
    assert [p.split for p in prompts] == ["calibration"] * 10 + ["train"] * 20 + ["eval"] * 5
    for prompt in prompts:
        (message,) = prompt.messages
        letter = message["content"].split('"')[1]
        text = message["content"].split('"')[3]
        assert message["role"] == "user"
        assert prompt.answer == str(text.lower().count(letter))
        assert (prompt.source, prompt.verifier) == ("letters", "exact_match")
        assert prompt.source_licence == "Apache-2.0"
    assert prompts[0].id == "letters-0000"
    assert len({p.id for p in prompts}) == 35


def test_a_generator_that_repeats_itself_is_drawn_from_until_all_are_different():
    prompts = load_prompts(sources(sums=SUMS), seed=0)
    assert len(set(contents(prompts))) == 110
    last = prompts[-1].id.removeprefix("sums-")
    assert int(last) > 109  # ids count the draws, so repeats have left gaps


def test_no_content_in_two_splits_or_two_sources():
    prompts = load_prompts(sources(a=SUMS, b={**SUMS, "counts": counts(10, 10, 10)}), seed=0)
    assert len(prompts) == len(set(contents(prompts))) == 140


def test_more_prompts_than_the_settings_can_give():
    greedy = {**SUMS, "counts": counts(100, 100, 10)}  # 10 x 10 sums and as many differences
    with pytest.raises(ConfigError, match=r"source 'sums': has 200 different prompts .* for 210"):
        load_prompts(sources(sums=greedy), seed=0)


def test_the_seed_decides():
    first, again, other = (load_prompts(sources(letters=LETTERS), seed) for seed in (3, 3, 4))
    assert first == again
    assert contents(first) != contents(other)


def test_more_prompts_of_one_split_move_no_earlier_one():
    few = load_prompts(sources(letters=LETTERS), seed=0)
    many = load_prompts(sources(letters={**LETTERS, "counts": counts(10, 30, 5)}), seed=0)
    assert many[:30] == few[:30]
    assert contents(many)[:35] == contents(few)


def test_another_process_draws_the_same(tmp_path):
    tasks = ["needle_haystack", "syllogism", "family_relationships", "spell_backward"]
    given = {t: {"kind": "reasoning_gym", "task": t, "counts": counts(2, 2, 1)} for t in tasks}
    script = (
        "import json, sys, dataclasses\n"
        "from persyn_jax.config import config_class, validate\n"
        "from persyn_jax.evaluation.sources import SourceConfig, load_prompts\n"
        "@config_class\n"
        "class Config:\n    sources: dict[str, SourceConfig]\n"
        "config = validate(Config, {'sources': json.loads(sys.argv[1])}, 'argv')\n"
        "print(json.dumps([dataclasses.asdict(p) for p in load_prompts(config.sources, 0)]))\n"
    )
    here = [dataclasses.asdict(prompt) for prompt in load_prompts(sources(**given), seed=0)]
    there = subprocess.run(
        [sys.executable, "-c", script, json.dumps(given)],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(there.stdout.splitlines()[-1]) == here


def test_few_shot_examples_are_never_asked():
    prompts = load_prompts(sources(letters=LETTERS), seed=0)
    shown = contents(prompts)[:3]
    spaced_and_shouted = [f"  {text.upper()}\n" for text in shown]
    others = load_prompts(sources(letters=LETTERS), seed=0, exclude=spaced_and_shouted)
    assert len(others) == len(prompts)
    assert not set(shown) & set(contents(others))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"task": "letter_count"}, "no task 'letter_count', near it: letter_counting"),
        ({"settings": {"words": 3}}, "no setting 'words', only max_words, min_words"),
        ({"settings": {"seed": 3}}, "no setting 'seed', only max_words, min_words"),
        ({"settings": {"min_words": 9, "max_words": 2}}, "refuses its settings: max_words must be"),
        ({"settings": {"min_words": "two"}}, "refuses its settings: "),
        ({"task": "ransom_note", "settings": {}}, "'ransom_note' does not repeat with its seed"),
        ({"task": "graph_color", "settings": {}}, "'graph_color' has no single reference answer"),
    ],
)
def test_a_generator_that_cannot_be_used(change, complaint):
    with pytest.raises(ConfigError) as error:
        load_prompts(sources(letters={**LETTERS, **change}), seed=0)
    assert str(error.value).startswith("source 'letters': ")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


# Configs


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ({**LETTERS, "kind": "web"}, "'web' found using 'kind' does not match"),
        ({**LETTERS, "level": 3}, "sources.x.reasoning_gym.level: unknown key"),
        ({**LETTERS, "counts": counts(-1, 1, 1)}, "counts.calibration: input should be greater"),
        ({**LETTERS, "verifier": "vibes"}, "no such verifier: 'vibes'"),
        ({"kind": "file", "path": 3}, "sources.x.file.path: "),
        ({"kind": "dataset", "name": "a"}, "sources.x.dataset.counts: is required"),
        (
            {"kind": "dataset", "name": "a", "counts": counts(1, 1, 1), "columns": {"text": "q"}},
            "sources.x.dataset.columns.text",
        ),
    ],
)
def test_a_wrong_config(source, complaint):
    with pytest.raises(ConfigError) as error:
        sources(x=source)
    assert complaint in str(error.value)


def test_a_config_survives_being_written_down():
    config = validate(Config, {"sources": {"a": LETTERS, "b": file_source("x.jsonl")}}, "run.yaml")
    assert validate(Config, to_values(config), "again") == config


# Files

ROWS = [
    {"id": "a", "prompt": "What is 1 + 1?", "answer": "2", "split": "calibration"},
    {
        "id": "b",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "And 2 + 2?"},
        ],
        "answer": 4,
        "split": "train",
    },
    {"prompt": "Write a poem.", "split": "eval", "topic": "art"},
]


def expected_of_rows(prompts):
    assert [(p.id, p.split, p.answer) for p in prompts] == [
        ("a", "calibration", "2"),
        ("b", "train", "4"),
        ("mine-0002", "eval", None),
    ]
    assert prompts[0].messages == [{"role": "user", "content": "What is 1 + 1?"}]
    assert prompts[1].messages == ROWS[1]["messages"]
    assert {p.source for p in prompts} == {"mine"}
    assert {p.source_licence for p in prompts} == {"CC0-1.0"}


def test_jsonl_rows_that_name_their_split(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", *ROWS)
    path.write_text(path.read_text() + "\n")  # a blank line at the end is no row
    mine = file_source(path, licence="CC0-1.0", verifier="first_line_match")
    prompts = load_prompts(sources(mine=mine), seed=0)
    expected_of_rows(prompts)
    assert {p.verifier for p in prompts} == {"first_line_match"}


def test_parquet_holds_the_same(tmp_path):
    fields = ["id", "prompt", "messages", "answer", "split"]
    columns = {field: [row.get(field) for row in ROWS] for field in fields}
    columns["answer"] = ["2", "4", None]  # a Parquet column has one type
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet")
    mine = file_source(tmp_path / "mine.parquet", licence="CC0-1.0")
    expected_of_rows(load_prompts(sources(mine=mine), seed=0))


def test_rows_are_dealt_by_counts_and_the_seed(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", *({"prompt": f"Question {n}"} for n in range(40)))
    mine = sources(mine=file_source(path, counts=counts(5, 20, 5)))
    first, again, other = (load_prompts(mine, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [p.split for p in first] == ["calibration"] * 5 + ["train"] * 20 + ["eval"] * 5
    assert len(set(contents(first))) == 30
    for prompt in first:  # an id without `id` is the row's place in the file
        assert prompt.id == f"mine-{int(contents([prompt])[0].split()[1]):04d}"


def test_repeated_rows_count_once(tmp_path):
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        {"prompt": "Name a colour.", "split": "train"},
        {"prompt": " name  a\tCOLOUR. ", "split": "eval"},
        {"prompt": "Name a number.", "split": "eval"},
    )
    prompts = load_prompts(sources(mine=file_source(path)), seed=0)
    assert contents(prompts) == ["Name a colour.", "Name a number."]
    too_many = file_source(path.with_name("no_split.jsonl"), counts=counts(1, 1, 1))
    write_jsonl(path.with_name("no_split.jsonl"), *({"prompt": "Name a colour."} for _ in range(3)))
    with pytest.raises(ConfigError, match="has 1 different prompts and its counts ask for 3"):
        load_prompts(sources(mine=too_many), seed=0)


def test_a_system_prompt_does_not_make_another_question(tmp_path):
    asked = {"role": "user", "content": "Name a colour."}
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        {"messages": [asked], "split": "train"},
        {"messages": [{"role": "system", "content": "Be kind."}, asked], "split": "eval"},
    )
    assert len(load_prompts(sources(mine=file_source(path)), seed=0)) == 1


GOOD = {"prompt": "Why?", "split": "train"}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "mine.jsonl:2: not valid JSON"),
        ('"text"', "mine.jsonl:2: must be a JSON object, got str"),
        (
            '{"split": "train"}',
            "mine.jsonl:2: must have either `messages` or `prompt`, has neither",
        ),
        ('{"prompt": "a", "messages": []}', "mine.jsonl:2: must have either"),
        ('{"prompt": " "}', "mine.jsonl:2: the content of a message must be text and not empty"),
        ('{"messages": []}', "mine.jsonl:2: messages must be a list of at least one message"),
        ('{"messages": [{"role": "me", "content": "a"}]}', "mine.jsonl:2: the role of a message"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "mine.jsonl:2: the last message must be the user's",
        ),
        ('{"prompt": "a", "answer": [1]}', "mine.jsonl:2: answer must be text"),
        ('{"prompt": "a", "split": "test"}', "mine.jsonl:2: split must be one of calibration, tr"),
        ('{"prompt": "a"}', "mine.jsonl:2: names no split, and its source has no counts"),
    ],
)
def test_a_wrong_line(tmp_path, line, complaint):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ConfigError) as error:
        load_prompts(sources(mine=file_source(path)), seed=0)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_ids_are_unique_in_a_file_and_across_files(tmp_path):
    twice = write_jsonl(tmp_path / "twice.jsonl", {**GOOD, "id": "q"}, {**GOOD, "id": "q"})
    with pytest.raises(ConfigError, match=r"twice.jsonl:2: id 'q' is also that of .*jsonl:1"):
        load_prompts(sources(mine=file_source(twice)), seed=0)
    one = write_jsonl(tmp_path / "one.jsonl", {**GOOD, "id": "q"})
    two = write_jsonl(tmp_path / "two.jsonl", {**GOOD, "prompt": "How?", "id": "q"})
    with pytest.raises(ConfigError, match=r"two.jsonl:1: id 'q' is also that of .*one.jsonl:1"):
        load_prompts(sources(one=file_source(one), two=file_source(two)), seed=0)


def test_a_split_beside_counts_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", GOOD)
    with pytest.raises(
        ConfigError, match=r"mine.jsonl:1: has a split, and source 'mine' has counts"
    ):
        load_prompts(sources(mine=file_source(path, counts=counts(0, 1, 0))), seed=0)


def test_files_that_are_none(tmp_path):
    (tmp_path / "mine.csv").write_text("prompt\n")
    (tmp_path / "mine.parquet").write_text("not parquet")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    for name, complaint in {
        "absent.jsonl": "absent.jsonl: no such file of prompts",
        "mine.csv": "mine.csv: a file of prompts must end in .jsonl or .parquet",
        "mine.parquet": "mine.parquet: not a readable Parquet file",
        "latin.jsonl": "latin.jsonl:1: not valid JSON",
    }.items():
        with pytest.raises(ConfigError) as error:
            load_prompts(sources(mine=file_source(tmp_path / name)), seed=0)
        assert complaint in str(error.value)
        assert "\n" not in str(error.value)


# Data sets


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    rows = [{"question": f"Question {n}", "solution": n, "prompt": "p"} for n in range(6)]
    write_jsonl(tmp_path / "data" / "train.jsonl", *rows)
    return str(tmp_path / "data")


def test_a_data_set_by_columns(folder):
    source = {
        "kind": "dataset",
        "name": folder,
        "columns": {"prompt": "question", "answer": "solution"},
        "counts": counts(2, 3, 1),
        "licence": "MIT",
    }
    prompts = load_prompts(sources(theirs=source), seed=0)
    assert sorted((p.messages[0]["content"], p.answer) for p in prompts) == [
        (f"Question {n}", str(n)) for n in range(6)
    ]
    assert [p.split for p in prompts] == ["calibration"] * 2 + ["train"] * 3 + ["eval"]

    with pytest.raises(ConfigError, match="no column 'ask', only question, solution, prompt"):
        load_prompts(sources(theirs={**source, "columns": {"prompt": "ask"}}), seed=0)
    with pytest.raises(ConfigError, match=r"data set .*: cannot be loaded: .*\"dev\""):
        load_prompts(sources(theirs={**source, "split": "dev"}), seed=0)
