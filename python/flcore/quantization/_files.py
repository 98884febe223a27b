"""Weights in safetensors files, every length, dtype, shape and value checked on the way in.

A file is the length of its header in 8 bytes, the header in JSON, and the bytes of the tensors. A
weight "w" is the tensors "w.codes", "w.scales" and so on in the layout "rows", and an entry "w" of
the header's metadata with its shape, its scheme and a CRC-32 of every tensor.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flcore import _weight_arrays as parts
from flcore.errors import CheckpointError, DTypeError, InvalidInputError
from flcore.quantization._scheme import Scheme
from flcore.quantization._tensor import PARTS, QuantizedTensor

__all__ = ["load_one", "load_weights", "save_weights"]

DTYPES = {"U8": "uint8", "F16": "float16", "BF16": "uint16", "F32": "float32"}
NAMES = {stored: name for name, stored in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, the limit of the format
VERSION = 1


def save_weights(
    path: str | os.PathLike[str],
    weights: Mapping[str, QuantizedTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write quantised weights to one safetensors file.

    The file appears under its name when it is complete.

    Parameters
    ----------
    path : path
        Where; an existing file is replaced.
    weights : mapping of str to QuantizedTensor
        By name, in any layout and on any device.
    metadata : mapping of str to str, optional
        More entries for the header, read back by any safetensors reader.

    Raises
    ------
    DTypeError, InvalidInputError
        A value that is not a QuantizedTensor, or metadata with the name of a weight.
    """
    notes = dict(metadata or {})
    header: dict[str, Any] = {}
    blobs: list[memoryview] = []
    at = 0
    for name, weight in weights.items():
        if not isinstance(weight, QuantizedTensor):
            raise DTypeError(
                f"weights[{name!r}]: expected a QuantizedTensor, got {type(weight).__name__}"
            )
        if name in notes:
            raise InvalidInputError(f"metadata: {name!r} is the name of a weight")
        checks = {}
        for part, array in weight.to_layout("rows").numpy().arrays.items():
            blob = _bytes(array)
            header[f"{name}.{part}"] = {
                "dtype": NAMES[array.dtype.name],
                "shape": list(array.shape),
                "data_offsets": [at, at + blob.nbytes],
            }
            checks[part] = zlib.crc32(blob)
            blobs.append(blob)
            at += blob.nbytes
        fields = {"version": VERSION, "shape": weight.shape, "scheme": asdict(weight.scheme)}
        notes[name] = json.dumps({**fields, "crc32": checks})
    text = json.dumps({"__metadata__": notes, **header}).encode()
    text += b" " * (-len(text) % 8)
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for blob in blobs:
                file.write(blob)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def load_weights(path: str | os.PathLike[str]) -> dict[str, QuantizedTensor]:
    """Read what `save_weights` wrote; parts are NumPy arrays (`QuantizedTensor.to` moves them).

    Raises
    ------
    CheckpointError
        The file is truncated or damaged, or holds tensors that are no quantised weights; the
        message says where.
    OSError
        The file cannot be read.
    """
    data = np.fromfile(path, np.uint8)
    header, body = _header(data)
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise CheckpointError("header: __metadata__ is no table of strings")
    arrays = _tensors(header, body)
    weights: dict[str, QuantizedTensor] = {}
    for name, note in notes.items():
        found = {p: arrays.pop(f"{name}.{p}") for p in PARTS if f"{name}.{p}" in arrays}
        if found:
            weights[name] = _weight(name, note, found)
    if arrays:
        raise CheckpointError(f"{next(iter(arrays))}: a tensor that belongs to no weight")
    return weights


def load_one(path: str | os.PathLike[str]) -> QuantizedTensor:
    """Read a file that holds one weight."""
    weights = load_weights(path)
    if len(weights) != 1:
        raise CheckpointError(f"expected one weight, found {len(weights)}")
    return next(iter(weights.values()))


def _bytes(array: Any) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# ---- the container -----------------------------------------------------------------------------


def _header(data: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    if data.size < 8:
        raise CheckpointError(f"the file has {data.size} bytes; its header alone has 8")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(LONGEST_HEADER, data.size - 8):
        raise CheckpointError(
            f"header: {length} bytes announced, {data.size - 8} in the file, at most "
            f"{LONGEST_HEADER} allowed"
        )
    try:
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as err:
        raise CheckpointError(f"header: no JSON: {err}") from None
    if not isinstance(header, dict):
        raise CheckpointError("header: no JSON object")
    return header, data[8 + length :]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise CheckpointError("header: a name occurs twice")
    return found


def _sizes(x: Any) -> bool:
    """Whether `x` is a list of sizes."""
    return isinstance(x, list) and all(type(v) is int and v >= 0 for v in x)


def _tensors(header: dict[str, Any], body: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensors by name; together they are the whole body."""
    arrays, spans = {}, []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{name}: expected dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{name}: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
            raise CheckpointError(f"{name}: shape or data_offsets are no lists of sizes")
        begin, end = offsets
        stored = np.dtype(DTYPES[dtype])
        if not begin <= end <= body.size:
            raise CheckpointError(f"{name}: bytes {begin} to {end} of {body.size}")
        if math.prod(shape) * stored.itemsize != end - begin:
            raise CheckpointError(
                f"{name}: {end - begin} bytes for shape {tuple(shape)} of {dtype}"
            )
        array = parts.aligned(tuple(shape), stored)
        array.reshape(-1).view(np.uint8)[...] = body[begin:end]
        arrays[name] = array
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise CheckpointError(f"data_offsets: a hole or an overlap at byte {min(at, begin)}")
        at = end
    if at != body.size:
        raise CheckpointError(f"{body.size - at} bytes follow the last tensor")
    return arrays


# ---- one weight --------------------------------------------------------------------------------


def _weight(name: str, note: str, arrays: dict[str, Any]) -> QuantizedTensor:
    try:
        fields = json.loads(note)
        version, shape, scheme = fields["version"], fields["shape"], fields["scheme"]
        checks = dict(fields["crc32"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{name}: no description of a quantised weight") from None
    if version != VERSION:
        raise CheckpointError(f"{name}: version {version!r}, this package reads {VERSION}")
    if set(checks) != set(arrays):
        raise CheckpointError(f"{name}: expected {sorted(checks)}, found {sorted(arrays)}")
    for part, array in arrays.items():
        if zlib.crc32(_bytes(array)) != checks[part]:
            raise CheckpointError(f"{name}.{part}: the bytes do not have the CRC-32 of the header")
    if not _sizes(shape) or not isinstance(scheme, dict):
        raise CheckpointError(f"{name}: no shape or no scheme")
    if isinstance(scheme.get("codebook"), list):
        scheme["codebook"] = tuple(scheme["codebook"])
    try:
        return QuantizedTensor.from_parts(shape, Scheme(**scheme), **arrays)
    except (InvalidInputError, DTypeError, TypeError) as err:
        raise CheckpointError(f"{name}: {err}") from None
