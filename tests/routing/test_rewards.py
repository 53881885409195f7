import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.config import ConfigError, validate
from persyn_jax.pipeline.quality import by_verifier
from persyn_jax.records import Answer, Measurement, Prompt
from persyn_jax.routing.rewards import (
    RewardConfig,
    combine,
    make_rewards,
    rewards_at,
)

numbers = st.floats(-10, 10)


def prompt(prompt_id="p", answer="7"):
    return Prompt(
        id=prompt_id,
        messages=[{"role": "user", "content": "3 + 4?"}],
        source="sums",
        split="calibration",
        answer=answer,
        verifier="exact_match",
        source_licence="MIT",
    )


def answer(teacher, text="7", finish_reason="stop", prompt_id="p"):
    return Answer(
        key=f"{prompt_id}/{teacher}",
        prompt_id=prompt_id,
        teacher=teacher,
        sample_index=0,
        text=text,
        finish_reason=finish_reason,
        prompt_tokens=5,
        completion_tokens=2,
        usd=None,
        licence="MIT",
        error=None,
    )


def qualities(prompts, answers):
    """By `exact_match`: 0 for unusable answers, None without a reference."""
    prompt_of = {one.id: one for one in prompts}
    return by_verifier([prompt_of[one.prompt_id] for one in answers], answers).values


def rewards_of(answers, learnability, alpha=0.4, prompts=None):
    quality = qualities(prompts or [prompt()], answers)
    return make_rewards(answers, quality, learnability, [2] * len(answers), alpha)


# Totals


def test_totals_by_hand():
    # quality 1, 0, 0: mean 1/3, deviation sqrt(2)/3; learnability -1, -2, -3: mean -2, sqrt(2/3)
    answers = [answer("a"), answer("b", "8"), answer("c", "9")]
    rewards = rewards_of(answers, [-1.0, -2.0, -3.0], alpha=0.4)
    quality = np.array([2, -1, -1]) / np.sqrt(2)
    learnability = np.array([1, 0, -1]) / np.sqrt(2 / 3)
    np.testing.assert_allclose([r.quality_standardised for r in rewards], quality)
    np.testing.assert_allclose([r.learnability_standardised for r in rewards], learnability)
    np.testing.assert_allclose([r.total for r in rewards], 0.6 * quality + 0.4 * learnability)
    assert [r.quality for r in rewards] == [1.0, 0.0, 0.0]
    assert [r.learnability for r in rewards] == [-1.0, -2.0, -3.0]
    assert [(r.key, r.teacher, r.response_tokens) for r in rewards] == [
        ("p/a", "a", 2),
        ("p/b", "b", 2),
        ("p/c", "c", 2),
    ]


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6))
def test_alpha_0_is_quality_alone_and_alpha_1_learnability_alone(terms):
    quality, learnability = zip(*terms, strict=True)
    np.testing.assert_array_equal(combine(quality, learnability, 0.0), quality)
    np.testing.assert_array_equal(combine(quality, learnability, 1.0), learnability)


def test_where_all_are_right_learnability_decides():
    rewards = rewards_of([answer("a"), answer("b")], [-2.0, -1.0])
    assert [r.quality_standardised for r in rewards] == [0.0, 0.0]
    assert [r.total for r in rewards] == [-0.4, 0.4]


def test_without_a_reference_quality_is_null_and_learnability_decides():
    rewards = rewards_of([answer("a"), answer("b")], [-2.0, -1.0], prompts=[prompt(answer=None)])
    assert [r.quality for r in rewards] == [None, None]
    assert [r.total for r in rewards] == [-0.4, 0.4]


def test_prompts_are_standardised_apart_and_answers_keep_their_order():
    answers = [
        answer("a", prompt_id="p"),
        answer("a", prompt_id="q"),
        answer("b", prompt_id="p"),
        answer("b", prompt_id="q"),
    ]
    learnability = [-1.0, -50.0, -2.0, -40.0]
    rewards = rewards_of(answers, learnability, prompts=[prompt("p"), prompt("q")])
    assert [r.key for r in rewards] == ["p/a", "q/a", "p/b", "q/b"]
    assert [r.learnability_standardised for r in rewards] == [1.0, -1.0, -1.0, 1.0]


def test_another_normalisation_and_scope_by_hand():
    # Two prompts, two teachers; quality 1, 0 and 0, 0; learnability -1, -3 and -2, -5.
    answers = [answer("a"), answer("b", "8"), answer("a", "8", prompt_id="q")]
    answers.append(answer("b", "9", prompt_id="q"))
    quality = qualities([prompt("p"), prompt("q")], answers)
    learnability = [-1.0, -3.0, -2.0, -5.0]

    def totals(**how):
        rewards = make_rewards(answers, quality, learnability, [2] * 4, 0.5, **how)
        return [r.total for r in rewards]

    assert totals(normalisation="min_max") == [1.0, 0.0, 0.5, 0.0]
    assert totals(normalisation="min_max", scope="set") == [1.0, 0.25, 0.375, 0.0]
    # ranks over the set: quality 1 and thrice the middle of 0, 1, 2; learnability 3, 1, 2, 0
    expected = [0.5 + 0.5, 1 / 6 + 1 / 6, 1 / 6 + 1 / 3, 1 / 6]
    np.testing.assert_allclose(totals(normalisation="rank", scope="set"), expected)
    z = (np.array([-1, -3, -2, -5]) + 2.75) / np.sqrt(2.1875) + np.array([3, -1, -1, -1]) / np.sqrt(
        3
    )
    np.testing.assert_allclose(totals(scope="set"), z / 2)


# From measurements


