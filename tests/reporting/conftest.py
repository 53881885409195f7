"""A run that never was, in the shape of a real one: four teachers, four sources, two workers."""

import numpy as np
import pytest

from persyn_jax.intervals import mean_ci95, paired_difference_ci95
from persyn_jax.pipeline.gain_audit import correlations, sweep_alpha
from persyn_jax.records import Answer, Example, Prompt, Reward, Route, Score
from persyn_jax.reporting import RunRecords
from persyn_jax.routing.rewards import make_rewards
from persyn_jax.routing.strategies import Calibration, StrategyConfig
from persyn_jax.routing.verdict import judge_router
from persyn_jax.streams import numpy_stream

TEACHERS = {
    "plain": "Apache-2.0",
    "letter-specialist": "Apache-2.0",
    "search-specialist": "Apache-2.0",
    "number-specialist": "CC-BY-4.0",
}
SOURCES = ["letter_counting", "needle_haystack", "number_format", "chain_sum"]
# Chance of a right answer: rows are teachers, columns sources.
SKILL = np.array(
    [
        [0.15, 0.35, 0.20, 0.30],
        [0.85, 0.15, 0.15, 0.20],
        [0.10, 0.70, 0.10, 0.15],
        [0.15, 0.10, 0.65, 0.45],
    ]
)
SPLITS = {"calibration": 96, "train": 160, "eval": 120}
ROUNDS = 40


def question(source: str, number: int) -> tuple[str, str]:
    """A prompt and its reference answer."""
    if source == "letter_counting":
        word = "strawberry fields forever near the river"[: 10 + number % 30].strip()
        return f'How many times does the letter "r" appear in the text: "{word}"?', str(
            word.count("r")
        )
    if source == "needle_haystack":
        people = ["Amir", "Beatrix", "Chidi", "Dolores", "Emeka", "Freya"]
        sports = ["chess", "astronomy", "canoeing", "pottery", "jazz", "street food"]
        facts = " ".join(f"{who} adores {what}." for who, what in zip(people, sports, strict=True))
        asked = number % 6
        return f"{facts}\nWho adores {sports[asked]}? Reply only with a name.", people[asked]
    if source == "number_format":
        values = [str(37 * (number + k) % 991) for k in range(3)]
        return f"Pick the largest of these numbers: {', '.join(values)}", max(values, key=int)
    other = number * 7 % 90
    return f"State the final answer: {number} + {other} =", str(number + other)


def make_prompts() -> list[Prompt]:
    prompts = []
    for split, size in SPLITS.items():
        for number in range(size):
            source = SOURCES[number % len(SOURCES)]
            text, reference = question(source, 7 * number + len(split))
            prompts.append(
                Prompt(
                    id=f"{source}-{split}-{number}",
                    messages=[{"role": "user", "content": text}],
                    source=source,
                    split=split,
                    answer=reference,
                    verifier="exact",
                    source_licence="Apache-2.0",
                )
            )
    return prompts


def make_answer(prompt: Prompt, teacher: int, rng: np.random.Generator) -> tuple[Answer, float]:
    """An answer, and the quality that a verifier would give it."""
    right = rng.random() < SKILL[teacher, SOURCES.index(prompt.source)]
    fate = rng.choice(["stop", "empty", "length", "error"], p=[0.95, 0.02, 0.02, 0.01])
    style = ["The answer is {}.", "Letter by letter: {}", "{}", "Step by step, it is {}"][teacher]
    text = style.format(prompt.answer if right else "not quite that")
    answer = Answer(
        key=f"{prompt.id}/{teacher}",
        prompt_id=prompt.id,
        teacher=list(TEACHERS)[teacher],
        sample_index=0,
        text=text if fate in ("stop", "length") else "",
        finish_reason="stop" if fate == "empty" else str(fate),
        prompt_tokens=60 + 40 * teacher,
        completion_tokens=int(rng.integers(4, 30)),
        usd=None,
        licence=list(TEACHERS.values())[teacher],
        error="503 after 4 attempts" if fate == "error" else None,
    )
    return answer, float(right and answer.usable)


