"""The card of a published data set, from its rows: README.md as the Hugging Face hub reads it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import yaml

from persyn_jax.records import PublishedRow

# From the loosest to the strictest, each group alike. What stands in no group is taken to be
# stricter than all of them: its terms are not known here.
_STRICTNESS = (
    ("cc0-1.0", "unlicense", "0bsd"),
    ("mit", "bsd-2-clause", "bsd-3-clause", "bsd", "isc", "apache-2.0", "odc-by"),
    ("cc-by-3.0", "cc-by-4.0"),
    ("cc-by-sa-3.0", "cc-by-sa-4.0", "odbl"),
    ("gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "qwen", "tongyi-qianwen"),
    ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "qwen-research"),
    ("cc-by-nd-4.0", "cc-by-nc-nd-4.0"),
)
# Of those above, what the hub has no identifier for.
_NOT_ON_THE_HUB = {"0bsd", "qwen", "tongyi-qianwen", "qwen-research", "odbl"}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_COLUMNS = """\
| column | what |
|---|---|
| `messages` | the conversation, the teacher's answer last |
| `teacher_id` | who wrote the answer |
| `quality`, `learnability`, `total` | reward terms, where the answer was scored; else null |
| `margin` | the router's best minus second-best coefficient |
| `source`, `source_licence`, `teacher_licence` | where the prompt comes from; licences of both |
| `id`, `answer_key`, `run`, `teacher_model`, `teacher_fingerprint`, `finish_reason` | provenance |
"""


@dataclass(frozen=True)
class CardFacts:
    """What the rows do not say."""

    run: str
    config_fingerprint: str
    student: str
    alpha: float
    version: str
    unusable: int
    """Answers left out because they failed, were cut off or are empty."""
    contaminated: int
    """Rows left out because their prompt repeats one of an evaluation set."""
    against: tuple[str, ...]
    """Names of the files that prompts were compared with, besides the run's eval prompts."""


def card(rows: Sequence[PublishedRow], facts: CardFacts, data_file: str) -> str:
    """The whole file: YAML for the hub between lines of `---`, then Markdown for people.

    data_file: name of the file that holds the rows, beside the card.
    """
    metadata = {
        "pretty_name": facts.run,
        **_hub_licence(strictest(rows)),
        "task_categories": ["text-generation"],
        "size_categories": [_size(len(rows))],
        "tags": ["synthetic", "distillation", "persyn"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": data_file}],
            }
        ],
    }
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{_body(rows, facts)}"


def strictest(rows: Sequence[PublishedRow]) -> str:
    """The licence that allows least; of those that are not known here, the most frequent."""
    licences = _count_licences(rows)
    return max(licences, key=lambda licence: (_rank(licence), licences[licence], licence))


def _rank(licence: str) -> int:
    groups = [index for index, group in enumerate(_STRICTNESS) if licence.lower() in group]
    return groups[0] if groups else len(_STRICTNESS)


def _hub_licence(licence: str) -> dict[str, str]:
    known = _rank(licence) < len(_STRICTNESS) and licence.lower() not in _NOT_ON_THE_HUB
    if known:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": "-".join(licence.lower().split())}


def _count_licences(rows: Sequence[PublishedRow]) -> Counter[str]:
    return Counter(licence for row in rows for licence in {row.teacher_licence, row.source_licence})


def _size(count: int) -> str:
    return next((name for limit, name in _SIZES if count < limit), "1M<n<10M")


def _body(rows: Sequence[PublishedRow], facts: CardFacts) -> str:
    against = ", ".join(["the eval prompts of the run", *facts.against])
    return f"""\
# {facts.run}

{len(rows)} conversations for supervised fine-tuning of a small language model. Each prompt is
answered by one of several teachers, chosen for one student, `{facts.student}`, by rewards of
quality and learnability, weighted {1 - facts.alpha:g} to {facts.alpha:g} (PerSyn, arXiv
2510.10925).

## Teachers

{_table(rows, lambda row: (row.teacher_id, row.teacher_model or "", row.teacher_licence), _TEACHER)}
## Sources

{_table(rows, lambda row: (row.source, row.source_licence), _SOURCE)}
## Licences

{_licence_table(_count_licences(rows), len(rows))}
The strictest is **{strictest(rows)}**. A row is under the licence of its prompt and under that of
its teacher's answers: read all of those above before you use the data set.

## What was left out

- {facts.unusable} answers that failed, were cut off or are empty.
- {facts.contaminated} rows whose prompt has 13 words in a row, or all its words, in common with a
  prompt of: {against}.

## Columns

{_COLUMNS}
Made by persyn_jax {facts.version}, run `{facts.run}`, config `{facts.config_fingerprint}`.
"""


_TEACHER = ("teacher", "model", "licence")
_SOURCE = ("source", "licence")


def _table(
    rows: Sequence[PublishedRow],
    key: Callable[[PublishedRow], tuple[str, ...]],
    names: tuple[str, ...],
) -> str:
    """Rows counted by `key`, the most frequent first."""
    counts = sorted(Counter(map(key, rows)).items(), key=lambda item: (-item[1], item[0]))
    lines = [_line((*names, "rows", "share")), "|---" * (len(names) + 2) + "|"]
    lines += [_line((*key, str(n), f"{n / len(rows):.1%}")) for key, n in counts]
    return "\n".join(lines) + "\n"


def _licence_table(licences: Counter[str], rows: int) -> str:
    lines = [_line(("licence", "rows that it holds for")), "|---|---|"]
    ordered = sorted(licences, key=lambda licence: (-licences[licence], licence))
    lines += [_line((licence, f"{licences[licence]} of {rows}")) for licence in ordered]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
