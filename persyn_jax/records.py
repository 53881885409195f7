"""The records that stages hand to each other: plain frozen dataclasses.

`store` keeps one Parquet file of each kind.
"""

from dataclasses import dataclass
from typing import Literal, TypedDict

Split = Literal["calibration", "train", "eval"]


class Message(TypedDict):
    """One turn of a conversation, as every chat endpoint takes it."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A question: the conversation that ends with it, and how an answer to it is verified."""

    id: str
    messages: list[Message]
    source: str
    """Name of the source that it comes from (a key of the config's `sources`)."""
    split: Split
    answer: str | None
    """Reference answer, in the form that the verifier reads; null where the source has none, and
    then no verifier measures quality (see `pipeline.quality`)."""
    verifier: str
    """Name of the verifier in `evaluation.verifiers` that compares an answer with the reference."""
    source_licence: str


@dataclass(frozen=True)
class Answer:
    """What one teacher said to one prompt. Never holds times: the same run gives the same bytes."""

    key: str
    """Hash of (messages, teacher fingerprint, sample index): the key of the answer store."""
    prompt_id: str
    teacher: str
    sample_index: int
    text: str
    finish_reason: str
    """`stop` (the teacher ended it), `length` (cut off), `error` (the endpoint failed), or another
    word of the endpoint's; only an answer that ended by `stop` is usable."""
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    """Price in US dollars; null if the teacher's price is unknown, never 0 for unknown."""
    licence: str
    error: str | None

    @property
    def usable(self) -> bool:
        """Whether it may be trained on: complete and not empty. Otherwise its quality is 0."""
        return self.finish_reason == "stop" and bool(self.text.strip())


@dataclass(frozen=True)
class Measurement:
    """What the student's forward passes say of one answer: all that is needed to make its reward
    anew with another alpha or normalisation.

    The metrics are those of `routing.learnability`, each in its paper's own direction; null where
    not measured, and for an unusable answer.
    """

    key: str
    prompt_id: str
    teacher: str
    usable: bool
    response_tokens: int
    """|y| in the student's tokens; EOS counts if it was generated."""
    mean_log_likelihood: float | None
    grape: float | None
    rsr: float | None
    """Lower is better."""
    ifd: float | None
    """Lower is better."""
    local_naturalness: float | None


@dataclass(frozen=True)
class Reward:
    """The reward of one answer for one student, with every term it is made of (PerSyn eq. 1, 2)."""

    key: str
    prompt_id: str
    teacher: str
    usable: bool
    quality: float | None
    """By verifier: its score in [0, 1], 0 for an unusable answer, null where the prompt has no
    reference answer. Otherwise what the config's `quality` measures (see `pipeline.quality`)."""
    learnability: float
    """The config's metric, its sign turned where lower is better. By default the mean
    log-likelihood of a response token under the student, in nats; EOS counts if it was generated.
    """
    response_tokens: int
    quality_standardised: float
    learnability_standardised: float
    total: float
    """(1 - alpha) * quality_standardised + alpha * learnability_standardised."""


@dataclass(frozen=True)
class Route:
    """The router's word on one prompt."""

    prompt_id: str
    coefficients: list[float]
    """Bradley-Terry coefficients in the order of the config's teachers."""
    teacher: str
    margin: float
    """Best minus second-best coefficient."""


@dataclass(frozen=True)
class Example:
    """One training row in the form that trainers read: the conversation with the chosen teacher's
    answer last."""

    id: str
    messages: list[Message]
    teacher: str
    source: str
    teacher_licence: str
    source_licence: str


@dataclass(frozen=True)
class PublishedRow:
    """A training row for other trainers, with all that is known of where it comes from."""

    id: str
    messages: list[Message]
    teacher_id: str
    quality: float | None
    """The answer's reward terms, as in Reward, where it was scored: calibration answers are."""
    learnability: float | None
    total: float | None
    margin: float | None
    """The router's best minus second-best coefficient; null for a prompt that was not routed."""
    source: str
    teacher_licence: str
    source_licence: str
    finish_reason: str
    run: str
    answer_key: str
    teacher_model: str | None
    """Null where the config does not name it."""
    teacher_fingerprint: str
    """Of model, system prompt, worked examples and sampling, or of the file of answers."""


@dataclass(frozen=True)
class Score:
    """One eval prompt answered by one model."""

    prompt_id: str
    source: str
    model: str
    """`before` or `after`."""
    text: str
    finish_reason: str
    score: float
    """Verifier's score in [0, 1]."""


@dataclass(frozen=True)
class BenchmarkScore:
    """One item of a benchmark answered by one model."""

    task: str
    """As the config's `benchmarks.tasks` names it."""
    item: str
    """The same for every model: (task or task of the group)/(number)-(hash of the item) or, of the
    run's own eval prompts, the prompt's id."""
    model: str
    """`before`, `after`, or the name of a folder."""
    score: float
    """By the task's metric."""
