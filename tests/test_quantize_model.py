"""`quantize_model` and the embedding modules: what is replaced, what is left, and why."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from flcore import _torch_qembedding
from flcore.errors import DTypeError, InvalidInputError
from flcore.nn import QuantEmbedding, QuantEmbeddingBag, QuantLinear
from flcore.quantization import quantize_model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(11)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.body = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.body(self.embed(x)))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


# ---- models --------------------------------------------------------------------------------------


def test_a_model_in_few_bits_stays_close_and_shrinks():
    model, x = mlp(), torch.randn(5, 64)
    want = model(x)
    report = quantize_model(model, "int8")
    assert report.model is model and isinstance(model[0], QuantLinear)
    assert (model(x) - want).norm() < 0.02 * want.norm()
    assert [layer.name for layer in report.quantized] == ["0", "2"]
    first = report.layers[0]
    assert first.shape == (64, 64) and first.bytes_before == 4 * 64 * 64
    assert first.bytes_after == 64 * 64 + 64 * 4 and 0 < first.error < 0.01
    assert report.bytes_before == 4 * (64 * 64 + 640)
    assert "2 of 2 layers in 8 bits" in str(report) and "0.0 values" not in str(report)


def test_adapters_freeze_the_rest():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10))
    report = quantize_model(model, "nf4", lora_rank=4, lora_alpha=4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.lora_a", "0.lora_b", "2.lora_a", "2.lora_b"}
    assert report.trainable == 4 * (64 + 64) + 4 * (64 + 10) and model[0].scaling == 1
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    quantize_model(model, "nf4", lora_rank=4, freeze=False)
    assert model[1].weight.requires_grad


def test_what_is_left_and_why():
    report = quantize_model(Tied(), "int4", skip="body.0", embeddings="int8")
    why = {layer.name: layer.skipped for layer in report.layers}
    assert why == {
        "embed": "its weight is shared with head.weight",
        "head": "its weight is shared with embed.weight",
        "body.0": "asked for",
        "body.2": "",
    }
    assert "skipped: asked for" in str(report)


@pytest.mark.parametrize(
    "skip", ["2", ["2"], "[2]", lambda name, layer: layer.out_features == 10, ("2", "?")]
)
def test_ways_to_skip(skip):
    model = nn.Sequential(mlp(), nn.Linear(10, 16)) if skip == ("2", "?") else mlp()
    skip = ("0.2", "1") if skip == ("2", "?") else skip
    report = quantize_model(model, "int4", skip=skip)
    assert len(report.quantized) == 1 and report.quantized[0].shape == (64, 64)


def test_transformer_layers_run_in_both_modes():
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 64)
    want = layer(x)
    report = quantize_model(layer, "int8")
    why = {found.name: found.skipped for found in report.layers}
    assert why["self_attn.out_proj"] == "a subclass of Linear" and why["linear1"] == ""
    for mode in (True, False):
        layer.train(mode)
        with torch.no_grad():
            assert (layer(x) - want).norm() < 0.02 * want.norm()


def test_wrong_models_and_patterns():
    with pytest.raises(InvalidInputError, match="skip: 'lm_head' matches no layer; there are 0, 2"):
        quantize_model(mlp(), "int4", skip="lm_head")
    with pytest.raises(InvalidInputError, match="no layer to quantise"):
        quantize_model(nn.Sequential(nn.ReLU()), "int4")
    with pytest.raises(InvalidInputError, match=r"no layer .* \(0: asked for; 2: asked for"):
        quantize_model(mlp(), "int4", skip="*")
    with pytest.raises(InvalidInputError, match=r"use QuantLinear.from_linear"):
        quantize_model(nn.Linear(4, 4), "int4")
    with pytest.raises(DTypeError, match=r"model: expected a torch.nn.Module, got dict"):
        quantize_model({}, "int4")
    with pytest.raises(InvalidInputError, match="scheme"):
        quantize_model(mlp(), "int5")
    with pytest.raises(DTypeError, match="activation_bits"):
        quantize_model(mlp(), "nf4", activation_bits=8)


def test_state_of_a_whole_model_round_trips():
    models = [mlp(), mlp()]
    for model in models:
        quantize_model(model, "int4", lora_rank=2)
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(models[0](x), models[1](x))


# ---- embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int4-asym", "nf4"])
def test_embedding_against_torch(scheme):
    plain = nn.Embedding(50, 40, padding_idx=3)
    table = QuantEmbedding.from_embedding(plain, scheme, track_rows=True)
    plain.weight.data = table.weight.dequantize()
    index = torch.randint(0, 50, (6, 7))
    got, want = table(index), plain(index)
    assert torch.equal(got, want)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(table.row_grad, plain.weight.grad)
    table(index).sum().backward()  # gradients add up
    plain(index).sum().backward()
    torch.testing.assert_close(table.row_grad, plain.weight.grad)
    with torch.no_grad():
        assert not table(index).requires_grad


@pytest.mark.parametrize("two_dimensions", [True, False])
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_embedding_bag_against_torch(mode, two_dimensions):
    plain = nn.EmbeddingBag(50, 40, mode=mode, padding_idx=3)
    table = QuantEmbeddingBag.from_embedding_bag(plain, "int4", track_rows=True)
    plain.weight.data = table.weight.dequantize()
    index = torch.randint(0, 50, (60,))
    offsets = torch.tensor([0, 0, 7, 30])
    if two_dimensions:
        index, offsets = index.reshape(12, 5), None
    factors = [torch.rand(index.shape).requires_grad_() if mode == "sum" else None]
    factors.append(None if factors[0] is None else factors[0].detach().clone().requires_grad_())
    got, want = table(index, offsets, factors[0]), plain(index, offsets, factors[1])
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(table.row_grad, plain.weight.grad)
    if mode == "sum":
        torch.testing.assert_close(factors[0].grad, factors[1].grad)


def test_embedding_operator_and_compilation():
    table = QuantEmbeddingBag.from_embedding_bag(nn.EmbeddingBag(50, 40, mode="sum"), "int3")
    index, factors = torch.randint(0, 50, (6, 4)), torch.rand(6, 4, requires_grad=True)
    arguments = (*table.parts, index, None, factors, "sum", -1)
    torch.library.opcheck(_torch_qembedding.qembedding, arguments)
    compiled = torch.compile(table, backend="aot_eager", fullgraph=True)
    got, want = compiled(index, None, factors), table(index, None, factors)
    torch.testing.assert_close(got, want)
    slopes = [torch.autograd.grad(y.square().sum(), factors)[0] for y in (got, want)]
    torch.testing.assert_close(*slopes)
    grad = torch.autograd.grad(table(index, None, factors).sum(), factors, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_embedding_modules_say_what_they_do_not_take():
    with pytest.raises(InvalidInputError, match="max_norm"):
        QuantEmbedding.from_embedding(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(InvalidInputError, match="include_last_offset"):
        QuantEmbeddingBag.from_embedding_bag(nn.EmbeddingBag(5, 4, include_last_offset=True))
    with pytest.raises(InvalidInputError, match="mode: expected mean or sum"):
        QuantEmbeddingBag.from_embedding_bag(nn.EmbeddingBag(5, 4, mode="max"))
    with pytest.raises(DTypeError, match="embedding: expected"):
        QuantEmbedding.from_embedding(nn.Linear(5, 4))
    table = QuantEmbedding.from_embedding(nn.Embedding(5, 4), "int8")
    with pytest.raises(InvalidInputError, match="indices: expected 0 to 4"):
        table(torch.tensor([5]))
    assert repr(table) == "QuantEmbedding(5, 4, bits=8, symmetric, group=row)"


def test_embedding_state_and_types():
    tables = [QuantEmbedding.from_embedding(nn.Embedding(9, 33), "int4") for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    index = torch.arange(9)
    assert torch.equal(tables[0](index), tables[1](index))
    half = QuantEmbedding.from_embedding(nn.Embedding(9, 33).half(), "int4")
    assert half(index).dtype == torch.float16 and half.float().scales.dtype == torch.float16
    model = nn.Sequential(nn.Embedding(9, 32), nn.Linear(32, 4))
    report = quantize_model(model, "int4", embeddings="int8")
    assert isinstance(model[0], QuantEmbedding) and len(report.quantized) == 2
