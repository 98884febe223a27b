"""Benchmarks of the robust rules: their inputs, their definitions, ByzFL as a peer, scaling."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from flcore.bench import Plan, Setup, byzfl_peer, roofline, rules_data, scaling
from flcore.bench.intervals import PairedTimes
from flcore.bench.rules import RULES
from flcore.bench.rules_expected import EXPECTED, Rows, clip_radius, gram_of
from flcore.bench.scaling_report import draw, scaling_markdown, scaling_table, write_scaling_json
from tables import STEPS, TABLE

TINY = Setup(tiny=True)
SMOKE = Plan(budget_s=0.01, warmup_s=0.001, min_rounds=2, max_rounds=2)


def expected(rule, f, values=TABLE):
    return EXPECTED[rule](Rows(gram_of(values), values, values.shape[1]), f)


# ---- definitions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "f", "result", "combined"),
    [
        ("mean", 1, [2.5, 0.1666666667, 0.4666666667, -0.75], 0),
        ("median", 1, [1.05, 1.95, -1.0, 0.45], 0),
        ("trimmed_mean", 2, [1.05, 1.95, -1.0, 0.45], 0),
        ("meamed", 1, [1.0, 2.0, -1.04, 0.5], 0),
        ("meamed", 2, [1.05, 1.95, -1.0, 0.45], 0),
        ("krum", 1, [1.0, 2.0, -1.0, 0.5], 1),
        ("multi_krum", 1, [1.0, 2.0, -1.04, 0.5], 5),
        ("multi_krum", 2, [1.05, 1.95, -1.0, 0.45], 4),
        ("geometric_median", 1, [1.0902860686, 1.9053968862, -0.9728370839, 0.4119433217], 6),
        ("mda", 1, [1.0, 2.0, -1.04, 0.5], 5),
        ("smea", 1, [1.0, 2.0, -1.04, 0.5], 5),
    ],
)
def test_definitions_on_the_table(rule, f, result, combined):
    found = expected(rule, f)
    np.testing.assert_allclose(found.values, result, rtol=0, atol=5e-9)
    assert found.combined == combined


def test_definition_of_bulyan():
    rows = np.array([(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5), (0.4, 0.6), (9, -9)])
    found = expected("bulyan", 1, rows)
    np.testing.assert_allclose(found.values, [0.3, 0.3666666667])
    assert found.combined == 5


def test_definition_of_the_filter():
    # rows at -3, 0, 3 on a line: the ends lose all weight in the first step, and half were enough
    found = expected("caf", 1, STEPS)
    np.testing.assert_allclose(found.values, [4.0, 5.0, 6.0])
    assert found.combined == 3
    # at -1, 0, 1, 12: the last goes first (mean 3, variance 27.5), then the weights
    # 1 - (4, 3, 2, 9)^2 / 81 = 65, 72, 77 of 81 have mean 12/214, which is the best of all steps
    found = expected("caf", 1, np.array([[-1.0], [0.0], [1.0], [12.0]]))
    np.testing.assert_allclose(found.values, [12 / 214])
    assert found.combined == 3


def test_definition_of_one_clipping_step():
    # norms 3 and 4, radius sqrt(2): rows are scaled to it and averaged
    rows = np.array([(3.0, 0.0), (0.0, 4.0)])
    assert clip_radius(2) == pytest.approx(np.sqrt(2))
    np.testing.assert_allclose(expected("centered_clipping", 0, rows).values, np.sqrt([0.5, 0.5]))


def test_nearest_neighbours_are_mixed_before_they_are_trimmed():
    # rows 0 to 4 become their common mean, so that trimming the mixed far row leaves just that
    np.testing.assert_allclose(expected("nnm_trimmed_mean", 1).values, [1, 2, -1.04, 0.5])


def test_the_check_sees_one_wrong_row():
    data = rules_data.make_clients(TINY, 12, 500, 2)
    assert data.stacked[0][-2:].mean() > 2.5 and abs(data.stacked[0][:-2].mean()) < 0.1
    check, right = data.check("multi_krum"), data.stacked[0][:10].mean(axis=0, dtype=np.float64)
    assert check(0, right) is None
    wrong = data.stacked[0][1:11].mean(axis=0, dtype=np.float64)
    assert check(0, wrong) is not None and check(1, right) is not None
    assert "shape" in check(0, right[:-1])


def test_the_loose_check_sees_a_bad_row_that_was_kept():
    data = rules_data.make_clients(TINY, 12, 500, 2)
    check = data.loose_check("caf", 0.2)
    assert check(0, data.stacked[0][:10].mean(axis=0, dtype=np.float64)) is None
    assert "rms" in check(0, data.stacked[0].mean(axis=0, dtype=np.float64))


# ---- ByzFL as a peer -----------------------------------------------------------------------------


def test_byzfl_that_is_not_installed_is_a_reason(monkeypatch):
    monkeypatch.setattr(byzfl_peer.importlib.util, "find_spec", lambda name: None)
    assert byzfl_peer.byzfl_aggregators.__wrapped__() == (None, "not installed")


def test_byzfl_is_imported_without_the_rest_of_its_package(tmp_path, monkeypatch):
    package = tmp_path / "byzfl"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('no torchvision')")
    (package / "aggregators.py").write_text("from byzfl.tools import answer")
    (package / "tools.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    mine = object()
    monkeypatch.setitem(sys.modules, "byzfl.mine", mine)
    before = {name for name in sys.modules if name.startswith("byzfl")}
    module, reason = byzfl_peer.byzfl_aggregators.__wrapped__()
    assert (module.answer, reason) == (42, "")
    assert {name for name in sys.modules if name.startswith("byzfl")} == before
    assert sys.modules["byzfl.mine"] is mine
    (package / "tools.py").unlink()
    assert "does not import: ModuleNotFoundError" in byzfl_peer.byzfl_aggregators.__wrapped__()[1]


# ---- scaling -------------------------------------------------------------------------------------


def test_operations_are_those_of_the_definition():
    # odd-even merge sort of four values takes five exchanges; the median of three takes three
    assert scaling.operations("trimmed_mean", 4, 1) == {"exchanges": 5}
    assert scaling.operations("median", 3, 1) == {"exchanges": 3}
    assert scaling.operations("krum", 6, 1) == {"differences": 15}
    assert scaling.operations("nnm_trimmed_mean", 4, 1) == {
        "differences": 6,
        "products": 12,
        "exchanges": 5,
    }
    assert scaling.operations("bulyan", 8, 2) == {"differences": 28, "exchanges": 5}
    assert scaling.operations("mean", 8, 1) == {}


def test_arithmetic_probes_count_what_they_do():
    found = roofline.arithmetic(2, rounds=3)
    names = [contestant.name for contestant in found.contestants]
    assert names == ["exchanges", "products", "differences"]
    for contestant in found.contestants:
        assert contestant.call(0) == found.amount_of[contestant.name]
        one = roofline.arithmetic(1, rounds=3).amount_of[contestant.name]
        assert found.amount_of[contestant.name] == 2 * one > 0


def test_shares_of_a_limit_are_paired_within_rounds():
    seconds = np.array([[4.0, 8.0, 4.0], [1.0, 2.0, 1.0], [2.0, 4.0, np.nan]])
    times = PairedTimes(["rule", "read", "exchanges"], seconds)
    assert times.share("rule", {"read": 2.0}).median == pytest.approx(0.5)
    assert times.share("rule", {"read": 1.0, "exchanges": 1.0}).median == pytest.approx(0.75)


@pytest.fixture(scope="module")
def measured():
    return scaling.run_scaling(TINY, SMOKE)


def test_scaling_covers_every_rule_and_number_of_clients(measured):
    rules = [rule for rule in RULES if rule != "smea"]
    wanted = [(n, rule) for n in scaling.TINY_CLIENTS for rule in rules]
    assert [(p.clients, p.rule) for p in measured.points] == wanted
    for p in measured.points:
        assert p.median_ms > 0 and p.ns_per_value == pytest.approx(
            p.median_ms * 1e6 / (p.clients * p.numel)
        )
        assert p.bytes_moved >= 4 * (p.clients + 1) * p.numel
        assert p.limit == ("memory" if p.memory_ns >= p.arithmetic_ns else "arithmetic")
        assert (p.arithmetic_share is None) == (p.rule == "mean")


def test_a_wrong_rule_stops_the_scaling_run(monkeypatch):
    broken = RULES["mean"], lambda a, f, d: lambda rows: rows[0]
    monkeypatch.setitem(RULES, "mean", type(broken[0])("wrong", broken[1], two_reads=False))
    with pytest.raises((RuntimeError, AssertionError), match="wrong result"):
        scaling.run_scaling(TINY, SMOKE, rules=["mean"])


def test_scaling_is_written_as_json_markdown_table_and_plot(measured, tmp_path):
    pytest.importorskip("matplotlib")
    rich = pytest.importorskip("rich.console")
    write_scaling_json(measured, tmp_path / "s.json")
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["schema"] == scaling.SCHEMA
    assert document["points"][0].keys() >= {"rule", "clients", "limit", "memory_share"}
    text = scaling_markdown(measured)
    assert "| rule | n = 8 | n = 12 |" in text and "Tiny inputs" in text
    assert text.count("`NNM(f) >> TrimmedMean(f)`") == 1 + len(scaling.TINY_CLIENTS)
    console = rich.Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(scaling_table(measured))
    assert "n = 12" in console.export_text()
    for name in ("s.svg", "s.png"):
        draw(measured, tmp_path / name)
    assert 5_000 < (tmp_path / "s.svg").stat().st_size < 100_000


def test_scaling_from_the_command_line(tmp_path):
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from flcore.cli.bench import bench

    app = typer.Typer()
    app.command()(bench)
    options = ["scaling", "--tiny", "--json", str(tmp_path / "s.json")]
    answer = CliRunner().invoke(app, options, env={"COLUMNS": "200"})
    assert answer.exit_code == 0, answer.output
    assert "Krum" in answer.output and (tmp_path / "s.json").exists()
    answer = CliRunner().invoke(app, ["rules", "--plot", "x.svg"], env={"COLUMNS": "200"})
    assert answer.exit_code == 2 and "have a plot" in answer.output
