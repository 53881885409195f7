"""CIFAR-10 in its original binary files, and Fashion-MNIST, which stands in for it where it is not.

Every size is checked before anything of that size is allocated.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from persyn_jax.config import ConfigError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""
CIFAR_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
CIFAR_TEST = ("test_batch.bin",)
CIFAR_SIDE, CROP = 32, 28
CIFAR_RECORD = 1 + 3 * CIFAR_SIDE**2
"""Bytes: a label, then red, green and blue planes."""
MOST_IMAGES = 1_000_000


@dataclass(frozen=True, eq=False)
class Images:
    """A data set of labelled images, 28 x 28."""

    name: str
    train_images: np.ndarray
    """uint8[N, 28, 28, C]."""
    train_labels: np.ndarray
    """uint8[N]: 0 to 9."""
    test_images: np.ndarray
    test_labels: np.ndarray


def find_images(folder: str | None) -> Images:
    """The data set in `folder`: CIFAR-10 (binary version) or Fashion-MNIST, by its files.

    folder: None takes Fashion-MNIST where Debian's package puts it.
    Raises ConfigError: nothing there, or a file that is not what its name says.
    """
    path = FASHION_MNIST if folder is None else Path(folder)
    if (path / CIFAR_TEST[0]).is_file():
        return read_cifar10(path)
    if (path / "train-images-idx3-ubyte.gz").is_file():
        return read_fashion_mnist(path)
    raise ConfigError(
        f"images: {path} holds neither CIFAR-10's binary files (data_batch_1.bin, ...) nor"
        " Fashion-MNIST (train-images-idx3-ubyte.gz, ...); on Debian `apt install"
        " dataset-fashion-mnist` brings the latter"
    )


def read_cifar10(folder: Path) -> Images:
    """CIFAR-10's binary version, cropped to the middle 28 x 28. Raises ConfigError."""
    train = [_cifar_batch(folder / name) for name in CIFAR_TRAIN]
    test_images, test_labels = _cifar_batch(folder / CIFAR_TEST[0])
    images = np.concatenate([batch[0] for batch in train])
    labels = np.concatenate([batch[1] for batch in train])
    return Images("CIFAR-10", images, labels, test_images, test_labels)


def read_fashion_mnist(folder: Path) -> Images:
    """Fashion-MNIST's idx files. Raises ConfigError."""
    parts = []
    for part in ("train", "t10k"):
        images = _idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3)
        labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
        if images.shape[1:] != (CROP, CROP):
            raise ConfigError(
                f"{folder}: {part} images must be {CROP} x {CROP}, got {images.shape[1:]}"
            )
        if len(images) != len(labels):
            raise ConfigError(f"{folder}: {len(images)} {part} images, but {len(labels)} labels")
        parts += [images[..., None], _checked_labels(labels, folder)]
    return Images("Fashion-MNIST (in place of CIFAR-10)", *parts)


def _cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        size = path.stat().st_size
        if not 0 < size <= MOST_IMAGES * CIFAR_RECORD or size % CIFAR_RECORD:
            raise ConfigError(
                f"{path}: its {size} bytes are not a whole number of records of {CIFAR_RECORD}"
            )
        records = np.fromfile(path, np.uint8).reshape(-1, CIFAR_RECORD)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    planes = records[:, 1:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    edge = (CIFAR_SIDE - CROP) // 2
    middle = planes[:, :, edge : edge + CROP, edge : edge + CROP].transpose(0, 2, 3, 1)
    return np.ascontiguousarray(middle), _checked_labels(records[:, 0], path)


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of bytes: two zeros, type 8, number of dimensions, their sizes, the values."""
    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * dimensions)
            shape = np.frombuffer(header[4:], ">u4").astype(np.int64)
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(shape) != dimensions:
                raise ConfigError(f"{path}: not an idx file of bytes in {dimensions} dimensions")
            count = int(np.prod(shape, dtype=object))
            if not 0 < count <= MOST_IMAGES * CROP**2:
                raise ConfigError(f"{path}: {tuple(shape.tolist())} values are too many or none")
            values = file.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if len(values) != count:
        found = f"{len(values)}" if len(values) < count else "more"
        raise ConfigError(f"{path}: its header says {count} bytes, it holds {found}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _checked_labels(labels: np.ndarray, path: Path) -> np.ndarray:
    if labels.max() > 9:
        raise ConfigError(f"{path}: labels must be 0 to 9, got {labels.max()}")
    return labels
