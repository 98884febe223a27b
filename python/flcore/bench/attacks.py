"""What attackers do to the mean and to robust rules: federated runs with a fifth of liars.

scikit-learn's digits, an MLP of 64 units, 20 equal clients by Dirichlet(1), all of them in every
round, 4 of them attackers, FedAvg with 2 local epochs, 30 rounds, float32 updates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from flcore.bench.report import markdown_row, markdown_rule

__all__ = ["ATTACKS", "RULES", "AttackRow", "attacks_markdown", "run_attacks", "write_attacks_json"]

ROUNDS, CLIENTS, ATTACKERS = 30, 20, 4

RULES = (
    "mean",
    f"trimmed-mean:f={ATTACKERS}",
    f"nnm:f={ATTACKERS}>>trimmed-mean:f={ATTACKERS}",
    "geometric-median",
)

ATTACKS = (
    None,
    "sign-flip",
    "sign-flip:scale=5",
    "alie",
    "alie:z=5",
    "alie:z=20",
    "inner-product:scale=5",
    "label-flip",
    "gaussian:scale=100",
)


@dataclass(frozen=True)
class AttackRow:
    """One attack: accuracy, 0 to 1, of every rule, one value a seed, over the last five rounds."""

    attack: str
    accuracy: dict[str, tuple[float, ...]]


def run_attacks(
    seeds: Sequence[int] = (0, 1, 2, 3),
    attacks: Sequence[str | None] = ATTACKS,
    rules: Sequence[str] = RULES,
    rounds: int = ROUNDS,
    tell: Callable[[int, int, str, str, float], None] | None = None,
) -> list[AttackRow]:
    """Run every rule under every attack; a seed names partition, model and attackers.

    A run that diverges counts as accuracy 0.

    Parameters
    ----------
    seeds : sequence of int
    attacks : sequence of str or None
        As `flcore.simulation.Settings.attack`; None: nobody lies.
    rules : sequence of str
    rounds : int
    tell : callable, optional
        Called with (done, all, what, stage, 0) before every run.
    """
    from flcore.algorithms import create
    from flcore.simulation import DivergedError, Settings, load_dataset, run

    data = load_dataset("digits")
    algorithm = create("fedavg", weighting="uniform", local_epochs=2)
    rows, done, total = [], 0, len(attacks) * len(rules) * len(seeds)
    for attack in attacks:
        accuracy: dict[str, Any] = {rule: [] for rule in rules}
        for rule in rules:
            for seed in seeds:
                if tell:
                    tell(done, total, f"{attack or 'nobody lies'}, {rule}", f"seed {seed}", 0.0)
                settings = Settings(
                    rounds=rounds,
                    clients=CLIENTS,
                    participation=CLIENTS,
                    alpha=1.0,
                    seed=seed,
                    codec=None,
                    feedback=None,
                    attack=attack,
                    attackers=ATTACKERS if attack else 0,
                    aggregation=None if rule == "mean" else rule,
                )
                try:
                    found = run(algorithm, "mlp", data, settings).mean_accuracy(5)
                except DivergedError:
                    found = 0.0
                accuracy[rule].append(found)
                done += 1
        values = {rule: tuple(found) for rule, found in accuracy.items()}
        rows.append(AttackRow(attack or "nobody lies", values))
    return rows


def write_attacks_json(rows: list[AttackRow], path: str | Path) -> None:
    """Write all numbers."""
    Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def attacks_markdown(rows: list[AttackRow]) -> str:
    """Give a table: percent, mean over the seeds and the worst of them."""
    rules = list(rows[0].accuracy)
    head = ["what a fifth of the clients send", *(f"`{rule}`" for rule in rules)]
    lines = [markdown_row(*head), markdown_rule("l" + "r" * len(rules))]
    for row in rows:
        values = (row.accuracy[rule] for rule in rules)
        cells = [f"{100 * fmean(found):.1f} ({100 * min(found):.1f})" for found in values]
        lines.append(
            markdown_row(f"`{row.attack}`" if row.attack[0] != "n" else row.attack, *cells)
        )
    return "\n".join(lines) + "\n"
