"""Modular addition: projected gradients generalise at once, StableMax slowly, softmax never."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from flcore.bench.grokking import (
    SCENES,
    Method,
    draw,
    grokking_markdown,
    run_grokking,
    train,
    write_grokking_json,
)

SMALL, LARGE, LONG = SCENES
PLAIN, PERP = Method(), Method(project=True)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_projected_gradients_generalise(seed):
    scene = replace(SMALL, steps=120, every=40)  # a third of the steps are enough
    assert train(scene, PERP, seed).test[-1] >= 0.99


def test_adamw_alone_stays_at_zero():
    plain = train(replace(SMALL, steps=120, every=40), PLAIN, 0)
    assert plain.train[-1] == 1.0 and max(plain.test) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_methods_for_all_steps(seed):
    for method in SMALL.methods:
        run = train(SMALL, method, seed)
        assert run.train[-1] == 1.0
        assert run.test[-1] > 0.99 if method.project else max(run.test) < 0.005


@pytest.mark.slow
def test_the_modulus_of_the_paper():
    scene = replace(LARGE, steps=200)
    run = train(scene, PERP, 0)
    assert run.test_at(150) > 0.98 and run.test[-1] > 0.995
    plain = train(scene, PLAIN, 0)
    assert plain.train[-1] == 1.0 and max(plain.test) < 0.01


@pytest.mark.slow
def test_stablemax_goes_on_learning_where_softmax_stops():
    scene = replace(LONG, steps=2000)
    stable, softmax = (train(scene, Method(loss), 0) for loss in ("stablemax", "softmax"))
    assert stable.train[-1] == softmax.train[-1] == 1.0
    assert max(softmax.test) < 0.01  # chance is 0.017
    assert stable.test[-1] > 0.12 and stable.test[-1] > stable.test_at(1000) > stable.test_at(500)


def test_the_same_seed_gives_the_same_numbers():
    scene = replace(SMALL, p=11, steps=6, every=3)
    a, b, c = (train(scene, PERP, seed) for seed in (4, 4, 5))
    assert (a.test, a.loss) == (b.test, b.loss) != (c.test, c.loss)


def test_tables_numbers_and_figure(tmp_path):
    pytest.importorskip("matplotlib")
    scenes = [replace(scene, p=5, steps=4, every=2) for scene in (SMALL, LONG)]
    told = []
    runs = run_grokking((3,), scenes, lambda *words: told.append(words))
    assert len(runs) == len(told) == 5 and told[-1][:2] == (4, 5)
    text = grokking_markdown(runs)
    assert "### p = 5, 60% trained on, 4 steps" in text and "| AdamW, stablemax | 3 |" in text
    write_grokking_json(runs, tmp_path / "runs.json")
    assert len(json.loads((tmp_path / "runs.json").read_text())) == 5
    for name in ("a.svg", "b.svg"):
        draw(runs, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_command(tmp_path):
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from flcore.cli.bench import bench

    app = typer.Typer()
    app.command()(bench)
    table = tmp_path / "table.md"
    done = CliRunner().invoke(app, ["grokking", "--tiny", "--markdown", str(table)])
    assert done.exit_code == 0, done.output
    assert table.read_text().count("###") == 3
