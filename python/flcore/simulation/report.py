"""One page about a run: figures, plots and settings in a single HTML file."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore.simulation.history import PHASES, History, summary
from flcore.simulation.page import LINE, draw, html_page, pairs, tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["dealt", "running_mean", "write_report"]

PHASE_COLOURS = ("#2463b8", "#e08a1e", "#3a9a6b", "#a05fb0")
HALF_WINDOW = 3
SMOOTHED_LABEL = f"mean over {2 * HALF_WINDOW + 1} rounds"

BODY = Template(
    """$tiles
<div class="two">
<section class="card"><h2>Test accuracy per round</h2>$accuracy</section>
<section class="card"><h2>Test accuracy per megabyte of uplink</h2>$megabytes</section>
</div>
<div class="two">
<section class="card"><h2>Test and training loss</h2>$loss</section>
<section class="card"><h2>Time per phase</h2>$phases</section>
</div>
<div class="three">
<section class="card"><h2>Result</h2>$result</section>
<section class="card"><h2>Data and algorithm</h2>$learning</section>
<section class="card"><h2>Run</h2>$settings</section>
</div>
"""
)


def write_report(history: History, path: str | Path) -> None:
    """Write the report of a run of at least one round.

    Parameters
    ----------
    history : History
    path : path
        The HTML file; it needs no other file and no network.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    config = history.config
    settings = config["settings"]
    dataset = Path(config["dataset"]["name"]).name
    title = f"{config['algorithm']['name']} on {dataset}"
    split = dealt(settings)
    lead = (
        f"{len(history)} rounds, {settings['clients']} clients with {split}, "
        f"{len(history[0].clients)} of them a round; model {config['model']['name']} with "
        f"{config['model']['parameters']:,} parameters; seed {settings['seed']}"
    )
    figures = [
        (f"{history.accuracy:.1%}", "test accuracy, last round"),
        (f"{history.mean_accuracy():.1%}", "mean of the last 10 rounds"),
        (f"{history.bytes_up / 1e6:.2f} MB", "sent by the clients"),
        (f"{history.bytes_dense / history.bytes_up:.1f} x", "less than float32 updates"),
    ]
    body = BODY.substitute(
        tiles=tiles(figures),
        accuracy=draw(_accuracy_per_round, history),
        megabytes=draw(_accuracy_per_megabyte, history),
        loss=draw(_loss_per_round, history),
        phases=draw(_seconds_per_round, history),
        result=pairs(summary(history)),
        learning=pairs(_learning_rows(config)),
        settings=pairs([(_spaced(name), _plain(value)) for name, value in settings.items()]),
    )
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    footer = f"{versions}. Data fingerprint {config['dataset']['fingerprint']}."
    Path(path).write_text(html_page(title, lead, body, footer), encoding="utf-8")


def dealt(settings: dict[str, Any]) -> str:
    """Say how the data of a run was dealt."""
    if settings.get("partition"):
        return f"data dealt {settings['partition']}"
    return "IID data" if settings["alpha"] is None else f"Dirichlet({settings['alpha']:g}) data"


# ---- plots ----


def _accuracy_per_round(axes: Axes, history: History) -> None:
    rounds = [record.round for record in history]
    _accuracy_line(axes, rounds, history)
    axes.set_xlabel("round")


def _accuracy_per_megabyte(axes: Axes, history: History) -> None:
    sent = np.cumsum([record.bytes_up for record in history]) / 1e6
    _accuracy_line(axes, sent, history)
    axes.set_xlabel("sent by all clients so far, MB")


def _accuracy_line(axes: Axes, x: Any, history: History) -> None:
    accuracy = np.array([record.accuracy for record in history])
    axes.plot(x, 100 * accuracy, color=LINE, alpha=0.45, linewidth=1.2, label="each round")
    axes.plot(x, 100 * running_mean(accuracy), color=LINE, linewidth=2, label=SMOOTHED_LABEL)
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(top=101)
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")


def _loss_per_round(axes: Axes, history: History) -> None:
    rounds = [record.round for record in history]
    axes.plot(rounds, [r.loss for r in history], color=LINE, linewidth=1.6, label="test")
    train = [r.train_loss for r in history]
    axes.plot(rounds, train, color="#e08a1e", linewidth=1.6, label="clients, during training")
    axes.set_xlabel("round")
    axes.set_ylabel("cross-entropy")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")


def _seconds_per_round(axes: Axes, history: History) -> None:
    rounds = [record.round for record in history]
    bottom = np.zeros(len(rounds))
    totals = history.seconds()
    for (phase, name), colour in zip(PHASES.items(), PHASE_COLOURS, strict=True):
        height = 1e3 * np.array([record.seconds[phase] for record in history])
        label = f"{name}, {totals[phase]:.2f} s in all"
        axes.bar(rounds, height, 1.0, bottom, color=colour, label=label)
        bottom += height
    axes.set_xlabel("round")
    axes.set_ylabel("milliseconds")
    axes.set_xlim(0.5, len(rounds) + 0.5)
    axes.set_ylim(top=1.55 * float(np.quantile(bottom, 0.98)))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right", fontsize=8.5, ncols=2)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value and up to `HALF_WINDOW` on either side, as many on one as on the other."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    here = np.arange(len(values))
    reach = np.minimum(np.minimum(here, len(values) - 1 - here), HALF_WINDOW)
    return (total[here + reach + 1] - total[here - reach]) / (2 * reach + 1)


# ---- tables ----


def _learning_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    data, model = config["dataset"], config["model"]
    fewest, most = data["examples_per_client"]
    algorithm = dict(config["algorithm"])
    return [
        ("data", Path(data["name"]).name),
        ("training examples", f"{data['train']:,}"),
        ("test examples", f"{data['test']:,}"),
        ("examples per client", f"{fewest}" if fewest == most else f"{fewest} to {most}"),
        ("model", model["name"]),
        ("parameters", f"{model['parameters']:,}"),
        ("algorithm", algorithm.pop("name")),
        ("loss", f"{config['settings']['loss']} cross-entropy"),
        ("optimizer", config["settings"]["optimizer"]),
        *((_spaced(name), _plain(value)) for name, value in algorithm.items()),
    ]


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _plain(value: Any) -> str:
    """Give a setting as text; a codec, whose first entry is its name, as ``name(option=...)``."""
    if isinstance(value, dict):
        (_, name), *options = value.items()
        return f"{name}({', '.join(f'{k}={v}' for k, v in options if v is not None)})"
    return "none" if value is None else str(value)
