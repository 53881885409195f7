"""Verifiable instructions, with the names and arguments of IFEval (arXiv 2311.07911).

A prompt says, among other things, how its answer shall look ("fewer than 50 words, no commas");
its reference is the JSON of those constraints, as IFEval's rows have them:

    [{"id": "length_constraints:number_words",
      "kwargs": {"relation": "less than", "num_words": 50}},
     {"id": "punctuation:no_comma"}]

The score is the share that the answer keeps, read strictly: as it stands, with no first or last
line taken off. Keywords are plain text here, where IFEval takes them for regular expressions, and
of `english_lowercase` and `english_capital` only the case is looked at.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, validate_call

from persyn_jax.config import ConfigError

Relation = Literal["less than", "at least"]
Count = Annotated[int, Field(ge=0)]
Ordinal = Annotated[int, Field(ge=1)]
Words = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Word = Annotated[str, Field(min_length=1)]


def _compare(found: int, relation: Relation, wanted: int) -> bool:
    return found < wanted if relation == "less than" else found >= wanted


def _occurrences(word: str, text: str) -> int:
    return len(re.findall(re.escape(word), text, flags=re.IGNORECASE))


def _existence(text: str, keywords: Words) -> bool:
    return all(_occurrences(word, text) for word in keywords)


def _frequency(text: str, keyword: Word, frequency: Count, relation: Relation) -> bool:
    return _compare(_occurrences(keyword.strip(), text), relation, frequency)


def _forbidden_words(text: str, forbidden_words: Words) -> bool:
    """As whole words: `cat` is not in `category`."""
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, flags=re.IGNORECASE) for word in forbidden_words
    )


def _letter_frequency(
    text: str,
    letter: Annotated[str, Field(min_length=1, max_length=1)],
    let_frequency: Count,
    let_relation: Relation,
) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _number_words(text: str, num_words: Count, relation: Relation) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def _number_paragraphs(text: str, num_paragraphs: Count) -> bool:
    """Between dividers `***`; only before the first and after the last may be nothing."""
    paragraphs = _between(text, "***")
    return paragraphs is not None and len(paragraphs) == num_paragraphs


def _nth_paragraph_first_word(
    text: str, num_paragraphs: Ordinal, nth_paragraph: Ordinal, first_word: Word
) -> bool:
    """Between empty lines."""
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _number_placeholders(text: str, num_placeholders: Count) -> bool:
    """At least so many [words in square brackets]."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: Word) -> bool:
    """Somewhere the marker, dots and spaces of `P.S.` and `P.P.S` taken loosely."""
    marker = postscript_marker.strip()
    loose = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(marker, re.escape(marker))
    return re.search(loose, text, flags=re.IGNORECASE) is not None


def _number_bullet_lists(text: str, num_bullets: Count) -> bool:
    """Exactly so many lines that begin with `* ` or `-`."""
    return len(re.findall(r"^\s*(?:\*[^*\n]|-).*$", text, flags=re.MULTILINE)) == num_bullets


def _constrained_response(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _number_highlighted_sections(text: str, num_highlights: Count) -> bool:
    """At least so many *sections in asterisks*, one or two on either side."""
    found = re.findall(r"\*\*[^\n*]*\*\*|\*[^\n*]*\*", text)
    return sum(bool(part.strip("*").strip()) for part in found) >= num_highlights


def _multiple_sections(text: str, section_spliter: Word, num_sections: Count) -> bool:
    """At least so many headings such as `SECTION 1`."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _json_format(text: str) -> bool:
    """All of it is JSON, in a fenced block or not."""
    inner = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    """Somewhere a <<title>>."""
    return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str) -> bool:
    """Two different ones with `******` between them."""
    responses = _between(text, "******")
    return responses is not None and len(responses) == 2 and len(set(responses)) == 2


def _repeat_prompt(text: str, prompt_to_repeat: Word) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(text: str, end_phrase: Word) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


def _english_capital(text: str) -> bool:
    return text.isupper()


def _english_lowercase(text: str) -> bool:
    return text.islower()


def _no_comma(text: str) -> bool:
    return "," not in text


def _between(text: str, divider: str) -> list[str] | None:
    """The parts between dividers, without an empty first and last; None if another is empty."""
    parts = [part.strip() for part in text.split(divider)]
    if len(parts) > 1:
        parts = parts[not parts[0] : len(parts) - (not parts[-1])]
    return parts if all(parts) else None


CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_words": _number_words,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
"""(text, **kwargs) -> whether the text keeps the constraint."""

NOT_CHECKABLE = {
    "length_constraints:number_sentences": "a sentence splitter",
    "change_case:capital_word_frequency": "a word splitter",
    "language:response_language": "a language detector",
}
"""IFEval's others, and what each would need."""

Kept = Callable[[str], bool]


def share_kept(text: str, reference: str) -> float:
    """The share of the constraints in `reference` (JSON, see above) that `text` keeps, in [0, 1].

    Raises ConfigError as `read_constraints`.
    """
    constraints = read_constraints(reference)
    return sum(kept(text) for kept in constraints) / len(constraints)


@functools.lru_cache(maxsize=4096)  # one prompt's are read once for all of its answers
def read_constraints(reference: str) -> Sequence[Kept]:
    """The constraints that a reference names, each a function of the text.

    Raises ConfigError: not such JSON, none at all, an id that is not known or cannot be checked, an
    argument that is missing, unknown or impossible. Arguments that are null count as not given.
    """
    try:
        entries = json.loads(reference)
    except ValueError as error:
        raise ConfigError(f"constraints are not JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError("constraints must be a JSON list of at least one {id, kwargs}")
    return tuple(_read_constraint(entry) for entry in entries)


def _read_constraint(entry: Any) -> Kept:
    if not isinstance(entry, dict) or not entry.keys() <= {"id", "kwargs"} or "id" not in entry:
        raise ConfigError(f"a constraint must be an object {{id, kwargs}}, got {entry!r}")
    name, kwargs = entry["id"], entry.get("kwargs") or {}
    if isinstance(name, str) and name in NOT_CHECKABLE:
        raise ConfigError(f"constraint {name!r} cannot be checked: it needs {NOT_CHECKABLE[name]}")
    if not isinstance(name, str) or name not in CONSTRAINTS:
        raise ConfigError(f"no such constraint: {name!r}; there are {', '.join(CONSTRAINTS)}")
    if not isinstance(kwargs, dict):
        raise ConfigError(f"constraint {name!r}: kwargs must be an object, got {kwargs!r}")
    given = {key: value for key, value in kwargs.items() if value is not None}
    kept = functools.partial(_validated(name), **given)
    try:
        kept("")
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in wrong["loc"])
        raise ConfigError(f"constraint {name!r}: {key}: {wrong['msg']}") from None
    except TypeError as error:  # an argument called `text`
        raise ConfigError(f"constraint {name!r}: {error}") from None
    return kept


@functools.cache
def _validated(name: str) -> Callable[..., bool]:
    return validate_call(config=ConfigDict(strict=True))(CONSTRAINTS[name])
