"""Secure sums: fixed-point words, ChaCha20 masks, sums modulo a power of two, and the way back.

Stateless and with explicit buffers; `flcore.privacy.SecureSum` has the protocol's bookkeeping on
top. The arithmetic, its error bound and what it does not protect: docs/secure-sums.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flcore import _arrays, _variants
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops._mask_layers import ROUNDING, dequantize_layers, quantize_layers
from flcore.ops._words import (
    Mask,
    check_masks,
    check_position,
    copy_words,
    empty_like_words,
    overlap,
    whole,
    words_view,
)

__all__ = ["ROUNDING", "Mask", "dequantize_sum", "mask_add", "modular_sum", "quantize"]


def quantize(
    x: Any,
    *,
    scale: float = 1.0,
    clip: float = 8.0,
    levels: int = 1 << 22,
    rounding: str = "stochastic",
    seed: int | None = None,
    round: int = 0,
    tensor: int = 0,
    client: int = 0,
    offset: int = 0,
    masks: Sequence[Mask] = (),
    position: int = 0,
    bits: int = 32,
    out: Any = None,
    variant: str | None = None,
) -> tuple[Any, int]:
    r"""Fixed-point words of ``scale * x``, with masks added in the same pass.

    ``u = (clip(scale x, -C, C) + C) R / (2 C)`` in float64, rounded to an integer 0 .. R, plus the
    masks, modulo 2^bits. Reads x once and writes 4 bytes a value, whatever the number of masks.

    Parameters
    ----------
    x : array
        NumPy or torch on the CPU; float64, float32, float16 or bfloat16.
    scale : float
        Finite; the weight of the client.
    clip : float
        C, positive: values of ``scale * x`` beyond it become +-C.
    levels : int
        R steps between -C and C, so R + 1 words; ``1 <= R < 2^bits``.
    rounding : {"stochastic", "nearest"}
        ``ceil(u)`` minus 1 with probability ``ceil(u) - u``, unbiased to 2^-32 of a step; or to
        the nearest integer, ties to even.
    seed, round, tensor, client : int
        Name of the Philox stream of the stochastic rounding, see `flcore.ops.random_bits`.
    offset : int
        Position of ``x[0]`` in that stream.
    masks : sequence of Mask
        Word j of `x` meets word ``position + j`` of each stream.
    position : int
        Position of the first word in its message; ``position + numel <= 2^36``.
    bits : int
        b, 1 to 32: the modulus is 2^b.
    out : uint32 array, optional
        Where the words go. Nothing is written when the call raises.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    words : (numel,) uint32
        NumPy or torch, as `x`; `out` itself if it was given.
    clipped : int
        How many values were beyond +-C.

    Raises
    ------
    InvalidInputError
        A number outside its range, no seed for stochastic rounding, a key of another length.
    DTypeError
        `x` or `out` of a dtype or kind that cannot be used.
    NonFiniteError
        `x` holds a NaN or an infinity.
    VariantUnavailableError
        The named variant cannot run here.

    References
    ----------
    Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS
    2017; the arithmetic is that of SecAgg+ in Flower.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops.mask import quantize
    >>> quantize(np.float32([-9, -8, 0, 0.5, 8]), rounding="nearest")
    (array([      0,       0, 2097152, 2228224, 4194304], dtype=uint32), 1)
    """
    view = _arrays.view(x, "x")
    words = empty_like_words(view.numel, "uint32", view)
    clipped = quantize_layers(
        [view],
        words,
        scale=scale,
        clip=clip,
        levels=levels,
        rounding=rounding,
        stream=(seed, round, client),
        first_tensor=tensor,
        offset=offset,
        masks=masks,
        position=position,
        bits=bits,
        target=out,
        variant=variant,
    )
    return words if out is None else out, clipped


def mask_add(
    words: Any,
    masks: Sequence[Mask],
    *,
    position: int = 0,
    bits: int = 32,
    out: Any = None,
    variant: str | None = None,
) -> Any:
    """Add keystreams to words modulo 2^bits, all masks in one pass.

    ``out[j] = words[j] + sum_s sign_s * stream_s[position + j]``. Any part of a message can be
    masked on its own, anywhere, and has the same words. Reads and writes 4 bytes a word; making
    the streams is the work, 20 ChaCha rounds for 16 words of each.

    Parameters
    ----------
    words : (numel,) uint32 array
        NumPy, or torch on the CPU.
    masks : sequence of Mask
        May be empty.
    position : int
        Position of the first word in every stream; ``position + numel <= 2^36``.
    bits : int
        b, 1 to 32: the modulus is 2^b.
    out : uint32 array, optional
        Where the result goes; may be `words`.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    uint32 array, of the kind and shape of `words`; `out` itself if it was given.

    Raises
    ------
    InvalidInputError
        A key, nonce or sign that cannot be used, a position outside the streams, an `out` of
        another size.
    DTypeError
        Words that are not uint32.
    VariantUnavailableError
        The named variant cannot run here.

    References
    ----------
    Nir, Langley, "ChaCha20 and Poly1305 for IETF Protocols", RFC 8439, section 2.4.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import mask_add
    >>> from flcore.ops.mask import Mask
    >>> key = bytes(range(32))  # in production: secrets.token_bytes(32)
    >>> hidden = mask_add(np.uint32([1, 2, 3]), [Mask(key)])
    >>> mask_add(hidden, [Mask(key, -1)])
    array([1, 2, 3], dtype=uint32)
    """
    source = words_view(words, "words")
    bits = whole("bits", bits, 1, 32)
    position = check_position(position, source.numel)
    masks = check_masks(masks)
    if out is None:
        out = _arrays.empty_like(words)
    target = words_view(out, "out", writable=True, like=source)
    if target.ptr != source.ptr and overlap(source, target):
        source = copy_words(source)
    function = _variants.choose("mask_add", source.device, variant)
    function(source, target, masks=masks, position=position, bits=bits)
    return out


def modular_sum(rows: Any, *, acc: Any = None, bits: int = 32, variant: str | None = None) -> Any:
    """Sum of rows of words modulo 2^bits, into an accumulator if one is given.

    Exact, so any order and grouping of the rows gives the same words. Reads every row once and
    the accumulator once: ``4 + 8 / n`` bytes a value of n rows.

    Parameters
    ----------
    rows : sequence of (numel,) uint32 arrays, or one array (n, numel)
        NumPy, or torch on the CPU. May be empty if `acc` is given. Bits above `bits` have no
        effect.
    acc : (numel,) uint32 array, optional
        Added to, in place; contiguous.
    bits : int
        b, 1 to 32: the modulus is 2^b.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    (numel,) uint32 array, `acc` itself if it was given.

    Raises
    ------
    InvalidInputError
        Rows of different sizes, or no rows and no accumulator; nothing was added.
    DTypeError
        Rows that are not uint32, or an accumulator of another kind; nothing was added.
    VariantUnavailableError
        The named variant cannot run here.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import modular_sum
    >>> modular_sum([np.uint32([1, 2]), np.uint32([2**32 - 1, 5])])
    array([0, 7], dtype=uint32)
    """
    bits = whole("bits", bits, 1, 32)
    if not isinstance(rows, Iterable):
        raise DTypeError(f"rows: expected a list of arrays of words, got {type(rows).__name__}")
    rows = list(rows)
    views = [words_view(row, f"rows[{i}]") for i, row in enumerate(rows)]
    fresh = acc is None
    if acc is None:
        if not views:
            raise InvalidInputError("rows: expected at least one, or an accumulator to add to")
        acc = _arrays.empty_like(rows[0])
    target = words_view(acc, "acc", writable=True)
    for i, view in enumerate(views):
        if view.numel != target.numel or view.device != target.device:
            raise InvalidInputError(
                f"rows[{i}]: expected {target.numel} words on {target.device}, "
                f"got {view.numel} on {view.device}"
            )
    views = [copy_words(v) if overlap(v, target) else v for v in views]
    function = _variants.choose("modular_sum", target.device, variant)
    function(views, target, fresh=fresh, bits=bits)
    return acc


def dequantize_sum(
    words: Any,
    clients: int,
    *,
    clip: float = 8.0,
    levels: int = 1 << 22,
    divisor: float = 1.0,
    bits: int = 32,
    dtype: str = "float32",
    out: Any = None,
    variant: str | None = None,
) -> Any:
    """Sum of the clients' values out of the sum of their words, divided by `divisor`.

    ``(2 Z - n R) (C / R) / divisor``: the sum without the n shifts by C, in float64, rounded once
    to the output type. For a weighted mean the divisor is the sum of the clients' scales. Reads
    and writes every value once.

    Parameters
    ----------
    words : (numel,) uint32 array
        Z: the unmasked sum of the words of `clients` clients. NumPy, or torch on the CPU.
    clients : int
        n >= 1, with ``n R <= 2^bits``.
    clip, levels : float, int
        C and R, as in `quantize`.
    divisor : float
        Positive.
    bits : int
        b, 1 to 32: the modulus is 2^b.
    dtype : {"float64", "float32", "float16"}
        Of the result when `out` is not given; for torch also "bfloat16".
    out : floating array, optional
        Where the result goes. Nothing is written when the call raises.
    variant : {"reference", "cpu"}, optional
        Which implementation runs.

    Returns
    -------
    (numel,) array of the kind of `words`, or `out` itself.

    Raises
    ------
    InvalidInputError
        A number outside its range, more clients than the words can hold, or words above
        ``n R``: masks that were not removed, or a client that sent what no encoder makes.
    DTypeError
        `words` is not uint32, or `out` or `dtype` is not a floating type.
    VariantUnavailableError
        The named variant cannot run here.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.ops import dequantize_sum
    >>> dequantize_sum(np.uint32([2228224 + 1769472 + 2883584]), clients=3)
    array([2.25], dtype=float32)
    """
    source = words_view(words, "words")
    if out is not None:
        like = _arrays.view(out, "out")
        _arrays.writable_view(out, "out", like._replace(numel=source.numel, device=source.device))
        result = _arrays.empty_like(out)
    elif dtype in _arrays.DTYPE_CODES:
        result = empty_like_words(source.numel, dtype, source)
    else:
        raise DTypeError(f"dtype: expected one of {tuple(_arrays.DTYPE_CODES)}, got {dtype!r}")
    dequantize_layers(
        source,
        [_arrays.view(result)],
        clients,
        clip=clip,
        levels=levels,
        divisor=divisor,
        bits=bits,
        variant=variant,
    )
    if out is None:
        return result
    _arrays.assign(out, result)
    return out
