"""Stage score: each metric against the full logits, and what is measured once and never again."""

import dataclasses
import re
from itertools import chain

import jax
import numpy as np
import pytest
from engine_cases import MODEL, log_probabilities
from pipeline_runs import small_config

from persyn_jax import mesh as meshes
from persyn_jax import store
from persyn_jax.config import ConfigError
from persyn_jax.models.spec import ModelConfig
from persyn_jax.models.tokenizer import prompt_ids
from persyn_jax.pipeline.run import open_run, run_stage
from persyn_jax.pipeline.run_files import CALIBRATION_ANSWERS, PROMPTS
from persyn_jax.pipeline.score import Scorer, likelihood_quality, score, scorer
from persyn_jax.pipeline.stages import STAGES
from persyn_jax.records import Answer, Measurement, Prompt, Reward
from persyn_jax.routing.learnability import METRICS
from persyn_jax.routing.rewards import RewardConfig, rewards_at

EOS = MODEL.tokenizer.eos_token_id
QUESTIONS = {"p": "3 + 4?", "q": "Name two colours."}
# By prompt and teacher, as the sentences that it consists of.
SENTENCES = {
    ("p", "brief"): ["7"],
    ("p", "long"): ["We add. ", "3 and 4\n", "make 7. ", "Right? ", "Yes! ", "It is 7. ", "7"],
    ("q", "brief"): ["Red and blue."],
    ("q", "long"): ["Red is one.\n\n", "Blue is two."],
}
PROMPT_RECORDS = [
    Prompt(
        id=name,
        messages=[{"role": "user", "content": question}],
        source="sums",
        split="calibration",
        answer="7" if name == "p" else None,
        verifier="exact_match",
        source_licence="MIT",
    )
    for name, question in QUESTIONS.items()
]


def answer(prompt_id: str, teacher: str, text: str, finish_reason: str = "stop") -> Answer:
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


ANSWERS = [
    *(answer(*names, "".join(sentences)) for names, sentences in SENTENCES.items()),
    answer("q", "cut", "Red and", "length"),
]
USABLE = len(SENTENCES)


def refuse():
    raise AssertionError("nothing is left to measure, and yet the model is loaded")


STUDENT = Scorer("student", MODEL.tokenizer, lambda: MODEL)
LOADS_NOTHING = STUDENT._replace(load=refuse)


def run_score(path, config: RewardConfig, student: Scorer = STUDENT, answers=ANSWERS):
    with store.AnswerStore(path) as opened:
        quality = [0.0 if one.usable else None for one in answers]
        return score(PROMPT_RECORDS, answers, quality, student, opened, config, meshes.make_mesh(2))


# What is measured


