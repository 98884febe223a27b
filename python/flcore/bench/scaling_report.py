"""Turns a `Scaling` into a terminal table, Markdown or a plot.

The table needs `rich`, the plot matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcore._extras import require
from flcore.bench.report import conditions, markdown_row, markdown_rule
from flcore.bench.rules import RULES
from flcore.bench.scaling import Point, Scaling

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["draw", "scaling_markdown", "scaling_table", "write_scaling_json"]


def _clients(scaling: Scaling) -> list[int]:
    return sorted({point.clients for point in scaling.points})


def _by_rule(scaling: Scaling) -> dict[str, list[Point]]:
    """Points of each rule, in the order of the clients."""
    found: dict[str, list[Point]] = {}
    for point in sorted(scaling.points, key=lambda point: point.clients):
        found.setdefault(point.rule, []).append(point)
    return found


def _name(rule: str) -> str:
    return RULES[rule].title.format(f="f")


def _share(point: Point) -> str:
    """`98 % m`: the measured rule runs at 98 % of its memory limit."""
    return f"{100 * point.share.median:.0f} % {point.limit[0]}"


def write_scaling_json(scaling: Scaling, path: str | Path) -> None:
    """Write all numbers; the layout is described in `flcore.bench.scaling`."""
    Path(path).write_text(json.dumps(scaling.to_dict(), indent=1) + "\n")


def scaling_table(scaling: Scaling) -> Table:
    """Build one `rich` table: a row a rule, a column a number of clients."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title="ns per client value, and share of the nearer limit",
        caption="m: memory, a: arithmetic, both measured in the same rounds",
        title_style="",
    )
    table.add_column("rule", overflow="fold")
    for n in _clients(scaling):
        table.add_column(f"n = {n}", justify="right", no_wrap=True)
    for rule, points in _by_rule(scaling).items():
        cells = [f"{p.ns_per_value:.3f}\n[dim]{_share(p)}[/dim]" for p in points]
        table.add_row(escape(_name(rule)), *cells)
    return table


# ---- Markdown ------------------------------------------------------------------------------------


def scaling_markdown(scaling: Scaling) -> str:
    """Return the conditions, the times by number of clients, and all the numbers."""
    return "\n".join([*conditions(scaling), "", *_summary(scaling), "", *_details(scaling)])


def _summary(scaling: Scaling) -> Iterator[str]:
    counts = _clients(scaling)
    yield "ns per client value and share of the nearer limit (m: memory, a: arithmetic):"
    yield ""
    yield markdown_row("rule", *(f"n = {n}" for n in counts))
    yield markdown_rule("l" + "r" * len(counts))
    for rule, points in _by_rule(scaling).items():
        yield markdown_row(
            f"`{_name(rule)}`", *(f"{p.ns_per_value:.3f} ({_share(p)})" for p in points)
        )


def _details(scaling: Scaling) -> Iterator[str]:
    yield markdown_row(
        *("rule", "n", "f", "ms", "20 to 80 %", "GB/s", "% of read", "exchanges"),
        *("differences", "products", "% of arithmetic", "rounds"),
    )
    yield markdown_rule("lrrrrrrrrrrr")
    for rule, points in _by_rule(scaling).items():
        for p in points:
            arithmetic = p.arithmetic_share
            yield markdown_row(
                *(f"`{_name(rule)}`", p.clients, p.f, f"{p.median_ms:.2f}"),
                f"{p.low_ms:.2f} to {p.high_ms:.2f}",
                f"{p.bytes_moved / p.median_ms / 1e6:.1f}",
                f"{100 * p.memory_share.median:.0f}",
                *(p.operations.get(k, "") for k in ("exchanges", "differences", "products")),
                "" if arithmetic is None else f"{100 * arithmetic.median:.0f}",
                p.rounds,
            )


# ---- plot ----------------------------------------------------------------------------------------

_COLUMNS = 4

# Text as text, in one font, keeps an SVG small; with its own salt equal numbers give equal bytes.
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "flcore", "font.sans-serif": ["DejaVu Sans"]}
_MEASURED, _MEMORY, _ARITHMETIC = "#0b6e99", "#888888", "#c25700"


def draw(scaling: Scaling, path: str | Path) -> None:
    """Draw ns per client value against the number of clients, a panel a rule, with both limits.

    Parameters
    ----------
    path : path
        ``.svg`` or another format of matplotlib.

    Raises
    ------
    ImportError
        Without matplotlib; the message names the extra.
    """
    matplotlib: Any = require("matplotlib", "train")
    figure_module: Any = require("matplotlib.figure", "train")
    by_rule = _by_rule(scaling)
    rows = -(-len(by_rule) // _COLUMNS)
    size = 2.6 * _COLUMNS, 1.9 * rows + 0.5
    with matplotlib.rc_context(_STYLE):
        figure = figure_module.Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, _COLUMNS, sharex=True, squeeze=False).ravel()
        for panel, (rule, points) in zip(panels, by_rule.items(), strict=False):
            _panel(panel, rule, points)
        for panel in panels[len(by_rule) :]:
            panel.set_visible(False)
        for panel in panels[: len(by_rule)][-_COLUMNS:]:
            panel.tick_params(labelbottom=True)  # also above a panel that is not there
        lines = max(
            (panel.get_legend_handles_labels() for panel in panels), key=lambda x: len(x[1])
        )
        figure.legend(*lines, loc="outside upper center", ncols=3)
        figure.supylabel("ns per client value", fontsize=9)
        figure.supxlabel("clients", fontsize=9)
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _panel(panel: Any, rule: str, points: list[Point]) -> None:
    n = [p.clients for p in points]
    panel.plot(n, [p.ns_per_value for p in points], "o-", ms=3, c=_MEASURED, label="flcore")
    panel.plot(n, [p.memory_ns for p in points], "--", c=_MEMORY, label="memory")
    if any(p.arithmetic_ns for p in points):
        panel.plot(n, [p.arithmetic_ns for p in points], ":", c=_ARITHMETIC, label="arithmetic")
    panel.set_title(_name(rule), fontsize=8)
    panel.set_xscale("log", base=2)
    panel.set_xticks(n, [str(k) for k in n])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.locator_params(axis="y", nbins=4)
    panel.tick_params(labelsize=7)
