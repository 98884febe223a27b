"""Turns a `Report` into a terminal table, a JSON file or Markdown.  Needs `rich` for the first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcore.bench.intervals import Interval
from flcore.bench.results import CaseResult, ContestantResult, Report

if TYPE_CHECKING:
    from rich.table import Table

    from flcore.bench.scaling import Scaling

__all__ = [
    "conditions",
    "markdown",
    "markdown_row",
    "markdown_rule",
    "terminal_table",
    "write_json",
    "write_markdown",
]


# ---- words and numbers ---------------------------------------------------------------------------


def _ms(value: float | None) -> str:
    """Three significant digits, without exponents."""
    if value is None:
        return ""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def _ratio(result: ContestantResult) -> str:
    """`1.96x [1.94, 1.98]`, or `same [0.99, 1.01]` when the interval contains 1."""
    if result.ratio is None:
        return ""
    r = result.ratio
    head = "same" if result.verdict == "same" else f"{r.median:.2f}x"
    return f"{head} [{r.low:.2f}, {r.high:.2f}]"


def _percent(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.median:.0f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _time_cell(result: ContestantResult) -> str:
    """Median in ms, or why there is none."""
    if result.status == "absent":
        return result.reason
    if result.status == "refused":
        return f"not timed: {result.reason}"
    return _ms(result.median_ms)


def _rounds_cell(result: ContestantResult) -> str:
    if result.status != "timed":
        return ""
    return f"{result.rounds} (slow)" if result.few_rounds else str(result.rounds)


def _state(case: CaseResult) -> str:
    threads = "1 thread" if case.threads == 1 else f"{case.threads} threads"
    where = "GPU" if case.device == "cuda" else f"{threads}, {case.isa}"
    return f"{case.dtype}, {case.state}, {where}"


def _versions(report: Report | Scaling) -> str:
    return ", ".join(f"{k} {v or 'not installed'}" for k, v in report.versions.items())


def _hardware(report: Report | Scaling) -> str:
    facts = report.machine
    cpu = f"{facts['cpu']}, {facts['cpus']} CPUs"
    return f"{facts['gpu']}, {cpu}" if "gpu" in facts else cpu


def _threads(report: Report | Scaling) -> str:
    return ", ".join(f"{k} {v}" for k, v in report.settings["threads"].items())


# ---- terminal ------------------------------------------------------------------------------------


def terminal_table(report: Report) -> Table:
    """Build one `rich` table: a block for each case, ours first, 80 columns suffice."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{_hardware(report)}\nthreads: {_threads(report)}",
        caption="ratio: time of that row over the time of flcore, pair by pair, with its 95 % "
        "interval\npercentages: flcore beside the bandwidth probes of the same rounds"
        "\n* slow, and so in fewer rounds",
        title_style="",
    )
    table.add_column("case", overflow="fold")
    for column in ("ms", "ratio", "rounds"):
        table.add_column(column, justify="right", no_wrap=True)
    for case in report.cases:
        table.add_section()
        facts = [_state(case), _bandwidth(case)] if case.ours else [_state(case)]
        dim = "\n".join(f"[dim]{escape(line)}[/dim]" for line in facts)
        table.add_row(f"[bold]{escape(case.title)}[/bold]\n{dim}")
        if case.status != "measured":
            style = "red" if case.status == "failed" else "yellow"
            table.add_row(f"  [{style}]{case.status}: {escape(case.reason)}[/{style}]")
        for result in (c for c in case.contestants if c.status == "timed"):
            rounds = f"{result.rounds}*" if result.few_rounds else str(result.rounds)
            cells = "  " + result.name, _ms(result.median_ms), _ratio(result), rounds
            table.add_row(*map(escape, cells), style=_style(result))
        for reason, names in _not_timed(case).items():
            table.add_row(f"  [dim]{escape(reason)}: {escape(', '.join(names))}[/dim]")
    return table


def _bandwidth(case: CaseResult) -> str:
    return (
        f"{case.gbs:.1f} GB/s: {_percent(case.percent_of_copy)} % of copy, "
        f"{_percent(case.percent_of_read)} % of read"
    )


def _not_timed(case: CaseResult) -> dict[str, list[str]]:
    """Peers that are absent or were refused, by reason."""
    reasons: dict[str, list[str]] = {}
    for result in case.contestants:
        if result.status != "timed":
            reasons.setdefault(_time_cell(result), []).append(result.name)
    return reasons


def _style(result: ContestantResult) -> str:
    if result.kind == "ours":
        return "bold cyan"
    return "red" if result.kind == "peer" and result.verdict == "flcore slower" else ""


# ---- files ---------------------------------------------------------------------------------------


def write_json(report: Report, path: str | Path) -> None:
    """Write the whole report; the layout is described in `flcore.bench.results`."""
    Path(path).write_text(json.dumps(report.to_dict(), indent=1) + "\n")


def write_markdown(report: Report, path: str | Path) -> None:
    """Write the summary and the full tables."""
    Path(path).write_text(markdown(report))


def markdown(report: Report) -> str:
    """Return the report as Markdown: conditions, one summary table, one table a case."""
    return "\n".join([*conditions(report), "", *_summary(report), "", *_details(report)])


def markdown_row(*cells: Any) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def markdown_rule(alignment: str) -> str:
    """Return the row under the head, from a letter a column: r right, anything else left."""
    return markdown_row(*("---:" if side == "r" else "---" for side in alignment))


def conditions(report: Report | Scaling) -> Iterator[str]:
    """Yield the lines about machine, software and threads that belong above every table."""
    yield f"{_hardware(report)}; {report.machine['system']}; Python {report.machine['python']}; "
    yield f"{_versions(report)}.  Threads: {_threads(report)}.  {report.created}."
    if report.settings["tiny"]:
        yield ""
        yield "**Tiny inputs: these times mean nothing, only that every contestant runs.**"


def _summary(report: Report) -> Iterator[str]:
    yield markdown_row(
        *("operation", "inputs", "flcore ms", "best peer", "peer ms", "ratio, 95 % interval"),
        *("GB/s", "% of copy", "% of read"),
    )
    yield markdown_rule("llrlrrrrr")
    for case in report.cases:
        if case.ours is None:
            yield markdown_row(case.title, _state(case), f"{case.status}: {case.reason}", *[""] * 6)
            continue
        peer = case.best_peer()
        yield markdown_row(
            case.title,
            _state(case),
            _ms(case.ours.median_ms),
            f"`{peer.name}`" if peer else "none",
            _ms(peer.median_ms) if peer else "",
            _ratio(peer) if peer else "",
            f"{case.gbs:.1f}",
            _percent(case.percent_of_copy),
            _percent(case.percent_of_read),
        )


def _details(report: Report) -> Iterator[str]:
    for case in report.cases:
        if case.ours is None:
            continue
        yield f"### {case.title}"
        yield ""
        yield (
            f"{_state(case)}; must move {_megabytes(case.bytes_moved)} ({case.formula}); beside it "
            f"the machine read {case.read_gbs:.1f} GB/s and copied {case.copy_gbs:.1f} GB/s."
        )
        if case.note:
            yield case.note
        yield ""
        yield markdown_row("contestant", "ms", "20 to 80 %", "ratio, 95 % interval", "rounds")
        yield markdown_rule("lrrrr")
        for c in case.contestants:
            spread = f"{_ms(c.low_ms)} to {_ms(c.high_ms)}" if c.status == "timed" else ""
            yield markdown_row(f"`{c.name}`", _time_cell(c), spread, _ratio(c), _rounds_cell(c))
        yield ""
