"""`quantize_model`: the linear layers of a torch module in few bits, and a report of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from flcore._extras import require
from flcore.errors import DTypeError, InvalidInputError
from flcore.quantization._scheme import Scheme

if TYPE_CHECKING:
    import torch

__all__ = ["LayerReport", "ModelReport", "quantize_model"]

Skip = str | Sequence[str] | Callable[[str, Any], bool]


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes
    ----------
    name : str
        Path in the model.
    shape : tuple of int
        Of its weight.
    skipped : str
        Why it was left as it is; "" if it was quantised.
    error : float
        ``|W^ - W| / |W|``, Frobenius; 0 if skipped.
    bytes_before, bytes_after : int
        Of the weight, scales and zeros included.
    """

    name: str
    shape: tuple[int, ...]
    skipped: str
    error: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class ModelReport:
    """What `quantize_model` did; ``print(report)`` shows a table.

    Attributes
    ----------
    model : torch.nn.Module
        The model, changed in place.
    scheme : Scheme
    layers : tuple of LayerReport
        Every linear layer (and embedding, where these were asked for), in the model's order.
    trainable : int
        Values that are still trained.
    """

    model: Any = field(repr=False)
    scheme: Scheme
    layers: tuple[LayerReport, ...]
    trainable: int

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that were quantised."""
        return tuple(layer for layer in self.layers if not layer.skipped)

    @property
    def bytes_before(self) -> int:
        """Bytes of the quantised layers' weights as they were."""
        return sum(layer.bytes_before for layer in self.quantized)

    @property
    def bytes_after(self) -> int:
        """Bytes of the quantised layers' weights as they are."""
        return sum(layer.bytes_after for layer in self.quantized)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=0)
        lines = [
            f"{layer.name:<{width}}  {' x '.join(map(str, layer.shape)):>14}  "
            + (
                f"skipped: {layer.skipped}"
                if layer.skipped
                else f"{layer.bytes_before:>12,} -> {layer.bytes_after:>11,} bytes, "
                f"error {layer.error:.2%}"
            )
            for layer in self.layers
        ]
        ratio = self.bytes_before / self.bytes_after if self.bytes_after else 1.0
        lines.append(
            f"{len(self.quantized)} of {len(self.layers)} layers in {self.scheme.bits} bits: "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes ({ratio:.2f}x); "
            f"{self.trainable:,} values are trained"
        )
        return "\n".join(lines)


