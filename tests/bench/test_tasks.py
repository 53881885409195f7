"""The tasks of the gossip grid: files read right or refused, data dealt out, the network's sums."""

import gzip

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.bench import cnn, images, language, teachers
from persyn_jax.bench.splits import batch_indices, split_examples
from persyn_jax.bench.tasks import make_task
from persyn_jax.config import ConfigError

RNG = np.random.default_rng(0)


@pytest.fixture
def cifar(tmp_path):
    """Seven records in each of the six files; returns (folder, records [6, 7, 3073])."""
    records = RNG.integers(0, 256, (6, 7, images.CIFAR_RECORD)).astype(np.uint8)
    records[:, :, 0] %= 10
    for name, batch in zip((*images.CIFAR_TRAIN, *images.CIFAR_TEST), records, strict=True):
        (tmp_path / name).write_bytes(batch.tobytes())
    return tmp_path, records


@pytest.fixture
def fashion(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", RNG.integers(0, 256, (30, 28, 28)))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(30) % 10)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", RNG.integers(0, 256, (20, 28, 28)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(20) % 10)
    return tmp_path


def write_idx(path, values, says=None):
    shape = says or values.shape
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_cifar_pixels_are_where_the_format_says(cifar):
    folder, records = cifar
    found = images.find_images(str(folder))
    assert found.name == "CIFAR-10"
    assert found.train_images.shape == (35, 28, 28, 3)
    for image in (0, 17, 34):
        record = records[image // 7, image % 7]
        assert found.train_labels[image] == record[0]
        for row, column, channel in ((0, 0, 0), (27, 3, 1), (5, 27, 2)):
            at = 1 + channel * 1024 + (row + 2) * 32 + column + 2
            assert found.train_images[image, row, column, channel] == record[at]
    assert (found.test_labels == records[5, :, 0]).all()


def test_fashion_mnist_is_read_and_named_as_a_stand_in(fashion):
    found = images.find_images(str(fashion))
    assert "in place of CIFAR-10" in found.name
    assert found.train_images.shape == (30, 28, 28, 1)
    assert (found.test_labels == np.arange(20) % 10).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch.bin", b"x" * 3072, "3072 bytes are not a whole number of records of 3073"),
        ("test_batch.bin", b"", "0 bytes"),
        ("data_batch_2.bin", b"\xff" * 3073, "labels must be 0 to 9, got 255"),
    ],
)
def test_a_damaged_cifar_file_is_refused_in_one_line(cifar, name, content, message):
    folder, _ = cifar
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refusal:
        images.read_cifar10(folder)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_cifar_file_is_named(cifar):
    folder, _ = cifar
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(ConfigError, match=r"data_batch_3\.bin"):
        images.find_images(str(folder))


@pytest.mark.parametrize(
    ("shape", "says", "message"),
    [
        ((20, 28, 28), (21, 28, 28), "header says 16464 bytes, it holds 15680"),
        ((20, 28, 28), (19, 28, 28), "header says 14896 bytes, it holds more"),
        ((20, 28, 28), (2**32 - 1, 2**32 - 1, 2**32 - 1), "too many"),
        ((19, 28, 28), None, "19 t10k images, but 20 labels"),
        ((20, 14, 28), None, "must be 28 x 28"),
        ((20,), None, "not an idx file of bytes in 3 dimensions"),
    ],
)
def test_a_damaged_idx_file_is_refused_in_one_line(fashion, shape, says, message):
    write_idx(fashion / "t10k-images-idx3-ubyte.gz", np.zeros(shape), says)
    with pytest.raises(ConfigError, match=message):
        images.find_images(str(fashion))


def test_a_file_that_is_no_gzip_is_refused(fashion):
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(b"plain")
    with pytest.raises(ConfigError, match=r"train-labels.*cannot be read"):
        images.find_images(str(fashion))


def test_an_empty_folder_is_refused_with_what_would_help(tmp_path):
    with pytest.raises(ConfigError, match="apt install dataset-fashion-mnist"):
        images.find_images(str(tmp_path))


