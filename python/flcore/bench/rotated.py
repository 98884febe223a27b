"""Cases of rotated codes: encoding with error feedback, and adding codes as integers.

The peers do the same arithmetic on the same signs, which are drawn for them beforehand. flcore
draws its own and writes a checked packet; the peers stop at packed codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant
from flcore.reference import codes_rotated, hadamard

__all__ = ["CASES", "build_lut_add", "build_rotated"]

BLOCK, BITS = 1024, 4
GRADIENTS = 3


def _close(expected: list[np.ndarray]) -> Callable[[int, np.ndarray], str | None]:
    """Return a check that forgives codes whose value lies on a boundary up to rounding."""

    def matches(slot: int, result: np.ndarray) -> str | None:
        want = expected[slot]
        if result.shape != want.shape:
            return f"shape {result.shape}, expected {want.shape}"
        share = np.square(result - want).sum() / np.square(want).sum()
        return None if share < 1e-5 else f"a squared error of {share:.2g}, expected below 1e-5"

    return matches


def build_rotated(setup: Setup, *, numel: int) -> Workload:
    """One client's uplink: EF14, a rotation of every block, four bits a coordinate."""
    from flcore.compression import EF14, Encoder, Rotated, decode

    rng = setup.rng()
    gradients = [rng.standard_normal(numel, dtype=np.float32) for _ in range(GRADIENTS)]
    blocks = -(-numel // BLOCK)
    minus = hadamard.signs(0, blocks * BLOCK, 0, 0).reshape(blocks, BLOCK)
    signs = np.where(minus, np.float32(-1), np.float32(1))
    encoder = Encoder(Rotated(BITS, BLOCK), EF14(), like=gradients[0])
    packet_bytes = encoder.encode(gradients[0]).nbytes
    ours = Contestant(
        "flcore Encoder.encode",
        lambda slot: encoder.encode(gradients[slot]),
        to_numpy=lambda packet: np.asarray(decode(packet)),
        reset=encoder.reset,
        kind="ours",
    )
    error: np.ndarray = np.zeros(numel)
    expected: list[np.ndarray] = []
    for g in gradients[:2]:  # the second message depends on what the first one left
        u = (error + g).astype(np.float32)
        sent = _numpy_step(u, signs)[0]
        error = u - sent
        expected.append(sent)
    others, absent = _peers(gradients, signs, setup)
    return Workload(
        contestants=[ours, *others],
        matches=_close(expected),
        bytes_moved=12 * numel + packet_bytes,
        absent=absent,
        slots=GRADIENTS,
        verify_slots=range(2),
    )


def _numpy_step(u: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return decoded values, packed codes and scales of u."""
    flat = np.zeros(signs.size, np.float32)
    flat[: u.size] = u
    x = flat.reshape(signs.shape)
    root = np.float32(BLOCK**-0.5)
    z = hadamard.hadamard(x * signs) * root
    squares: np.ndarray = np.square(x).sum(1)
    inverse = np.float32(BLOCK**0.5) / np.sqrt(squares)
    half = codes_rotated.CENTROIDS[BITS]
    index = np.searchsorted(codes_rotated.bounds(BITS), np.abs(z) * inverse[:, None], "right")
    q = np.where(z < 0, -half[index], half[index])
    scales: np.ndarray = squares / (q * z).sum(1)
    codes = (index + 8 * (z < 0)).astype(np.uint8)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    d = hadamard.hadamard(q * (scales * root)[:, None]) * signs
    return d.reshape(-1)[: u.size], packed, scales


def _peers(
    gradients: list[np.ndarray], signs: np.ndarray, setup: Setup
) -> tuple[list[Contestant], dict[str, str]]:
    numel = gradients[0].size
    e = np.zeros(numel, np.float32)

    def step(slot: int) -> tuple[np.ndarray, ...]:
        u = gradients[slot] + e
        sent, packed, scales = _numpy_step(u, signs)
        np.subtract(u, sent, out=e)
        return sent, packed, scales

    contestants = [
        Contestant("numpy butterflies", step, to_numpy=lambda r: r[0], reset=lambda: e.fill(0))
    ]
    eager, compiled = "torch butterflies", "torch.compile of the butterflies"
    torch, reason = optional("torch")
    if torch is None:
        return contestants, dict.fromkeys((eager, compiled), reason)
    contestants.append(_torch_chain(torch, gradients, signs, eager, lambda f: f))
    if not setup.compiled:
        return contestants, {compiled: "left out on request"}
    contestants.append(_torch_chain(torch, gradients, signs, compiled, torch.compile))
    return contestants, {}


def _torch_chain(
    torch: Any, gradients: list[np.ndarray], signs: np.ndarray, name: str, wrap: Any
) -> Contestant:
    numel, blocks = gradients[0].size, signs.shape[0]
    inputs = [torch.from_numpy(g) for g in gradients]
    s = torch.from_numpy(signs)
    half = torch.from_numpy(codes_rotated.CENTROIDS[BITS])
    bounds = torch.from_numpy(codes_rotated.bounds(BITS))
    centroids = torch.cat([-half.flip(0), half])
    edges = torch.cat([-bounds.flip(0), torch.zeros(1), bounds])
    e = torch.zeros(numel)
    root = BLOCK**-0.5

    def transform(x: Any) -> Any:
        h = 1
        while h < BLOCK:
            x = x.view(blocks, BLOCK // (2 * h), 2, h)
            first, second = x[:, :, 0], x[:, :, 1]
            x = torch.stack((first + second, first - second), 2)
            h *= 2
        return x.view(blocks, BLOCK) * root

    def step(g: Any, error: Any) -> tuple[Any, ...]:
        u = g + error
        x = torch.nn.functional.pad(u, (0, blocks * BLOCK - numel)).view(blocks, BLOCK)
        z = transform(x * s)
        squares = (x * x).sum(1, keepdim=True)
        codes = torch.bucketize(z * (BLOCK**0.5 / squares.sqrt()), edges, out_int32=True)
        q = centroids[codes]
        scales = squares / (q * z).sum(1, keepdim=True)
        narrow = codes.to(torch.uint8)
        packed = narrow[:, 0::2] | narrow[:, 1::2] << 4
        sent = (transform(q * scales) * s).view(-1)[:numel]
        torch.sub(u, sent, out=error)
        return sent, packed, scales

    run = wrap(step)
    return Contestant(
        name,
        lambda slot: run(inputs[slot], e),
        to_numpy=lambda result: result[0].numpy(),
        reset=lambda: e.zero_(),
    )


def build_lut_add(setup: Setup, *, clients: int, numel: int) -> Workload:
    """Server's side of THC: table values of the codes of many clients, added as integers."""
    from flcore.compression import THC
    from flcore.ops.lut_add import lut_add

    rng = setup.rng()
    packets = [rng.integers(0, 256, numel // 2, np.uint8) for _ in range(clients)]
    table = np.array(THC().table, np.uint8)
    pairs = np.stack([np.tile(table, 16), np.repeat(table, 16)], 1).astype(np.int16)
    want = np.zeros((numel // 2, 2), np.int64)
    for packed in packets:
        want += pairs[packed]
    expected = want.reshape(-1)

    def matches(slot: int, result: np.ndarray) -> str | None:
        return None if np.array_equal(result, expected) else "a sum differs"

    ours = Contestant(
        "flcore lut_add",
        lambda slot: lut_add(packets, table, bits=4, codes=numel),
        kind="ours",
    )

    def add_numpy(slot: int) -> np.ndarray:
        total = np.zeros((numel // 2, 2), np.int16)
        for packed in packets:
            total += pairs[packed]
        return total.reshape(-1)

    contestants = [ours, Contestant("numpy table of bytes", add_numpy)]
    name = "torch table of bytes"
    torch, reason = optional("torch")
    if torch is None:
        return Workload(contestants, matches, clients * numel // 2 + 2 * numel, {name: reason})
    inputs, values = [torch.from_numpy(p) for p in packets], torch.from_numpy(pairs)

    def add_torch(slot: int) -> Any:
        total = torch.zeros((numel // 2, 2), dtype=torch.int16)
        for packed in inputs:
            total += values[packed.to(torch.int32)]
        return total.view(-1)

    contestants.append(Contestant(name, add_torch))
    return Workload(contestants, matches, clients * numel // 2 + 2 * numel)


CASES = [
    Case(
        name="rotated4_ef14_10m",
        family="compression",
        title="EF14 + Rotated(4), block 1024, 10,000,000 values",
        formula="12·d + packet: read e and g, write e; the rotation happens in cache",
        build=build_rotated,
        sizes={"numel": 10_000_000},
        tiny={"numel": 40_009},
        bound="copy",
        note="flcore writes the packet and draws the signs, the peers have drawn them before.",
    ),
    Case(
        name="lut_add_32x4m",
        family="compression",
        title="integer sum of 32 THC packets, 4,000,000 values of 4 bits",
        formula="n·d/2 + 2·d: codes read once, sums of 16 bits written once",
        build=build_lut_add,
        sizes={"clients": 32, "numel": 4_000_000},
        tiny={"clients": 12, "numel": 40_006},
        bound="read",
        note="The peers look both codes of a byte up at once, in a table of 256 pairs.",
    ),
]