def quantize_model(
    model: torch.nn.Module,
    scheme: Scheme | str = "int4",
    *,
    skip: Skip = (),
    activation_bits: int = 16,
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    embeddings: Scheme | str | None = None,
    freeze: bool | None = None,
) -> ModelReport:
    """Replace the linear layers of a model by `flcore.nn.QuantLinear`, in place.

    Left as they are, each with its reason in the report: layers of `skip`; subclasses of
    ``torch.nn.Linear``, whose owners may read the weight themselves; weights that several modules
    share (a head tied to its embedding).

    Parameters
    ----------
    model : torch.nn.Module
        Holds linear layers below its root.
    scheme : Scheme or str
        As `flcore.quantization.quantize` takes it.
    skip : pattern, patterns, or function (name, module) -> bool
        Layers to leave: names with wildcards ("lm_head", "*.out"), each of which must match.
    activation_bits : {16, 8}
        As in `QuantLinear`.
    lora_rank, lora_alpha
        Adapters of every quantised layer.
    embeddings : Scheme or str, optional
        Also replace ``torch.nn.Embedding``, with this scheme.
    freeze : bool, optional
        Stop training everything but adapters; by default where there are adapters.

    Returns
    -------
    ModelReport

    Raises
    ------
    InvalidInputError
        No layer to quantise, a pattern that matches none, or a model that is itself the layer.
    DTypeError
        `model` is no module, or a scheme that does not go with `activation_bits`.
    NonFiniteError
        A weight that is not finite. The model may have been changed in part.

    Examples
    --------
    >>> import torch
    >>> from flcore.quantization import quantize_model
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    >>> report = quantize_model(model, "int4", skip="1", lora_rank=4)
    >>> [(layer.name, layer.skipped) for layer in report.layers]
    [('0', ''), ('1', 'asked for')]
    """
    torch = require("torch", "torch")
    from flcore import nn

    if not isinstance(model, torch.nn.Module):
        raise DTypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.nn.Linear):
        raise InvalidInputError(
            "model: a linear layer cannot replace itself; use QuantLinear.from_linear"
        )
    scheme = Scheme.of(scheme)
    table_scheme = None if embeddings is None else Scheme.of(embeddings)
    kinds = (torch.nn.Linear,) if table_scheme is None else (torch.nn.Linear, torch.nn.Embedding)
    found = list(_layers(model, kinds))
    asked = _chosen(skip, found)
    shared = _shared(model)
    if freeze or (freeze is None and lora_rank):
        model.requires_grad_(False)
    options = {
        "activation_bits": activation_bits,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
    }
    layers = []
    for name, owner, child, layer in found:
        why = _reason(name, layer, kinds, asked, shared)
        new: Any = None
        if not why and isinstance(layer, torch.nn.Linear):
            new = nn.QuantLinear.from_linear(layer, scheme, **options)
        elif not why:
            try:
                new = nn.QuantEmbedding.from_embedding(layer, table_scheme or scheme)
            except InvalidInputError as error:
                why = str(error)
        if new is not None:
            setattr(owner, child, new.train(layer.training))
            if isinstance(owner, torch.nn.TransformerEncoderLayer):
                # its fused inference path reads weights as tensors; this is how it is told not to
                owner.activation_relu_or_gelu = 0
        layers.append(_report(name, layer.weight.detach(), new, why))
    if not any(not layer.skipped for layer in layers):
        reasons = "; ".join(f"{layer.name}: {layer.skipped}" for layer in layers)
        raise InvalidInputError(f"model: no layer to quantise ({reasons or 'no linear layer'})")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelReport(model, scheme, tuple(layers), trainable)


Found = tuple[str, Any, str, Any]  # path, module that holds the layer, its name there, the layer


def _layers(model: Any, kinds: tuple[type, ...]) -> Iterator[Found]:
    for path, owner in model.named_modules():
        for child, layer in owner.named_children():
            if isinstance(layer, kinds):
                yield (f"{path}.{child}" if path else child), owner, child, layer


def _chosen(skip: Skip, found: list[Found]) -> set[str]:
    """Names of the layers to leave."""
    if callable(skip):
        return {name for name, _, _, layer in found if skip(name, layer)}
    patterns = [skip] if isinstance(skip, str) else list(skip)
    names = [name for name, *_ in found]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidInputError(
                f"skip: {pattern!r} matches no layer; there are {', '.join(names) or 'none'}"
            )
    return {name for name in names if any(fnmatchcase(name, p) for p in patterns)}


def _shared(model: Any) -> dict[int, list[str]]:
    """Names of every parameter, by identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _reason(
    name: str, layer: Any, kinds: tuple[type, ...], asked: set[str], shared: dict[int, list[str]]
) -> str:
    if name in asked:
        return "asked for"
    if type(layer) not in kinds:
        return f"a subclass of {next(k for k in kinds if isinstance(layer, k)).__name__}"
    others = [other for other in shared[id(layer.weight)] if other != f"{name}.weight"]
    return f"its weight is shared with {', '.join(others)}" if others else ""


def _report(name: str, w: Any, new: Any, why: str) -> LayerReport:
    before = w.numel() * w.element_size()
    if new is None:
        return LayerReport(name, tuple(w.shape), why, 0.0, before, before)
    wide = w.float()
    norm = float(wide.norm())
    error = float((new.weight.dequantize("float32") - wide).norm()) / norm if norm else 0.0
    parts = (new.codes, new.scales, new.zeros)
    after = sum(part.numel() * part.element_size() for part in parts if part is not None)
    return LayerReport(name, tuple(w.shape), "", error, before, after)
