"""The output folder of a run: configuration, metrics, checkpoint, final model.

    config.json              what the run is; written once
    metrics.jsonl            one line a round
    checkpoint.safetensors   everything that the next round needs
    model.safetensors        the global model, when the run is complete; adapters where the base is
                             frozen
    base.safetensors         the frozen base in few bits, if there is one

Files that are replaced are written beside themselves and renamed, so that whatever moment a run is
killed at leaves a folder it can be resumed from.  Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flcore._extras import require
from flcore.algorithms.base import Parameters
from flcore.algorithms.state import plain
from flcore.simulation.errors import CheckpointError
from flcore.simulation.history import RoundRecord
from flcore.simulation.uplink import State

__all__ = ["Checkpoint", "RunFolder"]

FORMAT = 1

FILES = ("metrics.jsonl", "checkpoint.safetensors", "model.safetensors")
"""What a run writes beside config.json."""

ADDED = {
    "loss": "softmax",
    "optimizer": "sgd",
    "base_bits": None,
    "lora": 0,
    "partition": None,
    "label_noise": 0.0,
    "dropout": 0.0,
    "stragglers": 0.0,
    "attack": None,
    "attackers": 0,
    "aggregation": None,
    "execution": "auto",
}
"""Settings that older runs do not have, with what those runs did."""

KEYS = {"client": "clients", "own": "own"}
"""First part of the names of clients' arrays, and where their plain values are."""

FREE = (
    ("versions",),
    ("dataset", "name"),
    ("settings", "threads"),
    ("settings", "rounds"),
    ("settings", "checkpoint_every"),
)
"""Entries of the configuration in which a resumed run may differ."""


@dataclass
class Checkpoint:
    """State between two rounds.

    Parameters
    ----------
    round : int
        Rounds completed.
    model : dict of float32 arrays
    control : dict of float32 arrays, or None
        The server's control vector.
    clients : dict of dicts
        What each client keeps for its uplink, see `flcore.simulation.uplink`.
    server : dict
        What the algorithm keeps at the server: arrays and plain values.
    own : dict of dicts
        What it keeps at each client.
    """

    round: int
    model: Parameters
    control: Parameters | None
    clients: State
    server: dict[str, Any] = field(default_factory=dict)
    own: State = field(default_factory=dict)


