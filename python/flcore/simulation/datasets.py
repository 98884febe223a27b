"""Data sets for federated training: digits, `.npz` files, plays, Hugging Face ids.

`load_dataset` turns any of them into a `Dataset` of float32 inputs and integer labels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
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
GROUPS = ("groups_train", "groups_test")

DOMAINS = {"x": (1.0, 0.0), "1 - x": (-1.0, 1.0), "2x - 0.5": (2.0, -0.5), "0.5x + 0.3": (0.5, 0.3)}
"""Scale and shift of the inputs x in each domain of "digits-domains"."""


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
    groups_train, groups_test : (n,) int64, optional
        Domain or natural client (a speaker, a writer) of each example, from 0, for partitions
        and evaluations that go by it.
    group_names : tuple of str
        Name of each group; generated where the source has none.

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
    groups_train: np.ndarray | None = field(default=None, repr=False)
    groups_test: np.ndarray | None = field(default=None, repr=False)
    group_names: tuple[str, ...] = field(default=(), repr=False)

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
        labels = [self.y_train, self.y_test]
        object.__setattr__(self, "classes", _names("classes", self.classes, "labels", labels))
        self._check_groups()

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.x_train.shape[1:]

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any value of the arrays, groups included."""
        digest = hashlib.sha256()
        for name in (*ARRAYS, *GROUPS):
            array = getattr(self, name)
            if array is None:
                continue
            digest.update(str((name, array.shape)).encode())
            digest.update(array.data)
        return digest.hexdigest()[:16]

    def limited(self, train: int, test: int | None = None) -> Dataset:
        """Give at most so many training and test examples, always the same random ones.

        Their order stays, and so do the names of classes and groups, even of those left without
        an example.

        Parameters
        ----------
        train : int
            Training examples.
        test : int, optional
            Test examples; None: all.

        Raises
        ------
        InvalidInputError
            If a number is below 1.
        """
        changes: dict[str, Any] = {}
        for part, count in (("train", train), ("test", test)):
            total = len(getattr(self, f"y_{part}"))
            if count is None:
                continue
            if count < 1:
                raise InvalidInputError(f"{part}: expected at least 1 example, got {count}")
            if count >= total:
                continue
            keep = np.sort(np.random.RandomState(0).permutation(total)[:count])
            for name in (f"x_{part}", f"y_{part}", f"groups_{part}"):
                array = getattr(self, name)
                changes[name] = None if array is None else array[keep]
        return replace(self, **changes) if changes else self

    def _check_groups(self) -> None:
        given = []
        for part in ("train", "test"):
            if (groups := getattr(self, f"groups_{part}")) is None:
                continue
            groups = _labels(f"groups_{part}", groups)
            if len(groups) != len(getattr(self, f"y_{part}")):
                raise InvalidInputError(
                    f"groups_{part}: expected as many as y_{part} has labels, "
                    f"{len(getattr(self, f'y_{part}'))}, got {len(groups)}"
                )
            object.__setattr__(self, f"groups_{part}", groups)
            given.append(groups)
        if self.groups_test is not None and self.groups_train is None:
            raise InvalidInputError("groups_test: there are groups_test, but no groups_train")
        if given:
            names = _names("group_names", self.group_names, "groups", given)
            object.__setattr__(self, "group_names", names)


def load_dataset(source: str | Path) -> Dataset:
    """Load a data set by name, by path or by Hugging Face id.

    Parameters
    ----------
    source : str or path
        - ``"digits"``: the 1,797 handwritten 8x8 digits that come with scikit-learn; the first
          1,437 of a fixed shuffle train, the other 360 test.
        - ``"digits-domains"``: the same in four domains with inputs x, 1 - x, 2x - 1/2 and
          x/2 + 3/10.  A training example lies in one domain, dealt in turn; the test holds every
          test example in every domain, so that domains are compared on the same digits.
        - a path that ends in ``.npz``: arrays `x_train`, `y_train`, `x_test`, `y_test` and, if
          wanted, `classes`, `groups_train`, `groups_test` and `group_names`.  Images lie
          (n, height, width) or (n, height, width, channels); uint8 images are scaled to zero mean
          and unit deviation of each channel, as they are in the training part; everything else is
          taken as it is.
        - a path that ends in ``.txt``: a play whose speakers are natural clients of a character
          model, as `flcore.simulation.plays.load_plays` reads it.
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
    if text == "digits-domains":
        return _digits_domains()
    if text.endswith(".txt"):
        from flcore.simulation.plays import load_plays

        return load_plays(Path(source))
    if text.endswith(".npz"):
        return _npz(Path(source))
    if text in HUGGING_FACE_NAMES or text.count("/") == 1:
        return _hugging_face(HUGGING_FACE_NAMES.get(text, text))
    raise InvalidInputError(
        f'dataset: there is no {text!r}; give "digits", "digits-domains", "cifar10", a path '
        "that ends in .npz or .txt, or a Hugging Face id such as uoft-cs/cifar10"
    )


def _digits() -> Dataset:
    x, y = require("sklearn.datasets", extra="train").load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(y))
    x, y = x[order] / 16.0, y[order]
    train = slice(0, 1437)
    x = x - x[train].mean(axis=0)
    x = x.reshape(-1, 1, 8, 8)
    return Dataset("digits", x[train], y[train], x[1437:], y[1437:])


def _digits_domains() -> Dataset:
    plain = _digits()
    scales, shifts = np.array(list(DOMAINS.values()), dtype=np.float32).T
    train = np.arange(len(plain.y_train)) % len(DOMAINS)  # the digits are shuffled: an IID deal
    test = np.repeat(np.arange(len(DOMAINS)), len(plain.y_test))

    def shown(x: np.ndarray, domain: np.ndarray) -> np.ndarray:
        return scales[domain].reshape(-1, 1, 1, 1) * x + shifts[domain].reshape(-1, 1, 1, 1)

    return Dataset(
        "digits-domains",
        shown(plain.x_train, train),
        plain.y_train,
        shown(np.tile(plain.x_test, (len(DOMAINS), 1, 1, 1)), test),
        np.tile(plain.y_test, len(DOMAINS)),
        plain.classes,
        groups_train=train,
        groups_test=test,
        group_names=tuple(DOMAINS),
    )


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
            extra: dict[str, Any] = {name: archive[name] for name in GROUPS if name in archive}
            for name in ("classes", "group_names"):
                if name in archive:
                    extra[name] = tuple(archive[name].tolist())
    except (ValueError, OSError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"dataset: {path} is not a readable .npz file: {error}") from error
    x_train, x_test = _images(arrays["x_train"], arrays["x_test"])
    return Dataset(
        str(path.resolve()), x_train, arrays["y_train"], x_test, arrays["y_test"], **extra
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
    kind = "class" if name.startswith("y_") else "group"
    y = np.asarray(y)
    if y.ndim != 1 or y.dtype.kind not in "iub" or (y.size and y.min() < 0):
        raise InvalidInputError(
            f"{name}: expected a 1-D array of {kind} numbers from 0, got {y.ndim}-D {y.dtype}"
        )
    return y.astype(np.int64)


def _names(name: str, given: Any, kind: str, numbers: list[np.ndarray]) -> tuple[str, ...]:
    """Check that there is a name for every number, or make names up."""
    count = max(int(n.max()) for n in numbers) + 1
    names = tuple(str(entry) for entry in given) or tuple(str(entry) for entry in range(count))
    if len(names) < count:
        raise InvalidInputError(f"{name}: {len(names)} names for {kind} that go up to {count - 1}")
    return names
