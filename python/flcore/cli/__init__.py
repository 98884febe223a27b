"""The command line: one module a command, put together here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flcore._extras import require

if TYPE_CHECKING:
    import typer

__all__ = ["application"]


def application() -> typer.Typer:
    """Return the typer application with every command."""
    typer = require("typer", extra="cli")

    from flcore.cli.bench import bench
    from flcore.cli.compare import algorithms, compare_command
    from flcore.cli.info import info
    from flcore.cli.train import train

    app = typer.Typer(
        name="flcore",
        help="The compute core of federated learning: train, measure, report.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command(rich_help_panel="Commands")(train)
    app.command("compare", rich_help_panel="Commands")(compare_command)
    app.command(rich_help_panel="Commands")(algorithms)
    app.command(rich_help_panel="Commands")(bench)
    app.command(rich_help_panel="Commands")(info)
    return app
