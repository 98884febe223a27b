"""Runs cases: builds the workload, adds the bandwidth probes, times in turns, collects results."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from typing import Any

from flcore.bench import environment
from flcore.bench.cases import Case, Setup, Workload
from flcore.bench.intervals import PairedTimes
from flcore.bench.results import CaseResult, ContestantResult, Report
from flcore.bench.roofline import COPY, PROBE_BYTES, READ, Roofline, percent_of, probes
from flcore.bench.timers import HostTimer, Plan, Timer, run_paired

__all__ = ["Progress", "run", "run_case"]

# progress(case number from 0, number of cases, case name, stage, fraction of the stage)
Progress = Callable[[int, int, str, str, float], None]


def run(
    cases: Sequence[Case],
    setup: Setup,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure `cases` one after another with the same threads for every library.

    Parameters
    ----------
    cases : sequence of Case
        Cases that do not exist on `setup.device` are reported as "not run".
    setup : Setup
    plan : Plan, optional
    progress : callable, optional

    Raises
    ------
    RuntimeError
        With a debug build, unless `setup.tiny`: its times would say nothing.
    """
    build_info = environment.build_to_time(setup.tiny)
    plan = plan or Plan()
    tell = progress or (lambda *state: None)
    with environment.threads_set_to(setup.threads) as given:
        roofline = probes(setup.device, setup.threads, 2**20 if setup.tiny else PROBE_BYTES)
        results = []
        for number, case in enumerate(cases):
            tell_stage = partial(tell, number, len(cases), case.name)
            results.append(run_case(case, setup, plan, roofline, tell_stage))
            _forget_compiled()
    return Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        build_info=build_info,
        machine=environment.machine(setup.device),
        versions=environment.versions(),
        settings={
            "device": setup.device,
            "threads": given,
            "tiny": setup.tiny,
            "compiled_peers": setup.compiled,
            "plan": asdict(plan),
        },
        cases=results,
    )


def _forget_compiled() -> None:
    """Start the next case with an empty `torch.compile` cache.

    The cache is per function, and after eight shapes it falls back to eager mode without a word;
    after two it compiles for any shape, which is slower.
    """
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].compiler.reset()


def run_case(
    case: Case,
    setup: Setup,
    plan: Plan,
    roofline: Roofline,
    progress: Callable[[str, float], None] | None = None,
) -> CaseResult:
    """Measure one case; a case that cannot run comes back with the reason, it does not raise."""
    facts: dict[str, Any] = {
        key: getattr(case, key)
        for key in ("name", "family", "title", "dtype", "formula", "bound", "note")
    }
    if setup.tiny:
        facts["title"] = f"{case.title}: TINY INPUTS"
    facts |= {
        "device": setup.device,
        "threads": setup.threads,
        "isa": _isa(setup),
        "state": "hot" if case.hot else "cold",
    }
    if setup.device not in case.devices:
        return CaseResult(**facts, status="not run", reason=f"no {setup.device} version")
    if missing := case.missing():
        return CaseResult(**facts, status="not run", reason="; ".join(missing))
    try:
        if progress is not None:
            progress("prepare inputs", 0.0)
        workload = case.workload(setup)
        times = run_paired(
            [*workload.contestants, *roofline.contestants],
            workload.matches,
            plan=plan,
            timer=_timer(setup, case),
            slots=workload.slots,
            verify_slots=workload.verify_slots,
            prime=case.hot,
            progress=progress,
        )
    except Exception as error:
        # one broken case must not cost the measurements of all the others
        return CaseResult(**facts, status="failed", reason=f"{type(error).__name__}: {error}")
    return _case_result(facts, workload, times, roofline)


def _isa(setup: Setup) -> str:
    import flcore

    return "cuda" if setup.device == "cuda" else str(flcore.build_info().get("isa", "unknown"))


def _timer(setup: Setup, case: Case) -> Timer:
    if setup.device == "cuda":
        from flcore.bench.cuda import CudaTimer

        return CudaTimer(hot=case.hot)
    return HostTimer()


def _case_result(
    facts: dict[str, Any], workload: Workload, times: PairedTimes, roofline: Roofline
) -> CaseResult:
    ours = times.names[0]
    moved = workload.bytes_moved
    contestants = [_contestant(c.name, c.kind, times) for c in workload.contestants]
    contestants += [
        ContestantResult(name, "peer", "absent", reason) for name, reason in workload.absent.items()
    ]
    return CaseResult(
        **facts,
        bytes_moved=moved,
        gbs=moved / times.quantiles(ours)[1] / 1e9,
        read_gbs=roofline.gigabytes_per_second(times, READ),
        copy_gbs=roofline.gigabytes_per_second(times, COPY),
        percent_of_read=percent_of(roofline, READ, times, moved),
        percent_of_copy=percent_of(roofline, COPY, times, moved),
        contestants=contestants,
    )


def _contestant(name: str, kind: str, times: PairedTimes) -> ContestantResult:
    if name in times.refused:
        return ContestantResult(name, kind, "refused", times.refused[name])
    low, median, high = (seconds * 1e3 for seconds in times.quantiles(name))
    ratio = None if kind == "ours" else times.ratio(name)
    if ratio is None:
        verdict = ""
    elif ratio.contains(1.0):
        verdict = "same"
    else:
        verdict = "flcore faster" if ratio.low > 1 else "flcore slower"
    rounds = times.rounds(name)
    return ContestantResult(
        name=name,
        kind=kind,
        median_ms=median,
        low_ms=low,
        high_ms=high,
        rounds=rounds,
        few_rounds=rounds < times.full_rounds,
        ratio=ratio,
        verdict=verdict,
    )
