"""What users run today for secure sums: NumPy in the arithmetic of Flower, and a cipher library."""

from __future__ import annotations

from typing import Any

import numpy as np

from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["encode_peers", "keystream_peers", "sum_peers"]


def sum_peers(rows: np.ndarray) -> tuple[list[Contestant], dict[str, str]]:
    """Sum of messages modulo 2^32; integers of 64 bits are what Flower holds them in."""
    wide = [row.astype(np.int64) for row in rows]

    def add_numpy(slot: int) -> np.ndarray:
        total = np.zeros(rows.shape[1], np.uint32)
        for row in rows:
            total += row
        return total

    def add_wide(slot: int) -> np.ndarray:
        total = np.zeros(rows.shape[1], np.int64)
        for row in wide:
            total += row
        return total % (1 << 32)

    contestants = [
        Contestant("numpy acc += row", add_numpy),
        Contestant("numpy sum(axis=0, dtype=uint32)", lambda slot: rows.sum(0, dtype=np.uint32)),
        Contestant("numpy acc += row, int64", add_wide, lambda total: total.astype(np.uint32)),
    ]
    name = "torch acc.add_(row), int32"
    torch, reason = optional("torch")
    if torch is None:
        return contestants, {name: reason}
    tensors = [torch.from_numpy(row.view(np.int32)) for row in rows]

    def add_torch(slot: int) -> Any:
        total = torch.zeros(rows.shape[1], dtype=torch.int32)
        for row in tensors:
            total.add_(row)
        return total

    return [*contestants, Contestant(name, add_torch)], {}


def keystream_peers(key: bytes, words: np.ndarray) -> tuple[list[Contestant], dict[str, str]]:
    """One keystream over a message."""
    generator = np.random.RandomState(1)

    def mersenne(slot: int) -> np.ndarray:
        return words + generator.randint(0, 1 << 32, words.size, np.uint32)

    contestants = [
        Contestant(
            "numpy RandomState.randint + add",
            mersenne,
            matches=lambda slot, result: None if result.any() else "no mask was added",
        )
    ]
    name = "cryptography ChaCha20"
    library, reason = optional("cryptography.hazmat.primitives.ciphers")
    if library is None:
        return contestants, {name: reason}
    out = np.empty(words.nbytes, np.uint8)

    def cipher(slot: int) -> np.ndarray:
        method = library.algorithms.ChaCha20(key, bytes(16))  # counter and nonce
        library.Cipher(method, mode=None).encryptor().update_into(words.data.cast("B"), out)
        return out

    return [*contestants, Contestant(name, cipher, lambda found: found.view(np.uint32))], {}


def encode_peers(
    updates: list[np.ndarray], q: int, neighbours: int, clip: float, levels: int
) -> list[Contestant]:
    """The client's chain of array operations, with the generator that Flower draws masks from."""
    size = updates[0].size + 1

    def mask(stream: int) -> np.ndarray:
        return np.random.RandomState(stream).randint(0, 1 << 32, size)

    def encode(slot: int) -> np.ndarray:
        y = updates[slot] * (q / levels)
        u = (np.clip(y, -clip, clip) + clip) * (levels / (2 * clip))
        z = np.ceil(u).astype(np.int32)
        z[np.random.rand(z.size) < z - u] -= 1
        total = np.concatenate([[q], z]) + mask(0)
        for stream in range(1, neighbours + 1):
            total = total - mask(stream)
        return total % (1 << 32)

    def unmask(words: np.ndarray) -> np.ndarray:
        total = words - mask(0)
        for stream in range(1, neighbours + 1):
            total = total + mask(stream)
        return (total % (1 << 32)).astype(np.uint32)

    return [Contestant("numpy chain with RandomState masks", encode, unmask)]
