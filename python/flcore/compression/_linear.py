"""Codecs whose codes lie on an evenly spaced grid: sign, ternary, uniform, affine.

Every bucket of coordinates has a scale of its own, so that one layer of large values does not take
the resolution away from the others. Decoding is one product a coordinate.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flcore.compression._codec import Codec, Job, eta_of_bits
from flcore.compression._settings import check_choice, check_integer
from flcore.errors import InvalidInputError
from flcore.ops.quantize import quantize

__all__ = ["AbsMax", "Affine", "Sign", "Ternary", "Uniform"]

ROUNDINGS = ("nearest", "stochastic")
SCALE_DTYPES = ("float32", "bfloat16")
MAX_BUCKET = 65_536


class _LinearCodec(Codec):
    """What these codecs share."""

    bucket: int
    scale_dtype: str

    def _check(self, least_bucket: int = 1) -> None:
        check_integer("bucket", self.bucket, least_bucket, MAX_BUCKET)
        check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)

    @abstractmethod
    def _bits(self) -> int:
        """Return the width of a code."""

    def eta(self, numel: int) -> float:
        """Return 0.3 up to two bits, 0.5 above: the error control can trust finer codes more."""
        return eta_of_bits(self._bits())

    def _quantize(self, job: Job, codec: str, **options: object) -> np.ndarray:
        return quantize(
            job.update,
            codec=codec,
            bits=self._bits(),
            bucket=self.bucket,
            values=self.scale_dtype,
            state=job.state,
            **options,  # type: ignore[arg-type]
            **job.header,
        )


@dataclass(frozen=True)
class Sign(_LinearCodec):
    """Send the sign of every value and one magnitude a bucket: 1 bit a coordinate.

    Parameters
    ----------
    bucket : int
        Coordinates that share a scale, 1 to 65,536.
    scale : {"mean", "l2", "two_means"}
        "mean": a = mean |u|, which of all scales has the least error,
        ``||u||**2 - ||u||_1**2 / n``. "l2": ``a = ||u|| / sqrt(n)`` keeps the norm, but its error
        can exceed the update itself where few values are large: no contraction, so error feedback
        may diverge. "two_means": the means of the negative and of the other values, two scales;
        never worse than "mean".
    scale_dtype : {"float32", "bfloat16"}
        Type of the scales on the wire.

    Raises
    ------
    InvalidInputError
        A value that cannot be used.

    Notes
    -----
    0 and -0 count as positive: a decoded value is never 0 unless the whole bucket is. Biased, so
    meant for use with error feedback. ``1 / 8 + 4 / bucket`` bytes a coordinate.

    References
    ----------
    Bernstein et al., "signSGD", ICML 2018, arXiv 1802.04434. Karimireddy et al., "Error Feedback
    Fixes SignSGD", ICML 2019, arXiv 1901.09847. Seide et al., "1-Bit Stochastic Gradient Descent",
    Interspeech 2014.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import Encoder, Sign, decode
    >>> g = np.array([3, -1, 0, -4], np.float32)
    >>> print(decode(Encoder(Sign(), like=g).encode(g)))
    [ 2. -2.  2. -2.]
    """

    bucket: int = 1024
    scale: str = "mean"
    scale_dtype: str = "float32"
    name: ClassVar[str] = "sign"

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, ("mean", "l2", "two_means"))
        self._check(2 if self.scale == "two_means" else 1)

    def _bits(self) -> int:
        return 1

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet and move the state on; see `Codec.encode`."""
        codec = "affine" if self.scale == "two_means" else "sign"
        return self._quantize(job, codec, measure=self.scale)


