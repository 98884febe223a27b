"""One page about a comparison: the table, and accuracy against rounds and bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore.simulation.compare import Comparison
from flcore.simulation.page import draw, grid, html_page
from flcore.simulation.report import dealt, running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_comparison"]


def write_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write the report of a comparison.

    Parameters
    ----------
    comparison : Comparison
        Of at least one run with a complete round.
    path : path
        The HTML file; it needs no other file and no network.
    """
    config = comparison.outcomes[0].history.config
    settings = config["settings"]
    seeds = len(comparison.of(comparison.labels[0]))
    dataset = Path(config["dataset"]["name"]).name
    lead = (
        f"{settings['rounds']} rounds, {settings['clients']} clients with {dealt(settings)}; model "
        f"{config['model']['name']} with {config['model']['parameters']:,} parameters; "
        f"{seeds} seed{'s' * (seeds > 1)} each, from {settings['seed']}"
    )
    broken = [f"{o.label}, seed {o.seed}: {o.failure}" for o in comparison.outcomes if o.failure]
    body = (
        f'<section class="card">{grid(comparison.table())}</section><br>'
        '<div class="two"><section class="card"><h2>Test accuracy per round</h2>'
        f"{draw(_per_round, comparison)}</section>"
        '<section class="card"><h2>Test accuracy per megabyte, both ways</h2>'
        f"{draw(_per_megabyte, comparison)}</section></div>"
    )
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    footer = "; ".join([*broken, f"{versions}. Lines are means over the seeds, smoothed."])
    title = f"{len(comparison.labels)} algorithms on {dataset}"
    Path(path).write_text(html_page(title, lead, body, footer), encoding="utf-8")


def _per_round(axes: Axes, comparison: Comparison) -> None:
    _lines(axes, comparison, lambda record: 1.0)
    axes.set_xlabel("round")


def _per_megabyte(axes: Axes, comparison: Comparison) -> None:
    _lines(axes, comparison, lambda record: (record.bytes_up + record.bytes_down) / 1e6)
    axes.set_xlabel("sent both ways so far, MB")


def _lines(axes: Axes, comparison: Comparison, cost: Callable[[Any], float]) -> None:
    """Draw accuracy against what rounds cost, a line an entry; broken runs up to where they got."""
    for label in comparison.labels:
        runs = [o.history for o in comparison.of(label)]
        rounds = min(len(history) for history in runs)
        if rounds == 0:
            continue
        accuracy = np.mean([[r.accuracy for r in h.records[:rounds]] for h in runs], axis=0)
        x = np.mean([np.cumsum([cost(r) for r in h.records[:rounds]]) for h in runs], axis=0)
        axes.plot(x, 100 * running_mean(accuracy), linewidth=1.6, label=label)
    axes.axhline(100 * comparison.target, color="#c5ced8", linewidth=1, linestyle="--")
    axes.set_ylabel("test accuracy, %")
    axes.set_xlim(left=0)
    axes.set_ylim(top=101)
    axes.legend(loc="lower right", fontsize=8)
