"""`flcore bench`: times flcore beside what its users run today, and prints one table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from flcore.bench import Case, Plan, Setup
    from flcore.bench.runner import Progress as Tell

__all__ = ["bench"]

# A redraw every fifth of a second costs nothing measurable and is smooth enough.
REDRAW_S = 0.2

# Not a family of cases: one table of all rules against the number of clients.
SCALING = "scaling"
# Not timed at all: accuracy and bytes of training runs, and accuracy over training steps.
TRAINING = "training"
GROKKING = "grokking"
QUANTIZED = "quantized-transformer"
DIGITS_HARD = "digits-hard"
ATTACKS = "attacks"

_Found = TypeVar("_Found")


class _Files(NamedTuple):
    """Where results go besides the terminal, None: nowhere."""

    json: Path | None
    markdown: Path | None
    plot: Path | None

    def write(
        self,
        found: _Found,
        text: str,
        write_json: Callable[[_Found, Path], None],
        draw: Callable[[_Found, Path], None],
    ) -> None:
        """Write `found` as numbers and as a plot, and `text`, which tells it in Markdown."""
        if self.json is not None:
            write_json(found, self.json)
        if self.markdown is not None:
            self.markdown.write_text(text)
        if self.plot is not None:
            draw(found, self.plot)


def bench(
    family: Annotated[
        str | None,
        typer.Argument(
            help="A family or one case; everything if left out. "
            "'scaling': the rules against the number of clients; "
            "'training': accuracy and bytes of codecs and error controls (ten minutes); "
            "'grokking': test accuracy of modular addition with and without projected gradients "
            "and StableMax (half an hour); "
            "'quantized-transformer': loss of a small transformer in low bits, with and without "
            "AWQ and OS+ (ten minutes); "
            "'digits-hard': federated algorithms on very unlike clients (a minute); "
            "'attacks': robust rules with a fifth of attackers (ten minutes)."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers to this file.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write tables in Markdown to this file.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="scaling, training, grokking, quantized-transformer, digits-hard: draw into this "
            "file.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="quantized-transformer: text to train on; the help pages of Python if left out.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of every contestant; all if left out.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A second or two a case, without torch.compile.")
    ] = False,
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="Small inputs: checks that all runs; the times mean nothing."),
    ] = False,
    max_seconds: Annotated[
        float | None,
        typer.Option(min=1.0, help="Timed seconds a case with slow contestants may take."),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="With torch.compile peers (slow to start)."),
    ] = None,
    list_cases: Annotated[
        bool, typer.Option("--list", help="List families and cases, and stop.")
    ] = False,
) -> None:
    """Time flcore beside NumPy, torch and others, taking turns call by call.

    Every contestant is verified before it is timed.

    Ratios are medians of pairs, with a 95 % interval.

    Percentages compare with the bandwidth measured in the same rounds.
    """
    from flcore.bench import Plan, Setup, run, select, terminal_table, write_json, write_markdown
    from flcore.bench.environment import thread_count

    console = Console()
    plan = Plan.quick() if quick or tiny else Plan()
    if max_seconds is not None:
        plan = replace(plan, max_s=max_seconds)
    if text is not None and family != QUANTIZED:
        raise typer.BadParameter(f"only {QUANTIZED!r} reads a text", param_hint="--text")
    files = _Files(json, markdown, plot)
    if family == SCALING:
        if device != "cpu":
            raise typer.BadParameter("scaling runs on the cpu", param_hint="--device")
        setup = Setup(threads=thread_count(threads), tiny=tiny)
        return _scaling(console, setup, plan, files)
    if family == TRAINING:
        return _training(tiny, files)
    if family == GROKKING:
        return _grokking(tiny, files)
    if family == QUANTIZED:
        return _quantized(tiny, text, files)
    if family == DIGITS_HARD:
        return _digits_hard(tiny, files)
    if family == ATTACKS:
        return _attacks(tiny, files)
    if plot is not None:
        raise typer.BadParameter(
            f"only {SCALING!r}, {TRAINING!r}, {GROKKING!r}, {QUANTIZED!r} and {DIGITS_HARD!r} "
            "have a plot",
            param_hint="--plot",
        )
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {device!r}", param_hint="--device")
    try:
        cases = select(family, device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="family") from None
    if list_cases:
        console.print(_case_table(cases))
        return
    if device == "cuda":
        _require_gpu()

    setup = Setup(
        device=device,
        threads=thread_count(threads),
        tiny=tiny,
        compiled=not (quick or tiny) if compiled is None else compiled,
    )
    with _progress_bar(len(cases)) as tell:
        report = run(cases, setup, plan, tell)
    console.print(terminal_table(report))
    if json is not None:
        write_json(report, json)
    if markdown is not None:
        write_markdown(report, markdown)
    if report.failed():
        names = ", ".join(case.name for case in report.failed())
        Console(stderr=True).print(f"[red]failed:[/red] {names}")
        raise typer.Exit(1)


def _scaling(console: Console, setup: Setup, plan: Plan, files: _Files) -> None:
    from flcore.bench import scaling_report as report
    from flcore.bench.scaling import run_scaling

    with _progress_bar(None) as tell:
        scaling = run_scaling(setup, plan, tell)
    console.print(report.scaling_table(scaling))
    text = report.scaling_markdown(scaling)
    files.write(scaling, text, report.write_scaling_json, report.draw)


def _training(tiny: bool, files: _Files) -> None:
    from flcore.bench import training

    seeds, rounds = (1, 2) if tiny else (4, training.ROUNDS)
    with _progress_bar(None) as tell:
        rows = training.run_training(seeds, rounds, tell)
    text = training.training_markdown(rows)
    Console().print(text, markup=False, soft_wrap=True)
    files.write(rows, text, training.write_training_json, training.draw)


def _grokking(tiny: bool, files: _Files) -> None:
    from flcore.bench import grokking

    scenes: tuple[grokking.Scene, ...] = grokking.SCENES
    if tiny:
        scenes = tuple(replace(scene, p=7, steps=4, every=2) for scene in scenes)
    with _progress_bar(None) as tell:
        runs = grokking.run_grokking((0,) if tiny else (0, 1, 2), scenes, tell)
    text = grokking.grokking_markdown(runs)
    Console().print(text, markup=False, soft_wrap=True)
    files.write(runs, text, grokking.write_grokking_json, grokking.draw)


def _quantized(tiny: bool, text: Path | None, files: _Files) -> None:
    from flcore.bench import quantized_transformer as quantized
    from flcore.errors import InvalidInputError

    size, seeds = (quantized.tiny(), (0,)) if tiny else (None, (0, 1, 2))
    try:
        with _progress_bar(None) as tell:
            rows = quantized.run_quantized_transformer(text, seeds, size, tell=tell)
    except InvalidInputError as error:
        raise typer.BadParameter(str(error), param_hint="--text") from None
    table = quantized.quantized_transformer_markdown(rows)
    Console().print(table, markup=False, soft_wrap=True)
    files.write(rows, table, quantized.write_quantized_transformer_json, quantized.draw)


def _digits_hard(tiny: bool, files: _Files) -> None:
    from flcore.bench import digits_hard

    seeds, rounds = ((0,), 2) if tiny else ((0, 1, 2, 3), digits_hard.ROUNDS)
    with _progress_bar(None) as tell:
        rows = digits_hard.run_digits_hard(seeds, rounds=rounds, tell=tell)
    text = digits_hard.digits_hard_markdown(rows)
    Console().print(text, markup=False, soft_wrap=True)
    files.write(rows, text, digits_hard.write_digits_hard_json, digits_hard.draw)


def _attacks(tiny: bool, files: _Files) -> None:
    from flcore.bench import attacks

    if files.plot is not None:
        raise typer.BadParameter(f"{ATTACKS!r} has no plot", param_hint="--plot")
    seeds, rounds = ((0,), 1) if tiny else ((0, 1, 2, 3), attacks.ROUNDS)
    with _progress_bar(None) as tell:
        rows = attacks.run_attacks(seeds, rounds=rounds, tell=tell)
    text = attacks.attacks_markdown(rows)
    Console().print(text, markup=False, soft_wrap=True)
    files.write(rows, text, attacks.write_attacks_json, lambda rows, path: None)


def _require_gpu() -> None:
    from flcore._extras import require

    if not require("torch", "torch").cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device here", param_hint="--device")


def _case_table(cases: list[Case]) -> Table:
    table = Table(title="flcore bench [FAMILY | CASE]", title_style="")
    table.add_column("case", no_wrap=True)
    table.add_column("operation, and the bytes it must move", overflow="fold")
    table.add_column("runs on", no_wrap=True)
    for family in dict.fromkeys(case.family for case in cases):
        table.add_section()
        table.add_row(f"[bold]{family}[/bold]")
        for case in (case for case in cases if case.family == family):
            what = f"{case.title}\n[dim]{case.formula}[/dim]"
            table.add_row(f"  {case.name}", what, ", ".join(case.devices))
    return table


@contextmanager
def _progress_bar(total: int | None) -> Iterator[Tell]:
    """Draw a bar that is only redrawn between timed calls, never by a thread beside them."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    task = bar.add_task("", total=total)
    shown: tuple[str, str] = ("", "")
    drawn_at = 0.0

    def tell(number: int, count: int, name: str, stage: str, fraction: float) -> None:
        nonlocal shown, drawn_at
        now = time.monotonic()
        if (name, stage) == shown and now - drawn_at < REDRAW_S:
            return
        shown, drawn_at = (name, stage), now
        done = f" {fraction:.0%}" if fraction else ""
        bar.update(task, completed=number, total=count, description=f"{name}: {stage}{done}")
        bar.refresh()

    with bar:
        yield tell
