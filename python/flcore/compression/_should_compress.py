"""Whether compressing pays on a link: what encoding and decoding cost against the bytes saved."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from flcore import _native
from flcore.compression._codec import Codec
from flcore.compression._encoder import Encoder
from flcore.compression._feedback import Feedback
from flcore.compression._packet import decode_add
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["Costs", "Prediction", "measure_costs", "should_compress"]

SAMPLE = 1 << 20  # values that are encoded to find out, at most
REPEATS = 5


@dataclass(frozen=True)
class Costs:
    """What one value costs.

    Attributes
    ----------
    encode_seconds, decode_seconds : float
        Time to encode a value on the client and to add it to a sum on the server.
    nbytes : float
        Bytes of the packet.
    """

    encode_seconds: float
    decode_seconds: float
    nbytes: float

    def __post_init__(self) -> None:
        for name in ("encode_seconds", "decode_seconds", "nbytes"):
            _number(name, getattr(self, name), zero=True)


@dataclass(frozen=True)
class Prediction:
    """What `should_compress` answers; true in an `if` where compressing is faster.

    Attributes
    ----------
    compress : bool
        Whether ``compressed_seconds < dense_seconds``.
    dense_seconds : float
        Time to send the values as they are.
    compressed_seconds : float
        Time to encode, send and decode the packet.
    encode_seconds, decode_seconds : float
        The parts of it that are not sending.
    dense_bytes, compressed_bytes : int
        What goes over the link.
    break_even : float
        Link rate in bytes a second below which compressing is faster; 0 where it never is.
    """

    compress: bool
    dense_seconds: float
    compressed_seconds: float
    encode_seconds: float
    decode_seconds: float
    dense_bytes: int
    compressed_bytes: int
    break_even: float

    def __bool__(self) -> bool:
        return self.compress


def should_compress(
    numel: int,
    bytes_per_second: float,
    codec: Codec,
    feedback: Feedback | None = None,
    *,
    value_bytes: int = 4,
    costs: Costs | None = None,
) -> Prediction:
    """Predict whether a compressed update reaches the server's sum earlier than a dense one.

    It does if and only if ``encode + decode + bytes / rate < dense bytes / rate``. On fast links
    compression costs more time than it saves: a 4-bit code of 10^8 values takes about 0.1 s on two
    cores and saves 2.8 s at 1 Gbit/s, but only 0.1 s at 25 Gbit/s.

    Parameters
    ----------
    numel : int
        Values of an update, at least 1.
    bytes_per_second : float
        Rate of the link for this client: 1 Gbit/s is 1.25e8.
    codec : codec
        What would be sent.
    feedback : error control, optional
        What the client would remember.
    value_bytes : int
        Bytes of a value that is sent as it is: 4 for float32.
    costs : Costs, optional
        Constants to use; by default those that `measure_costs` finds on this machine.

    Returns
    -------
    Prediction

    Raises
    ------
    InvalidInputError
        A size or rate that is not positive; or a codec that cannot encode a plain vector.
    DTypeError
        `codec` or `feedback` is not one.

    Notes
    -----
    Client and server are taken to be machines like this one, with nothing else to do, and the
    server to handle one packet at a time. Neither the latency of the link nor what the error of a
    codec costs in rounds is counted.

    Examples
    --------
    >>> from flcore.compression import AbsMax, Costs, should_compress
    >>> costs = Costs(encode_seconds=1e-9, decode_seconds=2e-10, nbytes=0.508)
    >>> for rate in (1.25e8, 1.25e10):  # 1 and 100 Gbit/s
    ...     found = should_compress(10_000_000, rate, AbsMax(4), costs=costs)
    ...     print(found.compress, round(found.dense_seconds, 4), round(found.compressed_seconds, 4))
    True 0.32 0.0526
    False 0.0032 0.0124
    """
    numel = _whole("numel", numel)
    value_bytes = _whole("value_bytes", value_bytes)
    rate = _number("bytes_per_second", bytes_per_second)
    _check(codec, feedback)
    if costs is None:
        costs = measure_costs(codec, feedback, numel)
    elif not isinstance(costs, Costs):
        raise DTypeError(f"costs: expected Costs, got {type(costs).__name__}")
    encode, decode = numel * costs.encode_seconds, numel * costs.decode_seconds
    dense_bytes, packet_bytes = numel * value_bytes, math.ceil(numel * costs.nbytes)
    saved = dense_bytes - packet_bytes
    dense, compressed = dense_bytes / rate, encode + decode + packet_bytes / rate
    break_even = 0.0
    if saved > 0:
        break_even = saved / (encode + decode) if encode + decode > 0 else math.inf
    return Prediction(
        compress=compressed < dense,
        dense_seconds=dense,
        compressed_seconds=compressed,
        encode_seconds=encode,
        decode_seconds=decode,
        dense_bytes=dense_bytes,
        compressed_bytes=packet_bytes,
        break_even=break_even,
    )


def measure_costs(codec: Codec, feedback: Feedback | None = None, numel: int = SAMPLE) -> Costs:
    """Encode and decode a sample on this machine and return what a value costs.

    The sample is a square matrix (or twice as wide) of as many values as asked for, rounded up to a
    power of two, 2**20 at most: beyond, costs grow in proportion. Medians of a few calls, 50 to
    100 ms in all for the largest sample. Found once in a process for each codec, error control,
    sample and number of threads.

    Parameters
    ----------
    codec, feedback
        As for `should_compress`.
    numel : int
        Values of an update.

    Raises
    ------
    InvalidInputError, DTypeError
        As `should_compress`.
    """
    _check(codec, feedback)
    size = min(1 << (_whole("numel", numel) - 1).bit_length(), SAMPLE)
    return _measure(codec, feedback, size, _native.get_num_threads())


@lru_cache(maxsize=256)
def _measure(codec: Codec, feedback: Feedback | None, size: int, threads: int) -> Costs:
    rng = np.random.default_rng(0)
    rows = 1 << (size.bit_length() - 1) // 2  # a matrix: a low-rank code wants one
    updates = [rng.standard_normal((rows, size // rows), dtype=np.float32) for _ in range(2)]
    encoder = Encoder(codec, feedback, like=updates[0], tensor_table=True)
    packets: list[Any] = []

    def encode(turn: int) -> None:
        packets.append(encoder.encode(updates[turn % 2], round=turn))

    total = np.zeros_like(updates[0])

    def decode(turn: int) -> None:
        decode_add([packets[turn]], [1.0], total)

    encode_seconds = _median_seconds(encode)
    decode_seconds = _median_seconds(decode)
    nbytes = statistics.median(p.nbytes for p in packets[-REPEATS:])
    return Costs(encode_seconds / size, decode_seconds / size, nbytes / size)


def _median_seconds(call: Callable[[int], None]) -> float:
    """Time `REPEATS` calls after two that warm up, which also lets a carried threshold settle."""
    times = []
    for turn in range(2 + REPEATS):
        start = time.perf_counter()
        call(turn)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _check(codec: Any, feedback: Any) -> None:
    if not isinstance(codec, Codec):
        raise DTypeError(f"codec: expected a codec such as TopK, got {type(codec).__name__}")
    if feedback is not None and not isinstance(feedback, Feedback):
        raise DTypeError(
            f"feedback: expected an error control or None, got {type(feedback).__name__}"
        )


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InvalidInputError(f"{name}: expected a whole number from 1, got {value!r}")
    return int(value)


def _number(name: str, value: Any, *, zero: bool = False) -> float:
    good = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not (good and math.isfinite(value) and (value > 0 or (zero and value == 0))):
        what = "number from 0" if zero else "positive number"
        raise InvalidInputError(f"{name}: expected a finite {what}, got {value!r}")
    return float(value)
