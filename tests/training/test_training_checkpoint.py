"""Checkpoints: bitwise there and back, and whatever happens to their files is noticed."""

import logging
import shutil

import jax
import numpy as np
import pytest
from training_tiny import assert_bitwise_equal, language_training

from persyn_jax.mesh import per_worker
from persyn_jax.training.batches import Segment
from persyn_jax.training.checkpoint import restore_newest, saver
from persyn_jax.training.loop import run_steps
from persyn_jax.training.step import compiled_programs, placed_shapes


@pytest.fixture(scope="module")
def training():
    return language_training(workers=2, probability=0.6)


@pytest.fixture(scope="module")
def like(training):
    shapes = placed_shapes(training.mesh_start(), per_worker(training.mesh))
    return {2: shapes}.__getitem__  # of so many workers


def save(folder, step, state):
    with saver(folder) as checkpoint:
        checkpoint.save(step, state, [Segment(2, step)])


def states_after(training, first: int, state, last: int):
    """{step number: state after it}, as NumPy, from `state` before step `first`."""
    arguments = (training.mesh_step, state, training.batch_at, training.schedule)
    return {
        taken.number: jax.tree.map(np.asarray, taken.state)
        for taken in run_steps(*arguments, range(first, last), training.mesh)
    }


@pytest.fixture(scope="module")
def straight(training):
    """The undisturbed training."""
    return states_after(training, 0, training.mesh_start(), len(training.steps))


def placed(training, state):
    return jax.device_put(state, per_worker(training.mesh))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, training, straight):
    """A folder with the checkpoints of steps 1, 2 and 3 saved one after the other."""
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    for number in range(3):
        save(folder, number + 1, placed(training, straight[number]))
    return folder


@pytest.fixture
def folder(tmp_path, pristine):
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def test_no_checkpoint_is_no_state(tmp_path, like):
    assert restore_newest(tmp_path / "nowhere", like) is None
    assert restore_newest(tmp_path, like) is None


def test_a_state_comes_back_bitwise_and_where_it_was(folder, training, straight, like):
    step, state, segments = restore_newest(folder, like)
    assert segments == (Segment(2, step),)
    assert step == 3
    assert_bitwise_equal(state, straight[2])
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding == per_worker(training.mesh)


def test_the_newest_two_are_kept(folder):
    kept = sorted(path.name for path in folder.iterdir())
    names = ["00000002", "00000003"]
    assert kept == sorted(names + [f"{name}.manifest.json" for name in names])


def test_a_training_cut_off_at_any_checkpoint_ends_bitwise_like_an_undisturbed_one(
    tmp_path, training, straight, like
):
    """Parameters, moments, step counts, sum weights; and the program is the one it was."""
    for cut in (1, len(training.steps) - 1):
        save(tmp_path / str(cut), cut, placed(training, straight[cut - 1]))
        step, state, _ = restore_newest(tmp_path / str(cut), like)
        resumed = states_after(training, step, state, len(training.steps))
        assert_bitwise_equal(resumed, {n: straight[n] for n in range(cut, len(training.steps))})
    assert compiled_programs(training.mesh_step) == 1
    assert any(np.ptp(state.mix_state.sum_weight) for state in straight.values())


def files_of(checkpoint) -> list[str]:
    """The checkpoint's files and its manifest, as paths inside the folder of checkpoints."""
    inside = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    manifest = checkpoint.with_name(f"{checkpoint.name}.manifest.json")
    return [str(path.relative_to(checkpoint.parent)) for path in [*inside, manifest]]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("persyn")]


def test_a_flipped_bit_in_any_file_is_noticed_and_the_checkpoint_before_is_used(
    folder, pristine, straight, like, caplog
):
    for name in files_of(pristine / "00000003"):
        flip_a_bit(folder / name)
        caplog.clear()
        step, state, _ = restore_newest(folder, like)
        assert step == 2, name
        assert_bitwise_equal(state, straight[1])
        (warning,) = warnings_of(caplog)
        assert warning.startswith(f"checkpoint passed over: {folder}/00000003")
        if not name.endswith(".json"):
            assert name in warning
        shutil.copy(pristine / name, folder / name)
    assert restore_newest(folder, like)[0] == 3


@pytest.mark.parametrize("harm", [truncate, lambda path: path.unlink()], ids=["cut", "removed"])
def test_a_file_cut_short_or_removed_is_noticed(folder, pristine, like, caplog, harm):
    largest = max(files_of(pristine / "00000003")[:-1], key=lambda n: (pristine / n).stat().st_size)
    harm(folder / largest)
    assert restore_newest(folder, like)[0] == 2
    assert warnings_of(caplog) == [
        f"checkpoint passed over: {folder / largest} is not what was written"
    ]


def test_a_file_too_many_is_noticed(folder, like, caplog):
    (folder / "00000003" / "more").write_text("")
    assert restore_newest(folder, like)[0] == 2
    assert "00000003/more is not what was written" in warnings_of(caplog)[0]


def test_nothing_intact_is_an_error_and_never_a_fresh_start(folder, like):
    for name in ("00000002", "00000003"):
        flip_a_bit(folder / f"{name}.manifest.json")
    with pytest.raises(RuntimeError, match="checkpoints: holds checkpoints and none is intact"):
        restore_newest(folder, like)


def test_a_checkpoint_that_a_kill_cut_off_is_none(folder, training, straight, like, caplog):
    """Its manifest is written last; the next save of that step replaces what is left."""
    shutil.copytree(folder / "00000003", folder / "00000004")
    flip_a_bit(folder / files_of(folder / "00000004")[0])
    (folder / "00000005.orbax-checkpoint-tmp-17").mkdir()
    (folder / "00000005.sha256.partial").write_text("{")
    assert restore_newest(folder, like)[0] == 3
    assert warnings_of(caplog) == []
    save(folder, 4, placed(training, straight[3]))
    step, state, _ = restore_newest(folder, like)
    assert step == 4
    assert_bitwise_equal(state, straight[3])


def test_warnings_reach_the_terminal_as_plain_lines(folder, like, capfd, monkeypatch):
    """Nobody configures logging in a script: Python's last resort prints warnings as they are."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    (folder / "00000003" / "more").write_text("")
    restore_newest(folder, like)
    assert f"checkpoint passed over: {folder}/00000003/more" in capfd.readouterr().err
