"""Quantised weights in safetensors files: round trips, other readers, every kind of damage."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flcore.errors import CheckpointError, DTypeError, InvalidInputError
from flcore.quantization import QuantizedTensor, Scheme, load_weights, quantize, save_weights
from flcore.quantization._scheme import PRESETS
from support import HAS_TORCH


def weight(n=20, k=70, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def parts_of(path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path, header, body, length=None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("name", [*PRESETS, "double", "own", "tensor"])
def test_round_trip(tmp_path, name):
    more = {
        "double": Scheme.of("nf4", double_quant=True),
        "own": Scheme.of("nf4", codebook=tuple(np.linspace(-1, 2, 16).tolist())),
        "tensor": Scheme.of("int8", scope="tensor", search="mse"),
    }
    made = quantize(weight(), more.get(name, name), layout="tile16")
    path = tmp_path / "w.safetensors"
    made.save(path)
    again = QuantizedTensor.load(path)
    assert again.scheme == made.scheme and again.shape == (20, 70) and again.layout == "rows"
    np.testing.assert_array_equal(again.dequantize(), made.dequantize())
    assert again.codes.ctypes.data % 64 == 0
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_small_weights(tmp_path, shape):
    path = tmp_path / "w"
    quantize(weight(*shape), "int4-asym").save(path)
    assert QuantizedTensor.load(path).shape == shape


def test_many_weights_and_other_readers(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = {"layer.0": quantize(weight(), "int4-asym"), "head": quantize(weight(7, 33), "nf4")}
    path = tmp_path / "model.safetensors"
    save_weights(path, weights, {"made by": "a test"})
    found = load_weights(path)
    assert list(found) == ["layer.0", "head"]
    for name, made in weights.items():
        np.testing.assert_array_equal(found[name].dequantize(), made.dequantize())
    raw = safetensors.load_file(path)  # another program reads the container
    np.testing.assert_array_equal(raw["layer.0.codes"], weights["layer.0"].codes)
    np.testing.assert_array_equal(raw["head.scales"], weights["head"].scales)
    assert parts_of(path)[0]["__metadata__"]["made by"] == "a test"
    with pytest.raises(CheckpointError, match="expected one weight, found 2"):
        QuantizedTensor.load(path)
    plain = tmp_path / "plain.safetensors"
    safetensors.save_file({"w": weight()}, plain)
    with pytest.raises(CheckpointError, match="belongs to no weight"):
        load_weights(plain)


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
def test_torch_weights_and_bfloat16_scales(tmp_path):
    import torch

    made = quantize(torch.from_numpy(weight()), "int4-float-zero", layout="tile16")
    path = tmp_path / "w"
    made.save(path)
    assert parts_of(path)[0]["weight.scales"]["dtype"] == "BF16"
    again = QuantizedTensor.load(path).to("cpu")
    assert torch.equal(again.dequantize(), made.dequantize())
    raw = pytest.importorskip("safetensors.torch").load_file(path)
    assert torch.equal(raw["weight.scales"], made.to_layout("rows").scales)


def test_wrong_arguments(tmp_path):
    with pytest.raises(DTypeError, match=r"^weights\['w'\]"):
        save_weights(tmp_path / "w", {"w": weight()})
    with pytest.raises(InvalidInputError, match=r"^metadata: "):
        save_weights(tmp_path / "w", {"w": quantize(weight(), "int4")}, {"w": "x"})
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError):
        load_weights(tmp_path / "missing")


# ---- damage --------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "w.safetensors"
    quantize(weight(), "int4-asym").save(path)
    return path


def test_every_truncation_is_found(file):
    data = file.read_bytes()
    for size in [*range(12), *range(12, len(data), 37), len(data) - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            load_weights(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="1 bytes follow the last tensor"):
        load_weights(file)


def test_every_changed_byte_of_the_tensors_is_found(file):
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for at in range(start, len(data), 7):
        data[at] ^= 0x10
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="CRC-32"):
            load_weights(file)
        data[at] ^= 0x10


def test_a_changed_header_gives_its_weight_or_a_typed_error(file):
    """Any byte of the header: another weight of the same bytes at most, never another exception."""
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(8 + length):
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        file.write_bytes(changed)
        try:
            load_weights(file)
        except CheckpointError:
            refused += 1
    assert refused > 0.8 * length


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h: h["weight.codes"].update(dtype="I8"), "expected one of U8"),
        (lambda h: h["weight.codes"].update(dtype=["U8"]), "expected one of U8"),
        (lambda h: h["weight.codes"].update(shape=[20, 36]), "700 bytes for shape"),
        (lambda h: h["weight.codes"].update(shape=[-20, -35]), "no lists of sizes"),
        (lambda h: h["weight.codes"].update(shape=[20, 35.0]), "no lists of sizes"),
        (lambda h: h["weight.codes"].update(shape=[True, 700]), "no lists of sizes"),
        (lambda h: h["weight.codes"].update(shape=[35, 20]), "codes: expected shape"),
        (lambda h: h["weight.codes"].update(data_offsets=[0, 10**18]), "bytes 0 to"),
        (lambda h: h["weight.codes"].update(data_offsets=[700, 0]), "bytes 700 to 0"),
        (lambda h: h["weight.codes"].update(data_offsets=[0]), "no lists of sizes"),
        (lambda h: h["weight.zeros"].update(data_offsets=[700, 720]), "hole or an overlap"),
        (lambda h: h["weight.codes"].pop("shape"), "expected dtype, shape"),
        (lambda h: h["weight.codes"].update(extra=1), "expected dtype, shape"),
        (lambda h: h.update({"weight.codes": 3}), "expected dtype, shape"),
        (lambda h: h.pop("weight.zeros"), "bytes follow the last tensor"),
        (lambda h: h.update(__metadata__={"weight": 3}), "no table of strings"),
        (lambda h: h.update(__metadata__=[]), "no table of strings"),
        (lambda h: h.pop("__metadata__"), "belongs to no weight"),
        (lambda h: h.update(__metadata__={"weight": "{}"}), "no description"),
        (lambda h: h.update(__metadata__={"weight": "[" * 100000}), "no description"),
    ],
)
def test_damaged_headers(file, change, match):
    header, body = parts_of(file)
    change(header)
    write(file, header, body)
    with pytest.raises(CheckpointError, match=match):
        load_weights(file)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("version", 2, "version 2"),
        ("shape", [20, 71], "expected shape"),
        ("shape", [20], "expected"),
        ("shape", "20", "no shape"),
        ("shape", [10**30, 1], "expected shape"),
        ("scheme", 3, "no scheme"),
        ("scheme", {"bits": 5}, "bits: "),
        ("scheme", {"width": 5}, "width"),
        ("scheme", {"bits": 4, "kind": "symmetric"}, "zeros: "),
        ("scheme", {"bits": 4, "kind": []}, "kind: "),
        ("crc32", {}, "expected"),
        ("crc32", None, "no description"),
    ],
)
def test_damaged_descriptions(file, field, value, match):
    header, body = parts_of(file)
    note = json.loads(header["__metadata__"]["weight"])
    note[field] = value
    header["__metadata__"]["weight"] = json.dumps(note)
    write(file, header, body)
    with pytest.raises(CheckpointError, match=match):
        load_weights(file)


def test_headers_that_are_no_json(file):
    _, body = parts_of(file)
    for text in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100000, b'{"a": 1, "a": 2}'):
        write(file, text, body)
        with pytest.raises(CheckpointError):
            load_weights(file)
    write(file, b"{}", body, length=2**63)
    with pytest.raises(CheckpointError, match="bytes announced"):
        load_weights(file)


def test_values_that_are_no_numbers(file):
    """A file that is whole but holds a NaN as a scale."""
    import zlib

    header, body = parts_of(file)
    body = bytearray(body)
    begin, end = header["weight.scales"]["data_offsets"]
    body[begin : begin + 2] = np.float16(np.nan).tobytes()
    note = json.loads(header["__metadata__"]["weight"])
    note["crc32"]["scales"] = zlib.crc32(body[begin:end])
    header["__metadata__"]["weight"] = json.dumps(note)
    write(file, header, bytes(body))
    with pytest.raises(CheckpointError, match="scales: expected finite"):
        load_weights(file)
