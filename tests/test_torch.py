"""torch tensors: structures, views, dtypes, registration, compilation, gradients, OpenMP."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flcore.aggregation import Accumulator, Mean
from flcore.errors import DTypeError
from flcore.ops import combine

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_numpy_give_the_same_bits(dtype):
    rows = [
        torch.randn(3000, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(5)
    ]
    weights = torch.linspace(0.1, 1.0, 5)
    got = combine(rows, weights)
    assert got.dtype == dtype and got.shape == rows[0].shape
    want = combine([r.double().numpy() for r in rows], weights, accumulate="float64")
    scale = sum(r.double().abs() for r in rows).numpy()
    bound = torch.finfo(dtype).eps / 2 * np.abs(want) + 10 * 2.0**-24 * scale
    assert (np.abs(got.double().numpy() - want) <= bound).all()


def test_state_dict_with_counters_is_averaged():
    def model(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))

    states = [model(i).state_dict() for i in range(3)]
    states[1]["1.num_batches_tracked"] += 3
    mean = Mean()(states, weights=[1, 1, 2])
    assert list(mean) == list(states[0])
    want = (states[0]["0.weight"] + states[1]["0.weight"] + 2 * states[2]["0.weight"]) / 4
    torch.testing.assert_close(mean["0.weight"], want)
    assert mean["1.num_batches_tracked"].dtype == torch.int64
    assert mean["1.num_batches_tracked"].shape == ()
    model(0).load_state_dict(mean)


def test_views_transposes_and_parameters_are_read_in_place():
    base = torch.randn(40, 30)
    torch.testing.assert_close(combine([base.t(), base.t()], [1.0, 0.5]), 1.5 * base.t())
    torch.testing.assert_close(combine([base[3:, 1:]], [2.0]), 2 * base[3:, 1:])
    out = torch.zeros(40, 30)
    parameter = torch.nn.Parameter(base.clone())
    with torch.no_grad():
        assert combine([parameter, parameter], [0.5, 0.5], out=out) is out
    torch.testing.assert_close(out, base)


def test_accumulator_on_tensors():
    total = Accumulator({"w": torch.zeros(2, 3, dtype=torch.bfloat16)})
    total.add({"w": torch.ones(2, 3, dtype=torch.bfloat16)}, 1)
    total.add({"w": torch.full((2, 3), 4.0, dtype=torch.bfloat16)}, 2)
    result = total.result()["w"]
    assert result.dtype == torch.bfloat16 and (result == 3).all()


@pytest.mark.parametrize(
    "bad",
    [torch.ones(3).to_sparse(), torch.ones(3, device="meta"), torch.ones(3, dtype=torch.int8)],
)
def test_tensors_that_cannot_be_read_are_named(bad):
    with pytest.raises(DTypeError, match=r"updates\[0\]"):
        combine([bad], [1.0])


# ---- torch.library contract --------------------------------------------------------------------


def test_opcheck():
    from flcore import _torch_ops

    for dtype in DTYPES:
        rows = [torch.randn(4, 5).to(dtype).requires_grad_() for _ in range(3)]
        torch.library.opcheck(_torch_ops.combine, (rows, [1.0, 2.0, -3.0], "float32", "raise", 2.0))


def test_gradient_is_the_weight():
    rows = [torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda *r: combine(list(r), [1.0, -2.0, 0.5], divisor=4.0), rows
    )
    layers = [[torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]]
    first, second = combine(layers, [3.0])
    (first.sum() + second.sum()).backward()
    assert (layers[0][0].grad == 3).all() and (layers[0][1].grad == 3).all()


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    function = torch.compile(
        lambda a, b: combine([a, b], [0.25, 0.75]) * 2,
        fullgraph=True,
        backend=backend,
        dynamic=True,
    )
    for size in (5, 6):
        a, b = torch.randn(size), torch.randn(size)
        torch.testing.assert_close(function(a, b), 0.5 * a + 1.5 * b)
    assert len(graphs) == 1
    nodes = [str(node.target) for node in graphs[0].graph.nodes]
    assert any("flcore.combine" in node for node in nodes), nodes
