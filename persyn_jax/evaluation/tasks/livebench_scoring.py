"""LiveBench's answers scored by rule, where an objective answer can be compared with little code.

Scored, by LiveBench's own rules as far as the answer is given in the form that the question asks
for: `web_of_lies_v2`, `web_of_lies_v3`, `zebra_puzzle`, `spatial`, `math_comp`, `olympiad`,
`connections`, `typos`, `plot_unscrambling`, `cta`, `tablejoin`.

Left out: `coding` (runs the answer's programs), `instruction_following` (use `ifeval`), `AMPS_Hard`
(needs a computer algebra system), `tablereformat` (a parser for each format), newer tasks, and
questions that LiveBench has withdrawn.

lm-eval loads this file by its path, so it imports the standard library alone.
"""

import ast
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen", "twenty"),
)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_SOLUTION = re.compile(r"<solution>(.*?)</solution>", re.DOTALL)
_BOLD = re.compile(r"\*\*+([^*]+)\*\*+")
_FENCED = re.compile(r"```(?:python)?(.*?)```", re.DOTALL)
_ANSWER = re.compile(r"answer:[\s*]*(.*)", re.IGNORECASE)


def final_answer(text: str) -> str:
    """What stands in the last <solution> tags; else in the last \\boxed; else in the last bold
    words; else the last line."""
    for pattern in (_SOLUTION, _BOXED, _BOLD):
        if found := pattern.findall(text):
            return re.sub(r"\\text\{([^{}]*)\}", r"\1", found[-1]).strip()
    return text.strip().rpartition("\n")[2]


def three_words(text: str, truth: str) -> float:
    """1.0 where the answer is the reference's list of yes, no and unknown."""
    return float(_items(final_answer(text)) == _items(truth))


def share_in_place(text: str, truth: str) -> float:
    """The mean of (are all items right) and (share of the right items), each at its place."""
    found, wanted = _items(final_answer(text)), _items(truth)
    right = sum(one == other for one, other in zip(found, wanted, strict=False))
    return ((right == len(wanted)) + right / len(wanted)) / 2


def bold_word(text: str, truth: str) -> float:
    """1.0 where one of the last three bold words is the reference, as a word or a digit."""
    wanted = truth.strip().lower()
    words = [word.strip().lower() for word in _BOLD.findall(text)[-3:]]
    digits = [str(_NUMBERS.index(word)) for word in words if word in _NUMBERS]
    return float(wanted in words + digits)


def competition(text: str, truth: str) -> float:
    """A letter given at least four times in a row, boxed or in tags; a number in the last 50
    characters."""
    if truth.isdigit():
        return float(truth in text[-50:])
    given = final_answer(text).strip("() .").upper()
    return float(truth * 4 in text or (given != "" and set(given) == {truth.upper()}))


def numbers_in_order(text: str, truth: str) -> float:
    """1 - (edit distance of the lists of whole numbers) / (the longer one's length): what follows
    the last `Answer:`, else the final answer."""
    given = _ANSWER.findall(text)
    found = _whole_numbers(given[-1] if given else final_answer(text))
    wanted = _whole_numbers(truth)
    return 1 - _edits(found, wanted) / max(len(found), len(wanted))


def sentences_in_order(text: str, truth: str) -> float:
    """1 - (edit distance of 0, 1, ... and the places of the sentences nearest to the reference's) /
    (their number). Words that fit nowhere are nearest to something, too."""
    wanted, found = _sentences(truth), _sentences(text.rpartition("<PLOT_SUMMARY>")[2])
    nearest = [difflib.get_close_matches(one, found, n=1, cutoff=0.0) for one in wanted]
    places = [found.index(sentence) for match in nearest for sentence in match]
    return 1 - _edits(places, range(len(wanted))) / len(wanted)


def groups_of_four(text: str, truth: str) -> float:
    """The share of the reference's groups of four words that are found, in any order."""
    found, wanted = _groups(_items(final_answer(text))), _groups(_items(truth))
    return sum(group in found for group in wanted) / len(wanted)


def text_within(text: str, truth: str) -> float:
    """1.0 where the answer holds the reference word for word, line breaks aside."""
    return float(truth in " ".join(line for line in text.split("\n") if line))


def column_name(text: str, truth: str) -> float:
    """1.0 where the answer, or what it boxes, is the reference's letters and digits."""
    boxed = _BOXED.findall(text)
    return float(_bare(boxed[-1] if boxed else text) == _bare(truth))


def joined_columns(text: str, truth: str) -> float:
    """F1 of the pairs of two dicts, to two places. The answer's stands in the last code block, is
    boxed, or is the whole of it."""
    fenced, boxed = _FENCED.findall(text), _BOXED.findall(text)
    given = [*fenced[-1:], *(re.sub(r"\\text\{([^{}]*)\}", r"\1", one) for one in boxed[-1:]), text]
    found, wanted = _literal_dict(given[0]), _literal_dict(truth)
    right = sum(wanted.get(key) == value for key, value in found.items())
    return round(2 * right / (len(found) + len(wanted)), 2)


SCORERS: dict[str, Callable[[str, str], float]] = {
    "web_of_lies_v2": three_words,
    "web_of_lies_v3": share_in_place,
    "zebra_puzzle": share_in_place,
    "spatial": bold_word,
    "math_comp": competition,
    "olympiad": numbers_in_order,
    "connections": groups_of_four,
    "typos": text_within,
    "plot_unscrambling": sentences_in_order,
    "cta": column_name,
    "tablejoin": joined_columns,
}
"""By a question's `task`: (answer, reference) -> score in [0, 1]."""


def scored_questions(dataset: Any) -> Any:
    """The questions of a `datasets.Dataset` that SCORERS has a rule for and that are in use."""
    return dataset.filter(
        lambda row: row["task"] in SCORERS and not row.get("livebench_removal_date")
    )


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval's hook: the score of the one answer."""
    return {"score": SCORERS[doc["task"]](results[0], doc["ground_truth"])}


def _items(text: str) -> list[str]:
    return [item.strip().strip(".").lower().replace("-", " ") for item in text.split(",")]


def _groups(words: list[str]) -> list[set[str]]:
    return [set(words[first : first + 4]) for first in range(0, len(words), 4)]


def _bare(text: str) -> str:
    return re.sub(r"\W", "", text.lower())


def _sentences(text: str) -> list[str]:
    return [sentence for part in text.split(".") if (sentence := part.strip())]


def _whole_numbers(text: str) -> list[int | None]:
    """Of a list with commas; None for what is no number."""
    bare = (re.sub(r"[^\w-]", "", item.strip().rpartition(" ")[2]) for item in text.split(","))
    return [int(item) if re.fullmatch(r"-?[0-9]{1,9}", item) else None for item in bare]


def _literal_dict(text: str) -> dict[Any, Any]:
    try:
        found = ast.literal_eval(text.replace("\n", "").strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _edits(some: Sequence[Any], others: Sequence[Any]) -> int:
    """Levenshtein's distance: insertions, deletions and replacements."""
    row = list(range(len(others) + 1))
    for i, one in enumerate(some, 1):
        before, row = row, [i]
        for j, other in enumerate(others, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (one != other)))
    return row[-1]