def surprisals(prompt: list[int], response: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """-log p of each response token after all before it, and its rank, from the full logits."""
    after_TV = log_probabilities(MODEL, [*prompt, *response])[len(prompt) - 1 : -1]
    own_T = after_TV[np.arange(len(response)), response]
    return -own_T, 1 + (after_TV > own_T[:, None]).sum(axis=1)


def by_equations(prompt_id: str, sentences: list[str]) -> dict[str, float]:
    """The metrics of one answer, as their papers define them."""
    (messages,) = [p.messages for p in PROMPT_RECORDS if p.id == prompt_id]
    prompt = prompt_ids(MODEL.tokenizer, messages)
    steps = [MODEL.tokenizer(sentence)["input_ids"] for sentence in sentences]
    steps[-1] = [*steps[-1], EOS]
    response = list(chain(*steps))
    surprisal_T, rank_T = surprisals(prompt, response)
    alone_T, _ = surprisals([EOS], response)
    local_S = [
        -surprisals([*prompt, *chain(*steps[max(s - 4, 0) : s])], step)[0].mean()
        for s, step in enumerate(steps)
    ]
    return {
        "mean_log_likelihood": -surprisal_T.mean(),
        "grape": np.exp(-surprisal_T.mean()),
        "rsr": np.minimum(rank_T, 100).sum() / surprisal_T.sum(),
        "ifd": surprisal_T.mean() / alone_T.mean(),
        "local_naturalness": np.mean(local_S),
    }


@pytest.fixture(scope="module")
def by_hand():
    """The metrics by prompt and teacher."""
    return {names: by_equations(names[0], sentences) for names, sentences in SENTENCES.items()}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_what_its_equation_makes_of_the_full_logits(tmp_path, by_hand, name):
    scored = run_score(tmp_path / "answers.sqlite", RewardConfig(learnability=name))
    sign = -1 if name in ("rsr", "ifd") else 1
    for measurement, reward in zip(scored.measurements, scored.rewards, strict=True):
        assert measurement.usable == reward.usable == (measurement.teacher != "cut")
        if measurement.usable:
            expected = by_hand[measurement.prompt_id, measurement.teacher][name]
            assert getattr(measurement, name) == pytest.approx(expected, rel=1e-4)
            assert reward.learnability == pytest.approx(sign * expected, rel=1e-4)
        else:
            assert getattr(measurement, name) is None
    by_prompt = [by_hand["q", teacher][name] for teacher in ("brief", "long")]
    assert by_prompt[0] != pytest.approx(by_prompt[1], rel=1e-3), "the test tells answers apart"


def test_what_was_not_asked_for_is_null(tmp_path):
    scored = run_score(tmp_path / "answers.sqlite", RewardConfig(learnability="ifd"))
    for measurement in scored.measurements[:USABLE]:
        assert measurement.ifd is not None
        assert measurement.mean_log_likelihood is not None  # of a column that ifd needs
        assert measurement.rsr is measurement.local_naturalness is None


# What is measured once


def test_another_alpha_normalisation_or_scope_runs_no_model(tmp_path):
    path = tmp_path / "answers.sqlite"
    first = run_score(path, RewardConfig())
    assert (first.measured_answers, first.reused_answers) == (USABLE, 0)
    for config in (
        RewardConfig(alpha=1.0),
        RewardConfig(normalisation="rank", scope="set"),
        RewardConfig(learnability="grape"),
    ):
        again = run_score(path, config, LOADS_NOTHING)
        assert (again.measured_answers, again.reused_answers) == (0, USABLE)
        assert again.measurements == first.measurements
        assert again.rewards == rewards_at(
            first.measurements, [reward.quality for reward in first.rewards], config
        )
    assert run_score(path, RewardConfig(), LOADS_NOTHING) == first._replace(
        measured_answers=0, reused_answers=USABLE
    )


def tokens_to_read(capsys) -> int:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "to read" in line]
    return int(re.search(r"(\d+) tokens to read", line)[1])


def test_another_metric_costs_the_passes_that_are_missing_and_that_is_said_before(tmp_path, capsys):
    path = tmp_path / "answers.sqlite"
    responses = {n: len("".join(sentences)) + 1 for n, sentences in SENTENCES.items()}
    prompts = {p.id: len(prompt_ids(MODEL.tokenizer, p.messages)) for p in PROMPT_RECORDS}
    whole = sum(prompts[names[0]] + count for names, count in responses.items())

    run_score(path, RewardConfig())
    assert tokens_to_read(capsys) == whole
    ifd = run_score(path, RewardConfig(learnability="ifd"))
    assert tokens_to_read(capsys) == sum(1 + count for count in responses.values())
    assert ifd.measured_answers == USABLE
    rsr = run_score(path, RewardConfig(learnability="rsr"))
    assert tokens_to_read(capsys) == whole
    run_score(path, RewardConfig(learnability="rsr"), LOADS_NOTHING)
    assert tokens_to_read(capsys) == 0
    # What the store had before has stayed, so every order of asking gives the same numbers.
    fresh = tmp_path / "fresh.sqlite"
    assert run_score(fresh, RewardConfig(learnability="rsr")).measurements == rsr.measurements


