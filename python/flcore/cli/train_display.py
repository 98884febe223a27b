"""What `flcore train` shows: progress while it runs, a table when it is done, errors."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flcore.simulation.budget import advice
from flcore.simulation.engine import Observer
from flcore.simulation.history import PHASES, History, RoundRecord, summary
from flcore.simulation.settings import Settings

__all__ = ["Display", "show_error", "show_result", "show_stopped"]

console = Console()
errors = Console(stderr=True)


class Display(Observer):
    """A progress bar over rounds with accuracy and bytes, and below it the time of each phase.

    Parameters
    ----------
    settings : Settings
        Of the run: the bar moves with each client of a round.
    """

    def __init__(self, settings: Settings) -> None:
        self.stopping = False
        self._settings = settings
        self._rounds = settings.rounds
        self._participants = settings.participants
        self._up = self._down = 0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._progress = Progress(
            TextColumn("round {task.fields[round]}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[accuracy]}", style="bold green"),
            TextColumn("{task.fields[traffic]}"),
            TimeElapsedColumn(),
            TextColumn("eta", style="dim"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task(
            "", total=settings.rounds, round=0, accuracy="", traffic=""
        )
        self._live = Live(self._render(), console=console, refresh_per_second=8)

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.update(self._render(), refresh=True)
        self._live.stop()
        if not console.is_terminal:
            console.print()  # a terminal's cursor is on a new line already

    def started(self, history: History) -> None:
        """Show the rounds that a resumed run has behind it, and warn of a budget too small."""
        if words := advice(self._settings, history.config["model"]["parameters"]):
            errors.print(f"[bold yellow]warning:[/] {escape(words)}", soft_wrap=True)
        for record in history:
            self._add(record)
        self._progress.reset(self._task, total=self._rounds, completed=len(history))

    def client_done(self, client: int) -> None:
        """Move the bar by one client."""
        self._progress.advance(self._task, 1 / self._participants)

    def round_done(self, record: RoundRecord) -> None:
        """Move the bar and bring the numbers up to date."""
        self._add(record)
        self._progress.update(self._task, completed=record.round)
        self._live.update(self._render())

    def should_stop(self) -> bool:
        """Say whether `stop` was called."""
        return self.stopping

    def stop(self) -> None:
        """Ask for the run to stop when its round is complete, and say so."""
        self.stopping = True
        self._live.update(self._render())

    def _add(self, record: RoundRecord) -> None:
        self._up += record.bytes_up
        self._down += record.bytes_down
        for phase in PHASES:
            self._seconds[phase] += record.seconds[phase]
        self._progress.update(
            self._task,
            round=record.round,
            accuracy=f"accuracy {record.accuracy:.1%}",
            traffic=f"up {megabytes(self._up)}  down {megabytes(self._down)}",
        )

    def _render(self) -> Group:
        phases = "   ".join(
            f"{name} {self._seconds[phase]:.1f} s" for phase, name in PHASES.items()
        )
        lines: list[RenderableType] = [self._progress, Text(phases, style="dim")]
        if self.stopping:
            lines.append(
                Text("Stopping after this round; Ctrl-C again stops at once.", style="yellow")
            )
        return Group(*lines)


def show_result(history: History, folder: Path) -> None:
    """Print the table of a complete run, and where its files are."""
    table = Table(title=f"{len(history)} rounds", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in summary(history):
        table.add_row(name, value)
    console.print(table)
    console.print(f"report   {folder / 'report.html'}", highlight=False)
    console.print(f"model    {folder / 'model.safetensors'}", highlight=False)
    if "base" in history.config["model"]:
        console.print(f"base     {folder / 'base.safetensors'}", highlight=False)
    console.print(f"metrics  {folder / 'metrics.jsonl'}", highlight=False)


def show_stopped(folder: Path, history: History | None) -> None:
    """Say where a stopped run stands and how it goes on; None: it stopped inside a round."""
    if history is None:
        where = "at once; it goes on from its last checkpoint"
    else:
        where = f"after round {len(history)} of {history.config['settings']['rounds']}"
    console.print(f"[yellow]Stopped {where}.[/] Continue with:")
    console.print(f"  flcore train --resume --output {folder}", highlight=False, soft_wrap=True)


def show_error(error: Exception) -> None:
    """Print what went wrong, for a person."""
    errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)


def megabytes(count: int) -> str:
    """Give a number of bytes in MB of a million bytes."""
    return f"{count / 1e6:.2f} MB"
