"""One page about a run: figures, plots and settings in a single HTML file."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore._extras import require
from flcore.simulation.history import PHASES, History, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_report"]

INK, SOFT, LINE = "#1d2733", "#667587", "#2463b8"
PHASE_COLOURS = ("#2463b8", "#e08a1e", "#3a9a6b", "#a05fb0")
HALF_WINDOW = 3
SMOOTHED_LABEL = f"mean over {2 * HALF_WINDOW + 1} rounds"

STYLE = {
    "font.size": 10,
    "axes.edgecolor": "#c5ced8",
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8edf2",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "flcore",
}

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  :root { color-scheme: light; }
  body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
         color: #1d2733; background: #f4f6f9; margin: 0; }
  main { max-width: 1060px; margin: 0 auto; padding: 32px 24px 48px; }
  h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -.01em; }
  h2 { font-size: 16px; margin: 0 0 10px; }
  p.lead { color: #667587; margin: 0 0 24px; }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr));
           gap: 14px; margin-bottom: 14px; }
  .card { background: #fff; border: 1px solid #e3e8ee; border-radius: 10px; padding: 18px 20px; }
  .tile b { display: block; font-size: 27px; line-height: 1.2; letter-spacing: -.02em;
            font-variant-numeric: tabular-nums; }
  .tile span { color: #667587; font-size: 13px; }
  .two, .three { display: grid; gap: 14px; margin-bottom: 14px; }
  .two { grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); }
  .three { grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); }
  img { width: 100%; display: block; }
  table { width: 100%; border-collapse: collapse; font-size: 14px; }
  td, th { padding: 5px 0; border-top: 1px solid #eef1f5; text-align: left; font-weight: 400;
           vertical-align: top; }
  tr:first-child td, tr:first-child th { border-top: 0; }
  th { color: #667587; padding-right: 16px; }
  td { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
  footer { color: #667587; font-size: 12.5px; margin-top: 18px; }
  @media (max-width: 520px) { .two { grid-template-columns: 1fr; } }
</style>
</head>
<body><main>
<h1>$title</h1>
<p class="lead">$lead</p>
<div class="tiles">$tiles</div>
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
<footer>$footer</footer>
</main></body></html>
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
    split = "IID data" if settings["alpha"] is None else f"Dirichlet({settings['alpha']:g}) data"
    lead = (
        f"{len(history)} rounds, {settings['clients']} clients with {split}, "
        f"{len(history[0].clients)} of them a round; model {config['model']['name']} with "
        f"{config['model']['parameters']:,} parameters; seed {settings['seed']}"
    )
    tiles = [
        (f"{history.accuracy:.1%}", "test accuracy, last round"),
        (f"{history.mean_accuracy():.1%}", "mean of the last 10 rounds"),
        (f"{history.bytes_up / 1e6:.2f} MB", "sent by the clients"),
        (f"{history.bytes_down / history.bytes_up:.1f} x", "less than float32 updates"),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    page = PAGE.substitute(
        title=escape(title),
        lead=escape(lead),
        tiles="".join(
            f'<div class="card tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
            for value, name in tiles
        ),
        **_plots(history),
        result=_table(summary(history)),
        learning=_table(_learning_rows(config)),
        settings=_table([(_spaced(name), _plain(value)) for name, value in settings.items()]),
        footer=escape(f"{versions}. Data fingerprint {config['dataset']['fingerprint']}."),
    )
    Path(path).write_text(page, encoding="utf-8")


# ---- plots ----


def _plots(history: History) -> dict[str, str]:
    matplotlib = require("matplotlib", extra="train")
    with matplotlib.rc_context(STYLE):
        return {
            "accuracy": _draw(_accuracy_per_round, history),
            "megabytes": _draw(_accuracy_per_megabyte, history),
            "loss": _draw(_loss_per_round, history),
            "phases": _draw(_seconds_per_round, history),
        }


def _draw(plot: Any, history: History) -> str:
    """Give an image element; as an image, the SVG's ids cannot clash with those of another."""
    figure = require("matplotlib.figure", extra="train").Figure(
        figsize=(5.2, 3.1), layout="constrained"
    )
    plot(figure.subplots(), history)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="{plot.__name__[1:].replace("_", " ")}" src="data:image/svg+xml;base64,{data}">'
    )


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
    axes.plot(x, 100 * _running_mean(accuracy), color=LINE, linewidth=2, label=SMOOTHED_LABEL)
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


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value and up to `HALF_WINDOW` on either side, as many on one as on the other."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    here = np.arange(len(values))
    reach = np.minimum(np.minimum(here, len(values) - 1 - here), HALF_WINDOW)
    return (total[here + reach + 1] - total[here - reach]) / (2 * reach + 1)


# ---- tables ----


def _table(rows: list[tuple[str, str]]) -> str:
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f"<table>{body}</table>"


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
