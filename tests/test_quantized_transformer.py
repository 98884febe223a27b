"""A small transformer in low bits: what planting, preparation and the command do."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from flcore.bench.char_transformer import (
    Size,
    Text,
    build,
    default_text,
    groups_of,
    plant_outliers,
    train,
    windows,
)
from flcore.bench.quantized_transformer import (
    METHODS,
    MODELS,
    Method,
    draw,
    quantized_transformer_markdown,
    run_quantized_transformer,
    tiny,
    write_quantized_transformer_json,
)
from flcore.errors import InvalidInputError
from flcore.quantization.preparation import UniformGrid, awq

# Short, but enough for weights that matter: the loss is a nat below that of letter frequencies.
SMALL = Size(layers=1, width=64, heads=2, context=32, batch=16, steps=70, lr=5e-3)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Return a text with some structure: sums written out in words."""
    words = "zero one two three four five six seven eight nine ten".split()
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(3000):
        a, b = torch.randint(6, (2,), generator=generator).tolist()
        lines.append(f"{words[a]} and {words[b]} is {words[min(a + b, 10)]}.")
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_planting_keeps_the_function_and_makes_outliers():
    size = tiny()
    model = build(size, 30, seed=0).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    codes = torch.randint(30, (4, size.context))
    seen = []
    model.blocks[0].norm1.register_forward_hook(lambda _m, _x, y: seen.append(y))
    with torch.no_grad():
        want = model(codes)
        plant_outliers(model, seed=0)
        torch.testing.assert_close(model(codes), want, rtol=1e-10, atol=1e-10)
    before, after = (x.abs().amax((0, 1)) for x in seen)
    large = after > 20
    assert int(large.sum()) == round(0.05 * size.width)
    assert torch.equal(before[~large], after[~large])


def test_preparation_is_described_for_all_linears_of_the_blocks():
    size = replace(tiny(), layers=2)
    model = build(size, 30, seed=0).eval()
    names = [name for group in groups_of(size) for name in group.linears]
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks")
    ]
    assert sorted(names) == sorted(inside) and len(names) == 12
    codes = torch.randint(30, (4, size.context))
    with torch.no_grad():
        want = model(codes)
        awq(model, groups_of(size), [codes], UniformGrid(4, 16), clip=False, progress=False)
        torch.testing.assert_close(model(codes), want, rtol=1e-5, atol=1e-5)


def test_awq_and_os_plus_beat_rounding_where_there_are_outliers(text_file):
    chosen = [m for m in METHODS if m.name in ("fp32", "W8A8", "W4A16", "W4A8")]
    rows = run_quantized_transformer(text_file, (0,), SMALL, chosen)
    loss = {(row.model, row.method.label): row.mean for row in rows}
    plain, planted = MODELS
    assert loss[plain, "fp32"] < 1.5
    assert loss[planted, "fp32"] == pytest.approx(loss[plain, "fp32"], abs=1e-4)
    for bits, method in (("W8A8", "OS+"), ("W4A16", "AWQ"), ("W4A8", "OS+")):
        float_loss = loss[planted, "fp32"]
        before = loss[planted, f"{bits} rounding"] - float_loss
        after = loss[planted, f"{bits} {method}"] - float_loss
        assert before > 0 and after < 0.6 * before, (bits, before, after)


def test_the_same_seed_gives_the_same_model(text_file):
    size = replace(tiny(), steps=3)
    data = Text.of(default_text(text_file), size.context)
    states = []
    for seed in (1, 1, 2):
        model = build(size, data.vocabulary, seed)
        train(model, data, size, seed)
        states.append(copy.deepcopy(model.state_dict()))
    same = [all(torch.equal(states[0][k], s[k]) for k in states[0]) for s in states[1:]]
    assert same == [True, False]


def test_windows_hold_the_next_character():
    codes = torch.arange(100)
    x, y = windows(codes, 8, 5, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (5, 8) and torch.equal(x + 1, y)


def test_texts(tmp_path):
    assert len(default_text()) > 100_000
    data = Text.of("ab" * 500, 8)
    assert data.vocabulary == 2 and len(data.train) == 900 and len(data.held) == 100
    with pytest.raises(InvalidInputError, match="expected at least 180 characters, got 40"):
        Text.of("ab" * 20, 8)
    with pytest.raises(InvalidInputError, match="cannot read"):
        default_text(tmp_path / "none.txt")
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidInputError, match="cannot read"):
        default_text(tmp_path / "bad")


def test_tables_numbers_and_figure(tmp_path, text_file):
    pytest.importorskip("matplotlib")
    told = []
    four = Method("W4A16", "int4-asym", 0, 32)
    methods = (Method("fp32"), four, replace(four, prepare="AWQ"))
    rows = run_quantized_transformer(
        text_file, (0, 1), tiny(), methods, lambda *words: told.append(words)
    )
    assert len(rows) == 6 and [t[0] for t in told] == list(range(14)) and told[0][1] == 14
    table = quantized_transformer_markdown(rows)
    assert table.count("\n") == 5 and "| W4A16 | AWQ |" in table and "±" in table
    write_quantized_transformer_json(rows, tmp_path / "rows.json")
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [len(row["losses"]) for row in found] == [2] * 6
    for name in ("a.svg", "b.svg"):
        draw(rows, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_command(tmp_path, text_file):
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from flcore.cli.bench import bench

    app = typer.Typer()
    app.command()(bench)
    table = tmp_path / "table.md"
    run = CliRunner().invoke
    arguments = ["quantized-transformer", "--tiny", "--text", str(text_file)]
    done = run(app, [*arguments, "--markdown", str(table)])
    assert done.exit_code == 0, done.output
    assert table.read_text().count("\n") == 2 + len(METHODS)
    assert run(app, ["quantized-transformer", "--tiny", "--text", "none"]).exit_code == 2
    assert run(app, ["grokking", "--tiny", "--text", str(text_file)]).exit_code == 2
