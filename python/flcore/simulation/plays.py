"""Plays as federated text: each speaker is a natural client of a model of the next character."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from flcore.errors import InvalidInputError
from flcore.simulation.datasets import Dataset

__all__ = ["load_plays"]

TEST_SHARE = 0.2
"""Last part of each speaker's text, which is for the test."""


def load_plays(
    path: str | Path, *, speakers: int = 100, examples: int = 500, window: int = 32
) -> Dataset:
    r"""Load plays with speaker names from a text file.

    Speeches are separated by empty lines; the first line of each is the speaker's name and a
    colon.  What a speaker says, in the order of the file, is one text, of which the first 80 %
    train and the rest is for the test.  An example is `window` characters and the one that
    follows; no example of the training reaches into the test.

    Parameters
    ----------
    path : str or path
        A UTF-8 file.
    speakers : int
        At most so many, those with the most text.
    examples : int
        Training examples of a speaker, at most, at even distances in the text; for the test, a
        quarter of that.
    window : int
        Characters that the model sees.

    Returns
    -------
    Dataset
        `x_train` : (n, window) float32, numbers of characters; `y_train` : (n,) int64, that of
        the next one; `classes`: all characters of the file, sorted; `groups_train` : (n,) int64,
        number of the speaker, from the one with the most text; `group_names`: the speakers.

    Raises
    ------
    InvalidInputError
        If there is no such file, or nobody in it says enough.

    Notes
    -----
    After the Shakespeare data of McMahan et al., AISTATS 2017, arXiv 1602.05629, and of LEAF
    (Caldas et al., arXiv 1812.01097), where a client is a role, too.  Roles of the same name in
    several plays of one file are one client here.
    """
    for name, value in (("speakers", speakers), ("examples", examples), ("window", window)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInputError(f"{name}: expected a whole number from 1, got {value!r}")
    path = Path(path)
    if not path.is_file():
        raise InvalidInputError(f"dataset: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"dataset: {path} is not UTF-8 text: {error}") from error
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    said = _speeches(text)
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    names: list[str] = []
    for speaker in sorted(said, key=lambda name: (-len(said[name]), name)):
        ids = np.array([number[character] for character in said[speaker]], dtype=np.int64)
        cut = round(len(ids) * (1 - TEST_SHARE))
        train = _windows(ids[:cut], window, examples)
        test = _windows(ids[cut:], window, max(examples // 4, 1))
        if len(names) == speakers or len(train) == 0 or len(test) == 0:
            break  # those that follow say no more than this one
        parts["train"].append(train)
        parts["test"].append(test)
        names.append(speaker)
    if not names:
        raise InvalidInputError(
            f"dataset: {path}: expected speeches between empty lines, each below a line with the "
            f"speaker's name and a colon, and a speaker with at least {window + 1} characters in "
            f"the last {TEST_SHARE:.0%} of what it says; found {len(said)} speakers"
        )
    rows = {part: np.concatenate(arrays) for part, arrays in parts.items()}
    groups = {
        part: np.repeat(np.arange(len(names)), [len(array) for array in arrays])
        for part, arrays in parts.items()
    }
    return Dataset(
        str(path.resolve()),
        rows["train"][:, :-1],
        rows["train"][:, -1],
        rows["test"][:, :-1],
        rows["test"][:, -1],
        tuple(alphabet),
        groups_train=groups["train"],
        groups_test=groups["test"],
        group_names=tuple(names),
    )


def _speeches(text: str) -> dict[str, str]:
    """Give all that each speaker says; blocks that are no speech are left out."""
    said: dict[str, list[str]] = defaultdict(list)
    for block in text.split("\n\n"):
        heading, _, speech = block.strip("\n").partition("\n")
        if heading.endswith(":") and speech:
            said[heading[:-1].strip()].append(speech)
    return {speaker: "\n".join(speeches) for speaker, speeches in said.items()}


def _windows(ids: np.ndarray, window: int, most: int) -> np.ndarray:
    """Give at most so many rows of ``window + 1`` successive characters, at even distances."""
    total = len(ids) - window
    if total < 1:
        return np.empty((0, window + 1), np.int64)
    starts = np.arange(total)
    if total > most:
        starts = np.arange(most) * total // most
    return np.lib.stride_tricks.sliding_window_view(ids, window + 1)[starts]
