"""The README's Python examples run as they stand, and say what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def printed_by(example: str) -> list[str]:
    """The words that an example prints, run as a reader would run it."""
    return subprocess.run(
        [sys.executable, "-c", example],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.split()


def test_the_readme_has_three_examples():
    assert len(EXAMPLES) == 3


def test_gossip_loop_ends_near_consensus_and_keeps_the_mass():
    distance, total = map(float, printed_by(EXAMPLES[0]))
    assert distance < 0.05
    assert total == 1.0


def test_own_schedule_is_exact_after_three_rounds():
    assert printed_by(EXAMPLES[1]) == ["3"]


def test_own_rule_moves_the_worker_with_the_larger_update():
    assert list(map(float, printed_by(EXAMPLES[2]))) == [1.0, 2.0, 0.0, -4.0]


def test_pictures_of_the_readme_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert (Path(__file__).parents[2] / picture).is_file()


def test_links_of_the_readme_are_there():
    links = [link for link in re.findall(r"\]\((.*?)\)", README) if "://" not in link]
    for link in links:
        assert (Path(__file__).parents[2] / link).exists(), link
