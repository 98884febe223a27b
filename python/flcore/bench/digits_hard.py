"""Federated algorithms under equal conditions: digits at clients that hold one or two classes.

scikit-learn's digits, an MLP of 64 units, 50 equal clients by Dirichlet(0.05), 5 of them a round,
10 local epochs in batches of 10, 60 rounds, uniform means, float32 updates. A method differs from
the others by its own numbers only, which are those at which it was published to work, or that the
same problem was tuned for. `MILD` are the methods for clients that are less unlike: Dirichlet(0.1),
5 local epochs, 100 rounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flcore._extras import require
from flcore.bench.report import markdown_row, markdown_rule

__all__ = [
    "METHODS",
    "MILD",
    "Method",
    "Row",
    "digits_hard_markdown",
    "draw",
    "run_digits_hard",
    "write_digits_hard_json",
]

ROUNDS, TARGET = 60, 0.95
EARLY = slice(17, 22)
"""Rounds 18 to 22, whose mean is the accuracy at about 20."""


@dataclass(frozen=True)
class Method:
    """An algorithm with its options, and what an independent program found.

    Parameters
    ----------
    label, name : str
    options : dict
    expected, early : float, optional
        Accuracy in percent over the last ten rounds and around round 20, with plain torch loops and
        other random numbers.
    """

    label: str
    name: str
    options: dict[str, Any]
    expected: float | None = None
    early: float | None = None


FAST: dict[str, Any] = {"alpha": 0.3, "local_lr": 0.3}
ADAPTIVE: dict[str, Any] = {"server_lr": 0.03, "tau": 0.01}

METHODS = (
    Method("FedAvg", "fedavg", {}, 95.93, 92.3),
    Method("FedProx, mu 1", "fedprox", {"mu": 1.0}, 94.18, 89.6),
    Method("FedSAM, rho 0.1", "fedsam", {"rho": 0.1}, 96.21, 92.4),
    Method("FedGPS (path), rho 1", "fedgps", {"rho": 1.0}, 96.02, 92.4),
    Method("FedAvgM, beta 0.9", "fedavgm", {"beta": 0.9}, 94.49, 91.2),
    Method("FedCM, alpha 0.3, lr 0.3", "fedcm", FAST, 95.54, 94.3),
    Method("MoFedSAM, alpha 0.3, lr 0.3, rho 0.1", "mofedsam", {**FAST, "rho": 0.1}, 95.96, 94.5),
    Method("SCAFFOLD", "scaffold", {}, 97.59, 94.7),
    Method("FedDyn, lambda 0.1", "feddyn", {"prox": 0.1}, 97.76, 94.8),
    Method("FedSpeed, 1/lambda 0.1, rho 0.1", "fedspeed", {"prox": 0.1, "rho": 0.1}, 97.88, 95.1),
    Method("FedSpeed, 1/lambda 0.1, rho 0.3", "fedspeed", {"prox": 0.1, "rho": 0.3}, 98.12, 95.4),
    Method("FedGamma, rho 0.1", "fedgamma", {"rho": 0.1}),
    Method("FedSMOO, lambda 0.1, rho 0.1", "fedsmoo", {"prox": 0.1, "rho": 0.1}),
    Method("FedNova", "fednova", {}),
    Method("FedAdam, server lr 0.03, tau 0.01", "fedadam", ADAPTIVE),
    Method("FedYogi, server lr 0.03, tau 0.01", "fedyogi", ADAPTIVE),
    Method("FedAdagrad, server lr 0.1, tau 0.01", "fedadagrad", {"tau": 0.01}),
)

MILD = (
    Method("FedAvg", "fedavg", {}, 96.83),
    Method("FedProx, mu 0.1", "fedprox", {"mu": 0.1}, 96.78),
    Method("FedSAM, rho 0.1", "fedsam", {"rho": 0.1}, 97.05),
    Method("FedGPS (path), rho 1", "fedgps", {"rho": 1.0}, 97.1),
    Method("FedYogi, server lr 0.03, tau 0.01", "fedyogi", ADAPTIVE, 97.62),
    Method("FedAdam, server lr 0.03, tau 0.01", "fedadam", ADAPTIVE, 97.84),
    Method("FedAvgM, beta 0.9, server lr 0.3", "fedavgm", {"server_lr": 0.3}, 97.94),
    Method("FedCM, alpha 0.1", "fedcm", {"alpha": 0.1}, 95.75),
    Method("MoFedSAM, alpha 0.1, rho 0.1", "mofedsam", {"alpha": 0.1, "rho": 0.1}, 95.97),
    Method("SCAFFOLD", "scaffold", {}, 97.98),
    Method("FedDyn, lambda 0.1", "feddyn", {"prox": 0.1}, 97.60),
    Method("FedSpeed, 1/lambda 0.1, rho 0.1", "fedspeed", {"prox": 0.1, "rho": 0.1}, 97.94),
)


@dataclass(frozen=True)
class Row:
    """One method over the seeds; accuracies are 0 to 1.

    Parameters
    ----------
    label : str
    curves : one tuple a seed
        Test accuracy after every round.
    bytes_up, bytes_down : int
        Of one run.
    expected, early_expected : float, optional
        See `Method`.
    """

    label: str
    curves: tuple[tuple[float, ...], ...]
    bytes_up: int
    bytes_down: int
    expected: float | None = None
    early_expected: float | None = None

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Mean of the last ten rounds of each seed."""
        return tuple(_mean(curve[-10:]) for curve in self.curves)

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return _mean(self.accuracy)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds."""
        return _mean([(value - self.mean) ** 2 for value in self.accuracy]) ** 0.5

    @property
    def early(self) -> float:
        """Mean accuracy around round 20."""
        return _mean([_mean(curve[EARLY] or curve[-1:]) for curve in self.curves])

    @property
    def rounds_to_target(self) -> tuple[int | None, ...]:
        """First round of each seed that reaches `TARGET`; None if none does."""
        return tuple(
            next((t for t, value in enumerate(curve, 1) if value >= TARGET), None)
            for curve in self.curves
        )


def run_digits_hard(
    seeds: Sequence[int] = (0, 1, 2, 3),
    methods: Sequence[Method] = METHODS,
    rounds: int = ROUNDS,
    tell: Callable[[int, int, str, str, float], None] | None = None,
    *,
    alpha: float | None = 0.05,
    local_epochs: int = 10,
) -> list[Row]:
    """Run every method with every seed; a seed names partition, model and participants.

    Parameters
    ----------
    seeds : sequence of int
    methods : sequence of Method
    rounds : int
    tell : callable, optional
        Called with (done, all, what, stage, 0) before every run.
    alpha : float or None
        Concentration of the classes at a client; None: an IID split.
    local_epochs : int
    """
    from flcore.algorithms import create
    from flcore.simulation import Settings, load_dataset, run

    data, rows = load_dataset("digits"), []
    for number, method in enumerate(methods):
        common = {"weighting": "uniform", "local_epochs": local_epochs}
        algorithm = create(method.name, **{**common, **method.options})
        histories = []
        for k, seed in enumerate(seeds):
            if tell:
                done = number * len(seeds) + k
                tell(done, len(methods) * len(seeds), method.label, f"seed {seed}", 0.0)
            settings = Settings(
                rounds=rounds,
                clients=50,
                participation=5,
                alpha=alpha,
                seed=seed,
                codec=None,
                feedback=None,
            )
            histories.append(run(algorithm, "mlp", data, settings))
        curves = tuple(tuple(record.accuracy for record in history) for history in histories)
        up, down = histories[0].bytes_up, histories[0].bytes_down
        rows.append(Row(method.label, curves, up, down, method.expected, method.early))
    return rows


def write_digits_hard_json(rows: list[Row], path: str | Path) -> None:
    """Write all numbers."""
    Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def digits_hard_markdown(rows: list[Row]) -> str:
    """Return the table: accuracies in percent; a column that no row fills is left out."""
    table = [
        {
            "method": row.label,
            "accuracy, last 10 rounds": f"{100 * row.mean:.2f} ± {100 * row.deviation:.2f}",
            "independent program": "" if row.expected is None else f"{row.expected:.2f}",
            "about round 20": f"{100 * row.early:.1f}",
            "the same, independent": ""
            if row.early_expected is None
            else f"{row.early_expected:.1f}",
            "rounds to 95 % by seed": ", ".join(str(t or "-") for t in row.rounds_to_target),
            "MB up": f"{row.bytes_up / 1e6:.1f}",
            "MB down": f"{row.bytes_down / 1e6:.1f}",
        }
        for row in rows
    ]
    columns = [name for name in table[0] if any(line[name] != "" for line in table)]
    body = (markdown_row(*(line[name] for name in columns)) for line in table)
    return "\n".join([markdown_row(*columns), markdown_rule("l" * len(columns)), *body]) + "\n"


def draw(rows: list[Row], path: str | Path) -> None:
    """Draw accuracy over rounds, mean of the seeds, and where each seed ends.

    Raises
    ------
    MissingDependencyError
        Without matplotlib; the message names the extra.
    """
    matplotlib: Any = require("matplotlib", "train")
    figure_module: Any = require("matplotlib.figure", "train")
    colors: Any = matplotlib.colormaps["tab20"].colors
    with matplotlib.rc_context({"font.size": 8, "svg.hashsalt": "flcore", "axes.grid": True}):
        figure = figure_module.Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for place, row in enumerate(rows):
            curve = [100 * _mean(values) for values in zip(*row.curves, strict=True)]
            smooth = [_mean(curve[max(0, t - 4) : t + 1]) for t in range(len(curve))]
            color = colors[place % len(colors)]
            left.plot(range(1, len(smooth) + 1), smooth, color=color, linewidth=1)
            ends = [100 * value for value in row.accuracy]
            right.plot(ends, [place] * len(ends), "o", color=color, fillstyle="none")
            right.plot([100 * row.mean], [place], "|", color=color, markersize=14)
        left.set_xlabel("round")
        left.set_ylabel("test accuracy, %, mean of seeds and of five rounds")
        left.set_ylim(bottom=70, top=100)
        right.set_yticks(range(len(rows)), [row.label for row in rows])
        right.invert_yaxis()
        right.set_xlabel("test accuracy, %, last ten rounds of each seed")
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
