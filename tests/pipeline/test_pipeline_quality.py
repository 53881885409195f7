"""Quality by verifier, reward model, likelihood and judge, of a few answers made up here."""

import dataclasses
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from pipeline_runs import small_config
from scripted_endpoint import completion, serving

from persyn_jax import mesh as meshes
from persyn_jax import store as stores
from persyn_jax.config import ConfigError, validate
from persyn_jax.models import tokenizer
from persyn_jax.models.rows import Conversation
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.weights import load
from persyn_jax.pipeline.answers import collect_answers
from persyn_jax.pipeline.config import (
    JudgeQuality,
    LikelihoodQuality,
    RewardModelQuality,
    VerifierQuality,
)
from persyn_jax.pipeline.quality import Quality, judge_prompt, measure
from persyn_jax.pipeline.run import open_run, run_stage
from persyn_jax.pipeline.run_files import CALIBRATION_ANSWERS, PROMPTS, REWARDS
from persyn_jax.pipeline.stages import STAGES
from persyn_jax.records import Answer, Prompt, Reward
from persyn_jax.sampling.config import ClientConfig, TeacherConfig
from persyn_jax.sampling.scoring import mean_log_likelihoods
from persyn_jax.store import AnswerStore

REWARD_MODELS = Path(__file__).parents[1] / "models" / "reward_models"
TINY = ModelConfig(weights="random:tiny")


def make_prompt(name: str, answer: str | None = "42", verifier: str = "exact_match") -> Prompt:
    return Prompt(
        id=name,
        messages=[{"role": "user", "content": f"question {name}"}],
        source="mine",
        split="calibration",
        answer=answer,
        verifier=verifier,
        source_licence="CC0-1.0",
    )


