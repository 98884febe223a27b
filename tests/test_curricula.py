"""Curricula: the pacing functions by hand, order of examples, number of steps, order of clients."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from flcore.algorithms import Client, Curriculum, FedAvg, Layout, LocalResult, Server, create
from flcore.algorithms.curricula import PACING, ordered, pace
from flcore.errors import InvalidInputError

LAYOUT = Layout({"w": (1,)})
EXAMPLES = np.arange(100, 177)


def client(
    state: dict | None = None, losses=None, indices: np.ndarray = EXAMPLES, seed: int = 0
) -> Client:
    """A client whose example k has the loss ``losses[k] * model``."""
    values = np.ones(len(indices)) if losses is None else np.asarray(losses)
    return Client(
        id=0,
        round=0,
        examples=len(indices),
        layout=LAYOUT,
        population=1,
        participants=1,
        state={} if state is None else state,
        rng=np.random.default_rng(seed),
        initial=np.zeros(1),
        tools=SimpleNamespace(losses=lambda model: values * model[0]),
        indices=indices,
    )


def view(algorithm: FedAvg, one: Client, model: float = 1.0):
    algorithm.client_begin({"model": np.array([model])}, one)
    return algorithm.data_view(one)


def passes(data, algorithm: Curriculum) -> list[np.ndarray]:
    """The examples of each pass; how long a pass is follows from the steps before it."""
    n, b = len(EXAMPLES), algorithm.batch_size
    total = (n // b + 1) * algorithm.local_epochs
    found, t, first = [], 0, 0
    while first < len(data.order):
        size = max(pace(algorithm.pacing, t, total, n, algorithm.full_at, algorithm.begin), 20)
        found.append(data.order[first : first + size])
        first, t = first + size, t + -(-size // b)
    assert t == len(data.sizes) and first == len(data.order)
    return found


# ---- pacing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pacing", "expected"),
    [
        ("linear", [200, 300, 600, 990, 1000]),
        ("quad", [200, 212, 400, 980, 1000]),
        ("root", [200, 482, 765, 994, 1000]),
        ("exp", [200, 200, 205, 905, 1000]),
        ("log", [200, 833, 944, 998, 1000]),
        ("step", [200, 200, 200, 200, 1000]),  # the formula gives 1200: all
    ],
)
def test_pacing_by_hand(pacing, expected):
    assert [pace(pacing, t, 100, 1000, 0.8, 0.2) for t in (0, 10, 40, 79, 80)] == expected


@pytest.mark.parametrize("pacing", PACING)
@pytest.mark.parametrize(("full_at", "begin"), [(0.8, 0.2), (0.3, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_pacing_never_falls_and_ends_with_all(pacing, full_at, begin):
    sizes = [pace(pacing, t, 60, 321, full_at, begin) for t in range(200)]
    assert sizes == sorted(sizes)
    assert sizes[60] == sizes[-1] == 321
    assert sizes[0] == (321 if full_at == 0 else int(begin * 321))


# ---- order of examples ---------------------------------------------------------------------------


def test_ties_keep_the_order_of_their_index_and_anti_is_the_reverse():
    rng = np.random.default_rng(0)
    scores = np.array([2.0, 1.0, 2.0, 1.0, 0.0])
    assert ordered(scores, "curr", rng).tolist() == [4, 1, 3, 0, 2]
    assert ordered(scores, "anti", rng).tolist() == [2, 0, 3, 1, 4]
    assert ordered(scores, "standard", rng).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ordering", ["curr", "anti"])
def test_a_pass_sees_the_easiest_or_the_hardest(ordering):
    losses = np.random.default_rng(1).random(len(EXAMPLES))
    options = {"begin": 0.1, "least": 20, "local_epochs": 6}
    algorithm = Curriculum(ordering=ordering, **options)
    data = view(algorithm, client(losses=losses))
    ranked = EXAMPLES[np.argsort(losses if ordering == "curr" else -losses)]
    found = passes(data, algorithm)
    for seen in found:
        assert sorted(seen.tolist()) == sorted(ranked[: len(seen)].tolist())
    assert len(found[0]) == 20 and len(found[-1]) == len(EXAMPLES)


@pytest.mark.parametrize("ordering", ["curr", "rand", "anti", "standard"])
@pytest.mark.parametrize("n", [7, 40, 77])
def test_steps_are_between_T_and_T_plus_one_pass(ordering, n):
    algorithm = Curriculum(ordering=ordering, local_epochs=4, batch_size=10)
    data = view(algorithm, client(indices=np.arange(n), losses=np.arange(n)))
    total = (n // 10 + 1) * 4
    assert total <= len(data.sizes) < total + n / 10 + 1
    assert sum(data.sizes) == len(data.order)


@pytest.mark.parametrize("ordering", ["curr", "rand", "anti"])
@pytest.mark.parametrize("options", [{"begin": 1.0}, {"full_at": 0.0}])
def test_a_full_pool_is_standard_training_with_the_same_generator(ordering, options):
    losses = np.random.default_rng(1).random(len(EXAMPLES))
    ours = view(Curriculum(ordering=ordering, **options), client(losses=losses))
    standard = view(Curriculum(ordering="standard"), client(losses=losses))
    plain = view(FedAvg(), client(losses=losses))  # 77 is no multiple of the batch size
    for other in (standard, plain):
        assert np.array_equal(ours.order, other.order) and ours.sizes == other.sizes


def test_random_order_is_paced_alike_and_differs_from_round_to_round():
    a, b = (view(Curriculum(ordering="rand"), client(seed=s)) for s in (0, 1))
    easy = view(Curriculum(), client())
    assert a.sizes == b.sizes == easy.sizes
    assert set(a.order[:32].tolist()) != set(b.order[:32].tolist())


# ---- scores --------------------------------------------------------------------------------------


def scores(algorithm: Curriculum, state: dict, received: float, trained: float) -> float:
    """Mean score of one participation that ends with the model `trained`."""
    one = client(state, losses=np.full(len(EXAMPLES), 2.0))
    work = algorithm.client_begin({"model": np.array([received])}, one)
    algorithm.data_view(one)
    sent = algorithm.client_end(LocalResult(work, np.array([trained]), 1, 0.0), one)
    assert "order" not in one.state and "score" not in one.state
    return sent["score"]


@pytest.mark.parametrize(
    ("scoring", "expected"), [("G", [2, 10, 14]), ("L", [2, 6, 16]), ("LG", [2, 16, 30])]
)
def test_scores_are_losses_under_the_global_and_the_own_model(scoring, expected):
    algorithm = Curriculum(scoring=scoring, client_ordering="curr")
    state: dict = {}
    found = [scores(algorithm, state, *models) for models in [(1, 3), (5, 8), (7, 9)]]
    assert found == expected


def test_an_expert_is_sent_once_and_scores_for_good(tmp_path):
    save = pytest.importorskip("safetensors.numpy").save_file
    save({"w": np.array([4.0])}, tmp_path / "expert.safetensors")
    algorithm = Curriculum(scoring="E", expert=str(tmp_path / "expert.safetensors"))
    server = Server(np.zeros(1), LAYOUT, 1, 1)
    algorithm.server_begin(server)
    losses, state = np.arange(len(EXAMPLES)), {}
    payload = algorithm.downlink(server, 0)
    assert payload["expert"].tolist() == [4.0]
    algorithm.client_begin(payload, client(state, losses))
    assert np.array_equal(state["scores"], 4.0 * losses)
    server["told"][0] = True
    again = client(state, losses[::-1])
    payload = algorithm.downlink(server, 0)
    assert "expert" not in payload
    algorithm.client_begin(payload, again)
    assert np.array_equal(again.state["order"], np.arange(len(EXAMPLES)))


def test_an_expert_of_another_model_is_refused(tmp_path):
    save = pytest.importorskip("safetensors.numpy").save_file
    save({"w": np.zeros(2)}, tmp_path / "expert.safetensors")
    algorithm = Curriculum(scoring="E", expert=str(tmp_path / "expert.safetensors"))
    with pytest.raises(InvalidInputError, match="holds another model"):
        algorithm.server_begin(Server(np.zeros(1), LAYOUT, 1, 1))


# ---- order of clients ----------------------------------------------------------------------------


def test_clients_come_from_a_growing_pool_of_the_easy_ones():
    algorithm = Curriculum(client_ordering="curr", rounds=20, begin=0.3)
    server = Server(np.ones(1), LAYOUT, population=10, participants=2)
    algorithm.server_begin(server)
    everyone = [client(losses=np.full(len(EXAMPLES), 10.0 - k)) for k in range(10)]
    for k, one in enumerate(everyone):
        one.id = k
    sent, received = algorithm.one_time_exchange(server, everyone)
    assert [payload["score"] for payload in sent] == list(range(10, 0, -1))
    assert received[0]["model"] is server.model
    rng, drawn = np.random.default_rng(0), []
    for _ in range(40):
        drawn.append(algorithm.select(server, rng))
    # 3 easy ones first: in a round of two and one of the one left; then, 3 of 40 updates done, 3
    assert sorted(drawn[0] + drawn[1]) == [7, 8, 9] and len(drawn[1]) == 1
    assert sorted(drawn[2] + drawn[3]) == [7, 8, 9]
    assert {k for clients in drawn for k in clients} == set(range(10))
    assert server["visits"] == sum(map(len, drawn))


def test_the_pool_is_ordered_anew_by_what_its_clients_report():
    algorithm = Curriculum(client_ordering="anti", rounds=1000, begin=0.25, ordering="standard")
    server = Server(np.ones(1), LAYOUT, population=4, participants=1)
    algorithm.server_begin(server)
    server["scores"] = np.array([1.0, 2.0, 3.0, 4.0])
    rng = np.random.default_rng(0)
    assert algorithm.select(server, rng) == [3]
    server["scores"][3] = 0.0
    assert algorithm.select(server, rng) == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ordering": "easy"}, "ordering: expected"),
        ({"scoring": "X"}, "scoring: expected"),
        ({"pacing": "cubic"}, "pacing: expected"),
        ({"begin": 1.5}, "begin: expected a number in"),
        ({"scoring": "E"}, "expert: expected a file"),
        ({"expert": "x.safetensors"}, "expert: expected a file"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        create("curriculum", **options)