@dataclass(frozen=True)
class Ternary(_LinearCodec):
    """Send -a, 0 or a for every value at random, so that the expectation is the value.

    With ``a = max |u|`` of the bucket, a value becomes ``a sign(u)`` with probability ``|u| / a``,
    else 0.

    Parameters
    ----------
    bucket : int
        Coordinates that share a scale, 1 to 65,536.
    clip : float or None
        Cut magnitudes at this many root mean squares of the bucket first: far less variance, but
        then unbiased only for the cut values. The paper takes 2.5 standard deviations, the same
        for values around 0; about 0, so that a bucket of equal values is not cut to nothing.
    packing : {"trits", "bits"}
        Five codes a byte (1.6 bits a coordinate) or four (2 bits, faster).
    scale_dtype : {"float32", "bfloat16"}
        Type of the scales on the wire; bfloat16 is rounded up.

    Raises
    ------
    InvalidInputError
        A value that cannot be used.

    References
    ----------
    Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning",
    NeurIPS 2017, arXiv 1705.07878.
    """

    bucket: int = 1024
    clip: float | None = None
    packing: str = "trits"
    scale_dtype: str = "float32"
    name: ClassVar[str] = "ternary"

    def __post_init__(self) -> None:
        check_choice("packing", self.packing, ("trits", "bits"))
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise InvalidInputError(f"clip: expected None or a number above 0, got {self.clip!r}")
        self._check()

    def _bits(self) -> int:
        return 2

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet and move the state on; see `Codec.encode`."""
        return self._quantize(
            job,
            "ternary",
            form=int(self.packing == "trits"),
            clip=self.clip or 0.0,
            rounding="stochastic",
        )


@dataclass(frozen=True)
class AbsMax(_LinearCodec):
    """Round to a symmetric grid up to the largest magnitude of the bucket.

    ``unit = max |u| / (2**(bits - 1) - 1)``; the error of a value is at most half a unit with
    nearest rounding, one unit with stochastic rounding, which is unbiased.

    Parameters
    ----------
    bits : int
        2 to 8 a coordinate.
    bucket : int
        Coordinates that share a scale, 1 to 65,536: 256 to 1024 suit 8 bits, 64 to 256 4 bits.
    rounding : {"nearest", "stochastic"}
        Nearest (half to even) has the smaller error: use it with error feedback. Without any, only
        stochastic rounding averages out over clients and rounds.
    scale_dtype : {"float32", "bfloat16"}
        Type of the scales on the wire; bfloat16 is rounded up, so that nothing is cut.

    Raises
    ------
    InvalidInputError
        A value that cannot be used.

    Notes
    -----
    ``bits / 8 + 4 / bucket`` bytes a coordinate. Squared error over squared norm for normal values
    and nearest rounding: 5e-5 with 8 bits and 256 coordinates, 0.012 with 4 bits and 64.

    References
    ----------
    Alistarh et al., "QSGD", NeurIPS 2017, arXiv 1610.02132, with the largest magnitude in the place
    of the norm.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.compression import AbsMax, Encoder, decode
    >>> g = np.array([7, -3.4, 0.6, 0], np.float32)
    >>> print(decode(Encoder(AbsMax(bits=4), like=g).encode(g)))
    [ 7. -3.  1.  0.]
    """

    bits: int = 8
    bucket: int = 256
    rounding: str = "nearest"
    scale_dtype: str = "float32"
    name: ClassVar[str] = "absmax"

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 2, 8)
        check_choice("rounding", self.rounding, ROUNDINGS)
        self._check()

    def _bits(self) -> int:
        return self.bits

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet and move the state on; see `Codec.encode`."""
        return self._quantize(job, "uniform", rounding=self.rounding)


@dataclass(frozen=True)
class Uniform(_LinearCodec):
    """QSGD: stochastic rounding to multiples of the bucket's Euclidean norm over `levels`.

    ``unit = ||u|| / levels``; most codes of a long bucket are 0 and no value reaches the last
    level, so at equal bits :class:`AbsMax` has a far smaller error (levels=127, 512 coordinates:
    0.0053 against 0.0002 of the squared norm). The variance is at most
    ``min(n / levels**2, sqrt(n) / levels) ||u||**2``.

    Parameters
    ----------
    levels : int
        Positive levels, 1 to 127.
    bucket : int
        Coordinates that share a norm, 1 to 65,536.
    rounding : {"stochastic", "nearest"}
        Stochastic is unbiased.
    scale_dtype : {"float32", "bfloat16"}
        Type of the scales on the wire; bfloat16 is rounded up.

    Raises
    ------
    InvalidInputError
        A value that cannot be used.

    Notes
    -----
    Codes take the fewest bits b with ``2**(b - 1) > levels``.

    References
    ----------
    Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding",
    NeurIPS 2017, arXiv 1610.02132.
    """

    levels: int = 127
    bucket: int = 512
    rounding: str = "stochastic"
    scale_dtype: str = "float32"
    name: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        check_integer("levels", self.levels, 1, 127)
        check_choice("rounding", self.rounding, ROUNDINGS)
        self._check()

    def _bits(self) -> int:
        return self.levels.bit_length() + 1

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet and move the state on; see `Codec.encode`."""
        return self._quantize(
            job, "uniform", measure="l2", levels=self.levels, rounding=self.rounding
        )


@dataclass(frozen=True)
class Affine(_LinearCodec):
    """Round to a grid from the smallest to the largest value of the bucket.

    ``unit = (max - min) / (2**bits - 1)``, decoded as ``min + unit * code``: a bucket of one value
    is exact. Better than :class:`AbsMax` where values are not centred at 0.

    Parameters
    ----------
    bits : int
        1 to 8 a coordinate.
    bucket : int
        Coordinates that share the two numbers, 2 to 65,536.
    rounding : {"nearest", "stochastic"}
        As :class:`AbsMax`.
    scale_dtype : {"float32", "bfloat16"}
        Type of the two numbers on the wire; in bfloat16 min is rounded down and the unit up, so
        that nothing is cut.

    Raises
    ------
    InvalidInputError
        A value that cannot be used.

    Notes
    -----
    ``bits / 8 + 8 / bucket`` bytes a coordinate.

    References
    ----------
    Markov et al., "CGX: Adaptive System Support for Communication-Efficient Deep Learning",
    Middleware 2022, arXiv 2111.08617.
    """

    bits: int = 8
    bucket: int = 512
    rounding: str = "nearest"
    scale_dtype: str = "float32"
    name: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 1, 8)
        check_choice("rounding", self.rounding, ROUNDINGS)
        self._check(2)

    def _bits(self) -> int:
        return self.bits

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet and move the state on; see `Codec.encode`."""
        return self._quantize(job, "affine", rounding=self.rounding)
