"""What the documentation shows runs: blocks of README and pages, examples in docstrings, links."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re

import pytest

import flcore
from support import HAS_TORCH, ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
PAGE = (ROOT / "docs" / "aggregation.md").read_text()
COMPRESSION = (ROOT / "docs" / "compression.md").read_text()
PAGE_BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
NEED_TORCH = (
    "flcore._torch_",
    "flcore.losses",
    "flcore.nn",
    "flcore.optim._",
    "flcore.integrations",
    "flcore.quantization._model",
    "flcore.quantization.preparation",
    "flcore.bench.char_transformer",
    "flcore.simulation.layers",
    "flcore.simulation.models",
)
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(flcore.__path__, "flcore.")
    if not m.name.startswith(("flcore.pykernels", "flcore.cli", "flcore.__main__", "flcore._c"))
)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.split("\n")[0])
def test_readme_block_runs(block: str):
    if "torch" in block:
        pytest.importorskip("torch")
        block = block.replace("torch.compile(", "torch.compile(backend='eager', model=")
    exec(compile(block, "README.md", "exec"), {})


def test_page_on_aggregation_runs(tmp_path):
    """Its blocks go on from each other."""
    pytest.importorskip("torch")
    names: dict = {}
    for block in PAGE_BLOCKS:
        alone = f'init_process_group("gloo", "file://{tmp_path}/meet", rank=0, world_size=1)'
        block = block.replace('init_process_group("gloo")', alone)
        exec(compile(block, "docs/aggregation.md", "exec"), names)
    for layer, x in names["aggregate"].items():  # `model` is the sharded one by now
        assert names["model"][layer].tobytes() == x.tobytes()


def test_page_on_grokking_runs():
    pytest.importorskip("torch")
    text = (ROOT / "docs" / "grokking.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, "docs/grokking.md", "exec"), {})


def test_page_on_preparation_runs():
    """Its blocks go on from each other."""
    pytest.importorskip("torch")
    text, names = (ROOT / "docs" / "preparation.md").read_text(), {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, "docs/preparation.md", "exec"), names)
    assert len(names["llama"]) == 4 and str(names["report"])


def test_page_on_quantized_layers_runs():
    """Its blocks go on from each other."""
    pytest.importorskip("torch")
    text, names = (ROOT / "docs" / "quantized-layers.md").read_text(), {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, "docs/quantized-layers.md", "exec"), names)
    assert len(names["report"].quantized) == 2


def test_page_on_algorithms_runs():
    """Its blocks go on from each other."""
    pytest.importorskip("torch")
    text, names = (ROOT / "docs" / "algorithms.md").read_text(), {"__name__": __name__}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, "docs/algorithms.md", "exec", dont_inherit=True), names)
    assert len(names["history"]) == 3


def test_page_on_algorithms_names_every_algorithm():
    from flcore.algorithms import available

    text = (ROOT / "docs" / "algorithms.md").read_text()
    table = text.partition("## One step for all")[2].partition("## Nine questions")[0]
    for name in available():
        assert f"`{name}`" in table, name


def test_page_on_compression_runs():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", COMPRESSION, flags=re.S):
        exec(compile(block, "docs/compression.md", "exec"), names)
    assert len(names["data"]) < 4 * 650  # fewer bytes than the values have


def test_page_on_compression_names_every_codec_and_error_control():
    from flcore.compression import CODECS, FEEDBACKS

    for kind in (*CODECS.values(), *FEEDBACKS.values()):
        assert re.search(rf"`{kind.__name__}\(", COMPRESSION), kind.__name__


def test_page_on_aggregation_names_every_rule():
    from flcore import aggregation
    from flcore.aggregation._rule import PreAggregator, Rule

    rules = [
        name
        for name, kind in vars(aggregation).items()
        if isinstance(kind, type) and issubclass(kind, Rule | PreAggregator)
    ]
    assert len(rules) > 15
    table = PAGE.partition("## Rules")[2].partition("### Presets")[0]
    streams = PAGE.partition("## Streams")[2].partition("## Shards")[0]
    for name in rules:
        for where in (table, streams):
            assert re.search(rf"`{name}\b", where), name


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str):
    if name.startswith(NEED_TORCH) and not HAS_TORCH:
        pytest.skip("torch is not installed")
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
