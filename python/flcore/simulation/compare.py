"""Several algorithms under equal conditions: `compare`.

Runs with the same seed see the same model, the same split of the data and the same participants, so
that what differs is the algorithm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from flcore.algorithms import Algorithm, create
from flcore.compression._settings import read_value
from flcore.errors import InvalidInputError
from flcore.simulation.datasets import Dataset
from flcore.simulation.engine import Observer, run
from flcore.simulation.errors import DivergedError
from flcore.simulation.history import History
from flcore.simulation.settings import Settings

__all__ = ["Comparison", "Entry", "Outcome", "compare", "entry_from_text"]


@dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Parameters
    ----------
    label : str
    algorithm : Algorithm
    aggregation : str, optional
        A rule as text, in the place of the one in the settings.
    """

    label: str
    algorithm: Algorithm
    aggregation: str | None = None


def entry_from_text(text: str, **learning: Any) -> Entry:
    """Read ``ALGORITHM[:KEY=VALUE,...][@RULE]``, such as ``fedspeed:rho=0.3@median``.

    Parameters
    ----------
    text : str
        Also the label of the entry.
    learning
        Options of all entries, which those in the text precede; an algorithm that has no such
        option goes without.

    Raises
    ------
    InvalidInputError
        If there is no such algorithm or option.
    """
    from flcore.algorithms import available

    what, _, rule = text.partition("@")
    name, _, rest = what.partition(":")
    own = parse_pairs(rest.split(",") if rest else [])
    kind = available().get(name.strip().lower())
    known = {field.name for field in fields(kind)} if kind else set(learning)
    options = {key: value for key, value in learning.items() if key in known}
    return Entry(text, create(name.strip(), **(options | own)), rule or None)


def parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs; values are numbers, true, false, none, or else text."""
    words = {"true": True, "false": False, "none": None}
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise InvalidInputError(f"option: expected KEY=VALUE, got {pair!r}")
        value = words[text.lower()] if text.lower() in words else read_value(text)
        parsed[key.replace("-", "_")] = value
    return parsed


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Parameters
    ----------
    label : str
        Of its entry.
    seed : int
    history : History
        All rounds; those before it broke off, if it did.
    failure : str, optional
        Why it broke off.
    """

    label: str
    seed: int
    history: History
    failure: str | None = None


@dataclass
class Comparison:
    """All runs of a comparison.

    Parameters
    ----------
    outcomes : list of Outcome
    labels : list of str
        Of the entries, in order.
    target : float
        Accuracy, 0 to 1, to which rounds and bytes are counted.
    """

    outcomes: list[Outcome]
    labels: list[str]
    target: float

    def of(self, label: str) -> list[Outcome]:
        """Runs of one entry, by seed."""
        return sorted((o for o in self.outcomes if o.label == label), key=lambda o: o.seed)

    def accuracies(self, label: str, last: int = 10) -> list[float]:
        """Mean accuracy over the last rounds of each run of one entry; NaN where it diverged."""
        return [math.nan if o.failure else o.history.mean_accuracy(last) for o in self.of(label)]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row an entry: figures over its seeds.

        ``rounds`` and ``megabytes`` are those to the target, None for a seed that never got there.
        """
        for label in self.labels:
            runs = self.of(label)
            accuracy = self.accuracies(label)
            yield {
                "label": label,
                "accuracy": fmean(accuracy),
                "deviation": stdev(accuracy) if len(accuracy) > 1 else 0.0,
                "rounds": [o.history.rounds_to(self.target) for o in runs],
                "megabytes": [_mega(o.history.bytes_to(self.target)) for o in runs],
                "up": fmean(o.history.bytes_up for o in runs) / 1e6,
                "down": fmean(o.history.bytes_down for o in runs) / 1e6,
                "seconds": fmean(sum(o.history.seconds().values()) for o in runs),
                "failures": [o.failure for o in runs if o.failure],
            }

    def table(self) -> list[list[str]]:
        """Give the report's table, its head first; accuracy is the mean of the last ten rounds."""
        head = [
            "algorithm",
            "accuracy, %",
            f"rounds to {self.target:.0%}",
            f"MB both ways to {self.target:.0%}",
            "MB up",
            "MB down",
            "seconds a run",
        ]
        body = []
        for row in self.rows():
            megabytes = [value for value in row["megabytes"] if value is not None]
            body.append(
                [
                    row["label"],
                    "diverged"
                    if math.isnan(row["accuracy"])
                    else f"{100 * row['accuracy']:.2f} ± {100 * row['deviation']:.2f}",
                    ", ".join("-" if value is None else str(value) for value in row["rounds"]),
                    f"{fmean(megabytes):.2f}" if len(megabytes) == len(row["megabytes"]) else "-",
                    f"{row['up']:.2f}",
                    f"{row['down']:.2f}",
                    f"{row['seconds']:.1f}",
                ]
            )
        return [head, *body]

    def to_markdown(self) -> str:
        """Give the table as Markdown."""
        head, *body = self.table()
        align = ["---", *["---:"] * (len(head) - 1)]
        return "".join(f"| {' | '.join(line)} |\n" for line in (head, align, *body))

    def to_json(self) -> str:
        """Give every round of every run, and the rows of the table."""
        runs = [
            {
                "label": o.label,
                "seed": o.seed,
                "failure": o.failure,
                "config": o.history.config,
                "rounds": [json.loads(record.to_json()) for record in o.history],
            }
            for o in self.outcomes
        ]
        return json.dumps(
            {"target": self.target, "rows": list(self.rows()), "runs": runs}, indent=1
        )


