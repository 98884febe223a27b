"""FedBN: what stays with a client, what is averaged, and whose model is tested."""

from collections import OrderedDict

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from algorithm_problem import PLAIN, blobs, play, simulation
from flcore.algorithms import Client, FedAvg, FedBN, Layout
from flcore.errors import InvalidInputError
from flcore.simulation import Dataset, load_dataset
from flcore.simulation.kinds import module_kinds

nn = torch.nn
DOMAINS = [f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]


def norm_first():
    """Normalise the inputs, then classify: names give nothing away."""
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))


def named(run, vector, group):
    return run.layout.take(vector, group)


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "personal"), [("all", DOMAINS), ("statistics", DOMAINS[2:]), ("nothing", [])]
)
def test_what_a_client_keeps(keep, personal):
    run = simulation(FedBN(keep=keep, **PLAIN), norm_first())
    assert run.layout.names("personal") == personal
    assert set(run.layout.names("shared")) == set(run.layout.shapes) - set(personal)
    assert list(run.layout.shapes)[-2:] == DOMAINS[2:]  # statistics end the vector
    assert run.layout.numel - run.layout.trained == 8


def test_normalisation_is_told_by_its_type_and_not_by_its_name():
    block = nn.Sequential(OrderedDict(downsample=nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))))
    model = nn.Sequential(
        OrderedDict(bn=nn.Linear(4, 4), norm=nn.LayerNorm(4), block=block, head=nn.Linear(4, 3))
    )
    kinds = module_kinds(model)
    normalising = {name for name, kind in kinds.items() if kind == "batch_norm"}
    names = ("weight", "bias", "running_mean", "running_var")
    assert normalising == {f"block.downsample.1.{name}" for name in names}
    assert {n for n, kind in kinds.items() if kind == "classifier"} == {"head.weight", "head.bias"}


# ---- rounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["all", "statistics"])
def test_aggregation_leaves_what_is_kept_as_it_is_and_makes_the_rest_equal(keep):
    run = simulation(FedBN(keep=keep, **PLAIN), "mlp-bn")
    for round in range(3):
        ends = {}
        train = run.rounds_trainer.train

        def spy(jobs, train=train, ends=ends):
            results = train(jobs)
            ends.update({job.client: r.end.copy() for job, r in zip(jobs, results, strict=True)})
            return results

        run.rounds_trainer.train = spy
        run.step()
        run.rounds_trainer.train = train
        payload = {"model": run.layout.take(run.server.model)}
        own = [run.algorithm.own_model(payload, run.clients.client(i, round)) for i in range(3)]
        for i, model in enumerate(own):
            kept = named(run, model, "personal")
            assert kept.size and np.array_equal(kept, named(run, ends[i], "personal"))
            shared = named(run, model, "shared")
            assert np.array_equal(shared, named(run, own[0], "shared"))
            mean = np.mean([named(run, ends[j], "shared") for j in range(3)], axis=0)
            np.testing.assert_allclose(shared, mean, rtol=0, atol=2e-6)
        assert not np.array_equal(named(run, own[0], "personal"), named(run, own[1], "personal"))


def test_kept_tensors_are_not_sent():
    everything = simulation(FedBN(keep="nothing", **PLAIN), "mlp-bn").step()
    run = simulation(FedBN(**PLAIN), "mlp-bn")
    record = run.step()
    kept = 4 * run.layout.size("personal") * 3  # bytes for three clients
    assert everything.bytes_down - record.bytes_down == kept
    assert everything.bytes_up - record.bytes_up == kept


@pytest.mark.parametrize("keep", ["all", "statistics", "nothing"])
def test_without_batch_normalisation_it_is_fedavg(keep):
    ours = play(simulation(FedBN(keep=keep, weighting="examples", **PLAIN), "mlp"), 3)
    theirs = play(simulation(FedAvg(**PLAIN), "mlp"), 3)
    np.testing.assert_array_equal(ours, theirs)


