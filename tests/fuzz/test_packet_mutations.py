"""Hostile packets: seeded mutations decode or raise PacketError, and nothing else happens."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flcore import _native
from flcore.compression import Limits, Packet, decode, decode_add
from flcore.errors import PacketError
from flcore.ops.sparsify import sparsify
from flcore.reference import decode as reference
from flcore.reference import wire, wire_writer
from support import usable_levels

sys.path.insert(0, str(Path(__file__).parent))
import seeds

CASES = 12_000
NATIVE_CASES = int(os.environ.get("FLCORE_FUZZ_CASES", "100000"))
LIMITS = Limits(max_numel=2**20)
EDGES = [0, 1, 2, 63, 64, 65_535, 65_536, 65_537, 2**31, 2**32, 2**60, 2**63, 2**64 - 1]


def valid_packets(rng: np.random.Generator) -> list[bytes]:
    packets = []
    for numel, k in ((0, 0), (1, 1), (17, 5), (300, 30), (300, 300), (1000, 10), (65_537, 3)):
        for values in wire.VALUE_DTYPES:
            for index in wire.INDEX_CODINGS if numel < 5000 else ("tile16",):
                table = wire_writer.pack_tensors(["x"], [(numel,)]) if k % 2 else b""
                g = rng.standard_normal(numel).astype(np.float32)
                packet = sparsify(g, k=k, values=values, index=index, tensors=table)
                packets.append(packet.tobytes())
    return packets + [data for _, data in seeds.packets() if len(data) < 3000]


def mutate(data: bytearray, rng: np.random.Generator) -> bytearray:
    at = int(rng.integers(len(data)))
    kind = rng.integers(7)
    if kind == 0:
        return data[: rng.integers(len(data) + 1)]
    if kind == 1:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        data[at:at] = rng.bytes(int(rng.integers(1, 80)))
    elif kind == 3:
        del data[at : at + int(rng.integers(1, 80))]
    elif kind == 4:  # a field of the header or of the section table
        width = int(rng.choice([1, 2, 4, 8]))
        at = int(rng.integers(min(len(data), 168)))
        value = int(EDGES[rng.integers(len(EDGES))]) % 256**width
        data[at : at + width] = value.to_bytes(width, "little")
    elif kind == 5:
        data[at : at + 8] = rng.bytes(min(8, len(data) - at))
    else:  # a small step up or down: off by one
        data[at] = (data[at] + int(rng.choice([-1, 1]))) % 256
    return data


def seal(data: bytearray) -> bytearray:
    """Recompute length and checksum, so that the checks behind them are reached."""
    struct.pack_into("<Q", data, 24, len(data) - 64)
    data[60:64] = bytes(4)
    struct.pack_into("<I", data, 60, _native.core.crc32c(bytes(data)))
    return data


def accepts(parse, data: bytes) -> bool:
    try:
        parse(data, LIMITS)
    except PacketError as error:
        assert str(error).startswith("packet: ") and len(str(error)) > 20
        return False
    return True


def test_mutated_packets_decode_or_raise_packet_error():
    rng = np.random.default_rng(20_231)
    seeds = valid_packets(rng)
    guard = np.full(2**20 + 128, 7.0, np.float32)
    decoded = 0
    for case in range(CASES):
        data = bytearray(seeds[rng.integers(len(seeds))])
        for _ in range(rng.integers(1, 4)):
            if data:
                data = mutate(data, rng)
        if case % 2 and len(data) >= 64:
            data = seal(data)
        data = bytes(data)
        native = accepts(Packet.from_bytes, data)
        assert native == accepts(wire.parse, data), f"case {case}: the two readers disagree"
        if not native:
            continue
        decoded += 1
        packet = Packet.from_bytes(data, LIMITS)
        want = reference.dense(*wire.parse(data, LIMITS))
        numel = packet.header.numel
        out = guard[64 : 64 + numel]
        out[:] = 0
        decode_add([packet], [1.0], out)
        assert np.array_equal(out, want), f"case {case}: {packet}"
        assert np.array_equal(decode(packet), want)
        out[:] = 7.0
        assert guard.min() == guard.max() == 7.0, "written outside"
    assert decoded > CASES // 50, "too few mutants reach the decoder for this test to mean anything"


def test_refused_packets_leave_the_output_untouched():
    rng = np.random.default_rng(7)
    good = valid_packets(rng)[14]
    out = rng.standard_normal(wire.read_header(good).numel).astype(np.float32)
    before = out.tobytes()
    for _ in range(500):
        bad = bytes(mutate(bytearray(good), rng))
        try:
            decode_add([good, bad], [1.0, 1.0], out)
        except (PacketError, ValueError):
            assert out.tobytes() == before
        else:
            assert bad == good or wire.parse(bad)
            out = np.frombuffer(before, np.float32).copy()


@pytest.mark.slow
@pytest.mark.parametrize("level", usable_levels()[:1])
def test_mutants_under_the_sanitizers(native_build, tmp_path, level):
    """FLCORE_FUZZ_CASES=1000000 asks for more; tests/fuzz/fuzz.sh for a search led by coverage."""
    assert seeds.write(tmp_path / "packets") > 100
    done = subprocess.run(
        [str(native_build / "packet_mutations"), str(tmp_path / "packets"), str(NATIVE_CASES)],
        env={**os.environ, "FLCORE_ISA": level, "ASAN_OPTIONS": "max_allocation_size_mb=256"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.startswith(f"ok {level}"), done.stdout