def make_answer(prompt_id: str, text: str, finish_reason: str = "stop") -> Answer:
    return Answer(
        key=f"{prompt_id}:{text}",
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


def nobody(asks):
    raise AssertionError("somebody was asked")


def measured(prompts, answers, config, ask=nobody) -> Quality:
    with TemporaryDirectory() as folder, AnswerStore(Path(folder) / "answers.sqlite") as store:
        return measure(prompts, answers, config, store, meshes.make_mesh(1), 0, ask)


def test_each_prompts_own_verifier_and_no_word_on_what_cannot_be_known():
    prompts = [
        make_prompt("exact"),
        make_prompt("open", answer=None),
        make_prompt("lines", verifier="first_line_match"),
        make_prompt("sums", answer="1/2", verifier="math"),
        make_prompt("form", '[{"id": "punctuation:no_comma"}]', "instructions"),
    ]
    answers = [
        make_answer("sums", "0.5"),
        make_answer("exact", "42\n!"),
        make_answer("lines", "42\n!"),
        make_answer("open", "42"),
        make_answer("exact", "42", finish_reason="length"),
        make_answer("open", ""),
        make_answer("form", "No, no"),
        make_answer("form", ""),
        make_answer("form", "No"),
    ]
    quality = measured(prompts, answers, VerifierQuality())
    assert quality.values == [1.0, 0.0, 1.0, None, 0.0, None, 0.0, 0.0, 1.0]
    assert quality.counts == {"unknown": 2, "math_stopped": 0, "math_unreadable": 0}


ANSWERS = [
    make_answer("x", "one answer"),
    make_answer("y", "another, much longer"),
    make_answer("x", "cut off", finish_reason="length"),
    make_answer("x", "a third"),
    make_answer("y", ""),
    make_answer("z", " "),
]
THREE = [make_prompt(name, answer=None) for name in "xyz"]
USABLE = [0, 1, 3]


def check_unusable(values: list[float]) -> None:
    """One below the worst of the same prompt."""
    assert values[2] == pytest.approx(min(values[0], values[3]) - 1)
    assert values[4] == pytest.approx(values[1] - 1)
    assert values[5] == -1


def test_the_likelihood_of_the_conversation_under_the_other_model():
    quality = measured(THREE, ANSWERS, LikelihoodQuality(kind="likelihood", model=TINY))
    model = load(TINY, 0)
    text = "<|im_start|>user\nquestion {}<|im_end|>\n<|im_start|>assistant\n"
    rows = [
        Conversation(
            tuple(model.tokenizer(text.format(answer.prompt_id))["input_ids"]),
            (*model.tokenizer(answer.text)["input_ids"], model.tokenizer.eos_token_id),
        )
        for answer in (ANSWERS[row] for row in USABLE)
    ]
    expected = mean_log_likelihoods(model, rows, meshes.make_mesh(1))
    np.testing.assert_array_equal([quality.values[row] for row in USABLE], expected)
    check_unusable(quality.values)
    assert quality.counts == {"unknown": 0}


@pytest.fixture
def reward_model(tmp_path) -> RewardModelQuality:
    tokenizer.byte_level().save_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(REWARD_MODELS / "llama" / file, tmp_path)
    return RewardModelQuality(kind="reward_model", model=ModelConfig(weights=str(tmp_path)))


def test_the_reward_does_not_depend_on_what_else_is_scored(reward_model):
    quality = measured(THREE, ANSWERS, reward_model)
    check_unusable(quality.values)
    for row in USABLE:
        (alone,) = measured(THREE, [ANSWERS[row]], reward_model).values
        assert alone == pytest.approx(quality.values[row], abs=1e-4)
    assert len({round(quality.values[row], 2) for row in USABLE}) == 3


def test_a_conversation_longer_than_the_reward_model_reads(reward_model):
    with pytest.raises(ConfigError, match=r"prompt 'x' .* teacher 'a' has \d+ tokens; .* reads 64"):
        measured(THREE, [make_answer("x", "long " * 10)], reward_model)


# Judges


def make_judge(base_url: str = "http://127.0.0.1:1/v1", **changes) -> JudgeQuality:
    judge = TeacherConfig(name="judge", model="wise", base_url=base_url, licence="MIT")
    return JudgeQuality(kind="judge", judge=judge, **changes)


@pytest.fixture
def store(tmp_path):
    with AnswerStore(tmp_path / "answers.sqlite") as opened:
        yield opened


def asking(store):
    def ask(asks):
        client = ClientConfig(attempts=1, max_failed_share=1.0)
        return collect_answers(asks, None, store, client, lambda: pytest.fail("own"), "judge")

    return ask


def test_a_judges_scores_are_asked_for_once_and_what_holds_none_is_counted(store):
    verdicts = {
        "one answer": completion("From 1 to [[10]]: fine. [[7]]"),
        "another, much longer": completion("Splendid!"),
        "a third": completion("[[8"),
    }

    def script(body, attempt):
        text = body["messages"][-1]["content"]
        return 200, next(reply for answer, reply in verdicts.items() if answer in text)

    with serving() as endpoint:
        endpoint.script = script
        config = make_judge(endpoint.url)
        quality = measured(THREE, ANSWERS, config, asking(store))
        assert quality.values == [7.0, None, 6.0, None, -1.0, -1.0]
        assert quality.counts == {"unknown": 2, "judge_unreadable": 2}
        assert len(endpoint.requests) == 3
        assert {request["temperature"] for request in endpoint.requests} == {0}
        again = measured(THREE, ANSWERS, config, asking(store))
        assert again.values == quality.values
        assert len(endpoint.requests) == 3
        # Another way to read the replies costs nothing; another question is asked.
        every = measured(THREE, ANSWERS, make_judge(endpoint.url, highest=6), asking(store))
        assert every.values[0] is None
        assert len(endpoint.requests) == 3
        other = make_judge(endpoint.url, template="{question}: {answer}?")
        measured(THREE, ANSWERS[:1], other, asking(store))
        assert endpoint.requests[-1]["messages"][-1]["content"] == "question x: one answer?"


@pytest.mark.parametrize(
    ("reply", "finish_reason", "score"),
    [
        ("[[ 7.5 ]]", "stop", 7.5),
        ("[[10]]", "stop", 10.0),
        ("[[11]]", "stop", None),
        ("[[0]]", "stop", None),
        ("[[3]]", "length", None),
        ("", "stop", None),
    ],
)
def test_what_counts_as_a_score(store, reply, finish_reason, score):
    with serving() as endpoint:
        endpoint.script = lambda body, attempt: (200, completion(reply, finish_reason))
        quality = measured(THREE, ANSWERS[:1], make_judge(endpoint.url), asking(store))
    assert quality.values == [score]


def test_an_endpoint_that_fails_gives_no_score_and_is_asked_again(store):
    with serving() as endpoint:
        endpoint.script = lambda body, attempt: (
            (500, b"") if attempt == 1 else (200, completion("[[4]]"))
        )
        config = make_judge(endpoint.url)
        assert measured(THREE, ANSWERS[:1], config, asking(store)).values == [None]
        assert measured(THREE, ANSWERS[:1], config, asking(store)).values == [4.0]


def test_what_the_judge_reads():
    config = make_judge(template="Q: {question} R: {reference} A: {answer} {other}")
    prompt, answer = make_prompt("x"), make_answer("x", "my {question} and {reference}")
    asked = judge_prompt(prompt, answer, config)
    (message,) = asked.messages
    assert message == {
        "role": "user",
        "content": "Q: question x R: 42 A: my {question} and {reference} {other}",
    }
    turns = [{"role": "system", "content": "Be brief."}, *prompt.messages]
    longer = judge_prompt(dataclasses.replace(prompt, messages=turns), answer, config)
    assert "Q: system: Be brief.\n\nuser: question x R:" in longer.messages[0]["content"]


def test_a_judge_that_reads_references_is_not_asked_where_there_is_none(store):
    prompts = [
        make_prompt("x", answer=None),
        make_prompt("y", '[{"id": "startend:quotation"}]', "instructions"),
    ]
    config = make_judge(template="{question} {reference} {answer}")
    quality = measured(prompts, ANSWERS[:2], config, asking(store))
    assert quality.values == [None, None]
    assert quality.counts == {"unknown": 2, "judge_unreadable": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "{answer}"}, "template: must hold {question}"),
        ({"pattern": "["}, "no regular expression"),
        ({"pattern": "([0-9])(a)"}, "must have one group, has 2"),
        ({"lowest": 3, "highest": 3}, "lowest 3.0 must be below highest 3.0"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(changes, message):
    values = {"kind": "judge", "judge": {"name": "j", "licence": "MIT"}, **changes}
    with pytest.raises(ConfigError, match=message):
        validate(JudgeQuality, values, "run.yaml")


# The stage


(SCORE,) = [stage for stage in STAGES if stage.name == "score"]


def test_the_stage_writes_a_judges_scores_as_quality(tmp_path):
    with serving() as endpoint:
        endpoint.script = lambda body, attempt: (200, completion("[[9]]"))
        config = small_config(
            f"run.folder={tmp_path}",
            f"run.answers={tmp_path / 'answers.sqlite'}",
            "quality={kind: judge, judge: {name: judge, model: wise, licence: MIT}}",
            f"quality.judge.base_url={endpoint.url}",
        )
        assert SCORE.models(config) == (config.student,)
        config.run_folder.mkdir()
        stores.write_records(config.run_folder / PROMPTS, THREE, Prompt)
        stores.write_records(config.run_folder / CALIBRATION_ANSWERS, ANSWERS, Answer)
        with open_run(config) as run:
            manifest = run_stage(SCORE, run)
    rewards = stores.read_records(config.run_folder / REWARDS, Reward)
    assert [reward.quality for reward in rewards] == [9.0, 9.0, 8.0, 9.0, 8.0, -1.0]
    assert manifest.summary["quality"] == {"unknown": 0, "judge_unreadable": 0}
    assert manifest.summary["measured"]["asked"]["judge"]["answers"] == 3
    assert manifest.config["quality.judge.model"] == '"wise"'


def test_the_stage_depends_on_the_models_whose_word_quality_is():
    own = small_config("quality={kind: judge, judge: {name: judge, licence: MIT}}")
    assert SCORE.models(own) == (own.student, own.service.model)
    for kind in ("reward_model", "likelihood"):
        other = small_config(f"quality={{kind: {kind}, model: {{weights: elsewhere}}}}")
        assert SCORE.models(other) == (other.student, ModelConfig(weights="elsewhere"))
    assert SCORE.models(small_config()) == (small_config().student,)


def test_a_judge_needs_somebody_to_answer():
    teachers = "[{name: a, %s}, {name: b, %s}]".replace(
        "%s", "model: m, base_url: 'http://a', licence: MIT"
    )
    words = ("service=null", f"teachers={teachers}")
    assert small_config(*words).service is None
    with pytest.raises(ConfigError, match=r"quality\.judge: has no base_url and .* no service"):
        small_config(*words, "quality={kind: judge, judge: {name: judge, licence: MIT}}")
