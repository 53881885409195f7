"""Records through Parquet and back: exact, byte-identical, open to others, never silently wrong."""

import dataclasses
import math
from typing import get_type_hints

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persyn_jax import records
from persyn_jax.config import ConfigError
from persyn_jax.records import Answer, Example, Prompt, Reward, Route, Score
from persyn_jax.store import iterate_records, read_records, write_records

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["\0", "a\0b", "\u2028", "\r\n", "\ufeff", "\u202eabc", "<|im_end|>", "😀"]
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3)
FLOATS = st.floats(allow_nan=False)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
STRATEGIES = {
    str: TEXT,
    int: INTEGERS,
    float: FLOATS,
    bool: st.booleans(),
    str | None: st.none() | TEXT,
    float | None: st.none() | FLOATS,
    list[float]: st.lists(FLOATS, max_size=4),
    list[records.Message]: MESSAGES,
    records.Split: st.sampled_from(["calibration", "train", "eval"]),
}


def instances(record_type):
    hints = get_type_hints(record_type)
    return st.builds(record_type, **{name: STRATEGIES[hint] for name, hint in hints.items()})


PROMPT = Prompt(
    id="p0",
    messages=[{"role": "user", "content": "2 + 2?"}],
    source="sums",
    split="train",
    answer=None,
    verifier="exact",
    source_licence="CC0-1.0",
)


@pytest.mark.parametrize("record_type", [Prompt, Answer, Reward, Route, Example, Score])
@settings(max_examples=25)
@given(data=st.data())
def test_what_is_written_is_read(record_type, data, tmp_path_factory):
    written = data.draw(st.lists(instances(record_type), max_size=4))
    path = tmp_path_factory.mktemp("records") / "records.parquet"

    write_records(path, written, record_type)

    assert read_records(path, record_type) == written


def test_equal_records_give_equal_bytes_and_no_other_file(tmp_path):
    route = Route(prompt_id="p0", coefficients=[0.5, -math.pi], teacher="a", margin=0.1)
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"

    write_records(first, [route] * 100, Route)
    write_records(second, [dataclasses.replace(route) for _ in range(100)], Route)
    write_records(second, [dataclasses.replace(route) for _ in range(100)], Route)

    assert first.read_bytes() == second.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"first.parquet", "second.parquet"}


class Counted(str):
    """Text that says how many of it there are."""

    alive = most = 0

    def __init__(self, _):
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


def test_many_records_are_taken_a_group_at_a_time(tmp_path):
    path = tmp_path / "prompts.parquet"
    many = (dataclasses.replace(PROMPT, id=Counted(number)) for number in range(35_000))
    write_records(path, many, Prompt)
    assert Counted.most < 25_000
    assert [prompt.id for prompt in read_records(path, Prompt)] == [str(n) for n in range(35_000)]


def test_only_records_of_some_values_are_read(tmp_path):
    path = tmp_path / "prompts.parquet"
    splits = ["train", "eval", "train", "calibration"]
    prompts = [dataclasses.replace(PROMPT, id=str(n), split=s) for n, s in enumerate(splits)]
    write_records(path, prompts, Prompt)
    assert list(iterate_records(path, Prompt, split="train")) == [prompts[0], prompts[2]]
    assert list(iterate_records(path, Prompt, split="train", id="3")) == []


def test_records_that_fail_on_the_way_leave_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "prompts.parquet"
    write_records(path, [PROMPT], Prompt)

    def failing():
        yield PROMPT
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_records(path, failing(), Prompt)
    assert read_records(path, Prompt) == [PROMPT]
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.parquet"]


def test_datasets_reads_the_files(tmp_path):
    path = tmp_path / "prompts.parquet"
    write_records(path, [PROMPT, dataclasses.replace(PROMPT, id="p1", messages=[])], Prompt)

    table = datasets.load_dataset(
        "parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train"
    )

    assert table["id"] == ["p0", "p1"]
    assert table[0] == dataclasses.asdict(PROMPT)
    assert table[1]["messages"] == []


def test_no_flipped_bit_is_read_as_other_records(tmp_path):
    path = tmp_path / "prompts.parquet"
    prompts = [dataclasses.replace(PROMPT, id=str(number)) for number in range(20)]
    write_records(path, prompts, Prompt)
    intact = path.read_bytes()
    complaints = []
    for position in range(0, len(intact), 3):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            assert read_records(path, Prompt) == prompts
        except ConfigError as error:
            complaints.append(str(error))
    assert len(complaints) > len(intact) // 6  # the other bytes say nothing about the records
    assert all(str(path) in text and "\n" not in text for text in complaints)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"id,messages\n1,2\n", None])
def test_a_file_that_is_no_parquet_is_named(tmp_path, content):
    path = tmp_path / "prompts.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"prompts\.parquet: missing, damaged or not Parquet"):
        read_records(path, Prompt)


def test_records_of_another_kind_are_refused_by_column(tmp_path):
    path = tmp_path / "routes.parquet"
    write_records(path, [], Route)
    with pytest.raises(ConfigError, match=r"holds no Prompt records: .*\bcoefficients\b.*\bid\b"):
        read_records(path, Prompt)


@pytest.mark.parametrize("field", [{"id": None}, {"id": 3}, {"answer": "\ud800"}, {"messages": 1}])
def test_a_value_of_the_wrong_type_is_refused_and_the_old_file_stays(tmp_path, field):
    path = tmp_path / "prompts.parquet"
    write_records(path, [PROMPT], Prompt)
    with pytest.raises(ConfigError, match=r"prompts\.parquet: cannot hold these records"):
        write_records(path, [dataclasses.replace(PROMPT, **field)], Prompt)
    assert read_records(path, Prompt) == [PROMPT]
