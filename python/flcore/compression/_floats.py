"""Codecs whose codes are floating-point numbers: storage types, powers of two, FP8, MX, NF4.

They are meant for updates, differences of models, which bear far fewer bits than models themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flcore.compression._codec import Codec, Job
from flcore.compression._settings import check_choice, check_integer
from flcore.ops.quantize import quantize
from flcore.reference.codes_float import FORMATS

__all__ = ["FP8", "MX", "NF4", "Dense", "Natural"]

ROUNDINGS = ("nearest", "stochastic")
VALUES = {"float32": 32, "float16": 16, "bfloat16": 16}
LONGEST = 65_536  # coordinates a bucket of codes that have no scale


class _FloatCodec(Codec):
    """What these codecs share: an error of a fraction of each value."""

    rounding: str

    def eta(self, numel: int) -> float:
        """Return 0.5: what is lost is a small part of every update."""
        return 0.5

    def _quantize(self, job: Job, codec: str, bits: int, **options: object) -> np.ndarray:
        return quantize(
            job.update,
            codec=codec,
            bits=bits,
            rounding=self.rounding,
            state=job.state,
            **options,  # type: ignore[arg-type]
            **job.header,
        )


@dataclass(frozen=True)
class Dense(_FloatCodec):
    """Send every value in a storage type.

    Parameters
    ----------
    values : {"bfloat16", "float16", "float32"}
        Type on the wire. What is too large for it becomes the largest finite number.
    rounding : {"nearest", "stochastic"}
        To the nearest number, ties to even; or at random to one of the two neighbours so that the
        expectation is the value. float32 is not rounded.

    Raises
    ------
    InvalidInputError
        A setting that is none of these.

    Notes
    -----
    float16 has no numbers below 6e-8: small updates vanish unless feedback collects them.
    Stochastic rounding among its subnormals uses 13 bits, a bias below 2**-37 a value.
    """

    values: str = "bfloat16"
    rounding: str = "nearest"
    name: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        check_choice("values", self.values, tuple(VALUES))
        check_choice("rounding", self.rounding, ROUNDINGS)

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet, 4 or 2 bytes a coordinate; see `Codec.encode`."""
        bits = VALUES[self.values]
        return self._quantize(job, "dense", bits, bucket=LONGEST, values=self.values)


@dataclass(frozen=True)
class Natural(_FloatCodec):
    """Send signed powers of two: natural compression.

    ``|u| = m 2**e`` with 1 <= m < 2 becomes 2**(e + 1) with probability m - 1, else 2**e: unbiased,
    with variance at most ``u**2 / 8``.

    Parameters
    ----------
    bits : {8, 9}
        9: sign and the exponent of a float32, all magnitudes up to 2**127. 8: sign and 7 bits, 0 or
        2**-108 to 2**18; a smaller magnitude becomes 2**-108 or 0 with the right probability, a
        larger one becomes 2**18, which is the only bias.
    rounding : {"stochastic", "nearest"}
        "nearest" takes the nearer power of two (the upper one from m = 3/2 on): biased, with less
        error; for use with feedback.

    Raises
    ------
    InvalidInputError
        A setting that is none of these.

    References
    ----------
    Horvath et al., "Natural Compression for Distributed Deep Learning", arXiv 1905.10988.
    """

    bits: int = 8
    rounding: str = "stochastic"
    name: ClassVar[str] = "natural"

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, (8, 9))
        check_choice("rounding", self.rounding, ROUNDINGS)

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet, `bits` a coordinate; see `Codec.encode`."""
        form = 0 if self.bits == 9 else 1
        return self._quantize(job, "natural", self.bits, form=form, bucket=LONGEST)


@dataclass(frozen=True)
class FP8(_FloatCodec):
    """Send 8-bit floating-point numbers times one power of two a bucket.

    The scale is the least power of two that brings the bucket's largest magnitude into the format,
    so that scaling loses nothing and nothing is cut off.

    Parameters
    ----------
    format : {"e4m3", "e5m2"}
        Bits of exponent and mantissa. e4m3 has the smaller error where a bucket spans less than
        2**15, which is nearly always.
    bucket : int
        Coordinates that share a scale, 1 to 65,536; 4 bytes each bucket.
    rounding : {"nearest", "stochastic"}
        To the nearest number, ties to even; or at random so that the expectation is the value.

    Raises
    ------
    InvalidInputError
        A setting that cannot be used.

    References
    ----------
    Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433.
    """

    format: str = "e4m3"
    bucket: int = 1024
    rounding: str = "nearest"
    name: ClassVar[str] = "fp8"

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("e4m3", "e5m2"))
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_integer("bucket", self.bucket, 1, LONGEST)

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet, 1 + 4 / bucket bytes a coordinate; see `Codec.encode`."""
        form = FORMATS[self.format].form
        return self._quantize(job, "minifloat", 8, form=form, bucket=self.bucket, values="float32")


@dataclass(frozen=True)
class MX(_FloatCodec):
    """Send blocks of 32 small numbers with a shared exponent, as the OCP microscaling formats do.

    The shared scale is ``2**(floor(log2 max|u|) - emax)``, one byte a block. By that rule values
    between the format's largest number and the next power of two are cut off.

    Parameters
    ----------
    format : {"e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8"}
        Element: 8, 8, 6, 6, 4 or 8 bits.
    rounding : {"nearest", "stochastic"}
        To the nearest number, ties to even; or at random so that the expectation is the value,
        except where values are cut off.

    Raises
    ------
    InvalidInputError
        A setting that is none of these.

    References
    ----------
    OCP Microscaling Formats (MX) Specification, version 1.0, 2023.
    """

    format: str = "e4m3"
    rounding: str = "nearest"
    name: ClassVar[str] = "mx"
    block: ClassVar[int] = 32

    def __post_init__(self) -> None:
        check_choice("format", self.format, tuple(name for name in FORMATS if name != "nf4"))
        check_choice("rounding", self.rounding, ROUNDINGS)

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet, bits of an element + 1/4 a coordinate; see `Codec.encode`."""
        f = FORMATS[self.format]
        return self._quantize(
            job, "minifloat", f.bits, form=f.form, bucket=self.block, values="e8m0"
        )


@dataclass(frozen=True)
class NF4(_FloatCodec):
    """Send 4-bit indices into 16 quantiles of a normal distribution, times max|u| of a bucket.

    Parameters
    ----------
    bucket : int
        Coordinates that share a scale, 1 to 65,536; 4 bytes each bucket.

    Raises
    ------
    InvalidInputError
        `bucket` cannot be used.

    Notes
    -----
    To the nearest of the 16, ties to the lower. They are not symmetric: 8 are above zero, 7 below.

    References
    ----------
    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv
    2305.14314.
    """

    bucket: int = 64
    rounding: ClassVar[str] = "nearest"  # type: ignore[misc]
    name: ClassVar[str] = "nf4"

    def __post_init__(self) -> None:
        check_integer("bucket", self.bucket, 1, LONGEST)

    def encode(self, job: Job) -> np.ndarray:
        """Return the packet, 1/2 + 4 / bucket bytes a coordinate; see `Codec.encode`."""
        form = FORMATS["nf4"].form
        return self._quantize(job, "minifloat", 4, form=form, bucket=self.bucket, values="float32")
