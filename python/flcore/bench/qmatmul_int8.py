"""Products of quantised activations and weights beside ONNX Runtime and torch's int8 product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flcore.bench.cases import Case, Setup, Workload, difference
from flcore.bench.environment import BLAS_SPIN_S, optional
from flcore.bench.timers import Contestant

__all__ = ["CASES", "build_int4", "build_int8", "onnx_product"]


def _weights(setup: Setup, n: int, k: int, scheme: str) -> list[Any]:
    """Weights of random codes, more than four times the last cache."""
    from flcore.quantization import QuantizedTensor, Scheme

    rng, found = setup.rng(), Scheme.of(scheme)
    groups = 1 if found.group < 0 else -(-k // found.group)
    weights = []
    for _ in range(setup.cold_slots(n * k * found.bits // 8)):
        codes = rng.integers(0, 256, (n, k * found.bits // 8), dtype=np.uint8)
        scales = rng.uniform(0.5, 1.5, (n, groups)).astype(found.scale_dtype)
        weights.append(QuantizedTensor.from_parts((n, k), found, codes, scales))
        weights[-1].tiled()
    return weights


def _check(x: np.ndarray, weights: list[Any], steps: float) -> Callable[..., str | None]:
    """Return the check of results off by `steps` steps of the activations' scale at most."""

    def matches(slot: int, result: np.ndarray) -> str | None:
        w = weights[slot].dequantize("float64")
        want = x.astype(np.float64) @ w.T
        scale = np.abs(x).max(axis=1, keepdims=True) / 127
        allowed = steps * scale * np.abs(w).sum(axis=1) + 1e-5 * np.abs(want)
        return difference(result.reshape(-1), want.reshape(-1), allowed.reshape(-1))

    return matches


def onnx_product(weight: Any, threads: int, accuracy: int = 4) -> Callable[[np.ndarray], Any]:
    """Return the product with a weight of 4 bits as a graph of one MatMulNBits.

    Parameters
    ----------
    weight : QuantizedTensor
        Symmetric, 4 bits, a group that divides k.
    threads : int
        Of the session.
    accuracy : int
        Attribute accuracy_level; 4 quantises activations to int8.
    """
    onnx: Any = optional("onnx")[0]
    runtime: Any = optional("onnxruntime")[0]
    n, k = weight.shape
    group = weight.group
    make, kinds = onnx.helper, onnx.TensorProto
    codes = weight.to_layout("rows").codes
    scales = weight.to_layout("rows").scales.astype(np.float32)
    packed = (n, k // group, group // 2)
    graph = make.make_graph(
        [
            make.make_node(
                "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
                K=k, N=n, bits=4, block_size=group, accuracy_level=accuracy,
            )
        ],
        "product",
        [make.make_tensor_value_info("x", kinds.FLOAT, ["m", k])],
        [make.make_tensor_value_info("y", kinds.FLOAT, ["m", n])],
        [
            make.make_tensor("codes", kinds.UINT8, packed, codes.tobytes(), raw=True),
            make.make_tensor("scales", kinds.FLOAT, (scales.size,), scales.tobytes(), raw=True),
        ],
    )  # fmt: skip
    domains = [make.make_opsetid("", 17), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=domains)
    model.ir_version = 8
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x})[0]


def build_int4(setup: Setup, *, m: int, n: int, k: int) -> Workload:
    """Four bits a weight in groups of 128, float32 activations in blocks of 128."""
    from flcore.ops import qmatmul_int8

    weights = _weights(setup, n, k, "int4")
    x = setup.rng().standard_normal((m, k)).astype(np.float32)
    contestants = [
        Contestant("flcore W4A8", lambda slot: qmatmul_int8(x, weights[slot]), kind="ours")
    ]
    absent = {}
    missing = [f"{name}: {why}" for name in ("onnx", "onnxruntime") if (why := optional(name)[1])]
    if missing:
        absent["ONNX Runtime MatMulNBits"] = "; ".join(missing)
    else:
        products = [onnx_product(w, setup.threads) for w in weights]
        contestants.append(
            Contestant(
                "ONNX Runtime MatMulNBits",
                lambda slot: products[slot](x),
                rest_s=BLAS_SPIN_S,  # its threads wait for work in a loop
                matches=_check(x, weights, 1.0),
            )
        )
    return Workload(
        contestants,
        _check(x, weights, 0.55),
        weights[0].nbytes + 4 * m * (n + k),
        absent,
        slots=len(weights),
    )


def build_int8(setup: Setup, *, m: int, n: int, k: int) -> Workload:
    """Eight bits a weight, one scale a row, one scale a row of activations."""
    from flcore.ops import qmatmul_int8

    torch: Any = optional("torch")[0]
    weights = _weights(setup, n, k, "int8")
    x = setup.rng().standard_normal((m, k)).astype(np.float32)
    rows = torch.from_numpy(x)
    codes = [(torch.from_numpy(w.codes).int() - 128).to(torch.int8).t() for w in weights]
    scales = [torch.from_numpy(w.scales).view(1, -1) for w in weights]

    def product(slot: int) -> Any:
        scale = rows.abs().amax(1, keepdim=True) / 127
        q = torch.round(rows / scale).to(torch.int8)
        return torch._int_mm(q, codes[slot]).float() * scale * scales[slot]

    return Workload(
        [
            Contestant("flcore W8A8", lambda slot: qmatmul_int8(x, weights[slot]), kind="ours"),
            Contestant(
                "torch quantise, _int_mm, scale",
                product,
                lambda y: np.asarray(y.numpy()),
                matches=_check(x, weights, 1.0),
            ),
        ],
        _check(x, weights, 0.55),
        weights[0].nbytes + 4 * m * (n + k),
        slots=len(weights),
    )


def _case(name: str, m: int, n: int) -> Case:
    bits = 4 if name == "w4a8" else 8
    return Case(
        name=f"{name}_{n}x4096_m{m}",
        family="qmatmul",
        title=f"y = x W^T, {m} rows, W {n} x 4096 in {bits} bits, x to 8 bits in the call",
        formula="n·k·bits/8 + scales + x + y",
        build=build_int4 if bits == 4 else build_int8,
        sizes={"m": m, "n": n, "k": 4096},
        tiny={"m": min(m, 5), "n": 32, "k": 256},
        needs=() if bits == 4 else ("torch",),
    )


CASES = [
    *(_case("w4a8", m, 4096) for m in (1, 4, 16, 64, 256)),
    *(_case("w4a8", m, 11008) for m in (1, 4, 16, 64, 256)),
    *(_case("w8a8", m, 4096) for m in (1, 16, 64, 256)),
    *(_case("w8a8", m, 11008) for m in (64, 256)),
]
