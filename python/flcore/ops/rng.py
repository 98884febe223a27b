"""Counter-based random numbers: any stretch of any stream, the same bits in every variant."""

from __future__ import annotations

import operator
import sys
from typing import Any

import numpy as np

from flcore import _arrays, _native, _variants
from flcore.errors import DTypeError, InvalidInputError

__all__ = ["random_bits", "random_normal", "random_uniform"]

STREAM_LENGTH = 1 << 34  # PHILOX_LENGTH in csrc/philox.h
FORMS = {"bits": "uint32", "uniform": "float32", "normal": "float32"}  # in the order of RandomForm


def random_bits(
    numel: int,
    seed: int,
    *,
    round: int = 0,
    tensor: int = 0,
    client: int = 0,
    offset: int = 0,
    out: Any = None,
    device: Any = None,
    variant: str | None = None,
) -> Any:
    """Elements ``offset .. offset + numel - 1`` of a Philox4x32-10 stream, 32 random bits each.

    A stream is named by (seed, round, tensor, client) and has no state: element i is a function of
    the name and of i alone, so parts of it can be made in any order, on any device, and agree bit
    for bit. Writes 4 bytes a value and reads nothing.

    Parameters
    ----------
    numel : int
        How many values.
    seed : int
        Key of the generator, below 2^64.
    round, tensor, client : int
        The rest of the stream's name, each below 2^32: training round, layer, client.
    offset : int
        Position of the first value; ``offset + numel <= 2^34``.
    out : array of `numel` values, optional
        uint32, contiguous, NumPy or torch: where the values go.
    device : str or torch.device, optional
        Where a torch tensor is made, "cpu" or "cuda:0"; by default the result is a NumPy array.
    variant : {"reference", "cpu", "cuda", "triton"}, optional
        Which implementation runs; by default the best for the device.

    Returns
    -------
    (numel,) uint32
        `out` itself if it was given.

    Raises
    ------
    InvalidInputError
        A number outside its range, or an `out` of another length.
    DTypeError
        A number that is not an integer, or an `out` of another dtype.
    VariantUnavailableError
        The named variant cannot run here.

    Notes
    -----
    Key words: the low and the high half of `seed`. Counter words: ``i >> 2``, tensor, round,
    client; element i is word ``i & 3`` of the block.

    References
    ----------
    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Examples
    --------
    >>> from flcore.ops import random_bits
    >>> random_bits(3, seed=0)
    array([1713891541, 3781805453, 3159862348], dtype=uint32)
    """
    name = (seed, round, tensor, client)
    return _random("bits", numel, name, offset, out, device, variant)


def random_uniform(
    numel: int,
    seed: int,
    *,
    round: int = 0,
    tensor: int = 0,
    client: int = 0,
    offset: int = 0,
    out: Any = None,
    device: Any = None,
    variant: str | None = None,
) -> Any:
    """Uniform float32 in [0, 1): the upper 24 bits of `random_bits`, times 2^-24, exact.

    Arguments, errors and streams are those of `random_bits`; `out` is float32.

    Returns
    -------
    (numel,) float32
        `out` itself if it was given.

    Examples
    --------
    >>> from flcore.ops import random_uniform
    >>> random_uniform(3, seed=0)
    array([0.39904642, 0.88052016, 0.73571277], dtype=float32)
    """
    name = (seed, round, tensor, client)
    return _random("uniform", numel, name, offset, out, device, variant)


def random_normal(
    numel: int,
    seed: int,
    *,
    round: int = 0,
    tensor: int = 0,
    client: int = 0,
    offset: int = 0,
    out: Any = None,
    device: Any = None,
    variant: str | None = None,
) -> Any:
    r"""Standard normal float32, by Box-Muller from neighbouring words of `random_bits`.

    Arguments, errors and streams are those of `random_bits`; `out` is float32. Writes 4 bytes a
    value and reads nothing.

    Returns
    -------
    (numel,) float32
        `out` itself if it was given.

    Notes
    -----
    Elements 2k and 2k + 1 are :math:`\sqrt{-2 \ln u_1} \cos 2 \pi u_2` and
    :math:`\sqrt{-2 \ln u_1} \sin 2 \pi u_2` with :math:`u_1 = (w_{2k} + 1) 2^{-32}` in (0, 1] and
    :math:`u_2 = \lfloor w_{2k+1} / 2^7 \rfloor 2^{-25}` in [0, 1). Each value is within 1e-6 of
    these in exact arithmetic; all variants have the same bits, because logarithm, sine and cosine
    are polynomials in float32 operations rounded one by one.

    The tails end at :math:`\sqrt{64 \ln 2} = 6.66`, beyond which the normal law has 2.7e-11 of its
    mass, and values lie on a grid of floating-point numbers: privacy proofs for the continuous law
    carry over only as far as one accepts that (Mironov, "On significance of the least significant
    bits for differential privacy", CCS 2012).

    References
    ----------
    Box, Muller, "A note on the generation of random normal deviates", Annals of Mathematical
    Statistics 29, 1958.

    Examples
    --------
    >>> from flcore.ops import random_normal
    >>> random_normal(4, seed=0)
    array([ 0.99113756, -0.9246626 , -0.617609  , -0.48206845], dtype=float32)
    """
    name = (seed, round, tensor, client)
    return _random("normal", numel, name, offset, out, device, variant)


