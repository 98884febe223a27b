"""Attackers and robust rules: what is sent, who sends it, and what it does to a run."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import NNM, GeometricMedian, TrimmedMean
from flcore.bench.attacks import AttackRow, attacks_markdown, run_attacks
from flcore.errors import InvalidInputError
from flcore.simulation import Settings, run
from flcore.simulation.attacks import (
    ALIE,
    ATTACKS,
    GaussianNoise,
    InnerProduct,
    LabelFlip,
    Seen,
    SignFlip,
    attack_from_text,
    check_attackers,
)
from flcore.simulation.datasets import load_dataset
from flcore.simulation.engine import Simulation
from flcore.simulation.rules import rule_from_text, rule_to_text

OWN = np.array([1.0, -2.0], np.float32)
HONEST = [np.array([0.0, 1.0], np.float32), np.array([2.0, 3.0], np.float32)]
PLAIN = {"codec": None, "feedback": None}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def test_what_attackers_send_by_hand(rng):
    np.testing.assert_array_equal(SignFlip(scale=3).update(Seen(OWN, HONEST, 1, rng)), [-3, 6])
    np.testing.assert_allclose(
        InnerProduct(scale=0.5).update(Seen(OWN, HONEST, 1, rng)), [-0.5, -1]
    )
    # mean (1, 2), deviation (1, 1)
    np.testing.assert_allclose(ALIE(z=1.5).update(Seen(OWN, HONEST, 1, rng)), [-0.5, 0.5])
    np.testing.assert_array_equal(LabelFlip().update(Seen(OWN, HONEST, 1, rng)), OWN)
    np.testing.assert_array_equal(LabelFlip().labels(np.array([0, 3, 9]), 10), [9, 6, 0])
    noise = GaussianNoise(scale=2).update(Seen(np.full(100_000, 3.0, np.float32), [], 1, rng))
    assert noise.dtype == np.float32
    assert np.std(noise) == pytest.approx(6, rel=0.02) and abs(np.mean(noise)) < 0.1


@pytest.mark.parametrize(
    ("participants", "attackers", "z"),
    [
        (50, 24, 1.426),  # two of 26 must be further out: 24/26
        (20, 4, 0.157),  # seven of 16: 9/16
    ],
)
def test_deviations_of_alie(participants, attackers, z):
    from scipy.stats import norm

    honest, further = participants - attackers, participants // 2 + 1 - attackers
    expected = norm.ppf((honest - further) / honest)
    assert ALIE().deviations(participants, attackers) == pytest.approx(expected)
    assert expected == pytest.approx(z, abs=1e-3)


def test_alone_among_attackers(rng):
    for attack in (ALIE(), InnerProduct()):
        assert np.isfinite(attack.update(Seen(OWN, [], 2, rng))).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_can_be_written_down(name):
    attack = attack_from_text(name)
    assert attack.to_text() == name
    assert ATTACKS[name].from_dict(attack.to_dict()) == attack
    assert attack_from_text("sign-flip:scale=2.5").to_text() == "sign-flip:scale=2.5"


def test_who_lies_is_fixed_by_the_seed(digits):
    settings = Settings(clients=20, participation=10, attack="sign-flip", attackers=0.2, **PLAIN)
    a, b = (Simulation("fedavg", "mlp", digits, settings).clients.attackers for _ in range(2))
    assert a == b and len(a) == 4
    other = Settings(clients=20, participation=10, attack="sign-flip", attackers=4, seed=1, **PLAIN)
    assert Simulation("fedavg", "mlp", digits, other).clients.attackers != a


def test_messages_of_attackers_and_of_no_one_else_are_replaced(digits):
    everyone = {"clients": 5, "participation": 5, **PLAIN}
    plain, attacked = (
        Simulation("fedavg", "mlp", digits, Settings(**everyone, **more))
        for more in ({}, {"attack": "sign-flip:scale=2", "attackers": 2})
    )
    sent = []
    for simulation in (plain, attacked):
        pack = simulation.uplink.pack

        def noted(client, update, round, pack=pack, here=sent):
            here.append((client, update.copy()))
            return pack(client, update, round)

        simulation.uplink.pack = noted
        simulation.step()
    for (client, honest), (same, update) in zip(sent[:5], sent[5:], strict=True):
        factor = -2 if client in attacked.clients.attackers else 1
        assert client == same
        np.testing.assert_array_equal(update, np.float32(factor) * honest)


def test_attackers_train_on_flipped_labels(digits):
    settings = Settings(clients=4, participation=4, attack="label-flip", attackers=1, **PLAIN)
    simulation = Simulation("fedavg", "mlp", digits, settings)
    (liar,) = simulation.clients.attackers
    for client, indices in enumerate(simulation.partition):
        seen = simulation.trainer.y.numpy()[indices]
        true = digits.y_train[indices]
        np.testing.assert_array_equal(seen, 9 - true if client == liar else true)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("trimmed-mean:f=2", TrimmedMean(f=2)),
        ("nnm:f=1 >> trimmed-mean:f=1", NNM(f=1) >> TrimmedMean(f=1)),
        ("geometric-median", GeometricMedian()),
    ],
)
def test_rules_can_be_written_down(text, rule):
    assert rule_from_text(text) == rule
    assert rule_from_text(rule_to_text(rule)) == rule


def test_a_flood_of_noise_reaches_the_mean_and_no_robust_rule(digits):
    many = {"rounds": 8, "clients": 20, "participation": 20, "alpha": None, **PLAIN}
    flood = {"attack": "gaussian:scale=200", "attackers": 4}
    accuracy = {
        rule: run("fedavg", "mlp", digits, Settings(aggregation=rule, **many, **flood)).accuracy
        for rule in (None, "trimmed-mean:f=4", "geometric-median")
    }
    assert accuracy[None] < 0.5
    assert min(accuracy["trimmed-mean:f=4"], accuracy["geometric-median"]) > 0.85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": "sign-flop"}, "attack: expected one of alie, .*got 'sign-flop'"),
        ({"attack": "sign-flip:size=1"}, "attack: sign-flip: expected settings like key=value"),
        ({"attack": "sign-flip:scale=-1"}, "attack: scale: expected a number above 0, got -1"),
        ({"attack": "sign-flip"}, "attackers: 0 attackers with attack="),
        ({"attackers": 3}, "attackers: 3 attackers with attack=None: give both, or neither"),
        (
            {"attack": "alie", "attackers": 50},
            "attackers: 50 of 50 clients: nobody would be honest",
        ),
        ({"attack": "alie", "attackers": -1}, "attackers: expected a count from 0"),
        ({"attack": "alie", "attackers": 1.5}, "attackers: expected a count from 0"),
        ({"aggregation": "medium"}, "aggregation: expected one of .*got 'medium'"),
        ({"aggregation": "krum:g=1"}, "aggregation: krum: expected settings like key=value"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(InvalidInputError, match=message):
        Settings(**PLAIN, **options)


def test_robust_rules_do_not_see_what_econtrol_sends():
    with pytest.raises(InvalidInputError, match=r"aggregation: .*EControl and EF21"):
        Settings(aggregation="median")
    assert check_attackers(None, 0, 10) == 0


def test_a_table_of_attacks_by_hand():
    row = AttackRow("alie", {"mean": (0.5, 0.25), "median": (1.0, 1.0)})
    text = attacks_markdown([row])
    assert text.splitlines()[0].endswith("| `mean` | `median` |")
    assert text.splitlines()[2] == "| `alie` | 37.5 (25.0) | 100.0 (100.0) |"


@pytest.mark.slow
def test_a_fifth_of_attackers_breaks_the_mean_and_no_robust_rule():
    """Two seeds; the margins are several deviations wide."""
    plain, flip, alie = run_attacks((0, 1), (None, "sign-flip:scale=5", "alie:z=20"))
    for row in (flip, alie):
        mean, *robust = row.accuracy.values()
        assert max(mean) < 0.5
        assert min(min(found) for found in robust) > 0.85
    assert min(min(found) for found in plain.accuracy.values()) > 0.9
