"""Cases of floating-point codes: an update into a packet and back, against no compression at all.

"Uncompressed" is what a message costs without a codec: the update copied into a buffer of bytes,
and those into an array again. The eager torch chain stops at arrays of codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_round_trip"]

BLOCK, LARGEST, EMAX = 32, 448.0, 8  # of MX blocks of e4m3
UPDATES = 3
CHAIN = "torch chain"


def build_round_trip(setup: Setup, *, numel: int, codec: str) -> Workload:
    """Encode without feedback and decode into memory that is there."""
    from flcore.compression import FP8, MX, Dense, Encoder, Natural, decode

    chosen = {"mx": MX("e4m3"), "fp8": FP8(), "natural": Natural(), "bfloat16": Dense()}[codec]
    rng = setup.rng()
    updates = [rng.standard_normal(numel, dtype=np.float32) for _ in range(UPDATES)]
    encoder = Encoder(chosen, like=updates[0])
    out = np.empty(numel, np.float32)

    def ours(slot: int) -> np.ndarray:
        decode(encoder.encode(updates[slot], round=slot), out=out)
        return out

    def copies(slot: int) -> np.ndarray:
        data = updates[slot].tobytes()
        np.copyto(out, np.frombuffer(data, np.float32))
        return out

    def unchanged(slot: int, result: np.ndarray) -> str | None:
        return None if np.array_equal(result, updates[slot]) else "values differ"

    matches = _neighbours(updates) if codec == "natural" else _near(updates, codec)
    contestants = [
        Contestant("flcore encode and decode", ours, reset=encoder.reset, kind="ours"),
        Contestant("uncompressed, two copies", copies, matches=unchanged),
    ]
    packet_bytes = encoder.encode(updates[0]).nbytes
    encoder.reset()
    torch, reason = optional("torch")
    absent = {}
    if torch is None:
        absent[CHAIN] = reason
    else:
        contestants += _torch_chains(torch, updates, codec, setup)
    return Workload(
        contestants,
        matches,
        bytes_moved=8 * numel + 2 * packet_bytes,
        absent=absent,
        slots=UPDATES,
    )


def _near(updates: list[np.ndarray], codec: str) -> Callable[[int, np.ndarray], str | None]:
    """Return a check that the largest error is that of the format."""
    share = {"mx": 0.125, "fp8": 0.0625, "bfloat16": 2.0**-8}[codec]  # an MX block may be cut off

    def matches(slot: int, result: np.ndarray) -> str | None:
        x = updates[slot]
        return difference(result, x, share * np.maximum(np.abs(x), 2.0**-8 * np.abs(x).max()))

    return matches


def _neighbours(updates: list[np.ndarray]) -> Callable[[int, np.ndarray], str | None]:
    """Return a check that every value became a power of two next to it."""

    def matches(slot: int, result: np.ndarray) -> str | None:
        mantissa, exponent = np.frexp(np.abs(updates[slot]))
        below = np.ldexp(np.float32(0.5), exponent)
        right = (np.abs(result) == below) | (np.abs(result) == 2 * below) | (mantissa == 0)
        right &= np.signbit(result) == np.signbit(updates[slot])
        return None if right.all() else f"{int((~right).sum())} values are not next to theirs"

    return matches


def _torch_chains(
    torch: Any, updates: list[np.ndarray], codec: str, setup: Setup
) -> list[Contestant]:
    inputs = [torch.from_numpy(x) for x in updates]
    numel = updates[0].size

    def blocks(x: Any) -> Any:
        padded = torch.nn.functional.pad(x, (0, -numel % BLOCK))
        y = padded.view(-1, BLOCK)
        exponent = torch.floor(torch.log2(y.abs().amax(1, keepdim=True))) - EMAX
        exponent = exponent.clamp(min=-127)
        scaled = (y * torch.exp2(-exponent)).clamp(-LARGEST, LARGEST)
        codes, scales = scaled.to(torch.float8_e4m3fn), (exponent + 127).to(torch.uint8)
        back = codes.to(torch.float32) * torch.exp2(scales.to(torch.float32) - 127)
        return back.view(-1)[:numel]

    def one_scale(x: Any) -> Any:
        scale = torch.exp2(torch.ceil(torch.log2(x.abs().max() / LARGEST)))
        codes = (x / scale).to(torch.float8_e4m3fn)
        return codes.to(torch.float32) * scale

    def powers(x: Any) -> Any:
        mantissa, exponent = torch.frexp(x)
        up = torch.rand_like(x) < 2 * mantissa.abs() - 1
        code = ((exponent + up + 62).clamp(0, 127) | (x < 0).to(torch.int32) << 7).to(torch.uint8)
        power = torch.exp2((code & 127).to(torch.float32) - 63)
        return torch.where(code > 127, -power, power)

    def narrow(x: Any) -> Any:
        return x.to(torch.bfloat16).to(torch.float32)

    chain = {"mx": blocks, "fp8": one_scale, "natural": powers, "bfloat16": narrow}[codec]
    found = [Contestant(CHAIN, lambda slot: chain(inputs[slot]))]
    if setup.compiled:
        compiled = torch.compile(chain)
        found.append(Contestant("torch.compile of the chain", lambda slot: compiled(inputs[slot])))
    return found


def _case(codec: str, title: str, note: str) -> Case:
    return Case(
        name=f"{codec}_round_trip_10m",
        family="compression",
        title=f"{title}, encoded and decoded, 10,000,000 values",
        formula="8·d + 2·packet: read the update, write the packet; read it, write the update",
        build=build_round_trip,
        sizes={"numel": 10_000_000, "codec": codec},
        tiny={"numel": 40_009, "codec": codec},
        bound="copy",
        note=note,
    )


CASES = [
    _case("mx", "MX blocks of 32 E4M3", "flcore's packet has a checksum, written and verified."),
    _case("fp8", "E4M3 with a scale a bucket of 1024", "The torch chain has one scale for all."),
    _case("natural", "stochastic powers of two, 8 bits", "Every contestant draws random bits."),
    _case("bfloat16", "bfloat16", "flcore's packet has a checksum, written and verified."),
]