def _random(
    form: str,
    numel: int,
    name: tuple[int, int, int, int],
    offset: int,
    out: Any,
    device: Any,
    variant: str | None,
) -> Any:
    numel = _integer("numel", numel, STREAM_LENGTH + 1)
    seed = _integer("seed", name[0], 1 << 64)
    words = [
        _integer(label, value, 1 << 32)
        for label, value in zip(("round", "tensor", "client"), name[1:], strict=True)
    ]
    offset = _integer("offset", offset, STREAM_LENGTH + 1)
    if offset + numel > STREAM_LENGTH:
        raise InvalidInputError(
            f"offset: a stream has 2^34 values, expected offset + numel within it, "
            f"got {offset} + {numel}"
        )
    dtype = FORMS[form]
    if out is None:
        out = _empty(numel, dtype, device)
    elif device is not None:
        raise InvalidInputError("device: give either out or device, not both")
    target = _target(out, dtype, numel)
    function = _variants.choose("random", target.device, variant)
    function(target, form, seed, *words, offset)
    return out


def _integer(label: str, value: Any, limit: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise DTypeError(f"{label}: expected an integer, got {type(value).__name__}") from None
    if not 0 <= number < limit:
        raise InvalidInputError(f"{label}: expected 0 <= {label} < {limit}, got {number}")
    return number


def _empty(numel: int, dtype: str, device: Any) -> Any:
    if device is None:
        return np.empty(numel, dtype)
    from flcore import _extras

    torch = _extras.require("torch", extra="torch")
    return torch.empty(numel, dtype=getattr(torch, dtype), device=device)


def _target(out: Any, dtype: str, numel: int) -> _arrays.View:
    """View `out` as float32, the type of every form as far as memory goes."""
    if not _arrays.is_array(out) or _arrays.dtype_name(out) != dtype:
        got = _arrays.dtype_name(out) if _arrays.is_array(out) else type(out).__name__
        raise DTypeError(f"out: expected an array of {dtype}, got {got}")
    words = out.view(np.float32 if isinstance(out, np.ndarray) else sys.modules["torch"].float32)
    like = _arrays.View(0, numel, "float32", _arrays.device_of(out), None)
    target = _arrays.writable_view(words, "out", like)
    if target is None:
        raise InvalidInputError("out: expected a contiguous array")
    return target


# ---- variants ----------------------------------------------------------------------------------


def _random_cpu(
    out: _arrays.View,
    form: str,
    seed: int,
    round: int,
    tensor: int,
    client: int,
    offset: int,
) -> None:
    """csrc/cpu/rng.isa.cpp; `out` receives float32, or 32 bits in the place of each."""
    code = list(FORMS).index(form)
    threads = _native.threads_for(out.numel)
    _native.core.random(out.ptr, out.numel, code, seed, round, tensor, client, offset, threads)


def _random_cuda(
    out: _arrays.View,
    form: str,
    seed: int,
    round: int,
    tensor: int,
    client: int,
    offset: int,
) -> None:
    """kernels/rng.cu on torch's current stream."""
    code = list(FORMS).index(form)
    queue = _arrays.queue(out.device)
    _native.cuda.random(out.ptr, out.numel, code, seed, round, tensor, client, offset, *queue)


_variants.add("random", "cpu", lambda: _random_cpu, _variants.cpu_only)
_variants.add("random", "reference", _variants.lazy("flcore.reference.rng", "fill"))
_variants.add(
    "random", "triton", _variants.lazy("flcore.pykernels.rng", "fill"), _variants.needs_triton
)
_variants.add("random", "cuda", lambda: _random_cuda, _variants.needs_cuda)
