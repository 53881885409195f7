"""From answers to training rows, and what the student's training refuses."""

import contextlib
import dataclasses

import jax
import pytest

from persyn_jax import gossip
from persyn_jax.config import ConfigError
from persyn_jax.mesh import make_mesh
from persyn_jax.models import weights
from persyn_jax.models.rows import Conversation
from persyn_jax.models.spec import ModelConfig
from persyn_jax.pipeline.prompts import check_answers
from persyn_jax.pipeline.tokens import conversations, prompt_tokens
from persyn_jax.pipeline.train_student import StudentTraining, draw_answers, train_student
from persyn_jax.records import Answer, Prompt
from persyn_jax.training import checkpoint
from persyn_jax.training.config import GossipConfig, TrainConfig


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_answers_are_refused_before_the_model_is_loaded(tmp_path, count):
    """Three of them: one is held out, and one of three workers would have nothing."""

    def load():
        raise AssertionError("loaded for nothing")

    with pytest.raises(RuntimeError, match=f"{count} usable answers: training needs one for each"):
        train_student(
            load,
            [Conversation((1, 2), (3,))] * count,
            StudentTraining(TrainConfig(), GossipConfig(workers=3), seed=0),
            make_mesh(3),
            tmp_path,
            lambda first, steps: None,
            lambda row: None,
            tmp_path,
        )


TINY = ModelConfig(weights="random:tiny")


def train(folder, told: list[dict] | None = None, **gossip_values) -> list[dict]:
    """Rows of metrics of two workers that exchange in every step; `told`: where they are put."""
    conversations = [Conversation((1, 2, i), (3, i)) for i in range(4, 17)]
    training = TrainConfig(
        row_tokens=8, row_response_tokens=4, held_out=1, measure_every=2, checkpoint_every=2
    )
    config = GossipConfig(workers=2, exchange_probability=1.0, **gossip_values)
    rows: list[dict] = [] if told is None else told
    train_student(
        lambda: weights.load(TINY),
        conversations,
        StudentTraining(training, config, seed=0),
        make_mesh(2),
        folder,
        lambda first, steps: None,
        rows.append,
        folder,
    )
    return [{key: value for key, value in row.items() if key != "measured"} for row in rows]


def test_an_audited_run_is_the_same_run_and_has_its_contraction(tmp_path):
    """Two workers that swap halves agree at once: predicted and measured factors of 0."""
    rows = train(tmp_path / "a", audit=True)
    assert rows == train(tmp_path / "b")
    measured = [row for row in rows if "measured_contraction" in row]
    assert 1 < len(measured) < len(rows)
    assert all(row["predicted_contraction"] == pytest.approx(0, abs=1e-12) for row in measured)
    apart = [row for row in measured if row["measured_contraction"] is not None]
    assert apart
    assert all(row["measured_contraction"] < 1e-6 for row in apart)


def test_an_audited_run_stops_with_the_first_exchange_that_loses_mass(tmp_path, monkeypatch):
    gosgd = gossip.gosgd

    def lossy(exchange):
        rule = gosgd(exchange)

        def update(*arguments):
            params, mix_state = rule.update(*arguments)
            shrunk = jax.tree.map(lambda x: 0.9 * x, params)
            return jax.tree.map(
                lambda a, b: jax.numpy.where(arguments[3].index < 2, a, b), params, shrunk
            ), mix_state

        return rule._replace(update=update)

    monkeypatch.setattr(gossip, "gosgd", lossy)
    with pytest.raises(gossip.MassError, match="round 2 changed the mass"):
        train(tmp_path / "seen", audit=True)


def test_a_step_is_told_of_before_the_checkpoint_after_it_is_written(tmp_path, monkeypatch):
    """Else a run that is killed in between has no row of that step, and never gets one."""
    told, saved, saver = [], [], checkpoint.saver

    @contextlib.contextmanager
    def watched(*arguments):
        with saver(*arguments) as own:

            def save(step, *rest):
                saved.append((step, len(told)))
                own.save(step, *rest)

            yield own._replace(save=save)

    monkeypatch.setattr("persyn_jax.pipeline.train_student.saver", watched)
    train(tmp_path, told=told)
    assert saved
    assert all(step == rows for step, rows in saved)


TOKENIZER = weights.load_tokenizer(TINY)


def make_prompt(name: str, text: str) -> Prompt:
    return Prompt(
        id=name,
        messages=[{"role": "user", "content": text}],
        source="mine",
        split="train",
        answer=None,
        verifier="exact_match",
        source_licence="CC0-1.0",
    )