def compare(
    entries: Sequence[Entry],
    model: Any = "mlp",
    data: str | Path | Dataset = "digits",
    settings: Settings | None = None,
    *,
    seeds: int = 4,
    jobs: int = 1,
    target: float = 0.95,
    tell: Callable[[Outcome, int, int], None] | None = None,
) -> Comparison:
    """Run every entry with every seed.

    Parameters
    ----------
    entries : list of Entry
    model, data, settings
        As for `run`; the settings' seed is the first of the seeds.
    seeds : int
        Runs an entry.
    jobs : int
        Runs at a time, each in a process of its own when there are more than one.
    target : float
        See `Comparison`.
    tell : callable, optional
        Called with each outcome, the number of runs done and of all.

    Raises
    ------
    InvalidInputError
        If there is no entry, two are called the same, or a setting makes no sense.

    Notes
    -----
    A run that diverges is reported, and does not stop the others.
    """
    settings = settings or Settings(codec=None, feedback=None)
    labels = [entry.label for entry in entries]
    if not labels or len(set(labels)) < len(labels):
        raise InvalidInputError(f"entries: expected at least one, no two alike, got {labels}")
    if seeds < 1 or jobs < 1:
        raise InvalidInputError(f"seeds, jobs: expected at least 1, got {seeds} and {jobs}")
    tasks = [
        (entry, model, data, _settings(entry, settings, seed))
        for seed in range(seeds)
        for entry in entries
    ]
    outcomes: list[Outcome] = []
    for outcome in _all(tasks, jobs):
        outcomes.append(outcome)
        if tell:
            tell(outcome, len(outcomes), len(tasks))
    outcomes.sort(key=lambda o: (labels.index(o.label), o.seed))
    return Comparison(outcomes, labels, target)


Task = tuple[Entry, Any, Any, Settings]


def _all(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(_outcome, tasks)
        return
    # a fresh interpreter each: one OpenMP runtime must not be forked with threads in it
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_outcome, task) for task in tasks]):
            yield future.result()


def _outcome(task: Task) -> Outcome:
    entry, model, data, settings = task
    record = _Partial()
    try:
        history = run(entry.algorithm, model, data, settings, observer=record)
    except DivergedError as error:
        return Outcome(entry.label, settings.seed, record.history, str(error))
    return Outcome(entry.label, settings.seed, history)


class _Partial(Observer):
    """Keeps what there is of a run that breaks off."""

    def started(self, history: History) -> None:
        self.history = history


def _settings(entry: Entry, settings: Settings, seed: int) -> Settings:
    rule = entry.aggregation
    changes: dict[str, Any] = (
        {} if rule is None else {"aggregation": None if rule == "mean" else rule}
    )
    return replace(settings, seed=settings.seed + seed, **changes)


def _mega(count: int | None) -> float | None:
    return None if count is None else count / 1e6
