"""Settings of a run: everything that is neither the algorithm, the model nor the data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from flcore.aggregation import Pipeline
from flcore.aggregation._rule import Rule
from flcore.compression import EControl, TopK
from flcore.compression._codec import Codec
from flcore.compression._feedback import Feedback
from flcore.errors import InvalidInputError
from flcore.simulation.attacks import Attack, attack_from_text, check_attackers
from flcore.simulation.dealing import Partition, partition_from_text
from flcore.simulation.rules import rule_from_text, rule_to_text

__all__ = ["Settings"]

ACCUMULATE = ("float32", "float64", "reproducible")
CONTROL_STEPS = ("saga", "paper")
STARTS = ("zero", "dense")
LOSSES = ("softmax", "stablemax")
OPTIMIZERS = ("sgd", "perpgrad")
BASE_BITS = (8, 4, 3, 2)
EXECUTIONS = ("auto", "batched", "sequential")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run is set up; the defaults are those of ``flcore train``.

    Parameters
    ----------
    rounds : int
        Communication rounds.
    clients : int
        Number of clients N the training data is dealt to.
    participation : int or float
        Clients in each round, drawn without replacement: an int counts them, a float in (0, 1]
        is a fraction of all.
    alpha : float or None
        Dirichlet concentration of the classes at a client; None: an IID split.
    partition : Partition or text, optional
        How the training data is dealt, in the place of `alpha`: see `partition_from_text`.
    label_noise : float
        Share of the training labels that are replaced by others, drawn uniformly.
    dropout : float
        Probability that a client that was drawn does not answer in a round.
    stragglers : float
        Probability that a client does only a part of its local steps in a round: any number from
        one to all, equally likely.
    attack : Attack or text, optional
        What `attackers` send, see `flcore.simulation.attacks`; ``"sign-flip:scale=2"``.
    attackers : int or float
        Clients that lie: a count, or a share of all. The same ones in all rounds.
    seed : int
        Every random number of the run derives from it.
    codec : codec of `flcore.compression`, or None
        How a client's update is compressed for the uplink; None sends float32 values.
    feedback : error control of `flcore.compression`, or None
        What a client does about the part the codec left out.  With `EControl` and `EF21` the
        server keeps the control vector H, to which absent clients contribute unchanged.
    start : {"zero", "dense"}
        First estimate h of a client under `EControl` and `EF21`: 0, or its first update, which is
        then sent in full.
    control_step : {"saga", "paper"}
        Direction of the server under `EControl` and `EF21`, with D_i the decoded messages, N
        clients in all and S of them present:

        - ``"saga"``: H before the update plus ``1/S sum D_i``.  Those present speak for the
          absent too: on average the step is the one that all N clients would make.
        - ``"paper"``: H after it, ``H <- H + 1/N sum D_i``.  A client's news enters at S/N, the
          rest is what absent clients said last: less noise, and late.

        The two are the same when all clients take part.
    loss : {"softmax", "stablemax"}
        Cross-entropy that clients minimise and that is measured on the test data: of softmax, or
        of StableMax (`flcore.losses.stablemax_cross_entropy`), whose gradients do not vanish when
        logits grow, and which wants a larger learning rate.
    optimizer : {"sgd", "perpgrad"}
        Step of the clients: along the gradient, or along the gradient without its part along the
        parameters, tensor by tensor (`flcore.optim.PerpGrad`), which does not lengthen them.
    aggregation : rule of `flcore.aggregation` or text, optional
        A robust rule in the place of the weighted mean, ``"nnm:f=2>>trimmed-mean:f=2"`` as text.
        Not with an error control that keeps H.
    accumulate : {"float32", "float64", "reproducible"}
        Arithmetic of the sum over clients, see `flcore.aggregation.Accumulator`.
    base_bits : {None, 8, 4, 3, 2}
        Freeze the model, its linear layers in so many bits, and train adapters only, see
        `flcore.simulation.base`.  None: train all parameters.
    lora : int
        Rank of the adapters, with `base_bits`.
    execution : {"auto", "batched", "sequential"}
        Whether the clients of a round are trained together, as one batched computation, or one
        after another. The results agree to rounding. auto: together where it is faster.
    threads : int
        Threads of torch and flcore.  One is fastest for networks as small as the MLP.
    checkpoint_every : int
        Rounds between checkpoints of a run that has an output folder.

    Raises
    ------
    InvalidInputError
        Naming the setting, what was expected and what came.
    """

    rounds: int = 80
    clients: int = 50
    participation: int | float = 5
    alpha: float | None = 0.05
    partition: Any = None
    label_noise: float = 0.0
    dropout: float = 0.0
    stragglers: float = 0.0
    attack: Any = None
    attackers: int | float = 0
    seed: int = 0
    codec: Any = field(default_factory=lambda: TopK(ratio=0.1))
    feedback: Any = field(default_factory=EControl)
    start: str = "zero"
    control_step: str = "saga"
    loss: str = "softmax"
    optimizer: str = "sgd"
    aggregation: Any = None
    accumulate: str = "float32"
    base_bits: int | None = None
    lora: int = 0
    execution: str = "auto"
    threads: int = 1
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        for name in ("rounds", "clients", "threads", "checkpoint_every"):
            _whole(name, getattr(self, name), least=1)
        _whole("seed", self.seed, least=0)
        self._check_participation()
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InvalidInputError(
                f"alpha: expected a positive number, or None for an IID split, got {self.alpha!r}"
            )
        for name, parse in (
            ("partition", partition_from_text),
            ("attack", attack_from_text),
            ("aggregation", rule_from_text),
        ):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, parse(getattr(self, name)))
        for name in ("label_noise", "dropout", "stragglers"):
            _share(name, getattr(self, name))
        check_attackers(self.attack, self.attackers, self.clients)
        for name, kind, known in (
            ("partition", Partition, "a partition of flcore.simulation"),
            ("attack", Attack, "an attack of flcore.simulation"),
            ("aggregation", (Rule, Pipeline), "a rule of flcore.aggregation"),
            ("codec", Codec, "a codec of flcore.compression"),
            ("feedback", Feedback, "an error control of flcore.compression"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise InvalidInputError(f"{name}: expected {known}, or None, got {value!r}")
        if self.feedback is not None and self.codec is None:
            raise InvalidInputError(
                f"feedback: {type(self.feedback).__name__} corrects what a codec leaves out, and "
                "no codec was given; choose a codec, or no error control"
            )
        _one_of("start", self.start, STARTS)
        _one_of("control_step", self.control_step, CONTROL_STEPS)
        _one_of("loss", self.loss, LOSSES)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("accumulate", self.accumulate, ACCUMULATE)
        _one_of("execution", self.execution, EXECUTIONS)
        if self.aggregation is not None and self.controls_server:
            raise InvalidInputError(
                f"aggregation: {self.aggregation!r} works on the clients' updates, and under "
                "EControl and EF21 messages are changes of what the server keeps; use EF14, or no "
                "error control"
            )
        self._check_base()
        for name, plain in (("start", "zero"), ("control_step", "saga")):
            if getattr(self, name) != plain and not self.controls_server:
                raise InvalidInputError(
                    f"{name}: {getattr(self, name)!r} is for EControl and EF21; it needs "
                    "feedback=EControl()"
                )

    @property
    def participants(self) -> int:
        """Number of clients in each round."""
        if isinstance(self.participation, float):
            return max(1, round(self.participation * self.clients))
        return self.participation

    @property
    def controls_server(self) -> bool:
        """Whether messages are changes of a control vector that the server keeps."""
        return self.feedback is not None and "h" in self.feedback.kept

    def to_dict(self) -> dict[str, Any]:
        """Settings as plain values, for configuration files."""
        plain = dict(vars(self))
        for name in ("codec", "feedback", "attack"):
            if plain[name] is not None:
                plain[name] = plain[name].to_dict()
        if self.partition is not None:
            plain["partition"] = self.partition.to_text()
        if self.aggregation is not None:
            plain["aggregation"] = rule_to_text(self.aggregation)
        return plain

    def _check_base(self) -> None:
        _whole("lora", self.lora, least=0)
        if self.base_bits is not None and self.base_bits not in BASE_BITS:
            raise InvalidInputError(
                f"base_bits: expected {', '.join(map(str, BASE_BITS))} or None, got "
                f"{self.base_bits!r}"
            )
        if (self.base_bits is None) != (self.lora == 0):
            raise InvalidInputError(
                f"lora: rank {self.lora} with base_bits={self.base_bits}: a frozen base needs "
                "adapters (lora of 1 or more), and adapters a frozen base (base_bits)"
            )

    def _check_participation(self) -> None:
        value = self.participation
        if isinstance(value, float):
            if not 0.0 < value <= 1.0:
                raise InvalidInputError(
                    f"participation: expected a fraction above 0 and up to 1, got {value!r}"
                )
        else:
            _whole("participation", value, least=1)
            if value > self.clients:
                raise InvalidInputError(
                    f"participation: {value} clients a round, but there are only {self.clients}"
                )


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(f"{name}: expected a whole number from {least}, got {value!r}")


def _share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise InvalidInputError(f"{name}: expected a share from 0 to below 1, got {value!r}")


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidInputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