def make_calibration(prompts: list[Prompt]) -> tuple[list[Answer], list[Reward]]:
    rng = numpy_stream(0, "synthetic answers")
    made = [
        make_answer(prompt, teacher, rng)
        for prompt in prompts
        if prompt.split == "calibration"
        for teacher in range(len(TEACHERS))
    ]
    answers = [answer for answer, _ in made]
    ease = {"plain": -0.9, "letter-specialist": -1.4}
    learnability = [rng.normal(ease.get(answer.teacher, -1.7), 0.35) for answer in answers]
    tokens = [answer.completion_tokens for answer in answers]
    return answers, make_rewards(answers, [q for _, q in made], learnability, tokens, alpha=0.4)


def make_routes(prompts: list[Prompt]) -> list[Route]:
    """A router that sees the skills through noise."""
    rng = numpy_stream(0, "synthetic routes")
    routes = []
    for prompt in prompts:
        if prompt.split == "eval":
            continue
        coefficients = 2 * SKILL[:, SOURCES.index(prompt.source)] + rng.normal(0, 0.35, 4)
        best, second = np.sort(coefficients)[::-1][:2]
        teacher = list(TEACHERS)[int(coefficients.argmax())]
        routes.append(Route(prompt.id, coefficients.tolist(), teacher, float(best - second)))
    return routes


def make_router_metrics(prompts: list[Prompt], rewards: list[Reward], routes: list[Route]) -> dict:
    calibration = [prompt for prompt in prompts if prompt.split == "calibration"]
    total_NM = np.array([reward.total for reward in rewards]).reshape(len(calibration), -1)
    source_N = [prompt.source for prompt in calibration]
    feature_ND = make_states(prompts)
    coefficient_of = {route.prompt_id: route.coefficients for route in routes}
    coefficient_NM = np.array([coefficient_of[prompt.id] for prompt in calibration])
    seen = Calibration(total_NM[:64], source_N[:64], feature_ND[:64])
    held_out = Calibration(total_NM[64:], source_N[64:], feature_ND[64:])
    metrics = judge_router(seen, held_out, coefficient_NM[64:], list(TEACHERS), neighbours=5)
    held_out_prompts = [prompt.id for prompt in calibration[64:]]
    return {"trained_on": 64, "pairs": 380, "held_out_prompts": held_out_prompts, **metrics}


def make_states(prompts: list[Prompt]) -> np.ndarray:
    """States that tell the sources of the calibration prompts apart, and nothing else."""
    sources = [SOURCES.index(p.source) for p in prompts if p.split == "calibration"]
    return np.eye(len(SOURCES), dtype=np.float32)[sources]


def make_scores(prompts: list[Prompt]) -> list[Score]:
    rng = numpy_stream(0, "synthetic scores")
    chance = {"before": [0.05, 0.30, 0.18, 0.25], "after": [0.65, 0.48, 0.46, 0.30]}
    return [
        Score(
            prompt_id=prompt.id,
            source=prompt.source,
            model=model,
            text="...",
            finish_reason="stop",
            score=float(rng.random() < chance[model][SOURCES.index(prompt.source)]),
        )
        for model in ("before", "after")
        for prompt in prompts
        if prompt.split == "eval"
    ]


def make_training_metrics() -> list[dict]:
    """Two workers that push with probability 0.3 each and keep half of what they push."""
    rng = numpy_stream(0, "synthetic training")
    weights, distance, rows = [0.5, 0.5], 0.0, []
    for step in range(ROUNDS):
        coins = rng.random(2) < 0.3
        kept = [
            weight * (0.5 if coin else 1.0) for weight, coin in zip(weights, coins, strict=True)
        ]
        received = [weight - keep for weight, keep in zip(weights, kept, strict=True)][::-1]
        weights = [keep + gain for keep, gain in zip(kept, received, strict=True)]
        distance = (distance + rng.uniform(0.01, 0.02)) * (0.55 if coins.any() else 1.0)
        loss = 2.4 * np.exp(-step / 15) + 0.55
        row = {
            "stage": "train_student",
            "step": step,
            "loss": [float(loss + rng.normal(0, 0.09)) for _ in range(2)],
            "consensus_distance": float(distance),
            "sum_weight": [float(weight) for weight in weights],
            "pushes": int(coins.sum()),
            "tokens": 512,
        }
        if step % 5 == 0 or step == ROUNDS - 1:
            row["held_out_loss"] = [float(loss + 0.08 + rng.normal(0, 0.02)) for _ in range(2)]
        rows.append(row)
    return rows


