"""`flcore compare`: algorithms under equal conditions; `flcore algorithms`: what there is."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flcore._extras import require
from flcore.algorithms import FedAvg, available
from flcore.cli.train_display import console, show_error
from flcore.cli.train_options import LEARNING, settings_of
from flcore.errors import FlcoreError, InvalidInputError
from flcore.simulation import Settings
from flcore.simulation.attacks import ATTACKS
from flcore.simulation.compare import Comparison, Outcome, compare, entry_from_text
from flcore.simulation.compare_report import write_comparison

__all__ = ["algorithms", "compare_command"]

SETTING = Settings(rounds=60, codec=None, feedback=None)
LEARN = {name: getattr(FedAvg(), field) for name, field in LEARNING.items()}


def compare_command(
    ctx: typer.Context,
    entries: Annotated[
        list[str],
        typer.Argument(
            metavar="ALGORITHM[:KEY=VALUE,...][@RULE]...",
            help="What to compare: names from 'flcore algorithms', with options of their own, and "
            "with an aggregation rule if wanted: fedavg fedspeed:rho=0.3 fedavg@median.",
        ),
    ],
    model: Annotated[str, typer.Option(help="As for 'flcore train'.")] = "mlp",
    dataset: Annotated[str, typer.Option(help="As for 'flcore train'.")] = "digits",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with different seeds.")] = 4,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in its process.")] = 1,
    target: Annotated[
        float, typer.Option(help="Accuracy to which rounds and megabytes are counted, 0 to 1.")
    ] = 0.95,
    rounds: Annotated[int, typer.Option(help="Rounds of each run.")] = SETTING.rounds,
    clients: Annotated[int, typer.Option(help="Number of clients.")] = SETTING.clients,
    participation: Annotated[
        str, typer.Option(help="Clients in each round: a count, or a share of all (10%).")
    ] = str(SETTING.participation),
    alpha: Annotated[
        str, typer.Option(help="Dirichlet concentration of the classes at a client, or iid.")
    ] = str(SETTING.alpha),
    partition: Annotated[
        str | None, typer.Option(help="As for 'flcore train', in the place of --alpha.")
    ] = None,
    dropout: Annotated[
        float, typer.Option(help="Probability that a drawn client does not answer.")
    ] = 0.0,
    stragglers: Annotated[
        float, typer.Option(help="Probability that a client does only a part of its steps.")
    ] = 0.0,
    label_noise: Annotated[
        float, typer.Option(help="Share of training labels that are wrong.")
    ] = 0.0,
    attack: Annotated[
        str | None, typer.Option(help=f"What --attackers send: {', '.join(ATTACKS)}.")
    ] = None,
    attackers: Annotated[str, typer.Option(help="Clients that lie: a count or a share.")] = "0",
    local_epochs: Annotated[
        int, typer.Option(help="Passes over its data that a client makes in a round.")
    ] = LEARN["local_epochs"],
    batch_size: Annotated[int, typer.Option(help="Examples in a mini-batch.")] = LEARN[
        "batch_size"
    ],
    lr: Annotated[float, typer.Option(help="Learning rate in the first round.")] = LEARN["lr"],
    lr_decay: Annotated[float, typer.Option(help="Factor on it after every round.")] = LEARN[
        "lr_decay"
    ],
    weight_decay: Annotated[float, typer.Option(help="Decay added to each gradient.")] = LEARN[
        "weight_decay"
    ],
    clip: Annotated[float, typer.Option(help="Largest norm of a gradient; 0: no limit.")] = LEARN[
        "clip"
    ],
    weighting: Annotated[str, typer.Option(help="examples or uniform.")] = "uniform",
    compressor: Annotated[str, typer.Option(help="As for 'flcore train'.")] = "none",
    ratio: Annotated[float, typer.Option(help="Share of the values that is sent.")] = 0.1,
    error_control: Annotated[str, typer.Option(help="As for 'flcore train'.")] = "none",
    aggregation: Annotated[
        str, typer.Option(help="Rule of the entries that name none with @.")
    ] = "mean",
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for report.html, table.md and results.json.",
            show_default="the next free runs/compare-NUMBER",
        ),
    ] = None,
) -> None:
    """Run several algorithms on the same clients and write one report.

    With the same seed all of them see the same model, the same split of the data and the same
    participants, and all take the same local steps unless an entry says otherwise
    (fedbn:local_lr=0.01). Without options: 60 rounds on digits, one or two of the ten to each of 50
    clients.
    """
    options = dict(ctx.params)
    try:
        require("matplotlib", extra="train")
        learning = {field: options[name] for name, field in LEARNING.items() if name in options}
        learning["clip"] = learning["clip"] or None
        lines = [entry_from_text(text, **learning) for text in entries]
        settings = settings_of({**SETTINGS, **options})
        folder = _folder(output)
        comparison = _run(lines, options, settings)
    except FlcoreError as error:
        show_error(error)
        raise typer.Exit(1) from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(comparison.to_markdown(), encoding="utf-8")
    (folder / "results.json").write_text(comparison.to_json(), encoding="utf-8")
    write_comparison(comparison, folder / "report.html")
    _show(comparison, folder)


SETTINGS: dict[str, Any] = {
    "eta": "auto",
    **{
        name: getattr(SETTING, name)
        for name in (
            "control_step",
            "loss",
            "optimizer",
            "base_bits",
            "lora",
            "execution",
            "accumulate",
            "threads",
            "checkpoint_every",
        )
    },
}
"""Settings that a comparison leaves as they are."""


def _run(lines: list[Any], options: dict[str, Any], settings: Settings) -> Comparison:
    total = len(lines) * options["seeds"]
    bar = Progress(
        TextColumn("run {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        expand=True,
    )
    with bar:
        task = bar.add_task("", total=total)

        def tell(outcome: Outcome, done: int, all: int) -> None:
            what = outcome.failure or f"{outcome.history.mean_accuracy():.1%}"
            text = f"{outcome.label}, seed {outcome.seed}: {what}"
            bar.update(task, completed=done, description=text)

        return compare(
            lines,
            options["model"],
            options["dataset"],
            settings,
            seeds=options["seeds"],
            jobs=options["jobs"],
            target=options["target"],
            tell=tell,
        )


def _folder(output: Path | None) -> Path:
    if output is None:
        return next(p for n in itertools.count(1) if not (p := Path(f"runs/compare-{n}")).exists())
    if (output / "results.json").exists():
        raise InvalidInputError(f"output: {output} already holds a comparison; choose another")
    return output


def _show(comparison: Comparison, folder: Path) -> None:
    head, *body = comparison.table()
    table = Table(head[0])
    table.columns[0].overflow = "fold"
    for name in head[1:]:
        table.add_column(name, justify="right")
    for line in body:
        table.add_row(*line)
    console.print(table)
    for outcome in comparison.outcomes:
        if outcome.failure:
            console.print(
                f"{outcome.label}, seed {outcome.seed}: {outcome.failure}", style="yellow"
            )
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def algorithms(
    name: Annotated[str | None, typer.Argument(help="Show the options of this one.")] = None,
) -> None:
    """List the algorithms, or the options of one."""
    classes = available()
    if name is not None and name.lower() not in classes:
        show_error(
            InvalidInputError(
                f"algorithm: there is no {name!r}; choose one of: {', '.join(sorted(classes))}"
            )
        )
        raise typer.Exit(1)
    if name is None:
        table = Table("name", "what", "own options")
        common = {field.name for field in fields(FedAvg)}
        for key, kind in sorted(classes.items()):
            own = [field.name for field in fields(kind) if field.name not in common]
            table.add_row(key, (inspect.getdoc(kind) or "").splitlines()[0], ", ".join(own))
        console.print(table)
        return
    kind = classes[name.lower()]
    console.print(inspect.getdoc(kind), markup=False, highlight=False)
    table = Table("option", "default")
    for field in fields(kind):
        table.add_row(field.name, repr(field.default))
    console.print(table)