def test_another_student_and_answers_that_are_new_are_measured(tmp_path):
    path = tmp_path / "answers.sqlite"
    run_score(path, RewardConfig(), answers=ANSWERS[:3])
    more = run_score(path, RewardConfig())
    assert (more.measured_answers, more.reused_answers) == (1, 3)
    other = run_score(path, RewardConfig(), STUDENT._replace(fingerprint="other"))
    assert (other.measured_answers, other.reused_answers) == (USABLE, 0)


def test_another_text_under_the_same_key_is_refused(tmp_path):
    run_score(tmp_path / "answers.sqlite", RewardConfig(), answers=[answer("p", "brief", "7")])
    with pytest.raises(ConfigError, match=r"answer p/brief to prompt 'p' has 3 tokens, .* \{2\}"):
        run_score(tmp_path / "answers.sqlite", RewardConfig(), answers=[answer("p", "brief", "42")])


def test_a_broken_students_numbers_are_not_kept(tmp_path):
    nan = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), MODEL.params)
    broken = STUDENT._replace(load=lambda: dataclasses.replace(MODEL, params=nan))
    with pytest.raises(ValueError, match="log-probabilities must be finite"):
        run_score(tmp_path / "answers.sqlite", RewardConfig(), broken)
    assert run_score(tmp_path / "answers.sqlite", RewardConfig()).measured_answers == USABLE


def test_a_random_student_is_known_by_its_seed_and_loaded_late():
    tiny = ModelConfig(weights="random:tiny")
    one, same, other = scorer(tiny, 0), scorer(tiny, 0), scorer(tiny, 1)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    embeddings = [s.load().params["embed"]["embedding"] for s in (one, same, other)]
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    assert (embeddings[0] != embeddings[2]).any()


def test_a_larger_models_likelihood_is_a_quality(tmp_path, by_hand):
    with store.AnswerStore(tmp_path / "answers.sqlite") as opened:
        asked = (PROMPT_RECORDS, ANSWERS)
        quality = likelihood_quality(*asked, STUDENT, opened, meshes.make_mesh(1))
        again = likelihood_quality(*asked, LOADS_NOTHING, opened, meshes.make_mesh(1))
    expected = [by_hand[names]["mean_log_likelihood"] for names in SENTENCES]
    np.testing.assert_allclose(quality[:USABLE], expected, rtol=1e-4)
    assert quality[USABLE] == min(quality[2:USABLE]) - 1, "an unusable answer is the prompt's worst"
    assert again == quality


# The stage

(SCORE,) = (stage for stage in STAGES if stage.name == "score")


def test_runs_that_share_a_store_measure_an_answer_once(tmp_path):
    """Two run folders with the same answers: the second has another alpha, and scores nothing."""

    def run_in(folder: str, *overrides: str):
        config = small_config(
            f"run.folder={tmp_path / folder}",
            f"run.answers={tmp_path / 'answers.sqlite'}",
            *overrides,
        )
        with open_run(config) as run:
            run.write(PROMPTS, PROMPT_RECORDS, Prompt)
            run.write(CALIBRATION_ANSWERS, ANSWERS, Answer)
            summary = run_stage(SCORE, run).summary
            measured = summary.pop("measured")
            assert set(measured) == {"peak_memory_gb"}
            return (
                summary,
                run.read("measurements.parquet", Measurement),
                run.read("rewards.parquet", Reward),
            )

    summary, measurements, rewards = run_in("one")
    unknown = sum(answer.prompt_id == "q" for answer in ANSWERS)  # it has no reference answer
    counts = {"rewards": len(ANSWERS), "measured_answers": USABLE, "reused_answers": 0}
    counts |= {"quality": {"unknown": unknown}}
    assert summary == counts
    assert [m.key for m in measurements] == [r.key for r in rewards] == [a.key for a in ANSWERS]

    summary, again, others = run_in("two", "rewards.alpha=1")
    assert summary == counts | {"measured_answers": 0, "reused_answers": USABLE}
    assert again == measurements
    assert [r.total for r in others] == [r.learnability_standardised for r in rewards]
    assert others != rewards
