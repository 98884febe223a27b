"""Data sets with groups: digits in four domains, plays by speaker, and fewer examples."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.errors import InvalidInputError
from flcore.simulation.datasets import DOMAINS, Dataset, load_dataset
from flcore.simulation.dealing import deal
from flcore.simulation.groups import client_groups
from flcore.simulation.plays import load_plays

X, Y = np.arange(12, dtype=np.float32).reshape(6, 2), np.array([0, 1, 2, 0, 1, 2])
GROUPS = np.array([1, 0, 1, 0, 2, 2])


def small(**more) -> Dataset:
    return Dataset("small", X, Y, X[:3], Y[:3], **more)


# ---- groups ----


def test_fingerprint_of_data_without_groups_stays():
    # recorded before there were groups: runs in folders are recognised by it
    assert small().fingerprint == "29eb0da81bb5a616"


def test_fingerprint_tells_groups_apart():
    plain, grouped = small(), small(groups_train=GROUPS)
    other = small(groups_train=GROUPS[::-1])
    tested = small(groups_train=GROUPS, groups_test=GROUPS[:3])
    assert len({d.fingerprint for d in (plain, grouped, other, tested)}) == 4
    assert grouped.fingerprint == small(groups_train=GROUPS, group_names="abc").fingerprint


def test_groups_get_names_and_become_int64():
    data = small(groups_train=GROUPS.astype(np.uint8), groups_test=[0, 4, 0])
    assert data.groups_train.dtype == data.groups_test.dtype == np.int64
    assert data.group_names == ("0", "1", "2", "3", "4")
    assert small().groups_train is None and small().group_names == ()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"groups_train": GROUPS[:5]}, "groups_train: expected as many as y_train has .* 6, got 5"),
        ({"groups_train": GROUPS - 1}, "groups_train: expected a 1-D array of group numbers"),
        ({"groups_train": GROUPS * 0.5}, "groups_train: expected a 1-D array of group numbers"),
        ({"groups_test": GROUPS[:3]}, "there are groups_test, but no groups_train"),
        ({"groups_train": GROUPS, "group_names": "ab"}, "2 names for groups that go up to 2"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, message):
    with pytest.raises(InvalidInputError, match=message):
        small(**groups)


def test_groups_come_with_an_npz_file(tmp_path):
    file = tmp_path / "data.npz"
    arrays = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y}
    np.savez(file, **arrays)
    plain = load_dataset(file)
    np.savez(file, **arrays, groups_train=GROUPS, groups_test=Y, group_names=["a", "b", "c"])
    data = load_dataset(file)
    assert plain.groups_train is None and plain.fingerprint != data.fingerprint
    assert np.array_equal(data.groups_train, GROUPS) and np.array_equal(data.groups_test, Y)
    assert data.group_names == ("a", "b", "c")


# ---- fewer examples ----


def test_limited_keeps_examples_with_their_labels_groups_and_order():
    data = small(groups_train=GROUPS, groups_test=GROUPS[:3], classes="abcd")
    less = data.limited(4)
    rows = (less.x_train[:, 0] / 2).astype(int)
    assert len(rows) == 4 and (np.diff(rows) > 0).all()
    assert np.array_equal(less.x_train, X[rows])
    assert np.array_equal(less.y_train, Y[rows])
    assert np.array_equal(less.groups_train, GROUPS[rows])
    assert np.array_equal(less.x_test, data.x_test)
    assert less.classes == data.classes and less.group_names == data.group_names
    assert less.fingerprint == data.limited(4).fingerprint != data.fingerprint


def test_limited_may_shorten_the_test_and_refuses_nothing_left():
    data = small()
    assert len(data.limited(6, 2).y_test) == 2 and len(data.limited(6, 2).y_train) == 6
    assert data.limited(100, 100) is data
    with pytest.raises(InvalidInputError, match="train: expected at least 1 example, got 0"):
        data.limited(0)
    with pytest.raises(InvalidInputError, match="test: expected at least 1 example, got 0"):
        data.limited(1, 0)


# ---- digits in domains ----


def test_each_domain_shows_the_digits_in_its_own_way():
    pytest.importorskip("sklearn")
    plain, data = load_dataset("digits"), load_dataset("digits-domains")
    assert data.group_names == ("x", "1 - x", "2x - 0.5", "0.5x + 0.3")
    assert np.bincount(data.groups_train).tolist() == [360, 359, 359, 359]
    assert np.bincount(data.groups_test).tolist() == [360] * 4
    assert np.array_equal(data.y_train, plain.y_train)
    for domain, (scale, shift) in enumerate(DOMAINS.values()):
        own = data.groups_train == domain
        expected = scale * plain.x_train[own].astype(np.float64) + shift
        np.testing.assert_allclose(data.x_train[own], expected, atol=1e-6)
        own = data.groups_test == domain
        expected = scale * plain.x_test.astype(np.float64) + shift
        np.testing.assert_allclose(data.x_test[own], expected, atol=1e-6)
        assert np.array_equal(data.y_test[own], plain.y_test)
        # dealt independently of the class: every class is about a tenth of every domain
        share = np.bincount(data.y_train[data.groups_train == domain]) / 359
        assert share.min() > 0.05 and share.max() < 0.16


def test_one_client_for_each_domain():
    pytest.importorskip("sklearn")
    data = load_dataset("digits-domains")
    parts = deal(data, 4, "domain", np.random.default_rng(0))
    assert client_groups(data.groups_train, parts).tolist() == [0, 1, 2, 3]


# ---- plays ----

PLAY = """A:
abcdefghij

