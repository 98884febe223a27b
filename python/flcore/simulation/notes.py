"""What server and clients of a run tell each other when they are not in one process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flcore.algorithms.layout import Parameters, named_views
from flcore.algorithms.state import Payload, plain
from flcore.errors import InvalidInputError

__all__ = ["Note", "State", "parts", "read_payload", "read_state", "state_note"]

State = dict[str, Any]
"""What a client keeps between rounds, arrays and plain values by name."""


@dataclass
class Note:
    """One message, in either direction.

    Parameters
    ----------
    values : dict
        Numbers and text by name.
    arrays : dict of dict of arrays
        Parts of the message by name: "model" or "update", tensor by tensor, and "rest".
    """

    values: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for part in self.arrays.values() for array in part.values())


def parts(payload: Payload, main: str, like: Parameters) -> dict[str, dict[str, np.ndarray]]:
    """Part a payload into its main vector, tensor by tensor if it is one of all, and the rest."""
    found: dict[str, dict[str, np.ndarray]] = {}
    if main in payload:
        vector = np.ascontiguousarray(payload[main], "<f4")
        shapes = {name: value.shape for name, value in like.items()}
        whole = vector.size == sum(value.size for value in like.values())
        found[main] = named_views(vector, shapes) if whole else {"vector": vector}
    rest = {name: np.asarray(value) for name, value in payload.items() if name != main}
    return found | ({"rest": rest} if rest else {})


def read_payload(note: Note, main: str, like: Parameters, whose: str) -> Payload:
    """Put a payload together again; arrays without dimensions become numbers."""
    rest = note.arrays.get("rest", {})
    payload = {name: value if value.ndim else value.item() for name, value in rest.items()}
    if main not in note.arrays:
        return payload
    named = note.arrays[main]
    if len(named) == 1 and not named.keys() <= like.keys():
        vector = next(iter(named.values()))
    else:
        shapes = {name: value.shape for name, value in like.items()}
        got = {name: value.shape for name, value in named.items()}
        if got != shapes:
            differ = [n for n in {**shapes, **got} if shapes.get(n) != got.get(n)]
            raise InvalidInputError(
                f"{whose}: {main}: expected {differ[0]} of shape {shapes.get(differ[0])}, got "
                f"{got.get(differ[0])}; server and clients must have the same model and algorithm"
            )
        vector = np.concatenate([named[name].reshape(-1) for name in shapes])
    return {main: vector, **payload}


def state_note(state: State) -> Note:
    """Put a state into a note."""
    arrays, values = plain(state)
    return Note({"plain": json.dumps(values)}, {"state": arrays} if arrays else {})


def read_state(note: Note) -> State:
    """Read what `state_note` wrote."""
    return {**note.arrays.get("state", {}), **json.loads(note.values["plain"])}
