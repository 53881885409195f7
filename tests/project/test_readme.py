"""The README's Python examples run as they stand, and say what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_gossip_example_reaches_consensus_and_keeps_the_mass():
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    printed = subprocess.run(
        [sys.executable, "-c", example],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    distance, total = map(float, printed.split())
    assert distance < 1e-6
    assert total == 1.0


def test_pictures_of_the_readme_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert (Path(__file__).parents[2] / picture).is_file()


def test_links_of_the_readme_are_there():
    links = [link for link in re.findall(r"\]\((.*?)\)", README) if "://" not in link]
    for link in links:
        assert (Path(__file__).parents[2] / link).exists(), link
