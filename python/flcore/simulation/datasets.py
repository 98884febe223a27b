"""Data sets for federated training: scikit-learn's digits, `.npz` files, Hugging Face ids.

`load_dataset` turns any of them into a `Dataset` of float32 inputs and integer labels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flcore._extras import require
from flcore.errors import InvalidInputError, MissingDependencyError

__all__ = ["Dataset", "load_dataset"]

HUGGING_FACE_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
"""Short names that stand for a Hugging Face id."""

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Dataset:
    """Inputs and labels for training and for the test of the global model.

    Parameters
    ----------
    name : str
        Where it comes from, as `load_dataset` takes it.
    x_train, x_test : (n, ...) float32
        One example a row.  Images are (n, channels, height, width).
    y_train, y_test : (n,) int64
        Class of each example, from 0.
    classes : tuple of str
        Name of each class; generated where the source has none.

    Raises
    ------
    InvalidInputError
        If the arrays do not fit together, or inputs are not finite.
    """

    name: str
    x_train: np.ndarray = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x = np.ascontiguousarray(getattr(self, f"x_{part}"), dtype=np.float32)
            y = _labels(f"y_{part}", getattr(self, f"y_{part}"))
            if len(x) == 0 or len(x) != len(y):
                raise InvalidInputError(
                    f"x_{part}: expected as many examples as y_{part} has labels, and at least "
                    f"one; got {len(x)} and {len(y)}"
                )
            if not np.isfinite(x).all():
                raise InvalidInputError(f"x_{part}: contains NaN or infinity")
            object.__setattr__(self, f"x_{part}", x)
            object.__setattr__(self, f"y_{part}", y)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise InvalidInputError(
                f"x_test: expected examples of shape {self.x_train.shape[1:]} as in x_train, "
                f"got {self.x_test.shape[1:]}"
            )
        labels = int(max(self.y_train.max(), self.y_test.max())) + 1
        names = self.classes or tuple(str(c) for c in range(labels))
        if len(names) < labels:
            raise InvalidInputError(
                f"classes: {len(names)} names for labels that go up to {labels - 1}"
            )
        object.__setattr__(self, "classes", tuple(str(c) for c in names))

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.x_train.shape[1:]

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any value of the four arrays."""
        digest = hashlib.sha256()
        for name in ARRAYS:
            array = getattr(self, name)
            digest.update(str((name, array.shape)).encode())
            digest.update(array.data)
        return digest.hexdigest()[:16]


def load_dataset(source: str | Path) -> Dataset:
    """Load a data set by name, by path or by Hugging Face id.

    Parameters
    ----------
    source : str or path
        - ``"digits"``: the 1,797 handwritten 8x8 digits that come with scikit-learn; the first
          1,437 of a fixed shuffle train, the other 360 test.
        - a path that ends in ``.npz``: arrays `x_train`, `y_train`, `x_test`, `y_test` and, if
          wanted, `classes`.  Images lie (n, height, width) or (n, height, width, channels);
          uint8 images are scaled to zero mean and unit deviation of each channel, as they are in
          the training part; everything else is taken as it is.
        - ``"owner/name"``, ``"cifar10"``, ``"cifar100"``: a Hugging Face id with an image and a
          label column and the splits `train` and `test`; needs the package `datasets`.

    Raises
    ------
    InvalidInputError
        If there is no such data set, or what it holds does not fit together.
    MissingDependencyError
        If scikit-learn or `datasets` is needed and not installed.
    """
    text = str(source)
    if text == "digits":
        return _digits()
    if text.endswith(".npz"):
        return _npz(Path(source))
    if text in HUGGING_FACE_NAMES or text.count("/") == 1:
        return _hugging_face(HUGGING_FACE_NAMES.get(text, text))
    raise InvalidInputError(
        f'dataset: there is no {text!r}; give "digits", "cifar10", a path that ends in .npz, or a '
        "Hugging Face id such as uoft-cs/cifar10"
    )


def _digits() -> Dataset:
    x, y = require("sklearn.datasets", extra="train").load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(y))
    x, y = x[order] / 16.0, y[order]
    train = slice(0, 1437)
    x = x - x[train].mean(axis=0)
    x = x.reshape(-1, 1, 8, 8)
    return Dataset("digits", x[train], y[train], x[1437:], y[1437:])


def _npz(path: Path) -> Dataset:
    if not path.is_file():
        raise InvalidInputError(f"dataset: there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in ARRAYS if name not in archive]
            if missing:
                raise InvalidInputError(
                    f"dataset: {path} has no {', '.join(missing)}; it has "
                    f"{', '.join(sorted(archive)) or 'no arrays'}"
                )
            arrays = {name: archive[name] for name in ARRAYS}
            classes = tuple(archive["classes"].tolist()) if "classes" in archive else ()
    except (ValueError, OSError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"dataset: {path} is not a readable .npz file: {error}") from error
    x_train, x_test = _images(arrays["x_train"], arrays["x_test"])
    return Dataset(
        str(path.resolve()), x_train, arrays["y_train"], x_test, arrays["y_test"], classes
    )


def _hugging_face(identifier: str) -> Dataset:
    try:
        from datasets import load_dataset as download
    except ModuleNotFoundError:
        raise MissingDependencyError(
            f"dataset: {identifier} comes through the package datasets, which is not installed: "
            "pip install datasets; or give the path of an .npz file"
        ) from None
    parts = download(identifier)
    for split in ("train", "test"):
        if split not in parts:
            raise InvalidInputError(
                f"dataset: {identifier} has no split {split!r}; it has {', '.join(parts)}"
            )
    features = parts["train"].features
    images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    labels = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    if not images or not labels:
        raise InvalidInputError(
            f"dataset: {identifier} needs an image column and a class label column; its columns "
            f"are {', '.join(features)}"
        )
    image, label = images[0], labels[-1]  # the last label is the finest: CIFAR-100 has two

    def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
        rows = parts[split]
        return np.stack([np.asarray(row) for row in rows[image]]), np.asarray(rows[label])

    (x_train, y_train), (x_test, y_test) = arrays("train"), arrays("test")
    x_train, x_test = _images(x_train, x_test)
    return Dataset(identifier, x_train, y_train, x_test, y_test, tuple(features[label].names or ()))


def _images(x_train: np.ndarray, x_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bring images to (n, channels, height, width), and bytes to zero mean and unit deviation."""
    from_bytes = x_train.dtype == np.uint8
    parts = []
    for x in (x_train, x_test):
        if x.dtype.kind not in "fiub":
            raise InvalidInputError(f"dataset: inputs must be numbers, got {x.dtype}")
        x = x.astype(np.float32)
        if x.ndim == 3:
            x = x[..., np.newaxis]
        parts.append(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)
    if from_bytes and parts[0].ndim == 4:
        mean = parts[0].mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
        deviation = parts[0].std(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
        parts = [(x - mean) / np.maximum(deviation, 1e-6) for x in parts]
    return parts[0], parts[1]


def _labels(name: str, y: Any) -> np.ndarray:
    y = np.asarray(y)
    if y.ndim != 1 or y.dtype.kind not in "iub" or (y.size and y.min() < 0):
        raise InvalidInputError(
            f"{name}: expected a 1-D array of class numbers from 0, got {y.ndim}-D {y.dtype}"
        )
    return y.astype(np.int64)
