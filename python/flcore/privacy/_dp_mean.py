"""The mean of clipped client updates with Gaussian noise: central differential privacy."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore.aggregation._checks import check_keys, number, whole
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops._combine_step import SERVER_STREAM, Noise, Step, Stepped, combine_step
from flcore.ops.combine import ACCUMULATE
from flcore.ops.gram import gram
from flcore.ops.rng import random_normal
from flcore.privacy._dp_terms import DPTerms, update_noise_multiplier

__all__ = ["DPMean"]

NONFINITE = ("raise", "exclude")
LAST_ROUND = 2**32 - 1  # of the word `round` in the name of a stream
COUNT_STREAM = 2**32 - 1  # the word `tensor` of the count's noise, where layers have 0, 1, ...
CLIP_RANGE = (2.0**-100, 2.0**100)  # adaptive clips stay where float32 has all its digits


class DPMean:
    r"""Clipped mean with Gaussian noise (DP-FedAvg), with a fixed or an adaptive clip.

    ``D = sum_i p_i min(1, C / ||x_i||) x_i + N(0, (z C max_i p_i)^2)`` with the L2 norm over all
    layers of an update. Two reads of every value: one for the norms, one for the sum, to which the
    noise is added while it is in cache.

    Parameters
    ----------
    clip : float
        C > 0, largest norm an update enters with (the first one when adaptive). Infinite: no
        clipping, only together with ``noise_multiplier=0``.
    noise_multiplier : float
        z >= 0, noise over the largest norm of one client's term; see `flcore.privacy.epsilon`.
    seed : int, optional
        Key of the noise, below 2^64, and as secret as the noise. Default: from the operating
        system, for this object alone. Give one in tests only: whoever restarts from an older
        checkpoint with the same seed repeats noise under other data, and the difference of the two
        results has none.
    denominator : float, optional
        What the weighted sum is divided by, the same in all rounds: the expected number of clients
        (with weights, their expected sum). Default: the number of clients of the call (the sum of
        its weights).
    weight_cap : float, optional
        Weights above it are lowered to it, and the noise is that for the cap whoever takes part.
    quantile : float, optional
        gamma in [0, 1]: the clip follows this quantile of the norms,
        ``C <- C exp(-clip_lr (b - gamma))`` with b the noisy share of updates within C, from the
        round after. Default: the clip stays.
    clip_lr : float
        eta_C >= 0.
    count_noise : float, optional
        sigma_b, standard deviation of the noise on the number of updates within C. Default: a
        twentieth of the clients (of `denominator`, if it counts clients). It takes a part of the
        budget: the sum gets `update_noise_multiplier` in the place of z, and the round as a whole
        is worth z.
    accumulate : {"float32", "float64", "reproducible"}
        Type of the sum, see `flcore.ops.combine`.
    nonfinite : {"raise", "exclude"}
        A NaN or an infinity in an update: raise and name the client, or take it for a zero update.

    Attributes
    ----------
    clip : float
        The C of the next round.
    round : int
        Number of the next round in the name of the noise streams. It only grows.

    Notes
    -----
    **What the guarantee is.** The term of client i has norm at most ``C p_i``, hence noise of
    ``z C max_i p_i`` is z times what the result moves when one update becomes zero. Uniform weights
    make this ``z C / n``; example counts in the place of weights with ``z C / n`` do not, because a
    large client moves the result by more. Count as neighbours for `flcore.privacy.epsilon`:
    "zero_out" (who takes part, n and the weights are public) always; "add_or_remove", too, when
    nothing but the sum depends on who is there: `denominator` given, and `weight_cap` with weights.

    **Noise is never used twice.** Each call takes the streams of one round and moves on, also when
    it fails on the way. A given `round` and a loaded state can only move forward.

    **What floating point leaves of it.** Philox is no cryptographic generator, normals are float32
    on a grid and end at 6.66 deviations, and rounding in the sum can exceed the clip in the last
    digits. Proofs for real numbers hold up to that (Mironov, CCS 2012; Casacuberta et al.,
    "Widespread underestimation of sensitivity in differentially private libraries", CCS 2022).

    References
    ----------
    McMahan, Ramage, Talwar, Zhang, "Learning differentially private recurrent language models",
    ICLR 2018, arXiv 1710.06963. Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private
    learning with adaptive clipping", NeurIPS 2021, arXiv 1905.03871, Algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.privacy import DPMean
    >>> updates = [np.float32([3, 4]), np.float32([0.3, 0.4])]
    >>> DPMean(clip=1.0, noise_multiplier=0.0)(updates)
    array([0.45000002, 0.6       ], dtype=float32)
    >>> DPMean(clip=1.0, noise_multiplier=1.1).diagnose(updates).noise_std
    0.55
    """

    def __init__(
        self,
        clip: float,
        noise_multiplier: float,
        seed: int | None = None,
        *,
        denominator: float | None = None,
        weight_cap: float | None = None,
        quantile: float | None = None,
        clip_lr: float = 0.2,
        count_noise: float | None = None,
        accumulate: str = "float32",
        nonfinite: str = "raise",
    ) -> None:
        self.noise_multiplier = number("noise_multiplier", noise_multiplier, 0)
        self.clip = math.inf if clip == math.inf else number("clip", clip, 0, open="low")
        self._seed = secrets.randbits(64) if seed is None else whole("seed", seed, 0, 2**64 - 1)
        self.denominator = _optional("denominator", denominator)
        self.weight_cap = _optional("weight_cap", weight_cap)
        self.quantile = None if quantile is None else number("quantile", quantile, 0, 1)
        self.clip_lr = number("clip_lr", clip_lr, 0)
        self.count_noise = None if count_noise is None else number("count_noise", count_noise, 0)
        for name, value, allowed in (
            ("accumulate", accumulate, ACCUMULATE),
            ("nonfinite", nonfinite, NONFINITE),
        ):
            if value not in allowed:
                raise InvalidInputError(f"{name}: expected one of {allowed}, got {value!r}")
        self.accumulate, self.nonfinite = accumulate, nonfinite
        self.round = 0
        if self.clip == math.inf and (self.noise_multiplier > 0 or self.quantile is not None):
            raise InvalidInputError(
                "clip: expected a finite number with noise or an adaptive clip, got inf"
            )
        if self.quantile is not None and self.count_noise is not None:
            update_noise_multiplier(self.noise_multiplier, self.count_noise)

    def __call__(
        self,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        round: int | None = None,
        out: Any = None,
        variant: str | None = None,
    ) -> Any:
        """Return the noisy mean of the clipped `updates`.

        Parameters
        ----------
        updates : sequence of updates, or array of shape (n, ...)
            One update a client (changes of the model, not models) of float64, float32, float16 or
            bfloat16, alike in structure, shapes, dtypes and device.
        weights : (n,) numbers >= 0, optional
            Not all zero; all equal when not given. They must not tell what is to be kept private.
            A client of weight 0 takes no part.
        round : int, optional
            From `DPMean.round` to 2^32 - 1; by default `DPMean.round`.
        out : update, optional
            Where the result goes.
        variant : {"reference", "cpu", "triton"}, optional
            Which implementation runs; by default the best for the device.

        Returns
        -------
        update
            Of the kind, dtype and device of one update; `out` itself if it was given.

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
            See `flcore.ops.combine`; also a round that was used before, a budget that the count
            noise uses up, and weights that are negative or sum to zero.
        """
        layout, rows = _updates.parse_updates(updates)
        updates = [layout.build(row) for row in rows]
        zeros = [_arrays.empty_like(x) for x in rows[0]]
        for x in zeros:
            x[...] = 0
        return self.step(
            updates,
            layout.build(zeros),
            Step("sgd", lr=1.0),
            weights,
            round=round,
            out=out,
            variant=variant,
        ).model

    def step(
        self,
        updates: Any,
        model: Any,
        step: Step,
        weights: Sequence[float] | None = None,
        *,
        round: int | None = None,
        variant: str | None = None,
        **buffers: Any,
    ) -> Stepped:
        """Take a step of a server optimiser along the noisy mean, which never goes to memory.

        Parameters
        ----------
        updates, weights, round, variant
            As for a call of the object.
        model : update
            The model w, as for `flcore.ops.combine_step`.
        step : flcore.ops.Step
            Which step, and its numbers.
        **buffers
            `m`, `v`, `out`, `m_out`, `v_out`, `cast` of `flcore.ops.combine_step`.

        Returns
        -------
        flcore.ops.Stepped
            The new model, m and v. They are functions of the noisy mean, hence as private as it is.

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
            As a call of the object.
        """
        at = self.round if round is None else whole("round", round, 0, LAST_ROUND)
        if at < self.round or at > LAST_ROUND:
            raise InvalidInputError(
                f"round: expected one from {self.round} to {LAST_ROUND}, got {at}; the noise of "
                "earlier rounds has been used, and two results with the same noise differ by none"
            )
        if unknown := set(buffers) - {"m", "v", "out", "m_out", "v_out", "cast"}:
            raise InvalidInputError(f"{min(unknown)}: not a buffer of combine_step")
        layout, rows = _updates.parse_updates(updates)
        updates = [layout.build(row) for row in rows]  # an iterator could be read only once
        terms = self.diagnose(updates, weights, variant=variant)
        used = terms.shares[terms.shares > 0]
        narrow = used.size > 0 and used.min() < 2.0**-100  # float32 would cut the digits of these
        self.round = at + 1
        stepped = combine_step(
            updates,
            terms.shares.tolist(),
            model,
            step,
            noise=Noise(terms.noise_std, self._seed, at) if terms.noise_std else None,
            accumulate="float64" if narrow and self.accumulate == "float32" else self.accumulate,
            variant=variant,
            **buffers,
        )
        if self.quantile is not None:
            self._adapt(terms, weights, at)
        return stepped

    def diagnose(
        self,
        updates: Any,
        weights: Sequence[float] | None = None,
        *,
        variant: str | None = None,
    ) -> DPTerms:
        """Return norms, factors and noise of the next round; reads every value once, draws nothing.

        Parameters
        ----------
        updates, weights, variant
            As for a call of the object.

        Returns
        -------
        DPTerms

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError, VariantUnavailableError
            As a call of the object.
        """
        found = gram(
            updates,
            kind="norms",
            precision="float64",
            nonfinite="exclude",
            variant=variant if variant in ("reference", "cpu") else None,
        )
        norms = np.sqrt(found.norms)
        n = norms.size
        q = np.ones(n)
        if weights is not None:
            q = np.array(_updates.parse_weights(weights, n, signed=False))
            q = np.minimum(q, self.weight_cap or math.inf)
        bad = [i for i in found.nonfinite if q[i] > 0]
        if bad and self.nonfinite == "raise":
            names = ", ".join(f"updates[{i}]" for i in bad)
            raise NonFiniteError(
                f"{names}: NaN or infinity found. Drop the client, or pass nonfinite='exclude' to "
                "take its update for zero",
                tuple(bad),
            )
        scales = np.divide(self.clip, norms, out=np.ones(n), where=norms > self.clip)
        scales[list(found.nonfinite)] = 0.0
        # of all weights, those of left-out clients too: who was left out is private
        divisor = self.denominator or math.fsum(q)
        largest = (self.weight_cap or q.max()) if weights is not None else 1.0
        z = self.noise_multiplier
        if z and self.quantile is not None:
            z = update_noise_multiplier(z, self._count_noise(weights, int(np.count_nonzero(q))))
        std = z * self.clip * (largest / divisor) if z else 0.0
        return DPTerms(norms, scales, q / divisor * scales, std)

    def _clients(self, weights: Sequence[float] | None, n: int) -> float:
        """Return what counts of clients are divided by."""
        return self.denominator if self.denominator and weights is None else float(n)

    def _count_noise(self, weights: Sequence[float] | None, n: int) -> float:
        if self.count_noise is not None:
            return self.count_noise
        return self._clients(weights, n) / 20 if self.noise_multiplier else 0.0

    def _adapt(self, terms: DPTerms, weights: Sequence[float] | None, at: int) -> None:
        """Move the clip: ``b = 1/2 + (sum_i (b_i - 1/2) + N(0, sigma_b^2)) / clients``.

        Counts are centred, so that a client moves their sum by 1/2, which is what the factor 2 of
        `update_noise_multiplier` stands for.
        """
        assert self.quantile is not None
        present = np.ones(terms.norms.size, bool)
        if weights is not None:
            present = np.array(_updates.parse_weights(weights, present.size, signed=False)) > 0
        n = int(present.sum())
        total = float((terms.norms[present] <= self.clip).sum()) - n / 2
        if sigma := self._count_noise(weights, n):
            draw = random_normal(1, self._seed, round=at, tensor=COUNT_STREAM, client=SERVER_STREAM)
            total += sigma * float(draw[0])
        b = 0.5 + total / self._clients(weights, n)
        exponent = min(max(-self.clip_lr * (b - self.quantile), -64.0), 64.0)
        self.clip = min(max(self.clip * math.exp(exponent), CLIP_RANGE[0]), CLIP_RANGE[1])

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the next round and its clip. The seed, a secret, is not part of it."""
        return {"round": self.round, "clip": self.clip}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that `state_dict` returned.

        Raises
        ------
        InvalidInputError
            Other keys, values out of range, or a round before `DPMean.round`, whose noise this
            object has used; nothing has been changed then.
        """
        check_keys(state, {"round", "clip"})
        at = whole("state['round']", state["round"], 0, LAST_ROUND + 1)
        clip = state["clip"]
        if clip != math.inf or self.noise_multiplier > 0 or self.quantile is not None:
            clip = number("state['clip']", clip, 0, open="low")
        if at < self.round:
            raise InvalidInputError(
                f"state['round']: expected {self.round} or later, got {at}; the noise of earlier "
                "rounds has been used. Load older states into a new object with another seed"
            )
        self.round, self.clip = at, clip

    def __repr__(self) -> str:
        """Say what it does, without the seed."""
        adaptive = "" if self.quantile is None else f", quantile={self.quantile:g}"
        return (
            f"DPMean(clip={self.clip:g}, noise_multiplier={self.noise_multiplier:g}{adaptive}, "
            f"round={self.round})"
        )


def _optional(name: str, value: float | None) -> float | None:
    return None if value is None else number(name, value, 0, open="low")
