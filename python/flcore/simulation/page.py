"""What the HTML reports share: one page without other files, plots inside it, tables."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any

from flcore._extras import require

__all__ = ["INK", "LINE", "SOFT", "draw", "grid", "html_page", "pairs", "tiles"]

INK, SOFT, LINE = "#1d2733", "#667587", "#2463b8"

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
  td.head { color: #667587; padding-left: 16px; }
  @media (max-width: 520px) { .two { grid-template-columns: 1fr; } }
</style>
</head>
<body><main>
<h1>$title</h1>
<p class="lead">$lead</p>
$body
<footer>$footer</footer>
</main></body></html>
"""
)


def html_page(title: str, lead: str, body: str, footer: str) -> str:
    """Give a page; `body` is HTML, the others are text."""
    return PAGE.substitute(title=escape(title), lead=escape(lead), body=body, footer=escape(footer))


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Give a row of large figures, each with what it is."""
    cards = "".join(
        f'<div class="card tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for value, name in figures
    )
    return f'<div class="tiles">{cards}</div>'


def draw(plot: Any, what: Any) -> str:
    """Give an image element of ``plot(axes, what)``.

    As an image, the SVG's ids cannot clash with those of another.
    """
    matplotlib = require("matplotlib", extra="train")
    with matplotlib.rc_context(STYLE):
        figure = require("matplotlib.figure", extra="train").Figure(
            figsize=(5.2, 3.1), layout="constrained"
        )
        plot(figure.subplots(), what)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    name = plot.__name__.strip("_").replace("_", " ")
    return f'<img alt="{name}" src="data:image/svg+xml;base64,{data}">'


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Give a table of names and values."""
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f"<table>{body}</table>"


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Give a table with a head, its first row."""
    head, *body = rows
    lines = [
        f"<tr><th>{escape(head[0])}</th>"
        + "".join(f'<td class="head">{escape(name)}</td>' for name in head[1:])
        + "</tr>",
        *(
            f"<tr><th>{escape(first)}</th>"
            + "".join(f"<td>{escape(value)}</td>" for value in others)
            + "</tr>"
            for first, *others in body
        ),
    ]
    return f"<table>{''.join(lines)}</table>"
