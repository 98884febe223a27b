"""The comparison with Flower's simulation, as far as it runs without Flower."""

from __future__ import annotations

import importlib.util

import pytest

from flcore.bench import flower_peer
from flcore.bench.flower_peer import Problem, Rate
from flcore.errors import InvalidInputError, MissingDependencyError
from support import HAS_TORCH


def test_the_first_round_and_what_is_before_it_do_not_count():
    ends = [(15.0, 4.0), (15.5, 4.5), (16.0, 4.6), (17.0, 5.0)]
    rate = Rate.between("x", 10.0, ends, 0.5)
    assert rate == Rate("x", rounds_per_second=1.5, start_s=5.0, accuracy=0.5, busy=0.5)


def test_one_round_is_too_few():
    with pytest.raises(InvalidInputError, match="rounds: expected at least 2"):
        Problem(rounds=1)


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_our_side_runs_the_problem():
    rate = flower_peer.flcore_rate(Problem(rounds=3, local_epochs=1))
    assert rate.rounds_per_second > 0 and 0.1 < rate.accuracy < 1


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="Flower is here")
def test_without_flower_it_says_what_to_install():
    with pytest.raises(MissingDependencyError, match=r"flcore\[flower\]"):
        flower_peer.flower_rate(Problem())


def test_the_report_is_the_median_of_pairs(monkeypatch, capsys, tmp_path):
    ours, theirs = iter([100.0, 90.0, 400.0]), iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(
        flower_peer, "flcore_rate", lambda problem: Rate("flcore", next(ours), 0.1, 0.97, 1.0)
    )
    monkeypatch.setattr(
        flower_peer, "flower_rate", lambda problem, cpus: Rate("Flower", next(theirs), 9, 0.96, 0.1)
    )
    flower_peer.main(["--rounds", "5", "--json", str(tmp_path / "x.json")])
    out = capsys.readouterr().out
    assert "30.0x the rounds per second" in out and out.count("rounds/s, first") == 6
    assert '"rounds": 5' in (tmp_path / "x.json").read_text()
