"""Partitions by domain and natural client, all of them by name, and the table of the outcome."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.errors import InvalidInputError
from flcore.simulation.datasets import Dataset
from flcore.simulation.dealing import PARTITIONS, Partition, deal, partition_from_text
from flcore.simulation.groups import client_groups, domain_partition, natural_partition
from flcore.simulation.partition import check_partition, split
from flcore.simulation.partition_table import describe_partition

LABELS = np.random.default_rng(0).integers(0, 10, 1437)

# ---- domains and natural clients ----

DOMAINS = np.repeat([7, 2, 4], [10, 11, 12])  # ids need not start at 0 nor be in order


@pytest.mark.parametrize("clients", [3, 4, 6, 30])
def test_every_client_has_one_domain_and_shares_it_evenly(clients):
    parts = domain_partition(DOMAINS, clients, np.random.default_rng(0))
    assert sorted(np.concatenate(parts).tolist()) == list(range(33))
    assert client_groups(DOMAINS, parts).tolist() == [(2, 4, 7)[k % 3] for k in range(clients)]
    for domain in range(3):
        sizes = [len(p) for p in parts[domain::3]]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0


def test_impossible_domains_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(InvalidInputError, match="one client for each of the 3 domains, got 2"):
        domain_partition(DOMAINS, 2, rng)
    with pytest.raises(InvalidInputError, match="11 clients share the 10 examples of domain 7"):
        domain_partition(DOMAINS, 33, rng)
    with pytest.raises(InvalidInputError, match="groups: expected a 1-D array of integers"):
        domain_partition(np.zeros(4), 2, rng)


def test_natural_clients_keep_their_own():
    groups = np.array([3, 1, 3, 9, 1, 3])
    parts = natural_partition(groups, 3, np.random.default_rng(0))
    assert [p.tolist() for p in parts] == [[1, 4], [0, 2, 5], [3]]
    parts = natural_partition(groups, 2, np.random.default_rng(0), least=2)
    assert [p.tolist() for p in parts] == [[1, 4], [0, 2, 5]]
    chosen = {
        tuple(client_groups(groups, natural_partition(groups, 2, np.random.default_rng(s))))
        for s in range(20)
    }
    assert chosen == {(1, 3), (1, 9), (3, 9)}


def test_impossible_natural_clients_are_refused():
    groups, rng = np.array([3, 1, 3, 9, 1, 3]), np.random.default_rng(0)
    with pytest.raises(
        InvalidInputError, match=r"3 clients, but of the 3 natural clients .* 2 have"
    ):
        natural_partition(groups, 3, rng, least=2)
    with pytest.raises(InvalidInputError, match="clients: expected at least 1, got 0"):
        natural_partition(groups, 0, rng)


def test_a_client_of_several_groups_has_none():
    assert client_groups(np.array([0, 0, 5]), [np.array([0, 1]), np.array([1, 2])]).tolist() == [
        0,
        -1,
    ]


# ---- by name ----

X = np.zeros((1437, 1), np.float32)
DATA = Dataset("made up", X, LABELS, X, LABELS, groups_train=np.arange(1437) % 4)
TEXTS = {
    "iid": Partition(),
    "dirichlet:0.1": Partition("dirichlet", 0.1),
    "dirichlet:1e-05": Partition("dirichlet", 1e-5),
    "dirichlet-sizes:0.3": Partition("dirichlet-sizes", 0.3),
    "dirichlet-sizes:0.3:10": Partition("dirichlet-sizes", 0.3, least=10),
    "pathological:2": Partition("pathological", 2),
    "domain": Partition("domain"),
    "natural": Partition("natural"),
    "natural:5": Partition("natural", least=5),
    "long-tail:50,dirichlet:0.1": Partition("dirichlet", 0.1, imbalance=50),
    "long-tail:50,iid": Partition(imbalance=50),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_back(text):
    assert partition_from_text(text) == TEXTS[text]
    assert TEXTS[text].to_text() == text


def test_every_partition_named_in_the_help_can_be_read_and_dealt():
    numbers = {"ALPHA": "0.3", "CLASSES": "2", "IMBALANCE": "5", "LEAST": "3", "...": "iid"}
    for form in PARTITIONS:
        text = form.replace("[", "").replace("]", "")
        for word, number in numbers.items():
            text = text.replace(word, number)
        parts = deal(DATA, 4, text, np.random.default_rng(0))
        checked = check_partition(parts, 1437)
        assert len(checked) == 4
        assert len(np.unique(np.concatenate(checked))) == sum(map(len, checked)), text


def test_other_spellings():
    assert partition_from_text("long-tail:50").to_text() == "long-tail:50,iid"
    assert partition_from_text(" long-tail:2.5 , pathological:3 ") == Partition(
        "pathological", 3, imbalance=2.5
    )
    assert Partition("dirichlet", 1 / 3).to_text() == f"dirichlet:{1 / 3!r}"
    assert Partition.from_alpha(None) == Partition("iid")
    assert Partition.from_alpha(0.05).to_text() == "dirichlet:0.05"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("normal", "there is no 'normal'; choose one of: iid, dirichlet:ALPHA"),
        ("", "there is no ''"),
        ("dirichlet", "dirichlet:ALPHA: expected a number above 0, got None"),
        ("dirichlet:0", "expected a number above 0, got 0.0"),
        ("dirichlet:nan", "expected a number above 0, got nan"),
        ("dirichlet:x", "expected a number for 'x' in 'dirichlet:x'"),
        ("dirichlet:1:2", "dirichlet takes fewer numbers"),
        ("iid:3", "iid takes fewer numbers"),
        ("pathological:1.5", "expected a whole number for '1.5'"),
        ("pathological:0", "pathological:CLASSES: expected a whole number from 1, got 0"),
        ("pathological", "pathological:CLASSES: expected a whole number from 1, got None"),
        ("natural:0", "natural: LEAST: expected a whole number from 1, got 0"),
        ("dirichlet:1,iid", "only long-tail:IMBALANCE may stand before a comma"),
        ("long-tail,iid", "expected long-tail:IMBALANCE, then one other"),
        ("long-tail:5,iid,iid", "expected long-tail:IMBALANCE, then one other"),
        ("long-tail:5,long-tail:5", "one long tail at most"),
        ("long-tail:0.5", "long-tail:IMBALANCE: expected a number from 1, got 0.5"),
    ],
)
def test_texts_that_are_none(text, message):
    with pytest.raises(InvalidInputError, match=message):
        partition_from_text(text)


def test_numbers_that_a_partition_does_not_take():
    with pytest.raises(InvalidInputError, match="domain takes no number, got 3"):
        Partition("domain", 3)
    with pytest.raises(InvalidInputError, match="iid takes no least number of examples, got 3"):
        Partition("iid", least=3)


@pytest.mark.parametrize("alpha", [None, 0.05])
def test_dealing_by_name_draws_as_the_split_of_a_run(alpha):
    rngs = [np.random.default_rng(4) for _ in range(2)]
    parts = deal(DATA, 50, Partition.from_alpha(alpha), rngs[0])
    assert all(map(np.array_equal, parts, split(LABELS, 50, alpha, rngs[1])))
    assert rngs[0].random() == rngs[1].random()


@pytest.mark.parametrize(
    "text", ["iid", "dirichlet-sizes:0.3", "domain", "natural", "long-tail:10,pathological:2"]
)
def test_dealing_some_of_the_examples(text):
    examples = np.arange(3, 1437, 2)
    parts = deal(DATA, 2, text, np.random.default_rng(0), examples=examples)
    assert np.isin(np.concatenate(parts), examples).all()
    if text in ("domain", "natural"):  # odd examples are of domains 1 and 3
        assert client_groups(DATA.groups_train, parts).tolist() == [1, 3]


def test_a_long_tail_comes_before_the_deal():
    parts = deal(DATA, 10, "long-tail:20,dirichlet-sizes:1", np.random.default_rng(0))
    counts = describe_partition(LABELS, parts).counts.sum(axis=0)
    assert counts[0] > 100 and 18 < counts[0] / counts[-1] < 22
    assert np.array_equal(counts, np.sort(counts)[::-1])


def test_groups_are_needed_where_the_partition_goes_by_them():
    plain = Dataset("plain", X, LABELS, X, LABELS)
    for text in ("domain", "natural"):
        with pytest.raises(InvalidInputError, match=f"{text} needs the group .* plain has none"):
            deal(plain, 4, text, np.random.default_rng(0))


# ---- the table ----


def test_table_by_hand():
    labels = np.array([0, 0, 1, 2, 2, 2])
    table = describe_partition(
        labels, [np.array([0, 1]), np.array([2, 3, 4, 5])], ("a|b", " ", "\n", "rest")
    )
    assert table.counts.tolist() == [[2, 0, 0, 0], [0, 1, 3, 0]]
    assert table.sizes.tolist() == [2, 4] and table.classes_per_client.tolist() == [1, 2]
    # whole (1/3, 1/6, 1/2): distances 2/3 and 1/3
    assert table.skew == pytest.approx(0.5)
    assert table.to_markdown(1).splitlines() == [
        "| client | a\\|b | ' ' | '\\n' | rest | all |",
        "|---:|---:|---:|---:|---:|---:|",
        "| 0 | 2 | 0 | 0 | 0 | 2 |",
        "| all | 2 | 1 | 3 | 0 | 6 |",
        "",
        "The first 1 of 2 clients.",
    ]


def test_table_refuses_missing_names_and_clients_without_data():
    with pytest.raises(InvalidInputError, match="2 names for labels that go up to 2"):
        describe_partition(np.arange(3), [np.arange(3)], ("a", "b"))
    with pytest.raises(InvalidInputError, match="client 1 has no data"):
        describe_partition(np.arange(3), [np.arange(3), np.array([], int)])
