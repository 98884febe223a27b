"""`flcore info`: what was built, what this machine can run, what was chosen."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flcore._info import build_info, report

__all__ = ["info"]


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, instruction sets, threads and devices: the report to paste into an issue."""
    typer.echo(json.dumps(build_info(), indent=2) if as_json else report())
