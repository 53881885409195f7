"""Sources of prompts: their configs, and the one function from configs to prompts.

Whatever the source, a prompt's content is met once: over all sources and splits, and against texts
that the caller excludes (the few-shot examples of the teachers), so that nothing is taught that is
asked later.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from persyn_jax.config import ConfigError, config_class
from persyn_jax.evaluation.contents import normalise, user_content
from persyn_jax.evaluation.generated import LICENCE, draw
from persyn_jax.evaluation.rows import (
    SPLITS,
    Question,
    RowField,
    claim_id,
    read_dataset,
    read_file,
    to_questions,
)
from persyn_jax.evaluation.verifiers import VerifierName, check_reference
from persyn_jax.records import Prompt, Split
from persyn_jax.streams import numpy_stream

DRAWS_PER_PROMPT = 20
"""Draws that a generator gets for each prompt asked of it: to meet all of 200 different ones takes
about 6."""


@config_class
class SplitCounts:
    """How many prompts of a source go into each split."""

    calibration: Annotated[int, Field(ge=0)]
    """Prompts that every teacher answers."""
    train: Annotated[int, Field(ge=0)]
    """Prompts that one teacher, the routed one, answers."""
    eval: Annotated[int, Field(ge=0)]
    """Prompts that the student answers before and after; no teacher sees them."""

    @property
    def total(self) -> int:
        return self.calibration + self.train + self.eval


@config_class
class ReasoningGymSource:
    """A generator of the reasoning-gym package: seeded, endless, with a reference answer."""

    kind: Literal["reasoning_gym"]
    task: str
    """Its name in reasoning-gym, such as `letter_counting`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of the task's config (`min_words: 2`); what is not named keeps the package's
    default."""
    counts: SplitCounts
    verifier: VerifierName = "exact_match"
    """How an answer is compared with the reference: a name in `evaluation.verifiers`;
    `reasoning_gym` is the task's own score."""


@config_class
class FileSource:
    """A JSONL or Parquet file; `evaluation.rows` says what a row holds."""

    kind: Literal["file"]
    path: Path
    """The file, ending in .jsonl or .parquet; relative to the working directory."""
    counts: SplitCounts | None = None
    """How many rows, chosen by the run's seed, go into each split. Null: every row names its own
    `split`; rows may not do so otherwise."""
    verifier: VerifierName = "exact_match"
    """How an answer is compared with the reference, where the row has one: a name in
    `evaluation.verifiers`."""
    licence: str = "unknown"
    """Licence of the prompts, as an SPDX name if it has one; it follows every row."""


@config_class
class DatasetSource:
    """A data set of the Hugging Face `datasets` library: a hub name or a local folder."""

    kind: Literal["dataset"]
    name: str
    """First argument of `datasets.load_dataset`."""
    config: str | None = None
    """Its second argument, for a data set that has several configs."""
    split: str = "train"
    """Which split of the data set to read; `counts` says what becomes of its rows."""
    columns: dict[RowField, str] = Field(default_factory=dict)
    """Which columns to read, and as what: `{prompt: question, answer: solution}`. Empty: those of
    the columns `id`, `prompt`, `messages` and `answer` that there are."""
    counts: SplitCounts
    """How many rows, chosen by the run's seed, go into each split."""
    verifier: VerifierName = "exact_match"
    """How an answer is compared with the reference, where the row has one: a name in
    `evaluation.verifiers`."""
    licence: str = "unknown"
    """Licence of the prompts, as an SPDX name if it has one; it follows every row."""


SourceConfig = Annotated[
    ReasoningGymSource | FileSource | DatasetSource, Field(discriminator="kind")
]


def load_prompts(
    sources: Mapping[str, SourceConfig], seed: int, exclude: Iterable[str] = ()
) -> list[Prompt]:
    """The prompts of all `sources`, each with its split; same arguments, same list.

    Contents are compared after Unicode NFKC, case folding and collapsing white space; the first one
    met is kept, in the order of `sources`. A source with counts gives exactly so many; a file whose
    rows name their split gives all of its different rows.

    exclude: texts that no prompt may repeat: the questions of the teachers' few-shot examples.
    Raises ConfigError: a source too small for its counts, a row with a split beside counts or
    without either, an id in two sources, and all that `rows` and `generated` raise.
    """
    seen = {normalise(text) for text in exclude}
    where_of_id: dict[str, str] = {}
    prompts = []
    for name, source in sources.items():
        licence = LICENCE if isinstance(source, ReasoningGymSource) else source.licence
        distinct = _distinct(_questions(name, source, seed), seen)
        for split, question in _deal(name, source.counts, distinct):
            claim_id(question, where_of_id)
            if question.answer is not None:
                check_reference(source.verifier, question.answer, question.where)
            prompt = Prompt(
                id=question.id,
                messages=question.messages,
                source=name,
                split=split,
                answer=question.answer,
                verifier=source.verifier,
                source_licence=licence,
            )
            prompts.append(prompt)
    return prompts


def _questions(name: str, source: SourceConfig, seed: int) -> Iterable[Question]:
    """All that a source can give, in random order where its counts may use a part only."""
    if isinstance(source, ReasoningGymSource):
        task_seed = int(numpy_stream(seed, f"draws of source {name}").integers(2**31))
        draws = DRAWS_PER_PROMPT * source.counts.total
        own_scorer = source.verifier == "reasoning_gym"
        return draw(name, source.task, source.settings, task_seed, draws, own_scorer)
    if isinstance(source, FileSource):
        rows = read_file(source.path)
    else:
        rows = read_dataset(source.name, source.config, source.split, source.columns)
    questions = to_questions(name, rows)
    if source.counts is None:
        return questions
    order = numpy_stream(seed, f"order of source {name}").permutation(len(questions))
    return [questions[index] for index in order]


def _distinct(questions: Iterable[Question], seen: set[str]) -> Iterator[Question]:
    """The questions whose content is not in `seen`, which grows by theirs."""
    for question in questions:
        content = user_content(question.messages)
        if content not in seen:
            seen.add(content)
            yield question


def _deal(
    name: str, counts: SplitCounts | None, questions: Iterator[Question]
) -> list[tuple[Split, Question]]:
    """The questions used, each with its split: the first calibrate, the next train, then eval."""
    if counts is None:
        return [(_own_split(question), question) for question in questions]
    splits = [split for split in SPLITS for _ in range(getattr(counts, split))]
    used = list(islice(questions, len(splits)))
    for question in used:
        if question.split is not None:
            raise ConfigError(f"{question.where}: has a split, and source {name!r} has counts")
    if len(used) < len(splits):
        raise ConfigError(
            f"source {name!r}: has {len(used)} different prompts and its counts ask for "
            f"{len(splits)}: widen its settings or lower the counts"
        )
    return list(zip(splits, used, strict=True))


def _own_split(question: Question) -> Split:
    if question.split is None:
        raise ConfigError(f"{question.where}: names no split, and its source has no counts")
    return question.split