@given(
    classes=st.lists(st.integers(0, 4), min_size=8, max_size=80),
    workers=st.integers(1, 8),
    split=st.sampled_from(["same", "dirichlet"]),
    seed=st.integers(0, 5),
)
def test_each_example_is_dealt_out_once_and_nobody_goes_without(classes, workers, split, seed):
    shards = split_examples(np.array(classes), workers, split, 0.1, seed)
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(classes)))
    assert min(len(shard) for shard in shards) >= 1
    if split == "same":
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_the_dirichlet_deal_is_more_unlike_with_a_smaller_concentration():
    classes = np.arange(4000) % 10

    def largest_share(concentration):
        shards = split_examples(classes, 8, "dirichlet", concentration, seed=0)
        counts = np.array([np.bincount(classes[shard], minlength=10) for shard in shards])
        return (counts.max(axis=0) / counts.sum(axis=0)).mean()

    assert largest_share(0.1) > largest_share(1.0) > largest_share(100.0) > 1 / 8


def test_one_class_each_needs_as_many_classes_as_workers():
    shards = split_examples(np.array([7, 2, 7, 5, 2, 2]), 3, "one_class", 1.0, seed=0)
    assert [shard.tolist() for shard in shards] == [[1, 4, 5], [3], [0, 2]]
    with pytest.raises(ConfigError, match="split one_class: 3 classes need as many workers, got 2"):
        split_examples(np.array([7, 2, 7, 5]), 2, "one_class", 1.0, seed=0)