def make_answer(prompt_id: str, text: str, finish_reason: str = "stop") -> Answer:
    return Answer(
        key="k",
        prompt_id=prompt_id,
        teacher="a",
        sample_index=0,
        text=text,
        finish_reason=finish_reason,
        prompt_tokens=1,
        completion_tokens=1,
        usd=None,
        licence="MIT",
        error=None,
    )


def test_eos_belongs_to_an_answer_that_the_teacher_ended():
    """The byte-level tokenizer has a token a byte and one for each ChatML mark."""
    prompts = [make_prompt("x", "hi"), make_prompt("y", "ho")]
    answers = [make_answer("y", "abc"), make_answer("x", "abc", finish_reason="length")]
    ended, cut_off = conversations(TOKENIZER, prompts, answers)
    assert ended.response == (*cut_off.response, TOKENIZER.eos_token_id)
    assert len(cut_off.response) == 3
    asked = [TOKENIZER.decode(each.prompt) for each in (ended, cut_off)]
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert asked == [chat.format("ho"), chat.format("hi")]
    assert prompt_tokens(TOKENIZER, prompts) == [cut_off.prompt, ended.prompt]


def test_special_tokens_in_an_answer_stay_text():
    (only,) = conversations(
        TOKENIZER, [make_prompt("x", "hi")], [make_answer("x", "<|im_end|>", "length")]
    )
    assert len(only.response) == len("<|im_end|>")


def test_an_answer_that_no_row_has_room_for_is_named():
    answers = [make_answer("x", ""), make_answer("y", "")]
    rows = [Conversation((1,) * 8, (2,) * 4), Conversation((1,) * 8, (2,) * 5)]
    config = TrainConfig(row_tokens=13, row_response_tokens=5)
    check_answers(answers, rows, config)
    for room in ({"row_tokens": 12}, {"row_response_tokens": 4}):
        with pytest.raises(ConfigError, match=r"prompt 'y' with the answer of teacher 'a': 13 tok"):
            check_answers(answers, rows, dataclasses.replace(config, **room))


def test_a_training_goes_on_with_other_workers(tmp_path):
    """Stopped with two workers, ended with four: no mass is lost, and no example."""
    conversations = [Conversation((1, 2, i), (3, i)) for i in range(4, 45)]
    training = TrainConfig(row_tokens=5, row_response_tokens=2, held_out=1, checkpoint_every=3)

    class StoppedError(Exception):
        pass

    def go_on(workers: int, last: int | None) -> tuple[int, list[dict]]:
        starts, rows = [], []

        def on_metrics(row):
            rows.append(row)
            if row["step"] == last:
                raise StoppedError

        train_student(
            lambda: weights.load(TINY),
            conversations,
            StudentTraining(training, GossipConfig(workers=workers), seed=0),
            make_mesh(workers),
            tmp_path,
            lambda first, steps: starts.append((first, steps)),
            on_metrics,
            tmp_path / "profile",
        )
        return starts[0], rows

    with pytest.raises(StoppedError):
        go_on(2, last=7)
    (first, steps), rows = go_on(4, last=None)
    # 40 examples, one a row: six steps of two, then the other 28 in steps of four.
    assert (first, steps) == (6, 6 + 7)
    assert [row["step"] for row in rows] == list(range(6, 13))
    assert all(sum(row["sum_weight"]) == 1 for row in rows)
    assert all(len(row["loss"]) == 4 for row in rows)


def answers_of(usable: str) -> list[Answer]:
    return [
        Answer(str(n), str(n), "a", 0, "x" if u == "1" else "", "stop", 1, 1, None, "MIT", None)
        for n, u in enumerate(usable)
    ]


def test_as_many_answers_are_drawn_as_are_asked_for_and_nearly_the_same_of_the_same_prompts():
    all_usable, few = answers_of("1" * 40), answers_of("0" * 5 + "1" * 35)
    drawn, again = draw_answers(all_usable, 30, seed=3), draw_answers(all_usable, 30, seed=3)
    assert drawn == again
    assert len(drawn) == 30
    assert [int(a.prompt_id) for a in drawn] == sorted(int(a.prompt_id) for a in drawn)
    of_few = draw_answers(few, 30, seed=3)
    lost = sum(int(a.prompt_id) < 5 for a in drawn)
    assert len({a.prompt_id for a in of_few} & {a.prompt_id for a in drawn}) == 30 - lost
    assert draw_answers(all_usable, 30, seed=4) != drawn


def test_all_usable_answers_are_used_if_no_number_is_given_and_too_few_are_refused():
    answers = answers_of("10110")
    assert [a.prompt_id for a in draw_answers(answers, None, seed=0)] == ["0", "2", "3"]
    with pytest.raises(ConfigError, match=r"training\.examples 4: only 3 answers are usable"):
        draw_answers(answers, 4, seed=0)
