"""Reading a config: what is accepted comes back whole, what is not is named in one line."""

import dataclasses
import hashlib
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from persyn_jax import config


@config.config_class
class Teacher:
    name: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0


@config.config_class
class Rewards:
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.4
    scale: Literal["none", "standardised"] = "standardised"


@config.config_class
class Run:
    seed: Annotated[int, Field(ge=0)]
    note: str | None = None
    rewards: Rewards = Rewards()
    teachers: list[Teacher] = dataclasses.field(default_factory=list)


RUN = """\
seed: 3
rewards: {alpha: 0.5}
teachers:
  - name: terse
  - name: wordy
    temperature: 1
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def complaint(path, *overrides: str) -> str:
    """The one line that is shown when the config at `path` is refused."""
    with pytest.raises(config.ConfigError) as caught:
        config.load(Run, path, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_file_becomes_typed_config_with_defaults(path):
    assert config.load(Run, path) == Run(
        seed=3,
        note=None,
        rewards=Rewards(alpha=0.5, scale="standardised"),
        teachers=[Teacher(name="terse", temperature=0.0), Teacher(name="wordy", temperature=1.0)],
    )


def test_config_cannot_be_changed(path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load(Run, path).seed = 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{seed: 1, sede: 2}", ["sede", "unknown key"]),
        ("{seed: 1, rewards: {beta: 2}}", ["rewards.beta", "unknown key"]),
        ("{}", ["seed", "required"]),
        ("{seed: three}", ["seed", "integer", "'three'"]),
        ("{seed: 2.5}", ["seed", "integer", "2.5"]),
        ("{seed: 1, note: [a]}", ["note", "string", "['a']"]),
        ("{seed: -1}", ["seed", "0", "-1"]),
        ("{seed: 1, rewards: {alpha: 1.5}}", ["rewards.alpha", "1", "1.5"]),
        ("{seed: 1, rewards: {scale: big}}", ["rewards.scale", "'standardised'", "'big'"]),
        ("{seed: 1, teachers: [{name: a, temperature: 3}]}", ["teachers.0.temperature", "2", "3"]),
        ("seed: 1\nnote: a\nseed: 2\n", ["'seed'", "twice", "line 3"]),
        ("seed: 1\nrewards:\n  alpha: 0\n  alpha: 1\n", ["'alpha'", "twice", "line 4"]),
        ("seed: [1", ["not valid YAML", "line 1"]),
        ("seed: !!python/object/apply:os.getcwd []", ["not valid YAML", "line 1"]),
        ("- seed", ["mapping", "list"]),
        ("", ["mapping"]),
    ],
)
def test_bad_file_is_refused_with_place_value_and_bound(path, text, said):
    path.write_text(text)
    line = complaint(path)
    assert str(path) in line
    assert [word for word in said if word not in line] == []


def test_every_complaint_is_made_at_once(path):
    path.write_text("{seed: -1, rewards: {alpha: 2}, sede: 0}")
    line = complaint(path)
    assert [key for key in ("seed:", "rewards.alpha:", "sede:") if key not in line] == []


def test_missing_file_is_named(tmp_path):
    assert str(tmp_path / "nowhere.yaml") in complaint(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("overrides", "change"),
    [
        (["seed=4"], {"seed": 4}),
        (["seed=4", "seed=5"], {"seed": 5}),
        (["note=a=b"], {"note": "a=b"}),
        (["note='7'"], {"note": "7"}),
        (["rewards.alpha=0.25"], {"rewards": Rewards(alpha=0.25)}),
        (["rewards={}"], {"rewards": Rewards()}),
        (["teachers=[]"], {"teachers": []}),
        (["teachers=[{name: a}]"], {"teachers": [Teacher(name="a")]}),
        (
            ["teachers.1.name=chatty"],
            {"teachers": [Teacher(name="terse"), Teacher(name="chatty", temperature=1)]},
        ),
        (
            ["teachers.0={name: a}"],
            {"teachers": [Teacher(name="a"), Teacher(name="wordy", temperature=1)]},
        ),
    ],
)
def test_overrides_change_what_they_name_and_nothing_else(path, overrides, change):
    assert config.load(Run, path, overrides) == dataclasses.replace(
        config.load(Run, path), **change
    )


def test_override_makes_the_section_that_the_file_left_out(path):
    path.write_text("seed: 1")
    assert config.load(Run, path, ["rewards.alpha=1"]).rewards == Rewards(alpha=1)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "section.key=value"),
        ("=4", "section.key=value"),
        ("seed=[4", "not valid YAML"),
        ("seed.deep=4", "'seed' is a value"),
        ("teachers.2.name=a", "list of 2"),
        ("teachers.-1.name=a", "list of 2"),
        ("teachers.first=a", "list of 2"),
        ("sede=4", "unknown key"),
        ("rewards.alpha=1.5", "1.5"),
    ],
)
def test_bad_override_is_refused(path, override, said):
    assert said in complaint(path, override)


# Without control characters and Unicode's own line breaks, which YAML does not keep.
words = st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], include_characters="\n\t")
)
teachers = st.builds(Teacher, name=words, temperature=st.floats(0, 2))
runs = st.builds(
    Run,
    seed=st.integers(min_value=0),
    note=st.none() | words,
    rewards=st.builds(
        Rewards, alpha=st.floats(0, 1), scale=st.sampled_from(["none", "standardised"])
    ),
    teachers=st.lists(teachers, max_size=3),
)


@given(runs)
def test_config_survives_values_and_yaml(run):
    assert config.validate(Run, config.to_values(run), where="here") == run
    assert config.validate(Run, yaml.safe_load(config.to_yaml(run)), where="here") == run


@given(runs, st.randoms(use_true_random=False))
def test_fingerprint_does_not_see_the_order_of_keys(run, random):
    keys = list(config.to_values(run))
    random.shuffle(keys)
    shuffled = {key: config.to_values(run)[key] for key in keys}
    assert config.fingerprint(shuffled) == config.fingerprint(run)


@given(runs, runs)
def test_fingerprints_agree_exactly_when_configs_do(one, other):
    assert (config.fingerprint(one) == config.fingerprint(other)) == (
        config.to_values(one) == config.to_values(other)
    )


def test_fingerprint_is_the_digest_of_canonical_json():
    canonical = rb'{"a":[1,"\u00e4"],"b":null}'
    digest = hashlib.sha256(canonical).hexdigest()
    assert config.fingerprint({"b": None, "a": [1, "ä"]}) == digest[:16]
