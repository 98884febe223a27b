"""What compression costs in accuracy: `flcore train` with many codecs and error controls.

Every run is one model on scikit-learn's digits, 50 clients, 60 rounds; a row is a codec with an
error control, averaged over seeds. Three scenes: half or all of the clients report (two or three
classes each), or five of fifty do (one or two classes each), so that a client is seen six times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flcore._extras import require
from flcore.compression import CODECS, FEEDBACKS, from_text

__all__ = ["SCENES", "Row", "draw", "run_training", "training_markdown", "write_training_json"]

ROUNDS, CLIENTS = 60, 50


@dataclass(frozen=True)
class Scene:
    """Who reports, and how different clients are."""

    name: str
    participation: int
    alpha: float
    local_epochs: int


SCENES = (
    Scene("25 of 50 report", 25, 0.3, 2),
    Scene("50 of 50 report", 50, 0.3, 2),
    Scene("5 of 50 report", 5, 0.05, 10),
)

# codec, error control, other settings; the same in every scene
METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("none", "none", {}),
    *(
        (f"topk:ratio={ratio},values=bfloat16", feedback, {})
        for ratio in (0.01, 0.1)
        for feedback in ("econtrol", "ef14", "none")
    ),
    ("topk:ratio=0.01,values=bfloat16", "ef21", {}),
    ("topk:ratio=0.01,values=bfloat16", "econtrol", {"control_step": "paper"}),
    ("topk:ratio=0.01,values=bfloat16", "econtrol", {"start": "dense"}),
    ("topk:ratio=0.02,values=bfloat16", "econtrol", {}),
    ("none", "none", {"server_lr": 2.5}),
    ("topk:ratio=0.01,values=bfloat16", "econtrol", {"server_lr": 2.5}),
    ("sign:bucket=512", "econtrol", {}),
    ("sign:bucket=512", "ef14", {}),
    ("rotated:bits=1", "ef14", {}),
    ("absmax:bits=4,bucket=64", "ef14", {}),
)


@dataclass(frozen=True)
class Row:
    """One method in one scene, over the seeds.

    ``accuracy`` is the mean of the last ten rounds of each seed, 0 to 1; ``bytes_up`` the uplink of
    one run; ``saving`` how many times fewer bytes than float32 updates.
    """

    scene: str
    codec: str
    feedback: str
    extra: dict[str, Any]
    accuracy: tuple[float, ...]
    bytes_up: int
    saving: float

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return sum(self.accuracy) / len(self.accuracy)

    @property
    def label(self) -> str:
        """What a user would write."""
        options = "".join(f", {name} {value}" for name, value in self.extra.items())
        return f"{self.codec} / {self.feedback}{options}"


def run_training(
    seeds: int = 4,
    rounds: int = ROUNDS,
    tell: Callable[[int, int, str, str, float], None] | None = None,
) -> list[Row]:
    """Run every method in every scene.

    Parameters
    ----------
    seeds : int
        Runs a row.
    rounds : int
        Rounds a run.
    tell : callable, optional
        Called with (done, all, what, stage, 0) before every run.
    """
    from flcore.algorithms import create
    from flcore.simulation import Settings, load_dataset, run

    data = load_dataset("digits")
    rows, total = [], len(SCENES) * len(METHODS) * seeds
    for number, (scene, (codec, feedback, extra)) in enumerate(_grid()):
        histories = []
        for seed in range(seeds):
            if tell:
                tell(number * seeds + seed, total, f"{codec} / {feedback}", scene.name, 0.0)
            settings = Settings(
                rounds=rounds,
                clients=CLIENTS,
                participation=scene.participation,
                alpha=scene.alpha,
                seed=seed,
                codec=None if codec == "none" else from_text(CODECS, codec),
                feedback=None if feedback == "none" else from_text(FEEDBACKS, feedback),
                **{name: value for name, value in extra.items() if name != "server_lr"},
            )
            algorithm = create(
                "fedavg",
                local_epochs=scene.local_epochs,
                server_lr=extra.get("server_lr", 1.0),
            )
            histories.append(run(algorithm, "mlp", data, settings))
        up, down = histories[0].bytes_up, histories[0].bytes_down
        accuracy = tuple(history.mean_accuracy(10) for history in histories)
        rows.append(Row(scene.name, codec, feedback, extra, accuracy, up, down / up))
    return rows


def _grid() -> Iterator[tuple[Scene, tuple[str, str, dict[str, Any]]]]:
    return ((scene, method) for scene in SCENES for method in METHODS)


def write_training_json(rows: list[Row], path: str | Path) -> None:
    """Write all numbers."""
    Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def training_markdown(rows: list[Row]) -> str:
    """Return a table a scene; differences are percentage points from the uncompressed run."""
    parts = []
    for scene in SCENES:
        mine = [row for row in rows if row.scene == scene.name]
        dense = mine[0].mean
        lines = [
            f"### {scene.name}: Dirichlet({scene.alpha:g}), {scene.local_epochs} local epochs",
            "",
            "| codec | error control | accuracy, % | seeds | to float32, points | uplink saving |",
            "|---|---|---|---|---|---|",
        ]
        for row in mine:
            seeds = ", ".join(f"{100 * value:.1f}" for value in row.accuracy)
            extra = "".join(f", {name} {value}" for name, value in row.extra.items())
            lines.append(
                f"| `{row.codec}` | {row.feedback}{extra} | {100 * row.mean:.1f} | {seeds} "
                f"| {100 * (row.mean - dense):+.1f} | {row.saving:.1f}x |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def draw(rows: list[Row], path: str | Path) -> None:
    """Draw accuracy against uplink bytes, a panel a scene, a mark an error control.

    Raises
    ------
    MissingDependencyError
        Without matplotlib; the message names the extra.
    """
    matplotlib: Any = require("matplotlib", "train")
    figure_module: Any = require("matplotlib.figure", "train")
    marks = {"none": "x", "ef14": "s", "ef21": "^", "econtrol": "o"}
    with matplotlib.rc_context({"font.size": 8, "svg.hashsalt": "flcore", "axes.grid": True}):
        figure = figure_module.Figure(figsize=(10, 3.2), layout="constrained")
        panels = figure.subplots(1, len(SCENES), sharey=True)
        for panel, scene in zip(panels, SCENES, strict=True):
            mine = [row for row in rows if row.scene == scene.name]
            panel.axhline(100 * mine[0].mean, color="0.4", linestyle="--", linewidth=1)
            for feedback, mark in marks.items():
                points = [row for row in mine if row.feedback == feedback]
                panel.plot(
                    [row.bytes_up / 1e6 for row in points],
                    [100 * row.mean for row in points],
                    mark,
                    label=f"error control: {feedback}",
                    fillstyle="none",
                )
            panel.set_xscale("log")
            panel.set_title(scene.name)
            panel.set_xlabel("uplink of a run, MB")
        panels[0].set_ylabel("test accuracy, %")
        panels[0].set_ylim(bottom=max(0, 100 * min(row.mean for row in rows) - 2))
        panels[-1].legend(loc="lower right")
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