def measurement(teacher, usable=True, **metrics):
    nothing = dict.fromkeys(("mean_log_likelihood", "grape", "rsr", "ifd", "local_naturalness"))
    return Measurement(
        key=f"p/{teacher}",
        prompt_id="p",
        teacher=teacher,
        usable=usable,
        response_tokens=2,
        **nothing | metrics,
    )


def test_a_sweep_of_alpha_needs_the_measurements_and_the_qualities_alone():
    """Quality prefers b, learnability a: by min-max the total of a is alpha, of b 1 - alpha."""
    measured = [
        measurement("a", mean_log_likelihood=-1.0),
        measurement("b", mean_log_likelihood=-3.0),
        measurement("c", usable=False),
    ]
    for alpha in (0.0, 0.25, 0.5, 1.0):
        config = RewardConfig(alpha=alpha, normalisation="min_max", scope="set")
        rewards = rewards_at(measured, [0.0, 1.0, 0.0], config)
        # learnability: 1 and 0 for the usable answers, 1 less for the other
        expected = [alpha, 1 - alpha, -alpha]
        np.testing.assert_allclose([r.total for r in rewards], expected, atol=1e-15)
        assert [r.key for r in rewards] == ["p/a", "p/b", "p/c"]


@pytest.mark.parametrize("name", ["rsr", "ifd"])
def test_where_less_is_better_the_negative_is_taken(name):
    measured = [measurement("a", **{name: 2.0}), measurement("b", **{name: 0.5})]
    rewards = rewards_at(measured, [None, None], RewardConfig(learnability=name))
    assert [r.learnability for r in rewards] == [-2.0, -0.5]
    assert rewards[0].total < rewards[1].total


def test_a_metric_that_was_not_measured_is_named():
    measured = [measurement("a", mean_log_likelihood=-1.0)]
    with pytest.raises(ValueError, match="prompt 'p', teacher 'a': ifd was not measured"):
        rewards_at(measured, [1.0], RewardConfig(learnability="ifd"))


def test_what_a_config_may_say_of_learnability():
    with pytest.raises(ConfigError, match=r"learnability: input should be .*'rsr'.*, got 'rsa'"):
        validate(RewardConfig, {"learnability": "rsa"}, "run.yaml")
    with pytest.raises(ConfigError, match=r"scope: input should be 'prompt' or 'set', got 'all'"):
        validate(RewardConfig, {"scope": "all"}, "run.yaml")


# Unusable answers


def test_an_unusable_answer_has_quality_0_even_if_its_text_is_right():
    cut_off = answer("a", text="7", finish_reason="length")
    assert qualities([prompt()], [cut_off]) == [0.0]
    assert qualities([prompt(answer=None)], [cut_off]) == [None]


unusable = st.sampled_from([("", "stop"), ("7", "length"), ("", "error")])
usable = st.sampled_from([("7", "stop"), ("8", "stop")])


@given(
    st.lists(st.tuples(usable, st.floats(-9, 0)), min_size=1, max_size=4),
    st.lists(st.tuples(unusable, st.sampled_from([0.0, -20.0, np.nan])), min_size=1, max_size=4),
    st.floats(0.01, 1),
    st.sampled_from(["7", None]),
    st.sampled_from(["z_score", "min_max", "rank"]),
    st.sampled_from(["prompt", "set"]),
)
def test_an_unusable_answer_is_worse_than_every_usable_one(
    good, bad, alpha, reference, normalisation, scope
):
    rows = good + bad
    answers = [answer(f"t{n}", text, reason) for n, ((text, reason), _) in enumerate(rows)]
    learnability = [value for _, value in rows]
    quality = qualities([prompt(answer=reference)], answers)
    rewards = make_rewards(
        answers, quality, learnability, [2] * len(answers), alpha, normalisation, scope
    )
    worst_usable = min(r.total for r in rewards if r.usable)
    assert all(r.total < worst_usable for r in rewards if not r.usable)
    assert min(r.learnability for r in rewards) == min(v for _, v in good) - 1


@pytest.mark.parametrize("normalisation", ["z_score", "min_max", "rank"])
def test_a_cut_off_answer_does_not_bring_the_usable_ones_together(normalisation):
    """Unusable answers change no usable one's learnability, however many they are."""
    good = [answer(name, "7") for name in "abcd"]
    bad = [answer(name, "7", "length") for name in "efg"]
    own = [-0.2, -0.3, -0.4, -0.5]

    def standardised(answers, learnability):
        rewards = make_rewards(
            answers, [1.0] * len(answers), learnability, [2] * len(answers), 0.4, normalisation
        )
        return [r.learnability_standardised for r in rewards]

    alone = standardised(good, own)
    beside = standardised(good + bad, [*own, np.nan, -0.1, -9.0])
    assert beside[:4] == alone
    assert beside[4:] == [min(alone) - 1] * 3


def test_where_all_are_unusable_they_tie():
    rewards = rewards_of([answer("a", ""), answer("b", "7", "length")], [np.nan, -3.0])
    assert [(r.quality, r.learnability, r.total) for r in rewards] == [(0.0, -1.0, 0.0)] * 2


def test_a_usable_answer_needs_a_likelihood():
    with pytest.raises(ValueError, match="prompt 'p': the learnability of a usable answer"):
        rewards_of([answer("a"), answer("b")], [-1.0, np.nan])


def test_alpha_is_a_weight():
    assert RewardConfig().alpha == 0.4
    with pytest.raises(ConfigError, match=r"alpha: input should be less than or equal to 1, got 1"):
        validate(RewardConfig, {"alpha": 1.5}, "run.yaml")
