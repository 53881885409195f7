"""Metrics sinks against stand-ins for their packages that take calls as the packages do.

The signatures are those of tensorboardX 2.6, wandb 0.31 and trackio 0.43.
"""

import dataclasses
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.config import ConfigError, validate
from persyn_jax.training import sinks
from persyn_jax.training.config import TrainConfig

ROW = {
    "step": 7,
    "loss": [1.0, None, 3.0],
    "sum_weight": [0.25, 0.25, 0.5],
    "tokens": 120,
    "estimated_consensus_distance": None,
    "consensus_distance_by_group": {"embed": 0.5, "layers": 1.5},
    "note": "words",
}
SCALARS = {
    "loss": 2.0,
    "loss/0": 1.0,
    "loss/2": 3.0,
    "sum_weight": 1 / 3,
    "sum_weight/0": 0.25,
    "sum_weight/1": 0.25,
    "sum_weight/2": 0.5,
    "tokens": 120.0,
    "consensus_distance_by_group/embed": 0.5,
    "consensus_distance_by_group/layers": 1.5,
}


@dataclasses.dataclass
class Recorded:
    """What a stand-in was told."""

    opened: dict = dataclasses.field(default_factory=dict)
    logged: list = dataclasses.field(default_factory=list)
    closed: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class StandIn:
    """A run or writer of any of the packages."""

    recorded: Recorded

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc_val, exc_tb):
        self.recorded.closed.append(None)

    def finish(self, exit_code=None):
        self.recorded.closed.append(exit_code)

    def log(self, data, step=None):
        self.recorded.logged += [(step, name, number) for name, number in data.items()]

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None):
        self.recorded.logged.append((global_step, tag, scalar_value))


def wandb(recorded):
    def init(entity=None, project=None, dir=None, id=None, name=None, config=None, resume=None):
        recorded.opened |= locals()
        return StandIn(recorded)

    return types.SimpleNamespace(init=init)


def trackio(recorded):
    def init(project, name=None, group=None, space_id=None, config=None, resume="never"):
        recorded.opened |= locals()
        return StandIn(recorded)

    return types.SimpleNamespace(init=init)


def tensorboard(recorded):
    def writer(logdir=None, comment="", purge_step=None, max_queue=10, flush_secs=120):
        recorded.opened |= locals()
        return StandIn(recorded)

    return types.SimpleNamespace(SummaryWriter=writer)


PACKAGES = {"wandb": wandb, "trackio": trackio, "tensorboard": tensorboard}


@pytest.fixture
def recorded(monkeypatch):
    """Puts stand-ins where the packages would be; gives what each was told, by sink."""
    told = {name: Recorded() for name in PACKAGES}
    modules = {sinks._PACKAGES[name]: PACKAGES[name](told[name]) for name in PACKAGES}
    monkeypatch.setattr(sinks.importlib.util, "find_spec", modules.get)
    monkeypatch.setattr(sinks.importlib, "import_module", modules.__getitem__)
    return told


def test_a_row_goes_to_every_sink_named_as_scalars(recorded, tmp_path):
    config = {"training": {"rows": 2}}
    with sinks.tracked(["tensorboard", "wandb", "trackio"], "run-1", tmp_path, config, 5) as track:
        track(ROW)
        track({"step": 8, "tokens": 60})
    for told in recorded.values():
        expected = [(7, name, number) for name, number in SCALARS.items()]
        assert told.logged == [*expected, (8, "tokens", 60.0)]
    assert [recorded[name].closed for name in PACKAGES] == [[0], [None], [None]]
    opened = {name: told.opened for name, told in recorded.items()}
    assert opened["tensorboard"]["logdir"] == str(tmp_path / "tensorboard")
    assert opened["tensorboard"]["purge_step"] == 5
    assert opened["wandb"]["dir"] == str(tmp_path)
    assert opened["wandb"]["id"] == "run-1"
    for name in ("wandb", "trackio"):
        assert (opened[name]["name"], opened[name]["config"]) == ("run-1", config)
        assert (opened[name]["project"], opened[name]["resume"]) == ("persyn_jax", "allow")


def test_sinks_that_are_not_named_are_left_alone(recorded, tmp_path):
    with sinks.tracked(["trackio"], "run-1", tmp_path, {}, 0) as track:
        track(ROW)
    assert [name for name, told in recorded.items() if told.opened] == ["trackio"]
    with sinks.tracked([], "run-1", tmp_path, {}, 0) as track:
        track(ROW)


def test_a_training_that_fails_closes_its_sinks(recorded, tmp_path):
    def train():
        with sinks.tracked(list(PACKAGES), "run-1", tmp_path, {}, 0) as track:
            track(ROW)
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        train()
    assert [recorded[name].closed for name in PACKAGES] == [[1], [None], [None]]


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_missing_package_is_one_line_that_names_it(name, package, monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError) as refused:
        sinks.check_sinks([name])
    assert str(refused.value) == (
        f"training.track: {name} needs the package {package}, which is not installed: "
        f"pip install {package}"
    )


def test_an_unknown_sink_is_refused():
    with pytest.raises(ConfigError, match=r"track.0: input should be 'tensorboard', 'wandb' or"):
        validate(TrainConfig, {"track": ["mlflow"]}, where="x.yaml")


numbers = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text()
rows = st.dictionaries(
    st.text("abc", min_size=1),
    numbers | st.lists(numbers) | st.dictionaries(st.text("abc", min_size=1), numbers),
)


@given(rows)
def test_every_scalar_is_a_number_and_no_number_of_a_row_is_lost(row):
    scalars = sinks.flat_scalars(row)
    assert all(type(number) is float for number in scalars.values())
    for name, value in row.items():
        parts = value.items() if isinstance(value, dict) else [(None, value)]
        parts = enumerate(value) if isinstance(value, list) else parts
        for part, number in parts:
            if type(number) in (int, float):
                assert scalars[name if part is None else f"{name}/{part}"] == number
