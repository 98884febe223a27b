"""The Triton variant of quantize: packets and memory of the CPU kernel, compiled code."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _variants
from flcore._state import State
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
from flcore.ops.quantize import quantize
from flcore.reference import codes_float
from support import np_dtype, run_compiling

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

needs_interpreter = pytest.mark.skipif(
    _variants.available("quantize")["triton"] != "", reason="there is a GPU"
)


def minifloat(name: str, values: str) -> dict:
    f = codes_float.FORMATS[name]
    return {"codec": "minifloat", "bits": f.bits, "form": f.form, "values": values}


SETTINGS = {
    "sign": {"codec": "sign", "bits": 1},
    "sign, l2, bfloat16": {"codec": "sign", "bits": 1, "measure": "l2", "values": "bfloat16"},
    **{f"absmax {b}": {"codec": "uniform", "bits": b} for b in (2, 3, 4, 8)},
    "absmax 4, bfloat16": {"codec": "uniform", "bits": 4, "values": "bfloat16"},
    "qsgd 4": {"codec": "uniform", "bits": 4, "measure": "l2", "levels": 5},
    **{f"affine {b}": {"codec": "affine", "bits": b} for b in (1, 4, 8)},
    "affine 4, bfloat16": {"codec": "affine", "bits": 4, "values": "bfloat16"},
    "ternary": {"codec": "ternary", "bits": 2},
    "ternary, clipped": {"codec": "ternary", "bits": 2, "clip": 2.5},
    "fp e4m3": minifloat("e4m3", "float32"),
    "fp e5m2": minifloat("e5m2", "float32"),
    **{
        f"mx {name}": minifloat(name, "e8m0")
        for name in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8")
    },
}
# memory that is kept, dtype of e and v, rounding, bucket, coordinates, scale of the update
CASES = (
    ("", "float32", "nearest", 100, 513, 1e30),
    ("e", "float32", "stochastic", 32, 300, 1.0),
    ("ehv", "bfloat16", "stochastic", 70, 500, 1e-3),
)


def memory(keep: str, dtype: str, numel: int, spare: bool = True) -> State:
    rng = np.random.default_rng(1)
    kept = {name: (rng.standard_normal(numel) / 4).astype(np.float32) for name in keep}
    if dtype == "bfloat16":
        for name in keep.replace("h", ""):
            kept[name] = (kept[name].view(np.uint32) >> 16).astype(np.uint16)
    state = State(**kept, a=0.3, b=0.9, p=0.7, q=0.6, mask="v" in keep)
    if spare:
        state.spare.update({name: np.empty_like(x) for name, x in kept.items()})
    return state


def on(device: str, state: State) -> State:
    """Return the state with torch tensors on a device."""

    def move(x):
        return (
            torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)
            if (x.dtype == np.uint16)
            else torch.from_numpy(x.copy()).to(device)
        )

    kept = {name: move(x) for name, x in state.buffers().items()}
    spare = {name: torch.empty_like(move(x)) for name, x in state.spare.items()}
    factors = {name: getattr(state, name) for name in ("a", "b", "p", "q", "mask")}
    return State(**kept, **factors, spare=spare)


def host_bytes(x) -> bytes:
    if isinstance(x, np.ndarray):
        return x.tobytes()
    return x.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def run(variant, update, state, rounds=2, **options):
    packets = [
        quantize(update, state=state, round=r, seed=2**63 + 5, variant=variant, **options).tobytes()
        for r in range(rounds)
    ]
    return packets, {name: host_bytes(x) for name, x in state.buffers().items()}


@needs_interpreter
@pytest.mark.parametrize("name", SETTINGS)
def test_packets_and_memory_are_those_of_the_cpu(name, rng):
    for keep, dtype, rounding, bucket, numel, scale in CASES:
        g = (rng.standard_normal(numel) * scale).astype(np.float32)
        g[3 * bucket : 4 * bucket] = 0
        g[bucket : bucket + 7] = -0.0
        options = {"bucket": bucket, "rounding": rounding, **SETTINGS[name]}
        found = run("triton", g, memory(keep, dtype, numel), **options)
        assert found == run("cpu", g, memory(keep, dtype, numel), **options), (keep, bucket)


@needs_interpreter
def test_scales_at_the_ends_of_float32():
    top = np.finfo(np.float32).max
    rows = [
        [top, -top, 1e38, 0],
        [top, top, top, top],
        [1e-45, -1e-45, 3e-45, 0],
        [0, -0.0, 0, 0],
        [-top, -1e30, 0, 0],
    ]
    x = np.array(rows, np.float32)
    for options in SETTINGS.values():
        packets = {
            variant: quantize(x, bucket=4, variant=variant, **options).tobytes()
            for variant in ("triton", "cpu")
        }
        assert packets["triton"] == packets["cpu"], options


@needs_interpreter
def test_layers_and_dtypes(rng):
    options = {"bucket": 50, **SETTINGS["absmax 4"]}
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        x = rng.standard_normal(200).astype(np_dtype(dtype))
        found = [quantize(x, variant=v, **options).tobytes() for v in ("triton", "cpu")]
        assert found[0] == found[1], dtype
    layers = [x[:33], x[33:33], rng.standard_normal((5, 7)), x[33:].astype(np.float32)]
    found = [quantize(layers, variant=v, **options).tobytes() for v in ("triton", "cpu")]
    assert found[0] == found[1]
    tensors = [torch.from_numpy(layers[2]), torch.from_numpy(layers[3]).to(torch.bfloat16)]
    found = [quantize(tensors, variant=v, **options).tobytes() for v in ("triton", "cpu")]
    assert found[0] == found[1]
    empty = np.empty(0, np.float32)
    assert (
        quantize(empty, variant="triton", **options).tobytes()
        == quantize(empty, variant="cpu", **options).tobytes()
    )


@needs_interpreter
def test_a_value_that_is_not_finite_changes_nothing(rng):
    g = rng.standard_normal(300).astype(np.float32)
    options = {"bucket": 64, "variant": "triton", **SETTINGS["fp e4m3"]}
    for spare in (True, False):
        state = memory("eh", "float32", 300, spare)
        before = {name: (x, x.tobytes()) for name, x in state.buffers().items()}
        bad = g.copy()
        bad[299] = np.inf
        with pytest.raises(NonFiniteError, match="299"):
            quantize(bad, state=state, **options)
        for name, (x, content) in before.items():
            assert getattr(state, name) is x and x.tobytes() == content
        quantize(g, state=state, **options)
        assert state.e.tobytes() != before["e"][1]


@needs_interpreter
def test_memory_in_place_is_that_of_spares(rng):
    g = rng.standard_normal(300).astype(np.float32)
    options = {"bucket": 64, **SETTINGS["absmax 8"]}
    states = [memory("ehv", "float32", 300, spare) for spare in (True, False)]
    assert run("triton", g, states[0], **options) == run("triton", g, states[1], **options)


@needs_interpreter
def test_what_it_cannot_do_is_refused():
    x = np.ones(100, np.float32)
    for options in (
        {"codec": "natural", "bits": 8, "form": 1, "bucket": 64},
        {"codec": "ternary", "bits": 2, "form": 1, "bucket": 64},
        {"codec": "affine", "bits": 1, "measure": "two_means", "bucket": 64},
        {"codec": "uniform", "bits": 8, "bucket": 8193},
        {"bucket": 64, **minifloat("nf4", "float32")},
    ):
        with pytest.raises(VariantUnavailableError, match="triton"):
            quantize(x, variant="triton", **options)


def test_memory_must_lie_where_the_update_does():
    state = on("cpu", memory("e", "float32", 10))
    with pytest.raises(DTypeError, match="NumPy array"):
        state.check(10)
    with pytest.raises(DTypeError, match="cuda:0"):
        memory("e", "float32", 10).check(10, "cuda:0")
    with pytest.raises(DTypeError, match="cuda:0"):
        state.check(10, "cuda:0")
    meta = State(e=torch.empty(10, device="meta"))
    meta.check(10, "meta")
    with pytest.raises(InvalidInputError, match="shape"):
        meta.check(11, "meta")
    assert State(e=torch.empty(3, dtype=torch.bfloat16)).dtype == "bfloat16"


def test_numbers_agree_with_the_reference():
    from flcore.pykernels import codes

    from flcore.reference import streams, wire, wire_frame

    assert (codes.ROUNDING.value, codes.STATE.value) == (streams.ROUNDING, streams.STATE)
    for name in ("SIGN", "UNIFORM", "AFFINE", "MINIFLOAT", "TERNARY"):
        assert getattr(codes, name).value == wire.CODECS[name.lower()]
    assert wire_frame.VALUE_CODES["e8m0"] == codes.E8M0.value
    assert codes_float.FORMATS["int8"].form == codes.INT8.value


COMPILE = """
import json
from triton_code import compiled, instructions
from flcore.ops._quantize_triton import _constants
from flcore.pykernels import quantize as k
from flcore.reference.buckets import Settings