def make_gain_audit(rewards: list[Reward], prompts: list[Prompt]) -> dict:
    """The gain follows the total, and some sources are easier to learn than others."""
    rng = numpy_stream(0, "synthetic gains")
    source_of = {prompt.id: prompt.source for prompt in prompts}
    units = []
    for source in SOURCES:
        for teacher in TEACHERS:
            own = [r for r in rewards if (r.teacher, source_of[r.prompt_id]) == (teacher, source)]
            total = float(np.mean([reward.total for reward in own]))
            gain = 0.2 * total + 0.05 * SOURCES.index(source) + float(rng.normal(0, 0.05))
            units.append(
                {
                    "teacher": teacher,
                    "slice": source,
                    "gain": gain,
                    "gain_ci95": [gain - 0.03, gain + 0.03],
                    "before": -2.5,
                    "after": -2.5 + gain,
                    "total": total,
                    "quality": float(np.mean([r.quality_standardised for r in own])),
                    "learnability": float(np.mean([r.learnability_standardised for r in own])),
                }
            )
    return {"rows": 16, "steps": 8, "units": units, **correlations(units), **sweep_alpha(units)}


def make_benchmarks() -> dict:
    """One examined before and after, one on a third model alone."""
    rng = numpy_stream(0, "synthetic benchmarks")
    before, after = (rng.random((2, 200)) < [[0.2], [0.35]]).astype(float)

    def scores(values) -> dict:
        return mean_ci95(values)._asdict() | {"items": len(values), "lm_eval": "0.4.13"}

    return {
        "gsm8k": {
            "metric": "exact_match",
            "models": {"before": scores(before), "after": scores(after)},
            "after_minus_before": paired_difference_ci95(after, before)._asdict(),
        },
        "persyn_generated": {
            "metric": "verifier",
            "models": {"another-student": scores(after[:50])},
            "after_minus_before": None,
        },
    }


def make_run() -> RunRecords:
    prompts = make_prompts()
    calibration_answers, rewards = make_calibration(prompts)
    routes = make_routes(prompts)
    rng = numpy_stream(0, "synthetic chosen answers")
    answer_of = {(answer.prompt_id, answer.teacher): answer for answer in calibration_answers}
    prompt_of = {prompt.id: prompt for prompt in prompts}
    chosen = [
        answer_of.get((route.prompt_id, route.teacher))
        or make_answer(prompt_of[route.prompt_id], list(TEACHERS).index(route.teacher), rng)[0]
        for route in routes
    ]
    examples = [
        Example(
            id=answer.prompt_id,
            messages=[
                *prompt_of[answer.prompt_id].messages,
                {"role": "assistant", "content": answer.text},
            ],
            teacher=answer.teacher,
            source=prompt_of[answer.prompt_id].source,
            teacher_licence=answer.licence,
            source_licence="Apache-2.0",
        )
        for answer in chosen
        if answer.usable
    ]
    stages = [
        "calibrate",
        "score",
        "train_router",
        "route",
        "generate",
        "train_student",
        "evaluate",
    ]
    seconds = [92.4, 21.0, 34.7, 6.2, 48.9, 171.3, 66.0]
    return RunRecords(
        run={
            "name": "quickstart",
            "seed": 0,
            "version": "0.1.0",
            "config_fingerprint": "4d5c1f6e2a90b7c3",
            "platform": "cpu",
            "workers": 2,
            "student_model": "SmolLM2-135M-Instruct",
        },
        teachers=TEACHERS,
        prompts=prompts,
        calibration_answers=calibration_answers,
        rewards=rewards,
        routes=routes,
        chosen_answers=chosen,
        examples=examples,
        scores=make_scores(prompts),
        router=make_router_metrics(prompts, rewards, routes),
        training_metrics=make_training_metrics(),
        gossip={"exchange_probability": 0.3, "compiled_programs": 1},
        stages={name: {"seconds": s} for name, s in zip(stages, seconds, strict=True)},
        quality="verifier",
        learnability="mean_log_likelihood",
        alpha=0.4,
        strategies=StrategyConfig(neighbours=5),
        state_ND=make_states(prompts),
        gain_audit=make_gain_audit(rewards, prompts),
        benchmarks=make_benchmarks(),
    )


@pytest.fixture(scope="session")
def run_records() -> RunRecords:
    return make_run()
