"""The benchmark harness itself.  Clocks are fake here: no test depends on how fast anything is."""

import json
from dataclasses import replace

import numpy as np
import pytest

from flcore.bench import (
    FAMILIES,
    Plan,
    Setup,
    aggregation,
    all_cases,
    cases,
    environment,
    markdown,
    roofline,
    run,
    run_paired,
    runner,
    select,
    timers,
)
from flcore.bench.intervals import median_interval
from flcore.bench.results import SCHEMA
from flcore.bench.timers import Contestant, HostTimer, VerificationError

PLAN = Plan(budget_s=6.0, warmup_s=0.5)


class FakeClock:
    """A clock that only contestants move, on a machine that is disturbed in a repeatable way."""

    def __init__(self):
        self.now_ns = 0
        self.calls = []
        self.rng = np.random.default_rng(0)

    def __call__(self):
        return int(self.now_ns)

    def contestant(self, name, ms, result=1.0, **options):
        def call(slot):
            # every other two seconds the machine is slow, and every call has 2 % of jitter
            slow = 1.5 if int(self.now_ns // 2e9) % 2 else 1.0
            self.now_ns += ms * 1e6 * slow * (1 + 0.02 * self.rng.random())
            self.calls.append((name, slot))
            return np.array([result])

        return Contestant(name, call, **options)


def is_one(slot, result):
    return None if result == 1.0 else f"got {result[0]}, expected 1"


def paired(clock, *contestants, plan=PLAN, **options):
    return run_paired(contestants, is_one, plan=plan, timer=HostTimer(clock), **options)


# ---- timers --------------------------------------------------------------------------------------


def test_a_function_timed_against_itself_is_the_same():
    clock = FakeClock()
    times = paired(clock, clock.contestant("a", 10), clock.contestant("b", 10))
    ratio = times.ratio("b")
    assert 0.99 < ratio.median < 1.01
    assert ratio.low <= ratio.median <= ratio.high


def test_phases_of_a_slow_machine_do_not_move_the_ratio():
    clock = FakeClock()
    times = paired(clock, clock.contestant("fast", 10), clock.contestant("slow", 30))
    assert times.ratio("slow").median == pytest.approx(3.0, rel=0.02)
    # the same data, unpaired, would be this far off at worst
    fast, slow = times.seconds
    assert np.nanmax(slow) / np.nanmin(fast) > 4.0


def test_contestants_take_turns_in_every_round():
    clock = FakeClock()
    times = paired(clock, clock.contestant("a", 10), clock.contestant("b", 10))
    timed = [name for name, _ in clock.calls][-2 * times.rounds("a") :]
    rounds = [set(timed[i : i + 2]) for i in range(0, len(timed), 2)]
    assert rounds == [{"a", "b"}] * times.rounds("a")
    assert timed != sorted(timed)  # and not always in the same order


def test_slow_contestants_get_fewer_rounds_but_never_less_than_seven():
    clock = FakeClock()
    contestants = clock.contestant("a", 10), clock.contestant("slow", 2000)
    times = paired(clock, *contestants, plan=replace(PLAN, budget_s=10.0))
    assert times.rounds("a") == PLAN.max_rounds
    assert times.rounds("slow") == PLAN.min_rounds < times.full_rounds
    assert times.ratio("slow").median == pytest.approx(200, rel=0.05)


def test_calls_of_seconds_share_a_time_limit_and_get_at_least_three_rounds():
    clock = FakeClock()
    contestants = clock.contestant("a", 10), clock.contestant("slow", 3000)
    times = paired(clock, *contestants, plan=replace(PLAN, budget_s=10.0, max_s=24.0))
    assert times.rounds("a") == PLAN.max_rounds
    assert times.rounds("slow") == 3  # 12 s are its share, a call takes 3 to 4.5 s
    assert [name for name, _ in clock.calls].count("slow") == 1 + 1 + 3


def test_a_peer_that_takes_too_long_is_not_timed():
    clock = FakeClock()
    times = paired(clock, clock.contestant("a", 10), clock.contestant("endless", 30_000))
    assert times.names == ["a"]
    assert "s a call, too slow for 60 s a case" in times.refused["endless"]
    assert paired(clock, clock.contestant("ours", 30_000)).names == ["ours"]  # always timed


def test_a_peer_with_a_wrong_result_is_not_timed():
    clock = FakeClock()
    wrong = clock.contestant("wrong", 1, result=2.0)
    times = paired(clock, clock.contestant("a", 10), wrong)
    assert times.names == ["a"]
    assert times.refused == {"wrong": "wrong result: got 2.0, expected 1"}
    assert [name for name, _ in clock.calls].count("wrong") == 1


def test_a_peer_that_raises_is_on_record():
    clock = FakeClock()

    def fail(slot):
        raise MemoryError("no room\nfor details")

    times = paired(clock, clock.contestant("a", 10), Contestant("broken", fail))
    assert times.refused == {"broken": "MemoryError: no room"}


def test_nothing_is_timed_when_ours_is_wrong():
    clock = FakeClock()
    with pytest.raises(VerificationError, match=r"ours: wrong result: got 3\.0"):
        paired(clock, clock.contestant("ours", 10, result=3.0), clock.contestant("peer", 10))


def test_verification_starts_and_ends_with_fresh_state():
    clock = FakeClock()
    resets = []
    stateful = clock.contestant("a", 10, reset=lambda: resets.append(len(clock.calls)))
    paired(clock, stateful, verify_slots=(0, 1), slots=2)
    assert resets == [0, 2]


def test_every_call_takes_the_input_set_used_longest_ago():
    clock = FakeClock()
    paired(clock, clock.contestant("a", 10), clock.contestant("b", 10), slots=3)
    slots = [slot for _, slot in clock.calls[2:]]  # the first two verify on slot 0
    assert slots == [i % 3 for i in range(len(slots))]


def test_priming_calls_each_contestant_twice_and_probes_once():
    clock = FakeClock()
    probe = clock.contestant("probe", 10, kind="probe")
    times = paired(clock, clock.contestant("a", 10), probe, prime=True)
    names = [name for name, _ in clock.calls]
    last = names[-3 * times.rounds("a") :]
    assert last.count("a") == 2 * last.count("probe")


def test_warm_up_stops_when_calls_agree_or_time_is_up():
    steady = iter([5.0] * 3 + [1.0] * 100)
    assert timers._warm_up(lambda: next(steady), limit_s=1e9) == 1.0
    assert len(list(steady)) > 70
    assert timers._warm_up(lambda: 2.0, limit_s=1.0) == 2.0
    restless = iter(range(1, 2000))  # every call takes 30 % longer than the one before
    timers._warm_up(lambda: 1.3 ** next(restless), limit_s=float("inf"))
    assert next(restless) == timers.MAX_WARM_UP_CALLS + 1


def test_interval_of_a_median_is_a_function_of_the_values():
    values = np.random.default_rng(1).normal(1.0, 0.1, 200)
    interval = median_interval(values)
    assert interval == median_interval(values)
    assert interval.low < np.median(values) < interval.high
    assert interval.contains(interval.median) and not interval.contains(2.0)
    assert interval.scaled(2.0).low == 2 * interval.low
    with pytest.raises(ValueError, match="at least one number"):
        median_interval([])


# ---- roofline ------------------------------------------------------------------------------------


def test_percent_of_bandwidth_is_paired_with_the_probe():
    clock = FakeClock()
    ours = clock.contestant("ours", 10)
    copy = clock.contestant(roofline.COPY, 20, kind="probe")
    times = paired(clock, ours, copy)
    known = roofline.Roofline((copy,), {roofline.COPY: 1_000})
    # 400 bytes in 10 ms beside 1,000 bytes in 20 ms
    assert roofline.percent_of(known, roofline.COPY, times, 400).median == pytest.approx(
        80, rel=0.02
    )


def test_probes_read_and_copy_what_they_say():
    found = roofline.probes("cpu", 1, 2**16)
    assert found.amount_of == {roofline.READ: 2**16, roofline.COPY: 2**17}
    for contestant in found.contestants:
        assert contestant.kind == "probe"
        contestant.call(0)


# ---- registry and peers --------------------------------------------------------------------------


def test_case_names_are_unique_and_their_facts_complete():
    registered = all_cases()
    names = [case.name for case in registered]
    assert len(set(names)) == len(names)
    for case in registered:
        assert case.family in FAMILIES and case.formula and case.bound in ("read", "copy")
        assert case.sizes.keys() == case.tiny.keys()


def test_select_takes_a_family_a_case_or_nothing():
    assert select() == all_cases()
    assert {case.family for case in select("aggregation")} == {"aggregation"}
    assert [case.name for case in select("weighted_mean_32x1m")] == ["weighted_mean_32x1m"]
    assert all("cuda" in case.devices for case in select(device="cuda"))
    with pytest.raises(ValueError, match="weighted_mean_32x1m"):
        select("nonsense")


def test_resnet18_shapes_add_up_to_the_published_size():
    sizes = [int(np.prod(shape)) for shape in aggregation.RESNET18_SHAPES]
    assert (len(sizes), sum(sizes)) == (62, 11_689_512)


def test_bytes_are_each_input_once_and_each_output_once():
    work = aggregation.build_mean(Setup(tiny=True, compiled=False), clients=4, numel=100)
    assert work.bytes_moved == 4 * 5 * 100


def test_optional_tells_absent_from_broken(tmp_path, monkeypatch):
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    assert environment.optional("no_such_peer") == (None, "not installed")
    reason = environment.optional("broken_peer")[1]
    assert reason == "does not import: RuntimeError: built for another torch"


@pytest.fixture
def nothing_installed(monkeypatch):
    """A machine with NumPy only."""

    def optional(name):
        return None, "not installed"

    from flcore.bench import aggregation_peers, compression_peers, rules_peers, updates

    for module in (aggregation_peers, cases, compression_peers, environment, rules_peers, updates):
        monkeypatch.setattr(module, "optional", optional, raising=False)
    for module in (aggregation_peers, rules_peers):
        monkeypatch.setattr(module, "byzfl_aggregators", lambda: (None, "not installed"))


SMOKE = Plan(budget_s=0.01, warmup_s=0.001, min_rounds=2, max_rounds=2)


def smoke(name, **options):
    return run(select(name), replace(Setup(tiny=True, compiled=False), **options), SMOKE)


def test_numpy_is_enough_and_absent_peers_are_listed(nothing_installed):
    (case,) = smoke("weighted_mean_32x1m").cases
    status = {c.name: (c.status, c.reason) for c in case.contestants}
    assert case.status == "measured"
    assert status["numpy weights @ stacked"] == ("timed", "")
    for name in ("torch weights @ stacked", "torch _foreach_add_", "flwr aggregate"):
        assert status[name] == ("absent", "not installed")
    assert "| `flwr aggregate` | not installed |" in markdown(smoke("weighted_mean_32x1m"))


def test_robust_rules_run_with_numpy_alone(nothing_installed):
    contestants = smoke("trimmed_mean_32x1m").cases[0].contestants
    status = {c.name: (c.status, c.reason) for c in contestants}
    assert status["flcore TrimmedMean(2)"] == ("timed", "")
    for name in ("byzfl TrMean, torch", "byzfl TrMean, NumPy", "torch", "scipy.stats.trim_mean"):
        assert status[name] == ("absent", "not installed")


def test_a_case_that_cannot_run_says_why(nothing_installed):
    (case,) = smoke("weighted_mean_32x1m_bf16").cases
    assert (case.status, case.reason) == ("not run", "torch: not installed")


def test_a_failing_case_does_not_stop_the_others(monkeypatch):
    def broken(setup, **sizes):
        raise OSError("no room")

    first, second = select("weighted_mean_32x1m"), select("weighted_mean_8x1m")
    report = run(
        [replace(first[0], build=broken), *second], Setup(tiny=True, compiled=False), SMOKE
    )
    assert [c.status for c in report.cases] == ["failed", "measured"]
    assert report.failed()[0].reason == "OSError: no room"


@pytest.mark.parametrize("case", [c.name for c in select(device="cpu")])
def test_every_contestant_of_every_case_passes_its_verification(case):
    (result,) = smoke(case).cases
    if result.status == "not run":
        pytest.skip(result.reason)
    assert result.status == "measured", result.reason
    assert {c.name: c.reason for c in result.contestants if c.status == "refused"} == {}


# ---- report --------------------------------------------------------------------------------------


def test_json_holds_what_the_schema_says():
    report = json.loads(json.dumps(smoke("weighted_mean_32x100k").to_dict()))
    assert report["schema"] == SCHEMA
    assert report["machine"].keys() >= {"cpu", "cpus", "cache_bytes", "system", "python"}
    assert report["versions"].keys() == set(environment.VERSIONS_OF)
    assert report["build_info"]["debug"] in (True, False)
    assert report["settings"]["threads"]["flcore"] == 1
    (case,) = report["cases"]
    assert (case["state"], case["threads"], case["device"]) == ("hot", 1, "cpu")
    assert case["isa"] == report["build_info"]["isa"]
    assert case["percent_of_copy"].keys() == {"median", "low", "high"}
    ours, *others = case["contestants"]
    assert ours["kind"] == "ours" and ours["ratio"] is None and ours["median_ms"] > 0
    for other in others:
        assert other["status"] in ("timed", "absent", "refused")
        assert (other["ratio"] is not None) == (other["status"] == "timed")
        assert bool(other["reason"]) == (other["status"] != "timed")


def test_no_claim_when_the_interval_contains_one():
    clock = FakeClock()
    times = paired(clock, clock.contestant("ours", 10), clock.contestant("twin", 10))
    times.seconds[1] = times.seconds[0] * np.resize([0.9, 1.1], times.seconds.shape[1])
    twin = runner._contestant("twin", "peer", times)
    assert twin.verdict == "same"
    times.seconds[1] = times.seconds[0] * 0.5
    assert runner._contestant("twin", "peer", times).verdict == "flcore slower"


def test_threads_are_the_same_for_everyone_and_restored():
    import flcore

    before = flcore.get_num_threads()
    with environment.threads_set_to(before + 1) as given:
        assert flcore.get_num_threads() == given["flcore"] == before + 1
    assert flcore.get_num_threads() == before


def test_a_debug_build_is_not_timed(monkeypatch):
    import flcore

    info = flcore.build_info() | {"debug": True}
    monkeypatch.setattr(flcore, "build_info", lambda: info, raising=False)
    with pytest.raises(RuntimeError, match="debug or sanitizer build"):
        run(select("weighted_mean_32x1m"), Setup())


# ---- command line --------------------------------------------------------------------------------


@pytest.fixture
def command():
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from flcore.cli.bench import bench

    app = typer.Typer()
    app.command()(bench)
    return lambda *arguments: CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_command_lists_cases(command):
    answer = command("--list")
    assert answer.exit_code == 0
    assert all(case.name in answer.output for case in select(device="cpu"))


def test_command_writes_json_and_markdown(command, tmp_path):
    numbers, table = tmp_path / "b.json", tmp_path / "b.md"
    answer = command(
        "weighted_mean_8x1m", "--tiny", "--json", str(numbers), "--markdown", str(table)
    )
    assert answer.exit_code == 0, answer.output
    assert json.loads(numbers.read_text())["schema"] == SCHEMA
    assert "| operation | inputs |" in table.read_text()
    assert "flcore Mean" in answer.output


def test_command_names_the_choices(command):
    assert "aggregation, compression" in command("nonsense").output
    assert "cpu or cuda" in command("--device", "tpu").output
