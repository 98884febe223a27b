"""Comparisons: equal conditions, figures by hand, the report and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from flcore.cli import application
from flcore.errors import InvalidInputError
from flcore.simulation import Settings
from flcore.simulation.compare import Comparison, Outcome, compare, entry_from_text, parse_pairs
from flcore.simulation.compare_report import write_comparison
from flcore.simulation.history import PHASES, History, RoundRecord

SHORT = {"rounds": 3, "clients": 10, "participation": 3, "codec": None, "feedback": None}


def history(accuracies, up=10, down=20):
    records = [
        RoundRecord(i + 1, a, 1.0, 1.0, (0,), up, down, dict.fromkeys(PHASES, 0.5))
        for i, a in enumerate(accuracies)
    ]
    return History(records, {}, {"model": {"parameters": 5}, "settings": {"rounds": 3}})


def test_figures_by_hand():
    outcomes = [
        Outcome("a", 0, history([0.5, 0.8, 0.9])),
        Outcome("a", 1, history([0.7, 0.7, 0.7])),
        Outcome("b", 0, history([0.1]), failure="lost"),
    ]
    a, b = Comparison(outcomes, ["a", "b"], target=0.8).rows()
    assert a["accuracy"] == pytest.approx((2.2 / 3 + 0.7) / 2)
    assert a["deviation"] == pytest.approx(abs(2.2 / 3 - 0.7) / 2**0.5)
    assert a["rounds"] == [2, None] and a["megabytes"] == [60e-6, None]
    assert (a["up"], a["down"], a["seconds"]) == (30e-6, 60e-6, 6.0)
    assert np.isnan(b["accuracy"]) and b["failures"] == ["lost"]
    table = Comparison(outcomes, ["a", "b"], target=0.8).table()
    assert table[1][1:4] == ["71.67 ± 2.36", "2, -", "-"]
    assert table[2][1] == "diverged"


def test_entries_as_text():
    entry = entry_from_text("fedspeed:rho=0.3,merge=1@trimmed-mean:f=1", local_lr=0.2, unknown=1)
    assert entry.algorithm.rho == 0.3 and entry.algorithm.local_lr == 0.2
    assert entry.aggregation == "trimmed-mean:f=1"
    assert parse_pairs(["a=1", "b-c=true", "d=x", "e=none"]) == {
        "a": 1,
        "b_c": True,
        "d": "x",
        "e": None,
    }
    for text, message in (
        ("fedsgd", "algorithm: there is no 'fedsgd'"),
        ("fedavg:rho=1", "rho: fedavg has no such option"),
        ("fedavg:local_lr", "option: expected KEY=VALUE, got 'local_lr'"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            entry_from_text(text)


def test_the_same_seed_means_the_same_conditions():
    entries = [entry_from_text(t, local_epochs=1) for t in ("fedavg", "fedprox:mu=0", "feddyn")]
    seen = []
    result = compare(
        entries, settings=Settings(**SHORT), seeds=2, tell=lambda *what: seen.append(what)
    )
    assert [done for _, done, _ in seen] == [1, 2, 3, 4, 5, 6] and seen[0][2] == 6
    for seed in range(2):
        runs = [result.of(label)[seed] for label in result.labels]
        drawn = [[record.clients for record in run.history] for run in runs]
        assert drawn[0] == drawn[1] == drawn[2]
        assert runs[0].history.accuracy == runs[1].history.accuracy  # mu = 0 is fedavg
    assert result.of("fedavg")[0].history.config["settings"]["seed"] == 0


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path):
    entries = [entry_from_text("fedavg:local_lr=1e30,clip=none"), entry_from_text("fedavg")]
    result = compare(entries, settings=Settings(**SHORT), seeds=1)
    broken, fine = result.rows()
    assert "is not finite" in broken["failures"][0] and fine["accuracy"] > 0.3
    write_comparison(result, tmp_path / "report.html")
    assert "diverged" in (tmp_path / "report.html").read_text()
    with pytest.raises(InvalidInputError, match="entries: expected at least one, no two alike"):
        compare([entries[1], entries[1]])


def test_the_command_writes_one_report(tmp_path):
    arguments = ["compare", "fedavg", "scaffold", "fedavg@median", "--seeds", "2", "--rounds", "2"]
    arguments += ["--clients", "10", "--participation", "4", "--local-epochs", "1", "--jobs", "2"]
    arguments += ["--target", "0.3", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(application(), arguments)
    assert result.exit_code == 0, result.output
    assert "run 6/6" in result.output and "fedavg" in result.output
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["label"] for row in written["rows"]] == ["fedavg", "scaffold", "fedavg@median"]
    assert len(written["runs"]) == 6
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n") == 5 and "rounds to 30%" in table
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 2 and "3 algorithms on digits" in page
    again = CliRunner().invoke(application(), arguments)
    assert again.exit_code == 1 and "already holds a comparison" in again.output.replace("\n", " ")


def test_algorithms_are_listed():
    result = CliRunner().invoke(application(), ["algorithms"])
    assert result.exit_code == 0 and "scaffold" in result.output
    one = CliRunner().invoke(application(), ["algorithms", "fedspeed"])
    assert one.exit_code == 0 and "rho" in one.output and "2302.10429" in one.output
    wrong = CliRunner().invoke(application(), ["algorithms", "fedsgd"])
    assert wrong.exit_code == 1 and "there is no 'fedsgd'" in wrong.output.replace("\n", " ")
