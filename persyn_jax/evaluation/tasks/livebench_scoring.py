"""LiveBench's answers scored by rule, where an objective answer can be compared with little code.

Scored, by LiveBench's own rules as far as the answer is given in the form that the question asks
for: `web_of_lies_v2`, `web_of_lies_v3`, `zebra_puzzle`, `spatial`, `math_comp`, `connections`,
`typos`, `cta`.

Left out: `coding` (runs the answer's programs), `instruction_following` (use `ifeval`), `AMPS_Hard`
(needs a computer algebra system), `olympiad`, `plot_unscrambling`, `tablejoin`, `tablereformat`
(long parsers of their own), and questions that LiveBench has withdrawn.

lm-eval loads this file by its path, so it imports the standard library alone.
"""

import re
from collections.abc import Callable
from typing import Any

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen", "twenty"),
)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_SOLUTION = re.compile(r"<solution>(.*?)</solution>", re.DOTALL)
_BOLD = re.compile(r"\*\*+([^*]+)\*\*+")


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


SCORERS: dict[str, Callable[[str, str], float]] = {
    "web_of_lies_v2": three_words,
    "web_of_lies_v3": share_in_place,
    "zebra_puzzle": share_in_place,
    "spatial": bold_word,
    "math_comp": competition,
    "connections": groups_of_four,
    "typos": text_within,
    "cta": column_name,
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