def test_one_client_is_plain_training():
    """Without others it makes no difference what is kept."""
    data = blobs(clients=1)
    own = simulation(FedBN(**PLAIN), "mlp-bn", data)
    everything = simulation(FedBN(keep="nothing", **PLAIN), "mlp-bn", data)
    for _ in range(3):
        ours, theirs = own.step(), everything.step()
        assert (ours.accuracy, ours.train_loss) == (theirs.accuracy, theirs.train_loss)


def test_clients_count_alike():
    assert FedBN().client_weight(5) == FedBN().client_weight(500) == 1.0


def test_last_batch_of_one_joins_the_one_before():
    data = blobs(each=9)
    run = simulation(FedBN(**(PLAIN | {"batch_size": 4})), "mlp-bn", data)
    client = run.clients.client(0, 0)
    assert run.algorithm.data_view(client).sizes == [4, 5, 4, 5]
    run.step()
    with pytest.raises(InvalidInputError, match=r"batch_size: expected a whole number from 2"):
        FedBN(batch_size=1)
    with pytest.raises(InvalidInputError, match="keep"):
        FedBN(keep="bn")


def test_algorithms_that_do_not_care_for_statistics_refuse_the_model():
    with pytest.raises(InvalidInputError, match="running"):
        simulation(FedAvg(**PLAIN), "mlp-bn")


def test_client_that_was_never_there_has_the_first_normalisation():
    run = simulation(FedBN(**PLAIN), "mlp-bn", participation=1)
    record = run.step()
    absent = next(i for i in range(3) if i not in record.clients)
    payload = {"model": run.layout.take(run.server.model)}
    own = run.algorithm.own_model(payload, run.clients.client(absent, 1))
    np.testing.assert_array_equal(
        named(run, own, "personal"), named(run, run.trainer.initial, "personal")
    )


# ---- what it is for ------------------------------------------------------------------------------


def affine(rounds, keep):
    """Two clients see the same examples, one of them through 2 x - 3; a step too small to matter.

    Gives the normalised activations of the same examples under both clients' models.
    """
    plain = blobs(clients=1, each=24)
    seen = np.concatenate([plain.x_train, 2 * plain.x_train - 3])
    groups = np.repeat([0, 1], 24)
    labels = np.tile(plain.y_train, 2)
    data = Dataset("affine", seen, labels, seen, labels, groups_train=groups, groups_test=groups)
    options = PLAIN | {"local_lr": 1e-9, "batch_size": 24, "local_epochs": 10}
    run = simulation(FedBN(keep=keep, **options), norm_first(), data)
    play(run, rounds)
    payload = {"model": run.layout.take(run.server.model)}
    features = []
    for i in range(2):
        client: Client = run.clients.client(i, rounds)
        model = run.algorithm.own_model(payload, client)
        features.append(client.tools.features(model))
    return features


@pytest.mark.parametrize("keep", ["all", "statistics"])
def test_own_statistics_undo_an_affine_map_between_clients(keep):
    first, second = affine(12, keep)
    assert first.std() > 0.5
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-3)


def test_common_statistics_cannot_undo_it():
    first, second = affine(12, "nothing")
    assert np.abs(first - second).mean() > 0.5


def test_layout_keeps_kinds_when_groups_change():
    layout = Layout({"a": (2,), "b": (3,)}, kinds={"b": "batch_norm"})
    again = FedBN().layout(layout)
    assert again.kinds == layout.kinds and again.groups == {"b": "personal"}


def domains(algorithm, model, seed, rounds):
    run = simulation(algorithm, model, load_dataset("digits-domains"), rounds=rounds, seed=seed)
    return np.mean([run.step().accuracy for _ in range(rounds)][-5:])


@pytest.mark.slow
def test_own_normalisation_is_better_on_four_domains_than_a_common_one():
    """Affine domains of the digits, one a client: the order of the published tables."""
    options = {"local_lr": 0.1, "local_epochs": 1}
    for seed in range(2):
        own = domains(FedBN(**options), "mlp-bn", seed, 30)
        common = domains(FedBN(keep="nothing", **options), "mlp-bn", seed, 30)
        assert own > common + 0.1
