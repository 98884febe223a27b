"""Federated algorithms on clients that hold one or two classes: who beats whom, by safe margins."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from flcore.bench.digits_hard import (
    METHODS,
    Row,
    digits_hard_markdown,
    draw,
    run_digits_hard,
    write_digits_hard_json,
)

NAMES = ("FedAvg", "FedSAM, rho 0.1", "SCAFFOLD", "FedDyn, lambda 0.1")
SPEEDS = tuple(f"FedSpeed, 1/lambda 0.1, rho {rho}" for rho in (0.1, 0.3))
FAST = ("FedCM, alpha 0.3, lr 0.3", "MoFedSAM, alpha 0.3, lr 0.3, rho 0.1")


def rows_of(*labels, **options) -> list[Row]:
    methods = {method.label: method for method in METHODS}
    return run_digits_hard((0, 1, 2), [methods[label] for label in labels], **options)


def rounds(row: Row) -> int:
    """Rounds to 95 %, of all seeds together."""
    return sum(60 if t is None else t for t in row.rounds_to_target)


def test_figures_of_a_row_by_hand():
    rising = tuple(t / 100 for t in range(40, 100))  # 40 % to 99 %
    row = Row("x", (rising, (0.5,) * 60), 1, 2)
    assert row.accuracy == pytest.approx((0.945, 0.5)) and row.mean == pytest.approx(0.7225)
    assert row.deviation == pytest.approx(0.2225)
    assert row.early == pytest.approx((0.59 + 0.5) / 2)  # rounds 18 to 22: 57 % to 61 %
    assert row.rounds_to_target == (56, None)
    text = digits_hard_markdown([row])
    assert "| x | 72.25 ± 22.25 | 54.5 | 56, - | 0.0 | 0.0 |" in text
    assert "independent" not in text  # nothing to compare with


def test_results_are_written_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = run_digits_hard((0,), METHODS[:2], rounds=2)
    assert [row.label for row in rows] == ["FedAvg", "FedProx, mu 1"]
    assert rows[0].bytes_up == rows[0].bytes_down == 2 * 5 * 4 * 4810
    write_digits_hard_json(rows, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())[0]["curves"] == [list(rows[0].curves[0])]
    draw(rows, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    for row in rows:
        assert f"| {row.label} |" in digits_hard_markdown(rows)


def test_the_command(tmp_path):
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from flcore.cli.bench import bench

    app = typer.Typer()
    app.command()(bench)
    table = tmp_path / "table.md"
    done = CliRunner().invoke(app, ["digits-hard", "--tiny", "--markdown", str(table)])
    assert done.exit_code == 0, done.output
    assert table.read_text().count("\n") == 2 + len(METHODS)


@pytest.mark.slow
def test_corrected_methods_beat_plain_averaging():
    """Over three seeds, with margins several deviations wide."""
    plain, sam, scaffold, dyn, speed, far = rows_of(*NAMES, *SPEEDS)
    for row in (scaffold, dyn, speed, far):
        assert row.mean > plain.mean + 0.010
    assert far.mean >= dyn.mean - 0.001
    assert sam.mean >= plain.mean - 0.003
    assert max(rounds(speed), rounds(far)) < 0.8 * rounds(plain)


@pytest.mark.slow
def test_momentum_of_the_server_speeds_up_the_first_rounds():
    plain, *fast = rows_of(NAMES[0], *FAST, rounds=22)
    assert min(row.early for row in fast) > plain.early + 0.005


@pytest.mark.slow
def test_fedspeed_makes_use_of_longer_local_intervals():
    (short,), (long,) = (rows_of(SPEEDS[1], local_epochs=epochs) for epochs in (2, 20))
    assert rounds(long) < 0.7 * rounds(short)
