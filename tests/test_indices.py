"""Coded coordinates: the worked example, every variant against the reference, hostile sections."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore.errors import DTypeError, InvalidInputError, PacketError
from flcore.ops.indices import decode_indices, encode_indices
from flcore.reference import indices as reference
from support import outputs_per_level, unaligned

CODINGS = tuple(reference.CODINGS)
VARIANTS = ("reference", "cpu")
TILE = 65_536
SIZES = (1, 2, 127, 128, 129, 1000, TILE - 1, TILE, TILE + 1, 3 * TILE + 5)


def counts_of(indices: np.ndarray, numel: int) -> np.ndarray:
    return np.bincount(indices // TILE, minlength=-(-numel // TILE))


def both(indices: np.ndarray, numel: int, coding: str) -> bytes:
    """Encode with every variant, compare, and decode what came out."""
    sections = [encode_indices(indices, numel, coding, variant=v).tobytes() for v in VARIANTS]
    assert sections[0] == sections[1], "the variants write different bytes"
    for variant in VARIANTS:
        got = decode_indices(sections[0], counts_of(indices, numel), numel, coding, variant=variant)
        assert np.array_equal(got, indices), variant
    return sections[0]


def refuse(section: bytes, counts: list[int], numel: int, coding: str, match: str) -> None:
    for variant in VARIANTS:
        with pytest.raises(PacketError, match=match):
            decode_indices(section, np.array(counts), numel, coding, variant=variant)


# ---- worked example ----------------------------------------------------------------------------


def test_worked_example():
    """Indices (3,5,6,20,21,60): gaps (3,1,0,13,0,38); Rice with b = 3 in 29 bits."""
    indices = np.array([3, 5, 6, 20, 21, 60])
    gaps = reference.gaps(indices)
    assert gaps.tolist() == [3, 1, 0, 13, 0, 38]
    assert reference.rice_code(gaps, 3) == "00110001000010101000011110110"
    assert reference.rice_bits(gaps, 3) == 29
    # b = 2, 3 take 31 and 29 bits, 4 takes 32: the writer agrees, and adds the head of one tile
    assert [reference.rice_bits(gaps, b) for b in (2, 3, 4)] == [30, 29, 32]
    section = both(indices, 64, "rice")
    code = 0b0011_0001_0000_10101_0000_11110110_000
    assert section == b"\x04\x00" + b"\x03" + code.to_bytes(4, "big")


def test_worked_example_of_bitpack():
    indices = np.array([3, 5, 6, 20, 21, 60])
    gaps = [3, 1, 0, 13, 0, 38]  # 38 needs six bits
    code = sum(gap << 6 * j for j, gap in enumerate(gaps))
    assert both(indices, 64, "bitpack") == b"\x06" + code.to_bytes(5, "little")


def test_parameter_by_the_formula_of_the_paper(rng):
    """Of uniform supports the best b is round(log2(0.69 / rho)) or a neighbour."""
    for rho, b in ((0.001, 9), (0.01, 6), (0.03, 4), (0.0625, 3), (0.1, 3), (0.25, 1)):
        gaps = rng.geometric(rho, 60_000) - 1
        assert abs(reference.rice_parameter(gaps) - max(0, round(np.log2(0.69 / rho)))) <= 1
        assert abs(reference.rice_parameter(gaps) - b) <= 1


@pytest.mark.parametrize(
    ("rho", "rice", "bitpack"),
    [
        (0.001, 11.50, 12.9),
        (0.01, 8.11, 9.6),
        (0.03, 6.59, 8.0),
        (0.1, 4.76, 6.2),
        (0.25, 3.29, 4.8),
    ],
)
def test_bits_per_index_of_uniform_supports(rho, rice, bitpack, rng):
    """Measured bits of each coding, within 1.5 %, and Rice within 2 % of the entropy bound."""
    numel = 2**22
    indices = np.flatnonzero(rng.random(numel) < rho)
    tiles = numel // TILE
    bits = {c: 8 * encode_indices(indices, numel, c).size / indices.size for c in CODINGS}
    bound = -np.log2(rho) - (1 - rho) / rho * np.log2(1 - rho)
    codes = bits["rice"] - 8 * 3 * tiles / indices.size  # without the head
    assert codes == pytest.approx(rice, rel=0.015) and codes < 1.02 * bound
    assert bits["bitpack"] == pytest.approx(bitpack, rel=0.015)


# ---- every size --------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("coding", CODINGS)
def test_equals_the_reference(numel, coding, rng):
    for k in sorted({0, 1, numel // 100, numel // 3, numel - 1, numel}):
        both(np.sort(rng.choice(numel, k, replace=False)), numel, coding)


SPECIAL = {
    "last of each tile": (np.arange(1, 4) * TILE - 1, 3 * TILE),
    "first of each tile": (np.arange(3) * TILE, 3 * TILE),
    "empty tiles": (np.array([5, 2 * TILE + 7]), 4 * TILE),
    "only the last tile": (np.array([3 * TILE]), 3 * TILE + 1),
    "dense, then one far away": (np.r_[0:300, 65_535], TILE),
    "equal gaps": (np.arange(0, TILE, 64), TILE),
    "clustered": (np.r_[100:200, 30_000:30_100, 65_000:65_500], TILE),
    "gaps of every width": (np.cumsum(2 ** np.arange(16)) - 1, TILE),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("coding", CODINGS)
def test_special_supports(name, coding):
    indices, numel = SPECIAL[name]
    both(np.asarray(indices, np.int64), numel, coding)


@pytest.mark.parametrize("coding", CODINGS)
def test_nothing(coding):
    assert both(np.empty(0, np.int64), 0, coding) == b""
    assert len(both(np.empty(0, np.int64), 2 * TILE, coding)) == (6 if coding == "rice" else 0)


def test_rice_never_takes_more_than_a_bit_a_coordinate(rng):
    for k in (1, 10, 1000, 32_768, 65_000, TILE):
        for indices in (np.sort(rng.choice(TILE, k, replace=False)), np.arange(TILE - k, TILE)):
            assert encode_indices(indices, TILE).size - 3 <= reference.BYTES_MAX


# ---- the same bytes everywhere -----------------------------------------------------------------

DIGESTS = """
import hashlib, numpy as np
from flcore.ops.indices import decode_indices, encode_indices
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for numel in (129, 65536, 300_001):
    for share in (0.001, 0.05, 0.9):
        indices = np.flatnonzero(rng.random(numel) < share)
        counts = np.bincount(indices // 65536, minlength=-(-numel // 65536))
        for coding in ("rice", "bitpack"):
            section = encode_indices(indices, numel, coding)
            digest.update(section.tobytes())
            digest.update(decode_indices(section, counts, numel, coding).tobytes())
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_bytes():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


@pytest.mark.parametrize("coding", CODINGS)
def test_thread_counts_give_identical_bytes(coding, rng):
    numel = 20 * TILE + 17
    indices = np.sort(rng.choice(numel, 300_000, replace=False))
    results = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        section = encode_indices(indices, numel, coding)
        back = decode_indices(section, counts_of(indices, numel), numel, coding)
        assert np.array_equal(back, indices)
        results.add(section.tobytes())
    assert len(results) == 1


def test_sections_at_odd_addresses(rng):
    indices = np.sort(rng.choice(TILE, 900, replace=False))
    for coding in CODINGS:
        section = encode_indices(indices, TILE, coding)
        for offset in (0, 1, 7):
            got = decode_indices(unaligned(section, offset), np.array([900]), TILE, coding)
            assert np.array_equal(got, indices)


# ---- hostile sections --------------------------------------------------------------------------


def rice(length: int, parameter: int, code: str) -> bytes:
    bits = code.replace(" ", "")
    data = int(bits.ljust(-(-len(bits) // 8) * 8, "0") or "0", 2)
    return length.to_bytes(2, "little") + bytes([parameter]) + data.to_bytes(-(-len(bits) // 8))


@pytest.mark.parametrize(
    ("section", "counts", "numel", "match"),
    [
        (b"", [1], 9, "expected at least 3 bytes for 1 tiles, got 0"),
        (b"\1\0", [1], 9, "expected at least 3 bytes for 1 tiles, got 2"),
        (rice(1, 0, ""), [1], 9, "expected 4 bytes, got 3"),
        (rice(1, 0, "0" * 16), [1], 9, "expected 4 bytes, got 5"),
        (rice(8193, 0, ""), [1], 9, "at most 8192 bytes, got 8193"),
        (rice(1, 16, "0"), [1], 9, "a parameter of at most 15, got 16"),
        (rice(0, 1, ""), [0], 9, "a parameter without entries"),
        (rice(1, 0, "0"), [0], 9, "the codes do not end with its bytes"),
        (rice(1, 0, "0"), [9], 9, "the codes do not end with its bytes"),  # too short
        (rice(2, 0, "00000000 0"), [1], 9, "the codes do not end with its bytes"),  # too long
        (rice(1, 0, "11111111"), [1], 9, "the codes do not end with its bytes"),  # no zero
        (rice(200, 0, "1" * 1600), [1], 2000, "the codes do not end with its bytes"),
        (rice(1, 4, "11110"), [1], 99, "the codes do not end with its bytes"),  # low bits missing
        (rice(1, 0, "01000000"), [1], 9, "a pad bit is set"),
        (rice(1, 0, "00000001"), [1], 9, "a pad bit is set"),
        (rice(2, 0, "111111111 0"), [1], 9, "a coordinate beyond the tile"),
        (rice(1, 2, "110 01"), [1], 9, "a coordinate beyond the tile"),
        (rice(25, 0, "1" * 195 + "0"), [1], 195, "a coordinate beyond the tile"),
        (rice(8, 15, "1" * 48 + "0" * 16), [1], TILE, "a coordinate beyond the tile"),
        (rice(8192, 0, "0" + "1" * 65_534 + "0"), [2], TILE - 1, "a coordinate beyond"),
    ],
)
def test_hostile_rice(section, counts, numel, match):
    refuse(section, counts, numel, "rice", f"indices.*{match}")


@pytest.mark.parametrize(
    ("section", "counts", "numel", "match"),
    [
        (b"", [1], 9, "expected at least 1 bytes for 1 tiles, got 0"),
        (b"\x00", [129], 200, "expected at least 2 bytes"),
        (b"\x11\0\0\0", [1], 9, "a width of at most 16 bits, got 17"),
        (b"\xff" + bytes(99), [1], 9, "a width of at most 16 bits, got 255"),
        (b"\x04", [1], 99, "expected 2 bytes, got 1"),
        (b"\x04\x08\x00", [1], 99, "expected 2 bytes, got 3"),
        (b"\x00\x00", [1], 99, "expected 1 bytes, got 2"),
        (b"\x04\x18", [1], 99, "a pad bit is set"),
        (b"\x04\x07", [1], 99, "a width larger than its gaps need"),
        (b"\x01\x00", [1], 99, "a width larger than its gaps need"),
        (b"\x04\x09", [1], 9, "a coordinate beyond the tile"),
        (b"\x10\xff\xff", [1], TILE - 1, "a coordinate beyond the tile"),
        (b"\x10\xff\xff\xff\xff", [2], TILE, "a coordinate beyond the tile"),
    ],
)
def test_hostile_bitpack(section, counts, numel, match):
    refuse(section, counts, numel, "bitpack", f"indices.*{match}")


def test_other_parameters_than_the_shortest_are_read():
    indices = np.array([3, 5, 6, 20, 21, 60])
    gaps = reference.gaps(indices)
    for b in range(16):
        code = reference.rice_code(gaps, b)
        section = rice(-(-len(code) // 8), b, code)
        for variant in VARIANTS:
            got = decode_indices(section, np.array([6]), 64, variant=variant)
            assert np.array_equal(got, indices)


@pytest.mark.parametrize("coding", CODINGS)
def test_variants_agree_about_mutated_sections(coding, rng):
    """Whatever the bytes: both raise the same error, or both return the same coordinates."""
    accepted = 0
    for case in range(700):
        numel = int(rng.integers(1, 3000)) if case % 3 else TILE + int(rng.integers(1, 300))
        indices = np.flatnonzero(rng.random(numel) < rng.choice([0.01, 0.1, 0.8]))
        data = bytearray(encode_indices(indices, numel, coding))
        for _ in range(int(rng.integers(1, 3))):
            if data and rng.random() < 0.8:
                data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            elif data:
                at = int(rng.integers(len(data)))
                data[at:at] = rng.bytes(1)
                del data[-1 if rng.random() < 0.7 else 0 :][:1]
        results = []
        for variant in VARIANTS:
            try:
                got = decode_indices(
                    bytes(data), counts_of(indices, numel), numel, coding, variant=variant
                )
                results.append(got.tobytes())
                accepted += 1
            except PacketError as error:
                results.append(str(error))
        assert results[0] == results[1], f"case {case}"
    assert accepted > 50


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"indices": np.array([1, 1])}, InvalidInputError, "increasing"),
        ({"indices": np.array([2, 1])}, InvalidInputError, "increasing"),
        ({"indices": np.array([-1, 1])}, InvalidInputError, "0 <= index < 10"),
        ({"indices": np.array([1, 10])}, InvalidInputError, "0 <= index < 10"),
        ({"indices": np.array([0.5])}, DTypeError, "1-D array of integers, got float64"),
        ({"indices": np.array([[1]])}, DTypeError, "1-D array of integers"),
        ({"indices": [1]}, DTypeError, "1-D array of integers, got list"),
        ({"coding": "huffman"}, InvalidInputError, "coding: expected one of bitpack, rice"),
        ({"numel": -1}, InvalidInputError, "numel"),
        ({"numel": 2**49}, InvalidInputError, "numel"),
    ],
)
def test_wrong_arguments(change, error, match):
    options = {"indices": np.array([1, 3]), "numel": 10, "coding": "rice", **change}
    with pytest.raises(error, match=match):
        encode_indices(options.pop("indices"), **options)


def test_counts_must_fit_their_tiles():
    section = encode_indices(np.array([1, 3]), 10)
    for counts in ([], [2, 0], [11], [-1]):
        with pytest.raises(InvalidInputError, match="counts"):
            decode_indices(section, np.array(counts, np.int64), 10)