def test_a_batch_depends_on_seed_step_and_worker_alone():
    shard = np.arange(100, 200)
    first = batch_indices(shard, 5, seed=1, step=2, worker=3)
    assert (first == batch_indices(shard, 5, seed=1, step=2, worker=3)).all()
    assert np.isin(first, shard).all()
    others = [(2, 2, 3), (1, 3, 3), (1, 2, 4)]
    assert all((first != batch_indices(shard, 5, *other)).any() for other in others)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_is_that_of_convolutions(channels):
    params = cnn.init(jax.random.key(0), channels)
    params = jax.tree.map(lambda leaf: leaf + 0.01, params)  # so that biases count
    batch = RNG.integers(0, 256, (3, 28, 28, channels)).astype(np.uint8), np.array([1, 5, 9])
    found = jax.value_and_grad(cnn.loss)(params, batch)
    expected = jax.value_and_grad(cnn.loss_by_convolutions)(params, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_network_has_the_parameters_of_the_paper():
    leaves = jax.tree.leaves(jax.eval_shape(lambda: cnn.init(jax.random.key(0), 3)))
    assert sum(leaf.size for leaf in leaves) == 286_154


def test_the_language_task_scores_the_next_byte(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(RNG.integers(0, 256, 64 * 200).astype(np.uint8)))
    task = make_task(
        "language", str(path), workers=2, batch=3, split="same", concentration=1.0, seed=0
    )
    params = task.init(jax.random.key(0))
    (bytes_WBT,) = task.batches(0)
    assert bytes_WBT.shape == (2, 3, 64)
    found = task.loss(params, (bytes_WBT[0],))
    logits = np.asarray(language._logits(params, bytes_WBT[0]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nats = [-log_p[b, t, bytes_WBT[0][b, t + 1]] for b in range(3) for t in range(63)]
    np.testing.assert_allclose(found, np.mean(nats), rtol=1e-5)
    assert task.logits(params, task.probe).shape == (len(task.probe), 256)
    # Random bytes from a random network: about log 256 nats each.
    assert abs(task.evaluate(params)["loss"] - np.log(256)) < 0.1


def test_the_language_task_refuses_what_is_no_text(tmp_path):
    (tmp_path / "short").write_bytes(b"abc")
    for path in (tmp_path / "short", tmp_path / "absent"):
        with pytest.raises(ConfigError, match="text"):
            language.find_text(str(path))


def teachers_of(texts_NT) -> np.ndarray:
    """By the rule alone: how far on each answer is, all turns of a text alike."""
    shift_NK = (texts_NT[:, 1::2].astype(int) - texts_NT[:, ::2]) % 26
    assert (shift_NK == shift_NK[:, :1]).all()
    return shift_NK[:, 0] - 1


@pytest.mark.parametrize("workers", [2, 5])
def test_personalised_shards_have_one_teacher_each_and_pooled_ones_the_same_examples(workers):
    text = teachers.make_text(workers)
    shards, pooled = (
        [text.train_NT[i] for i in split_examples(text.document_N, workers, split, 1.0, seed=3)]
        for split in ("one_class", "same")
    )
    assert [set(teachers_of(shard)) for shard in shards] == [{w} for w in range(workers)]
    for shard in pooled:
        share_M = np.bincount(teachers_of(shard), minlength=workers) / len(shard)
        np.testing.assert_allclose(share_M, 1 / workers, atol=0.07)
    assert [len(shard) for shard in pooled] == [len(shard) for shard in shards]
    every, dealt = (sorted(map(bytes, np.concatenate(parts))) for parts in (shards, pooled))
    assert every == dealt == sorted(map(bytes, text.train_NT))


@pytest.mark.parametrize("workers", [2, 5])
def test_held_out_answers_are_of_all_teachers_alike_and_to_questions_nobody_trained_on(workers):
    text = teachers.make_text(workers)
    test = list(zip(map(bytes, text.test_NT[:, ::2]), teachers_of(text.test_NT), strict=True))
    asked = {questions for questions, _ in test}
    assert len(asked) == 64
    assert sorted(test) == [(q, m) for q in sorted(asked) for m in range(workers)]
    assert not asked & set(map(bytes, text.train_NT[:, ::2]))
    assert set(teachers_of(text.test_NT[:workers])) == set(range(workers))  # the probe has all


def test_the_teachers_task_scores_answers_alone():
    task = make_task(
        "teachers", None, workers=3, batch=4, split="one_class", concentration=1.0, seed=0
    )
    (texts_WBT,) = task.batches(5)
    assert [set(teachers_of(texts_BT)) for texts_BT in texts_WBT] == [{0}, {1}, {2}]
    params = task.init(jax.random.key(0))
    logits = np.asarray(language._logits(params, texts_WBT[1]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    answers = [-log_p[b, t, texts_WBT[1][b, t + 1]] for b in range(4) for t in range(0, 16, 2)]
    np.testing.assert_allclose(task.loss(params, (texts_WBT[1],)), np.mean(answers), rtol=1e-5)
    assert task.logits(params, task.probe).shape == (16, 256)


@pytest.mark.parametrize(
    ("data", "workers", "message"),
    [("x.txt", 2, "data x.txt: task teachers makes its own"), (None, 27, "at most 26 differ")],
)
def test_the_teachers_task_refuses_what_it_cannot_do_in_one_line(data, workers, message):
    with pytest.raises(ConfigError, match=message):
        make_task(
            "teachers", data, workers=workers, batch=1, split="same", concentration=1.0, seed=0
        )


def test_the_image_task_scores_what_the_network_says(fashion):
    task = make_task(
        "images", str(fashion), workers=3, batch=2, split="dirichlet", concentration=0.5, seed=0
    )
    params = task.init(jax.random.key(1))
    data = images.find_images(str(fashion))
    scores = task.evaluate(params)
    found = np.asarray(cnn.logits(params, data.test_images))
    assert scores["accuracy"] == pytest.approx((found.argmax(axis=1) == data.test_labels).mean())
    assert scores["loss"] == pytest.approx(
        float(cnn.loss(params, (data.test_images, data.test_labels))), rel=1e-5
    )
    images_WBHWC, labels_WB = task.batches(4)
    assert images_WBHWC.shape == (3, 2, 28, 28, 1)
    assert labels_WB.shape == (3, 2)
