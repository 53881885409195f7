"""The plan of batches: a permutation of the examples for every epoch, and nothing is lost."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.models.rows import Conversation
from persyn_jax.training.batches import (
    Segment,
    batch_rows,
    first_fit,
    hold_out,
    make_plan,
    stack_workers,
    with_steps,
)
from persyn_jax.training.config import TrainConfig

ROW_TOKENS, ROW_RESPONSE_TOKENS = 12, 6


def config(**changes) -> TrainConfig:
    room = {"row_tokens": ROW_TOKENS, "row_response_tokens": ROW_RESPONSE_TOKENS}
    return TrainConfig(**{**room, "rows": 2, **changes})


@st.composite
def an_example(draw) -> Conversation:
    response = draw(st.integers(1, ROW_RESPONSE_TOKENS))
    prompt = draw(st.integers(1, ROW_TOKENS - response))
    return Conversation((1,) * prompt, (2,) * response)


many_examples = st.lists(an_example(), min_size=8, max_size=60)
a_plan = {
    "examples": many_examples,
    "workers": st.integers(1, 8),
    "rows": st.integers(1, 4),
    "epochs": st.integers(1, 3),
    "seed": st.integers(0, 2**32),
}


def indices(plan) -> Counter:
    return Counter(index for step in plan for own in step for row in own for index in row)


@given(**a_plan)
def test_every_example_is_seen_once_an_epoch_by_one_worker(examples, workers, rows, epochs, seed):
    plan = make_plan(examples, config(rows=rows, epochs=epochs), workers, seed)
    assert indices(plan) == dict.fromkeys(range(len(examples)), epochs)
    first_epoch = make_plan(examples, config(rows=rows, epochs=1), workers, seed)
    assert indices(first_epoch) == dict.fromkeys(range(len(examples)), 1)
    shares = [
        {index for step in plan for row in step[worker] for index in row}
        for worker in range(workers)
    ]
    assert sum(map(len, shares)) == len(examples), "an example went to two workers"
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(**a_plan)
def test_every_worker_has_all_its_rows_in_every_step_and_none_overflows(
    examples, workers, rows, epochs, seed
):
    c = config(rows=rows, epochs=epochs)
    for step in make_plan(examples, c, workers, seed):
        assert [len(own) for own in step] == [rows] * workers
        for own in step:
            for row in own:
                assert sum(examples[index].length for index in row) <= ROW_TOKENS
                assert sum(len(examples[i].response) for i in row) <= ROW_RESPONSE_TOKENS
            batch = batch_rows(examples, own, c)
            assert batch.weights.sum() == sum(len(examples[i].response) for row in own for i in row)
        assert any(row for own in step for row in own), "a step without data"


@given(**a_plan)
def test_a_longer_training_begins_like_a_shorter_one(examples, workers, rows, epochs, seed):
    short = make_plan(examples, config(rows=rows, epochs=epochs), workers, seed)
    longer = make_plan(examples, config(rows=rows, epochs=epochs + 1), workers, seed)
    assert longer[: len(short)] == short
    assert make_plan(examples, config(rows=rows, epochs=epochs), workers, seed) == short


def test_seeds_and_epochs_shuffle_anew():
    examples = [Conversation((1, 1), (2,)) for _ in range(40)]
    plan = make_plan(examples, config(epochs=2), workers=2, seed=0)
    half = len(plan) // 2
    assert plan[:half] != plan[half:]
    assert plan != make_plan(examples, config(epochs=2), workers=2, seed=1)


@given(examples=many_examples)
def test_packing_leaves_no_row_that_a_later_example_would_have_fitted_in(examples):
    """First fit: what opened a row had no room in any row before it."""
    order = list(range(len(examples)))
    packed = first_fit(examples, order, config())
    for number, row in enumerate(packed):
        opener = examples[row[0]]
        for earlier in packed[:number]:
            there = [examples[index] for index in earlier if index < row[0]]
            tokens = sum(example.length for example in there) + opener.length
            responses = sum(len(example.response) for example in there) + len(opener.response)
            assert tokens > ROW_TOKENS or responses > ROW_RESPONSE_TOKENS


def test_packing_time_grows_with_the_examples_not_with_their_square():
    """Rows that are long closed are not looked at: a short example after many long ones."""
    examples = [Conversation((1,) * 8, (2,) * 2)] * 500 + [Conversation((1,), (2,))]
    packed = first_fit(examples, list(range(len(examples))), config())
    (place,) = [number for number, row in enumerate(packed) if 500 in row]
    assert 0 < place < 500
    assert len(packed[place]) > 1


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Conversation((1,) * 12, (2,)), "example 1 has 13 tokens, 1 of them response"),
        (Conversation((1,), (2,) * 7), "example 1 has 8 tokens, 7 of them response"),
    ],
)
def test_an_example_too_long_for_a_row_is_named(example, message):
    with pytest.raises(ValueError, match=f"{message}; a row holds 12 and 6"):
        make_plan([Conversation((1,), (2,)), example], config(), workers=1, seed=0)


def test_fewer_examples_than_workers_are_refused():
    with pytest.raises(ValueError, match="3 examples for 4 workers"):
        make_plan([Conversation((1,), (2,))] * 3, config(), workers=4, seed=0)


@given(count=st.integers(0, 30), size=st.integers(0, 30), seed=st.integers(0, 99))
def test_holding_out_parts_the_examples_and_leaves_at_least_half(count, size, seed):
    examples = [Conversation((1,), (2,))] * size
    train, held_out = hold_out(examples, count, seed)
    assert sorted(train + held_out) == list(range(size))
    assert len(held_out) == min(count, size // 2)
    assert (train, held_out) == (sorted(train), sorted(held_out))
    assert hold_out(examples, count, seed) == (train, held_out)


def test_batches_of_all_workers_lead_with_the_worker_axis():
    examples = [Conversation((3, 4), (5,)), Conversation((6,), (7, 8))]
    one, other = (batch_rows(examples, own, config()) for own in ([[0], []], [[1, 0], []]))
    both = stack_workers([one, other])
    assert both.tokens.shape == (2, 2, ROW_TOKENS)
    assert both.targets.shape == (2, 2, ROW_RESPONSE_TOKENS)
    np.testing.assert_array_equal(both.tokens[1, 0, :6], [6, 7, 8, 3, 4, 5])
    np.testing.assert_array_equal(both.tokens[0], one.tokens)


@given(
    **a_plan,
    changes=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 9)), max_size=4),
)
def test_restarts_with_other_workers_lose_and_repeat_nothing(
    examples, workers, rows, epochs, seed, changes
):
    """Stopped and gone on with another M, any number of times, within epochs and between them."""
    c = config(rows=rows, epochs=epochs)
    taken: tuple[Segment, ...] = ()
    done = 0
    for count, steps in changes:
        plan = make_plan(examples, c, count, seed, taken)
        before = plan[:done]
        done = min(done + steps, len(plan))
        taken = with_steps(taken, count, done)
        assert sum(segment.steps for segment in taken) == done
        assert make_plan(examples, c, count, seed, taken) == plan, "a mere restart changes nothing"
        again = make_plan(examples, c, workers, seed, taken)
        assert again[: len(before)] == before, "what was taken stays as it was"
        assert again[:done] == plan[:done]
        assert all(len(step) == workers for step in again[done:])
    plan = make_plan(examples, c, workers, seed, taken)
    assert indices(plan) == dict.fromkeys(range(len(examples)), epochs)
    seen = Counter()
    for index in (i for step in plan for own in step for row in own for i in row):
        seen[index] += 1
        assert seen[index] - min(seen.get(i, 0) for i in range(len(examples))) <= 1, (
            "an epoch twice"
        )


def test_more_steps_than_there_are_is_an_error():
    examples = [Conversation((1, 1), (2,)) for _ in range(8)]
    with pytest.raises(ValueError, match="99 steps were taken, there are 1"):
        make_plan(examples, config(), 1, 0, [Segment(2, 99)])
