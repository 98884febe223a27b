"""Server optimisers: the weighted mean of client results and one step along it, in one pass.

Unlike the rules these hold state (the round, momentum, second moments), so one object belongs to
one training run.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from flcore import _arrays, _updates
from flcore.aggregation._checks import number, whole
from flcore.aggregation._integers import POLICIES, IntegerLayer, split_layers
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops._combine_step import step_layers
from flcore.ops._packet_rows import holds_packets, packet_rows
from flcore.ops._step import INPUTS, Noise, Step
from flcore.ops.combine import ACCUMULATE, NONFINITE

__all__ = ["ServerOptimizer"]


class ServerOptimizer(ABC):
    """Base of `FedAvgM`, `FedAdagrad`, `FedAdam` and `FedYogi`: state, rounds, integer layers.

    Parameters
    ----------
    lr : float
        Server learning rate eta, >= 0.
    inputs : {"updates", "models"}
        What clients send: updates ``x_i - w``, or their models x_i, from which the model of this
        round is subtracted in the same pass.
    noise_std : float
        Standard deviation of normal noise on the aggregate D, for every coordinate; 0: none. Under
        differential privacy it is ``z * C * max_i p_i`` for a clip C and a noise multiplier z: use
        uniform weights, or one client counts for more than ``1 / n``.
    seed : int
        Names the noise together with the round and the layer: see `flcore.ops.Noise`.
    accumulate, nonfinite, integers
        As in `Mean`. A new model or state that is not finite raises too, unless "propagate".

    Attributes
    ----------
    round : int
        Steps taken so far.
    """

    _names: ClassVar[tuple[str, ...]] = ("lr",)  # of the numbers that `repr` shows
    round: int
    _state: dict[str, list[Any]]  # m and v of each floating layer
    _spare: dict[str, list[Any]]  # written by the next step, then exchanged with the state

    def __init__(
        self,
        *,
        lr: float,
        inputs: str = "updates",
        noise_std: float = 0.0,
        seed: int = 0,
        accumulate: str = "float32",
        nonfinite: str = "raise",
        integers: str = "mean",
    ) -> None:
        for name, value, allowed in (
            ("inputs", inputs, INPUTS),
            ("accumulate", accumulate, ACCUMULATE),
            ("nonfinite", nonfinite, NONFINITE),
            ("integers", integers, POLICIES),
        ):
            if value not in allowed:
                raise InvalidInputError(f"{name}: expected one of {allowed}, got {value!r}")
        self.lr = number("lr", lr, 0)
        self.inputs, self.accumulate = inputs, accumulate
        self.nonfinite, self.integers = nonfinite, integers
        self.noise_std = number("noise_std", noise_std, 0)
        self.seed = whole("seed", seed, 0, (1 << 64) - 1)
        self.reset()

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)
        return f"{type(self).__name__}({numbers}), round {self.round}"

    @abstractmethod
    def _step(self) -> Step:
        """Return the step of the round that comes next."""

    def _start(self, name: str) -> float:
        """Return the value from which a state starts."""
        return 0.0

    # ---- the step ------------------------------------------------------------------------------

    def step(
        self,
        model: Any,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        rule: Callable[..., Any] | None = None,
        out: Any = None,
        cast: Any = None,
        variant: str | None = None,
    ) -> Any:
        """Take one step and return the new model; `model` is left as it is.

        Parameters
        ----------
        model : update
            The current model w, structure, shapes and device of one client result. Keep it in
            float32 (or float64), also when the clients send float16 or bfloat16.
        updates : sequence of updates, array of shape (n, ...), or list of packets
            One a client: updates or models, as `inputs` says. Packets of `flcore.compression` are
            decoded in cache on the way into the step; the model then has floating layers only.
        weights : (n,) numbers >= 0, optional
            Example counts, say; all equal when not given.
        rule : callable, optional
            ``rule(updates, weights)`` makes the aggregate in the place of the mean, a robust rule
            for example. The step is then taken along its result, in a pass of its own.
        out : update, optional
            Where the new model goes; `model` itself is allowed. Other arrays are written directly
            and hold nothing of use when the call raises.
        cast : {"float16", "bfloat16"} or update, optional
            Also make a copy of the new model in that dtype, to send to the clients.
        variant : str, optional
            Which implementation runs, see `flcore.ops.combine_step`.

        Returns
        -------
        update, or (update, update) with `cast`
            The new model, and the copy.

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
            See `flcore.ops.combine_step`. The optimiser is then as it was before the call.
        """
        if rule is not None:
            more = {"like": model} if holds_packets(updates) else {}
            updates, weights = [rule(updates, weights, **more)], None
        packets = None
        if holds_packets(updates):
            packets = packet_rows(updates, model, like_name="model")
        if packets is None:
            layout, rows = _updates.parse_updates(updates)
        elif self.inputs == "models":
            raise InvalidInputError("updates: packets hold updates; expected inputs='updates'")
        else:
            layout, rows = packets.layout, []
        n = len(rows if packets is None else packets)
        q = [1.0] * n if weights is None else _updates.parse_weights(weights, n, signed=False)
        exact = self.accumulate == "reproducible"  # raw weights, one division at the end

        def total(keep: set[int]) -> float:
            return math.fsum(q[i] for i in keep)

        def shares(keep: set[int]) -> list[float]:
            scale = 1.0 if exact else total(keep)
            return [q[i] / scale if i in keep and q[i] else 0.0 for i in range(n)]

        floats, integers = split_layers(layout)
        current = layout.layers(model, "model", dtypes=False)
        opened = {"out": out, "cast": None if isinstance(cast, str) else cast}
        targets = {
            name: layout.layers(value, name, dtypes=False)
            for name, value in opened.items()
            if value is not None
        }
        self._check_integers(layout, integers, {"model": current, **targets})
        step = self._step()
        state = self._ready(layout, [current[j] for j in floats], floats, step)
        given = {name: [layers[j] for j in floats] for name, layers in targets.items()}
        given |= state | {f"{name}_out": spare for name, spare in self._spare.items()}
        try:
            result, kept = step_layers(
                [[row[j] for j in floats] for row in rows] if packets is None else packets,
                shares,
                [current[j] for j in floats],
                step,
                layout=layout.select(floats),
                given=given,
                cast=cast if isinstance(cast, str) else None,
                models=self.inputs == "models",
                scales=None,
                noise=Noise(self.noise_std, self.seed, self.round) if self.noise_std else None,
                tensors=floats,
                accumulate=self.accumulate,
                nonfinite=self.nonfinite,
                divisor=lambda keep: total(keep) if exact else 1.0,
                variant=variant,
            )
        except NonFiniteError as err:
            if rule is None or not err.clients:
                raise
            raise NonFiniteError("rule: its aggregate holds a NaN or an infinity") from err
        new = dict(zip(floats, result.model, strict=True))
        copy = dict(zip(floats, result.cast or [], strict=False))
        for j in integers:
            new[j] = self._integer(current[j], [rows[i][j] for i in sorted(kept) if q[i]], q, kept)
            copy[j] = new[j]
            for name, layers in targets.items():
                _arrays.assign(layers[j], new[j])
                (new if name == "out" else copy)[j] = layers[j]
        self._spare, self._state = state, {s: getattr(result, s) for s in step.states}
        self.round += 1
        order = range(len(layout.specs))
        stepped = out if out is not None else layout.build([new[j] for j in order])
        if cast is None:
            return stepped
        if "cast" in targets:
            return stepped, cast
        return stepped, layout.build([copy[j] for j in order])

    def _integer(self, current: Any, rows: list[Any], q: list[float], kept: set[int]) -> Any:
        """Aggregate of an integer layer; updates are added to the model, booleans replace it."""
        layer = IntegerLayer(current, self.integers)
        used = [q[i] for i in sorted(kept) if q[i]]
        for x, weight in zip(rows, used, strict=True):
            layer.add(x, weight)
        result = layer.result(math.fsum(used))
        if self.inputs == "models" or _arrays.dtype_name(current) == "bool":
            return result
        return current + result

    @staticmethod
    def _check_integers(
        layout: _updates.Layout, integers: list[int], given: dict[str, list[Any]]
    ) -> None:
        for name, layers in given.items():
            for j in integers:
                have, want = _arrays.dtype_name(layers[j]), layout.specs[j][1]
                if have != want:
                    raise DTypeError(
                        f"{layout.label(name, j)}: expected {want} like the first update, "
                        f"got {have}"
                    )

    # ---- state ---------------------------------------------------------------------------------

    def _ready(
        self, layout: _updates.Layout, model: list[Any], floats: list[int], step: Step
    ) -> dict[str, list[Any]]:
        """Return the state for a model, made at the first step and checked at later ones."""
        state: dict[str, list[Any]] = {}
        for name in step.states:
            layers = self._state.get(name)
            if layers is None:
                state[name] = [self._full(x, self._start(name)) for x in model]
                continue
            if len(layers) != len(model):
                raise InvalidInputError(
                    f"model: expected the {len(layers)} floating layers that {name} was made for, "
                    f"got {len(model)}"
                )
            for j, x, s in zip(floats, model, layers, strict=True):
                label = layout.label("model", j)
                if tuple(x.shape) != tuple(s.shape):
                    raise InvalidInputError(
                        f"{label}: expected shape {tuple(s.shape)} like its {name}, "
                        f"got {tuple(x.shape)}"
                    )
                wide = _arrays.dtype_name(x) == "float64"
                place = type(x) is np.ndarray, _arrays.device_of(x)
                if place != (type(s) is np.ndarray, _arrays.device_of(s)) or wide != (
                    _arrays.dtype_name(s) == "float64"
                ):
                    raise DTypeError(
                        f"{label}: expected the library, device and precision that its {name} was "
                        f"made for ({_arrays.dtype_name(s)} on {_arrays.device_of(s)}); reset() "
                        "or load_state_dict() starts anew"
                    )
            state[name] = layers
        return state

    @staticmethod
    def _full(x: Any, value: float) -> Any:
        state = _arrays.empty_like(
            x, "float64" if _arrays.dtype_name(x) == "float64" else "float32"
        )
        state[...] = value
        return state

    def reset(self) -> None:
        """Forget state and round, and let go of the memory."""
        self.round = 0
        self._state = {}
        self._spare = {}

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to go on with the same bits, as copies.

        Keys: ``kind`` (the class), ``round``, and for the floating layer number l ``m.<l>`` and
        ``v.<l>``, of the library and device of the model.
        """
        found: dict[str, Any] = {"kind": type(self).__name__, "round": self.round}
        for name, layers in self._state.items():
            found |= {f"{name}.{j}": _clone(x) for j, x in enumerate(layers)}
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; hyperparameters are those of this object.

        Raises
        ------
        InvalidInputError, DTypeError
            The dict is of another optimiser, or its entries are not what they should be; nothing
            has changed then.
        """
        if not isinstance(state, Mapping):
            raise InvalidInputError(f"state: expected a dict, got {type(state).__name__}")
        if state.get("kind") != type(self).__name__:
            raise InvalidInputError(
                f"state['kind']: expected {type(self).__name__!r}, got {state.get('kind')!r}"
            )
        rounds = whole("state['round']", state.get("round"), 0, (1 << 32) - 1)
        arrays = {key: x for key, x in state.items() if key not in ("kind", "round")}
        names = self._step().states
        layers = len(arrays) // max(len(names), 1)
        wanted = {f"{name}.{j}" for name in names for j in range(layers)}
        if set(arrays) != wanted:
            raise InvalidInputError(
                f"state: expected kind, round and {' and '.join(f'{s}.<layer>' for s in names)} "
                f"for each layer, got {sorted(state)}"
            )
        for key, x in arrays.items():
            if not _arrays.is_array(x) or _arrays.dtype_name(x) not in ("float32", "float64"):
                got = _arrays.dtype_name(x) if _arrays.is_array(x) else type(x).__name__
                raise DTypeError(f"state[{key!r}]: expected float32 or float64, got {got}")
        self._state = {s: [_clone(arrays[f"{s}.{j}"]) for j in range(layers)] for s in names}
        if not layers:
            self._state = {}
        self._spare = {}
        self.round = rounds


def _clone(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.array(x, dtype=x.dtype.newbyteorder("="), order="C")
    return x.detach().clone(memory_format=sys.modules["torch"].contiguous_format)
