"""What the options of `flcore train` and `flcore compare` mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from flcore.compression import CODECS, FEEDBACKS, from_text
from flcore.errors import InvalidInputError
from flcore.simulation import CheckpointError, Settings
from flcore.simulation.attacks import ATTACKS
from flcore.simulation.compare import parse_pairs
from flcore.simulation.runfolder import RunFolder

__all__ = [
    "LEARNING",
    "count_or_share",
    "learning_options",
    "next_folder",
    "settings_of",
    "stored_options",
]

LEARNING = {
    "lr": "local_lr",
    "lr_decay": "lr_decay",
    "local_epochs": "local_epochs",
    "batch_size": "batch_size",
    "weight_decay": "weight_decay",
    "clip": "clip",
    "server_lr": "server_lr",
    "weighting": "weighting",
}
"""Options of the command line that are fields of every algorithm."""


def learning_options(given: dict[str, Any]) -> dict[str, Any]:
    """Give the fields of an algorithm that were set, the others keep its own defaults.

    Parameters
    ----------
    given : dict
        Options that were written on the command line.
    """
    named = {field: given[name] for name, field in LEARNING.items() if name in given}
    if "clip" in named:
        named["clip"] = named["clip"] or None
    return named | parse_pairs(given.get("option") or ())


def settings_of(options: dict[str, Any]) -> Settings:
    """Give the settings of a run from the options of the command line."""
    return Settings(
        rounds=options["rounds"],
        clients=options["clients"],
        participation=count_or_share("participation", options["participation"]),
        alpha=None if options["alpha"] == "iid" else _number("alpha", options["alpha"], "iid"),
        seed=options["seed"],
        codec=_codec(options["compressor"], options["ratio"]),
        feedback=_feedback(options["error_control"], options["eta"]),
        control_step=options["control_step"],
        loss=options["loss"],
        optimizer=options["optimizer"],
        partition=options["partition"],
        dropout=options["dropout"],
        stragglers=options["stragglers"],
        label_noise=options["label_noise"],
        attack=options["attack"],
        attackers=count_or_share("attackers", options["attackers"]),
        aggregation=None if options["aggregation"] == "mean" else options["aggregation"],
        execution=options["execution"],
        accumulate=options["accumulate"],
        base_bits=options["base_bits"],
        lora=options["lora"],
        threads=options["threads"],
        checkpoint_every=options["checkpoint_every"],
    )


def _codec(text: str, ratio: float) -> Any:
    if text == "none":
        return None
    counted = "k=" in text or "tau=" in text  # instead of a share
    return _described("compressor", CODECS, text, ratio=None if counted else ratio)


def _feedback(text: str, eta: str) -> Any:
    if text == "none":
        return None
    number = "auto" if eta == "auto" else _number("eta", eta, "auto")
    return _described("error-control", FEEDBACKS, text, eta=number)


def _described(option: str, classes: dict[str, Any], text: str, **more: Any) -> Any:
    try:
        return from_text(classes, text, **more)
    except InvalidInputError as error:
        if text.partition(":")[0] in classes:
            raise
        raise InvalidInputError(f"{option}: {error}, or none") from None


def count_or_share(name: str, text: str) -> int | float:
    """Read ``5`` as a count, ``0.1`` and ``10%`` as a share."""
    if text.lstrip("+-").isdecimal():
        return int(text)
    if text.endswith("%"):
        return _number(name, text[:-1], "a count") / 100
    return _number(name, text, "a percentage")


def _number(name: str, text: str, alternative: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidInputError(f"{name}: expected a number or {alternative}, got {text!r}")
    return value


def stored_options(folder: Path | None) -> dict[str, Any]:
    """Give the options that the run in a folder was started with."""
    if folder is None:
        raise CheckpointError("--resume: name the folder of the run with --output")
    config = RunFolder.read_config(folder)
    if config is None:
        raise CheckpointError(f"--resume: there is no run in {folder}")
    settings = config["settings"]
    codec, feedback, attack = settings["codec"], settings["feedback"], settings["attack"]
    kept = ("rounds", "clients", "seed", "control_step", "accumulate", "threads", "partition")
    steps = ("loss", "optimizer", "base_bits", "lora", "execution", "checkpoint_every")
    faults = ("dropout", "stragglers", "label_noise")
    return {
        **{name: settings[name] for name in (*kept, *steps, *faults)},
        "algorithm": config["algorithm"]["name"],
        "learning": {k: v for k, v in config["algorithm"].items() if k != "name"},
        "model": config["model"]["name"],
        "dataset": config["dataset"]["name"],
        "participation": str(settings["participation"]),
        "attackers": str(settings["attackers"]),
        "attack": None if attack is None else _as_text(ATTACKS, attack, "attack"),
        "aggregation": settings["aggregation"] or "mean",
        "alpha": "iid" if settings["alpha"] is None else str(settings["alpha"]),
        "compressor": _as_text(CODECS, codec, "codec"),
        "error_control": _as_text(FEEDBACKS, feedback, "feedback"),
        **({"ratio": codec["ratio"]} if codec and codec.get("ratio") else {}),
        **({"eta": str(feedback["eta"])} if feedback and "eta" in feedback else {}),
    }


def _as_text(classes: dict[str, Any], stored: dict[str, Any] | None, family: str) -> str:
    """Give what a user would write for stored settings."""
    if stored is None:
        return "none"
    return classes[stored[family]].from_dict(stored).to_text(leave_out=("ratio", "eta"))


def next_folder(algorithm: str, dataset: str) -> Path:
    """Give the first ``runs/ALGORITHM-DATASET-NUMBER`` that does not exist."""
    stem = f"runs/{algorithm}-{Path(dataset).stem}"
    number = 1
    while (folder := Path(f"{stem}-{number}")).exists():
        number += 1
    return folder