class RunFolder:
    """Reads and writes one output folder.

    Parameters
    ----------
    path : path
        Made if it does not exist.
    config : dict
        What the run is, as plain values.
    resume : bool
        Whether the folder must be a new one (False) or may hold this same run (True).

    Raises
    ------
    CheckpointError
        If the folder holds a run and `resume` is False, or holds a different run, or cannot be
        written.
    """

    def __init__(self, path: str | Path, config: dict[str, Any], *, resume: bool) -> None:
        self.path = Path(path)
        stored = self.read_config(self.path)
        if stored is None and (others := [name for name in FILES if (self.path / name).exists()]):
            raise CheckpointError(
                f"output: {self.path} holds {others[0]} but no config.json, so it is of unknown "
                "origin; choose another folder"
            )
        if stored is not None and not resume:
            raise CheckpointError(
                f"output: {self.path} already holds a run; resume it, or choose another folder"
            )
        if stored is not None:
            _check_same_run(stored, config, self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"output: cannot make the folder {self.path}: {error}") from error
        self._replace("config.json", json.dumps(config, indent=2).encode() + b"\n")

    @staticmethod
    def read_config(path: str | Path) -> dict[str, Any] | None:
        """Give the configuration of the run in a folder; None if there is none.

        Raises
        ------
        CheckpointError
            If there is one and it cannot be read.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            return None
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise CheckpointError(f"output: {file} is not valid JSON: {error}") from error
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise CheckpointError(f"output: {file} is not the configuration of a flcore run")
        config["settings"] = ADDED | config["settings"]
        return config

    def append(self, record: RoundRecord) -> None:
        """Add one round to the metrics."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")

    def load_history(self, rounds: int) -> list[RoundRecord]:
        """Give the metrics of the first rounds, and cut the file after them.

        A run that was killed has metrics of rounds that its last checkpoint does not know.
        """
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        if len(lines) < rounds:
            raise CheckpointError(
                f"output: {file} has {len(lines)} rounds, and the checkpoint is of round {rounds}"
            )
        try:
            records = [RoundRecord.from_json(line) for line in lines[:rounds]]
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"output: {file} cannot be read: {error}") from error
        self._replace("metrics.jsonl", "".join(r.to_json() + "\n" for r in records).encode())
        return records

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        arrays: dict[str, np.ndarray] = {}
        for name, value in checkpoint.model.items():
            arrays[f"model/{name}"] = value
        for name, value in (checkpoint.control or {}).items():
            arrays[f"control/{name}"] = value
        kept: dict[str, Any] = {key: {} for key in KEYS.values()}
        own, kept["server"] = plain(checkpoint.server)
        arrays |= {f"server/{name}": value for name, value in own.items()}
        for kind, states in (("client", checkpoint.clients), ("own", checkpoint.own)):
            for client, state in states.items():
                own, kept[KEYS[kind]][str(client)] = plain(state)
                arrays |= {f"{kind}/{client}/{name}": value for name, value in own.items()}
        facts = {"format": FORMAT, "round": checkpoint.round, **kept}
        self._save_arrays("checkpoint.safetensors", arrays, {"flcore": json.dumps(facts)})

    def load_checkpoint(self) -> Checkpoint | None:
        """Give the last checkpoint; None if the run was stopped before the first."""
        file = self.path / "checkpoint.safetensors"
        if not file.is_file():
            return None
        safetensors = require("safetensors", extra="train")
        arrays: dict[str, np.ndarray] = {}
        try:
            with safetensors.safe_open(file, framework="numpy") as stored:
                facts = json.loads(stored.metadata()["flcore"])
                for name in stored.keys():
                    arrays[name] = stored.get_tensor(name)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"output: {file} cannot be read: {error}") from error
        states: dict[str, State] = {
            kind: {int(client): dict(rest) for client, rest in facts.get(key, {}).items()}
            for kind, key in KEYS.items()
        }
        found: dict[str, dict[str, Any]] = {
            "model": {},
            "control": {},
            "server": facts.get("server", {}),
        }
        for key, value in arrays.items():
            kind, _, name = key.partition("/")
            if kind in states:
                client, _, name = name.partition("/")
                states[kind][int(client)][name] = value
            else:
                found[kind][name] = value
        return Checkpoint(
            facts["round"],
            found["model"],
            found["control"] or None,
            states["client"],
            found["server"],
            states["own"],
        )

    def save_model(self, model: Parameters) -> None:
        """Write the final model; its bytes depend on nothing but the parameters."""
        self._save_arrays("model.safetensors", model, {"format": "pt"})

    def save_base(self, arrays: dict[str, np.ndarray]) -> None:
        """Write the frozen base: the state of the model without what is trained."""
        self._save_arrays("base.safetensors", arrays, {"format": "pt"})

    def _save_arrays(
        self, name: str, arrays: dict[str, np.ndarray], metadata: dict[str, str]
    ) -> None:
        save = require("safetensors.numpy", extra="train").save
        contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        self._replace(name, save(contiguous, metadata=metadata))

    def _replace(self, name: str, content: bytes) -> None:
        file = self.path / name
        beside = self.path / f".{name}.part"
        try:
            with open(beside, "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            os.replace(beside, file)
        except OSError as error:
            raise CheckpointError(f"output: cannot write {file}: {error}") from error


def _check_same_run(stored: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    before, now = _flat(stored), _flat(config)
    differences = [
        f"{'.'.join(key)}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not any(key[: len(free)] == free for free in FREE)
    ]
    if differences:
        raise CheckpointError(
            f"output: {path} holds a run with other settings, which cannot be continued with "
            f"these: {'; '.join(differences)}"
        )


def _flat(config: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(_flat(value, (*prefix, key)))
        else:
            flat[(*prefix, key)] = value
    return flat