B:
zz

A:

Exeunt all

A:
klmnopqrst

C: aside
is no name

D:
0123456789
0123456789
"""


@pytest.fixture
def play(tmp_path):
    file = tmp_path / "play.txt"
    file.write_text(PLAY)
    return file


def text_of(data: Dataset, part: str) -> list[str]:
    rows = np.column_stack([getattr(data, f"x_{part}"), getattr(data, f"y_{part}")]).astype(int)
    return ["".join(data.classes[i] for i in row) for row in rows]


def test_play_by_hand(play):
    # A and D say 21 characters each: 17 train, 4 test; B too little, and C is no heading
    data = load_plays(play, window=3)
    assert data.group_names == ("A", "D")
    assert data.classes == tuple(sorted(set(PLAY)))
    train, test = text_of(data, "train"), text_of(data, "test")
    said = {"A": "abcdefghij\nklmnopqrst", "D": "0123456789\n0123456789"}
    assert train == [said[s][i : i + 4] for s in "AD" for i in range(14)]
    assert test == ["qrst", "6789"]
    assert data.groups_train.tolist() == [0] * 14 + [1] * 14
    assert data.groups_test.tolist() == [0, 1]
    assert data.x_train.dtype == np.float32 and data.example_shape == (3,)


def test_fewer_speakers_and_examples(play):
    data = load_plays(play, speakers=1, examples=4, window=2)
    assert data.group_names == ("A",)
    assert text_of(data, "train") == ["abc", "def", "hij", "klm"]  # of 15 starts: 0, 3, 7, 11
    assert text_of(data, "test") == ["qrs"]
    assert data.classes == load_plays(play, window=2).classes


def test_speakers_with_most_text_come_first(tmp_path):
    file = tmp_path / "play.txt"
    said = {"P": "ab " * 70, "Q": "ab " * 90, "R": "ab " * 80}
    file.write_text("\n\n".join(f"{name}:\n{text}" for name, text in said.items()))
    data = load_dataset(file)
    assert data.group_names == ("Q", "R", "P") and data.example_shape == (32,)
    parts = deal(data, 3, "natural", np.random.default_rng(0))
    assert client_groups(data.groups_train, parts).tolist() == [0, 1, 2]
    assert load_dataset(file).fingerprint == data.fingerprint


def test_training_never_sees_the_test(tmp_path):
    rng = np.random.default_rng(0)
    text = "".join(chr(c) for c in 0x4E00 + rng.permutation(2000))  # every character once
    file = tmp_path / "play.txt"
    file.write_text(f"A:\n{text}", encoding="utf-8")
    data = load_plays(file, examples=10_000)
    train = {c for row in text_of(data, "train") for c in row}
    test = {c for row in text_of(data, "test") for c in row}
    assert len(train) == 1600 and len(test) == 400 and not train & test


def test_files_that_are_no_plays_are_refused(tmp_path, play):
    file = tmp_path / "file.txt"
    with pytest.raises(InvalidInputError, match="there is no file"):
        load_dataset(file)
    file.write_text("Just a line.\n\nAnd another.")
    with pytest.raises(InvalidInputError, match=r"33 characters in the last 20% .* found 0 speak"):
        load_dataset(file)
    file.write_bytes(b"A:\n\xff\xfe")
    with pytest.raises(InvalidInputError, match="is not UTF-8 text"):
        load_dataset(file)
    for name in ("speakers", "examples", "window"):
        with pytest.raises(InvalidInputError, match=f"{name}: expected a whole number from 1"):
            load_plays(play, **{name: 0})
