"""The models: the same parameters as ever, features and head, gradients of many clients at once."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from flcore.errors import InvalidInputError
from flcore.simulation.models import MODELS, build_model, split_features

torch = pytest.importorskip("torch")
F = torch.nn.functional

IMAGE, WINDOW, CLASSES = (1, 8, 8), (12,), 10
SIZES = {
    "mlp": 4_810,
    "wide": 85_002,
    "cnn": 21_386,
    "linear": 650,
    "mlp-bn": 4096 + 2 * 64 + 650,
    "cnn-bn": 9 * 32 + 2 * 32 + 9 * 32 * 64 + 2 * 64 + 2570,
    "cnn-gn": 9 * 32 + 2 * 32 + 9 * 32 * 64 + 2 * 64 + 2570,
    "mlp-projection": 3 * (64 * 64 + 64) + 650,
    "char": 10 * 16 + (12 * 16 * 128 + 128) + (128 * 10 + 10),
}
STATELESS = sorted(name for name in MODELS if not name.endswith("-bn"))
FEATURES = {"linear": 64, "wide": 256, "cnn": 256, "cnn-bn": 256, "cnn-gn": 256, "char": 128}


def shape_of(name: str) -> tuple[int, ...]:
    return WINDOW if name == "char" else IMAGE


def build(name: str, seed: int = 0):
    return build_model(name, shape_of(name), CLASSES, np.random.default_rng(seed))


def batch(name: str, *count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    shape = (*count, *shape_of(name))
    x = rng.integers(0, CLASSES, shape) if name == "char" else rng.standard_normal(shape)
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(rng.integers(0, CLASSES, count))


@pytest.mark.parametrize("name", MODELS)
def test_models_score_every_class_and_have_their_size(name):
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    x, _ = batch(name, 5)
    scores = model(x)
    assert scores.shape == (5, CLASSES) and scores.dtype == torch.float32
    assert 0.1 < scores.std() < 5  # drawn so that scores are of the size of the inputs


@pytest.mark.parametrize("name", MODELS)
def test_parameters_depend_on_the_generator_alone(name):
    torch.manual_seed(0)
    first = build(name, seed=1).state_dict()
    torch.manual_seed(1)
    again, other = build(name, seed=1).state_dict(), build(name, seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    key = next(key for key in first if key.endswith(".weight"))
    assert not torch.equal(first[key], other[key])


def test_draws_in_the_order_of_layers():
    # 1-hidden-layer MLP by hand: N(0, 2/64), then N(0, 1/64), and zero biases
    rng = np.random.default_rng(7)
    model = build("mlp", seed=7)
    for layer, gain in ((model[1], 2.0), (model[3], 1.0)):
        expected = rng.standard_normal(tuple(layer.weight.shape)) * np.sqrt(gain / 64)
        assert np.array_equal(layer.weight.detach().numpy(), expected.astype(np.float32))
        assert not layer.bias.any()


def test_normalisations_start_at_one_and_embeddings_at_unit_variance():
    for name, kind in (("mlp-bn", torch.nn.BatchNorm1d), ("cnn-gn", torch.nn.GroupNorm)):
        for layer in build(name):
            if isinstance(layer, kind):
                assert (layer.weight == 1).all() and not layer.bias.any()
    model = build_model("char", WINDOW, 500, np.random.default_rng(0))
    assert abs(model[1].weight.detach().std() - 1) < 0.03


def test_char_depends_on_every_character_of_the_window():
    model = build("char")
    x, _ = batch("char", 1)
    for place in range(WINDOW[0]):
        other = x.clone()
        other[0, place] = (other[0, place] + 1) % CLASSES
        assert not torch.equal(model(x), model(other))


# ---- features ----


@pytest.mark.parametrize("name", MODELS)
def test_head_of_features_is_the_model(name):
    model = build(name).eval()
    features, head = split_features(model)
    x, _ = batch(name, 4)
    z = features(x)
    assert z.shape == (4, FEATURES.get(name, 64)) and isinstance(head, torch.nn.Linear)
    assert torch.equal(head(z), model(x))
    own = dict(model.named_parameters())
    assert all(own[key] is value for key, value in features.named_parameters())
    assert own.keys() - dict(features.named_parameters()).keys() == {
        f"{len(model) - 1}.weight",
        f"{len(model) - 1}.bias",
    }


def test_projection_head_is_part_of_the_features():
    features, _ = split_features(build("mlp-projection"))
    kinds = [type(layer).__name__ for layer in features]
    assert kinds == ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]


def test_modules_may_name_their_features():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.features(x))

    own = Own()
    assert split_features(own) == (own.features, own.head)


@pytest.mark.parametrize(
    "model", [torch.nn.Sequential(), torch.nn.Sequential(torch.nn.ReLU()), torch.nn.Linear(2, 2)]
)
def test_models_without_a_head_are_refused(model):
    with pytest.raises(InvalidInputError, match=r"ends in nn\.Linear, or a module with modules"):
        split_features(model)


# ---- many clients at once ----


@pytest.mark.parametrize("name", STATELESS)
def test_gradients_of_many_clients_at_once_are_those_of_one_after_another(name):
    models = [build(name, seed) for seed in range(3)]
    x, y = batch(name, 3, 6)
    model = models[0]
    stacked = {
        key: torch.stack([dict(m.named_parameters())[key].detach() for m in models])
        for key, _ in model.named_parameters()
    }

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # vmap warns where it falls back to a loop
        together = torch.func.vmap(torch.func.grad(loss))(stacked, x, y)
    for client, own in enumerate(models):
        F.cross_entropy(own(x[client]), y[client]).backward()
        for key, parameter in own.named_parameters():
            torch.testing.assert_close(together[key][client], parameter.grad, rtol=1e-4, atol=1e-6)
            assert parameter.grad.any(), key


@pytest.mark.parametrize("name", STATELESS)
def test_features_of_many_clients_at_once(name):
    models = [build(name, seed) for seed in range(2)]
    x, _ = batch(name, 2, 5)
    parts = [split_features(m)[0] for m in models]
    stacked = {
        key: torch.stack([dict(p.named_parameters())[key].detach() for p in parts])
        for key, _ in parts[0].named_parameters()
    }

    def features(parameters, x):
        return torch.func.functional_call(parts[0], parameters, (x,))

    if stacked:  # softmax regression has none
        together = torch.func.vmap(features)(stacked, x)
        for client, own in enumerate(parts):
            torch.testing.assert_close(together[client], own(x[client]), rtol=1e-5, atol=1e-5)


def test_batch_normalisation_keeps_statistics_and_groups_do_not():
    for name in MODELS:
        assert bool(list(build(name).buffers())) == name.endswith("-bn")


# ---- errors ----


def test_models_say_what_they_need():
    rng = np.random.default_rng(0)
    with pytest.raises(InvalidInputError, match="there is no 'gru'; choose one of: mlp, wide"):
        build_model("gru", IMAGE, 10, rng)
    for name in ("cnn", "cnn-bn", "cnn-gn"):
        for shape in ((64,), (1, 3, 8)):
            with pytest.raises(InvalidInputError, match="at least 4 x 4, got examples of shape"):
                build_model(name, shape, 10, rng)
    with pytest.raises(InvalidInputError, match=r"char needs examples of shape \(window,\)"):
        build_model("char", IMAGE, 10, rng)


def test_mlp_of_given_widths_has_them():
    model = build_model("mlp:48,32", (1, 8, 8), 10, np.random.default_rng(0))
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert shapes == [(48, 64), (32, 48), (10, 32)]


@pytest.mark.parametrize("name", ["mlp:", "mlp:0", "mlp:4,,3", "mlp:a", "wide:3"])
def test_widths_that_are_none_are_refused(name):
    with pytest.raises(InvalidInputError, match="there is no"):
        build_model(name, (1, 8, 8), 10, np.random.default_rng(0))