found = {}
for settings in (
    Settings(codec="sign", bits=1, bucket=1024),
    Settings(codec="uniform", bits=4, bucket=512, levels=7, stochastic=True),
    Settings(codec="minifloat", bits=4, form=5, values="e8m0", bucket=32, stochastic=True),
):
    constants = _constants(settings) | dict(D=3, E=True, H=True, V=True, M=3, MASK=True)
    constants["CHECK"] = False
    scales = {"float32": "*fp32", "bfloat16": "*i16", "e8m0": "*u8"}[settings.values]
    narrow = ("g_ptr", "e_ptr", "v_ptr", "e_new_ptr", "v_new_ptr")
    types = {name: "i32" for name in k.quantize_kernel.arg_names}
    types |= {name: "*i16" for name in narrow} | {name: "fp32" for name in "abpq"}
    types |= {"h_ptr": "*fp32", "h_new_ptr": "*fp32", "scales_ptr": scales}
    types |= {"codes_ptr": "*u8", "flags_ptr": "*i32"}
    code = compiled(k.quantize_kernel, types, constants, **k.OPTIONS)
    found[settings.codec] = instructions(code, "fma|mul|add|sub|div")
print(json.dumps(found))
"""


def test_the_kernel_compiles_to_separate_products_and_sums():
    found = run_compiling(COMPILE)
    for case, instructions in found.items():
        assert not [i for i in instructions if i.startswith("fma")], case
        assert {"mul.rn.f32", "add.rn.f32"} <= set(instructions), case
        assert not [i for i in instructions if "approx" in i or "full" in i or "ftz" in i], case
    assert "div.rn.f32" in found["uniform"] and "div.rn.f64" in found["sign"]
