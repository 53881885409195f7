"""The card of a data set says what its rows say, and the hub can read it."""

from collections import Counter

import pytest
import yaml
from huggingface_hub import DatasetCard

from persyn_jax.records import PublishedRow
from persyn_jax.reporting.card import CardFacts, card, strictest

FACTS = CardFacts(
    run="own",
    config_fingerprint="0123456789abcdef",
    student="Qwen/Qwen2.5-0.5B",
    alpha=0.4,
    version="1.0",
    unusable=7,
    contaminated=5,
    against=("ifeval.jsonl",),
)


def row(number: int, teacher: str, licence: str, source: str = "mine") -> PublishedRow:
    return PublishedRow(
        id=f"p{number}",
        messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        teacher_id=teacher,
        quality=None,
        learnability=None,
        total=None,
        margin=None,
        source=source,
        teacher_licence=licence,
        source_licence="CC0-1.0",
        finish_reason="stop",
        run="own",
        answer_key=f"key {number}",
        teacher_model=None,
        teacher_fingerprint="f",
    )


ROWS = [row(n, "a|b", "MIT") for n in range(3)] + [row(3, "c", "llama3.1", "theirs")]


def table_counts(text: str, heading: str) -> dict[str, int]:
    """First cell -> the cell before last of the table under a heading."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    cells = [line.replace("\\|", "/").strip("| ").split(" | ") for line in lines]
    return {row[0]: int(row[-2]) for row in cells}


def test_the_front_matter_is_what_the_hub_takes():
    parsed = DatasetCard(card(ROWS, FACTS, "train.parquet")).data
    assert parsed.license == "llama3.1"
    assert parsed.size_categories == ["n<1K"]
    assert parsed.task_categories == ["text-generation"]
    (only,) = parsed.configs
    assert only["data_files"] == [{"split": "train", "path": "train.parquet"}]


def test_the_tables_count_the_rows():
    text = card(ROWS, FACTS, "train.jsonl")
    assert table_counts(text, "Teachers") == dict(
        Counter(r.teacher_id.replace("|", "/") for r in ROWS)
    )
    assert table_counts(text, "Sources") == {"mine": 3, "theirs": 1}
    for said in ("| CC0-1.0 | 4 of 4 |", "| MIT | 3 of 4 |", "| llama3.1 | 1 of 4 |"):
        assert said in text
    assert "The strictest is **llama3.1**" in text
    assert "- 7 answers that failed" in text
    assert "- 5 rows whose prompt" in text
    assert "ifeval.jsonl" in text


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["MIT", "Apache-2.0", "MIT"], "MIT"),
        (["MIT", "CC-BY-SA-4.0"], "CC-BY-SA-4.0"),
        (["llama3.1", "cc-by-nc-4.0"], "cc-by-nc-4.0"),
        (["cc-by-nc-nd-4.0", "House terms"], "House terms"),
    ],
)
def test_the_strictest_licence(licences, expected):
    assert strictest([row(n, "a", licence) for n, licence in enumerate(licences)]) == expected


def test_a_licence_that_the_hub_does_not_know_is_named_beside_other():
    text = card([row(0, "a", "House terms")], FACTS, "train.jsonl")
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "house-terms")
